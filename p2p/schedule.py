"""Which timesteps a run visits, and how much of the picture each holds: float64 numbers, frozen, no device."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from p2p.errors import UsageError


class Schedule(NamedTuple):
    """N steps from noise to picture. Iterating gives (t, alphas_cumprod[t], alphas_cumprod of the next step)."""

    timesteps: tuple[int, ...] | tuple[float, ...]   # falling
    alphas: tuple[float, ...]    # N + 1: of each timestep, then of the end

    def __iter__(self) -> Iterator[tuple[int | float, float, float]]:   # type: ignore[override]
        return iter(list(zip(self.timesteps, self.alphas, self.alphas[1:])))

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def ending(self, final_alpha: float | None) -> Schedule:
        """The same steps, the last one to that alphas_cumprod; None: as it is."""
        return self if final_alpha is None else Schedule(self.timesteps, (*self.alphas[:-1], final_alpha))


def ddim_schedule(alphas_cumprod: Tensor, steps: int, offset: int = 1, final_alpha: float | None = None) -> Schedule:
    """Evenly spaced ("leading") timesteps, as Stable Diffusion samples: offset, offset + 1000 // N, ...

    alphas_cumprod (1000,); `offset` 1 or 0 (the official Prompt-to-Prompt code: 1); `final_alpha` is what the last
    step reaches: None for alphas_cumprod[0] (set_alpha_to_one False, Stable Diffusion), 1.0 for the clean picture.
    """
    total = len(alphas_cumprod)
    if not 1 <= steps <= total:
        raise UsageError(f"steps must be from 1 to {total}, not {steps}")
    stride = total // steps
    offset = min(offset, total - 1 - (steps - 1) * stride)   # no timestep twice: of 1000 steps the first is 999
    timesteps = [i * stride + offset for i in reversed(range(steps))]
    table = alphas_cumprod.tolist()
    alphas = [table[t] for t in timesteps]
    # each step ends where t - stride lies: the next timestep, and at the end whatever final_alpha says
    return Schedule(tuple(timesteps), (*alphas, table[0] if final_alpha is None else final_alpha))


def sigma_schedule(alphas_cumprod: Tensor, steps: int) -> Schedule:
    """k-diffusion's default noise levels of a model with discrete timesteps (`get_sigmas`).

    Timesteps fall evenly from the last to 0 and are fractions; between two, log(sigma) is interpolated, where
    sigma^2 = (1 - a) / a; the last step ends at the clean picture.
    """
    total = len(alphas_cumprod)
    if not 1 <= steps <= total:
        raise UsageError(f"steps must be from 1 to {total}, not {steps}")
    table = alphas_cumprod.double().cpu()
    log_sigmas = ((1 - table) / table).log() / 2
    t = torch.linspace(total - 1, 0, steps, dtype=torch.float64)
    sigmas = torch.lerp(log_sigmas[t.floor().long()], log_sigmas[t.ceil().long()], t.frac()).exp()
    return Schedule(tuple(t.tolist()), (*(1 / (1 + sigmas**2)).tolist(), 1.0))

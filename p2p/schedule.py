"""Which timesteps a run visits, and how much of the picture each holds: float64 numbers, frozen, no device."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from p2p.errors import UsageError
from weights.untrusted import brief


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


def ddim_schedule(alphas_cumprod: Tensor, steps: int, offset: int = 1, final_alpha: float | None = None,
                  spacing: str = "leading") -> Schedule:
    """Evenly spaced timesteps, each step ending at the level where the next begins (not 1000 // N below, as in diffusers,
    which is another level where N does not divide 1000 and the spacing is not leading).

    alphas_cumprod (1000,). spacing, as Lin et al. 2023, table 2, and diffusers name it, with the same timesteps: "leading":
    offset, offset + 1000 // N, ..., as Stable Diffusion samples; "trailing": ..., 999 - 1000 / N, 999, from pure noise (models
    of few steps, or of zero terminal SNR); "linspace": 0, ..., 999. `offset` 1 or 0, of leading alone (the official
    Prompt-to-Prompt code: 1). `final_alpha` is what the last step reaches: None for alphas_cumprod[0] (set_alpha_to_one False,
    Stable Diffusion), 1.0 for the clean picture.
    """
    total = len(alphas_cumprod)
    if not 1 <= steps <= total:
        raise UsageError(f"steps must be from 1 to {total}, not {steps}")
    if spacing == "leading":
        stride = total // steps
        rising = np.arange(steps) * stride + min(offset, total - 1 - (steps - 1) * stride)   # of 1000 steps the first is 999
    elif spacing == "trailing":
        rising = np.arange(total, 0, -total / steps)[:steps][::-1].round() - 1
    elif spacing == "linspace":
        rising = np.linspace(0, total - 1, steps).round()
    else:
        raise UsageError(f"timestep_spacing {brief(spacing)} is not known; known: leading, trailing, linspace")
    timesteps = [int(t) for t in rising[::-1]]
    table = alphas_cumprod.tolist()
    alphas = [table[t] for t in timesteps]
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

"""Which timesteps a run visits, and how much of the picture each holds: float64 numbers, frozen, no device."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from p2p.errors import UsageError


class Schedule(NamedTuple):
    """N steps from noise to picture. Iterating gives (t, alphas_cumprod[t], alphas_cumprod of the next step)."""

    timesteps: tuple[int, ...]   # falling
    alphas: tuple[float, ...]    # N + 1: of each timestep, then of the end

    def __iter__(self) -> Iterator[tuple[int, float, float]]:   # type: ignore[override]
        return iter(list(zip(self.timesteps, self.alphas, self.alphas[1:])))

    @property
    def steps(self) -> int:
        return len(self.timesteps)


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
        rising = np.arange(steps) * (total // steps) + offset
    elif spacing == "trailing":
        rising = np.arange(total, 0, -total / steps)[:steps][::-1].round() - 1
    elif spacing == "linspace":
        rising = np.linspace(0, total - 1, steps).round()
    else:
        raise UsageError(f"timestep_spacing {spacing!r} is not known; known: leading, trailing, linspace")
    timesteps = [min(int(t), total - 1) for t in rising[::-1]]
    table = alphas_cumprod.tolist()
    alphas = [table[t] for t in timesteps]
    return Schedule(tuple(timesteps), (*alphas, table[0] if final_alpha is None else final_alpha))

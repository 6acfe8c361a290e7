"""Uni-Edit (Jiao et al. 2025): the target leaves the source along the difference of what the network says of
its own latents under both prompts, most where that is largest."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from p2p.denoise import Batch
from p2p.models.network import Network
from p2p.request.checks import finite


@dataclass(frozen=True)
class UniEdit:
    """The settings of Uni-Edit.

    omega: how far the difference leads, in place of guidance_scale. The source's prompt stands in the place
    of the empty one. A later start, the authors' alpha (0.6 of 15 steps to keep, 0.8 to change), is an
    inversion with `skip`, by uni-inv; 5 is theirs for 8 to 50 steps, fewer overshoot. The mean difference of
    a latent is of absolute values, as in the authors' code for FLUX (which takes a token of 2 x 2 latents
    for one; that for diffusers averages signed values).
    """

    omega: float = 5.0

    guided_source: ClassVar[bool] = False
    source_prompt: ClassVar[None] = None

    def __post_init__(self) -> None:
        """Raises UsageError."""
        object.__setattr__(self, "omega", finite("editor: omega", self.omega))

    def plan(self, unet: Network, batch: Batch, steps: int, device: torch.device) -> list[Any]:
        """No attention is edited."""
        return [None] * steps

    def guide(self, source: Tensor, target: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Predictions (N, C, H, W) under both prompts -> their fusion m v_T + (1 - m) v_S, and the correction
        omega (1 + m) (v_T - v_S). A scaled difference has the same m, so this holds of eps, v, x_0 and a
        flow's velocity alike. guidance_scale is not read here: the source's prompt takes the empty one's
        place (a network that was distilled with its guidance reads it as an input)."""
        difference = target - source
        size = difference.abs().mean(1, keepdim=True)                                # (N, 1, H, W)
        low, high = size.amin((1, 2, 3), keepdim=True), size.amax((1, 2, 3), keepdim=True)
        m = (size - low) / (high - low).clamp(min=torch.finfo(size.dtype).tiny)
        return source + (m + self.omega * (1 + m)) * difference

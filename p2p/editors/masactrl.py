"""MasaCtrl (Cao et al. 2023): the target asks its own questions of the source's keys and
values in self-attention.

What moves is decided by the prompt, what it looks like by the source: the opposite of Prompt-to-Prompt's
injection, and the same argument of the modules.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2p.denoise import Batch
from p2p.models.attention import AttentionEdit
from p2p.models.unet import UNet
from p2p.request.checks import share


def sources_of_halves(batch: Batch, device: torch.device) -> Tensor:
    """For each row of the batch the source's row in its own half, unconditional or not; without an
    unconditional source, the other.  -> (B,) long"""
    uncond = batch.source() if batch.lone_source else 0
    rows = torch.arange(batch.rows, device=device)
    return torch.where(rows < batch.unconditional, uncond, batch.source())


@dataclass(frozen=True)
class MasaCtrl:
    """start: share of the steps before it begins; layers: share of the attention layers, in the order in
    which they run, that is left alone (10 of Stable Diffusion 1's 16: it acts in the last of the decoder).

    Unconditional rows ask the source's unconditional row, conditional ones its conditional row, as
    in the authors' code.
    """

    start: float = 0.08
    layers: float = 0.625

    guided_source: ClassVar[bool] = True   # a known source is run unconditionally too
    source_prompt: ClassVar[None] = None   # the source is told its own prompt

    def __post_init__(self) -> None:
        """Raises UsageError."""
        share("editor: start", self.start), share("editor: layers", self.layers)

    def plan(self, unet: UNet, batch: Batch, steps: int,
             device: torch.device) -> list[dict[str, AttentionEdit]]:
        """An edit by site for every step."""
        own, source = torch.arange(batch.rows, device=device), sources_of_halves(batch, device)
        sites = unet.pixel_sites()
        edit = AttentionEdit(own, pixels=torch.stack([own, source, source]))
        last = dict.fromkeys(sites[math.ceil(self.layers * len(sites)):], edit)
        return [last if i >= int(self.start * steps) else {} for i in range(steps)]

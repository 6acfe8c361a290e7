"""MasaCtrl (Cao et al. 2023): in self-attention, the target's queries attend to the source's keys and values.

The prompt decides the layout, and the source the appearance: the opposite of Prompt-to-Prompt's injection,
through the same argument of the modules.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2p.denoise import Batch
from p2p.models.attention import AttentionEdit
from p2p.models.network import Network
from p2p.request.checks import share


def sources_of_halves(batch: Batch, device: torch.device) -> Tensor:
    """For each row of the batch, the source's row of the same half, unconditional or conditional; without an
    unconditional source, always the conditional one.  -> (B,) long"""
    uncond = batch.source() if batch.lone_source else 0
    rows = torch.arange(batch.rows, device=device)
    return torch.where(rows < batch.unconditional, uncond, batch.source())


@dataclass(frozen=True)
class MasaCtrl:
    """The settings of MasaCtrl.

    start: share of the steps before it begins. layers: share of the attention layers, in the order in which
    they run, that it skips (10 of Stable Diffusion 1's 16: it acts in the last of the decoder).
    Unconditional rows attend to the source's unconditional row, conditional ones to its conditional row, as
    in the authors' code.
    """

    start: float = 0.08
    layers: float = 0.625

    guided_source: ClassVar[bool] = True   # an inverted source has an unconditional row too
    source_prompt: ClassVar[None] = None   # the source is conditioned on its own prompt

    def __post_init__(self) -> None:
        """Raises UsageError."""
        for name in ("start", "layers"):
            object.__setattr__(self, name, share(f"editor: {name}", getattr(self, name)))

    def plan(self, unet: Network, batch: Batch, steps: int,
             device: torch.device) -> list[dict[str, AttentionEdit]]:
        """An edit by site for every step."""
        own_rows, source = torch.arange(batch.rows, device=device), sources_of_halves(batch, device)
        sites = unet.pixel_sites()
        edit = AttentionEdit(own_rows, pixels=torch.stack([own_rows, source, source]))
        last = dict.fromkeys(sites[math.ceil(self.layers * len(sites)):], edit)
        return [last if i >= int(self.start * steps) else {} for i in range(steps)]

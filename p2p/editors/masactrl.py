"""MasaCtrl (Cao et al. 2023): the target asks its own questions of the source's keys and values in self-attention.

What moves is decided by the prompt, what it looks like by the source: the opposite of Prompt-to-Prompt's injection, and
the same argument of the modules.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2p.models.attention import AttentionEdit
from p2p.models.unet import UNet
from p2p.request.checks import share


def borrowing(rows: Tensor, length: int, dtype: torch.dtype) -> AttentionEdit:
    """An edit of all rows that changes nothing but whose pixels they use, (3, B): see `AttentionEdit.rows`."""
    own = torch.arange(rows.shape[1], device=rows.device)
    return AttentionEdit(own, torch.zeros(len(own), length, length, device=rows.device, dtype=dtype),
                         torch.ones(len(own), length, device=rows.device, dtype=dtype), own, torch.zeros_like(own), rows=rows,
                         only="own", injected=0)


def sources_of_halves(guided: int, n: int, device: torch.device) -> Tensor:
    """The source row of each one's half of a batch: `guided` unconditional rows and n conditional ones, the source first in
    each.  -> (guided + n,) long"""
    return torch.where(torch.arange(guided + n, device=device) < guided, 0, guided)


@dataclass(frozen=True)
class MasaCtrl:
    """start: share of the steps before it begins; layers: share of the attention layers, in the order in which they run,
    that is left alone (10 of Stable Diffusion 1's 16: it acts in the last of the decoder).

    Unconditional rows ask the source's unconditional row, conditional ones its conditional row, as in the authors' code.
    """

    start: float = 0.08
    layers: float = 0.625

    guided_source: ClassVar[bool] = True   # a known source is run unconditionally too
    source_prompt: ClassVar[None] = None   # the source is told its own prompt

    def __post_init__(self) -> None:
        """Raises UsageError."""
        share("editor: start", self.start), share("editor: layers", self.layers)

    def plan(self, unet: UNet, n: int, guided: int, *, steps: int, length: int, device: torch.device,
             dtype: torch.dtype) -> list[dict[str, AttentionEdit]]:
        """An edit by site for every step of a source and n - 1 targets; guided: n with guidance, 0 without."""
        own, source = torch.arange(guided + n, device=device), sources_of_halves(guided, n, device)
        sites = unet.sites()
        edit = borrowing(torch.stack([own, source, source]), length, dtype)
        last = dict.fromkeys(sites[math.ceil(self.layers * len(sites)):], edit)
        return [last if i >= int(self.start * steps) else {} for i in range(steps)]

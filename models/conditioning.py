"""What a network is conditioned on besides x_t."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2p.models.attention import KV


class Text(NamedTuple):
    """What a UNet computes from the text alone, the same at every step; see `UNet.read`."""

    texts: dict[str, KV]               # keys and values by attention layer
    pooled: Tensor | None = None       # (B, temb): added to the timestep's embedding


class ReadText(NamedTuple):
    """What an MM-DiT makes of the text alone, the same at every step; see `MMDiT.read`."""

    tokens: Tensor   # (B, L, D)


Time = dict[str, Tensor]   # by residual block, what it adds for a timestep: (1 or B, out), see `UNet.times`


class Conditioning(NamedTuple):
    """The inputs of a network besides x_t and t, for B rows."""

    # (B, L, C): the text, token by token; or what `Model.read` computes from it
    context: Tensor | Text | ReadText
    vector: Tensor | None = None     # (B, V): pooled text and picture size (SDXL)
    # (B, 3, H, W): the low-resolution picture at full size, noised (super-resolution)
    low: Tensor | None = None
    level: Tensor | None = None      # (B,): the timestep of its noise
    guidance: Tensor | None = None   # (B,): the guidance scale, of models that were distilled with one

    def given(self) -> dict[str, Any]:
        """Those that there are, by name, as networks take them."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def rows(self, first: int) -> Conditioning:
        """The rows from `first` on."""
        return Conditioning._make(None if field is None else field[first:] for field in self)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning._make(None if field[0] is None else torch.cat(field) for field in zip(*parts))

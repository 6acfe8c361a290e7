"""What the method asks of a network, whichever it is: its attention layers, by site, and what it takes."""
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from p2p.models.attention import Attention, CrossAttention, JointAttention, SelfAttention
from p2p.models.conditioning import Conditioning

M = TypeVar("M", bound=nn.Module)


class Network(nn.Module, ABC):
    """Predicts from x_t, t and text. Its layers with a `site` have that name in it."""

    config: Any
    in_order: list[nn.Module]   # its modules as they run; listed once, which takes milliseconds

    def layers(self, kind: type[M]) -> list[M]:
        """The modules of that kind in the order in which they run."""
        return [m for m in self.in_order if isinstance(m, kind)]

    def text_sites(self) -> list[str]:
        """The layers whose maps have columns of text."""
        return [m.site for m in self.layers(CrossAttention)]

    def pixel_sites(self) -> list[str]:
        """The layers in which pixels attend to pixels."""
        return [m.site for m in self.layers(Attention) if m.pixel_columns]

    def self_sites(self) -> list[str]:
        """The layers whose pixels take the source's queries and keys in Prompt-to-Prompt, which in hybrid
        layers edits the text alone."""
        return [m.site for m in self.layers(Attention) if isinstance(m, (SelfAttention, JointAttention))]

    @abstractmethod
    def site_pixels(self, height: int, width: int) -> dict[str, int]:
        """The number of pixels of each attention layer, for x of that height and width."""

    @abstractmethod
    def numbers_held(self, height: int, width: int) -> int:
        """Numbers that one row of x of that size holds at once, at least."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype it computes in; its layers may hold their weights in half that width."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def unit(self) -> int:
        """What the sides of x must be multiples of."""
        return self.config.patch

    @property
    def largest(self) -> float:
        """How long the sides of x may be."""
        return math.inf

    @property
    def enlarges(self) -> bool:
        """Whether it is a super-resolution stage."""
        return False

    @property
    def text_width(self) -> int:
        """Width of the context that it takes."""
        return self.config.context_dim

    @property
    @abstractmethod
    def reads_guidance(self) -> bool:
        """Whether the guidance scale is one of its inputs."""

    def with_guidance(self, conditioning: Conditioning, scale: float | Tensor) -> Conditioning:
        """The conditioning with the guidance scale, one or one a row, where that is one of its inputs."""
        if not self.reads_guidance:
            return conditioning
        scales = torch.as_tensor(scale, dtype=torch.float32, device=self.device).flatten()
        if isinstance(conditioning.context, Tensor):   # not read yet: rows may still be cut and joined
            scales = scales.expand(len(conditioning.context))
        return conditioning._replace(guidance=scales)

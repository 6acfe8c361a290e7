"""Plug-and-Play diffusion features (Tumanyan et al. 2023): the source's features and self-attention in the decoder."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2p.editors.masactrl import borrowing
from p2p.models.attention import AttentionEdit
from p2p.models.unet import UNet
from p2p.request.checks import share
from p2p.request.prompts import check as check_prompt


@dataclass(frozen=True)
class PlugAndPlay:
    """features: share of the steps in which the targets take the source's features: what one residual block, the second of the
    first decoder level with attention, adds to its skip connection, which stays the target's own. attention: the same for
    queries and keys of self-attention from there on (the authors' choice of layers for Stable Diffusion).
    source_prompt: what the source is told while it is sampled; None for its own prompt (in the authors' code: "").

    Both halves of a target take what is the source's with its prompt, as in the authors' code.
    """

    features: float = 0.8
    attention: float = 0.5
    source_prompt: str | None = None

    guided_source: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises UsageError."""
        share("editor: features", self.features), share("editor: attention", self.attention)
        if self.source_prompt is not None:
            check_prompt(self.source_prompt)

    def plan(self, unet: UNet, n: int, guided: int, *, steps: int, length: int, device: torch.device,
             dtype: torch.dtype) -> list[dict[str, AttentionEdit | Tensor]]:
        """An edit by site for every step of a source and n - 1 targets; guided: how many unconditional rows come first, n, or
        n - 1 without the source's, or 0. Until both shares end, a step has rows for both, the own ones where a share is over:
        one graph."""
        own = torch.arange(guided + n, device=device)
        source = torch.full_like(own, guided)
        source[0] = 0 if guided == n else guided   # the source's own unconditional row
        decoder = list(dict.fromkeys(s for s in unet.sites() if s.startswith("up_blocks")))
        block, ends = decoder[1].replace("attentions", "resnets"), [int(share * steps) for share in (self.features, self.attention)]

        def step(features: Tensor, attention: AttentionEdit) -> dict[str, AttentionEdit | Tensor]:
            return {block: features} | dict.fromkeys(decoder[1:], attention)

        theirs, ours = (borrowing(torch.stack([rows, rows, own]), length, dtype) for rows in (source, own))
        return [step(source if i < ends[0] else own, theirs if i < ends[1] else ours) if i < max(ends) else {}
                for i in range(steps)]

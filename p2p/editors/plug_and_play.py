"""Plug-and-Play diffusion features (Tumanyan et al. 2023): injects the source's features and
self-attention in the decoder."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from p2p.denoise import Batch
from p2p.errors import UsageError
from p2p.models.attention import AttentionEdit
from p2p.models.network import Network
from p2p.request.checks import share
from p2p.request.prompts import check as check_prompt


def _decoder(unet: Network) -> dict[str, list[str]]:
    """The attention layers of a UNet's decoder, and the sites in each; none of an MM-DiT."""
    layers: dict[str, list[str]] = {}
    for site in unet.pixel_sites():
        if site.startswith("up_blocks"):
            layers.setdefault(".".join(site.split(".")[:4]), []).append(site)
    return layers


@dataclass(frozen=True)
class PlugAndPlay:
    """The settings of Plug-and-Play.

    features: share of the steps in which the targets take the source's features: what one residual block,
    the second of the first decoder level with attention, adds to its skip connection, which stays the
    target's own. attention: share of the steps in which they take the source's queries and keys of
    self-attention in that and all later layers (the authors' choice of layers for Stable Diffusion).
    source_prompt: what the source is conditioned on while it is sampled; None for its own prompt (in the
    authors' code: ""). Both halves of a target read the source's conditional row, as in the authors' code.
    """

    features: float = 0.8
    attention: float = 0.5
    source_prompt: str | None = None

    guided_source: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises UsageError."""
        for name in ("features", "attention"):
            object.__setattr__(self, name, share(f"editor: {name}", getattr(self, name)))
        if self.source_prompt is not None:
            check_prompt(self.source_prompt)

    def check(self, unet: Network) -> None:
        """Raises UsageError for a network without the features that it injects."""
        if len(_decoder(unet)) < 2:
            raise UsageError("editor PlugAndPlay: it injects what the second residual block with attention "
                             "adds in a UNet's decoder, and this network has none; use MasaCtrl, or "
                             "Prompt-to-Prompt's self_replace_steps")

    def plan(self, unet: Network, batch: Batch, steps: int,
             device: torch.device) -> list[dict[str, AttentionEdit | Tensor]]:
        """An edit by site for every step. Until both shares end, a step has rows for both (each row's own
        where a share has ended), so that a compiled network has one graph."""
        own_rows = torch.arange(batch.rows, device=device)
        source = torch.full_like(own_rows, batch.source())
        if not batch.lone_source:
            source[0] = 0   # the source's own unconditional row
        self.check(unet)
        decoder = _decoder(unet)
        _, second, *_ = decoder
        block = second.replace("attentions", "resnets")
        sites = [site for layer in list(decoder)[1:] for site in decoder[layer]]
        ends = [int(share * steps) for share in (self.features, self.attention)]

        def step(i: int) -> dict[str, AttentionEdit | Tensor]:
            features, attention = (source if i < end else own_rows for end in ends)
            edit = AttentionEdit(own_rows, pixels=torch.stack([attention, attention, own_rows]))
            return {block: features} | dict.fromkeys(sites, edit)

        return [step(i) if i < max(ends) else {} for i in range(steps)]

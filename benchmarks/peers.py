"""What the speed and memory benchmarks compare with, on the same weights: diffusers' UNet, and on it the official way of editing.

The official way (google/prompt-to-prompt): every layer forms its attention map, a controller reads and rewrites it between the
softmax and the values, and keeps the maps of at most 32 x 32 pixels, summed over the steps. Rewritten here from the formulas.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from p2p.models.attention import AttentionEdit
from p2p.models.layers import widened_names
from p2p.models.text import tokens  # noqa: F401  (before diffusers: it defines operators that a CPU build of torch lacks)
from p2p.models.unet import SD1, UNet

TOKENS = 77
KINDS = ("swap", "refine", "reweight")


class Size(NamedTuple):
    width: int    # of the first level; Stable Diffusion 1 has 320
    side: int     # of the latents


# group norms of 32 groups allow no width between 64 and 96: nano is a little wider than a quarter
SIZES = {"nano-32": Size(96, 32), "nano-64": Size(96, 64), "mid": Size(320, 32), "full": Size(320, 64)}


def ours(width: int, device: torch.device, dtype: torch.dtype, held: torch.dtype | None = None) -> UNet:
    """Stable Diffusion 1's topology with random weights. held: of the large ones, which our layers widen."""
    with torch.device("meta"):
        net = UNet(replace(SD1, channels=tuple(width * m for m in (1, 2, 4, 4))))
    large, g, state = widened_names(net), torch.Generator().manual_seed(0), {}
    for name, p in net.state_dict().items():
        t = torch.randn(p.shape, generator=g) * (0.7 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)
        t = (t + (p.ndim == 1 and name.endswith("weight"))).to(device, held if held and name in large else dtype)
        state[name] = t
    net.load_state_dict(state, strict=True, assign=True)
    return net.eval().requires_grad_(False)


def diffusers_on(net: UNet):
    """diffusers' UNet with the very same parameters, laid out as it loads them."""
    import diffusers

    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8,
                                                block_out_channels=net.config.channels)
    theirs.load_state_dict({name: p.contiguous() for name, p in net.state_dict().items()}, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def inputs(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and context of a source and a target: the unconditional rows, then the prompts'."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, size.side, size.side, generator=g).repeat(2, 1, 1, 1)
    null, words = torch.randn(1, TOKENS, 768, generator=g), torch.randn(2, TOKENS, 768, generator=g)
    return x.to(device, dtype), torch.tensor(500, device=device), torch.cat([null, null, words]).to(device, dtype)


class Formula(NamedTuple):
    """One kind of edit as the official code holds it."""

    mapper: Tensor   # swap: (L, L) matrix; refine: (L,) index of the source's token
    alphas: Tensor   # (L,): refine: the share of the source; else the words that are injected
    scale: Tensor    # (L,): reweight


def formula(kind: str, device: torch.device, dtype: torch.dtype) -> Formula:
    """The swap splits a word over two tokens, the refinement adds two words, the weight is that of one."""
    eye, ones = torch.eye(TOKENS, dtype=dtype), torch.ones(TOKENS, dtype=dtype)
    if kind == "swap":
        eye[2, 2:4] = 0.5
        return Formula(eye.to(device), ones.to(device), ones.to(device))
    if kind == "refine":
        index, alphas = torch.arange(TOKENS), ones.clone()
        index[5:], alphas[3:5] = index[5:] - 2, 0
        return Formula(index.to(device), alphas.to(device), ones.to(device))
    scale = ones.clone()
    scale[2] = 3
    return Formula(eye.to(device), ones.to(device), scale.to(device))


def as_edit(kind: str, f: Formula) -> AttentionEdit:
    """The same edit as the modules here take it; self-attention of the source at all sites of at most 32 x 32 pixels."""
    mix = torch.eye(TOKENS, device=f.alphas.device, dtype=f.alphas.dtype)[:, f.mapper] if kind == "refine" else f.mapper
    mix, keep = mix * (f.alphas * f.scale), 1 - f.alphas
    row = torch.tensor([2], device=mix.device)
    return AttentionEdit(row, mix[None], keep[None], pixels=torch.stack([row, row, row + 1]),
                         max_pixels=torch.tensor([32 * 32], device=mix.device))


class Official:
    """A controller and the attention processor that calls it."""

    def __init__(self, kind: str, f: Formula):
        self.kind, self.f, self.stored, self.sums = kind, f, [], []

    def between_steps(self) -> None:
        self.sums = [a + b for a, b in zip(self.sums, self.stored)] if self.sums else self.stored
        self.stored = []

    def _edited(self, maps: Tensor, cross: bool) -> Tensor:
        """(2 heads, N, L) of the prompts' rows"""
        source, own = maps.unflatten(0, (2, -1))                                     # (h, N, L) each
        if not cross:
            new = source if own.shape[1] <= 32 * 32 else own
        elif self.kind == "swap":
            new = torch.einsum("hpw,wn->hpn", source, self.f.mapper)
            new = new * self.f.alphas + own * (1 - self.f.alphas)
        elif self.kind == "refine":
            new = source[:, :, self.f.mapper] * self.f.alphas + own * (1 - self.f.alphas)
        else:
            new = source * self.f.scale
        return torch.cat([source, new])

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask=None) -> Tensor:
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (attn.head_to_batch_dim(f(y)) for f, y in (
            (attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # (B h, N, d)
        maps = (torch.einsum("bid,bjd->bij", q, k) * attn.scale).softmax(dim=-1)      # (B h, N, L)
        half = len(maps) // 2
        if maps.shape[1] <= 32 * 32:
            self.stored.append(maps[half:])
        maps[half:] = self._edited(maps[half:], cross)
        out = attn.batch_to_head_dim(torch.einsum("bij,bjd->bid", maps, v))
        return attn.to_out[1](attn.to_out[0](out))


def official(theirs, kind: str, f: Formula) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One step of the official way on diffusers' UNet; its own processors are put back afterwards."""
    controller = Official(kind, f)

    def step(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        before = theirs.attn_processors
        theirs.set_attn_processor(controller)
        try:
            out = theirs(x, t, context).sample
            controller.between_steps()
            return out
        finally:
            theirs.set_attn_processor(before)

    return step

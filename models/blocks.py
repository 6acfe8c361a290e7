"""The parts of a UNet: residual blocks, resampling, transformer blocks, levels, the timestep embedding."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2p.models.attention import (
    KV,
    QKV,
    AttentionEdit,
    CrossAttention,
    Edits,
    HybridAttention,
    Seen,
    SelfAttention,
    Texts,
    attend,
)
from p2p.models.layers import Conv2d, Linear, ModuleList


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep, cosines first (DDPM appendix B, as in Stable Diffusion).  (...) ->
    (..., dim) float32"""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10_000) * steps / (dim // 2))
    angles = t[..., None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def guidance_embedding(scale: Tensor, dim: int) -> Tensor:
    """Sinusoids of a guidance scale, sines first, for models that were distilled with guidance (Meng et al.
    2023, as latent consistency models have it).  (B,) -> (B, dim) float32"""
    half = dim // 2
    freqs = torch.exp(-math.log(10_000) * torch.arange(half, device=scale.device) / (half - 1))
    angles = 1000 * (scale[:, None].float() - 1) * freqs
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


class TimestepMLP(nn.Module):
    def __init__(self, dim: int, out: int, act: str = "silu", guidance_dim: int | None = None):
        super().__init__()
        self.linear_1, self.linear_2 = Linear(dim, out), Linear(out, out)
        if guidance_dim:
            self.cond_proj = Linear(guidance_dim, dim, bias=False)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None:
            x = x + self.cond_proj(guidance)
        return self.linear_2(self.act(self.linear_1(x)))


class TextPooling(nn.Module):
    """Pools the text into one vector: its mean attends to itself and to all tokens (DeepFloyd IF).
    (B, L, C) -> (B, out)"""

    class _Pool(nn.Module):   # the nesting keeps the tensor names of public checkpoints
        def __init__(self, dim: int, heads: int):
            super().__init__()
            self.heads = heads
            self.positional_embedding = nn.Parameter(torch.zeros(1, dim))
            self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first = x.mean(dim=1, keepdim=True) + self.positional_embedding      # (B, 1, C)
            x = torch.cat([first, x], dim=1)
            q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                       for f, y in ((self.q_proj, first), (self.k_proj, x), (self.v_proj, x)))
            return attend(q, k, v).transpose(1, 2).flatten(1)                    # (B, C)

    def __init__(self, dim: int, out: int, heads: int):
        super().__init__()
        self.norm1, self.pool = nn.LayerNorm(dim), self._Pool(dim, heads)
        self.proj, self.norm2 = Linear(dim, out), nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(x))))


class ResidualStyle(NamedTuple):
    """How a family builds its residual blocks. The defaults are Stable Diffusion's, the
    alternatives DeepFloyd IF's."""

    act: str = "silu"
    scale_shift: bool = False      # the timestep scales and shifts the second norm; else it is added before
    skip_time_act: bool = False    # no activation before the timestep's projection
    out_scale: float = 1.0         # the output is divided by this


class ResnetBlock(nn.Module):
    """Norm, activation, conv, twice, with the projected timestep between; temb_dim: None in the autoencoder.

    resample: "down" (2 x 2 means) or "up" (nearest) between the first activation and the first conv.
    """

    site = ""   # the block's name in its network, which gives it once, when it is built

    def __init__(self, dim: int, out: int, temb_dim: int | None, groups: int = 32, eps: float = 1e-5,
                 style: ResidualStyle = ResidualStyle(), resample: str | None = None):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, dim, eps), Conv2d(dim, out, 3, padding=1)
        self.time_emb_proj = Linear(temb_dim, out * (1 + style.scale_shift)) if temb_dim else None
        self.norm2, self.conv2 = nn.GroupNorm(groups, out, eps), Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = Conv2d(dim, out, 1) if dim != out else None
        self.style, self.act = style, ACTIVATIONS[style.act]
        self.resample = {None: nn.Identity(), "down": nn.AvgPool2d(2),
                         "up": nn.Upsample(scale_factor=2)}[resample]

    def time(self, temb: Tensor) -> Tensor:
        """Projects the timestep's embedding.  (..., temb_dim) -> (..., out) to add, or scale and shift
        (..., 2 out)"""
        assert self.time_emb_proj is not None   # only the autoencoder's blocks have none
        return self.time_emb_proj(temb if self.style.skip_time_act else self.act(temb))

    def forward(self, x: Tensor, time: Tensor | None = None, size: torch.Size | None = None,
                rows: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B, out, H, W). time: from `time`, one row or B; size: as in `Upsample`; rows
        (B,) long: whose residual each row adds to its own skip connection (Plug-and-Play's features)."""
        h = self.conv1(self.resample(self.act(self.norm1(x))))                   # (B, out, H, W)
        if time is None:
            h = self.norm2(h)
        elif self.style.scale_shift:
            scale, shift = time[:, :, None, None].chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time[:, :, None, None])
        h = self.conv2(self.act(h))
        h = h if rows is None else h.index_select(0, rows)
        x = self.resample(x)
        h = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.style.out_scale == 1 else h / self.style.out_scale


class Downsample(nn.Module):
    site = ""   # as in `ResnetBlock`, which may take its place

    def __init__(self, dim: int, padding: int = 1):
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))   # the autoencoder pads right and below only
        return self.conv(x)                                                      # (B, C, H/2, W/2)


class Upsample(nn.Module):
    site = ""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor | None = None, size: torch.Size | None = None) -> Tensor:
        """`size`: (H, W) of the skip that follows, where it is not exactly twice as large."""
        scale = None if size else 2.0
        return self.conv(F.interpolate(x, size=size, scale_factor=scale, mode="nearest"))


def resampler(kind: str, direction: str, dim: int, temb_dim: int, style: ResidualStyle) -> nn.Module:
    """The layer between two levels. kind: "conv", or "residual" (inside a residual block); direction: "down"
    or "up"."""
    if kind == "residual":
        return ResnetBlock(dim, dim, temb_dim, style=style, resample=direction)
    return {"down": Downsample, "up": Upsample}[direction](dim)


class Level(nn.Module):
    """Residual and attention layers of one level; the two lists are named as in public checkpoints."""

    def __init__(self, resnets: Sequence[ResnetBlock], attentions: Sequence[nn.Module]):
        super().__init__()
        self.resnets: ModuleList[ResnetBlock] = ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers: ModuleList[ResnetBlock | Downsample] = ModuleList()   # one, or none
        self.upsamplers: ModuleList[ResnetBlock | Upsample] = ModuleList()       # one, or none


class FeedForward(nn.Module):
    """GEGLU. The odd nesting keeps the tensor names of public checkpoints (ff.net.0.proj, ff.net.2).

    Where the hidden layer is large it runs on few rows at a time: it would take most of a step's memory.
    """

    LARGE = 2**24   # elements

    class _GEGLU(nn.Module):
        def __init__(self, dim: int, hidden: int):
            super().__init__()
            self.proj = Linear(dim, 2 * hidden)

        def forward(self, x: Tensor) -> Tensor:
            x, gate = self.proj(x).chunk(2, dim=-1)
            gate = F.gelu(gate)
            return x * gate if gate.requires_grad else gate.mul_(x)

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.hidden = 2 * dim * mult
        self.net = nn.Sequential(self._GEGLU(dim, dim * mult), nn.Identity(), Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        rows = max(1, self.LARGE // (x.shape[1] * self.hidden))
        return self.net(x) if rows >= len(x) else torch.cat([self.net(part) for part in x.split(rows)])


class TransformerBlock(nn.Module):
    """kind "cross": self-attention, cross-attention, feed-forward. kind "hybrid": hybrid
    attention, feed-forward."""

    def __init__(self, dim: int, context_dim: int, heads: int, kind: str, ff_mult: int = 4,
                 upcast: bool = False):
        super().__init__()
        head_dim = dim // heads
        self.norm1, self.norm3, self.ff = nn.LayerNorm(dim), nn.LayerNorm(dim), FeedForward(dim, ff_mult)
        self.hybrid = kind == "hybrid"
        self.attn1: HybridAttention | SelfAttention
        if self.hybrid:
            self.attn1 = HybridAttention(dim, context_dim, heads, head_dim, upcast)
        else:
            self.attn1 = SelfAttention(dim, heads, head_dim, upcast)
            self.norm2, self.attn2 = nn.LayerNorm(dim), CrossAttention(dim, context_dim, heads, head_dim,
                                                                       upcast)

    def forward(self, x: Tensor, texts: Texts, edit: Edits = None, seen: Seen | None = None) -> Tensor:
        if self.hybrid:
            x = x + self.attn1(self.norm1(x), texts, edit, seen)                 # (B, N, C)
        else:
            x = x + self.attn1(self.norm1(x), edit, seen)
            x = x + self.attn2(self.norm2(x), texts, edit, seen)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int, depth: int, kind: str, linear: bool,
                 ff_mult: int = 4, upcast: bool = False):
        super().__init__()
        proj = (lambda: Linear(dim, dim)) if linear else (lambda: Conv2d(dim, dim, 1))
        self.norm = nn.GroupNorm(32, dim, 1e-6)
        self.proj_in = proj()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, context_dim, heads, kind, ff_mult, upcast) for _ in range(depth))
        self.proj_out = proj()

    def forward(self, x: Tensor, texts: Texts, edit: Edits = None, seen: Seen | None = None) -> Tensor:
        shape, linear = x.shape, isinstance(self.proj_in, nn.Linear)
        h = self.norm(x)                                                         # (B, C, H, W)
        h = h if linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)                                         # (B, N, C)
        h = self.proj_in(h) if linear else h
        for block in self.transformer_blocks:
            h = block(h, texts, edit, seen)
        h = self.proj_out(h) if linear else h
        h = h.transpose(1, 2).unflatten(2, shape[2:])                            # (B, C, H, W)
        return x + (h if linear else self.proj_out(h))


class AddedAttention(HybridAttention):
    """Hybrid attention as a separate residual layer: DeepFloyd IF's ("added key and value projections").

    text_only: no columns of pixels, as in IF's super-resolution stages. norm_text: GroupNorm over
    the text's channels.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, text_only: bool, norm_text: bool):
        super().__init__(dim, context_dim, heads, dim // heads, bias=True)
        if text_only:
            del self.to_k, self.to_v
            self.pixel_columns = False
        self.group_norm = nn.GroupNorm(32, dim)
        self.norm_cross = nn.GroupNorm(32, context_dim) if norm_text else None

    def text(self, context: Tensor) -> KV:
        if self.norm_cross is not None:
            context = self.norm_cross(context.transpose(1, 2)).transpose(1, 2)   # (B, L, D)
        return super().text(context)

    def columns(self, x: Tensor, text: KV, edit: AttentionEdit | None) -> QKV:
        return (HybridAttention if self.pixel_columns else CrossAttention).columns(self, x, text, edit)

    def forward(self, x: Tensor, texts: Texts, edit: Edits = None, seen: Seen | None = None) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)                        # (B, N, C)
        h = super().forward(h, texts, edit, seen)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])

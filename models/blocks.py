"""The parts a UNet is made of: residual blocks, resampling, transformer blocks, the timestep embedding."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import AttentionEdit, CrossAttention, HybridAttention, Record, SelfAttention

Maps = dict[str, Tensor]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep, cosines first (DDPM appendix B, as in Stable Diffusion).  (B,) -> (B, dim) float32"""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, the timestep added between; `temb_dim` None in the autoencoder."""

    def __init__(self, dim: int, out: int, temb_dim: int | None, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, dim, eps), nn.Conv2d(dim, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, out) if temb_dim else None
        self.norm2, self.conv2 = nn.GroupNorm(groups, out, eps), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim, out, 1) if dim != out else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                                    # (B, out, H, W)
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, dim: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))   # the autoencoder pads right and below only
        return self.conv(x)                                                      # (B, C, H/2, W/2)


class Upsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """`size`: (H, W) of the skip that follows, where it is not exactly twice as large."""
        x = F.interpolate(x, size=size, mode="nearest") if size else F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class FeedForward(nn.Module):
    """GEGLU. The odd nesting keeps the tensor names of public checkpoints (ff.net.0.proj, ff.net.2)."""

    class _GEGLU(nn.Module):
        def __init__(self, dim: int, hidden: int):
            super().__init__()
            self.proj = nn.Linear(dim, 2 * hidden)

        def forward(self, x: Tensor) -> Tensor:
            x, gate = self.proj(x).chunk(2, dim=-1)
            return x * F.gelu(gate)

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.net = nn.Sequential(self._GEGLU(dim, dim * mult), nn.Identity(), nn.Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """kind "cross": self-attention, cross-attention, feed-forward. kind "hybrid": hybrid attention, feed-forward."""

    def __init__(self, dim: int, context_dim: int, heads: int, kind: str, ff_mult: int = 4,
                 upcast: bool = False):
        super().__init__()
        head_dim = dim // heads
        first = {"cross": SelfAttention, "hybrid": HybridAttention}[kind]
        self.norm1, self.attn1 = nn.LayerNorm(dim), first(dim, context_dim, heads, head_dim, upcast)
        if kind == "cross":
            self.norm2, self.attn2 = nn.LayerNorm(dim), CrossAttention(dim, context_dim, heads, head_dim, upcast)
        else:
            self.norm2 = self.attn2 = None
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim, ff_mult)

    def forward(self, x: Tensor, context: Tensor, edit: AttentionEdit | None, record: Record) -> tuple[Tensor, Maps]:
        h, first = self.attn1(self.norm1(x), context, edit, record)              # (B, N, C)
        x, second = x + h, None
        if self.attn2 is not None:
            h, second = self.attn2(self.norm2(x), context, edit, record)
            x = x + h
        maps = {name: m for name, m in (("attn1", first), ("attn2", second)) if m is not None}
        return x + self.ff(self.norm3(x)), maps


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int, depth: int, kind: str, linear: bool,
                 ff_mult: int = 4, upcast: bool = False):
        super().__init__()
        proj = (lambda: nn.Linear(dim, dim)) if linear else (lambda: nn.Conv2d(dim, dim, 1))
        self.norm = nn.GroupNorm(32, dim, 1e-6)
        self.proj_in = proj()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, context_dim, heads, kind, ff_mult, upcast) for _ in range(depth))
        self.proj_out = proj()

    def forward(self, x: Tensor, context: Tensor, edit: AttentionEdit | None, record: Record) -> tuple[Tensor, Maps]:
        shape, linear = x.shape, isinstance(self.proj_in, nn.Linear)
        h = self.norm(x)                                                         # (B, C, H, W)
        h = h if linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)                                         # (B, N, C)
        h = self.proj_in(h) if linear else h
        maps: Maps = {}
        for i, block in enumerate(self.transformer_blocks):
            h, seen = block(h, context, edit, record)
            maps |= {f"transformer_blocks.{i}.{name}": m for name, m in seen.items()}
        h = self.proj_out(h) if linear else h
        h = h.transpose(1, 2).unflatten(2, shape[2:])                            # (B, C, H, W)
        return x + (h if linear else self.proj_out(h)), maps

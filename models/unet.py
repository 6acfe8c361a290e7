"""One UNet for latent models (self- and cross-attention) and pixel models (cross going down, hybrid going up)."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import AttentionEdit, Record
from models.blocks import Downsample, Maps, ResnetBlock, SpatialTransformer, TimestepMLP, Upsample, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; one entry a level, from full resolution down. The defaults are Stable Diffusion 1."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_attention: tuple[str | None, ...] = ("cross", "cross", "cross", None)   # "cross" | "hybrid" | None
    mid_attention: str = "cross"
    up_attention: tuple[str | None, ...] = ("cross", "cross", "cross", None)     # level order, as down_attention
    depth: tuple[int, ...] = (1, 1, 1, 1)          # transformer blocks per attention layer
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    linear_projection: bool = False                # proj_in, proj_out: linear (SD 2, SDXL) or 1x1 convolution
    vector_dim: int | None = None                  # width of a vector added to the timestep's (SDXL: pooled text, sizes)
    upcast_attention: bool = False                 # attention in float32 whatever the model's precision (SD 2.1)
    ff_mult: int = 4                               # width of the feed-forward, times that of the level
    patch: int = 1                                 # pixels per side that one position of the first level holds


SD1 = UNetConfig()
SD2 = UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, upcast_attention=True)
SDXL = UNetConfig(
    channels=(320, 640, 1280), down_attention=(None, "cross", "cross"), up_attention=(None, "cross", "cross"),
    depth=(1, 2, 10), heads=(5, 10, 20), context_dim=2048, linear_projection=True, vector_dim=2816,
)
EMOJI = UNetConfig(
    in_channels=3, out_channels=3, channels=(96, 160), layers_per_block=1, down_attention=("cross", "cross"),
    mid_attention="hybrid", up_attention=("hybrid", "hybrid"), depth=(1, 1), heads=(3, 5), context_dim=128,
    linear_projection=True, ff_mult=2, patch=4,
)


class _Level(nn.Module):
    """Residual and attention layers of one level; the two lists are what public checkpoints name."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)

    def attention(self, j: int, x: Tensor, context: Tensor, edit: AttentionEdit | None, record: Record):
        return self.attentions[j](x, context, edit, record) if hasattr(self, "attentions") else (x, {})


class UNet(nn.Module):
    """eps (or v, or x_0: what the model was trained to predict) from x_t, t and text.

    Module names are those of diffusers' UNet2DConditionModel, so its checkpoints need no mapping.
    """

    def __init__(self, config: UNetConfig = SD1):
        super().__init__()
        c, ch = config, config.channels
        self.config = c
        temb = 4 * ch[0]

        def attentions(kind: str | None, level: int, n: int) -> list[nn.Module]:
            return [SpatialTransformer(ch[level], c.context_dim, c.heads[level], c.depth[level], kind,
                                       c.linear_projection, c.ff_mult, c.upcast_attention)
                    for _ in range(n if kind else 0)]

        self.conv_in = nn.Conv2d(c.in_channels * c.patch**2, ch[0], 3, padding=1)
        self.time_embedding = TimestepMLP(ch[0], temb)
        if c.vector_dim:
            self.add_embedding = TimestepMLP(c.vector_dim, temb)

        self.down_blocks, skips, dim = nn.ModuleList(), [ch[0]], ch[0]
        for i, out in enumerate(ch):
            resnets = []
            for _ in range(c.layers_per_block):
                resnets.append(ResnetBlock(dim, out, temb))
                dim = out
                skips.append(dim)
            block = _Level(resnets, attentions(c.down_attention[i], i, c.layers_per_block))
            if i < len(ch) - 1:
                block.downsamplers = nn.ModuleList([Downsample(dim)])
                skips.append(dim)
            self.down_blocks.append(block)

        last = len(ch) - 1
        self.mid_block = _Level([ResnetBlock(dim, dim, temb) for _ in range(2)], attentions(c.mid_attention, last, 1))

        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(ch))):
            resnets = []
            for _ in range(c.layers_per_block + 1):
                resnets.append(ResnetBlock(dim + skips.pop(), ch[i], temb))
                dim = ch[i]
            block = _Level(resnets, attentions(c.up_attention[i], i, c.layers_per_block + 1))
            if i > 0:
                block.upsamplers = nn.ModuleList([Upsample(dim)])
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(32, dim, 1e-5)
        self.conv_out = nn.Conv2d(dim, c.out_channels * c.patch**2, 3, padding=1)

    def sites(self) -> list[str]:
        """The attention layers in the order in which they run, a name for each transformer block in them."""
        blocks = [*((f"down_blocks.{i}", b) for i, b in enumerate(self.down_blocks)), ("mid_block", self.mid_block),
                  *((f"up_blocks.{i}", b) for i, b in enumerate(self.up_blocks))]
        return [f"{name}.attentions.{j}" for name, b in blocks for j, a in enumerate(getattr(b, "attentions", []))
                for _ in a.transformer_blocks]

    def forward(self, x: Tensor, t: int | Tensor, context: Tensor,
                edit: AttentionEdit | Mapping[str, AttentionEdit | Tensor] | None = None,
                record: Record = Record(), vector: Tensor | None = None) -> tuple[Tensor, Maps]:
        """x (B, C, H, W), t int or (B,), context (B, L, D)  ->  prediction (B, C', H, W), maps by module name.

        `edit` acts on the last rows of the batch, see AttentionEdit: one for all attention, or by name
        ("up_blocks.1.attentions.0"), and then by name of a residual block too: (B,) long, the rows whose features each row
        takes. `record` says which maps come back; vector (B, vector_dim) only for models that take one.
        """
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        temb = self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(x.dtype))  # (B, 4 C_0)
        if self.config.vector_dim:
            temb = temb + self.add_embedding(vector)
        maps: Maps = {}

        def layer(block: _Level, name: str, j: int, x: Tensor) -> Tensor:
            here = edit.get(f"{name}.attentions.{j}") if isinstance(edit, Mapping) else edit
            x, seen = block.attention(j, x, context, here, record)
            maps.update({f"{name}.attentions.{j}.{site}": m for site, m in seen.items()})
            return x

        def residual(block: _Level, name: str, j: int, x: Tensor) -> Tensor:
            x = block.resnets[j](x, temb)
            rows = edit.get(f"{name}.resnets.{j}") if isinstance(edit, Mapping) else None
            return x if rows is None else x[rows]

        x = self.conv_in(F.pixel_unshuffle(x, self.config.patch))                # (B, C_0, H/p, W/p)
        skips = [x]
        for i, block in enumerate(self.down_blocks):
            for j in range(len(block.resnets)):
                x = layer(block, f"down_blocks.{i}", j, residual(block, f"down_blocks.{i}", j, x))
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)                                     # (B, C_i, H/2, W/2)
                skips.append(x)

        x = layer(self.mid_block, "mid_block", 0, residual(self.mid_block, "mid_block", 0, x))
        x = residual(self.mid_block, "mid_block", 1, x)

        for i, block in enumerate(self.up_blocks):
            for j in range(len(block.resnets)):
                x = residual(block, f"up_blocks.{i}", j, torch.cat([x, skips.pop()], dim=1))
                x = layer(block, f"up_blocks.{i}", j, x)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[2:])                  # (B, C_i, 2H, 2W)

        x = self.conv_out(F.silu(self.conv_norm_out(x)))                         # (B, p^2 C', H/p, W/p)
        return F.pixel_shuffle(x, self.config.patch), maps

"""One UNet for latent models (self- and cross-attention) and pixel models (cross going down, hybrid up)."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2p.models.attention import QK, Attention, CrossAttention, Edits, Seen
from p2p.models.blocks import (
    ACTIVATIONS,
    AddedAttention,
    Level,
    ResidualStyle,
    ResnetBlock,
    SpatialTransformer,
    TextPooling,
    TimestepMLP,
    guidance_embedding,
    resampler,
    timestep_embedding,
)
from p2p.models.conditioning import Text, Time
from p2p.models.layers import Conv2d, Linear, ModuleList
from p2p.models.network import Network


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; one entry a level, from full resolution down. The defaults are Stable Diffusion 1."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    # "cross", "hybrid": in transformer blocks; "added", or "added text" for text only: a separate layer; None
    down_attention: tuple[str | None, ...] = ("cross", "cross", "cross", None)
    mid_attention: str | None = "cross"
    up_attention: tuple[str | None, ...] = ("cross", "cross", "cross", None)  # level order, as down_attention
    depth: tuple[int, ...] = (1, 1, 1, 1)          # transformer blocks per attention layer
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    linear_projection: bool = False                # proj_in, proj_out: linear (SD 2, SDXL) or 1x1 convolution
    vector_dim: int | None = None   # width of a vector added to the timestep's (SDXL: pooled text, sizes)
    guidance_dim: int | None = None  # sinusoids of the guidance scale that the model was distilled with (LCM)
    upcast_attention: bool = False   # attention in float32 whatever the model's precision (SD 2.1)
    ff_mult: int = 4                               # width of the feed-forward, times that of the level
    patch: int = 1   # pixels per side that one position of the first level holds
    act: str = "silu"   # of the residual blocks and of the embeddings: "silu" or "gelu"
    scale_shift: bool = False                      # see ResidualStyle
    skip_time_act: bool = False                    # see ResidualStyle
    out_scale: float = 1.0                         # see ResidualStyle
    mid_scale: float = 1.0                         # out_scale of the middle block
    resample: str = "conv"   # between levels: "conv", or "residual" (inside a residual block)
    temb_dim: int | None = None   # width of the timestep's embedding; None: 4 times the first level's
    time_act: str | None = None                    # activation of the finished embedding
    text_dim: int | None = None                    # width of the text as given, projected to context_dim
    pool_heads: int | None = None   # of the pooling of the text, added to the timestep's embedding
    norm_text: bool = True                         # GroupNorm over the text in "added" attention
    low_channels: int = 0   # of a low-resolution picture concatenated to x_t; its noise level is embedded

    @property
    def layers(self) -> tuple[int, ...]:
        """Residual blocks of each level going down."""
        n = self.layers_per_block
        return (n,) * len(self.channels) if isinstance(n, int) else n


SD1 = UNetConfig()
SD2 = UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, upcast_attention=True)
SDXL = UNetConfig(
    channels=(320, 640, 1280), down_attention=(None, "cross", "cross"), up_attention=(None, "cross", "cross"),
    depth=(1, 2, 10), heads=(5, 10, 20), context_dim=2048, linear_projection=True, vector_dim=2816,
)
EMOJI = UNetConfig(
    in_channels=3, out_channels=3, channels=(64, 96, 160), layers_per_block=1,
    down_attention=(None, "cross", "cross"), mid_attention="hybrid", up_attention=(None, "hybrid", "hybrid"),
    depth=(1, 1, 1), heads=(1, 3, 5), context_dim=128, linear_projection=True, ff_mult=2, patch=2,
    temb_dim=384,
)

EMOJI_UPSCALER = UNetConfig(
    in_channels=3, out_channels=3, channels=(64, 96), layers_per_block=1, down_attention=(None, None),
    mid_attention=None, up_attention=(None, None), depth=(1, 1), heads=(1, 1), context_dim=1, patch=4,
    low_channels=3,
)


class UNet(Network):
    """eps (or v, or x_0: what the model was trained to predict) from x_t, t and text.

    Module names are those of diffusers' UNet2DConditionModel, so its checkpoints need no mapping.
    """

    def __init__(self, config: UNetConfig = SD1):
        super().__init__()
        self.config = c = config
        ch, temb = c.channels, c.temb_dim or 4 * c.channels[0]
        self.conv_in = Conv2d((c.in_channels + c.low_channels) * c.patch**2, ch[0], 3, padding=1)
        self.time_embedding = TimestepMLP(ch[0], temb, c.act, c.guidance_dim)
        self.add_embedding: TimestepMLP | TextPooling
        if c.vector_dim:
            self.add_embedding = TimestepMLP(c.vector_dim, temb, c.act)
        if c.pool_heads:
            self.add_embedding = TextPooling(c.text_dim or c.context_dim, temb, c.pool_heads)
        if c.text_dim:
            self.encoder_hid_proj = Linear(c.text_dim, c.context_dim)
        if c.low_channels:
            self.class_embedding = TimestepMLP(ch[0], temb, c.act)
        self._add_levels(temb, ResidualStyle(c.act, c.scale_shift, c.skip_time_act, c.out_scale))
        self.conv_norm_out = nn.GroupNorm(32, ch[0], 1e-5)
        self.conv_out = Conv2d(ch[0], c.out_channels * c.patch**2, 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, (Attention, ResnetBlock)):
                module.site = name
        parts = [*self.down_blocks, self.mid_block, *self.up_blocks]
        self.in_order = [m for part in parts for m in part.modules()]

    def _add_levels(self, temb: int, style: ResidualStyle) -> None:
        c, ch = self.config, self.config.channels

        def attentions(kind: str | None, level: int, n: int) -> Sequence[nn.Module]:
            width, heads = ch[level], c.heads[level]
            if kind is None:
                return []
            if kind.startswith("added"):
                return [AddedAttention(width, c.context_dim, heads, kind == "added text", c.norm_text)
                        for _ in range(n)]
            return [SpatialTransformer(width, c.context_dim, heads, c.depth[level], kind, c.linear_projection,
                                       c.ff_mult, c.upcast_attention) for _ in range(n)]

        self.down_blocks: ModuleList[Level] = ModuleList()
        skips, dim = [ch[0]], ch[0]
        for i, out in enumerate(ch):
            resnets = []
            for _ in range(c.layers[i]):
                resnets.append(ResnetBlock(dim, out, temb, style=style))
                dim = out
                skips.append(dim)
            block = Level(resnets, attentions(c.down_attention[i], i, c.layers[i]))
            if i < len(ch) - 1:
                block.downsamplers.append(resampler(c.resample, "down", dim, temb, style))
                skips.append(dim)
            self.down_blocks.append(block)

        middle = style._replace(out_scale=c.mid_scale)
        self.mid_block = Level([ResnetBlock(dim, dim, temb, style=middle) for _ in range(2)],
                               attentions(c.mid_attention, len(ch) - 1, 1))

        self.up_blocks: ModuleList[Level] = ModuleList()
        for i in reversed(range(len(ch))):
            resnets = []
            for _ in range(c.layers[i] + 1):
                resnets.append(ResnetBlock(dim + skips.pop(), ch[i], temb, style=style))
                dim = ch[i]
            block = Level(resnets, attentions(c.up_attention[i], i, c.layers[i] + 1))
            if i > 0:
                block.upsamplers.append(resampler(c.resample, "up", dim, temb, style))
            self.up_blocks.append(block)

    def site_pixels(self, height: int, width: int) -> dict[str, int]:
        c, counts = self.config, dict[str, int]()
        sides = [(height // c.patch, width // c.patch)]
        for _ in c.channels[1:]:   # a convolution rounds up, a mean of 2 x 2 down
            h, w = sides[-1]
            sides.append((h // 2, w // 2) if c.resample == "residual" else (-(-h // 2), -(-w // 2)))
        for m in self.layers(Attention):
            block, number, *_ = m.site.split(".")
            level = -1   # the middle block's
            if block in ("down_blocks", "up_blocks"):
                level = int(number) if block == "down_blocks" else -1 - int(number)
            h, w = sides[level]
            counts[m.site] = h * w
        return counts

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_norm_out.weight.dtype

    @property
    def unit(self) -> int:
        halved = 2 ** (len(self.config.channels) - 1) if self.config.resample == "residual" else 1
        return self.config.patch * halved

    @property
    def enlarges(self) -> bool:
        return bool(self.config.low_channels)

    @property
    def text_width(self) -> int:
        return self.config.text_dim or self.config.context_dim

    @property
    def reads_guidance(self) -> bool:
        return bool(self.config.guidance_dim)

    def numbers_held(self, height: int, width: int) -> int:
        # skip connections, and input and output of the largest layer
        c = self.config
        h, w = (-(-side // c.patch) for side in (height, width))
        skips = widest = 0
        for channels, layers in zip(c.channels, c.layers):
            skips += (layers + 1) * channels * h * w
            widest = max(widest, 3 * channels * h * w)
            h, w = -(-h // 2), -(-w // 2)
        return skips + widest

    def read(self, context: Tensor) -> Text:
        """Computes what depends on the text alone; `forward` takes it in place of the context (B, L, D)."""
        pooled = self.add_embedding(context) if self.config.pool_heads else None
        if self.config.text_dim:
            context = self.encoder_hid_proj(context)                             # (B, L, context_dim)
        return Text({m.site: m.text(context) for m in self.layers(CrossAttention)}, pooled)

    def _time(self, t: Tensor, dtype: torch.dtype, pooled: Tensor | None, vector: Tensor | None,
              level: Tensor | None, guidance: Tensor | None) -> Time:
        """What each residual block adds for timesteps t.  (..., 1 or B) -> (..., 1 or B, out) each"""
        scale = None
        if self.config.guidance_dim:
            guidance = torch.ones(1, device=t.device) if guidance is None else guidance
            scale = guidance_embedding(guidance, self.config.guidance_dim).to(dtype)
        temb = self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(dtype), scale)
        if self.config.vector_dim:
            temb = temb + self.add_embedding(vector)
        if pooled is not None:
            temb = temb + pooled
        if level is not None:
            temb = temb + self.class_embedding(timestep_embedding(level, self.config.channels[0]).to(dtype))
        if self.config.time_act:
            temb = ACTIVATIONS[self.config.time_act](temb)
        return {m.site: m.time(temb) for m in self.layers(ResnetBlock)}

    def times(self, t: Tensor, text: Text, dtype: torch.dtype, vector: Tensor | None = None,
              level: Tensor | None = None, guidance: Tensor | None = None) -> list[Time]:
        """Computes what depends on the timesteps (T,), not on x: an entry a step, for `forward`."""
        by_site = self._time(t[:, None], dtype, text.pooled, vector, level, guidance)  # (T, 1 or B, out) each
        return [{name: added[i] for name, added in by_site.items()} for i in range(len(t))]

    def _first_features(self, x: Tensor, low: Tensor | None) -> Tensor:
        """x, with the low-resolution picture if there is one, at the first level.  -> (B, C_0, H/p, W/p)"""
        if low is not None:
            x = torch.cat([x, low], dim=1)
        return self.conv_in(F.pixel_unshuffle(x, self.config.patch))

    def forward(self, x: Tensor, t: int | Tensor | Time, context: Tensor | Text,
                edit: Edits | Mapping[str, Any] = None, watch: Collection[str] = (),
                vector: Tensor | None = None, low: Tensor | None = None,
                level: Tensor | None = None, guidance: Tensor | None = None) -> tuple[Tensor, dict[str, QK]]:
        """x (B, C, H, W), t int or (B,) or from `times`, context (B, L, D) or from `read`
        ->  prediction (B, C', H, W), queries and keys of the attention layers that are watched, by site.

        edit: of all attention layers, or by site; then by site of a residual block too: (B,) long,
        the rows whose residual each row adds. Only for models that take them: vector (B, vector_dim);
        low (B, low_channels, H, W), the low-resolution picture at this size, and level (B,), the
        timestep of its noise; guidance (B,), the scale with which the model was distilled.
        """
        c = self.config
        text = self.read(context) if isinstance(context, Tensor) else context
        time = t if isinstance(t, dict) else self._time(
            torch.as_tensor(t, device=x.device).reshape(-1), x.dtype, text.pooled, vector, level, guidance)
        features: Mapping[str, Any] = edit if isinstance(edit, Mapping) else {}
        seen: Seen = dict.fromkeys(watch)

        def layer(block: Level, j: int, x: Tensor) -> Tensor:
            residual = block.resnets[j]
            x = residual(x, time[residual.site], rows=features.get(residual.site))
            return block.attentions[j](x, text.texts, edit, seen) if j < len(block.attentions) else x

        x = self._first_features(x, low)                                         # (B, C_0, H/p, W/p)
        skips = [x]
        for block in self.down_blocks:
            for j in range(len(block.resnets)):
                x = layer(block, j, x)
                skips.append(x)
            for down in block.downsamplers:
                x = down(x, time.get(down.site))                                 # (B, C_i, H/2, W/2)
                skips.append(x)

        x = layer(self.mid_block, 1, layer(self.mid_block, 0, x))

        for block in self.up_blocks:
            for j in range(len(block.resnets)):
                x = layer(block, j, torch.cat([x, skips.pop()], dim=1))
            for up in block.upsamplers:
                x = up(x, time.get(up.site), skips[-1].shape[2:])                # (B, C_i, 2H, 2W)

        x = self.conv_out(ACTIVATIONS[c.act](self.conv_norm_out(x)))             # (B, p^2 C', H/p, W/p)
        found = {site: qk for site, qk in seen.items() if qk is not None}
        return F.pixel_shuffle(x, c.patch).contiguous(), found

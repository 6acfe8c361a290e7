"""Transformers in which pixels and text attend to both (MM-DiT): Stable Diffusion 3 and 3.5, and FLUX.1.

They see latents in patches, a token each, and give a velocity, noise - x_0.
"""
from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from p2p.models.attention import QK, Attention, Edits, Seen
from p2p.models.blocks import timestep_embedding
from p2p.models.conditioning import ReadText
from p2p.models.layers import Conv2d, Linear, ModuleList
from p2p.models.mmdit_blocks import (
    DoubleBlock,
    FinalLayer,
    FluxBlock,
    Modulation,
    SD3Block,
    SingleBlock,
    Time,
    perceptron,
    rotation,
)
from p2p.models.network import Network

SINUSOIDS = 256   # of a timestep, and of a guidance scale


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of a transformer. The defaults are Stable Diffusion 3 medium."""

    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2             # latents per side of a token
    dim: int = 1536
    heads: int = 24
    double: int = 24           # blocks in which pixels and text have weights of their own
    single: int = 0            # blocks after those, in which they share them
    mlp: int = 4               # width of the feed-forward, times dim
    context_dim: int = 4096
    vector_dim: int | None = 2048   # of the pooled text; None: it has no input of its own
    qk_norm: bool = False
    table: int = 192           # side of the table of positions (Stable Diffusion 3)
    dual: tuple[int, ...] = ()   # blocks with a second attention, between pixels alone
    # FLUX has rotary positions: channels of a head that turn by the text's axis, rows, columns
    axes: tuple[int, int, int] | None = None
    theta: float = 10_000.0
    guidance: bool = False     # the guidance scale is an input: guidance was distilled
    # "x0": its last layer gives the picture, from which the velocity follows
    says: Literal["velocity", "x0"] = "velocity"


SD3 = MMDiTConfig()
SD35_MEDIUM = MMDiTConfig(qk_norm=True, table=384, dual=tuple(range(13)))
SD35_LARGE = MMDiTConfig(dim=2432, heads=38, double=38, qk_norm=True)   # and Large Turbo
FLUX_SCHNELL = MMDiTConfig(dim=3072, double=19, single=38, vector_dim=768, qk_norm=True, axes=(16, 56, 56))
FLUX_DEV = replace(FLUX_SCHNELL, guidance=True)
# The bundled one is a FLUX in miniature whose text is heard through attention alone.
EMOJI_FLOW = MMDiTConfig(in_channels=3, out_channels=3, patch=4, dim=192, heads=3, double=2, single=7, mlp=3,
                         context_dim=128, vector_dim=None, qk_norm=True, axes=(8, 28, 28), theta=100.0,
                         says="x0")


class Parts(NamedTuple):
    """The modules of a transformer by what they do; their names are those of its family."""

    text: nn.Module                          # these four embed
    time: nn.Module
    vector: nn.Module | None
    guidance: nn.Module | None
    double: Iterable[DoubleBlock]
    single: Iterable[SingleBlock] = ()


class MMDiT(Network):
    """The velocity from x_t, t and text: what both families share."""

    parts: Parts
    final_layer: FinalLayer

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config

    def _add_sites(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (Attention, Modulation)):
                module.site = name
        self.in_order = list(self.modules())

    @property
    def reads_guidance(self) -> bool:
        return self.config.guidance

    def numbers_held(self, height: int, width: int) -> int:
        c = self.config   # tokens, and a feed-forward's input and output
        return (height // c.patch) * (width // c.patch) * c.dim * (2 + 2 * c.mlp)

    @abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), patch by patch"""

    @abstractmethod
    def picture(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, N, p^2 C'), N = height width -> (B, C', p height, p width)"""

    def site_pixels(self, height: int, width: int) -> dict[str, int]:
        pixels = (height // self.config.patch) * (width // self.config.patch)
        return {m.site: pixels for m in self.layers(Attention)}

    def read(self, context: Tensor) -> ReadText:
        """All that depends on the text alone; `forward` takes it in place of the context (B, L, C)."""
        return ReadText(self.parts.text(context))

    def _time(self, t: Tensor, dtype: torch.dtype, vector: Tensor | None,
              guidance: float | Tensor | None) -> Time:
        """(..., 1 or B) -> (..., 1 or B, n, 1, D) each"""
        c = self.config
        if (vector is None) != (c.vector_dim is None) or (guidance is None) == c.guidance:
            raise ValueError(f"this transformer takes {'no' if c.vector_dim is None else 'a'} vector and "
                             f"{'a' if c.guidance else 'no'} guidance scale")

        def sinusoids(x: Tensor) -> Tensor:
            return timestep_embedding(x, SINUSOIDS).to(dtype)

        embedding = self.parts.time(sinusoids(t))                                # (..., 1 or B, D)
        if vector is not None and self.parts.vector is not None:
            embedding = embedding + self.parts.vector(vector)
        if guidance is not None and self.parts.guidance is not None:
            scale = torch.as_tensor(guidance, device=t.device).reshape(-1)
            embedding = embedding + self.parts.guidance(sinusoids(1000 * scale))
        sigma = (t / 1000).to(dtype)[..., None, None, None]                      # (..., 1 or B, 1, 1, 1)
        return {m.site: m(embedding) for m in self.layers(Modulation)} | {"sigma": sigma}

    def times(self, t: Tensor, text: ReadText, dtype: torch.dtype, vector: Tensor | None = None,
              guidance: float | Tensor | None = None) -> list[Time]:
        """What depends on the timesteps (T,), not on x: one entry a step, which `forward` takes for t."""
        together = self._time(t[:, None], dtype, vector, guidance)               # (T, B, n, 1, D) each
        return [{site: of[i] for site, of in together.items()} for i in range(len(t))]

    def forward(self, x: Tensor, t: float | Tensor | Time, context: Tensor | ReadText, edit: Edits = None,
                watch: Collection[str] = (), vector: Tensor | None = None,
                guidance: float | Tensor | None = None) -> tuple[Tensor, dict[str, QK]]:
        """x (B, C, H, W), t a number or (B,) or from `times`, context (B, L, C) or from `read`
        ->  velocity (B, C', H, W), queries and keys of the attention layers that are watched, by site.

        t: 1000 times the share of noise, in both families. edit: of all attention layers, or by site. vector
        (B, vector_dim): the pooled text. guidance: a scale, or (B,); only where it was distilled. With t from
        `times`, these two are in it.
        """
        tokens = (self.read(context) if isinstance(context, Tensor) else context).tokens
        time = t if isinstance(t, dict) else self._time(
            torch.as_tensor(t, device=x.device).reshape(-1), x.dtype, vector, guidance)
        seen: Seen = dict.fromkeys(watch)
        c, parts = self.config, self.parts
        if any(side % c.patch for side in x.shape[2:]):
            raise ValueError(f"sides of x are multiples of {c.patch}, not {tuple(x.shape[2:])}")
        height, width = (side // c.patch for side in x.shape[2:])
        n, angles = height * width, None
        if c.axes is not None:
            angles = rotation(height, width, tokens.shape[1], c.axes, c.theta, x.device)
        x_t, x = x, self.tokens(x)                                               # (B, N, D)
        for block in parts.double:
            x, tokens = block(x, tokens, time, angles, edit, seen)               # (B, N, D), (B, L, D)
        if parts.single:
            x = torch.cat([x, tokens], dim=1)                                    # (B, N + L, D)
        for shared in parts.single:
            x = shared(x, n, time, angles, edit, seen)
        x = self.picture(self.final_layer(x[:, :n], time), height, width)
        if c.says == "x0":
            x = (x_t - x) / time["sigma"]                                        # x_t = x_0 + sigma v
        return x.contiguous(), {site: qk for site, qk in seen.items() if qk is not None}


def _named(name: str, module: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict([(name, module)]))


class StableDiffusion3(MMDiT):
    """3 and 3.5: a table of positions, of which the middle is taken."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig = SD3):
        super().__init__(config)
        c, names = config, ("0", "2")
        self.x_embedder = _named("proj", Conv2d(c.in_channels, c.dim, c.patch, c.patch))
        self.register_buffer("pos_embed", torch.zeros(1, c.table**2, c.dim))
        self.t_embedder = _named("mlp", perceptron(SINUSOIDS, c.dim, c.dim, names, nn.SiLU()))
        assert c.vector_dim is not None
        self.y_embedder = _named("mlp", perceptron(c.vector_dim, c.dim, c.dim, names, nn.SiLU()))
        self.context_embedder = Linear(c.context_dim, c.dim)
        self.joint_blocks: ModuleList[DoubleBlock] = ModuleList(
            SD3Block(c.dim, c.heads, c.mlp, c.qk_norm, dual=i in c.dual, last=i == c.double - 1)
            for i in range(c.double))
        self.final_layer = FinalLayer(c.dim, c.patch**2 * c.out_channels)
        self.parts = Parts(self.context_embedder, self.t_embedder, self.y_embedder, None, self.joint_blocks)
        self._add_sites()

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    @property
    def largest(self) -> float:
        return self.config.table * self.config.patch

    def tokens(self, x: Tensor) -> Tensor:
        x = self.x_embedder(x)                                                   # (B, D, h, w)
        side, sides = self.config.table, x.shape[2:]
        if max(sides) > side:
            raise ValueError(f"{sides[0]} x {sides[1]} tokens; this transformer has {side} x {side}")
        top, left = ((side - s) // 2 for s in sides)
        table = self.pos_embed.unflatten(1, (side, side))[:, top:top + sides[0], left:left + sides[1]]
        return x.flatten(2).transpose(1, 2) + table.flatten(1, 2).to(x.dtype)

    def picture(self, tokens: Tensor, height: int, width: int) -> Tensor:
        p = self.config.patch
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p)


class Flux(MMDiT):
    """FLUX.1: rotary positions; its tokens hold a patch channel by channel."""

    def __init__(self, config: MMDiTConfig = FLUX_DEV):
        super().__init__(config)
        c, names = config, ("in_layer", "out_layer")
        self.img_in, self.txt_in = Linear(c.patch**2 * c.in_channels, c.dim), Linear(c.context_dim, c.dim)
        self.time_in = perceptron(SINUSOIDS, c.dim, c.dim, names, nn.SiLU())
        self.vector_in = perceptron(c.vector_dim, c.dim, c.dim, names, nn.SiLU()) if c.vector_dim else None
        self.guidance_in = perceptron(SINUSOIDS, c.dim, c.dim, names, nn.SiLU()) if c.guidance else None
        self.double_blocks: ModuleList[DoubleBlock] = ModuleList(
            FluxBlock(c.dim, c.heads, c.mlp) for _ in range(c.double))
        self.single_blocks: ModuleList[SingleBlock] = ModuleList(
            SingleBlock(c.dim, c.heads, c.mlp) for _ in range(c.single))
        self.final_layer = FinalLayer(c.dim, c.patch**2 * c.out_channels)
        self.parts = Parts(self.txt_in, self.time_in, self.vector_in, self.guidance_in, self.double_blocks,
                           self.single_blocks)
        self._add_sites()

    @property
    def dtype(self) -> torch.dtype:
        return self.single_blocks[0].norm.query_norm.scale.dtype

    def tokens(self, x: Tensor) -> Tensor:
        p = self.config.patch
        return self.img_in(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))

    def picture(self, tokens: Tensor, height: int, width: int) -> Tensor:
        p = self.config.patch
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=p, q=p)


def build(config: MMDiTConfig) -> MMDiT:
    """The family that has positions of that kind."""
    return StableDiffusion3(config) if config.axes is None else Flux(config)

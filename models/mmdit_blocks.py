"""The parts of an MM-DiT: streams of tokens, blocks in which they meet, modulations, rotary positions.

Modules have the names and layouts of the original checkpoints, where Stable Diffusion 3 and FLUX differ;
`Stream` says what does what.
"""
from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2p.models.attention import QKV, Edits, JointAttention, Seen, SelfAttention
from p2p.models.layers import Linear

# what each modulation makes of a timestep: (1 or B, n, 1, D), by its site; and "sigma", (1 or B, 1, 1, 1)
Time = dict[str, Tensor]
Rotation = tuple[Tensor, Tensor]   # cosines and sines of the tokens' angles, (N + L, 1, d / 2) each


# ------------------------------------------------------------------------------------------------ positions

def rotation(height: int, width: int, text: int, axes: tuple[int, ...], theta: float,
             device: torch.device) -> Rotation:
    """Rotary positions (0, row, column) of pixels; the text that follows stands at (0, 0, 0). axes: channels
    of a head for each of the three."""
    def angles(n: int, channels: int) -> Tensor:
        frequencies = theta ** -(torch.arange(0, channels, 2, dtype=torch.float64, device="cpu") / channels)
        return torch.arange(n, dtype=torch.float64, device="cpu")[:, None] * frequencies

    first, rows, columns = (angles(n, c) for n, c in zip((1, height, width), axes))
    of_axes = first[:, None], rows[:, None], columns[None]                       # (1 or H, 1 or W, c / 2)

    def table(function: str, of_text: float) -> Tensor:
        values = [getattr(a, function)().float().to(device).expand(height, width, -1) for a in of_axes]
        pixels = torch.cat(values, dim=-1).flatten(0, 1)                         # (N, d / 2)
        return F.pad(pixels, (0, 0, 0, text), value=of_text)[:, None]            # (N + L, 1, d / 2)

    return table("cos", 1.0), table("sin", 0.0)


def rotate(x: Tensor, angles: Rotation | None) -> Tensor:
    """Neighbouring channels, in pairs, turned by the first N angles.  (B, N, h d) -> the same"""
    if angles is None:
        return x
    cos, sin = (table[:x.shape[1]] for table in angles)
    a, b = x.unflatten(-1, (-1, cos.shape[-1], 2)).unbind(-1)                    # (B, N, h, d / 2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(2).to(x.dtype)


# ---------------------------------------------------------------------------------------------- small parts

def perceptron(dim: int, hidden: int, out: int, names: tuple[str, str], act: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict([(names[0], Linear(dim, hidden)), ("act", act),
                                      (names[1], Linear(hidden, out))]))


class RMSNorm(nn.Module):
    """FLUX's, whose weight is called a scale."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale, 1e-6)


class Modulation(nn.Sequential):
    """Shifts, scales and gates, made of the timestep's embedding (adaLN-Zero).  (..., D) -> (..., n, 1, D)"""

    site = ""   # its name in the network, which gives it once, when it is built

    def __init__(self, dim: int, n: int, name: str):
        super().__init__(OrderedDict([("act", nn.SiLU()), (name, Linear(dim, n * dim))]))
        self.n = n

    def forward(self, embedding: Tensor) -> Tensor:
        return super().forward(embedding).unflatten(-1, (self.n, 1, -1))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def bounded(x: Tensor) -> Tensor:
    """Within half precision, whose range some tokens leave."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def split_heads(qkv: Tensor, heads: int, norms: tuple[nn.Module, nn.Module]) -> QKV:
    """(B, N, 3 h d) -> queries, keys and values (B, N, h d), the former two normalised head by head"""
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = (norm(x.unflatten(-1, (heads, -1))).flatten(2) for norm, x in zip(norms, (q, k)))
    return q, k, v


# -------------------------------------------------------------------------------------------------- streams

class Projections(nn.Module):
    """The projections of a stream of tokens: to q, k and v, and out of the attention unless nothing reads it.

    norms: "ln" as in Stable Diffusion 3.5, "norm" as in FLUX, or None.
    """

    def __init__(self, dim: int, heads: int, norms: str | None, out: bool = True):
        super().__init__()
        self.heads, self.qkv = heads, Linear(dim, 3 * dim)
        self.norms: tuple[nn.Module, nn.Module] = (nn.Identity(), nn.Identity())
        if norms == "ln":
            self.norms = self.ln_q, self.ln_k = nn.RMSNorm(dim // heads, 1e-6), nn.RMSNorm(dim // heads, 1e-6)
        if norms == "norm":
            self.norm = QKNorm(dim // heads)
            self.norms = self.norm.query_norm, self.norm.key_norm
        if out:
            self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> QKV:
        return split_heads(self.qkv(x), self.heads, self.norms)                  # (B, N, h d) each


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)


class SecondAttention(SelfAttention):
    """Pixels attend to pixels, beside the joint attention; projections are apart."""

    def __init__(self, heads: int):
        nn.Module.__init__(self)
        self.heads, self.upcast = heads, False


class Stream(NamedTuple):
    """The pixels' or the text's part of a block: its modules, by what they do."""

    modulation: Modulation
    attn: Projections
    mlp: nn.Module | None               # None: the last block's text, which nothing reads afterwards
    attn2: Projections | None = None

    def projected(self, x: Tensor, m: Tensor) -> QKV:
        return self.attn(modulated(x, m[:, 0], m[:, 1]))

    def updated(self, x: Tensor, read: Tensor, read2: Tensor | None, m: Tensor) -> Tensor:
        """x (B, N, D), what it read (B, N, h d), m (1 or B, 6 or 9, 1, D)  ->  (B, N, D)"""
        assert self.mlp is not None
        x = x + m[:, 2] * self.attn.proj(read)
        if self.attn2 is not None:
            x = x + m[:, 8] * self.attn2.proj(read2)
        return bounded(x + m[:, 5] * self.mlp(modulated(x, m[:, 3], m[:, 4])))


class DoubleBlock(nn.Module):
    """Pixels and text with weights of their own; they meet in the attention."""

    pixels: Stream
    text: Stream

    def __init__(self, heads: int, dual: bool = False):
        super().__init__()
        self.joint = JointAttention(heads)                       # neither has tensors
        self.between_pixels = SecondAttention(heads) if dual else None

    def forward(self, x: Tensor, text: Tensor, time: Time, angles: Rotation | None, edit: Edits,
                seen: Seen | None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), text (B, L, D) -> the same"""
        n, m, m_text = x.shape[1], time[self.pixels.modulation.site], time[self.text.modulation.site]
        own, others = self.pixels.projected(x, m), self.text.projected(text, m_text)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(own, others))          # (B, N + L, h d)
        q = q if self.text.mlp is not None else own[0]
        read = self.joint(rotate(q, angles), rotate(k, angles), v, n, edit, seen)
        read2 = None
        if self.pixels.attn2 is not None and self.between_pixels is not None:
            q, k, v = self.pixels.attn2(modulated(x, m[:, 6], m[:, 7]))
            read2 = self.between_pixels.attended(q, k, v, edit, seen).transpose(1, 2).flatten(2)
        x = self.pixels.updated(x, read[:, :n], read2, m)                        # (B, N, D)
        return x, text if self.text.mlp is None else self.text.updated(text, read[:, n:], None, m_text)


class SD3Block(DoubleBlock):
    """Stable Diffusion 3's. dual: a second attention, between pixels; last: nothing reads its text."""

    class _Stream(nn.Module):
        def __init__(self, dim: int, heads: int, mlp: int, norms: str | None, dual: bool, last: bool):
            super().__init__()
            self.adaLN_modulation = Modulation(dim, 2 if last else 9 if dual else 6, "1")
            self.attn = Projections(dim, heads, norms, out=not last)
            self.attn2 = Projections(dim, heads, norms) if dual else None
            self.mlp = None if last else perceptron(dim, mlp * dim, dim, ("fc1", "fc2"), nn.GELU("tanh"))

        def stream(self) -> Stream:
            return Stream(self.adaLN_modulation, self.attn, self.mlp, self.attn2)

    def __init__(self, dim: int, heads: int, mlp: int, qk_norm: bool, dual: bool, last: bool):
        super().__init__(heads, dual)
        norms = "ln" if qk_norm else None
        self.x_block = self._Stream(dim, heads, mlp, norms, dual, last=False)
        self.context_block = self._Stream(dim, heads, mlp, norms, dual=False, last=last)
        self.pixels, self.text = self.x_block.stream(), self.context_block.stream()


class FluxBlock(DoubleBlock):
    def __init__(self, dim: int, heads: int, mlp: int):
        super().__init__(heads)
        self.img_mod, self.txt_mod = Modulation(dim, 6, "lin"), Modulation(dim, 6, "lin")
        self.img_attn, self.txt_attn = Projections(dim, heads, "norm"), Projections(dim, heads, "norm")
        self.img_mlp, self.txt_mlp = (perceptron(dim, mlp * dim, dim, ("0", "2"), nn.GELU("tanh"))
                                      for _ in range(2))
        self.pixels = Stream(self.img_mod, self.img_attn, self.img_mlp)
        self.text = Stream(self.txt_mod, self.txt_attn, self.txt_mlp)


class SingleBlock(nn.Module):
    """Pixels and text share all weights; attention and feed-forward stand side by side (FLUX)."""

    def __init__(self, dim: int, heads: int, mlp: int):
        super().__init__()
        self.widths = 3 * dim, mlp * dim
        self.linear1, self.linear2 = Linear(dim, (3 + mlp) * dim), Linear((1 + mlp) * dim, dim)
        self.norm, self.modulation = QKNorm(dim // heads), Modulation(dim, 3, "lin")
        self.joint = JointAttention(heads)

    def forward(self, x: Tensor, pixels: int, time: Time, angles: Rotation | None, edit: Edits,
                seen: Seen | None) -> Tensor:
        """x (B, N + L, D), N pixels -> the same"""
        m = time[self.modulation.site]
        qkv, hidden = self.linear1(modulated(x, m[:, 0], m[:, 1])).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.joint.heads, (self.norm.query_norm, self.norm.key_norm))
        read = self.joint(rotate(q, angles), rotate(k, angles), v, pixels, edit, seen)
        hidden = F.gelu(hidden, approximate="tanh")                              # (B, N + L, mlp D)
        return bounded(x + m[:, 2] * self.linear2(torch.cat([read, hidden], dim=-1)))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.linear, self.adaLN_modulation = Linear(dim, out), Modulation(dim, 2, "1")

    def forward(self, x: Tensor, time: Time) -> Tensor:
        m = time[self.adaLN_modulation.site]
        return self.linear(modulated(x, m[:, 0], m[:, 1]))

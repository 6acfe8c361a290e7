"""What a family makes of its text towers: one context, and one pooled text.

    Stable Diffusion 3   CLIP-L and CLIP-G side by side along channels, zeros up to T5's width; after these
                         columns, those of T5; the pooled texts of both, side by side
    FLUX                 T5's columns; CLIP-L's pooled text
    others               the towers' contexts side by side along channels; the last one's pooled text
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from p2p.models.blocks import timestep_embedding
from p2p.models.t5 import EncodedPrompts, NoT5, T5Encoder
from p2p.models.text import TextEncoder

Encoded = tuple[Tensor, Tensor | None]   # of one tower: context (B, L, C), pooled text (B, P)
TextTower = TextEncoder | T5Encoder | EncodedPrompts | NoT5


def joined(family: str, encoded: Sequence[Encoded]) -> Encoded:
    """Of all towers -> context (B, L, C), pooled text (B, P) or None."""
    contexts, pooled = zip(*encoded)
    if family == "flux":
        return contexts[-1], pooled[0]
    if family != "sd3":
        return torch.cat(contexts, dim=-1), pooled[-1]
    *clip, t5 = contexts
    clip_context = torch.cat(clip, dim=-1)                                       # (B, 77, C_L + C_G)
    clip_context = F.pad(clip_context, (0, t5.shape[-1] - clip_context.shape[-1]))
    return torch.cat([clip_context, t5], dim=1), torch.cat(pooled[:-1], dim=-1)


def groups(family: str, towers: Sequence[TextTower]) -> list[TextTower]:
    """The towers whose tokens make up the context's columns, in order; where several read the same tokens,
    the first."""
    if family == "flux":
        return [*towers[-1:]]
    return [*towers[:1], *(towers[-1:] if family == "sd3" else [])]


def with_sizes(pooled: Tensor, size: tuple[int, int], width: int) -> Tensor:
    """SDXL's vector: pooled text, then original size, crop corner and target size (height, width) as
    sinusoids.  (B, P) -> (B, width)"""
    numbers = torch.tensor([*size, 0, 0, *size], device=pooled.device)
    sizes = timestep_embedding(numbers, (width - pooled.shape[1]) // len(numbers)).flatten().to(pooled.dtype)
    return torch.cat([pooled, sizes.expand(len(pooled), -1)], dim=-1)

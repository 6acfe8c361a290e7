"""Attention maps, computed outside of the network from a watched layer's queries and keys, and the edit."""
from __future__ import annotations

import torch
from torch import Tensor

from p2p.models.attention import (
    QK,
    Attention,
    AttentionEdit,
    Edits,
    SelfAttention,
    attend_probs,
    edited_probs,
)


def site_maps(layer: Attention, qk: QK, edit: Edits, rows: Tensor,
              mean: bool = False) -> tuple[Tensor, Tensor]:
    """The maps of some rows of the batch, without and with the edit; in joint and hybrid attention, whose
    softmax also counts pixels, both with the pixels' q and k that the edit borrows.

    qk: as the layer put it into `seen`. rows (R,) long: sources and edited rows, these last, in the batch's
    order; cached ones are numbered after its last. mean: of heads, where that is the same before the edit as
    after it (not in self-attention, nor with `renormalise`).
    -> (R, h or 1, N, K) twice, in single precision at least: the columns of the text, or in self-attention
    those of the pixels
    """
    layer_edit = layer.site_edit(edit)
    if isinstance(layer, SelfAttention):
        return _pixel_maps(layer, qk, layer_edit, rows)
    q, k = qk if layer_edit is None else layer.with_cached(layer_edit, *qk)
    q, k = _heads(layer, q.index_select(0, rows), k.index_select(0, rows))       # (R, h, N, d), (R, h, K, d)
    pixels = q.shape[2] if layer.pixel_columns else 0
    p = _text_probs(q, k, pixels)                                                # (R, h, N, L)
    if mean and (layer_edit is None or layer_edit.renormalise is None):   # edits are linear
        p = p.mean(1, keepdim=True)
    if layer_edit is None or layer_edit.mix is None or layer_edit.keep is None:
        return p, p
    mix, keep, renormalise = layer_edit.mix, layer_edit.keep, layer_edit.renormalise
    e = len(layer_edit.source)
    source = (rows[:, None] == layer_edit.source).float().argmax(0)   # (E,): its index in `rows`
    own_probs, borrowed = p[-e:], p.index_select(0, source)                                # (E, h, N, L)
    after = edited_probs(own_probs, borrowed, mix, keep)
    if renormalise is not None:
        to_pixels = 1 - own_probs.sum(-1)   # the share of attention that pixels get
        sums = edited_probs(own_probs, borrowed, mix.abs(), keep.abs()).sum(-1) + to_pixels
        after = torch.where(renormalise[:, None, None, None], after / sums[..., None], after)
    return p, torch.cat([p[:-e], after])


def _heads(layer: Attention, *parts: Tensor) -> list[Tensor]:
    """(B, N, h d) -> (B, h, N, d) each, in single precision at least, as fused attention keeps its logits."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in layer.split(*parts)]


def _pixel_maps(layer: Attention, qk: QK, edit: AttentionEdit | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    def probs(q: Tensor, k: Tensor) -> Tensor:
        return attend_probs(*_heads(layer, q.index_select(0, rows), k.index_select(0, rows)))

    if edit is None:
        return (probs(*qk),) * 2
    used = layer.borrow(edit, *qk, qk[0])[:2]
    beside = [x[len(qk[0]):] for x in layer.with_cached(edit, *qk)]   # the cached rows, which no edit changes
    return probs(*layer.with_cached(edit, *qk)), probs(*(torch.cat(pair) for pair in zip(used, beside)))


def _text_probs(q: Tensor, k: Tensor, pixels: int) -> Tensor:
    """The map's columns of text; where pixels stand before them, computed in pieces: the full map may not fit
    into memory."""
    if not pixels:
        return attend_probs(q, k)
    return torch.cat([attend_probs(piece, k)[..., pixels:] for piece in q.split(1024, dim=2)], dim=2)

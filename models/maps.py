"""Attention maps, formed outside of the network: of the queries and keys of a layer that was
watched, and the edit."""
from __future__ import annotations

import torch
from torch import Tensor

from p2p.models.attention import (
    QK,
    Attention,
    AttentionEdit,
    Edits,
    HybridAttention,
    SelfAttention,
    attend_probs,
    edited_probs,
)


def site_maps(layer: Attention, qk: QK, edit: Edits, rows: Tensor,
              mean: bool = False) -> tuple[Tensor, Tensor]:
    """The maps of some rows of the batch, as they would be without the edit and as they are with it.

    qk: as the layer put it into `seen`. rows (R,) long: sources and edited rows, these last, in the batch's
    order; cached ones are numbered after its last. mean: over heads, in single precision at least. -> (R, h
    or 1, N, K) twice: the columns of the text, or those of the pixels in self-attention
    """
    here = layer.here(edit)
    if isinstance(layer, SelfAttention):
        return _pixel_maps(layer, qk, here, rows)
    q, k = layer.rows(here, *qk) if here is not None else qk
    q, k = layer.split(q.index_select(0, rows), k.index_select(0, rows))         # (R, h, N, d), (R, h, K, d)
    mix, keep, renormalise = (None, None, None) if here is None else (here.mix, here.keep, here.renormalise)
    pixels = q.shape[2] if isinstance(layer, HybridAttention) and not layer.text_only else 0
    p = _text_probs(q, k, pixels)                                                # (R, h, N, L)
    if mean and renormalise is None:   # edits are linear
        p = p.mean(1, keepdim=True, dtype=torch.promote_types(p.dtype, torch.float32))
    if here is None or mix is None or keep is None:
        return p, p
    e = len(here.source)
    source = (rows[:, None] == here.source).float().argmax(0)   # (E,): where it stands among `rows`
    own, lent = p[-e:], p.index_select(0, source)                                # (E, h, N, L)
    after = edited_probs(own, lent, mix, keep)
    if renormalise is not None:
        rest = 1 - own.sum(-1)   # what the row gives to pixels
        sums = edited_probs(own, lent, mix.abs(), keep.abs()).sum(-1) + rest
        after = torch.where(renormalise[:, None, None, None], after / sums[..., None], after)
    return p, torch.cat([p[:-e], after])


def _pixel_maps(layer: Attention, qk: QK, edit: AttentionEdit | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    def probs(q: Tensor, k: Tensor) -> Tensor:
        return attend_probs(*layer.split(q.index_select(0, rows), k.index_select(0, rows)))

    if edit is None:
        return (probs(*qk),) * 2
    used = layer.borrow(edit, *qk, qk[0])[:2]
    beside = [x[len(qk[0]):] for x in layer.rows(edit, *qk)]   # the cached rows, which are no one's else
    return probs(*layer.rows(edit, *qk)), probs(*(torch.cat(pair) for pair in zip(used, beside)))


def _text_probs(q: Tensor, k: Tensor, pixels: int) -> Tensor:
    """The map's columns of text; where pixels stand before them, in pieces: the whole of it may
    not fit into memory."""
    if not pixels:
        return attend_probs(q, k)
    return torch.cat([attend_probs(piece, k)[..., pixels:] for piece in q.split(1024, dim=2)], dim=2)

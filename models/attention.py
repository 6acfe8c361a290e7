"""Attention with the edit as an argument: the whole of Prompt-to-Prompt's injection (Hertz et al. 2022, section 3).

Notation of the paper: M = softmax(Q K^T / sqrt(d)) (Eq. 1), rows are pixels, columns are text tokens.
Here P is the map of the edited row and P_src the map of its source row. Every edit of the paper is linear in columns:

    P' = P_src . mix + P . diag(keep)       hence       P' V = attend(q_src, k_src, mix V) + attend(q, k, keep V)

so an edit is two small tensors per step, and no map has to be formed. The explicit form stands beside the fused one.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from p2p.models.layers import Linear

QK = tuple[Tensor, Tensor]   # queries and keys, (B, N, h d) and (B, K, h d): the heads are split last, rows are chosen before


class AttentionEdit(NamedTuple):
    """Edit(M_t, M*_t, t) of one step, for the last E rows of the batch (its numbers are tensors: same graph at every step).

    A row with mix = 0, keep = 1 and self_source = its own index is not edited.
    """

    source: Tensor           # (E,) long: the batch row whose text columns each edited row borrows
    mix: Tensor              # (E, L, L): source columns -> own columns
    keep: Tensor             # (E, L): share of the own columns that stays
    self_source: Tensor      # (E,) long: the batch row whose q and k each edited row uses in self-attention
    self_max_tokens: Tensor  # (E,) long: ... at sites of at most this many pixels
    renormalise: Tensor | None = None   # (E,) bool: divide by the row sums of P', which an edit need not keep at 1; where
                                        # weights are negative, by those of its sizes, P_src |mix| + P diag(|keep|)
    rows: Tensor | None = None          # (3, E) long: the batch rows whose q, pixel k and pixel v each edited row uses, in
                                        # self- and hybrid attention alike (other editors; not Prompt-to-Prompt)
    cached: Mapping[str, QK] | None = None   # by site, q and k of the source (one row each), where it is no row of the batch:
                                        # `source` is then this one alone; in self_source the row after the last is this one,
                                        # and any other the edited row itself
    only: Literal["source", "own"] | None = None   # known beforehand: keep = 0 throughout, or mix = 0 and keep = 1
    injected: int | None = None         # known beforehand: self_source is `source`, no edited row, at sites of at most so many
                                        # pixels, and each row itself at larger ones

    def whose_text(self) -> Literal["source", "own"] | None:
        """`only`, lest what nobody reads be computed; None in a compiled graph, which serves all steps."""
        return None if torch.compiler.is_compiling() else self.only

    def injects(self, pixels: int) -> bool | None:
        """The same of self-attention with so many pixels: are all edited rows injected (True), or none (False)?"""
        return None if torch.compiler.is_compiling() or self.injected is None else pixels <= self.injected


def same_tables(a: object, b: object) -> bool:
    """Do two edits, or two by site, share mix and keep? The same tensors, that is: no number is compared."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_tables(a[site], b[site]) for site in a)
    edits = isinstance(a, AttentionEdit) and isinstance(b, AttentionEdit)
    return a is b or (edits and a.mix is b.mix and a.keep is b.keep)


def inside(edit: AttentionEdit | None, name: str) -> AttentionEdit | None:
    """The edit as a child module of that name sees it: only its own sites are cached, under what is left of their names."""
    if edit is None or edit.cached is None:
        return edit
    return edit._replace(cached={k[len(name):].lstrip("."): qk for k, qk in edit.cached.items() if f"{k}.".startswith(f"{name}.")})


class Record(NamedTuple):
    """Which maps a forward pass returns: those of sites with at most so many pixels (0: none)."""

    text: int = 0          # columns of the text tokens, in cross- and hybrid attention, after the edit
    pixels: int = 0        # self-attention, after the edit
    before: bool = False   # append the edited rows' maps as they were before the edit
    queries: bool = False  # instead of maps: q and k of every site
    exactly: int = 0       # text columns of sites with exactly so many pixels, besides
    mean: bool = False     # text columns as the mean of the heads, h = 1, but for edits that renormalise (each head's rows)
    rows: int = 0          # of the last so many rows of the batch alone, the rows that edits borrow from among them (0: of all)

    def wants(self, pixels: int) -> bool:
        """Are columns of text wanted of a site with so many pixels?"""
        return pixels <= self.text or pixels == self.exactly


class TextKV(NamedTuple):
    """Keys and values of the text, which an attention layer reads in all steps."""

    k: Tensor                   # (B, L, h d)
    v: Tensor                   # (B, L, h d); once mixed, keep V in the edited rows
    mixed: Tensor | None = None   # (E, L, h d): mix V of the edited rows

    def under(self, edit: AttentionEdit | None) -> TextKV:
        """As P' V reads them: the same for all steps whose edits have these tables."""
        return self if edit is None or self.mixed is not None else TextKV(self.k, *mixed_values(self.v, edit.mix, edit.keep))


def with_last(x: Tensor, new: Tensor) -> Tensor:
    """x with `new` in place of its last rows: written into x itself, unless a gradient may need it as it was."""
    if x.requires_grad:
        return torch.cat([x[:-len(new)], new])
    x[-len(new):] = new
    return x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, fused.  (B, h, N, d), (B, h, L, d), (B, h, L, e) -> (B, h, N, e)"""
    return F.scaled_dot_product_attention(q, k, v)


def attend_probs(q: Tensor, k: Tensor) -> Tensor:
    """The map itself (paper Eq. 1).  (B, h, N, d), (B, h, L, d) -> (B, h, N, L), rows sum to 1"""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)


def text_probs(q: Tensor, k: Tensor, text: int) -> Tensor:
    """The map's last `text` columns; where pixels stand before them, in pieces, for the whole of it may not fit into memory.

    (B, h, N, d), (B, h, K, d) -> (B, h, N, L)
    """
    if k.shape[2] == text:
        return attend_probs(q, k)
    return torch.cat([attend_probs(piece, k)[..., -text:] for piece in q.split(1024, dim=2)], dim=2)


def mixed_values(v: Tensor, mix: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """What P' V multiplies the row's own map by, and its source's: V with keep V in its last E rows, and mix V of these.

    v (B, ..., L, d), mix (E, ..., L, L), keep (E, ..., L)  ->  (B, ..., L, d), (E, ..., L, d)
    """
    last = v[-len(keep):]
    return torch.cat([v[:-len(keep)], keep[..., None].to(v.dtype) * last]), mix.to(v.dtype) @ last


def edited_attend(q: Tensor, k: Tensor, v: Tensor, q_src: Tensor, k_src: Tensor, mix: Tensor, keep: Tensor) -> Tensor:
    """P' V with P' = P_src . mix + P . diag(keep) on the last L = keep.shape[-1] columns of the last E rows, fused.

    The columns before them (the pixels, in hybrid attention) and the rows before them always are the row's own. `q_src`,
    `k_src` are given explicitly: they may be other rows of the batch or come from a cache.
    q (B, h, N, d); k, v (B, h, K, d); q_src (E, h, N, d); k_src (E, h, K, d), K >= L; mix (E, L, L); keep (E, L)  ->  (B, h, N, d)
    """
    pixels, text = v.split([v.shape[2] - keep.shape[1], keep.shape[1]], dim=2)
    own, mixed = mixed_values(text, mix[:, None], keep[:, None])
    return attend_twice(q, k, torch.cat([pixels, own], dim=2), q_src, k_src, mixed)


def attend_twice(q: Tensor, k: Tensor, v: Tensor, q_src: Tensor, k_src: Tensor, mixed: Tensor) -> Tensor:
    """The same of `mixed_values`; `mixed` (E, h, L, d) stands for zeros and itself, under its source's K columns."""
    pixels = k_src.shape[2] - mixed.shape[2]
    mixed = F.pad(mixed, (0, 0, pixels, 0)) if pixels else mixed
    out = attend(q, k, v)
    return with_last(out, out[-len(mixed):] + attend(q_src, k_src, mixed))


def edited_probs(p: Tensor, p_src: Tensor, mix: Tensor, keep: Tensor) -> Tensor:
    """P' itself: the explicit form of `edited_attend`; its rows need not sum to 1.  p (E, h, N, K), p_src (E or 1, h, N, K)
    -> (E, h, N, K)"""
    n = p.shape[-1] - keep.shape[-1]
    text = p_src[..., n:] @ mix[:, None].to(p.dtype) + p[..., n:] * keep[:, None, None, :].to(p.dtype)
    return torch.cat([p[..., :n], text], dim=-1)


class _Attention(nn.Module):
    def __init__(self, dim: int, kv_dim: int, heads: int, head_dim: int, upcast: bool, bias: bool = False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = Linear(dim, heads * head_dim, bias)
        self.to_k = Linear(kv_dim, heads * head_dim, bias)
        self.to_v = Linear(kv_dim, heads * head_dim, bias)
        self.to_out = nn.Sequential(Linear(heads * head_dim, dim))

    def _split(self, *parts: Tensor) -> list[Tensor]:
        """(B, N, h d) -> (B, h, N, d) each"""
        split = [rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in parts]
        return [x.float() for x in split] if self.upcast else split

    def _borrow(self, edit: AttentionEdit | None, *parts: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of the pixels from the rows that the edit names for each."""
        if edit is None or edit.rows is None:
            return parts
        first = torch.arange(len(parts[0]) - edit.rows.shape[1], device=edit.rows.device)
        return tuple(x[torch.cat([first, rows])] for x, rows in zip(parts, edit.rows))

    def _source(self, edit: AttentionEdit, q: Tensor, k: Tensor) -> QK:
        """Queries and keys of each edited row's source."""
        if edit.cached:
            return tuple(c.to(q).expand(len(edit.source), -1, -1).contiguous() for c in edit.cached[""])
        return q.index_select(0, edit.source), k.index_select(0, edit.source)

    def _out(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.to_out(rearrange(x, "b h n d -> b n (h d)").to(dtype))


class SelfAttention(_Attention):
    """Pixels attend to pixels. Injection: P_src V, that is, the source's queries and keys with the row's own values."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, upcast: bool = False):
        super().__init__(dim, dim, heads, head_dim, upcast)

    def _chosen(self, edit: AttentionEdit, q: Tensor, k: Tensor) -> QK:
        """Queries and keys that each edited row uses: its source's, or its own."""
        own = torch.arange(len(q) - len(edit.source), len(q), device=q.device)
        rows = torch.where(q.shape[1] <= edit.self_max_tokens, edit.self_source, own)    # (E,)
        if not edit.cached:
            return q.index_select(0, rows), k.index_select(0, rows)
        foreign = (rows == len(q))[:, None, None]
        return tuple(torch.where(foreign, c.to(m), m[-len(rows):]) for m, c in zip((q, k), edit.cached[""]))

    def forward(self, x: Tensor, context: Tensor, edit: AttentionEdit | None = None,
                record: Record = Record()) -> tuple[Tensor, Tensor | QK | None]:
        e, injected = (0, False) if edit is None else (len(edit.source), edit.injects(x.shape[1]))
        kept, r = record.queries or record.before, -record.rows
        unread = e if injected and not kept and edit.rows is None else 0                 # rows whose own q and k nobody reads
        q, k = (f(x[:len(x) - unread]) for f in (self.to_q, self.to_k))
        q, k, v = self._borrow(edit, q, k, self.to_v(x))                                 # (B, N, h d)
        used = (q, k)
        if unread:
            used = tuple(map(torch.cat, zip(used, self._source(edit, q, k))))
        elif injected is not False:
            used = tuple(with_last(m.clone() if kept else m, new) for m, new in zip(used, self._chosen(edit, q, k)))
        out = self._out(attend(*self._split(*used, v)), x.dtype)                         # (B, N, C)
        if record.queries:
            return out, (q[r:], k[r:])
        if x.shape[1] > record.pixels:
            return out, None
        probs = attend_probs(*self._split(*(m[r:] for m in used)))                       # (B, h, N, N)
        if edit is not None and (edit.cached or record.before):
            e = len(edit.source[r:])
            absent = [attend_probs(*self._split(*(c.to(x) for c in edit.cached[""])))] if edit.cached else []
            before = [attend_probs(*self._split(q[-e:], k[-e:]))] if record.before else []
            probs = torch.cat([probs[:-e], *absent, probs[-e:], *before])
        return out, probs


class _TextAttention(_Attention):
    """What cross- and hybrid attention share: the edit of the text columns, which stand last."""

    def _read(self, context: Tensor | TextKV, edit: AttentionEdit | None) -> TextKV:
        return (self.text(context) if isinstance(context, Tensor) else context).under(edit)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, text: TextKV, edit: AttentionEdit | None,
                record: Record) -> tuple[Tensor, Tensor | QK | None]:
        want, dtype, r = record.wants(q.shape[1]), q.dtype, -record.rows
        queries = (q[r:], k[r:]) if record.queries else None
        only = None if edit is None or want else edit.whose_text()
        if only == "own":                                                                # P' = P
            edit = None
        elif only == "source" and k.shape[1] == text.k.shape[1] and edit.renormalise is None:   # P' = P_src mix: no pixels in it
            q, k, v = (torch.cat([m[:-len(new)], new]) for m, new in zip((q, k, v), (*self._source(edit, q, k), text.mixed)))
            edit = None
        source = None if edit is None else self._split(*self._source(edit, q, k))        # (E, h, N, d), (E, h, K, d)
        q, k, v = self._split(q, k, v)                                                   # (B, h, N, d)
        mean = record.mean and (edit is None or edit.renormalise is None)

        def columns(q: Tensor, k: Tensor) -> Tensor:
            p = text_probs(q, k, text.k.shape[1])                                        # (B, h, N, L)
            if not mean:
                return p
            return p.mean(1, keepdim=True, dtype=torch.promote_types(p.dtype, torch.float32))   # edits are linear

        before = columns(q[r:], k[r:]) if want else None
        if edit is None:
            return self._out(attend(q, k, v), dtype), queries or before
        e = len(edit.source)
        out = attend_twice(q, k, v, *source, *self._split(text.mixed))                   # (B, h, N, d)
        if edit.renormalise is not None:   # row sums are a map times a column of ones: no map needed either
            some, sizes = edit.renormalise[:, None, None, None], (edit.mix.abs(), edit.keep.abs())
            sums = edited_attend(q[-e:], k[-e:], torch.ones_like(v[-e:]), *source, *sizes)
            out = with_last(out, torch.where(some, out[-e:] / sums, out[-e:]))
        if not want:
            return self._out(out, dtype), queries
        rows = edit.source[r:]
        if edit.cached:
            lent = absent = columns(*(m[:1] for m in source))                            # (1, h, N, L), the same for all
        else:
            lent = before.index_select(0, rows - (len(q) - len(before)))                 # (E, h, N, L)
            absent = lent[:0]
        e = len(rows)
        after = edited_probs(before[-e:], lent, edit.mix[r:], edit.keep[r:])
        if edit.renormalise is not None:
            after = torch.where(some[r:], after / sums[r:][..., :1], after)
        return self._out(out, dtype), torch.cat([before[:-e], absent, after, before[-e:][: e if record.before else 0]])


class CrossAttention(_TextAttention):
    """Pixels attend to text (paper section 3.1, i)."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, upcast: bool = False):
        super().__init__(dim, context_dim, heads, head_dim, upcast)

    def text(self, context: Tensor) -> TextKV:
        return TextKV(self.to_k(context), self.to_v(context))

    def forward(self, x: Tensor, context: Tensor | TextKV, edit: AttentionEdit | None = None,
                record: Record = Record()) -> tuple[Tensor, Tensor | QK | None]:
        text = self._read(context, edit)                                                 # (B, L, h d) each
        return self._attend(self.to_q(x), text.k, text.v, text, edit, record)


class HybridAttention(_TextAttention):
    """Pixels attend to pixels and text in one softmax (paper section 3.1, ii); only the text columns are edited.

    Without to_k and to_v (None) there are no columns of pixels: cross-attention under hybrid attention's names.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, upcast: bool = False, bias: bool = False):
        super().__init__(dim, dim, heads, head_dim, upcast, bias)
        self.add_k_proj = Linear(context_dim, heads * head_dim, bias)
        self.add_v_proj = Linear(context_dim, heads * head_dim, bias)

    def text(self, context: Tensor) -> TextKV:
        return TextKV(self.add_k_proj(context), self.add_v_proj(context))

    def forward(self, x: Tensor, context: Tensor | TextKV, edit: AttentionEdit | None = None,
                record: Record = Record()) -> tuple[Tensor, Tensor | QK | None]:
        text = self._read(context, edit)                                                 # (B, L, h d) each
        q = self.to_q(x)                                                                 # (B, N, h d)
        k, v = (q[:, :0] if f is None else f(x) for f in (self.to_k, self.to_v))
        q, k, v = self._borrow(edit, q, k, v)
        k, v = torch.cat([k, text.k], dim=1), torch.cat([v, text.v], dim=1)              # (B, N+L, h d)
        return self._attend(q, k, v, text, edit, record)

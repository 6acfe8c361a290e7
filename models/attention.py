"""Attention with the edit as an argument: all of Prompt-to-Prompt's injection (Hertz et al. 2022, section 3).

The paper's map M = softmax(Q K^T / sqrt(d)) (Eq. 1), here P, has a line for each pixel and a column for each
text token. P and V are a target's, P_src is its source's: "rows", here, are those of a batch. Every edit of
the paper is linear in the columns (`p2p.edits` has mix and keep of each), and (P mix) V = P (mix V):

    P'   = P_src . mix + P . diag(keep)
    P' V = attend(q_src, k_src, mix V) + attend(q, k, keep V)

so an edit of text is two small tensors a step, and no map has to be formed: `edited_attend`. `edited_probs`
is P'. Self-attention is edited by attending with the source's queries and keys: `borrow`.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from p2p.models.layers import Linear

KV = tuple[Tensor, Tensor]            # keys and values of the text, (B, L, h d) each, whatever x_t and t
QK = tuple[Tensor, Tensor]            # queries and keys of a layer: (B, N, h d) and (B, K, h d)
QKV = tuple[Tensor, Tensor, Tensor]   # and values, (B, K, h d)


class AttentionEdit(NamedTuple):
    """The edit of one step, the paper's Edit(M_t, M*_t, t), for the last E rows of the batch."""

    source: Tensor                      # (E,) long: the row from whose map each borrows columns of text
    mix: Tensor | None = None           # (E, L, L): source columns -> own columns; None: text is not edited
    keep: Tensor | None = None          # (E, L): share of the own columns that stays; comes with mix
    renormalise: Tensor | None = None   # (E,) bool: divide P' V by the sums of P_src |mix| + P diag(|keep|)
    pixels: Tensor | None = None        # (3, E) long: the rows whose pixels' q, k and v each takes as its own
    max_pixels: Tensor | None = None    # (E,): ... if at most so many, never beside appended text; None: all
    cached: Mapping[str, QK] | None = None   # by site: q and k of rows that are not run: B, B + 1, ...


Edits = AttentionEdit | Mapping[str, AttentionEdit] | None   # one for all layers, or by site
Texts = Mapping[str, KV]                                     # by site
Seen = dict[str, QK | None]   # the watched sites, where layers put q and k; self-attention before it borrows


# ------------------------------------------------------------------------------------------ the mathematics

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, fused.  (B, h, N, d), (B, h, K, d), (B, h, K, e) -> (B, h, N, e)"""
    return F.scaled_dot_product_attention(q, k, v)


def attend_probs(q: Tensor, k: Tensor) -> Tensor:
    """The map itself (paper Eq. 1).  (B, h, N, d), (B, h, K, d) -> (B, h, N, K), sums to 1 over K"""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)


def edited_attend(q: Tensor, k: Tensor, v: Tensor, q_src: Tensor, k_src: Tensor, mix: Tensor,
                  keep: Tensor) -> Tensor:
    """P' V, fused. Only the last L columns of the last E rows are edited.

    q (B, h, N, d); k, v (B, h, K, d); q_src, k_src (E, h, ...); mix (E, L, L); keep (E, L)  ->  (B, h, N, d)
    """
    e, n = len(mix), v.shape[2] - mix.shape[-1]                       # n columns of pixels before the text
    mix, keep = mix[:, None].to(v.dtype), keep[:, None, :, None].to(v.dtype)
    text = v[-e:, :, n:]                                              # (E, h, L, d)
    own = torch.cat([v[-e:, :, :n], keep * text], dim=2)              # (E, h, K, d)
    borrowed = F.pad(mix @ text, (0, 0, n, 0))                        # (E, h, K, d)
    out = attend(q, k, torch.cat([v[:-e], own]))
    return torch.cat([out[:-e], out[-e:] + attend(q_src, k_src, borrowed)])


def edited_probs(p: Tensor, p_src: Tensor, mix: Tensor, keep: Tensor) -> Tensor:
    """P' itself, the explicit form of `edited_attend`; its columns need not sum to 1.

    p (E, h, N, K); p_src (E or 1, h, N, K); mix (E, L, L); keep (E, L)  ->  (E, h, N, K)
    """
    n = p.shape[-1] - mix.shape[-1]
    mix, keep = mix[:, None].to(p.dtype), keep[:, None, None].to(p.dtype)
    return torch.cat([p[..., :n], p_src[..., n:] @ mix + p[..., n:] * keep], dim=-1)


# ----------------------------------------------------------------------------------------------- the modules

class Attention(nn.Module):
    """Projections, heads, and the rows that an edit borrows from."""

    site = ""               # the layer's name in its network, set when that is built
    pixel_columns = False   # whether pixels are among the columns of its maps

    def __init__(self, dim: int, kv_dim: int, heads: int, head_dim: int, upcast: bool = False,
                 bias: bool = False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = Linear(dim, heads * head_dim, bias)
        self.to_k, self.to_v = (Linear(kv_dim, heads * head_dim, bias) for _ in range(2))
        self.to_out = nn.Sequential(Linear(heads * head_dim, dim))

    def split(self, *parts: Tensor) -> list[Tensor]:
        """(B, N, h d) -> (B, h, N, d) each"""
        split = [rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in parts]
        return [x.float() for x in split] if self.upcast else split

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.to_out(rearrange(x, "b h n d -> b n (h d)").to(dtype))

    def site_edit(self, edit: Edits) -> AttentionEdit | None:
        return edit.get(self.site) if isinstance(edit, Mapping) else edit

    def with_cached(self, edit: AttentionEdit, q: Tensor, k: Tensor) -> QK:
        """Queries and keys of the batch's rows and then the cached ones: an edit's numbers index these."""
        if edit.cached is None:
            return q, k
        more_q, more_k = (x.to(q) for x in edit.cached[self.site])
        return torch.cat([q, more_q]), torch.cat([k, more_k[:, :k.shape[1]]])   # k: of pixels, or of text too

    def borrow(self, edit: AttentionEdit | None, q: Tensor, k: Tensor, v: Tensor) -> QKV:
        """q, k and v (B, N, h d) of all rows; an edited row's are those of the rows that `pixels` names."""
        if edit is None or edit.pixels is None:
            return q, k, v
        rows, chosen, e = torch.arange(len(q), device=q.device), edit.pixels, len(edit.source)
        if edit.max_pixels is not None:
            chosen = torch.where(q.shape[1] <= edit.max_pixels, chosen, rows[-e:])
        of_q, of_k, of_v = torch.cat([rows[:-e].expand(3, -1), chosen], dim=1)   # (B,) each
        all_q, all_k = self.with_cached(edit, q, k)
        return all_q.index_select(0, of_q), all_k.index_select(0, of_k), v.index_select(0, of_v)


class SelfAttention(Attention):
    """Pixels attend to pixels. Prompt-to-Prompt injects P_src V: the source's q and k with own values."""

    pixel_columns = True

    def __init__(self, dim: int, heads: int, head_dim: int, upcast: bool = False):
        super().__init__(dim, dim, heads, head_dim, upcast)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, edit: Edits, seen: Seen | None) -> Tensor:
        """(B, N, h d) each -> (B, h, N, d)"""
        if seen is not None and self.site in seen:
            seen[self.site] = q, k
        return attend(*self.split(*self.borrow(self.site_edit(edit), q, k, v)))

    def forward(self, x: Tensor, edit: Edits = None, seen: Seen | None = None) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)                       # (B, N, h d)
        return self.join(self.attended(q, k, v, edit, seen), x.dtype)


class CrossAttention(Attention):
    """Pixels attend to text (paper section 3.1, i)."""

    def text(self, context: Tensor) -> KV:
        """(B, L, C) -> keys and values (B, L, h d)"""
        return self.to_k(context), self.to_v(context)

    def columns(self, x: Tensor, text: KV, edit: AttentionEdit | None) -> QKV:
        """Queries (B, N, h d), and keys and values of all columns (B, K, h d)."""
        return self.to_q(x), *text

    def attended(self, q: Tensor, k: Tensor, v: Tensor, edit: AttentionEdit | None,
                 seen: Seen | None) -> Tensor:
        """The pixels' P' V; the last columns are the text's.  (B, N or K, h d) -> (B, h, N, d)"""
        if seen is not None and self.site in seen:
            seen[self.site] = q, k
        if edit is None or edit.mix is None or edit.keep is None:
            return attend(*self.split(q, k, v))
        of_source = (x.index_select(0, edit.source) for x in self.with_cached(edit, q, k))
        q_src, k_src = self.split(*of_source)                                    # (E, h, N or K, d)
        q, k, v = self.split(q, k, v)                                            # (B, h, N, d), (B, h, K, d)
        out = edited_attend(q, k, v, q_src, k_src, edit.mix, edit.keep)          # P' V
        if edit.renormalise is not None:   # P' need not sum to 1: its sums are what it makes of values of 1
            sums = edited_attend(q, k, torch.ones_like(v), q_src, k_src, edit.mix.abs(), edit.keep.abs())
            chosen = F.pad(edit.renormalise, (len(q) - len(edit.source), 0))
            out = torch.where(chosen[:, None, None, None], out / sums, out)
        return out

    def forward(self, x: Tensor, texts: Texts, edit: Edits = None, seen: Seen | None = None) -> Tensor:
        edit = self.site_edit(edit)
        return self.join(self.attended(*self.columns(x, texts[self.site], edit), edit, seen), x.dtype)


class HybridAttention(CrossAttention):
    """Pixels attend to pixels and text in one softmax (paper section 3.1, ii); text columns are edited."""

    pixel_columns = True

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, upcast: bool = False,
                 bias: bool = False):
        Attention.__init__(self, dim, dim, heads, head_dim, upcast, bias)
        self.add_k_proj, self.add_v_proj = (Linear(context_dim, heads * head_dim, bias) for _ in range(2))

    def text(self, context: Tensor) -> KV:
        return self.add_k_proj(context), self.add_v_proj(context)

    def columns(self, x: Tensor, text: KV, edit: AttentionEdit | None) -> QKV:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)                       # (B, N, h d)
        if edit is not None and edit.max_pixels is None:
            q, k, v = self.borrow(edit, q, k, v)
        text_k, text_v = text
        return q, torch.cat([k, text_k], dim=1), torch.cat([v, text_v], dim=1)   # (B, N + L, h d)


class JointAttention(HybridAttention):
    """Pixels and text attend to both in one softmax (MM-DiT): hybrid attention whose text has queries too.

    mix and keep edit what pixels read. Borrowed q and k of pixels count in the whole softmax: such queries
    meet their own row's text keys too, and the queries of its text meet such keys. It has no weights:
    projections, norms and rotary positions are its block's, and come before it.
    """

    def __init__(self, heads: int):
        nn.Module.__init__(self)
        self.heads, self.upcast = heads, False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, n: int,   # type: ignore[override]
                edit: Edits = None, seen: Seen | None = None) -> Tensor:
        """q (B, N or N + L, h d), k, v (B, N + L, h d), n = N pixels before L tokens of text  ->  as q"""
        edit, q, q_text = self.site_edit(edit), q[:, :n], q[:, n:]
        if edit is not None and edit.pixels is not None:
            own = k[:, n:], v[:, n:]
            q, k, v = self.borrow(edit, q, k, v)                                 # copies
            k[:, n:], v[:, n:] = own
        out = [self.attended(q, k, v, edit, seen)]                               # (B, h, N, d)
        if q_text.shape[1]:
            out.append(attend(*self.split(q_text, k, v)))                        # (B, h, L, d)
        return torch.cat([rearrange(x, "b h n d -> b n (h d)") for x in out], dim=1)

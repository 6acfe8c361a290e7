"""The user's `Edit` -> one `AttentionEdit` per sampling step: mix and keep of each mode.

    edit                      mix             keep
    replace                   M diag(alpha)   1 - alpha
    refine                    G diag(a alpha) 1 - a alpha
    reweight                  diag(c alpha)   1 - alpha
    replace, then reweight    M diag(c alpha) 1 - alpha
    refine, then reweight     G diag(a c alpha)  (1 - a) c alpha + 1 - alpha

alpha: which tokens are injected at this step, M: word-swap matrix, G: gather by the alignment A(j), a: 1
where A(j) is not None, c: the word weights.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from p2p import align
from p2p.blend import LocalBlend, Words
from p2p.blend import check as check_blend
from p2p.denoise import Batch
from p2p.errors import UsageError
from p2p.models.attention import AttentionEdit
from p2p.models.text import Tokens
from p2p.request import windows
from p2p.request.checks import choice, finite, flag, whole
from p2p.request.words import by_breadth
from p2p.weights.untrusted import brief

Window = float | tuple[float, float]
Share = str | tuple[float, float]                # a part of names, or shares of depth
Layers = Share | Sequence[Share] | Mapping[str, Share | Sequence[Share]]
MODES = ("replace", "refine", "reweight")


@dataclass(frozen=True)
class Edit:
    """One target: its prompt and how the source's attention is injected (paper section 3.2).

    mode: "replace" (word swap), "refine" (added phrases) or "reweight" (only the weights); None:
    chosen from the prompts.
    cross_replace_steps: share of the steps with cross-attention injected: an end, (start, end), or by word of
        the target prompt {"default_": ..., "word": ...}; words that are not named are injected throughout.
        None: by what the edit does (0.8; less where a thing is added, or a place swapped), see
        `request.windows`.
    self_replace_steps: share of the steps with self-attention injected, at sites of at most `self_max_tokens`
        pixels: an end, or (start, end). None: 0.4.
    self_max_tokens: None: 32 * 32 in a UNet, as in the official code; in an MM-DiT no limit.
    windows_over: the steps that these shares refer to: those of the "run", or all of the "schedule", though
        an inversion leaves some out; they are counted from the first that is run, as in the edit-friendly
        code. (With 12 of 50 skipped, 0.6 then ends after 30 of the 38.) With "run", 0.6 means the same
        whatever is skipped.
    equalizer: {"word": c}: the attention of that word times c.
    renormalise: divide the edited maps by their sums over the columns, of negative weights by those of their
        absolute values (the paper and the official code do not).
    swap: {"source word": "target word"} in an edit that also adds words: the new word takes the
    old one's attention.
    local_blend: where the target may differ from the source; None: everywhere.
    scope: words of the source prompt that the edit is about ("cat", "cat#2"): the picture changes only where
        pixels attend to these words, or to those that replace or join them, more than to any other thing of
        the prompts.
    layers: which attention layers are injected: a part of their names ("up", "mid", "down_blocks.1"), (first,
        last) as shares of depth, a list of these, or {"cross": ..., "self": ...}; None: all.
    emphasis: what weights in the prompt, "a (red:1.3) dog", act on: the "attention" to the words, as the
        equalizer does, or their "embedding", by the rule of AUTOMATIC1111's web UI.
    aligner: "exact", or "official" for google/prompt-to-prompt's token mappers, faults included.
    """

    prompt: str
    mode: Literal["replace", "refine", "reweight"] | None = None
    cross_replace_steps: Window | Mapping[str, Window] | None = None
    self_replace_steps: Window | None = None
    self_max_tokens: int | None = None
    windows_over: Literal["run", "schedule"] = "run"
    equalizer: Mapping[str, float] | None = None
    renormalise: bool = False
    swap: Mapping[str, str] | None = None
    local_blend: LocalBlend | None = None
    scope: Words | None = None
    aligner: Literal["exact", "official"] = "exact"
    layers: Layers | None = None
    emphasis: Literal["attention", "embedding"] = "attention"


def check(edit: Edit) -> None:
    """Raises UsageError for fields of the wrong kind; words are checked where the prompts are known."""
    def words(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)

    def mapping(value: Any) -> bool:
        return value is None or (isinstance(value, Mapping) and words(tuple(value)))

    for name, fits, wanted in (
            ("prompt", isinstance(edit.prompt, str), "a string"),
            ("equalizer", mapping(edit.equalizer), 'a mapping {"word": weight}'),
            ("swap", mapping(edit.swap) and words(new := tuple((edit.swap or {}).values()))
             and len(set(new)) == len(new), '{"source word": "target word"}, each once'),
            ("scope", edit.scope is None or isinstance(edit.scope, str) or (words(edit.scope) and edit.scope),
             "a word or a list of words")):
        if not fits:
            raise UsageError(f"{name}: {brief(getattr(edit, name))} is not {wanted}")
    if edit.mode is not None:
        choice("mode", edit.mode, MODES)
    choice("aligner", edit.aligner, ("exact", "official"))
    choice("emphasis", edit.emphasis, ("attention", "embedding"))
    choice("windows_over", edit.windows_over, ("run", "schedule"))
    if edit.self_max_tokens is not None:
        whole("self_max_tokens", edit.self_max_tokens, least=0, most=2**62)
    flag("renormalise", edit.renormalise)
    cross = edit.cross_replace_steps
    if isinstance(cross, Mapping) and not mapping(cross):
        raise UsageError(f"cross_replace_steps: {brief(cross)} is not a mapping of words to windows")
    for value in cross.values() if isinstance(cross, Mapping) else [] if cross is None else [cross]:
        window(value, "cross_replace_steps")
    if edit.self_replace_steps is not None:
        window(edit.self_replace_steps, "self_replace_steps")
    if edit.local_blend is not None:
        check_blend(edit.local_blend, edit.scope is not None)


def choose_mode(source: Tokens, edit: Edit, target: Tokens) -> str:
    """The mode of an edit, chosen where None: equal prompts are reweighted, words changed in place are
    swapped, all others refined. Raises UsageError."""
    if edit.mode is not None:
        choice("mode", edit.mode, MODES)
        if edit.mode == "reweight" and source.ids != target.ids:
            raise UsageError(f'mode "reweight" is for one and the same prompt: "{target.text}" differs from '
                             f'"{source.text}"; other modes take weights too')
        return edit.mode
    if source.ids == target.ids:
        return "reweight"
    return "replace" if align.is_swap(source, target) else "refine"


def decided(source: Tokens, target: Tokens, edit: Edit, mode: str, length: int) -> Edit:
    """The edit in this mode, with the usual windows of what it does in place of those that are None."""
    usual = windows.usual(source, target, mode, length)
    cross, self_ = edit.cross_replace_steps, edit.self_replace_steps
    return replace(edit, mode=cast(Any, mode), cross_replace_steps=usual.cross if cross is None else cross,
                   self_replace_steps=usual.self_ if self_ is None else self_)


def window(value: Window, name: str) -> tuple[float, float]:
    """A number or a pair as (start, end). Raises UsageError unless both lie between 0 and 1."""
    pair = (0.0, value) if isinstance(value, Real) and not isinstance(value, bool) else value
    try:
        if not isinstance(pair, (list, tuple)) or not all(isinstance(v, Real) for v in pair):
            raise TypeError
        lo, hi = map(float, pair)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name}: {brief(value)} is neither a number nor a pair (start, end)") from None
    if not 0 <= lo <= hi <= 1:
        raise UsageError(f"{name}: {brief(value)} must lie between 0 and 1, the start not after the end")
    return lo, hi


def covered(value: Window, n: int, name: str) -> range:
    """The steps of a window, rounded as in the official code: of N steps, n is N + 1 for cross-attention, N
    for self-attention."""
    lo, hi = window(value, name)
    return range(int(lo * n), int(hi * n))


def cross_alpha(value: Window | Mapping[str, Window], target: Tokens, steps: int, length: int) -> Tensor:
    """Computes alpha for every step and token of the target.  -> (steps, length) float64, 0 or 1"""
    by_word = dict(value) if isinstance(value, Mapping) else {"default_": value}
    bounds = [(list(range(length)), "", by_word.pop("default_", (0.0, 1.0)))]
    bounds += [(columns, f' of "{word}"', own) for columns, word, own in by_breadth(by_word, target, length)]
    alpha = torch.zeros(steps, length, dtype=torch.float64)
    for columns, of_word, own in bounds:   # the last one that names a column counts
        inside = covered(own, steps + 1, f"cross_replace_steps{of_word}")
        alpha[:, columns] = 0
        alpha[inside.start:inside.stop, columns] = 1
    return alpha


def weights(equalizer: Mapping[str, float] | None, target: Tokens, length: int) -> Tensor:
    """Computes c for every token of the target.  -> (length,) float64"""
    c = torch.ones(length, dtype=torch.float64)
    for columns, word, value in by_breadth(equalizer or {}, target, length):
        c[columns] = finite(f'equalizer: the weight of "{word}"', value)
    return c


def mix_keep(mode: str, alpha: Tensor, c: Tensor, m: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Computes mix and keep of one row of the table above.

    alpha (T, L), c (L,), m (L, L): M, G or the identity, a (L,)  ->  (T, L, L), (T, L)
    """
    if mode == "refine":
        return m * (a * c * alpha)[:, None, :], (1 - a) * c * alpha + 1 - alpha
    return m * (c * alpha)[:, None, :], 1 - alpha


def alignment(source: Tokens, target: Tokens, edit: Edit, mode: str, length: int) -> tuple[Tensor, Tensor]:
    """Which source tokens a target token reads (M, G or the identity), and a; each tokenizer's columns are
    aligned for themselves.

    -> (length, length), (length,) float64
    """
    official = choice("aligner", edit.aligner, ("exact", "official")) == "official"
    m, a = torch.eye(length, dtype=torch.float64), torch.ones(length, dtype=torch.float64)
    of_source, of_target = align.parts(source, length), align.parts(target, length)
    for (ours, first, n), (theirs, _, _) in zip(of_source, of_target):
        own = slice(first, first + n)
        if mode == "replace":
            m[own, own] = (align.official_replacement if official else align.replacement)(ours, theirs, n)
        elif mode == "refine":
            mapper, a[own] = (align.official_refinement if official else align.refinement)(ours, theirs, n)
            m[own, own] = torch.eye(n, dtype=torch.float64)[:, mapper]     # G[A(j), j] = 1
    for old, new in (edit.swap or {}).items():
        all_s, all_t = align.word_tokens(source, old, length), align.word_tokens(target, new, length)
        for part in of_source:
            s, t = part.own(all_s), part.own(all_t)
            if not s or not t:   # its tower stops reading before
                continue
            m[:, t] = 0
            a[t] = 1
            if len(s) == len(t):
                m[s, t] = 1
            else:
                m[torch.tensor(s)[:, None], torch.tensor(t)] = 1 / len(t)
    return m, a


class Tables(NamedTuple):
    """One target's edit over T steps: rows of the table above, and what else its layers need."""

    mix: Tensor           # (T, L, L) float64
    keep: Tensor          # (T, L) float64
    inject: Tensor        # (T,) bool: its pixels use the source's queries and keys in self-attention
    max_pixels: int | None   # ... at sites of at most this many; None: of any number
    renormalise: bool
    layers: Mapping[str, tuple[bool, bool]] | None = None   # by site: edits text, borrows pixels; None: all

    def reads_text(self) -> Tensor:
        """(T,) bool: the steps at which any column of its text is edited."""
        return self.mix.flatten(1).any(1) | (self.keep != 1).any(1)


def tables(source: Tokens, target: Tokens, edit: Edit, steps: int, length: int,
           schedule_steps: int | None = None) -> Tables:
    """Computes the tables of one target. edit: as `decided`, with a mode and windows. schedule_steps: of the
    schedule, where some are left out."""
    mode = choice("mode", edit.mode, MODES)
    m, a = alignment(source, target, edit, mode, length)
    whole_steps = steps_of_windows(edit, steps, schedule_steps)
    alpha = cross_alpha(cast(Window, edit.cross_replace_steps), target, whole_steps, length)[:steps]
    injected = covered(cast(Window, edit.self_replace_steps), whole_steps, "self_replace_steps")
    return Tables(*mix_keep(mode, alpha, weights(edit.equalizer, target, length), m, a),
                  torch.tensor([i in injected for i in range(steps)]), edit.self_max_tokens, edit.renormalise)


def steps_of_windows(edit: Edit, steps: int, schedule_steps: int | None) -> int:
    """The number of steps that the edit's windows are shares of."""
    if schedule_steps is not None and edit.windows_over == "schedule":
        return schedule_steps
    return steps


def plan(tables: Sequence[Tables], batch: Batch, device: torch.device, dtype: torch.dtype, *,
         sources: Sequence[int] | None = None, dense: bool = False) -> list[AttentionEdit | None]:
    """One AttentionEdit a step, None where nothing is edited. sources: the number of each target's source, 0
    where None. dense: every step has the same fields (a compiled network has a graph for each set of
    them)."""
    sources = [0] * batch.targets if sources is None else sources
    source = torch.tensor([batch.source(j) for j in sources], device=device)
    own_rows = torch.arange(batch.rows - batch.targets, batch.rows, device=device)
    # a number even where there is no limit: None would let hybrid layers borrow pixels too
    limits = [2**62 if t.max_pixels is None else t.max_pixels for t in tables]
    limit = torch.tensor(limits, device=device)
    renormalise = None
    if any(t.renormalise for t in tables):
        renormalise = torch.tensor([t.renormalise for t in tables], device=device)
    mix = torch.stack([t.mix for t in tables], dim=1).to(device, dtype)               # (T, N, L, L)
    keep = torch.stack([t.keep for t in tables], dim=1).to(device, dtype)             # (T, N, L)
    inject = torch.stack([t.inject for t in tables], dim=1)                           # (T, N)
    rows = torch.where(inject.to(device), source, own_rows)
    reads_text = torch.stack([t.reads_text() for t in tables]).any(0)                       # (T,)
    steps: list[AttentionEdit | None] = []
    for i, (reads, injects) in enumerate(zip(reads_text.tolist(), inject.any(1).tolist())):
        edit = AttentionEdit(source)
        if reads or dense:
            edit = edit._replace(mix=mix[i], keep=keep[i], renormalise=renormalise)
        if injects or dense:
            of_qkv = torch.stack([rows[i], rows[i], own_rows])   # q and k of the source, its own v
            edit = edit._replace(pixels=of_qkv, max_pixels=limit)
        # where the source is absent, an edit also carries what is cached of it
        steps.append(edit if reads or injects or dense or batch.absent else None)
    return steps

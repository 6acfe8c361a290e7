"""What an edit is about: which words of the two prompts change, and where the picture may."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from p2p import align
from p2p.blend import LocalBlend
from p2p.edits import Edit, alignment
from p2p.models.text import Tokens
from p2p.request.windows import BRINGS, PLACES
from p2p.request.words import read_words

ARTICLES = frozenset("a an the".split())
PHRASES = BRINGS | PLACES | ARTICLES | frozenset("of to from".split())   # words with which a phrase begins


def added_words(target: Tokens, mode: str, a: Tensor) -> list[str]:
    """The words of the target that have no counterpart in the source."""
    return [name for name, columns in align.named_words(target)
            if mode == "refine" and not any(bool(a[j]) for j in columns if j < len(a))]


def subject(source: Tokens, target: Tokens, edit: Edit, mode: str, length: int,
            aligned: tuple[Tensor, Tensor] | None = None) -> tuple[list[str], list[str]]:
    """The words of the source and of the target that an edit is about: its scope and what replaces or joins
    it, see `loose`; without a scope the words that differ and those with weights other than 1. aligned: the
    result of `alignment`, if it is known."""
    m, a = aligned or alignment(source, target, edit, mode, length)
    ours, theirs = ([(name, columns) for name, columns in align.named_words(prompt)   # as far as it is read
                     if not columns or min(columns) < length] for prompt in (source, target))
    reads = (m * a).bool().tolist()   # (L, L): source token i, target token j

    def related(i: list[int], j: list[int]) -> bool:
        """Whether any target token of j reads any source token of i."""
        return any(reads[x][y] for x in i for y in j if max(x, y) < length)

    if edit.scope is not None:
        phrases = [edit.scope] if isinstance(edit.scope, str) else edit.scope
        scope_tokens = {i for phrase in phrases for i in align.word_tokens(source, phrase, length)}
        chosen = [(name, i) for name, i in ours if scope_tokens & set(i)]
        kept = [name for name, j in theirs if any(related(i, j) for _, i in chosen)]
        joined = added_words(target, mode, a)
        about = {*kept, *joined} - {*loose(target, kept, joined)}
        return [name for name, _ in chosen], [name for name, _ in theirs if name in about]
    weighted = {j for word, c in (edit.equalizer or {}).items() if c != 1
                for j in align.word_tokens(target, word, length)}

    def unchanged(i: list[int], j: list[int]) -> bool:
        """Whether target tokens j are the source tokens i, wherever both are read, and have no weight of
        their own."""
        same = all(x == y for x, y in zip(_ids(source, i), _ids(target, j)) if x and y)
        return related(i, j) and same and not weighted & set(j)

    old = [name for name, i in ours if not any(unchanged(i, j) for _, j in theirs)]
    new = [name for name, j in theirs if not any(unchanged(i, j) for _, i in ours)]
    return old, new


def loose(target: Tokens, kept: Sequence[str], joined: Sequence[str]) -> list[str]:
    """The added words (joined) that no word of the scope (kept) is described by: those that do not stand
    before one in its phrase. "a big cat": "big" belongs to it; "a cat at night", "a cat with a hat": others
    act inside of the scope only."""
    out: list[str] = []
    belongs = False
    for name, _ in reversed(align.named_words(target)):
        word = name.partition("#")[0]
        if name in kept:
            belongs = True
        elif name in joined and not (belongs and (word in ARTICLES or word not in PHRASES)):
            out.insert(0, name)
        belongs &= word not in PHRASES
    return out


def _ids(prompt: Tokens, columns: Sequence[int]) -> list[list[int]]:
    """The tokens in these columns, as each tokenizer numbers them."""
    return [[part.tokens.ids[i - part.first] for i in part.own(columns)] for part in align.parts(prompt)]


def scoped(source: Tokens, target: Tokens, edit: Edit, mode: str, length: int) -> Edit:
    """The edit with its scope expressed as a LocalBlend: its words, and all others as their rivals."""
    if edit.scope is None:
        return edit
    blend = edit.local_blend or LocalBlend()
    if blend.words is None:
        old, new = subject(source, target, edit, mode, length)
        joined = added_words(target, mode, alignment(source, target, edit, mode, length)[1])
        rivals = _others(source, old, length), _others(target, [*new, *joined], length)
        blend = replace(blend, words=(old, new), rivals=rivals if any(rivals) else None)
    return replace(edit, scope=None, local_blend=blend)


def _others(prompt: Tokens, words: Sequence[str], length: int) -> list[str]:
    """The words of a prompt beside these, as far as the text tower reads it."""
    return [name for name in read_words(prompt, length) if name not in words]

"""What an edit is about: which words of the two prompts change, and where the picture may."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from p2p import align
from p2p.blend import LocalBlend
from p2p.edits import Edit, alignment
from p2p.models.text import Tokens


def added(mode: str, a: Tensor, columns: Sequence[int]) -> bool:
    """Is a word of the target, of those columns, new beside the source's?"""
    return mode == "refine" and not any(bool(a[j]) for j in columns if j < len(a))


def subject(source: Tokens, target: Tokens, edit: Edit, mode: str, length: int,
            aligned: tuple[Tensor, Tensor] | None = None) -> tuple[list[str], list[str]]:
    """What an edit is about, as words of the source and of the target: its scope and what replaces or joins
    that; without a scope the words that differ and those with weights other than 1. aligned: what `alignment`
    gives, if it is known."""
    m, a = aligned or alignment(source, target, edit, mode, length)
    ours, theirs = align.named_words(source), align.named_words(target)
    reads = (m * a).bool()   # (L, L): source token i, target token j

    def related(i: list[int], j: list[int]) -> bool:
        return any(bool(reads[x, y]) for x in i for y in j if max(x, y) < length)

    if edit.scope is not None:
        inside = {i for word in ([edit.scope] if isinstance(edit.scope, str) else edit.scope)
                  for i in align.word_tokens(source, word, length)}
        chosen = [(name, i) for name, i in ours if inside & set(i)]
        new = [name for name, j in theirs if added(mode, a, j) or any(related(i, j) for _, i in chosen)]
        return [name for name, _ in chosen], new
    weighted = {j for word, c in (edit.equalizer or {}).items() if c != 1
                for j in align.word_tokens(target, word, length)}

    def changed(i: list[int], j: list[int]) -> bool:
        return [source.ids[x] for x in i] != [target.ids[y] for y in j] or bool(weighted & set(j))

    old = [name for name, i in ours if not any(related(i, j) and not changed(i, j) for _, j in theirs)]
    return old, [name for name, j in theirs if not any(related(i, j) and not changed(i, j) for _, i in ours)]


def scoped(source: Tokens, target: Tokens, edit: Edit, mode: str, length: int) -> Edit:
    """An edit with its scope written out as a LocalBlend: its words, and all others as their rivals."""
    if edit.scope is None:
        return edit
    blend = edit.local_blend or LocalBlend()
    if blend.words is None:
        own = subject(source, target, edit, mode, length)
        left, right = ([name for name, columns in align.named_words(prompt) if name not in words
                        and max(columns) < length - 1]
                       for prompt, words in zip((source, target), own))
        blend = replace(blend, words=own, rivals=(left, right))
    return replace(edit, scope=None, local_blend=blend)

"""Two prompts -> which token of one belongs to which token of the other.

All functions work on `Tokens`, so any tokenizer with offsets will do. Of several tokenizers each is aligned
for itself, see `parts`: a word has columns in all whose tower reads that far.
"""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2p.errors import UsageError
from p2p.models.text import Part, Tokens, lowered, tokenizer
from p2p.weights.untrusted import brief

READ = 512     # words of a prompt that are compared; no text tower reads more tokens
UNCUT = 2**62   # columns


def parts(prompt: Tokens, length: int = UNCUT) -> tuple[Part, ...]:
    """What each tokenizer makes of a prompt, and its columns; `length`: columns where there is one."""
    return prompt.parts or (Part(prompt, 0, length),)


def word_tokens(prompt: Tokens, phrase: str, length: int) -> list[int]:
    """Token positions (columns) of every occurrence of a word or phrase; with "cat#2", of the second one
    only. Case and punctuation do not matter. `length`: how many tokens the tower reads; occurrences beyond it
    do not count. Raises UsageError where none is left.
    """
    if not isinstance(phrase, str):
        raise UsageError(f"a word or phrase is needed, not {brief(phrase)}")
    columns: list[int] = []
    refusals: dict[int, UsageError] = {}
    for tokens, first, own in parts(prompt, length):
        try:
            columns += [first + i for i in _word_tokens(tokens, phrase, own)]
        except UsageError as refusal:
            refusals[own] = refusal
    if not columns:
        raise refusals[max(refusals)]   # of the tower that reads furthest
    return columns


def _word_tokens(prompt: Tokens, phrase: str, length: int) -> list[int]:
    word, _, number = phrase.strip().rpartition("#")
    occurrences = _occurrences(prompt, word) if word and number.isdecimal() else []
    if not occurrences or phrase.strip().lower() in prompt.text:   # a "#" of the text's own
        places = _occurrences(prompt, phrase)
    else:
        if not 1 <= int(number) <= len(occurrences):
            raise UsageError(f'"{phrase}": the prompt "{prompt.text}" holds "{word}" {len(occurrences)} '
                             "times")
        places = occurrences[int(number) - 1:int(number)]
    if not places:
        raise UsageError(f'no word "{phrase}" in the prompt "{prompt.text}"; its words: '
                         f'{", ".join(prompt.text.split())}')
    positions = [i for place in places if max(place) < length - 1 for i in place]
    if not positions:
        raise UsageError(f'"{phrase}" stands beyond token {length - 2} of "{prompt.text}", where the text '
                         "tower stops reading; shorten the prompt")
    return sorted(set(positions))


def _occurrences(prompt: Tokens, phrase: str) -> list[list[int]]:
    """Token positions of each occurrence, left to right, that starts and ends at a token's boundary."""
    wanted = " ".join(lowered(phrase).split())
    if wanted not in prompt.text:   # CLIP's tokenizer rewrites typography and entities in the prompt
        wanted = tokenizer().clean_fn(phrase)
    if found := _find(prompt, prompt.text, range(len(prompt.text)), wanted):
        return found
    text, origin = _without_punctuation(prompt.text)
    return _find(prompt, text, origin, _without_punctuation(wanted)[0])


def _find(prompt: Tokens, text: str, origin: Sequence[int], wanted: str) -> list[list[int]]:
    """Token positions of each `wanted` in `text`, whose character i is character origin[i] of the prompt."""
    first, last = _bounds(prompt.text, tuple(prompt.spans))
    out = []
    index = text.find(wanted) if wanted else -1
    while index >= 0:
        start, stop = origin[index], origin[index + len(wanted) - 1] + 1
        if start in first and stop in last:
            out.append(list(range(first[start], last[stop] + 1)))
        index = text.find(wanted, index + 1)
    return out


@lru_cache(16)   # of a prompt, each of whose words is looked for
def _bounds(text: str, spans: tuple[tuple[int, int], ...]) -> tuple[dict[int, int], dict[int, int]]:
    """The first token that starts and the last that ends at a character, unless that is within a word."""
    return ({s: i for i, (s, e) in reversed([*enumerate(spans)]) if e and not _within_word(text, s)},
            {e: i for i, (_, e) in enumerate(spans) if e and not _within_word(text, e)})


def _within_word(text: str, i: int) -> bool:
    """Whether letters, or digits, stand on both sides of character i's beginning: tokens end there too."""
    sides = text[i - 1:i + 1] if i else ""
    return len(sides) == 2 and (sides.isalpha() or sides.isdigit())


def _without_punctuation(text: str) -> tuple[str, list[int]]:
    """The text with each run of punctuation and spaces as one space, none at the ends, and for each character
    left its position in the text."""
    out: list[tuple[str, int]] = []
    for i, c in enumerate(text):
        c = " " if c.isspace() or unicodedata.category(c).startswith("P") else c
        if c != " " or (out and out[-1][0] != " "):
            out.append((c, i))
    if out and out[-1][0] == " ":
        out.pop()
    return "".join(c for c, _ in out), [i for _, i in out]


Word = tuple[str, list[int]]   # and its token positions


def words(prompt: Tokens) -> list[Word]:
    """The words between spaces, each with its token positions (punctuation belongs to its word); of several
    tokenizers, those that their towers read."""
    out, *others = ([(word, [part.first + i for i in positions if positions[-1] < part.length - 1])
                     for word, positions in _words(part.tokens)] for part in parts(prompt))
    for other in others:
        if len(other) == len(out):   # no tokenizer's text has spaces where the others' have none
            out = [(word, columns + more) for (word, columns), (_, more) in zip(out, other)]
    return out


def _words(prompt: Tokens) -> list[Word]:
    pieces = iter([(i, s, e) for i, (s, e) in enumerate(prompt.spans) if e])
    piece = next(pieces, None)
    out = []
    for word in re.finditer(r"\S+", prompt.text):
        positions = []
        while piece is not None and piece[2] <= word.end():
            positions.append(piece[0])
            piece = next(pieces, None)
        out.append((word.group(), positions))
    return out


def name_of(prompt: Tokens, columns: list[int], known: dict[tuple[int, str], list[list[int]]]) -> str | None:
    """What `word_tokens` calls these neighbouring tokens: words that occur again are "cat#1", "cat#2". None
    where they begin or end within a word. known: occurrences that were found before; what is found joins."""
    part = next(part for part in parts(prompt) if part.own(columns))
    prompt, columns = part.tokens, [i - part.first for i in part.own(columns)]
    text = prompt.text[prompt.spans[columns[0]][0]:prompt.spans[columns[-1]][1]]
    at = part.first, text
    places = known.get(at) or known.setdefault(at, _occurrences(prompt, text))
    if columns not in places:
        return None
    return text if len(places) == 1 else f"{text}#{places.index(columns) + 1}"


def named_words(prompt: Tokens) -> list[Word]:
    """`words` under names that `word_tokens` tells apart, see `name_of`."""
    known: dict[tuple[int, str], list[list[int]]] = {}   # a word may stand there a thousand times
    return [(name_of(prompt, columns, known) or word if columns else word, columns)
            for word, columns in words(prompt)]


def is_swap(source: Tokens, target: Tokens) -> bool:
    """Whether the words that differ stand in the same places: both prompts have the same number of words, and
    no word that they share has moved. "a huge dog on grass" -> "a dog on foggy grass" is not a swap: every
    word from "huge" to "foggy" would take its neighbour's map."""
    a, b = ([word for word, _ in words(prompt)] for prompt in (source, target))
    in_place = sum(u == v for u, v in zip(a[:READ], b[:READ]))
    shared = sum(i is not None for i in _global_alignment(a[:READ], b[:READ], mismatch=-2))
    return len(a) == len(b) and in_place == shared


def _cut(t: Tokens, length: int) -> list[int]:
    return t.ids if len(t.ids) <= length else [*t.ids[: length - 1], t.ids[-1]]


def ends(prompt: Tokens, length: int) -> tuple[list[int], list[int]]:
    """The columns of the start tokens, which T5 does not have, and of the end tokens."""
    read = [(part, _cut(part.tokens, part.length)) for part in parts(prompt, length)]
    starts = [part.first for part, ids in read if len(ids) > 1 and part.tokens.spans[0] == (0, 0)]
    return starts, [part.first + len(ids) - 1 for part, ids in read]


def read_ids(prompt: Tokens, length: int) -> list[list[int]]:
    """The ids that each text tower reads."""
    return [_cut(tokens, own) for tokens, _, own in parts(prompt, length)]


def paired_words(source: Tokens, target: Tokens) -> list[tuple[Word, Word]]:
    """Pairs the words of two prompts in order. Raises UsageError where their numbers differ."""
    a, b = words(source), words(target)
    if len(a) != len(b):
        raise UsageError(f'a word swap needs as many words on both sides: "{source.text}" has {len(a)}, '
                         f'"{target.text}" has {len(b)}; use mode "refine" for added or removed words')
    return list(zip(a, b))


def replacement(source: Tokens, target: Tokens, length: int) -> Tensor:
    """Word-swap matrix M (length, length) float64: the target's map of token j takes sum_i P_src[i] M[i, j].

    Word k of one prompt belongs to word k of the other. Where their token counts differ, the source's pieces
    are shared out equally ("duplicated or averaged", paper section 3.2). Padding belongs to the padding in
    the same place; where only one text is padded, to the other's first padding. What has no partner because a
    text was cut belongs to the end of the other. Rows sum to 1, so P_src M still holds all of the attention.
    Raises UsageError for different word counts.
    """
    m = np.zeros((length, length))
    m[0, 0] = 1
    groups = [(s, t) for (_, s), (_, t) in paired_words(source, target)]
    a, b = len(_cut(source, length)), len(_cut(target, length))
    groups = [([i for i in s if i < a - 1], [j for j in t if j < b - 1]) for s, t in groups]
    for s, t in groups:
        if len(s) == len(t):
            m[s, t] = 1
        elif s and t:
            m[np.ix_(s, t)] = 1 / len(t)
    m[a - 1, b - 1] = 1                                               # the end of the text
    first = max(a, b)
    m[range(first, length), range(first, length)] = 1
    if first < length:
        m[a:first, first] = 1   # padding of the source where the target has words
        m[first, b:first + 1] = 1 / (first + 1 - b)                   # and the other way round
    ends = [b - 1, *(m.sum(0) == 0).nonzero()[0]]
    m[a - 1, ends] = 1 / len(ends)
    m[m.sum(1) == 0, b - 1] = 1
    return torch.from_numpy(m)


def refinement(source: Tokens, target: Tokens, length: int) -> tuple[Tensor, Tensor]:
    """Alignment A of the paper (section 3.2): A(j) is the source token of target token j, or None.
    -> mapper (length,) long with A(j) (0 where None), a (length,) float64: 1 where A(j) is not None.
    The ends of the two texts belong together, and so does the padding that stands in the same place in both
    (the embedding of padding depends on its place); padding where the source has words has no counterpart.
    """
    x, y = _cut(source, length), _cut(target, length)
    mapper, a = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.float64)
    for j, i in enumerate(_global_alignment(x[:-1], y[:-1])):
        if i is not None:
            mapper[j], a[j] = i, 1
    mapper[len(y) - 1], a[len(y) - 1] = len(x) - 1, 1
    both = slice(max(len(x), len(y)), length)
    mapper[both], a[both] = torch.arange(length)[both], 1
    return mapper, a


def _global_alignment(x: Sequence[Any], y: Sequence[Any], mismatch: int = -1) -> list[int | None]:
    """Needleman-Wunsch: match 1, `mismatch`, gap 0. For each element of y its partner in x, or None. Ties are
    broken as in google/prompt-to-prompt (mismatch: -1): skip an element of y, then one of x, then pair."""
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            pair = score[i - 1][j - 1] + (1 if x[i - 1] == y[j - 1] else mismatch)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], pair)
    partner: list[int | None] = [None] * len(y)
    i, j = len(x), len(y)
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            partner[j] = i
    return partner


# -------------------------------------------------------- as google/prompt-to-prompt does it, faults included

def official_replacement(source: Tokens, target: Tokens, length: int) -> Tensor:
    """The official mapper: after the last swapped word token j reads token j, whatever was shifted."""
    pairs = paired_words(source, target)
    swapped = [(s, t) for (u, s), (v, t) in pairs if u != v and max(*s, *t) < length]
    m = torch.zeros(length, length, dtype=torch.float64)
    i = j = 0
    for s, t in swapped:
        while i < s[0]:
            m[i, j] = 1
            i, j = i + 1, j + 1
        if len(s) == len(t):
            m[s, t] = 1
        else:
            m[torch.tensor(s)[:, None], torch.tensor(t)] = 1 / len(t)
        i, j = i + len(s), j + len(t)
    for k in range(j, length - max(0, i - j)):
        m[k, k] = 1
    return m


def official_refinement(source: Tokens, target: Tokens, length: int) -> tuple[Tensor, Tensor]:
    """The official mapper: the ends take part in the alignment, padding j reads position j of the source."""
    x, y = _cut(source, length), _cut(target, length)
    mapper, a = torch.arange(length), torch.ones(length, dtype=torch.float64)
    for j, i in enumerate(_global_alignment(x, y)):
        mapper[j], a[j] = (0, 0) if i is None else (i, 1)
    return mapper, a

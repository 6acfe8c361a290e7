"""What an edit says of single words: their columns, and which of two names counts where both name one."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from p2p import align
from p2p.blend import LocalBlend, listed
from p2p.errors import UsageError
from p2p.models.text import Tokens

T = TypeVar("T")


def read_words(prompt: Tokens, length: int) -> list[str]:
    """The words of a prompt, as far as the text tower reads it."""
    return [name for name, columns in align.named_words(prompt) if columns and max(columns) < length - 1]


def by_breadth(said: Mapping[str, T], prompt: Tokens, length: int) -> list[tuple[list[int], str, T]]:
    """(columns, word, value) of each word of a prompt, those of the most columns first: what is said of
    "dog#1" counts beside what is said of "dog". Raises UsageError where two names of the same columns have
    different values."""
    found = [(align.word_tokens(prompt, word, length), word, value) for word, value in said.items()]
    found.sort(key=lambda each: (-len(each[0]), each[0]))
    for i, (columns, word, value) in enumerate(found):
        for others, other, another in found[i + 1:]:
            if columns == others and value != another:
                raise UsageError(f'"{word}" and "{other}" are the same word of "{prompt.text}", with {value} '
                                 f"and {another}: name it once")
            if value != another and set(columns) & set(others) and not set(others) <= set(columns):
                raise UsageError(f'"{word}" and "{other}" share a word of "{prompt.text}", and each has '
                                 f"another, with {value} and {another}: name each by itself, as dog#1")
    return found


def check_swaps(swap: Mapping[str, str], target: Tokens, length: int) -> None:
    """Raises UsageError where two words are to give one word its place."""
    taken: dict[int, str] = {}
    for old, new in swap.items():
        columns = align.word_tokens(target, new, length)
        if other := next((taken[i] for i in columns if i in taken), None):
            raise UsageError(f'swap: "{new}" of "{target.text}" takes the place of "{other}" and of "{old}": '
                             "name one of them")
        taken |= dict.fromkeys(columns, old)


def check_blend(blend: LocalBlend | None, source: Tokens, target: Tokens, length: int) -> None:
    """Raises UsageError for words of a local blend that the prompts lack. source: what its row is told."""
    if blend is None:
        return
    for pair in filter(None, (blend.words, blend.substruct, blend.rivals)):
        for prompt, words in zip((source, target), pair):
            for word in listed(words):
                align.word_tokens(prompt, word, length)

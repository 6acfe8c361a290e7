"""What an edit says of single words: their columns, and which of two names counts where both name one."""
from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

from p2p import align
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
    for (columns, word, value), (others, other, another) in pairwise(found):
        if columns == others and value != another:
            raise UsageError(f'"{word}" and "{other}" are the same word of "{prompt.text}", with {value} and '
                             f"{another}: name it once")
    return found

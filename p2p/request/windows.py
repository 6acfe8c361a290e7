"""The default windows of an edit, by what it does to the words of the prompt.

Where a thing is to appear, the source's attention leaves no room for it: the windows are short. Where a place
is swapped, the attention of its words draws the old one: their windows are short, those of all others keep
the picture. Chosen by `benchmarks.windows`, on edits of the bundled model. Windows that are given win.
"""
from __future__ import annotations

import re
from typing import NamedTuple

from p2p import align
from p2p.models.text import Tokens

# Words with which a phrase brings a thing: "and a hat", "with two dogs", "next to trees".
BRINGS = frozenset(
    "a an another one two three four five six several some many and with plus next beside wearing "
    "holding".split())
PLACES = frozenset("in inside into on onto at under near by".split())   # words before a place: "in the snow"
CROSS, SELF, SHORT = 0.8, 0.4, 0.4


class Windows(NamedTuple):
    """Shares of the steps with the source's cross- and self-attention."""

    does: str                          # what the edit does, as notes say it
    cross: float | dict[str, float] = CROSS
    self_: float = SELF


SWAPS = Windows("it swaps words")
WEIGHS = Windows("it weighs words")
DESCRIBES = Windows("it adds or removes words")
ADDS = Windows("it adds a thing", SHORT, SHORT)


def usual(source: Tokens, target: Tokens, mode: str, length: int) -> Windows:
    """The default windows of an edit in this mode. length: how many tokens the text tower reads.

    A thing is added where the target holds more articles, numbers and joining words (`BRINGS`) than the
    source; those of a first phrase that ends in "of" are left aside: "a sketch of" is a style. A place is
    swapped where a swapped word is one of `PLACES`, or stands at most two words behind one.
    """
    if mode == "replace" and (names := _swapped_place(source, target, length)):
        return Windows("it swaps a place", {"default_": CROSS, **dict.fromkeys(names, SHORT)})
    if mode != "refine":
        return SWAPS if mode == "replace" else WEIGHS
    return ADDS if _brought(target) > _brought(source) else DESCRIBES


def _swapped_place(source: Tokens, target: Tokens, length: int) -> list[str]:
    """The words of a place that stand where the source has others."""
    ours, theirs = ([word for word, _ in align.words(prompt)] for prompt in (source, target))
    return [name for k, (name, columns) in enumerate(align.named_words(target)) if k < len(ours)
            and ours[k] != theirs[k] and PLACES.intersection(theirs[max(0, k - 2):k + 1])
            and columns and columns[-1] < length - 1]


def _brought(prompt: Tokens) -> int:
    """The number of words that bring a thing, those of a first phrase "a sketch of" aside."""
    words = re.findall(r"[\w'-]+", prompt.text)
    of = words.index("of") if "of" in words else 0
    style = not BRINGS.intersection(words[1:of]) - {"and"}   # "a black and white photo of"
    return sum(word in BRINGS for word in words[of if style else 0:])

"""The default windows of an edit, by what it does to the words of the prompt.

Where a thing is to appear, the source's attention leaves no room for it: the windows are short.
Chosen by `benchmarks.windows`, on held-out edits of the bundled model. Windows that are given win.
"""
from __future__ import annotations

import re
from typing import NamedTuple

from p2p.models.text import Tokens

# Words with which a phrase brings a thing: "and a hat", "with two dogs", "next to trees".
BRINGS = frozenset(
    "a an another one two three four five six several some many and with plus next beside wearing "
    "holding".split())


class Windows(NamedTuple):
    """Shares of the steps with the source's cross- and self-attention."""

    does: str       # what the edit does, as notes say it
    cross: float
    self_: float


SWAPS = Windows("it swaps words", 0.8, 0.4)
WEIGHS = Windows("it weighs words", 0.8, 0.4)
DESCRIBES = Windows("it adds or removes words", 0.8, 0.4)
ADDS = Windows("it adds a thing", 0.4, 0.4)


def usual(source: Tokens, target: Tokens, mode: str) -> Windows:
    """The default windows of an edit in this mode.

    A thing is added where the target holds more articles, numbers and joining words (`BRINGS`) than the
    source; those of a first phrase that ends in "of" are left aside: "a sketch of" is a style.
    """
    if mode != "refine":
        return SWAPS if mode == "replace" else WEIGHS
    return ADDS if _brought(target) > _brought(source) else DESCRIBES


def _brought(prompt: Tokens) -> int:
    """The number of words that bring a thing, those of a first phrase "a sketch of" aside."""
    words = re.findall(r"[\w'-]+", prompt.text)
    of = words.index("of") if "of" in words else 0
    style = not BRINGS.intersection(words[1:of]) - {"and"}   # "a black and white photo of"
    return sum(word in BRINGS for word in words[of if style else 0:])

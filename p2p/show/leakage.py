"""How much of a picture changed outside of what the edit was about (the observation at the end of the paper's
section 4)."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from p2p.errors import UsageError
from p2p.image import from_pil
from p2p.request.checks import whole
from p2p.run import Result
from p2p.scope import subject

NOTICED = 16 / 255   # a larger change of any colour is visible


class Leakage(NamedTuple):
    """Leakage of one target, against the source."""

    about: list[str]             # the words of both prompts that the edit is about
    outside: float               # share of the pixels outside of their regions that changed visibly
    by_word: dict[str, float]    # the same share within the region of every other word of the source


def region(values: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """A word's map (h, w) -> where it is above a share of its maximum, grown by one cell.  -> (H, W) bool"""
    grown = F.max_pool2d(values[None, None], 3, 1, 1)
    return F.interpolate(grown, size=size, mode="bilinear")[0, 0] > threshold * values.max()


def mapped(result: Result) -> bool:
    """Whether maps of text were recorded, and not of pixels alone."""
    return result.maps is not None and bool(result.maps.sides())


def own_words(result: Result) -> bool:
    """Whether the source's row was told its own prompt: an editor may tell it another."""
    return (result.settings["editor"] or {}).get("source_prompt") is None


def leakage(result: Result, target: int = 1, threshold: float = 0.5) -> Leakage:
    """Measures row `target` of an edit that recorded maps of text (`record=Record(text=...)`).
    Raises UsageError."""
    if not mapped(result):
        raise UsageError("leakage needs attention maps: run the edit with record=p2p.Record(text=...)")
    if not own_words(result):
        raise UsageError("leakage compares the words of both prompts, and the editor gave the source's row "
                         "another one than its own; leave source_prompt out")
    edit = result.edits[whole("target", target, most=len(result.images) - 1) - 1]
    prompts = result.maps.prompts[0], result.maps.prompts[target]
    old, new = subject(*prompts, edit, edit.mode, result.maps.length)
    source, edited = (from_pil(result.images[i])[0] for i in (0, target))
    size = tuple(source.shape[1:])
    noticed = ((source - edited).abs().amax(0) / 2) > NOTICED                    # (H, W)
    before, after = (dict(result.maps.each_word(row)) for row in (0, target))
    subject_region = torch.zeros(size, dtype=torch.bool)
    for values in [*(before[w] for w in old if w in before), *(after[w] for w in new if w in after)]:
        subject_region |= region(values, size, threshold)
    other_regions = {word: region(values, size, threshold) & ~subject_region
                     for word, values in before.items() if word not in old}
    outside = noticed[~subject_region].float().mean().item() if (~subject_region).any() else 0.0
    by_word = {word: noticed[where].float().mean().item()
               for word, where in other_regions.items() if where.any()}
    return Leakage([*old, *(w for w in new if w not in old)], outside, by_word)

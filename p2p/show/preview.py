"""An edit at a glance: its pictures, and for local edits where they may change."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from p2p.run import Result
from p2p.show.pictures import grid

STEPS = 10   # of a preview: they divide 1000, so that its first is at the noise


def shortened(settings: Mapping[str, Any], steps: int, to: int = STEPS) -> dict[str, int]:
    """Those settings of an inversion that count steps, as large a share of `to` steps as of `steps`."""
    return {name: settings[name] * to // steps for name in ("skip", "n_min")
            if settings.get(name) is not None}


def local_mask(result: Result, target: int) -> Tensor | None:
    """Where a target, from 1, may differ from the source, (H, W) bool; None: everywhere."""
    mask = None if result.masks is None else result.masks[target - 1, 0]
    return None if mask is None or mask.all() else mask


def preview(result: Result) -> Image.Image:
    """The pictures of an edit in a row, then for each local edit its picture again, dark where it may not
    change."""
    pictures, captions = list(result.images), result.captions()
    for k, image in enumerate(result.images[1:], 1):
        if (mask := local_mask(result, k)) is not None:
            shape = Image.fromarray(mask.numpy()).resize(image.size, Image.NEAREST)
            pictures.append(Image.composite(image, image.point(lambda v: v // 4), shape))
            captions.append(f"{captions[k]} (where it may change)")
    return grid(pictures, captions)


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures below one another."""
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for k, row in enumerate(rows):
        sheet.paste(row, (0, sum(r.height for r in rows[:k])))
    return sheet

"""An edit at a glance: its pictures, and for local edits where they may change."""
from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from p2p.run import Result
from p2p.show.pictures import grid

STEPS = 10   # of a preview: they divide 1000, so that its first is at the noise


def preview(result: Result) -> Image.Image:
    """The pictures of an edit in a row, then for each local edit its picture again, dark where it may not
    change."""
    pictures, captions = list(result.images), result.captions()
    for k, image in enumerate(result.images[1:]):
        if result.masks is not None and not result.masks[k].all():
            mask = Image.fromarray(result.masks[k, 0].byte().mul(255).numpy())
            mask = mask.resize(image.size, Image.NEAREST)
            pictures.append(Image.composite(image, image.point(lambda v: v // 4), mask))
            captions.append(f"{captions[k + 1]} (where it may change)")
    return grid(pictures, captions)


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures below one another."""
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for k, row in enumerate(rows):
        sheet.paste(row, (0, sum(r.height for r in rows[:k])))
    return sheet

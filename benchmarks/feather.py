"""Local blends with hard and with feathered edges, against the true edited pictures of the emoji world: `benchmarks.quality
--only feather`."""
from __future__ import annotations

import torch
from torch import Tensor

import p2p
from benchmarks.paired import may_change, pairs
from benchmarks.quality import mean_ci, psnr
from p2p.image import from_pil, to_pil
from p2p.weights.emoji.world import OBJECTS, caption, render

WIDTHS = (0.0, 1.0, 2.0, 4.0, 8.0)   # of the feather, in latents
KINDS = ("swap", "colour", "added", "removed")   # what is edited in one region


def words(kind: str, source, target) -> tuple[list[str], list[str]]:
    """The things that an edit of one scene is about, in both prompts."""
    names, j = list(OBJECTS), int(kind in ("added", "removed"))
    old, new = (int(scene.thing[0, j]) for scene in (source, target))
    return [names[old]] * (old >= 0), [names[new]] * (new >= 0)


def measure(model: p2p.Model, n: int, steps: int, widths: tuple[float, ...] = WIDTHS) -> dict:
    """Of n edits of real pictures, as many of each kind: see `figures`."""
    each = -(-n // len(KINDS))
    scenes = {kind: pairs(kind, each) for kind in KINDS}
    edits = [(kind, *(scene[[i]] for scene in scenes[kind])) for i in range(each) for kind in KINDS][:n]
    return figures(torch.stack([blended(model, *edit, k, steps, widths) for k, edit in enumerate(edits)]), widths)


def blended(model: p2p.Model, kind: str, source, target, seed: int, steps: int, widths: tuple[float, ...]) -> Tensor:
    """One edit under every width.  -> (4, widths) float64, the figures' rows"""
    (before, mask_a), (truth, mask_b) = render(source), render(target)
    picture, truth = (from_pil(to_pil(v)[0]) for v in (before, truth))     # as a file would hold them
    inverted = p2p.invert(model, to_pil(picture)[0], caption(source)[0], steps=steps, seed=seed)
    blends = [p2p.LocalBlend(words=words(kind, source, target), feather=width) for width in widths]
    r = p2p.edit(model, inverted, [p2p.Edit(caption(target)[0], local_blend=b) for b in blends])
    made = torch.cat([from_pil(image) for image in r.images])
    change = (made[1:] - made[:1]).abs().amax(1) * 127.5
    beyond = (change * ~r.masks[:, 0]).amax((1, 2))
    whole, there = psnr(made[1:], truth), psnr(made[1:], truth, may_change(kind, mask_a, mask_b))
    return torch.stack([whole, whole - whole[0], there - there[0], beyond]).double()


def figures(rows: Tensor, widths: tuple[float, ...]) -> dict:
    """PSNR to the true edited picture by the feather's width; the gain over a hard edge, there and where the edit may act; the
    largest change beyond mask and feather, in 1/255."""
    out = {}
    for j, width in enumerate(widths):
        out[f"PSNR to the truth, feather {width:g}"] = mean_ci(rows[:, 0, j])
        if j:
            out[f"... gain, feather {width:g}"] = mean_ci(rows[:, 1, j])
            out[f"... gain inside, feather {width:g}"] = mean_ci(rows[:, 2, j])
        out[f"... change beyond, feather {width:g}"] = rows[:, 3, j].max().item()
    return out

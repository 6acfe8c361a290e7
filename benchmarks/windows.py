"""Which windows each kind of edit wants: edits of the bundled model, read by the recogniser.

    python -m benchmarks.windows [--n 100] [--steps 20] [--kinds swap,added,...] [--windows default,0.8/0.4,0.8/0.4@up] [--first 0]

`p2p.request.windows` was chosen by its table: the widest windows (what is injected keeps the picture) whose new content is found.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import p2p
from benchmarks.paired import KINDS, pairs, right
from benchmarks.quality import mean_ci, psnr_outside, shown
from p2p.cli.values import layers
from p2p.weights.emoji import recogniser
from p2p.weights.emoji.recogniser import Reading, iou
from p2p.weights.emoji.world import Scene, caption

FIGURES = ("new content", "kept", "overlap of the box", "PSNR outside")


def windows(text: str) -> dict[str, Any]:
    """CROSS/SELF, or "default", and @LAYERS that limit the injection to some layers, joined by +."""
    text, _, where = text.partition("@")
    limits = {"layers": layers(where)} if where else {}
    if text == "default":
        return limits
    cross, self_ = map(float, text.split("/"))
    return dict(cross_replace_steps=cross, self_replace_steps=self_) | limits


def figures(kind: str, a: Scene, b: Scene, pictures: Tensor, seen: Reading) -> Tensor:
    """Of one source and W edits, pictures (1 + W, 3, 64, 64).  -> (W, 4); PSNR nan where an edit may change everything"""
    edits = range(1, len(pictures))
    one = [Reading(*(field[[i]] for field in seen)) for i in edits]
    found = torch.tensor([right(kind, a, b, reading) for reading in one], dtype=torch.float32)              # (W, 2)
    old, new = int(a.thing[0, 0]), int(b.thing[0, 0])
    overlap = iou(seen.box[1:, new], seen.box[:1, old].expand(len(edits), -1))
    # what may change: the objects that differ, in either picture
    j = 1 if kind in ("added", "removed") else 0
    changed = {int(scene.thing[0, j]) for scene in (a, b)} - {-1}
    cells = torch.stack([seen.cells == thing for thing in changed]).any(0)
    psnr = psnr_outside(pictures[1:], pictures[:1], cells[1:] | cells[:1])
    if kind in ("place", "style"):
        psnr = torch.full_like(psnr, float("nan"))
    return torch.cat([found, overlap[:, None], psnr[:, None]], dim=1)


def measure(model: p2p.Model, kind: str, asked: Sequence[str], n: int, steps: int, first: int = 0) -> Tensor:
    """-> (n, W, 4): `FIGURES` of edits first, first + 1, ..."""
    eye, rows = recogniser.load(), []
    source, target = pairs(kind, first + n)
    for i in range(first, first + n):
        a, b = source[[i]], target[[i]]
        edits = [p2p.Edit(caption(b)[0], **windows(each)) for each in asked]
        pictures = shown(p2p.edit(model, caption(a)[0], edits, steps=steps, seed=i))
        rows.append(figures(kind, a, b, pictures, eye.read(pictures)))
    return torch.stack(rows)


def row(kind: str, name: str, values: Tensor) -> str:
    """Of a table: means of (n, 4) values, and their intervals."""
    cells = [mean_ci(values[:, f]) for f in range(len(FIGURES))]
    return f"| {kind} | {name} | " + " | ".join("" if m != m else f"{m:.3g} ± {c:.2g}" for m, c in cells) + " |"


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.windows", description=__doc__.splitlines()[0])
    ap.add_argument("--n", type=int, default=100, help="edits of each kind")
    ap.add_argument("--first", type=int, default=0, metavar="I", help="leave out the I before: others than windows were chosen by")
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--kinds", default=",".join(KINDS))
    ap.add_argument("--windows", default="default", help="CROSS/SELF,... or default, each with @LAYERS (as --layers, joined by +)")
    ap.add_argument("--model", default="emoji")
    a = ap.parse_args(argv)
    model, asked = p2p.load(a.model), a.windows.split(",")
    print(f"| kind | cross / self | {' | '.join(FIGURES)} |\n{'|---' * (2 + len(FIGURES))}|")
    for kind in a.kinds.split(","):
        started = time.time()
        t = measure(model, kind, asked, a.n, a.steps, a.first)
        for k, each in enumerate(asked):
            print(row(kind, each, t[:, k]), flush=True)
        for k, each in enumerate(asked[1:], 1):   # of the same pictures
            print(row(kind, f"{each}, less {asked[0]}", t[:, k] - t[:, 0]), flush=True)
        print(f"<!-- {kind}: {time.time() - started:.0f} s -->", flush=True)


if __name__ == "__main__":
    main()

"""Editing real pictures, with ground truth: the emoji world renders the source, the masks and the true edited picture.

    python -m benchmarks.paired [FOLDER] [--n 50] [--steps 50] [--methods direct,ddim,...] [--kinds swap,colour,...]

Every method and kind of edit runs in a process of its own (its peak memory is then its own); one that fails is a row that says
why. Writes a file a method after each kind, so that a run that was stopped goes on where it was and several may share a folder
(what other weights left there is measured again); then, of all that are there, paired.json and paired.md: a row a method, its
figures over all kinds, a table for each.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import p2p
from benchmarks.quality import ONE, TWO, first, other, other_place, other_thing, psnr
from p2p.image import from_pil, to_pil
from p2p.lists.lines import write
from p2p.request.inverting import settings_read
from p2p.weights.emoji import recogniser
from p2p.weights.emoji.world import COLOURS, STYLES, Mix, Scene, caption, edited, held_out, novel, render, sample

ALONE = dict(cross_replace_steps=0.0, self_replace_steps=0.0)   # of Prompt-to-Prompt's injection
# How each is inverted, and what else invert (skip: a share of the steps) and edit are told.
METHODS: dict[str, tuple[str, dict, dict]] = {
    "noise": ("noise", dict(skip=0.4), {}), "ddim": ("ddim", {}, {}), "fixed-point": ("fixed-point", {}, {}),
    "belm": ("belm", {}, {}), "negative-prompt": ("negative-prompt", {}, {}),
    "negative-prompt, proximal": ("negative-prompt", {}, dict(proximal=("l0", 0.7))), "null-text": ("null-text", {}, {}),
    "direct": ("direct", {}, {}), "edit-friendly": ("edit-friendly", {}, {}),
    "direct, MasaCtrl": ("direct", {}, dict(editor=p2p.MasaCtrl())),
    "direct, Plug-and-Play": ("direct", {}, dict(editor=p2p.PlugAndPlay())),
    # of flows; as published they inject nothing, or nothing that is Prompt-to-Prompt's ("alone")
    **{name: (name, {}, {}) for name in ("uni-inv", "rf-solver", "fireflow", "rf-inversion", "flow-edit", "ddcm", "turbo-edit")},
    **{f"{name}, alone": (name, {}, ALONE) for name in ("rf-solver", "fireflow", "rf-inversion", "flow-edit", "ddcm")},
    "uni-inv, Uni-Edit": ("uni-inv", dict(skip=0.4), dict(editor=p2p.UniEdit())),
}
FIGURES = {
    "reconstruction": "PSNR of the reconstructed source, dB", "outside": "PSNR outside the mask against the source, dB",
    "SSIM outside": "SSIM there", "new": "share with the new content, as the recogniser reads it",
    "kept": "share with what should stay", "truth": "PSNR against the true edited picture, dB",
    "rows": "UNet rows, inversion and edit", "seconds": "of both",
}


KINDS: dict[str, tuple[Mix, Callable[[Scene, torch.Generator], Scene]]] = {
    "swap": (ONE, other_thing),
    "colour": (ONE, lambda s, g: first(s, "colour", other(s.colour[:, 0], len(COLOURS), g))),
    "place": (ONE, other_place),
    "style": (ONE, lambda s, g: edited(s, style=1 + torch.randint(len(STYLES) - 1, (len(s),), generator=g))),
    "added": (TWO, lambda s, g: s), "removed": (TWO, lambda s, g: s),   # the second object, see `pairs`
}


def pairs(kind: str, n: int) -> tuple[Scene, Scene]:
    """n scenes and their edits; the source's caption was never trained, nor the target's of a swap."""
    mix, change = KINDS[kind]
    found, g = [], torch.Generator().manual_seed(list(KINDS).index(kind))
    while sum(len(a) for a, _ in found) < n:
        a = sample(400, g, None, mix)
        b = change(a, g)
        if kind in ("added", "removed"):
            alone = edited(a, thing=torch.stack([a.thing[:, 0], torch.full_like(a.thing[:, 1], -1)], dim=1),
                           colour=torch.stack([a.colour[:, 0], torch.full_like(a.colour[:, 1], -1)], dim=1))
            a, b = (alone, a) if kind == "added" else (a, alone)
        differs = torch.tensor([x != y for x, y in zip(caption(a), caption(b))])
        distinct = (b.thing[:, 0] != b.thing[:, 1]) & (a.thing[:, 0] != a.thing[:, 1])
        keep = differs & distinct & ~novel(a) & ~novel(b) & held_out(a) & (held_out(b) | (kind != "swap"))
        keep &= (kind != "colour") | (a.colour[:, 0] >= 0)
        found.append((a[keep], b[keep]))
    return Scene.cat([a for a, _ in found])[:n], Scene.cat([b for _, b in found])[:n]


def may_change(kind: str, a: Tensor, b: Tensor) -> Tensor | None:
    """Where the edit may act, from both scenes' object masks (1, 2, 64, 64).  -> (64, 64) bool; None: everywhere but ..."""
    grow = lambda m: F.max_pool2d(m[None, None], 9, 1, 4)[0, 0] > 0.1  # noqa: E731   the shadow too
    if kind in ("swap", "colour"):
        return grow(a[0, 0]) | grow(b[0, 0])
    if kind in ("added", "removed"):
        return grow(a[0, 1]) | grow(b[0, 1])
    return ~(a[0, 0] > 0.9) if kind == "place" else None   # a new place may change all but the object; a style everything


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Wang et al. 2004, on brightness, Gaussian window of 11 (sigma 1.5).  (1, 3, H, W) in [-1, 1] -> (H, W)"""
    x = torch.arange(11.0) - 5
    window = (-x.square() / (2 * 1.5**2)).exp()
    window = (window[:, None] * window / window.sum() ** 2)[None, None]
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    a, b = (((v + 1) / 2 * weights).sum(1, keepdim=True) for v in (a, b))

    def mean(v: Tensor) -> Tensor:
        return F.conv2d(F.pad(v, [5] * 4, mode="reflect"), window)

    ma, mb = mean(a), mean(b)
    va, vb, ab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return ((2 * ma * mb + 0.01**2) * (2 * ab + 0.03**2) / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2)))[0, 0]


def right(kind: str, a: Scene, b: Scene, seen: recogniser.Reading) -> tuple[bool, bool]:
    """Of one edited picture: is the new content there, and is all else that its caption names?"""
    def found(scene: Scene, j: int) -> bool:
        return bool(seen.found[0, int(scene.thing[0, j])])

    def colour(scene: Scene, j: int) -> bool:
        thing, named = int(scene.thing[0, j]), int(scene.colour[0, j])
        return named < 0 or int(seen.colour[0, thing]) == named

    place, style = bool(seen.place[0] == b.place[0]), bool(seen.style[0] == b.style[0])
    thing = found(b, 0) and colour(b, 0)
    return {"swap": (found(b, 0), colour(b, 0) and place and style), "colour": (thing, found(b, 0) and place and style),
            "place": (place, thing and style), "style": (style, thing and place),
            "added": (found(b, 1) and colour(b, 1), thing and place and style),
            "removed": (not found(a, 1), thing and place and style)}[kind]


def measure(method: str, kinds: list[str], n: int, steps: int, model: p2p.Model) -> dict:
    """All figures of one method: {kind: {figure: mean}}, and the process's peak memory."""
    name, inverting, editing = METHODS[method]
    eye = recogniser.load()
    inverting = {k: int(v * steps) if k == "skip" else v for k, v in inverting.items()}
    out = {}
    for kind in kinds:
        source, target = pairs(kind, n)
        rows = []
        for i in range(n):
            a, b = source[[i]], target[[i]]
            (before, mask_a), (truth, mask_b) = render(a), render(b)
            picture, truth = (from_pil(to_pil(v)[0]) for v in (before, truth))     # as a file would hold them
            started = time.perf_counter()
            inverted = p2p.invert(model, to_pil(picture)[0], caption(a)[0], method=name, steps=steps,
                                  **settings_read(name, {"seed": i}), **inverting)
            windows = {} if "editor" in editing else {"cross_replace_steps": 0.6}
            r = p2p.edit(model, inverted, caption(b)[0], **windows | editing)
            seconds = time.perf_counter() - started
            again, made = (from_pil(image) for image in r.images)
            change = may_change(kind, mask_a, mask_b)
            outside = None if change is None else ~change
            new, kept = right(kind, a, b, eye.read(made))
            rows.append([psnr(again, picture).item(), float("nan") if outside is None else psnr(made, picture, outside).item(),
                         float("nan") if outside is None else ssim(made, picture)[outside].mean().item(), float(new), float(kept),
                         psnr(made, truth).item(), inverted.rows + r.rows, seconds])
        t = torch.tensor(rows, dtype=torch.float64)
        out[kind] = {k: None if t[:, j].isnan().all() else round(t[:, j].nanmean().item(), 3) for j, k in enumerate(FIGURES)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"kinds": out, "peak MB": round(peak / 2**20)}


def table(results: dict[str, dict], kind: str | None) -> str:
    """Markdown; kind None: the mean over all kinds, of a method that has them all."""
    lines = ["| method | " + " | ".join(FIGURES) + " | peak MB |", "|---" * (len(FIGURES) + 2) + "|"]
    kinds = {k for r in results.values() for k in r.get("kinds", {})}
    for method, r in results.items():
        if kind is None and "failed" not in r and (lacks := kinds - r["kinds"].keys()):
            lines.append(f"| {method} | without {', '.join(sorted(lacks))} |" + " |" * len(FIGURES))
            continue
        if "failed" in r:
            lines.append(f"| {method} | failed: {r['failed']} |" + " |" * len(FIGURES))
            continue
        cells = []
        for figure in FIGURES:
            values = [v[figure] for k, v in r["kinds"].items() if kind in (None, k) and v[figure] is not None]
            cells.append(f"{sum(values) / len(values):.2f}" if values else "")
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {r['peak MB']} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.paired", description=__doc__.splitlines()[0])
    ap.add_argument("folder", nargs="?", type=Path, default=Path("paired"))
    ap.add_argument("--n", type=int, default=50, help="pictures of each kind")
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument("--methods", default=",".join(METHODS), help=f"separated by commas: {', '.join(METHODS)}")
    ap.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    ap.add_argument("--model", default="emoji")
    ap.add_argument("--one", help=argparse.SUPPRESS)   # a method, in this process: prints its JSON
    a = ap.parse_args(argv)
    if a.one:
        print(json.dumps(measure(a.one, a.kinds.split(","), a.n, a.steps, p2p.load(a.model))))
        return
    asked, methods = a.kinds.split(","), named(a.methods)
    for what, names, known in (("method", methods, METHODS), ("kind", asked, KINDS)):
        if unknown := [name for name in names if name not in known]:
            ap.error(f"no {what} {', '.join(unknown)}; known: {', '.join(known)}")
    a.folder.mkdir(parents=True, exist_ok=True)
    run = {"n": a.n, "steps": a.steps, "model": a.model, "sha256": p2p.load(a.model).sha256}
    for method in methods:
        for kind in asked:
            before = _done(a.folder, run).get(method, {})
            if kind in before.get("kinds", {}):
                continue
            command = [sys.executable, "-m", "benchmarks.paired", "--one", method, "--n", str(a.n), "--steps", str(a.steps),
                       "--kinds", kind, "--model", a.model]
            done = subprocess.run(command, capture_output=True, text=True)
            result = {"run": run, "kinds": before.get("kinds", {}), "peak MB": before.get("peak MB", 0)}
            if done.returncode == 0:
                new = json.loads(done.stdout.splitlines()[-1])
                result |= {"kinds": result["kinds"] | new["kinds"], "peak MB": max(result["peak MB"], new["peak MB"])}
            else:
                result["failed"] = f"{kind}: " + (done.stderr.strip().splitlines() or ["no output"])[-1]
            write(_file(a.folder, method), json.dumps(result, indent=1))
            if "failed" in result:
                break
        results = _done(a.folder, run)
        print(table({method: results[method]}, None).splitlines()[-1], flush=True)
    legend = "; ".join(f"{k}: {v}" for k, v in FIGURES.items())
    parts = [f"Means over {a.n} pictures of each kind, {a.steps} steps. {legend}.", "## All kinds", table(results, None)]
    for kind in asked:
        parts += [f"## {kind}", table(results, kind)]
    whole = {**run, "kinds": asked, "figures": FIGURES, "methods": results}
    write(a.folder / "paired.json", json.dumps(whole, indent=1))
    write(a.folder / "paired.md", "\n\n".join(parts))
    print(a.folder / "paired.md")


def named(text: str) -> list[str]:
    """The methods of a list: commas separate them, and one stands within some names."""
    parts = [part.strip() for part in text.split(",")]
    out = []
    while parts:
        n = 2 if ", ".join(parts[:2]) in METHODS else 1
        out.append(", ".join(parts[:n]))
        del parts[:n]
    return out


def _file(folder: Path, method: str) -> Path:
    return folder / f"{method.lower().replace(', ', '-')}.json"


def _done(folder: Path, run: dict) -> dict[str, dict]:
    """What runs of these settings have left in the folder; failures are tried again."""
    found = {m: json.loads(_file(folder, m).read_text(encoding="utf-8")) for m in METHODS if _file(folder, m).exists()}
    return {m: {k: v for k, v in r.items() if k != "run"} for m, r in found.items() if r["run"] == run}


if __name__ == "__main__":
    main()

"""A small benchmark in PIE-Bench's layout, rendered from the emoji world: pictures, prompts, masks of what the edit may change.

    python -m benchmarks.pie_shaped FOLDER [--n 70]
    p2p eval pie --data FOLDER --out RESULTS --methods direct,ddim
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.paired import KINDS, may_change, pairs
from p2p.image import to_pil
from p2p.lists.pie_data import runs
from p2p.show.pictures import save_png
from p2p.weights.emoji.world import OBJECTS, caption, render


def make(folder: Path, n: int) -> None:
    mapping = {}
    for k, kind in enumerate(KINDS):
        source, target = pairs(kind, -(-n // len(KINDS)))
        for i in range(len(source)):
            if len(mapping) == n:
                break
            (picture, before), (_, after) = render(source[[i]]), render(target[[i]])
            change = may_change(kind, before, after)
            edited = torch.ones(picture.shape[-2:], dtype=torch.bool) if change is None else change
            key, a, b = f"{k}{i:05}", caption(source[[i]])[0], caption(target[[i]])[0]
            path = Path(f"{k}_{kind}") / f"{key}.png"
            (folder / "annotation_images" / path).parent.mkdir(parents=True, exist_ok=True)
            save_png(folder / "annotation_images" / path, to_pil(picture)[0])
            swapped = [list(OBJECTS)[int(s.thing[i, 0])] for s in (source, target)]
            mapping[key] = {"image_path": str(path), "original_prompt": a, "editing_prompt": b, "editing_type_id": str(k),
                            "blended_word": " ".join(swapped) if kind == "swap" else "", "mask": runs(edited)}
    (folder / "mapping_file.json").write_text(json.dumps(mapping, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.pie_shaped", description=__doc__.splitlines()[0])
    ap.add_argument("folder", type=Path)
    ap.add_argument("--n", type=int, default=70)
    a = ap.parse_args(argv)
    make(a.folder, a.n)
    print(a.folder / "mapping_file.json")


if __name__ == "__main__":
    main()

"""Describes a model file, from its headers only."""
from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from p2p.weights.detect import Part
from p2p.weights.digest import together
from p2p.weights.identity import files
from p2p.weights.load import find


def report(source: str | Path, family: str | None = None, prediction: str | None = None,
           vae: str | Path | None = None, digest: bool = False, **options: Any) -> list[str]:
    """A readable description. options: of `p2p.weights.load.find`. Raises CheckpointError, which says what a
    refused file is."""
    p = find(source, family, prediction, vae, **options)
    lines = [f"{p.where}", f"family      {p.family}", f"prediction  {p.prediction} ({p.why})",
             f"size        {p.size[0]} x {p.size[1]} pixels"]
    for name, part in [("UNet", p.unet), *(("text tower", t) for t in p.text),
                       *([("autoencoder", p.vae)] if p.vae else [])]:
        lines.append(f"{name:11} {_summary(part)}")
    lines += [f"note        {note}" for note in p.notes]
    if digest:   # for a file that of `sha256sum`, for a folder one over all that decides pixels
        named = {"sha256" if name == "model" else f"{name} sha256": each
                 for name, each in files(p, vae).items()}
        lines += [f"{name:11} {together(each)}" for name, each in named.items()]
    return lines


def _summary(part: Part) -> str:
    ignored = tuple(part.prefix + k for k in part.ignored)
    names = [k for k in part.file.shapes if k.startswith(part.prefix)
             and not (ignored and k.startswith(ignored))]
    kinds = Counter(part.file.dtypes[k].lower().replace("float", "f") for k in names)
    count = sum(math.prod(part.file.shapes[k]) for k in names)
    return f"{len(names)} tensors, {count:,} parameters, {', '.join(kinds)}, {part.naming} names"

"""Describes a model file, from its headers only."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2p.models.unet import UNetConfig
from p2p.weights import embeddings, lora
from p2p.weights.detect import Part
from p2p.weights.digest import sha256, together
from p2p.weights.errors import CheckpointError
from p2p.weights.files import open_file
from p2p.weights.identity import files
from p2p.weights.load import find


def report(source: str | Path, family: str | None = None, prediction: str | None = None,
           vae: str | Path | None = None, digest: bool = False, **options: Any) -> list[str]:
    """A readable description of a model or an add-on. options: of `p2p.weights.load.find`. Raises
    CheckpointError, which says what a refused file is."""
    given = {"family": family, "prediction": prediction, "vae": vae, **options}
    if (lines := _add_on(Path(source), [name for name, value in given.items() if value])) is not None:
        return lines + ([f"sha256      {sha256(Path(source))}"] if digest else [])
    p = find(source, family, prediction, vae, **options)
    lines = [f"{p.where}", f"family      {p.family} {p.kind}".rstrip(),
             f"prediction  {p.prediction} ({p.why})", f"size        {p.size[0]} x {p.size[1]} pixels"]
    network = "UNet" if isinstance(p.unet.config, UNetConfig) else "transformer"
    for name, part in [(network, p.unet), *(("text tower", t) for t in p.text),
                       *([("T5", p.t5)] if p.t5 else []),
                       *([("autoencoder", p.vae)] if p.vae else [])]:
        lines.append(f"{name:11} {_summary(part)}")
    lines += [f"note        {note}" for note in p.notes]
    if digest:   # for a file that of `sha256sum`, for a folder one over all that decides pixels
        named = {"sha256" if name == "model" else f"{name} sha256": each
                 for name, each in files(p, vae).items()}
        lines += [f"{name:11} {together(each)}" for name, each in named.items()]
    return lines


def _add_on(path: Path, idle: Sequence[str]) -> list[str] | None:
    """Describes a file that is given beside a model; None for all others. Raises CheckpointError. idle: the
    options that were given, of which an add-on reads none."""
    try:
        file = open_file(path, inside=embeddings.A1111) if path.is_file() else None
    except (CheckpointError, OSError):
        return None   # `find` says why
    if file is None:
        return None
    is_lora = lora.holds_changes(file.shapes)
    if not is_lora and not embeddings.recognised(file):
        return None
    if idle:
        raise CheckpointError(f"{path}: an add-on, not a model, which reads no {', '.join(idle)}; leave "
                              "this out.")
    return lora.describe(path) if is_lora else embeddings.describe(path)


def _summary(part: Part) -> str:
    ignored = tuple(part.prefix + k for k in part.ignored)
    names = [k for k in part.file.shapes if k.startswith(part.prefix)
             and not (ignored and k.startswith(ignored))]
    kinds = Counter(part.file.dtypes[k].lower().replace("float", "f") for k in names)
    count = sum(math.prod(part.file.shapes[k]) for k in names)
    return f"{len(names)} tensors, {count:,} parameters, {', '.join(kinds)}, {part.naming} names"

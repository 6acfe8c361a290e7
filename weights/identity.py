"""The files that decide a model's pixels, under names that do not depend on their location."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from p2p.weights.detect import Package, Part
from p2p.weights.folder import has_config, weights_file
from p2p.weights.mmdit import T5

Files = dict[str, Path]
Place = str | Path | None


def files(package: Package, vae: Place = None, text: Place = None) -> dict[str, Files]:
    """The files of the "model" itself (a pipeline in memory has none), and of the "vae" and "text" given in
    place of its own."""
    root = package.where if package.where.is_dir() else package.where.parent
    parts = [package.unet, *package.text, *([package.vae] if package.vae and vae is None else [])]
    used = [*package.configs, *(f for part in parts for f in part.file.files)]
    if package.t5 is not None and text is None and isinstance(package.tokenizer, Path):
        used += _tower(package.tokenizer, T5[package.family])
    if package.family == "if" and text is None and package.where.is_dir():
        used += _tower(package.where, "")
    out = {} if package.pipeline else {"model": _named(root, used)}
    if vae is not None and package.vae:
        out["vae"] = _autoencoder(package.vae)
    if text is not None:
        where = Path(text)
        towers = [f for suffix in ("", "_2", "_3") for f in _tower(where, suffix)]
        out["text"] = _named(where, towers) if where.is_dir() else {where.name: where}
    return out


def _named(root: Path, paths: Iterable[Path]) -> Files:
    return {path.relative_to(root).as_posix(): path for path in paths}


def _autoencoder(part: Part) -> Files:
    """The autoencoder's files, in a diffusers folder with its config."""
    folder = part.file.path.parent
    config = [folder / "config.json"] if part.naming.startswith("own") and has_config(part.file.path) else []
    return _named(folder, [*config, *part.file.files])


def _tower(folder: Path, suffix: str) -> list[Path]:
    """The files of a text tower and its tokenizer in a folder, where they are there."""
    tower, tokenizer = folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
    words = [p for p in sorted(tokenizer.glob("*")) if p.is_file()]
    if not (tower / "config.json").exists():
        return words
    return [tower / "config.json", *weights_file(tower, []).files, *words]

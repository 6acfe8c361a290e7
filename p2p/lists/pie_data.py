"""PIE-Bench's folder: its pictures with their prompts, and its masks."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2p.errors import UsageError
from p2p.lists.protocol import Item
from p2p.weights.untrusted import brief, parse_object, read_text


def read(data: Path, limit: int | None = None, kinds: Sequence[str] | None = None) -> list[Item]:
    """Reads the items of a folder in PIE-Bench's layout: mapping_file.json, annotation_images/. kinds: only
    items of these editing types. Raises UsageError."""
    file = data / "mapping_file.json"
    try:
        mapping = parse_object(read_text(file))
        items = [_item(key, entry, data / "annotation_images") for key, entry in mapping.items()]
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file; in PIE-Bench's folder it lies beside "
                         "annotation_images/") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: not PIE-Bench's mapping ({type(error).__name__}: {error})") from None
    types = {item.kind for item in items}
    unknown = sorted(set(kinds or ()) - types)
    if unknown:
        raise UsageError(f"{file}: no picture of editing type {', '.join(unknown)}; types: "
                         f"{', '.join(sorted(types))}")
    items = [item for item in items if kinds is None or item.kind in kinds][:limit]
    if not items:
        raise UsageError(f"{file}: it names no picture")
    return items


def _item(key: str, entry: Any, pictures: Path) -> Item:
    """Raises ValueError."""
    if lost := [name for name in ("image_path", "original_prompt", "editing_prompt", "mask")
                if not isinstance(entry, dict) or name not in entry]:
        raise ValueError(f"{key}: no {', '.join(lost)}")
    source, target = (_plain(_text(key, name, entry[name])) for name in ("original_prompt", "editing_prompt"))
    return Item(_key(key), pictures / _file(key, entry["image_path"]), source, target,
                _text(key, "blended_word", entry.get("blended_word") or ""), _runs(key, entry["mask"]),
                str(entry.get("editing_type_id", "")), entry["image_path"])


def _key(key: str) -> str:
    if not key.isprintable() or not key:
        raise ValueError(f"the key {key[:60]!r} cannot be printed")
    return key


def _file(key: str, path: Any) -> str:
    if not isinstance(path, str) or not path.isprintable() or not path:
        raise ValueError(f"{key}: image_path {brief(path)} is no path")
    return path


def _plain(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "")


def _text(key: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key}: {name} {brief(value)} is no text")
    return value


def _runs(key: str, value: Any) -> list[int]:
    pairs = isinstance(value, list) and len(value) % 2 == 0
    if not pairs or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError(f"{key}: mask {brief(value)} is not start, length, ... in whole numbers from 0")
    return value


def mask(runs: Sequence[int], height: int, width: int, border: bool = True) -> Tensor:
    """Decodes a mask of edited pixels.  -> (height, width) bool

    border: the outermost pixels count as edited, as in the authors' code.
    """
    flat = torch.zeros(height * width, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2]):
        flat[start:start + length] = True
    out = flat.view(height, width)
    if border:
        out[0], out[-1], out[:, 0], out[:, -1] = True, True, True, True
    return out


def runs(edited: Tensor) -> list[int]:
    """Encodes a mask (H, W) bool for `mask`.  -> start, length, ..."""
    flat = torch.cat([torch.zeros(1), edited.flatten().float(), torch.zeros(1)]).diff()
    starts, ends = (flat == 1).nonzero()[:, 0], (flat == -1).nonzero()[:, 0]
    return torch.stack([starts, ends - starts], dim=1).flatten().tolist()

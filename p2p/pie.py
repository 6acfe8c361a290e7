"""PIE-Bench (Ju et al. 2023): its folder, its 700 edits under any inversion and editor, and its table."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from p2p.batch import work
from p2p.errors import UsageError
from p2p.image import fit, open_picture
from p2p.jobs import Job, Store, parse
from p2p.metrics import COLUMNS, CONVENTIONS, Judges, interval, measure
from p2p.model import Model
from p2p.output import write

SCALES = {"structure": 1e3, "PSNR": 1.0, "LPIPS": 1e3, "MSE": 1e4, "SSIM": 1e2, "CLIP whole": 1.0, "CLIP edited": 1.0}


class Item(NamedTuple):
    key: str
    picture: Path
    source: str              # prompts without the brackets that mark their words
    target: str
    blended: tuple[str, str] | None   # words of both in which the edit is to act
    runs: list[int]          # of edited pixels: start, length, ...; rows of the picture joined


def read(data: Path, limit: int | None = None) -> list[Item]:
    """The items of a folder in PIE-Bench's layout: mapping_file.json, annotation_images/. Raises UsageError."""
    file = data / "mapping_file.json"
    try:
        mapping = json.loads(file.read_text())
        items = []
        for key, said in list(mapping.items())[:limit]:
            words = (said.get("blended_word") or "").split()
            items.append(Item(key, data / "annotation_images" / said["image_path"], _plain(said["original_prompt"]),
                              _plain(said["editing_prompt"]), (words[0], words[1]) if len(words) == 2 else None,
                              [int(v) for v in said["mask"]]))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file; PIE-Bench's folder holds it beside annotation_images/") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: not PIE-Bench's mapping ({type(error).__name__}: {error})") from None
    if not items:
        raise UsageError(f"{file}: it names no picture")
    return items


def _plain(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "")


def mask(runs: Sequence[int], height: int, width: int, border: bool = True) -> Tensor:
    """Edited pixels (height, width) bool; border: the outermost ones count as edited, as the authors read their masks."""
    flat = torch.zeros(height * width, dtype=torch.bool)
    for start, length in zip(runs[::2], runs[1::2]):
        flat[start:start + length] = True
    out = flat.view(height, width)
    if border:
        out[0], out[-1], out[:, 0], out[:, -1] = True, True, True, True
    return out


def runs(edited: Tensor) -> list[int]:
    """(H, W) bool -> start, length, ...: what `mask` reads."""
    flat = torch.cat([torch.zeros(1), edited.flatten().float(), torch.zeros(1)]).diff()
    starts, ends = (flat == 1).nonzero()[:, 0], (flat == -1).nonzero()[:, 0]
    return torch.stack([starts, ends - starts], dim=1).flatten().tolist()


def jobs(items: Sequence[Item], model: Model, settings: Mapping[str, Any], blend: bool) -> list[Job]:
    """One edit of a picture each. blend: only where the item's words attend, the new one with twice its weight, as published."""
    out = []
    for i, item in enumerate(items, 1):
        said: dict[str, Any] = {"source": item.source, "targets": [item.target], "image": str(item.picture.absolute()), **settings}
        if blend and item.blended:
            said |= {"local_blend": {"words": list(item.blended)}}
            said |= {} if settings.get("editor") else {"equalizer": {item.blended[1]: 2.0}}   # others weigh no word
        out.append(parse(said, i, Path(), model))
    return out


@torch.no_grad()
def evaluate(model: Model, items: Sequence[Item], ways: Mapping[str, Mapping[str, Any]], out: Path, judges: Judges, *,
             blend: bool = True, progress: bool = False) -> dict[str, Any]:
    """Runs every way (its name: settings of a job, such as method) over the items, stopped and started as often as need be, and
    measures what came of it.  -> {way: {"failed": {key: why}, "official" and "corrected": {column: figures by item}}}
    """
    report: dict[str, Any] = {}
    for name, settings in ways.items():
        store, listed = Store(out / name), jobs(items, model, settings, blend)
        todo = [[job] for job in listed]
        for _ in tqdm(work(model, todo, store), total=sum(not store.done(j) for j in listed), desc=name, disable=not progress):
            pass
        store.index(listed, {job.id for job in listed})
        rows: dict[str, Any] = {"failed": {}, "official": {}, "corrected": {}}
        for item, job in zip(items, listed):
            if why := store.failed(job):
                rows["failed"][item.key] = why
                continue
            figures = _measured(item, store.root / job.id / "edit.png", judges)
            for convention, values in figures.items():
                for column, value in values.items():
                    if value is not None:
                        rows[convention].setdefault(column, []).append(value)
        report[name] = rows
    write(out / "pie.json", json.dumps(_numbers(report), indent=1))
    write(out / "pie.md", "\n\n".join(f"## {c}\n\n{table(report, c)}" for c in CONVENTIONS))
    return report


def _numbers(value: Any) -> Any:
    """As JSON can hold it: what is no finite number is null."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured(item: Item, made: Path, judges: Judges) -> dict[str, dict[str, float | None]]:
    picture, result = open_picture(item.picture), open_picture(made)
    width, height = picture.size
    size = result.size[::-1]
    pair = [torch.from_numpy(np.array(fit(p, size))).permute(2, 0, 1)[None] / 255 for p in (picture, result)]
    masks = {c: mask(item.runs, height, width, border=c == "official") for c in CONVENTIONS}
    if (height, width) != size:   # pictures of another size are fitted, and the masks with them
        bright = {c: fit(Image.fromarray(m.numpy()).convert("RGB"), size) for c, m in masks.items()}
        masks = {c: torch.from_numpy(np.array(b)[..., 0]) > 127 for c, b in bright.items()}
    return measure(*pair, masks, item.target, judges)


def table(report: Mapping[str, Any], convention: str) -> str:
    """Markdown, in the published units; corrected figures with their 95 % interval. A column without weights is absent."""
    columns = [c for c in COLUMNS if any(v is not None for rows in report.values() for v in rows[convention].get(c, []))]
    absent = [c for c in COLUMNS if c not in columns]
    factor = {c: "" if SCALES[c] == 1 else f" x {SCALES[c]:g}" for c in columns}
    head = [c + factor[c] for c in columns]
    lines = ["| method | " + " | ".join([*head, "pictures", "failed"]) + " |", "|---" * (len(columns) + 3) + "|"]
    for name, rows in report.items():
        cells = []
        for c in columns:
            found = interval(rows[convention].get(c, []))
            if found is None:
                cells.append("none")
                continue
            mean, half = found[0] * SCALES[c], found[1] * SCALES[c]
            cells.append(f"{mean:.2f}" if convention == "official" else f"{mean:.2f} ± {half:.2f} ({found[2]})")
        count = len(rows[convention].get("MSE", []))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {count} | {len(rows['failed'])} |")
    return "\n".join(lines) + (f"\n\nAbsent, for want of weights: {', '.join(absent)}." if absent else "")

"""PIE-Bench (Ju et al. 2023): its folder, its 700 edits by any method, and the figures of what came of them.

    OUT/NAME/                   a row of the table: the jobs of its items, as `jobs.Store` keeps them
    OUT/NAME/settings.json      all that decides its pictures
    OUT/NAME/pictures.json      hashes of the benchmark's pictures that it was made of
    OUT/NAME/figures.csv        what was measured
    OUT/pie.{csv,json,md}       of all rows that lie there, see `p2p.lists.pie_report`
"""
from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.image import fit, open_picture
from p2p.lists import pie_report, protocol
from p2p.lists.job import check
from p2p.lists.jobs import SHORT, Job, Store, groups, meant, parse, unread
from p2p.lists.lines import write
from p2p.lists.metrics import CONVENTIONS, NAMES, Judges, measure
from p2p.lists.protocol import Item
from p2p.lists.work import work
from p2p.model import Model
from p2p.request.inverting import DEFAULT
from p2p.weights import digest
from p2p.weights.untrusted import parse_object, read_text

PICTURES = "pictures.json"


def read(data: Path, limit: int | None = None, kinds: Sequence[str] | None = None) -> list[Item]:
    """The items of a folder in PIE-Bench's layout: mapping_file.json, annotation_images/; kinds: of these
    editing types alone. Raises UsageError."""
    file = data / "mapping_file.json"
    try:
        mapping = parse_object(read_text(file))
        items = []
        for key, said in mapping.items():
            items.append(Item(key, data / "annotation_images" / said["image_path"],
                              _plain(said["original_prompt"]), _plain(said["editing_prompt"]),
                              said.get("blended_word") or "", [int(v) for v in said["mask"]],
                              str(said.get("editing_type_id", "")), said["image_path"]))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file; in PIE-Bench's folder it lies beside annotation_images/"
                         ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: not PIE-Bench's mapping ({type(error).__name__}: {error})") from None
    if kinds is not None and (unknown := sorted(set(kinds) - {item.kind for item in items})):
        raise UsageError(f"{file}: no picture of editing type {', '.join(unknown)}; types: "
                         f"{', '.join(sorted({item.kind for item in items}))}")
    items = [item for item in items if kinds is None or item.kind in kinds][:limit]
    if not items:
        raise UsageError(f"{file}: it names no picture")
    return items


def _plain(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "")


def mask(runs: Sequence[int], height: int, width: int, border: bool = True) -> Tensor:
    """Edited pixels (height, width) bool; border: the outermost ones count as edited, as the authors
    read their masks."""
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


# -------------------------------------------------------------------------------------------- rows of a table

class Way(NamedTuple):
    """How a row's pictures come about: by jobs, or they are there."""

    said: dict[str, Any]   # recorded, and the same whenever the row goes on
    # an item's job, as a line of a list says it
    job: Callable[[Item, Model], Mapping[str, Any]] | None = None
    pictures: Path | None = None   # KEY.png, or by the names of the benchmark's pictures
    strips: bool = False   # of several panels, the last of which is judged
    jpeg: bool = False                                                # see `protocol.Method`


def method(name: str, **changed: Any) -> Way:
    """A row of the protocol, by name; changed: fields of `protocol.Method`. Raises UsageError."""
    found = replace(protocol.find(name), **changed)
    return Way({"protocol": name, **asdict(found)}, partial(protocol.job, found), jpeg=found.jpeg)


def own(settings: Mapping[str, Any]) -> Way:
    """A row of one's own: settings of every item's job. With "like": NAME they change those of that row of
    the protocol; without, nothing is blended. Raises UsageError."""
    base = protocol.find(settings["like"]) if "like" in settings else None
    own_ = {SHORT.get(k, k): v for k, v in settings.items() if k != "like"}
    if len(own_) < len(settings) - ("like" in settings):
        raise UsageError(f"{', '.join(settings)}: two names of one setting; give one")

    def job(item: Item, model: Model) -> dict[str, Any]:
        if base is None:
            return {"source": item.source, "targets": [item.target],
                    "image": str(item.picture.absolute())} | own_
        inherited = protocol.job(base, item, model)
        method, editor = (own_.get(name, inherited.get(name)) for name in ("method", "editor"))
        idle = unread(method or DEFAULT, editor)
        return {k: v for k, v in inherited.items() if k not in idle} | own_

    return Way({"own": dict(settings)}, job, jpeg=base is not None and base.jpeg)


def pictures(folder: Path, strips: bool = False) -> Way:
    """A row of pictures that another program made; strips: of PnPInversion's scripts, of whose four panels
    the last is judged."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of pictures")
    return Way({"pictures": str(folder), "strips": strips}, pictures=folder, strips=strips)


# runs jobs into a store; on return each of its jobs is done or has failed
Run = Callable[[Sequence[Job], Path], None]


@torch.no_grad()
def evaluate(model: Model, items: Sequence[Item], ways: Mapping[str, Way | Mapping[str, Any]], out: Path,
             judges: Judges, *, run: Run | None = None, data: str = "", figures: bool = True,
             progress: bool = False) -> dict[str, Any]:
    """Runs every row (its name: how, or the settings of its jobs, see `own`) over the items, stopped and
    started as often as need be, measures what came of it, and builds the tables of all rows that lie in
    `out`.  -> as pie.json has it

    run: what runs the jobs; None: this process. data: identity of the benchmark. figures: False to run the
    jobs alone. Raises UsageError where a row was made with other settings.
    """
    ways = {name: way if isinstance(way, Way) else own(way) for name, way in ways.items()}
    all_asked, all_pictures, pictures = {}, {}, _contents(items)
    for name, way in ways.items():   # all that can be refused, before anything is written
        _check(name, way, items[0], model)
        _same(out / name, way, model, data)
        all_pictures[name] = _all_pictures(out / name, pictures)
        all_asked[name] = asked = [_asked(way, item, model, i) for i, item in enumerate(items, 1)]
        if "own" in way.said and all(isinstance(job, str) for job in asked):
            raise UsageError(f"{name}: {asked[0]}")
    by = judges.identity()
    for name, way in ways.items():
        folder, asked = out / name, all_asked[name]
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "settings.json", json.dumps(_said(way, model, data), indent=1))
        write(folder / PICTURES, json.dumps(all_pictures[name], indent=1))
        if way.job is not None:
            (run or partial(_alone, model, progress))([job for job in asked if isinstance(job, Job)], folder)
        if figures:
            _judge(folder, name, way, list(zip(items, asked)), judges, by, progress)
    return pie_report.build(out) if figures else {}


def _alone(model: Model, progress: bool, jobs: Sequence[Job], folder: Path) -> None:
    store = Store(folder)
    todo = groups(jobs, 1)
    for _ in tqdm(work(model, todo, store), total=len(jobs), desc=folder.name, disable=not progress):
        pass
    store.index(jobs, {job.id for job in jobs})


def _asked(way: Way, item: Item, model: Model, line: int) -> Job | Path | str:
    """An item's job, or its picture where that was made elsewhere; or why there is none."""
    try:
        if way.job is not None:
            return meant(parse(dict(way.job(item, model)), line, Path(), model))
    except UsageError as error:
        return str(error)
    names = [f"{item.key}{suffix}" for suffix in (".png", ".jpg", ".jpeg", ".webp")]
    names += [item.path, *(str(Path(item.path).with_suffix(suffix)) for suffix in (".png", ".jpg"))]
    found = [way.pictures / name for name in names if (way.pictures / name).is_file()]
    return found[0] if found else f"{way.pictures}: holds neither {names[0]} nor {item.path}"


def _said(way: Way, model: Model, data: str) -> dict[str, Any]:
    """All that decides what a row's figures are, but for the items and the judges; as JSON gives it back."""
    said = {"way": way.said, "data": data}
    if way.job is not None:
        said["model"] = {**model.identity(), "size": model.size}
    return json.loads(json.dumps(said, default=str))


def _check(name: str, way: Way, item: Item, model: Model) -> None:
    """Raises UsageError for settings that no item can have: all is tried but words and pictures."""
    if way.job is None:
        return
    job = _asked(way, item._replace(source="the source", target="the target", blended=""), model, 1)
    try:
        if isinstance(job, str):
            raise UsageError(job)
        check(model, job._replace(targets=(Edit(job.targets[0].prompt),)), there=False)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _contents(items: Sequence[Item]) -> dict[str, str]:
    """Hashes of the benchmark's pictures, by key; of those that are there."""
    found = {}
    for item in items:
        with suppress(OSError):
            found[item.key] = digest.sha256(item.picture)[:16]
    return found


def _all_pictures(folder: Path, now: Mapping[str, str]) -> dict[str, str]:
    """Those of a row's earlier runs and of this one. Raises UsageError where one has become
    another, or is gone."""
    file = folder / PICTURES
    before = pie_report.read_json(file) if file.exists() else {}
    if not isinstance(before, dict):
        raise UsageError(f"{file}: not hashes of pictures; remove it, or give another --out")
    if other := sorted(key for key in before.keys() & now.keys() if before[key] != now[key]):
        raise UsageError(f"{folder}: this row is of other pictures of the benchmark than those that are "
                         f"there now ({', '.join(other[:5])}). Put these back to go on, or give another "
                         "--out")
    return before | now


def _same(folder: Path, way: Way, model: Model, data: str) -> None:
    """Raises UsageError where a row was made with other settings."""
    file = folder / "settings.json"
    if not file.exists():
        return
    before, now = (pie_report.flat(said) for said in (pie_report.read_json(file), _said(way, model, data)))
    differ = [f"{k} {before.get(k)!r}, now {now.get(k)!r}" for k in {**before, **now}
              if before.get(k) != now.get(k)]
    if differ:
        raise UsageError(f"{folder}: this row was made with {'; '.join(differ)}. Give the same settings to "
                         "go on, or another --out, or a row of its own name (--ways)")


# ---------------------------------------------------------------------------------------------------- figures

def _judge(folder: Path, name: str, way: Way, asked: Sequence[tuple[Item, Job | Path | str]], judges: Judges,
           by: str | None, progress: bool) -> None:
    """Writes the row's figures; what these judges (`by`) have measured already stays, and so do items that
    are not asked for."""
    store = Store(folder) if way.job is not None else None
    rows = {(row["key"], row["convention"]): row for row in pie_report.read_figures(folder)}
    try:
        for item, job in tqdm(asked, desc=f"{name}, figures", disable=not progress):
            made, result, error, seed = job, "", None, ""
            if isinstance(job, Job):
                made, result = folder / job.id / "edit.png", job.id
                seed = str(job.sampling.get("seed", ""))
                error = None if store.done(job) else store.failed(job) or "not run"
            elif isinstance(job, Path):
                result = hashlib.sha256(job.read_bytes()).hexdigest()[:16]
            else:
                error = job
            told = {"method": name, "key": item.key, "editing_type": item.kind, "seed": seed,
                    "error": error or "", "result": result, "judges": by or ""}
            known = [rows.get((item.key, c), {}) for c in CONVENTIONS]
            if not error and by is not None and all({**row, **told} == row for row in known):
                continue
            try:
                figures = {} if error else _measured(item, made, way, judges)
            except UsageError as why:      # a picture that cannot be read
                figures, told = {}, told | {"error": str(why)}
            for c in CONVENTIONS:
                rows[item.key, c] = told | {"convention": c, "figures": figures.get(c, dict.fromkeys(NAMES))}
    finally:
        pie_report.write_figures(folder, list(rows.values()))


def _measured(item: Item, made: Path, way: Way, judges: Judges) -> dict[str, dict[str, float | None]]:
    picture, result = open_picture(item.picture), open_picture(made)
    if way.strips and result.width != result.height:
        result = result.crop((result.width - result.height, 0, result.width, result.height))
    out = {}
    for convention in CONVENTIONS:
        seen = result
        if convention == "official" and way.jpeg and item.picture.suffix.lower() in (".jpg", ".jpeg"):
            seen = _stored(result)
        size = seen.size[::-1]
        pair = [torch.from_numpy(np.array(fit(p, size))).permute(2, 0, 1)[None] / 255
                for p in (picture, seen)]
        edited = mask(item.runs, picture.height, picture.width, border=convention == "official")
        if picture.size != seen.size:   # pictures of another size are fitted, and the masks with them
            bright = fit(Image.fromarray(edited.numpy()).convert("RGB"), size)
            edited = torch.from_numpy(np.array(bright)[..., 0]) > 127
        out |= measure(*pair, {convention: edited}, item.target, judges, item.source)
    return out


def _stored(image: Image.Image) -> Image.Image:
    """As a .jpg gives it back (a panel of a strip 512 high, cut where blocks of JPEG end, no
    otherwise than alone)."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG")
    return Image.open(buffer)

"""PIE-Bench (Ju et al. 2023): its 700 edits by any method, and the figures of their results.

    OUT/NAME/                   a row of the table: the jobs of its items, as `jobs.Store` keeps them
    OUT/NAME/settings.json      all that decides its pictures
    OUT/NAME/pictures.json      hashes of the benchmark's pictures that it was made of
    OUT/NAME/figures.csv        its figures
    OUT/pie.{csv,json,md}       the tables of all rows in OUT, see `p2p.lists.pie_report`
"""
from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.image import fit, open_picture
from p2p.lists import pie_report, protocol
from p2p.lists.fields import checked
from p2p.lists.job import check, groups
from p2p.lists.jobs import SHORT, Job, Store, check_targets, parse, unread
from p2p.lists.lines import write
from p2p.lists.metrics import CONVENTIONS, NAMES, Judges, measure
from p2p.lists.pie_data import mask
from p2p.lists.protocol import Item
from p2p.lists.work import work
from p2p.model import Model
from p2p.request.emphasis import as_text
from p2p.request.inverting import DEFAULT
from p2p.weights import digest
from p2p.weights.untrusted import LONGEST, brief

PICTURES = "pictures.json"


# -------------------------------------------------------------------------------------------- rows of a table

class Way(NamedTuple):
    """How a row gets its pictures: from jobs, or from a folder."""

    settings: dict[str, Any]   # recorded, and unchanged when the row is continued
    # an item's job, as a line of a list
    job: Callable[[Item, Model], Mapping[str, Any]] | None = None
    pictures: Path | None = None   # KEY.png, or by the names of the benchmark's pictures
    strips: bool = False   # of several panels, the last of which is judged
    jpeg: bool = False                                                # see `protocol.Method`


def method(name: str, **changed: Any) -> Way:
    """A row of the protocol, by name; changed: fields of `protocol.Method`. Raises UsageError."""
    row = replace(protocol.find(name), **changed)
    return Way({"protocol": name, **protocol.recorded(row)}, partial(protocol.job, row), jpeg=row.jpeg)


def custom(settings: Mapping[str, Any]) -> Way:
    """A custom row, with these settings in every item's job. With "like": NAME they change those of that row
    of the protocol; without, nothing is blended. Raises UsageError."""
    base = protocol.find(settings["like"]) if "like" in settings else None
    settings_ = {SHORT.get(k, k): v for k, v in settings.items() if k != "like"}
    if len(settings_) < len(settings) - ("like" in settings):
        raise UsageError(f"{', '.join(settings)}: two names of one setting; give one")

    if base is not None and settings_.get("steps") is not None:   # the row's skip is a share of them
        base = replace(base, steps=checked("steps", settings_["steps"]))

    def job(item: Item, model: Model) -> dict[str, Any]:
        if base is None:
            return {"source": as_text(model, item.source), "targets": [as_text(model, item.target)],
                    "image": str(item.picture.absolute())} | settings_
        inherited = protocol.job(base, item, model)
        method, editor = (settings_.get(name, inherited.get(name)) for name in ("method", "editor"))
        idle = unread(method or DEFAULT, editor)
        return {k: v for k, v in inherited.items() if k not in idle} | settings_

    return Way({"own": dict(settings)}, job, jpeg=base is not None and base.jpeg)


def pictures(folder: Path, strips: bool = False) -> Way:
    """A row of pictures that another program made. strips: each has four panels, as PnPInversion's scripts
    write them, of which the last is judged. Raises UsageError."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of pictures")
    return Way({"pictures": str(folder), "strips": strips}, pictures=folder, strips=strips)


# runs jobs into a store; on return each job is done or has failed
Run = Callable[[Sequence[Job], Path], None]


@torch.no_grad()
def evaluate(model: Model, items: Sequence[Item], ways: Mapping[str, Way | Mapping[str, Any]], out: Path,
             judges: Judges, *, run: Run | None = None, data: str = "", figures: bool = True,
             progress: bool = False) -> dict[str, Any]:
    """Runs every row over the items, measures its results, and builds the tables of all rows in `out`. A run
    that was stopped continues.  -> the content of pie.json

    ways: by the row's name, how it gets its pictures, or settings for `custom`. run: what runs the jobs;
    None: this process. data: identity of the benchmark. figures: False to run the jobs only. Raises
    UsageError where a row was made with other settings.
    """
    ways = {name: way if isinstance(way, Way) else custom(way) for name, way in ways.items()}
    all_jobs, all_pictures, pictures = {}, {}, _contents(items)
    for name, way in ways.items():   # before anything is written
        _check(name, way, items[0], model)
        _same(out / name, way, model, data)
        all_pictures[name] = _all_pictures(out / name, pictures)
        all_jobs[name] = jobs = [_job_or_picture(way, item, model, i) for i, item in enumerate(items, 1)]
        if "own" in way.settings and all(isinstance(job, str) for job in jobs):
            raise UsageError(f"{name}: {jobs[0]}")
    judge_id = judges.identity()
    for name, way in ways.items():
        folder, jobs = out / name, all_jobs[name]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from None
        write(folder / "settings.json", json.dumps(_row_settings(way, model, data), indent=1))
        write(folder / PICTURES, json.dumps(all_pictures[name], indent=1))
        if way.job is not None:
            requested = [job for job in jobs if isinstance(job, Job)]
            (run or partial(_run_here, model, progress))(requested, folder)
        if figures:
            _judge(folder, name, way, list(zip(items, jobs)), judges, judge_id, progress)
    return pie_report.build(out) if figures else {}


def _run_here(model: Model, progress: bool, jobs: Sequence[Job], folder: Path) -> None:
    store = Store(folder)
    todo = groups(jobs, 1)
    for _ in tqdm(work(model, todo, store), total=len(jobs), desc=folder.name, disable=not progress):
        pass
    store.index(jobs, {job.id for job in jobs})


def _job_or_picture(way: Way, item: Item, model: Model, line: int) -> Job | Path | str:
    """An item's job, or its picture if another program made it, or the reason why there is none."""
    try:
        if way.job is not None:
            return check_targets(parse(dict(way.job(item, model)), line, Path(), model))
    except UsageError as error:
        return str(error)
    names = [f"{item.key}{suffix}" for suffix in (".png", ".jpg", ".jpeg", ".webp")]
    names += [item.path, *(str(Path(item.path).with_suffix(suffix)) for suffix in (".png", ".jpg"))]
    files = [way.pictures / name for name in names if (way.pictures / name).is_file()]
    return files[0] if files else f"{way.pictures}: holds neither {names[0]} nor {item.path}"


def _row_settings(way: Way, model: Model, data: str) -> dict[str, Any]:
    """All that decides a row's figures beside the items and the judges, as read back from JSON."""
    settings = {"way": way.settings, "data": data}
    if way.job is not None:
        settings["model"] = {**model.identity(), "size": model.size}
    return json.loads(json.dumps(settings, default=str))


def _check(name: str, way: Way, item: Item, model: Model) -> None:
    """Raises UsageError for settings that no item can have: checks all but words and pictures."""
    if way.job is None:
        return
    plain = item._replace(source="the source", target="the target", blended="")
    if not _encodes(model, plain.source):   # of prompts that were encoded beforehand
        plain = item._replace(blended="")
    job = _job_or_picture(way, plain, model, 1)
    try:
        if isinstance(job, str):
            raise UsageError(job)
        check(model, job._replace(targets=(Edit(job.targets[0].prompt),)), picture_exists=False)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _encodes(model: Model, prompt: str) -> bool:
    try:
        return bool(model.tokens(prompt))
    except UsageError:
        return False


def _contents(items: Sequence[Item]) -> dict[str, str]:
    """Hashes of those pictures of the benchmark that exist, by key."""
    hashes = {}
    for item in items:
        with suppress(OSError):
            if item.picture.is_file():
                hashes[item.key] = digest.sha256(item.picture)[:16]
    return hashes


def _all_pictures(folder: Path, now: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a row's earlier runs and of this one. Raises UsageError where a picture has changed."""
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
    before = pie_report.flat(pie_report.read_json(file))
    now = pie_report.flat(_row_settings(way, model, data))

    def said(value: Any) -> str:
        return "not set" if value is None else brief(value)

    differ = [f"{k.removeprefix('way.')} {said(before.get(k))}, now {said(now.get(k))}"
              for k in {**before, **now} if before.get(k) != now.get(k)]
    if differ:
        raise UsageError(f"{folder}: this row was made with {'; '.join(differ)}. Give the same settings to "
                         "go on, or another --out, or a row of its own name (--ways)")


# ---------------------------------------------------------------------------------------------------- figures

def _judge(folder: Path, name: str, way: Way, jobs: Sequence[tuple[Item, Job | Path | str]], judges: Judges,
           judge_id: str | None, progress: bool) -> None:
    """Writes the row's figures. Those that the same judges have measured already are kept, as are those of
    other items, and those of this result that none of these judges measures."""
    store = Store(folder) if way.job is not None else None
    rows = {(row["key"], row["convention"]): row for row in pie_report.read_figures(folder)}
    try:
        for item, job in tqdm(jobs, desc=f"{name}, figures", disable=not progress):
            picture, result, error, seed = job, "", None, ""
            if isinstance(job, Job):
                picture, result = folder / job.id / "edit.png", job.id
                seed = str(job.sampling.get("seed", ""))
                error = None if store.done(job) else store.failed(job) or "not run"
            elif isinstance(job, Path):
                result = hashlib.sha256(job.read_bytes()).hexdigest()[:16]
            else:
                error = job
            labels = {"method": name, "key": item.key, "editing_type": item.kind, "seed": seed,
                      "error": (error or "")[:LONGEST], "result": result, "judges": judge_id or ""}
            known = [rows.get((item.key, c), {}) for c in CONVENTIONS]
            if not error and judge_id is not None and all({**row, **labels} == row for row in known):
                continue
            try:
                how = job.inverting["fit"] if isinstance(job, Job) else "crop"
                figures = {} if error else _measured(item, picture, how, way, judges)
            except (UsageError, RuntimeError, ValueError) as why:   # cannot be read, or measured
                figures, labels = {}, labels | {"error": str(why)[:LONGEST]}
            for c, row in zip(CONVENTIONS, known):
                measured = figures.get(c, dict.fromkeys(NAMES))
                if figures and row.get("result") == result:
                    measured = {k: row["figures"][k] if v is None else v for k, v in measured.items()}
                rows[item.key, c] = labels | {"convention": c, "figures": measured}
    finally:
        pie_report.write_figures(folder, list(rows.values()))


def _measured(item: Item, file: Path, how: str, way: Way, judges: Judges
              ) -> dict[str, dict[str, float | None]]:
    """how: the benchmark's picture was fitted to the model's size."""
    picture, result = open_picture(item.picture), open_picture(file)
    if way.strips and result.width != result.height:
        result = result.crop((result.width - result.height, 0, result.width, result.height))
    panels = result.width * picture.height / (result.height * picture.width)
    if way.pictures is not None and not way.strips and panels > 1.9:
        raise UsageError(f"{file}: {result.width} x {result.height} pixels look like {panels:.0f} panels of "
                         f"the benchmark's {picture.width} x {picture.height}; --strips judges the last")
    out = {}
    for convention in CONVENTIONS:
        seen = result
        if convention == "official" and way.jpeg and item.picture.suffix.lower() in (".jpg", ".jpeg"):
            seen = _stored(result)
        size = seen.size[::-1]
        pair = [torch.from_numpy(np.array(fit(p, size, how))).permute(2, 0, 1)[None] / 255
                for p in (picture, seen)]
        edited = mask(item.runs, picture.height, picture.width, border=convention == "official")
        if picture.size != seen.size:   # pictures of another size are fitted, and the masks with them
            bright = fit(Image.fromarray(edited.numpy()).convert("RGB"), size, how)
            edited = torch.from_numpy(np.array(bright)[..., 0]) > 127
        out |= measure(*pair, {convention: edited}, item.target, judges, item.source)
    return out


def _stored(image: Image.Image) -> Image.Image:
    """The picture after JPEG compression. (A panel of a strip 512 high is cut at JPEG's blocks, and so is
    compressed as it would be by itself.)"""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG")
    return Image.open(buffer)

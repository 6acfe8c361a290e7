"""A list of edits: a job is identified by its settings, and finished when its folder exists.

    OUT/ID/{source.png, edit-1.png, ..., job.json}     a finished job: it appears in one step
    OUT/failed/ID.json                                 one that failed, and why
    OUT/results.jsonl                                  a row for each line; written when a run ends
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from p2p import __version__
from p2p.edits import Edit
from p2p.edits import check as check_edit
from p2p.errors import UsageError
from p2p.lists import lines
from p2p.lists.fields import checked
from p2p.lists.job import INVERTING, OTHERS, SAMPLING, Job, check, left
from p2p.lists.lines import present, write
from p2p.model import Model
from p2p.request.editing import refuse_p2p_settings
from p2p.request.inverting import DEFAULT, KARRAS, READ_BY
from p2p.request.names import EDITING
from p2p.request.source import METHODS, REPLACE_EMPTY
from p2p.request.start import Sampling, own_sampler, solver
from p2p.run import Result
from p2p.show.pictures import names, save_png
from p2p.weights.aside import appearing, finished, sweep
from p2p.weights.untrusted import brief, parse_object, read_text

# of Prompt-to-Prompt alone
WINDOWS = tuple(name for name in EDITING if name not in ("mode", "local_blend", "scope", "emphasis"))
READERS = READ_BY | {"negative_prompt": tuple(m for m in METHODS if m not in REPLACE_EMPTY),
                     "path": ("ddim",)}
PICTURELESS = "of a picture, and there is no image"
RESULT = ("id", "notes", "rows", "seconds", "version")   # the keys of job.json besides the settings
# the command line's
SHORT = {"target": "targets", "picture": "image", "cfg": "guidance_scale", "cross": "cross_replace_steps",
         "self": "self_replace_steps", "weight": "equalizer", "inversion_cfg": "inversion_guidance"}

# settings of the model, and the command's options for them
MODEL = {name: f"--{name.replace('_', '-')}" for name in (
    "model", "family", "prediction", "vae", "text", "ema", "clip_skip", "zero_snr", "dtype", "lora",
    "embedding")} | {"embeddings": "--embedding"}


def read(file: Path, model: Model, defaults: Mapping[str, Any] | None = None,
         out: Path | None = None) -> list[Job]:
    """Reads the jobs of a list (see `lines.read`), one a line; lines with equal settings have the same
    identity. Paths of pictures are relative to the file. defaults: settings of lines that do not set them;
    INVERTING applies to pictures only. out: a folder of results, whose finished jobs are not checked again.

    Raises UsageError naming every invalid line, before anything is computed.
    """
    defaults = present(dict(defaults or {})) or {}
    for name, value in defaults.items():
        checked(name, value)
    checks = Checks(model, out)

    def job(entry: Any, number: int) -> Job:
        parsed = check_targets(parse(entry, number, file.parent, model, defaults))
        checks(parsed)
        return parsed

    example = '{"source": "a cat", "targets": ["a dog"]}'
    jobs = lines.read(file, job, f"no job in it; a job is a line such as {example}")
    if (idle := [k for k in INVERTING if k in defaults]) and all(job.image is None for job in jobs):
        raise UsageError(f"{file}: {', '.join(idle)}: of pictures, and no job of this list has one (image)")
    unread_by_job = [unread(job.inverting.get("method"), job.others.get("editor"), "sampler" in job.others,
                            defaults.get("timestep_spacing")) for job in jobs]
    if idle := [k for k in defaults if all(k in each for each in unread_by_job)]:
        raise UsageError(f"{file}: {', '.join(idle)}: no job of this list reads it (line {jobs[0].line}: "
                         f"{unread_by_job[0][idle[0]]})")
    return jobs


class Checks:
    """`check`, once for each identity that is not done."""

    def __init__(self, model: Model, out: Path | None):
        self.model, self.out, self.fine = model, out, set()

    def __call__(self, job: Job) -> None:
        """Raises UsageError."""
        if job.id in self.fine or (self.out is not None and finished(self.out / job.id / "job.json")):
            return
        try:
            check(self.model, job)
        except UsageError:
            if job.image is None or os.path.exists(job.image) or _plain(job.settings()) not in self.done:
                raise   # a picture may be gone once its job is done
        except Exception:   # unforeseen: this job alone fails when it runs, with a traceback
            return
        self.fine.add(job.id)

    @cached_property
    def done(self) -> set[str]:
        """The settings of finished jobs, whatever the content of their pictures."""
        files = () if self.out is None else self.out.glob("*/job.json")
        return {_plain({k: v for k, v in _read(file).items() if k not in RESULT}) for file in files}


def _plain(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def unread(method: str | None, editor: Any, sampled: bool = False, spacing: Any = None) -> dict[str, str]:
    """Settings that a job does not read, and why. method: of the inversion, None without a picture; editor:
    None for Prompt-to-Prompt; sampled: its sampler is that of pictures; spacing: its timestep_spacing."""
    if method is None:
        idle = dict.fromkeys(INVERTING, PICTURELESS)
    else:
        idle = {} if sampled else {"sampler": "of generated sources: a picture is sampled as it was inverted"}
        idle |= {"timestep_spacing": KARRAS} if spacing == "karras" else {}
        idle |= dict.fromkeys((name for name, methods in READERS.items() if method not in methods),
                              f"{method} inversion does not read it")
    windows = dict.fromkeys(WINDOWS, "of Prompt-to-Prompt, which the editor replaces")
    return idle if editor is None else idle | windows


def check_targets(job: Job) -> Job:
    """Returns the job. Raises UsageError for settings of its targets that its editor does not read."""
    if "editor" in job.others:
        refuse_p2p_settings(job.targets)
    return job


def parse(entry: Any, line: int, folder: Path, model: Model,
          defaults: Mapping[str, Any] | None = None) -> Job:
    """The job of one line. Raises UsageError."""
    if not isinstance(entry, dict):
        raise UsageError("a job is an object with source and targets")
    tags = entry.get("tags")
    entry = present({k: v for k, v in entry.items() if k != "tags"}) or {}
    user_id = checked("id", entry.pop("id")) if "id" in entry else None
    known = {"source", "targets", "image", *EDITING, *SAMPLING, *INVERTING, *OTHERS}
    entry = _full_names(entry, known, "an edit")
    pictured, merged = "image" in entry, {**left(defaults or {}, entry, model), **entry}
    method = checked("method", merged.get("method", DEFAULT)) if pictured else None
    idle = unread(method, merged.get("editor"), merged.get("sampler") == own_sampler(model),
                  merged.get("timestep_spacing"))
    _check_idle(idle, entry)
    notes = [f"{name}, given for all lines: {idle[name]}" for name in defaults or {}
             if name in merged.keys() & idle.keys() - entry.keys() and idle[name] != PICTURELESS]
    entry = {k: v for k, v in merged.items() if k not in idle or k in entry}   # an editor's: see `read`
    targets = entry.pop("targets", None)
    listed = targets if isinstance(targets, list) else [targets]
    if "source" not in entry or not listed or not all(isinstance(t, (str, dict)) for t in listed):
        raise UsageError("a job needs source (a prompt; of a picture, what describes it) and targets (a "
                         "prompt, an object with the fields of Edit, or a list of them)")
    entry = {k: checked(k, v) for k, v in entry.items()}
    if entry.get("fit") == "own" and {"height", "width"} & entry.keys():
        raise UsageError('height, width: fit "own" takes those of the picture; leave these out, or choose '
                         '"crop" or "pad"')
    edits = tuple(_target(t, {k: entry[k] for k in EDITING if k in entry}) for t in listed)
    given = {k: entry[k] for k in ("steps", "eta", "sampler", "timestep_spacing", "timesteps") if k in entry}
    if pictured:   # eta is the inversion's
        given |= {"sampler": own_sampler(model), "eta": None}
    _, steps, eta = solver(model, Sampling(**given))
    defaults_ = {"steps": steps, "guidance_scale": model.guidance_scale, "seed": 0,
                 "eta": 1.0 if pictured else eta, "height": model.size[0], "width": model.size[1]}
    sampling = {k: entry.get(k, defaults_[k]) for k in SAMPLING if k not in idle}
    inverting = {k: entry.get(k, v) for k, v in INVERTING.items()
                 if k not in idle or (pictured and k == "path")}   # which is part of every job's identity
    others = {k: entry[k] for k in OTHERS if k in entry}
    image = folder / entry["image"] if pictured else None
    content = None if image is None else content_of(image)
    job = Job("", line, entry["source"], edits, sampling, image, inverting, others, user_id, tags, content,
              tuple(notes))
    return job._replace(id=_identity(job, model))


def _check_idle(idle: Mapping[str, str], entry: Mapping[str, Any]) -> None:
    """Raises UsageError for settings of a line that it does not read; for its targets', see `read`."""
    for why in dict.fromkeys(idle.values()):
        names = [name for name, reason in idle.items()
                 if reason == why and name in entry and name not in WINDOWS]
        if names:
            raise UsageError(f"{', '.join(names)}: {why}; leave it out")


def _target(entry: str | dict[str, Any], shared: Mapping[str, Any]) -> Edit:
    entry = {"prompt": entry} if isinstance(entry, str) else entry
    fields = _full_names(entry, {"prompt", *EDITING}, "a target")
    if "prompt" not in fields:
        raise UsageError("a target that is an object needs its prompt")
    edit = Edit(**shared | {k: checked(k, v) for k, v in fields.items()})
    check_edit(edit)
    return edit


def _full_names(entry: Mapping[str, Any], known: Collection[str], owner: str) -> dict[str, Any]:
    """Settings under their full names. Raises UsageError for unknown ones, and for two names of one."""
    if both := [f"{short} and {name}" for short, name in SHORT.items() if short in entry and name in entry]:
        raise UsageError(f"{', '.join(both)}: two names of one setting; give one")
    entry = {SHORT.get(k, k): v for k, v in entry.items()}
    unknown = sorted(set(entry) - set(known))
    if of_model := [name for name in unknown if name in MODEL]:
        options = ", ".join(dict.fromkeys(MODEL[name] for name in of_model))
        raise UsageError(f"{', '.join(of_model)}: of the model, which is loaded once for the whole list; "
                         f"give {options} to the command instead")
    if unknown:
        raise UsageError(f"{', '.join(brief(name)[1:-1] for name in unknown)}: no setting of {owner}; known: "
                         f"{', '.join(sorted(known))}")
    return entry


def _identity(job: Job, model: Model) -> str:
    request = job.settings() | {"image": job.content, "model": model.identity()}
    if job.image is not None and (negative := job.inversion(model)["negative_prompt"]) is not None:
        request["inverted_under"] = negative   # earlier versions did not: other pictures
    return hashlib.sha256(_plain(request).encode()).hexdigest()[:16]


def content_of(picture: Path) -> str:
    """A hash of the file, or its name if it cannot be read: the job then fails when it runs."""
    with suppress(OSError, ValueError):
        if picture.is_file():
            status = picture.stat()
            return _hash(picture, status.st_size, status.st_mtime_ns)
    return str(picture)


@lru_cache(10_000)   # lists hold many edits of one picture
def _hash(file: Path, size: int, changed: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Store:
    """The output folder. Its files alone record which jobs are done."""

    def __init__(self, root: Path):
        """Raises UsageError if it cannot be written."""
        self.root, self.failures = root, root / "failed"
        try:
            self.failures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {root}: cannot be written ({error.strerror})") from None
        for folder in (self.root, self.failures):
            sweep(folder)

    def done(self, job: Job) -> bool:
        return finished(self.root / job.id / "job.json")

    def failed(self, job: Job) -> str | None:
        return _read(self.failures / f"{job.id}.json").get("error")

    def finish(self, job: Job, result: Result, seconds: float) -> None:
        """Writes all files aside, then moves them into place at once. Raises UsageError where they cannot be
        written."""
        record = job.settings() | {"id": job.id, "notes": result.notes, "rows": result.rows,
                                   "seconds": round(seconds, 3), "version": __version__}
        try:
            with appearing(self.root / job.id, "job.json") as folder:
                for name, image in zip(names(len(result.images)), result.images):
                    save_png(folder / f"{name}.png", image, result.settings)
                (folder / "job.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (self.failures / f"{job.id}.json").unlink(missing_ok=True)
        except OSError as error:
            if not self.done(job):
                raise UsageError(f"--out {self.root}: cannot be written ({error.strerror}); what is done is "
                                 "kept, start again to go on") from None

    def fail(self, job: Job, error: str, trace: str | None = None) -> None:
        """Records a failure. trace: the traceback of an unforeseen error."""
        record = job.settings() | {"id": job.id, "line": job.line, "error": error}
        if trace:
            record["traceback"] = trace
        write(self.failures / f"{job.id}.json", json.dumps(record, indent=1))

    def row(self, job: Job) -> dict[str, Any]:
        """The job's row of results.jsonl."""
        if self.done(job):
            record = _read(self.root / job.id / "job.json")
            images = [f"{job.id}/{name}.png" for name in names(1 + len(job.targets))]
            known = {"seconds": record.get("seconds"), "notes": [*job.notes, *(record.get("notes") or [])]}
            return job.row() | {"state": "done", "images": images} | known
        error = self.failed(job)
        return job.row() | ({"state": "failed", "error": error} if error else {})

    def index(self, jobs: Sequence[Job], mine: Collection[str]) -> dict[str, int]:
        """Writes results.jsonl.  -> how many of `mine` (identities) are done, failed and open, repeats
        counted"""
        rows = [self.row(job) for job in jobs]
        write(self.root / "results.jsonl", "\n".join(map(json.dumps, rows)))
        states = [row["state"] for row in rows if row["job"] in mine]
        return {state: states.count(state) for state in ("done", "failed", "open")}


def _read(file: Path) -> dict[str, Any]:
    """A JSON file of this folder; empty where it is absent or damaged."""
    with suppress(OSError, ValueError):
        return parse_object(read_text(file))
    return {}

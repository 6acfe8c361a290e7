"""A list of edits and what has become of each: a job is known by what it asks for, and is finished when its folder is there.

    OUT/ID/{source.png, edit-1.png, ..., job.json}     a finished job: it appears in one step
    OUT/failed/ID.json                                 one that failed, and why
    OUT/results.jsonl                                  a line a job, in the order of the list; written when a run ends
"""
from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from p2p.edit import Edit, check, from_dict, to_dict
from p2p.errors import UsageError
from p2p.image import save_png
from p2p.invert import DEFAULT, METHODS
from p2p.model import Model
from p2p.output import appearing, names, write
from p2p.run import Result

EDITING = tuple(f.name for f in fields(Edit))[1:]
SAMPLING = ("steps", "guidance_scale", "seed", "eta", "height", "width")
INVERTING = {"method": DEFAULT, "skip": None, "inversion_guidance": 1.0, "inner_steps": None}
OTHERS = ("proximal", "editor")
SHORT = {"target": "targets", "picture": "image", "cfg": "guidance_scale", "cross": "cross_replace_steps",   # the command line's
         "self": "self_replace_steps", "weight": "equalizer", "inversion_cfg": "inversion_guidance"}


class Job(NamedTuple):
    """One line of the list, complete: every setting has its value."""

    id: str                       # a hash of all below, of the picture's content and of the model
    line: int
    source: str                   # the prompt, or what describes the picture
    targets: tuple[Edit, ...]
    sampling: dict[str, Any]      # SAMPLING
    image: Path | None
    inverting: dict[str, Any]     # INVERTING, if there is a picture
    others: dict[str, Any]        # OTHERS

    def settings(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"source": self.source, "targets": [to_dict(e) for e in self.targets], **self.sampling,
                "image": self.image and str(self.image), **self.inverting, **self.others}


def read(file: Path, model: Model) -> list[Job]:
    """The jobs of a .jsonl file; pictures lie relative to it. Of lines that ask for the same the first alone is kept.

    Raises UsageError naming every line that cannot be meant, before anything is computed.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({error})") from None
    jobs: dict[str, Job] = {}
    wrong = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            job = parse(json.loads(text), number, file.parent, model)
            jobs.setdefault(job.id, job)
        except (UsageError, ValueError, TypeError) as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        raise UsageError(f"{file}: " + "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    if not jobs:
        raise UsageError(f'{file}: no job in it; a job is a line such as {{"source": "a cat", "targets": ["a dog"]}}')
    return list(jobs.values())


def parse(said: Any, line: int, folder: Path, model: Model) -> Job:
    """A job from what its line says. Raises UsageError."""
    if not isinstance(said, dict):
        raise UsageError("a job is an object with source and targets")
    said = {SHORT.get(k, k): v for k, v in said.items()}
    known = {"source", "targets", "image", *EDITING, *SAMPLING, *INVERTING, *OTHERS}
    if unknown := sorted(set(said) - known):
        raise UsageError(f"{', '.join(unknown)}: no setting of an edit; known: {', '.join(sorted(known))}")
    source, targets = said.get("source"), said.get("targets")
    listed = [targets] if isinstance(targets, (str, dict)) else targets
    if not isinstance(source, str) or not isinstance(listed, list) or not listed:
        raise UsageError("a job needs source (a prompt; of a picture, what describes it) and targets (a prompt, an object with "
                         "the fields of Edit, or a list of them)")
    shared = {k: said[k] for k in EDITING if k in said}
    edits = []
    for target in listed:
        edits.append(from_dict(shared | (target if isinstance(target, dict) else {"prompt": target})))
        check(edits[-1])
    image = said.get("image")
    if image is None and (alone := [k for k in INVERTING if k in said]):
        raise UsageError(f"{', '.join(alone)}: of a picture; give image")
    inverting = {k: said.get(k, v) for k, v in INVERTING.items()} if image is not None else {}
    if inverting and inverting["method"] not in METHODS:
        raise UsageError(f"method {inverting['method']!r} is not known; known: {', '.join(METHODS)}")
    usual = {"steps": 50, "guidance_scale": model.guidance_scale, "seed": 0, "eta": model.eta if image is None else 1.0,
             "height": model.size[0], "width": model.size[1]}
    sampling = {k: usual[k] if said.get(k) is None else said[k] for k in SAMPLING}
    if lists := [k for k, v in sampling.items() if isinstance(v, (list, dict))]:
        raise UsageError(f"{', '.join(lists)}: one number, not {sampling[lists[0]]!r}")
    others = {k: said[k] for k in OTHERS if said.get(k) is not None}
    job = Job("", line, source, tuple(edits), sampling, None if image is None else folder / image, inverting, others)
    return job._replace(id=_identity(job, model))


def _identity(job: Job, model: Model) -> str:
    content = None
    if job.image is not None:   # a file that cannot be read is the job's own failure, when its turn comes
        content = hashlib.sha256(job.image.read_bytes()).hexdigest() if job.image.is_file() else str(job.image)
    asked = job.settings() | {"image": content, "model": model.identity()}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """The output folder. Its files are the truth: nothing else remembers what is done."""

    def __init__(self, root: Path):
        """Raises UsageError if it cannot be written."""
        self.root, self.failures = root, root / "failed"
        try:
            self.failures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {root}: cannot be written ({error.strerror})") from None

    def done(self, job: Job) -> bool:
        return (self.root / job.id / "job.json").exists()

    def failed(self, job: Job) -> str | None:
        try:
            return json.loads((self.failures / f"{job.id}.json").read_text())["error"]
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def finish(self, job: Job, result: Result) -> None:
        """Writes all files aside, then moves them into place at once. Raises UsageError where the disk does not take them."""
        said = job.settings() | {"id": job.id, "notes": result.notes, "rows": result.rows}
        try:
            with appearing(self.root / job.id) as aside:
                for name, image in zip(names(len(result.images)), result.images):
                    save_png(aside / f"{name}.png", image, result.settings)
                (aside / "job.json").write_text(json.dumps(said, indent=1) + "\n")
            (self.failures / f"{job.id}.json").unlink(missing_ok=True)
        except OSError as error:
            if not self.done(job):
                raise UsageError(f"--out {self.root}: cannot be written ({error.strerror}); what is done is kept, start again "
                                 "to go on") from None

    def fail(self, job: Job, error: str) -> None:
        said = job.settings() | {"id": job.id, "line": job.line, "error": error}
        write(self.failures / f"{job.id}.json", json.dumps(said, indent=1))

    def index(self, jobs: Sequence[Job], mine: Collection[str]) -> dict[str, int]:
        """Writes results.jsonl, and clears away what killed runs left; how many of mine (identities) are done, failed and open."""
        for part in self.root.glob(".part-*"):
            if (self.root / part.name.split("-")[1] / "job.json").exists():
                shutil.rmtree(part, ignore_errors=True)
        lines, counts = [], {"done": 0, "failed": 0, "open": 0}
        for job in jobs:
            error = self.failed(job)
            state = "done" if self.done(job) else "failed" if error else "open"
            counts[state] += job.id in mine
            why = {"error": error} if state == "failed" else {}
            lines.append(json.dumps({"line": job.line, "id": job.id, "state": state} | why))
        write(self.root / "results.jsonl", "\n".join(lines))
        return counts


def groups(jobs: Iterable[Job], together: int) -> list[list[Job]]:
    """Jobs that may share a batch, at most so many in one. It depends on the whole list alone, not on what is done: a run that
    was stopped forms the same batches again, and so the same pixels."""
    open_: dict[tuple, list[Job]] = {}
    out: list[list[Job]] = []
    for job in jobs:
        shape = _shape(job)
        group = open_.get(shape) if shape is not None else None
        if group is None or len(group) >= together:
            group = []
            out.append(group)
            if shape is not None:
                open_[shape] = group
        group.append(job)
    return out


def _shape(job: Job) -> tuple | None:
    """What jobs of one batch have in common; None for those that run alone."""
    if job.image is not None or job.others:
        return None
    levels = {e.local_blend.level if e.local_blend else 4 for e in job.targets if e.local_blend or e.scope}
    s = job.sampling
    return s["steps"], s["height"], s["width"], s["eta"], s["guidance_scale"] in (0, 1), tuple(sorted(levels))


def arguments(job: Job) -> Mapping[str, Any]:
    """Of `edit`, for a job without a picture."""
    return {"source": job.source, "targets": list(job.targets), **job.sampling}

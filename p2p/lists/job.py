"""A job: one line of a list with all its settings, and the check of it before it runs."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from p2p.blend import LocalBlend
from p2p.editors import find_editor
from p2p.edits import Edit
from p2p.image import check_file
from p2p.model import Model
from p2p.request.editing import edit_request
from p2p.request.inverting import DEFAULT, expected, negative_read, settings_read
from p2p.request.names import replaced
from p2p.request.settings import to_settings
from p2p.request.source import OWN

SAMPLING = ("steps", "guidance_scale", "seed", "eta", "height", "width")
INVERTING = {   # see `invert`; "square" and path: `protocol.square`, `protocol.resampled`
    "method": DEFAULT, "skip": None, "inversion_guidance": None, "inner_steps": None, "final_alpha": None,
    "fit": "crop", "path": "inverted", **dict.fromkeys(OWN)}
OTHERS = ("proximal", "editor", "negative_prompt", "sampler", "timestep_spacing", "timesteps")


def left(defaults: Mapping[str, Any], line: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The defaults of a list that count for a line: not those in whose place it says something else."""
    out = replaced(line, {"sampler": model.sampler} | dict(defaults))
    out |= {"height", "width"} if line.get("fit") == "own" else set()
    out |= {"fit"} if {"height", "width"} & line.keys() and defaults.get("fit") == "own" else set()
    return {k: v for k, v in defaults.items() if k not in out}


class Job(NamedTuple):
    """One line of the list, with a value for every setting."""

    id: str                       # a hash of all settings, of the picture's content and of the model
    line: int
    source: str                   # the prompt, or the picture's description
    targets: tuple[Edit, ...]
    sampling: dict[str, Any]      # SAMPLING, and
    image: Path | None
    inverting: dict[str, Any]     # INVERTING, if there is a picture: those that are read, see `unread`
    others: dict[str, Any]        # OTHERS
    user_id: str | int | None = None   # for the rows of results.jsonl; it changes nothing
    tags: Any = None                   # ... the user's, too
    content: str | None = None         # of the picture when the list was read, see `jobs.content_of`
    notes: tuple[str, ...] = ()        # of the line, before it runs

    def settings(self) -> dict[str, Any]:
        """All settings, as JSON."""
        return {"source": self.source, **to_settings(self.targets), **self.sampling,
                "image": self.image and str(self.image), **self.inverting, **self.others}

    def row(self) -> dict[str, Any]:
        """A row of results.jsonl, before the job has run."""
        return {"line": self.line, "id": self.id if self.user_id is None else self.user_id, "job": self.id,
                "state": "open", "tags": self.tags, "source": self.source,
                "targets": [e.prompt for e in self.targets], "seed": self.sampling.get("seed"), "images": [],
                "seconds": None, "notes": [*self.notes], "error": None}

    def editing(self) -> dict[str, Any]:
        """Arguments of `edit`, but for its source."""
        names = SAMPLING if self.image is None else ("guidance_scale",)   # the others are of its inversion
        return {"targets": list(self.targets), **{k: self.sampling[k] for k in names}, **self.others,
                "editor": find_editor(self.others.get("editor"))}

    def inversion(self, model: Model) -> dict[str, Any]:
        """Arguments of `invert`, but for the picture and its prompt."""
        method, given = self.inverting["method"], self.inverting.get("inversion_guidance")
        timesteps = {k: self.others.get(k) for k in ("timestep_spacing", "timesteps")}
        settings = settings_read(method, {**self.inverting, **self.sampling, **timesteps})
        settings["negative_prompt"] = negative_read(model, method, given, self.others.get("negative_prompt"))
        settings.pop("path")
        return settings | ({"height": None, "width": None} if settings["fit"] == "own" else {})


def check(model: Model, job: Job, picture_exists: bool = True) -> None:
    """Raises UsageError where `edit` or `invert` would. picture_exists: requires the picture's file; whether
    it can be read shows when the job runs."""
    source: Any = job.source
    if job.image is not None:   # "own" is a size like the model's own, with maps at the same levels
        if picture_exists:
            check_file(job.image)
        source = expected(model, job.source, **job.inversion(model))
    edit_request(model, source, **job.editing())


def groups(jobs: Iterable[Job], together: int) -> list[list[Job]]:
    """Groups of jobs that may share a batch, at most `together` in one. They depend on the list alone, not on
    what is done: a run that was stopped forms the same batches again, and so the same pixels."""
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
    """What jobs of one batch have in common; None for a job that runs by itself."""
    if job.image is not None or {"proximal", "editor"} & job.others.keys():
        return None
    blends = [e.local_blend or LocalBlend() for e in job.targets if e.local_blend or e.scope]
    levels = {(b.level, b.middle) for b in blends}
    s = job.sampling
    how = [str(job.others.get(k)) for k in ("sampler", "timestep_spacing", "timesteps")]
    return (s["steps"], s["height"], s["width"], s["eta"], s["guidance_scale"] in (0, 1), *how,
            frozenset(levels))

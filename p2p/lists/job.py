"""One line of a list, complete, and what can be known to be wrong with it before it runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from p2p.editors import find_editor
from p2p.edits import Edit
from p2p.image import check_file
from p2p.model import Model
from p2p.request.asked import asked
from p2p.request.inverting import DEFAULT, expected, settings_read
from p2p.request.settings import to_dict

SAMPLING = ("steps", "guidance_scale", "seed", "eta", "height", "width")
INVERTING = {   # see `invert`; "square" and path: `protocol.square`, `protocol.resampled`
    "method": DEFAULT, "skip": None, "inversion_guidance": None, "inner_steps": None, "final_alpha": None,
    "fit": "crop", "path": "inverted"}
OTHERS = ("proximal", "editor", "negative_prompt")


class Job(NamedTuple):
    """One line of the list, complete: every setting has its value."""

    id: str                       # a hash of what is asked for, of the picture's content and of the model
    line: int
    source: str                   # the prompt, or what describes the picture
    targets: tuple[Edit, ...]
    sampling: dict[str, Any]      # SAMPLING, and
    image: Path | None
    inverting: dict[str, Any]     # INVERTING, if there is a picture: those that are read, see `unread`
    others: dict[str, Any]        # OTHERS
    own: str | int | None = None  # the user's id and tags: for the rows of results.jsonl, they change nothing
    tags: Any = None

    def settings(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"source": self.source, "targets": [to_dict(e) for e in self.targets], **self.sampling,
                "image": self.image and str(self.image), **self.inverting, **self.others}

    def row(self) -> dict[str, Any]:
        """What is known of it before it has run, as a row of results.jsonl."""
        return {"line": self.line, "id": self.id if self.own is None else self.own, "job": self.id,
                "state": "open", "tags": self.tags, "source": self.source,
                "targets": [e.prompt for e in self.targets], "seed": self.sampling.get("seed"), "images": [],
                "seconds": None, "notes": [], "error": None}

    def editing(self) -> dict[str, Any]:
        """Arguments of `edit`, but for its source."""
        own = SAMPLING if self.image is None else ("guidance_scale",)   # the others are of its inversion
        return {"targets": list(self.targets), **{k: self.sampling[k] for k in own}, **self.others,
                "editor": find_editor(self.others.get("editor"))}

    def inversion(self) -> dict[str, Any]:
        """Arguments of `invert`, but for the picture and its prompt."""
        said = settings_read(self.inverting["method"], {**self.inverting, **self.sampling})
        said.pop("path")
        return said | ({"height": None, "width": None} if said["fit"] == "own" else {})


def check(model: Model, job: Job, there: bool = True) -> None:
    """Raises UsageError where `edit` or `invert` would at the job's turn. there: its picture must be; whether
    that can be read is seen at its turn."""
    source: Any = job.source
    if job.image is not None:   # "own" is a size like the model's own, with maps at the same levels
        if there:
            check_file(job.image)
        source = expected(model, job.source, **job.inversion())
    asked(model, source, **job.editing())

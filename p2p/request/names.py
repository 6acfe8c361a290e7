"""The names of settings: fields of `Sampling` and of `Edit`, and what others call them."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.request.start import Sampling

SAMPLING = tuple(f.name for f in fields(Sampling))
EDITING = tuple(f.name for f in fields(Edit))[1:]
# settings of a schedule that stand in the place of others: who says one means none of these
INSTEAD = {"sampler": ("eta", "timestep_spacing"), "timesteps": ("steps", "timestep_spacing"),
           "steps": ("timesteps",), "timestep_spacing": ("timesteps",)}
ALIASES = {"num_inference_steps": "steps", "cfg": "guidance_scale", "negative": "negative_prompt"}


def replaced(said: Mapping[str, Any], before: Mapping[str, Any]) -> set[str]:
    """The settings in whose place stands what is said, where that is something else than before."""
    return {other for name, value in said.items() if value != before.get(name)
            for other in INSTEAD.get(name, ())}


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run with these changes, without those in whose place they stand."""
    out = replaced(changes, settings)
    return {k: v for k, v in settings.items() if k not in out} | dict(changes)


def understood(settings: Mapping[str, Any], known: Sequence[str], what: str) -> dict[str, Any]:
    """The settings by their names here. Raises UsageError for one that is not known, with those that are
    nearest."""
    out = {}
    for name, value in settings.items():
        name_here = ALIASES.get(name, name)
        if name_here not in known:
            near = get_close_matches(name_here, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"{name}: no setting of {what}; {hint}")
        if name_here in out:
            raise UsageError(f"{name}, {name_here}: the same setting twice; leave one out")
        out[name_here] = value
    return out

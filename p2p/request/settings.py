"""Edits to JSON, in the settings of a run and in lists, and back."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import Any

from PIL import Image

from p2p.blend import LocalBlend
from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.image import from_base64, to_base64
from p2p.request.checks import whole
from p2p.request.masks import fixed, picture_of
from p2p.weights.untrusted import brief

# The fields that all versions recorded. Later ones (windows_over, say) default to the former behaviour.
RECORDED = ("mode", "cross_replace_steps", "self_replace_steps", "self_max_tokens", "equalizer", "aligner")
WINDOWS_UNREAD: dict[str, Any] = dict.fromkeys(   # by another editor than Prompt-to-Prompt
    ("cross_replace_steps", "self_replace_steps", "self_max_tokens"))
RECORDED_OF_BLENDS = ("words", "substruct", "threshold", "start", "level", "mask")


def to_dict(edit: Edit, mask: int | None = None) -> dict[str, Any]:
    """Converts an edit to JSON; a mask becomes a PNG in base64, or the number `mask` in a list of them."""
    out = {f.name: _plain(getattr(edit, f.name)) for f in fields(edit) if f.name != "local_blend"}
    blend = edit.local_blend
    if blend is not None:
        blend = {f.name: _plain(getattr(blend, f.name)) for f in fields(blend) if f.name != "mask"}
        blend["mask"] = picture_of(edit.local_blend.mask) if mask is None else mask
    return out | {"local_blend": blend}


def _plain(value: Any) -> Any:
    """Converts numpy's numbers to Python's."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def from_dict(entry: Mapping[str, Any], masks: Sequence[str] = ()) -> Edit:
    """The inverse of `to_dict`; lists become tuples. masks: those that an entry refers to by number. Raises
    UsageError."""
    def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    try:
        values = {k: tuples(v) if isinstance(v, Mapping) else v for k, v in tuples(entry).items()}
        if values.get("local_blend") is not None:
            mask = values["local_blend"].get("mask")
            mask = masks[whole("mask", mask, 0, len(masks) - 1)] if isinstance(mask, int) else mask
            picture = None if mask is None else from_base64(mask)
            values["local_blend"] = LocalBlend(**values["local_blend"] | {"mask": picture})
        return Edit(**values)
    except (AttributeError, TypeError) as error:   # no mapping, or unknown fields
        raise UsageError(f"not an edit as settings hold it, {brief(entry)} ({error})") from None


def to_settings(edits: Sequence[Edit], size: tuple[int, int] | None = None,
                fit: str = "crop") -> dict[str, Any]:
    """Converts edits to settings of a run. Masks are stored thresholded, at the latents' size (H, W), so that
    they come out the same again, or (None) as they were given. Each is stored once: targets refer to it by
    number."""
    masks: dict[str, int] = {}
    targets = []
    for e in edits:
        number = None
        if e.local_blend is not None and e.local_blend.mask is not None:
            mask = e.local_blend.mask
            png = picture_of(mask) if size is None else to_base64(Image.fromarray(
                fixed(mask, size, fit)[0].numpy()))
            number = masks.setdefault(png, len(masks))
        targets.append(to_dict(e, number))
    return {"targets": targets} | ({"masks": list(masks)} if masks else {})


def from_settings(settings: Mapping[str, Any]) -> list[Edit]:
    """The inverse of `to_settings`. Raises UsageError, KeyError."""
    masks = settings.get("masks", [])
    if not isinstance(settings["targets"], list) or not isinstance(masks, list):
        raise UsageError("the targets and masks of settings are lists")
    edits = [from_dict(t, masks) for t in settings["targets"]]
    for target in settings["targets"]:
        lost = [name for name in RECORDED if name not in target]
        if blend := target.get("local_blend"):
            lost += [f"local_blend.{name}" for name in RECORDED_OF_BLENDS if name not in blend]
        if lost:
            raise UsageError(f'the record of "{target["prompt"]}" does not say its {", ".join(lost)}, on '
                             "which the pixels depend: they cannot be made again")
    if settings.get("editor") is not None:   # older versions recorded windows, which no other editor reads
        edits = [replace(e, **WINDOWS_UNREAD) for e in edits]
    return edits

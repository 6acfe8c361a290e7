"""Edits as JSON can hold them, in the settings of a run and in lists, and back."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from PIL import Image

from p2p.blend import LocalBlend, fixed, picture_of
from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.image import from_base64, to_base64
from p2p.request.checks import whole
from p2p.weights.untrusted import brief

# What all versions recorded. Of what came later (windows_over, say) the default is what was done before.
RECORDED = ("mode", "cross_replace_steps", "self_replace_steps", "self_max_tokens", "equalizer", "aligner")
RECORDED_OF_BLENDS = ("words", "substruct", "threshold", "start", "level", "mask")


def to_dict(edit: Edit, mask: int | None = None) -> dict[str, Any]:
    """An edit as JSON can hold it; a mask becomes a PNG in base64, or the number that stands for it."""
    out = {f.name: _plain(getattr(edit, f.name)) for f in fields(edit) if f.name != "local_blend"}
    blend = edit.local_blend
    if blend is not None:
        blend = {f.name: _plain(getattr(blend, f.name)) for f in fields(blend) if f.name != "mask"}
        blend["mask"] = picture_of(edit.local_blend.mask) if mask is None else mask
    return out | {"local_blend": blend}


def _plain(value: Any) -> Any:
    """Numbers of numpy's kinds as Python's own."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def from_dict(said: Mapping[str, Any], masks: Sequence[str] = ()) -> Edit:
    """The edit that `to_dict` made this from; lists stand for tuples. masks: the ones that numbers stand for.
    Raises UsageError."""
    def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    try:
        d = {k: tuples(v) if isinstance(v, Mapping) else v for k, v in tuples(said).items()}
        if d.get("local_blend") is not None:
            mask = d["local_blend"].get("mask")
            mask = masks[whole("mask", mask, 0, len(masks) - 1)] if isinstance(mask, int) else mask
            picture = None if mask is None else from_base64(mask)
            d["local_blend"] = LocalBlend(**d["local_blend"] | {"mask": picture})
        return Edit(**d)
    except (AttributeError, TypeError) as error:   # no mapping, or unknown fields
        raise UsageError(f"not an edit as settings hold it, {brief(said)} ({error})") from None


def to_settings(edits: Sequence[Edit], size: tuple[int, int], how: str = "crop") -> dict[str, Any]:
    """Edits as the settings of a run hold them. Their masks are those that were decided at the latents' size
    (H, W), so that they are decided alike again, and each is held once: targets have its number."""
    masks: dict[str, int] = {}
    targets = []
    for e in edits:
        number = None
        if e.local_blend is not None and e.local_blend.mask is not None:
            mask = Image.fromarray(fixed(e.local_blend.mask, size, how)[0].numpy())
            number = masks.setdefault(to_base64(mask), len(masks))
        targets.append(to_dict(e, number))
    return {"targets": targets} | ({"masks": list(masks)} if masks else {})


def from_settings(said: Mapping[str, Any]) -> list[Edit]:
    """What `to_settings` made these from. Raises UsageError, KeyError."""
    masks = said.get("masks", [])
    if not isinstance(said["targets"], list) or not isinstance(masks, list):
        raise UsageError("the targets and masks of settings are lists")
    edits = [from_dict(t, masks) for t in said["targets"]]
    for target in said["targets"]:
        lost = [name for name in RECORDED if name not in target]
        if blend := target.get("local_blend"):
            lost += [f"local_blend.{name}" for name in RECORDED_OF_BLENDS if name not in blend]
        if lost:
            raise UsageError(f'the record of "{target["prompt"]}" does not say its {", ".join(lost)}, on '
                             "which the pixels depend: they cannot be made again")
    return edits

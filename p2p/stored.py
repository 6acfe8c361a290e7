"""Inversions from files: whoever made them, every field is checked before anything is computed with it."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.attention import Record
from models.unet import UNet, UNetConfig
from p2p.errors import UsageError
from p2p.image import from_base64
from weights.untrusted import parse_object

if TYPE_CHECKING:
    from p2p.invert import Inversion
    from p2p.model import Model

SHRINK = 64            # the most that a picture's side is of its latents'
QUERIES = "queries."   # before the names of a trace's tensors
KEYS = 2**12           # most tensors: a trace has two for each layer
TENSORS = {"latents", "null_context", "offsets"}


def read(file: str | Path) -> dict[str, Any]:
    """The fields of an inversion's file, not checked yet. Raises UsageError."""
    try:
        with safe_open(file, "pt") as f:
            said = parse_object((f.metadata() or {})["inversion"])
            if len(f.keys()) > KEYS:
                raise ValueError(f"{len(f.keys()):,} tensors")
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise UsageError(f"{file}: not an inversion saved by p2p ({error})") from None
    queries = {k.removeprefix(QUERIES): tensors.pop(k) for k in list(tensors) if k.startswith(QUERIES)}
    if unknown := sorted([*(said.keys() - FIELDS.keys() - {"picture"}), *(tensors.keys() - TENSORS)]):
        raise UsageError(f"{file}: not an inversion saved by p2p ({', '.join(unknown[:5])} belongs to none)")
    return said | tensors | {"queries": queries or None}


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda v: type(v) in kinds and (type(v) is not float or math.isfinite(v))


_TEXT = _is(str), "a text"
_NUMBER = _is(int, float), "a finite number"
FIELDS = {
    "prompt": _TEXT, "family": _TEXT, "prediction": _TEXT, "method": _TEXT,
    "guidance_scale": _NUMBER, "inversion_guidance": _NUMBER,
    "sha256": (_is(str, type(None)), "a text or null"),
    "steps": (lambda v: type(v) is int and 1 <= v, "a whole number from 1"),
    "rows": (lambda v: type(v) is int and 0 <= v, "a whole number from 0"),
    "skip": (lambda v: type(v) is int and 0 <= v, "a whole number from 0"),
    "inner_steps": (lambda v: v is None or (type(v) is int and 1 <= v), "null or a whole number from 1"),
    "eta": (lambda v: type(v) in (int, float) and 0 <= v <= 1, "a number from 0 to 1"),
    "seed": (lambda v: v is None or (type(v) is int and -2**63 <= v < 2**64), "null or a whole number from -2^63 to 2^64 - 1"),
    "fit": (lambda v: v in ("crop", "pad", "own"), "crop, pad or own"),
    "overrides": (lambda v: isinstance(v, dict) and len(v) < 32, "an object"),
    "final_alpha": (lambda v: v is None or (type(v) in (int, float) and 0 < v <= 1), "null or a number above 0, at most 1"),
}


def check(file: str | Path, found: Inversion, methods: Sequence[str], followed: Sequence[str]) -> None:
    """Raises UsageError unless fields and tensors are those of one inversion. methods: that are known; followed: those
    whose source follows its latents, and may be traced."""
    wrong = [f"{name} is {getattr(found, name)!r}, not {wanted}" for name, (fits, wanted) in FIELDS.items()
             if not fits(getattr(found, name))]
    if not wrong and found.method not in methods:
        wrong = [f"method {found.method!r} is not known; known: {', '.join(methods)}"]
    if not wrong and found.skip >= found.steps:
        wrong = [f"skip is {found.skip} of {found.steps} steps, which leaves none"]
    wrong = wrong or _wrong_tensors(found, found.steps - found.skip, found.method in followed)
    if wrong:
        raise UsageError(f"{file}: not an inversion as p2p saves it: {'; '.join(wrong[:3])}. Invert the picture "
                         "again")


def _wrong_tensors(found: Inversion, steps: int, followed: bool) -> list[str]:
    latents = found.latents
    if latents.ndim != 4 or len(latents) != steps + 1 or latents.dtype not in (torch.float32, torch.float64):
        return [f"its latents are {_said(latents)}; ({steps + 1}, C, H, W) of float32 or float64 belongs to {steps} "
                "steps"]
    wrong = []
    if (found.eta > 0) != (found.method == "edit-friendly"):
        wrong.append(f"eta is {found.eta}, of the method {found.method}")
    for name, method, shape in (("null_context", "null-text", (steps, None, None)),
                                ("offsets", "edit-friendly", (steps, *latents.shape[1:]))):
        tensor = getattr(found, name)
        if (tensor is None) != (found.method != method):
            there = "missing" if tensor is None else "there"
            wrong.append(f"{name}: {there}, though the method is {found.method}")
        elif tensor is not None and not _like(tensor, shape):
            wrong.append(f"its {name} are {_said(tensor)}, which is not of {steps} steps")
    if found.queries is not None and not followed:
        wrong.append(f"it is traced, though its method is {found.method}")
    queries = found.queries or {}
    tensors = {"latents": latents, "null_context": found.null_context, "offsets": found.offsets} | queries
    for name, tensor in tensors.items():
        if name in queries and not _like(tensor, (steps, None, None)):
            wrong.append(f"{name} is {_said(tensor)}, which is not of {steps} steps")
        elif tensor is not None and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            wrong.append(f"{name}: values that are not finite")
    return wrong


def _like(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return (tensor.is_floating_point() and tensor.ndim == len(shape) and tensor.numel() > 0
            and all(b in (None, a) for a, b in zip(tensor.shape, shape)))


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"


def check_for(model: Model, found: Inversion) -> None:
    """Raises UsageError unless the tensors beside the latents have the shapes that the model's have."""
    told = model.length, model.unet.config.text_dim or model.unet.config.context_dim
    if found.null_context is not None and found.null_context.shape[1:] != told:
        raise UsageError(f"null_context is {_said(found.null_context)}; this model's text has {told} a step")
    if found.queries is not None:
        given = {k: tuple(v.shape[1:]) for k, v in found.queries.items()}
        if given != _queries(model.unet.config, tuple(found.latents.shape[1:]), model.length):
            raise UsageError("its queries are not those of this model at its size: trace it again")


@lru_cache(maxsize=4)
def _queries(config: UNetConfig, shape: tuple[int, ...], length: int) -> dict[str, tuple[int, ...]]:
    """(N, h d) of all queries and keys of a step, by SITE.q and SITE.k."""
    with torch.device("meta"):
        told = dict(context=torch.zeros(1, length, config.text_dim or config.context_dim))
        if config.vector_dim:
            told["vector"] = torch.zeros(1, config.vector_dim)
        _, seen = UNet(config)(torch.zeros(1, *shape), torch.zeros(1), record=Record(queries=True), **told)
    return {f"{site}.{part}": tuple(x.shape[1:]) for site, qk in seen.items() for part, x in zip("qk", qk)}


def picture(file: str | Path, text: Any, latents: Tensor) -> Image.Image | None:
    """The picture that an inversion's header holds, of its latents' shape. Raises UsageError."""
    if text is None:
        return None
    try:
        image = from_base64(text)
        height, width = latents.shape[2:]
        shrink = image.height // height
        fits = 1 <= shrink <= SHRINK and image.size == (shrink * width, shrink * height)
        if image.format != "PNG" or not fits:
            raise ValueError(f"a {image.format} of {image.width} x {image.height} beside latents of {width} x {height}")
        image.load()
    except (ArithmeticError, OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{file}: its picture is damaged ({error}). Invert the picture again") from None
    return image

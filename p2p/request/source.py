"""A source that exists before the edit: a real picture that was inverted, or a generated one that was
traced."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p2p import __version__
from p2p.errors import UsageError
from p2p.image import from_base64, to_base64
from p2p.model import Model
from p2p.models.attention import QK
from p2p.request.checks import kind, place
from p2p.request.memory import qk_shapes
from p2p.request.schedules import SPACINGS, timestep_tuple
from p2p.request.start import check_latents
from p2p.weights import sealed
from p2p.weights.untrusted import check_regular, parse_object

METHODS = ("noise", "ddim", "fixed-point", "belm", "negative-prompt", "null-text", "direct", "edit-friendly",
           "uni-inv", "rf-solver", "fireflow", "rf-inversion", "flow-edit", "ddcm", "turbo-edit")
OFFSET = ("edit-friendly", "flow-edit", "ddcm", "turbo-edit")   # what the network misses is added to all rows
FOLLOW = ("direct", *OFFSET)            # the source row takes the stored latents at every step
LONE = (*FOLLOW, "negative-prompt", "uni-inv", "rf-solver", "fireflow", "rf-inversion")   # ... is not guided
REPLACE_EMPTY = ("negative-prompt", "null-text")   # put something in the place of the empty prompt
WITH_ETA = ("edit-friendly", "turbo-edit")   # above 0: noise in every step, stored as offsets
OWN = {"gamma": "rf-inversion", "control": "rf-inversion", "control_steps": "rf-inversion",
       "n_avg": "flow-edit", "n_min": "flow-edit"}   # settings of one method, which needs them
TENSORS = ("latents", "null_context", "offsets", "queries")
AVERAGED = 2**10       # most noises a step
SHRINK = 64            # largest ratio of a picture's side to its latents'
QUERIES = "queries."   # before the names of a trace's tensors
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KEYS = 2**12           # most tensors: a trace has two for each layer


@dataclass(frozen=True, repr=False)
class Inversion:
    """A picture ready to be edited, any number of times. T: network calls of an edit, see `calls`."""

    prompt: str
    method: str
    latents: Tensor   # (T + 1, C, H, W), x_0 first; float32 or, as given, float64; CPU
    steps: int                             # of the schedule
    skip: int                              # how many of them, the noisiest, are left out
    guidance_scale: float                  # of the edits that it was made for
    inversion_guidance: float
    inner_steps: int | None
    eta: float
    seed: int | None
    family: str
    prediction: str
    sha256: str | None                     # of the model
    rows: int = 0                          # that the UNet computed
    null_context: Tensor | None = None     # (T, L, C): the empty prompt of each step, noisiest first
    offsets: Tensor | None = None          # (T, C, H, W): added to every row after each step, noisiest first
    picture: Image.Image | None = None     # as fitted; None if latents were given
    queries: dict[str, Tensor] | None = None   # SITE.q and SITE.k: (T, N, h d), noisiest first, see `trace`
    fit: str = "crop"                      # how the picture was fitted
    final_alpha: float | None = None       # alphas_cumprod of the picture; None: the model's
    timestep_spacing: str | None = None    # of the steps; None: the model's
    timesteps: tuple[int, ...] | None = None   # all of the steps', where they were given
    overrides: dict[str, Any] = field(default_factory=dict)   # of the model's files, see `Model.overrides`
    negative_prompt: str | None = None     # what guidance led away from
    gamma: float | None = None             # of rf-inversion: how much the way up is drawn to noise, and
    control: float | None = None           # ... the way down to the picture, in
    control_steps: float | None = None     # ... this share of the steps, the first
    n_avg: int | None = None               # of flow-edit: noises a step, but for
    n_min: int | None = None               # ... the last so many, which sample without the source
    version: str | None = __version__      # of the package that made it; None: of an older file
    notes: tuple[str, ...] = ()            # what was decided, or looks like a mistake; not kept in files

    def __repr__(self) -> str:
        _, *shape = self.latents.shape
        traced = "" if self.queries is None else ", queries stored"
        return (f'<Inversion by {self.method} of "{self.prompt}": {self.steps - self.skip} of {self.steps} '
                f"steps, latents {tuple(shape)}{traced}, model {str(self.sha256)[:12]}>")

    @property
    def calls(self) -> int:
        """How often an edit asks the network, T; other solvers than DDIM ask more or less than once a step,
        see `solvers.asked`."""
        steps = self.steps - self.skip
        if self.method == "flow-edit":
            plain = min(self.n_min or 0, steps)
            return (self.n_avg or 1) * (steps - plain) + plain
        return {"rf-solver": 2 * steps, "fireflow": steps + 1}.get(self.method, steps)

    @property
    def control_calls(self) -> int:
        """In how many of them, the first, rf-inversion draws an edit to the picture."""
        return int((self.control_steps or 0) * self.calls + 1e-9)   # 0.29 * 100 is 28.999...

    def settings(self) -> dict[str, Any]:
        """How it was made, as JSON can hold it, the picture included: enough to make it again."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*TENSORS, "notes")}
        return said | {"picture": self.picture and to_base64(self.picture)}

    def save(self, file: str | Path) -> None:
        """Writes a .safetensors file, its settings in the header. Raises UsageError, OSError."""
        file = place("file", file)
        tensors = {"latents": self.latents, "null_context": self.null_context, "offsets": self.offsets,
                   **{QUERIES + k: v for k, v in (self.queries or {}).items()}}
        sealed.save({k: v for k, v in tensors.items() if v is not None}, Path(file),
                    {"inversion": json.dumps(self.settings())})

    @staticmethod
    def load(file: str | Path) -> Inversion:
        """Reads what `save` wrote, and believes none of it. Raises UsageError."""
        file = place("file", file)
        try:
            found = Inversion(**_read(file))
        except TypeError as error:
            raise UsageError(f"{file}: not an inversion saved by p2p ({error})") from None
        _check(file, found)
        return replace(found, picture=_picture(file, found.picture, found.latents),
                       timesteps=timestep_tuple(found.timesteps))

    def check(self, model: Model) -> None:
        """Raises UsageError unless it was made with this model."""
        kind("model", model, Model)
        if (self.family, self.prediction) != (model.family, model.prediction) or self.sha256 != model.sha256:
            raise UsageError(f"the inversion was made with another model: {self.family}, predicting "
                             f"{self.prediction}, sha256 {str(self.sha256)[:12]}; this is {model.family}, "
                             f"{model.prediction}, {str(model.sha256)[:12]} ({model.file}). Invert the "
                             "picture again")
        check_latents("latents", self.latents, (len(self.latents),), model)
        _check_for(model, self)
        if self.overrides != model.overrides:
            raise UsageError(f"the inversion was made with {self.overrides or 'the model as it is'}, this is "
                             f"{model.overrides or 'the model as it is'}: load it as it was, or invert the "
                             "picture again")


class Queries(Sequence):
    """Stored queries and keys as the loop wants them: for step i a (1, N, h d) pair by site, on
    the model's device."""

    def __init__(self, stored: dict[str, Tensor], model: Model):
        self.stored, self.device = stored, model.device
        self.sites = [k.removesuffix(".q") for k in stored if k.endswith(".q")]

    def __len__(self) -> int:
        return len(next(iter(self.stored.values())))

    def __getitem__(self, i: int) -> dict[str, QK]:
        return {site: tuple(self.stored[f"{site}.{part}"][i][None].to(self.device) for part in "qk")
                for site in self.sites}


# ------------------------------------------------------ from files: whoever made them, every field is checked

def _read(file: str | Path) -> dict[str, Any]:
    """The fields of an inversion's file, not checked yet. Raises UsageError."""
    try:
        check_regular(Path(file))
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            said = parse_object(metadata["inversion"])
            if len(f.keys()) > KEYS:
                raise ValueError(f"{len(f.keys()):,} tensors")
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        sealed.check(tensors, metadata, ("inversion", "format"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise UsageError(f"{file}: not an inversion saved by p2p ({error})") from None
    queries = {k.removeprefix(QUERIES): tensors.pop(k) for k in list(tensors) if k.startswith(QUERIES)}
    if unknown := sorted([*(said.keys() - FIELDS.keys() - {"picture"}), *(tensors.keys() - set(TENSORS))]):
        raise UsageError(f"{file}: not an inversion saved by p2p ({', '.join(unknown[:5])} belongs to none)")
    return {"version": None} | said | tensors | {"queries": queries or None}


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda v: type(v) in kinds and (type(v) is not float or math.isfinite(v))


_TEXT = _is(str), "a text"
_NUMBER = _is(int, float), "a finite number"
FIELDS = {
    "prompt": _TEXT, "family": _TEXT, "prediction": _TEXT, "method": _TEXT,
    "guidance_scale": _NUMBER, "inversion_guidance": _NUMBER,
    **dict.fromkeys(("negative_prompt", "sha256", "version"), (_is(str, type(None)), "a text or null")),
    "steps": (lambda v: type(v) is int and 1 <= v, "a whole number from 1"),
    **dict.fromkeys(("rows", "skip"), (lambda v: type(v) is int and 0 <= v, "a whole number from 0")),
    "inner_steps": (lambda v: v is None or (type(v) is int and 1 <= v), "null or a whole number from 1"),
    "eta": (lambda v: type(v) in (int, float) and 0 <= v <= 1, "a number from 0 to 1"),
    "seed": (lambda v: v is None or (type(v) is int and -2**63 <= v < 2**64),
             "null or a whole number from -2^63 to 2^64 - 1"),
    "fit": (lambda v: v in ("crop", "pad", "own"), "crop, pad or own"),
    "overrides": (lambda v: isinstance(v, dict) and len(v) < 32, "an object"),
    **dict.fromkeys(("gamma", "control", "control_steps"), (
        lambda v: v is None or (type(v) in (int, float) and 0 <= v <= 1), "null or a number from 0 to 1")),
    "n_avg": (lambda v: v is None or (type(v) is int and 1 <= v <= AVERAGED), f"null or 1 to {AVERAGED}"),
    "n_min": (lambda v: v is None or (type(v) is int and 0 <= v), "null or a whole number from 0"),
    "timestep_spacing": (lambda v: v in (None, *SPACINGS), f"null or one of {', '.join(SPACINGS)}"),
    "timesteps": (lambda v: v is None or (type(v) is list and {*map(type, v)} == {int}), "null or a list"),
    "final_alpha": (lambda v: v is None or (type(v) in (int, float) and 0 < v <= 1),
                    "null or a number above 0, at most 1"),
}


def _check(file: str | Path, inversion: Inversion) -> None:
    """Raises UsageError unless fields and tensors are those of one inversion."""
    wrong = [f"{name} is {getattr(inversion, name)!r}, not {wanted}"
             for name, (fits, wanted) in FIELDS.items() if not fits(getattr(inversion, name))]
    if not wrong and inversion.method not in METHODS:
        wrong = [f"method {inversion.method!r} is not known; known: {', '.join(METHODS)}"]
    if not wrong and inversion.skip >= inversion.steps:
        wrong = [f"skip is {inversion.skip} of {inversion.steps} steps, which leaves none"]
    if not wrong and inversion.timesteps is not None and len(inversion.timesteps) != inversion.steps:
        wrong = [f"it has {len(inversion.timesteps)} timesteps for {inversion.steps} steps"]
    wrong = wrong or [f"{name} is {getattr(inversion, name)}, of the method {inversion.method}"
                      for name, method in OWN.items()
                      if (getattr(inversion, name) is None) != (inversion.method != method)]
    wrong = wrong or _wrong_tensors(inversion)
    if wrong:
        raise UsageError(f"{file}: not an inversion as p2p saves it: {'; '.join(wrong[:3])}. Invert the "
                         "picture again")


def _wrong_tensors(inversion: Inversion) -> list[str]:
    latents, calls = inversion.latents, inversion.calls
    if latents.ndim != 4 or len(latents) != calls + 1 or latents.dtype not in (torch.float32, torch.float64):
        return [f"its latents are {_described(latents)}; ({calls + 1}, C, H, W) of float32 or float64 "
                f"belongs to {calls} calls of the network"]
    wrong = []
    if (inversion.eta > 0) != (inversion.method in WITH_ETA):
        wrong.append(f"eta is {inversion.eta}, of the method {inversion.method}")
    for name, methods, shape in (("null_context", ("null-text",), (calls, None, None)),
                                 ("offsets", OFFSET, (calls, *latents.shape[1:]))):
        tensor = getattr(inversion, name)
        if (tensor is None) != (inversion.method not in methods):
            presence = "missing" if tensor is None else "there"
            wrong.append(f"{name}: {presence}, though the method is {inversion.method}")
        elif tensor is not None and not _like(tensor, shape):
            wrong.append(f"its {name} are {_described(tensor)}, which is not of {calls} calls")
    if inversion.queries is not None and inversion.method not in FOLLOW:
        wrong.append(f"it is traced, though its method is {inversion.method}")
    queries = inversion.queries or {}
    tensors = {"latents": latents, "null_context": inversion.null_context, "offsets": inversion.offsets,
               **queries}
    for name, tensor in tensors.items():
        if name in queries and not _like(tensor, (calls, None, None)):
            wrong.append(f"{name} is {_described(tensor)}, which is not of {calls} calls")
        elif tensor is not None and tensor.dtype in FLOATS and tensor.numel() \
                and not torch.stack(tensor.aminmax()).isfinite().all():
            wrong.append(f"{name}: values that are not finite")
    return wrong


def _like(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return (tensor.dtype in FLOATS and tensor.ndim == len(shape) and tensor.numel() > 0
            and all(b in (None, a) for a, b in zip(tensor.shape, shape)))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"


def _check_for(model: Model, inversion: Inversion) -> None:
    """Raises UsageError unless the tensors beside the latents have the shapes that the model's have."""
    text_shape = model.length, model.unet.text_width
    if inversion.null_context is not None and inversion.null_context.shape[1:] != text_shape:
        raise UsageError(f"null_context is {_described(inversion.null_context)}; this model's text has "
                         f"{text_shape} a step")
    if inversion.queries is not None:
        shapes = {name: x.shape[1:] for name, x in inversion.queries.items()}
        expected = qk_shapes(model, *inversion.latents.shape[2:])
        if shapes != {f"{site}.{part}": torch.Size(shape) for site, qk in expected.items()
                      for part, shape in zip("qk", qk)}:
            raise UsageError("its queries are not those of this model at its size: trace it again")


def _picture(file: str | Path, text: Any, latents: Tensor) -> Image.Image | None:
    """The picture that an inversion's header holds, of its latents' shape. Raises UsageError."""
    if text is None:
        return None
    try:
        image = from_base64(text)
        height, width = latents.shape[2:]
        shrink = image.height // height
        fits = 1 <= shrink <= SHRINK and image.size == (shrink * width, shrink * height)
        if image.format != "PNG" or not fits:
            raise ValueError(f"a {image.format} of {image.width} x {image.height} beside latents of {width} "
                             f"x {height}")
        image.load()
    except (ArithmeticError, OSError, SyntaxError, TypeError, ValueError,
            Image.DecompressionBombError) as error:
        raise UsageError(f"{file}: its picture is damaged ({error}). Invert the picture again") from None
    return image

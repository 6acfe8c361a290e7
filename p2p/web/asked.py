"""What the page asks for: its controls as they arrive, from anybody, checked and bounded."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from p2p.errors import UsageError
from p2p.image import from_base64
from p2p.models.network import Network
from p2p.request.checks import choice, flag, kind, whole
from p2p.request.source import METHODS
from p2p.request.start import check_seed
from p2p.weights.untrusted import brief

STEPS = 100              # most that the page asks for
GUIDANCE = 30.0
WEIGHTS = (-4.0, 6.0)    # of a fader
LETTERS = 2_000          # of a prompt, of any other text, and of a word
WORDS = 200              # faders
FILE = 20 * 2**20        # bytes of an uploaded picture
MASK = 2**20             # characters of a painted mask
PIXELS = 2**21           # of one
THIRDS = {"first third": (0.0, 1 / 3), "middle third": (1 / 3, 2 / 3), "last third": (2 / 3, 1.0)}


@dataclass(frozen=True)
class Asked:
    """The values of the controls, in their order on the page; with the uploaded picture, if there is one,
    they say which pictures are asked for."""

    source: str
    target: str = ""                               # empty: the source's prompt
    weights: tuple[tuple[str, float], ...] = ()    # of faders that were moved
    mask: str = ""                                 # a painted one: PNG in base64
    usual: bool = True                             # windows by what the edit does
    cross: float = 0.8
    self_: float = 0.4
    guidance: float | None = None
    steps: int = 20
    seed: int = 0
    negative: str = ""
    layers: tuple[str, ...] = ()
    blend: str = ""
    method: str = "edit-friendly"                  # of an uploaded picture
    photo: str = ""                                # its name; empty: none was uploaded

    @property
    def edits(self) -> bool:
        return bool(self.weights) or self.target not in ("", self.source)


def read(unet: Network, source: Any, target: Any, hand: Any, usual: Any, cross: Any, self_: Any,
         guidance: Any, steps: Any, seed: Any, negative: Any, layers: Any, blend: Any, method: Any) -> Asked:
    """The controls' values as they came. hand: {"weights": {word: number}, "mask": PNG in base64, "photo":
    name}. Raises UsageError for those that no control gives."""
    hand = {} if hand is None or hand == "" else kind("faders and mask", hand, dict)
    names, choices = [] if layers is None else kind("layers", layers, list), layer_choices(unet)
    if len(names) > len(choices):
        raise UsageError(f"{len(names):,} layers: this model has {len(choices)} to choose from")
    source = text("the prompt", source)
    if not source:
        raise UsageError('type what the picture should show: "a cat on grass"')
    return Asked(
        source, text("the edited prompt", target), _weights(hand.get("weights")), _mask(hand.get("mask")),
        flag("windows", usual), _number("cross window", cross, 0, 1), _number("self window", self_, 0, 1),
        _number("guidance", guidance, 0, GUIDANCE) or 1.0, whole("steps", _integer(steps), most=STEPS),
        check_seed(_seed(seed)), text("the negative prompt", negative),
        tuple(choice("layers", name, choices) for name in names), text("blend", blend),
        choice("method", method, METHODS), text("the picture's name", hand.get("photo")))


def layer_choices(unet: Network) -> dict[str, str | tuple[float, float]]:
    """Parts of the network by the name that the page has for them, as `Edit.layers` takes them."""
    sites = unet.text_sites()
    return {part: part for part in ("down", "mid", "up") if any(part in site for site in sites)} | THIRDS


def picture(url: Any) -> Image.Image:
    """An uploaded picture, from a data URL. Raises UsageError."""
    if len(kind("picture", url, str)) > FILE * 4 // 3 + 100:
        raise UsageError(f"the picture's file is larger than {FILE >> 20} MiB; make it smaller")
    return from_base64(url.partition(",")[2], "the uploaded file")


def mask_picture(mask: str) -> Image.Image | None:
    painted = from_base64(mask, "the painted mask") if mask else None
    if painted is not None and painted.width * painted.height > PIXELS:
        raise UsageError(f"a mask of {painted.width} x {painted.height}; this page paints smaller ones")
    return painted


def text(name: str, value: Any) -> str:
    """What a text field holds. Raises UsageError where that is more than a page takes."""
    letters = kind(name, "" if value is None else value, str).strip()
    if len(letters) > LETTERS:
        raise UsageError(f"{name} has {len(letters):,} characters, {brief(letters)}: this page takes "
                         f"{LETTERS:,}; text towers read a few hundred")
    if any("\ud800" <= letter <= "\udfff" for letter in letters):
        raise UsageError(f"{name} holds half of a letter (a lone surrogate); type it again")
    return letters


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise UsageError(f"{name} must lie between {least:g} and {most:g}, not {brief(value)}")
    return float(value)


def _integer(value: Any) -> Any:
    """A whole number that JSON wrote as 20.0."""
    whole_float = isinstance(value, float) and math.isfinite(value) and value == int(value)
    return int(value) if whole_float else value


def _seed(value: Any) -> Any:
    """As it is typed."""
    typed = isinstance(value, str) and len(value) <= 20 and value.strip().removeprefix("-").isdecimal()
    return int(value) if typed else _integer(value)


def _weights(value: Any) -> tuple[tuple[str, float], ...]:
    weights = kind("faders", {} if value is None else value, Mapping)
    if len(weights) > WORDS:
        raise UsageError(f"{len(weights):,} faders: this page has {WORDS}")
    return tuple((text("a fader's word", word), x) for word, w in weights.items()
                 if (x := _number(f"the fader of {brief(word)}", w, *WEIGHTS)) != 1)


def _mask(value: Any) -> str:
    mask = kind("mask", "" if value is None else value, str)
    if len(mask) > MASK:
        raise UsageError(f"a mask of {len(mask):,} characters; this page paints smaller ones")
    return mask

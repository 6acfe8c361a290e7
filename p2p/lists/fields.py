"""The fields of a line of a list, and the values that each may have."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from numbers import Real
from typing import Any

from p2p.blend import FEATHER, LocalBlend
from p2p.editors import find_editor
from p2p.edits import MODES
from p2p.errors import UsageError
from p2p.image import FITS, from_base64
from p2p.request import layers
from p2p.request.editing import proximal_by
from p2p.request.schedules import SAMPLERS
from p2p.request.source import METHODS
from p2p.weights.untrusted import brief

# Conversion to the library's type (ValueError or TypeError if it fails), and what is valid, in words.
Check = tuple[Callable[[Any], Any], str]
BELOW_1 = math.nextafter(1, 0)
EXACT = 2**53   # whole numbers up to here survive a table that holds floats


def checked(name: str, value: Any, table: Mapping[str, Check] | None = None) -> Any:
    """Converts the value of a field to the library's type: 1.0 is a whole number, true is not a number.
    Raises UsageError."""
    convert, wanted = (FIELDS if table is None else table)[name]
    try:
        return convert(value)
    except UsageError as error:
        said = str(error)   # by a check that all of the package shares, often with the name
        raise UsageError(said if said.startswith(f"{name}: ") else f"{name}: {said}") from None
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"{name}: {wanted}, not {brief(value)}") from None


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError


def _text(value: Any) -> str:
    _require(isinstance(value, str))
    value.encode()   # half a surrogate pair is not text
    return value


def _filled(value: Any) -> str:
    _require(bool(_text(value)) and "\0" not in value)
    return value


def _flag(value: Any) -> bool:
    _require(isinstance(value, bool))
    return value


def _number(low: float = -math.inf, high: float = math.inf) -> Callable[[Any], float]:
    def convert(value: Any) -> float:
        _require(isinstance(value, Real) and not isinstance(value, bool))
        _require(math.isfinite(value) and low <= value <= high)
        return float(value)
    return convert


def _whole(low: float = -math.inf, high: float = math.inf) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        as_float = isinstance(value, float) and value.is_integer() and abs(value) <= EXACT
        _require((isinstance(value, int) and not isinstance(value, bool)) or as_float)
        _require(low <= value <= high)
        return int(value)
    return convert


def _one_of(*known: str) -> Check:
    def convert(value: Any) -> str:
        _require(isinstance(value, str) and value in known)
        return value
    return convert, f"one of {', '.join(known)}"


def _pair(one: Callable[[Any], Any], other: Callable[[Any], Any] | None = None) -> Callable[[Any], tuple]:
    def convert(value: Any) -> tuple[Any, Any]:
        _require(isinstance(value, (list, tuple)) and len(value) == 2)
        return one(value[0]), (other or one)(value[1])
    return convert


def _mapping(convert: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def each(value: Any) -> dict[str, Any]:
        _require(isinstance(value, Mapping))
        return {_filled(k): convert(v) for k, v in value.items()}
    return each


def _either(one: Callable[[Any], Any], kind: Any, other: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`one` for values of that kind (a type, or a tuple of types), else `other`."""
    return lambda value: one(value) if isinstance(value, kind) else other(value)


def _window(value: Any) -> tuple[float, float]:
    low, high = _pair(_number(0, 1))(value)
    _require(low <= high)
    return low, high


def _words(value: Any) -> tuple[str, ...]:
    _require(isinstance(value, (list, tuple)) and bool(value))
    return tuple(map(_filled, value))


def _blend(value: Any) -> LocalBlend:
    _require(isinstance(value, Mapping))
    if unknown := sorted(set(value) - set(BLEND)):
        raise UsageError(f"{', '.join(map(brief, unknown))}: no field of it; known: {', '.join(BLEND)}")
    return LocalBlend(**{name: checked(name, each, BLEND) for name, each in value.items()})


def _timesteps(value: Any) -> list[int]:
    _require(isinstance(value, (list, tuple)))
    return [_whole(0)(each) for each in value]


def _prompts(value: Any) -> list[str]:
    _require(isinstance(value, (list, tuple)) and bool(value))
    return [_text(each) for each in value]


def _layers(value: Any) -> Any:
    layers.check(value)
    return value


def _editor(value: Any) -> Any:
    """Checks an editor's name, or an object with its name and fields; `find_editor` makes an editor of it."""
    _require(isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("name"), str)))
    editor = find_editor(value)
    for f in fields(editor):
        if isinstance(f.default, Real):
            number = (_number(), "one finite number")
            kind = (_flag, "true or false") if isinstance(f.default, bool) else number
            checked(f.name, getattr(editor, f.name), {f.name: kind})
    return value


def _guidance(value: Any) -> tuple[str, float]:
    proximal = _pair(_text, _number(0, 1))(value)
    proximal_by(proximal)
    return proximal


_WINDOW = _either(_window, (list, tuple), _number(0, 1))
_WORDS = _either(_filled, str, _words)
_SHARE = "one share of the steps from 0 to 1, or a pair (start, end) of them"
_SIDES = (_pair(_either(_filled, str, lambda v: () if v in ([], ()) else _words(v))),
          "a pair (of the source, of the target), each a word or a list of words")

BLEND: dict[str, Check] = {
    **dict.fromkeys(("words", "substruct", "rivals"), _SIDES),
    "threshold": (_either(_pair(_number(0, BELOW_1)), (list, tuple), _number(0, BELOW_1)),
                  "one number from 0 to below 1, or two of them"),
    "start": (_number(0, 1), "one share of the steps from 0 to 1"),
    "level": (_whole(1), "one number, whole and from 1"),
    "keep": _one_of("stored", "sampled"),
    "middle": (_flag, "true or false"),
    "feather": (_number(0, FEATHER), f"one number of latents from 0 to {FEATHER}"),
    "mask": (lambda value: from_base64(_text(value)), "a picture in base64"),
}
FIELDS: dict[str, Check] = {
    "id": (_either(_text, str, _whole()), "a text or a whole number"),
    "source": (_text, "a prompt"),
    "image": (_filled, "the path of a picture"),
    # how it is sampled
    "steps": (_whole(1), "one number, whole and from 1"),
    "guidance_scale": (_number(), "one finite number"),
    "seed": (_whole(-2**63, 2**64 - 1), "one number, whole and from -2^63 to 2^64 - 1"),
    "eta": (_number(0, 1), "one number from 0 to 1"),
    "sampler": _one_of(*SAMPLERS),
    "timestep_spacing": _one_of("leading", "trailing", "linspace", "karras"),
    "timesteps": (_timesteps, "a list of whole numbers"),
    **dict.fromkeys(("height", "width"), (_whole(1), "one number of pixels")),
    # how a picture is inverted
    "method": _one_of(*METHODS),
    "skip": (_whole(0), "one number of steps, whole and from 0"),
    "inversion_guidance": (_number(), "one finite number"),
    "inner_steps": (_whole(1), "one number, whole and from 1"),
    "final_alpha": (_number(math.nextafter(0, 1), 1), "one number above 0, at most 1"),
    **dict.fromkeys(("gamma", "control", "control_steps"), (_number(0, 1), "one number from 0 to 1")),
    "n_avg": (_whole(1), "one number of noises, whole and from 1"),
    "n_min": (_whole(0), "one number of steps, whole and from 0"),
    "fit": _one_of(*FITS, "square"),
    "path": _one_of("inverted", "resampled"),
    # what else `edit` takes
    "editor": (_editor, "an editor's name, or an object with its name and fields"),
    "negative_prompt": (_either(_text, str, _prompts), "a prompt, or a list of one for each row"),
    "proximal": (_guidance, 'a pair such as ["l0", 0.7]'),
    # the fields of `Edit`
    "prompt": (_text, "a prompt"),
    "mode": _one_of(*MODES),
    "cross_replace_steps": (_either(_mapping(_WINDOW), Mapping, _WINDOW),
                            f"{_SHARE}, for all words or for each"),
    "self_replace_steps": (_WINDOW, _SHARE),
    "windows_over": _one_of("run", "schedule"),
    "self_max_tokens": (_whole(0), "one number of pixels"),
    "equalizer": (_mapping(_number(-1e30, 1e30)), 'an object {"word": weight}, below 1e30'),
    "renormalise": (_flag, "true or false"),
    "swap": (_mapping(_filled), 'an object {"word of the source": "word of the target"}'),
    "local_blend": (_blend, "an object with the fields of LocalBlend"),
    "scope": (_WORDS, "a word or a list of words"),
    "aligner": _one_of("exact", "official"),
    "emphasis": _one_of("attention", "embedding"),
    "layers": (_layers, layers.FORM),
}

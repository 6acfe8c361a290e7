"""Checks of single arguments: each function returns the value as a plain Python type, which JSON can hold, or
raises a UsageError that names the argument."""
from __future__ import annotations

import os
from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from p2p.errors import UsageError
from p2p.weights.untrusted import brief

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def kind(name: str, value: T, *kinds: type) -> T:
    if not isinstance(value, kinds):
        raise UsageError(f"{name} must be of the type {' or '.join(k.__name__ for k in kinds)}, not "
                         f"{brief(value)}")
    return value


def tensor(name: str, value: Any, *shape: int | str) -> Tensor:
    """Checks for floating-point numbers of that shape: sizes, and names of those that may be any but 0."""
    from torch import Tensor  # here: the command line checks its arguments before torch is loaded

    if not isinstance(value, Tensor):
        given, fits = brief(value), False
    elif why := unreadable(value):
        given, fits = f"one of {value.dtype} ({why})", False
    else:
        given, fits = f"{value.dtype} of {tuple(value.shape)}", value.is_floating_point()
    if not fits or value.ndim != len(shape) or not all(
            n == wanted if isinstance(wanted, int) else n for n, wanted in zip(value.shape, shape)):
        raise UsageError(f"{name} must be a tensor of floating-point numbers ({', '.join(map(str, shape))}), "
                         f"not {given}")
    return value


def unreadable(x: Tensor) -> str | None:
    """Why nothing computes with the numbers of a tensor; None where they are real, dense and there."""
    if x.is_nested:
        return "nested"
    if x.is_meta:
        return "on meta, without values"
    if x.is_complex() or not str(x.layout).endswith("strided"):
        return f"complex, {x.layout}" if x.is_complex() else str(x.layout)
    return "fp8" if x.is_floating_point() and x.dtype.itemsize == 1 else None


def place(name: str, value: object) -> Path:
    """A path that a file system may have."""
    try:
        known = isinstance(value, (str, Path)) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        known = False
    if not known:
        raise UsageError(f"{name} must be a path, not {brief(value)}")
    return Path(value)


def whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    above = most is not None and isinstance(value, Integral) and value > most
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least or above:
        raise UsageError(f"{name} must be a whole number from "
                         f"{least}{'' if most is None else f' to {most}'}, not {brief(value)}")
    return int(value)


def finite(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not abs(value) < 1e30:
        raise UsageError(f"{name} must be a finite number (below 1e30), not {brief(value)}")
    return float(value)


def within(name: str, value: object, most: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= most:
        raise UsageError(f"{name} must lie between 0 and {most}, not {brief(value)}")
    return float(value)


def share(name: str, value: object) -> float:
    return within(name, value, 1)


def choice(name: str, value: object, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{name} {brief(value)} is not known; known: {', '.join(known)}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, not {brief(value)}")
    return value

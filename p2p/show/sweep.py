"""One edit under many settings: all variants in one batch, beside a source that is computed once."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from p2p.edits import Edit, Window, check, window
from p2p.errors import UsageError
from p2p.model import Model
from p2p.request import layers
from p2p.request.checks import finite
from p2p.request.loading import find_model
from p2p.request.memory import check_run
from p2p.request.source import Inversion
from p2p.request.start import check_seed
from p2p.run import Result, edit
from p2p.show.pictures import table
from p2p.weights.untrusted import brief

TOLD_APART = 15   # digits by which values are, and files of their pictures
NAMES = {"cross": "cross_replace_steps", "self": "self_replace_steps"}


class Sweep(NamedTuple):
    # the source at the left; columns: values of the first setting; rows: values of the second (a sweep over
    # seeds only has a column for each)
    table: Image.Image
    runs: list[Result]                       # one a seed; its targets in the order of `variants`
    variants: list[dict[str, Window]]        # what each target was run with


def variant(base: Edit, name: str, value: Window) -> Edit:
    """The edit with one setting changed: "cross", "self", or "weight:WORD"."""
    if name == "cross" and isinstance(base.cross_replace_steps, Mapping):
        return replace(base, cross_replace_steps={**base.cross_replace_steps, "default_": value})
    if name in NAMES:
        return replace(base, **{NAMES[name]: value})
    if name == "layers":
        return replace(base, layers=value)
    word = name.removeprefix("weight:")
    if word and word != name:
        return replace(base, equalizer={**(base.equalizer or {}), word: value})
    raise UsageError(f'a sweep over "{name}" is not known; known: cross, self, weight:WORD, layers, seed')


def shown(value: Any, digits: int = 6) -> str:
    """A number, a window or layers, as the command line takes them."""
    if value is None or isinstance(value, str):
        return value or "all"
    if isinstance(value, Mapping):
        return " ".join(f"{kind}={shown(each, digits)}" for kind, each in value.items())
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    if all(isinstance(v, Real) for v in numbers):
        return ":".join(str(v) if isinstance(v, Integral) else f"{v:.{digits}g}" for v in numbers)
    return "+".join(shown(each, digits) for each in numbers)


def _value(name: str, value: Any) -> int | Window:
    """Checks a value: a number, or for windows also a pair (start, end). Seeds stay exact integers."""
    if name in NAMES and isinstance(value, (tuple, list)):
        return window(value, name)
    if name == "layers":
        if value is not None:
            layers.check(value)
        return value
    number = finite(f"a value of {name}", value)
    return int(value) if isinstance(value, Integral) else number


def _checked(over: Mapping[str, Sequence[Any]], inverted: bool, seed: int) -> dict[str, list[Any]]:
    """The values of each setting. inverted: the source has its noise. Raises UsageError."""
    over = {name: [_value(name, value) for value in values] for name, values in over.items()}
    for name, values in over.items():
        if len({shown(value, TOLD_APART) for value in values}) < len(values):
            raise UsageError(f"a sweep over {name} names a value twice: {', '.join(map(shown, values))}")
    if not all(float(s).is_integer() for s in over.get("seed", ())):
        raise UsageError(f"a sweep over seeds takes whole numbers, not {', '.join(map(shown, over['seed']))}")
    for value in over.get("seed", ()):
        check_seed(int(value))
    if "seed" in over and inverted:
        raise UsageError("a sweep over seeds starts from a prompt: an inverted or traced source has its "
                         "noise")
    if "seed" in over and seed != 0:
        raise UsageError("seed: the sweep is over seeds; leave it out")
    return over


def sweep(model: Model | str | Path, source: str | Inversion | Path, target: str | Edit,
          over: Mapping[str, Sequence[Window]], *, seed: int = 0, **sampling: Any) -> Sweep:
    """Runs an edit with one or two settings varied, and arranges the pictures in a labelled table.

    over: one or two of {"cross" | "self": shares or windows (start, end)}, {"weight:WORD": numbers},
    {"layers": as `Edit` has them} and {"seed": numbers}: the first along the columns, the second along the
    rows (seeds always along the rows, beside another setting). Without seeds everything is one batch with one
    source.
    sampling: as in `edit`. Raises as `edit` does.
    """
    model = find_model(model)
    over, variants, edits = edits_of(model, source, target, over, seed)
    seeds = [int(s) for s in over["seed"]] if "seed" in over else [check_seed(seed)]
    runs = [edit(model, source, edits, seed=s, **sampling) for s in seeds]
    return Sweep(_table(over, runs), runs, variants)


def edits_of(model: Model, source: str | Inversion | Path, target: str | Edit,
             over: Mapping[str, Sequence[Window]], seed: int = 0
             ) -> tuple[dict[str, list[Any]], list[dict[str, Window]], list[Edit]]:
    """The checked values of each setting, what each target of a sweep is run with, and the targets. Raises
    UsageError."""
    if not isinstance(over, Mapping) or not all(
            isinstance(name, str) and isinstance(values, Sequence) and not isinstance(values, str)
            for name, values in over.items()):
        raise UsageError(f"over: settings and lists of their values, {{name: [value, ...]}}, are needed, not "
                         f"{brief(over)}")
    if not 1 <= len(over) <= 2 or not all(len(v) for v in over.values()):
        raise UsageError("a sweep varies one or two settings, with at least one value each")
    count = prod(len(values) for name, values in over.items() if name != "seed")
    # before there is an edit for each: what the smallest pictures would take
    check_run(model, 1 + count, model.latent_shape(model.unit, model.unit), 1, targets=count)
    over = _checked(over, isinstance(source, (Inversion, Path)), seed)
    base = target if isinstance(target, Edit) else Edit(target)
    check(base)
    cross = base.cross_replace_steps
    own = {"layers": base.layers, "self": base.self_replace_steps,
           "cross": cross.get("default_") if isinstance(cross, Mapping) else cross,
           **{f"weight:{word}": c for word, c in (base.equalizer or {}).items()}}
    if both := [name for name in over if own.get(name) is not None]:
        names = " and ".join(both)
        raise UsageError(f"{names}: the sweep is over {names}; leave it out of the edit")
    variants: list[dict[str, Window]] = [{}]
    for name in reversed([n for n in over if n != "seed"]):   # the first named varies fastest
        variants = [{**v, name: value} for v in variants for value in over[name]]
    edits = []
    for chosen in variants:
        e = base
        for name, value in chosen.items():
            e = variant(e, name, value)
        edits.append(e)
    return over, variants, edits


def _table(over: Mapping[str, Sequence[Window]], runs: Sequence[Result]) -> Image.Image:
    settings = [n for n in over if n != "seed"]
    if not settings:
        return table([[r.images[0] for r in runs], [r.images[1] for r in runs]],
                     list(map(shown, over["seed"])), ["source", "edit"], corner="seed")
    column, row = settings[0], next((n for n in over if n != settings[0]), None)
    width = len(over[column])
    rows = [[r.images[0], *r.images[k:k + width]] for r in runs for k in range(1, len(r.images), width)]
    labels = [""] if row is None else list(map(shown, over[row]))
    heads = ["source", *map(shown, over[column])]
    return table(rows, heads, labels, corner=column if row is None else f"{row} \\ {column}")

"""Parses the values of the command line's options. Nothing here imports torch, which takes seconds: mistakes
are reported immediately."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from p2p.errors import UsageError

Window = float | tuple[float, float]
ALL = "default_"   # all words of a prompt, as `Edit.cross_replace_steps` names them


def options_of(*adders: Callable[[argparse.ArgumentParser], None]) -> tuple[str, ...]:
    """The attributes of the options that these functions add to a parser."""
    ap = argparse.ArgumentParser()
    for add in adders:
        add(ap)
    return tuple(vars(ap.parse_args([])))


def given_options(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The options among these that were given, even as 0."""
    return [f"--{n.strip('_').replace('_', '-')}" for n in names if (value := getattr(args, n)) is not None
            and value is not False]


def refuse(args: argparse.Namespace, context: str, names: Iterable[str]) -> None:
    """Raises UsageError for options that would be ignored."""
    if present := given_options(args, names):
        raise UsageError(f"{', '.join(present)}: not with {context}")


def prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of an edit: the source's, unless an inversion's file has it, and the targets'."""
    return [prompt for prompt in (args.source, *args.targets) if prompt is not None]


def number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option}: {text!r} is not a number") from None


def layers(text: str) -> list[str | tuple[float, float]]:
    """NAME|FIRST:END, several joined by +"""
    return [window(item, "--layers") if ":" in item else item
            for item in text.split("+")]   # type: ignore[misc]


def _layers(items: list[str]) -> Any:
    """Of --layers: for both kinds of attention, or by kind."""
    parts = [item.rpartition("=") for item in items]
    kinds = [kind for kind, _, _ in parts]
    if kinds == [""]:
        return layers(items[0])
    if not set(kinds) <= {"cross", "self"}:
        raise UsageError(f"--layers {items[kinds.index('')] if '' in kinds else items[0]}: expected LAYERS "
                         "once, or cross=LAYERS and self=LAYERS")
    return once([(kind, layers(value)) for kind, _, value in parts], "--layers")


def add_on(text: str, convert: Callable[[str], Any]) -> tuple[str, Any]:
    """FILE or FILE:VALUE; a file that exists under the whole text, or a VALUE that is none, leaves it all to
    the path."""
    path, colon, value = text.rpartition(":")
    try:
        return (text, None) if not colon or Path(text).exists() else (path, convert(value))
    except ValueError:
        return text, None


def loras(args: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    return tuple(add_on(text, float) for text in args.lora or ())


def embeddings(args: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    return tuple(add_on(text, str) for text in args.embedding or ())


def negative(args: argparse.Namespace) -> str | list[str] | None:
    """One prompt for all rows, or one for each."""
    return args.negative[0] if args.negative and len(args.negative) == 1 else args.negative


def timesteps(args: argparse.Namespace) -> list[int] | None:
    """Those of --timesteps."""
    try:
        return None if args.timesteps is None else [int(t) for t in args.timesteps.split(",")]
    except ValueError:
        raise UsageError(f"--timesteps {args.timesteps}: expected whole numbers, such as "
                         "999,749,499,249") from None


def window(text: str, option: str) -> Window:
    """X or START:END"""
    parts = [number(p, option) for p in text.split(":", 1)]
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def cross(item: str, option: str = "--cross") -> tuple[str, Window]:
    """[WORD=]END|START:END  ->  the word (`ALL` where none is named) and its window"""
    word, named, value = item.rpartition("=")
    if named and not word:
        raise UsageError(f"{option} {item}: expected END or START:END, or WORD= before it")
    return word or ALL, window(value, f"{option} {item}" if word else option)


def cross_of_all(item: str, option: str, why: str) -> Window:
    """END|START:END, without words. Raises UsageError."""
    word, bounds = cross(item, option)
    if word != ALL:
        raise UsageError(f"{option}: a window of {word!r} alone; {why}")
    return bounds


def windows_of_all(args: argparse.Namespace) -> dict[str, Window]:
    """--cross and --self of `eval`, where given."""
    windows = {}
    if args.cross is not None:
        windows["cross"] = cross_of_all(args.cross, "--cross",
                                        "the prompts of a benchmark have other words each")
    if args.self_ is not None:
        windows["self_"] = window(args.self_, "--self")
    return windows


def once(items: list[tuple[str, Any]], option: str) -> dict[str, Any]:
    """The items as a dict. Raises UsageError for a name with two values, of which one would be ignored."""
    for name, _ in items:
        if [n for n, _ in items].count(name) > 1:
            raise UsageError(f"{option}: given more than once for "
                             f"{'all words' if name == ALL else repr(name)}")
    return dict(items)


def pair(item: str, mark: str, option: str, form: str) -> tuple[str, str]:
    left, separator, right = item.partition(mark)
    if not (left and separator and right):
        raise UsageError(f"{option} {item!r}: expected {form}")
    return left, right


def sides(items: list[str], option: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """OLD:NEW, WORD for both prompts, OLD: or :NEW for one of them.

    -> words of the source, words of the target
    """
    split = [item.partition(":") if ":" in item else (item, ":", item) for item in items]
    if bad := [item for item, (old, _, new) in zip(items, split) if not (old or new) or ":" in new]:
        raise UsageError(f"{option} {bad[0]!r}: expected OLD:NEW, or a word of one prompt alone, as OLD: or "
                         ":NEW")
    return tuple(old for old, _, _ in split if old), tuple(new for _, _, new in split if new)


def weight(item: str) -> tuple[str, float]:
    word, equals, value = item.rpartition("=")
    if not equals or not word:
        raise UsageError(f"--weight {item!r}: expected WORD=NUMBER")
    return word, number(value, f"--weight {item}")


def over(items: list[str]) -> dict[str, list[Window]]:
    """NAME=VALUE,VALUE,... of a sweep"""
    named = [pair(item, "=", "--over", "NAME=VALUE,VALUE,...") for item in items]
    why = "give that with --cross, and values for all other words here"
    read = {"layers": layers, "seed": _seed}
    return once([(name, [read[name](v) if name in read else cross_of_all(v, f"--over {item}", why)
                         for v in values.split(",")])
                 for item, (name, values) in zip(items, named)], "--over")


def _seed(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"--over seed: seeds are whole numbers, not {value!r}") from None


def proximal(args: argparse.Namespace) -> tuple[str, float] | None:
    """NORM[:QUANTILE]"""
    if args.proximal is None:
        return None
    norm, _, quantile = args.proximal.partition(":")
    return norm, number(quantile or "0.7", "--proximal")


def changed_by_target(args: argparse.Namespace, n: int) -> list[dict[str, Any]]:
    """`changed` of each of n targets: for all, and after --for N for target N, which takes its place. Raises
    UsageError."""
    sections = args.for_ or {}
    if beyond := [number for number in sections if not 1 <= number <= n]:
        raise UsageError(f"--for {beyond[0]}: there {'is' if n == 1 else 'are'} {n} target"
                         f"{'' if n == 1 else 's'}, counted from 1")
    shared, out = given(args), []
    for number in range(1, n + 1):
        own = given(sections[number]) if number in sections else {}
        if "local_blend" in shared and "local_blend" in own:
            own["local_blend"] = shared["local_blend"] | own["local_blend"]
        out.append(shared | own)
    return out


def check_blends(each: Iterable[dict[str, Any]]) -> None:
    """Raises UsageError for settings of an edit whose local blend has no words."""
    for settings in each:
        blend = settings.get("local_blend")
        if blend and not {"words", "mask"} & set(blend) and not settings.get("scope"):
            raise UsageError("the options of --blend need --blend, --blend-mask or --scope")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Edit` that the options set; a local blend is a dict of those that they set, its mask a
    path. Raises UsageError."""
    settings: dict[str, Any] = {}
    if args.mode is not None:
        settings["mode"] = args.mode
    if args.renormalise:
        settings["renormalise"] = True
    if args.cross:
        windows = once([cross(item) for item in args.cross], "--cross")
        settings["cross_replace_steps"] = windows[ALL] if list(windows) == [ALL] else windows
    if args.self_ is not None:
        settings["self_replace_steps"] = window(args.self_, "--self")
    for name in ("windows_over", "aligner", "emphasis"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if args.weight:
        settings["equalizer"] = once([weight(w) for w in args.weight], "--weight")
    if args.swap:
        settings["swap"] = once([pair(p, "=", "--swap", "OLD=NEW") for p in args.swap], "--swap")
    if args.layers:
        settings["layers"] = _layers(args.layers)
    if args.scope:
        settings["scope"] = tuple(args.scope)
    if blend := _blend(args):
        settings["local_blend"] = blend
    return settings


def _blend(args: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field, items, option in (("words", args.blend, "--blend"),
                                 ("substruct", args.blend_without, "--blend-without")):
        if items:
            out[field] = sides(items, option)
    for field in ("mask", "start", "level", "keep", "middle", "feather"):
        if getattr(args, f"blend_{field}") is not None:
            out[field] = getattr(args, f"blend_{field}")
    if args.blend_threshold is not None:
        out["threshold"] = window(args.blend_threshold, "--blend-threshold")
    return out

"""Options of the command line -> what the library takes."""
from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import p2p
from p2p.image import open_picture
from p2p.request.loading import find_device
from p2p.weights.untrusted import printable

MAPS = 32 * 32   # recorded where an option needs maps: those of at most so many pixels


def device(args: argparse.Namespace) -> torch.device:
    return find_device(args.device, "--device")


def load(args: argparse.Namespace) -> p2p.Model:
    return p2p.load(**loading(args), device=device(args))


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `p2p.load`, without the device."""
    return dict(source="emoji" if args.model is None else args.model, family=args.family, prediction=args.prediction,
                dtype=getattr(torch, args.dtype) if args.dtype else None, vae=args.vae, text=args.text, ema=args.ema,
                clip_skip=args.clip_skip, zero_snr=args.zero_snr, **memory(args))


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """How the model runs: arguments of `p2p.load` that change no picture beyond rounding (--tile: beyond its seams)."""
    return dict(compile=args.compile, held=torch.float16 if args.half_weights else None, offload=args.offload, tile=args.tile)


def load_for_sampling(args: argparse.Namespace) -> tuple[p2p.Model, dict[str, Any]]:
    """The model, and what `edit` and `generate` are told besides; a seed is drawn, and said, where none is given."""
    seed = args.seed
    if seed is None:
        seed = secrets.randbelow(2**31)
        print(f"seed {seed}", file=sys.stderr)
    return load(args), dict(steps=50 if args.steps is None else args.steps, guidance_scale=args.cfg, seed=seed,
                            eta=args.eta, height=args.height, width=args.width)


def say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def refuse(args: argparse.Namespace, what: str, *names: str) -> None:
    """Options that would be ignored are an error."""
    given = [f"--{n.strip('_').replace('_', '-')}" for n in names
             if (value := getattr(args, n)) is not None and value is not False]   # 0 is given
    if given:
        raise p2p.UsageError(f"{', '.join(given)}: not with {what}")


def proximal(args: argparse.Namespace) -> tuple[str, float] | None:
    if args.proximal is None:
        return None
    norm, _, quantile = args.proximal.partition(":")
    return norm, number(quantile or "0.7", "--proximal")


def edit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Edit` that the options of `edit`, `maps` and `sweep` name."""
    given: dict[str, Any] = dict(mode=args.mode, aligner=args.aligner or "exact", renormalise=args.renormalise)
    if args.cross:
        given["cross_replace_steps"] = cross(args.cross)
    if args.self_ is not None:
        given["self_replace_steps"] = window(args.self_, "--self")
    if args.windows_over is not None:
        given["windows_over"] = args.windows_over
    if args.weight:
        given["equalizer"] = once([weight(w) for w in args.weight], "--weight")
    if args.swap:
        given["swap"] = dict(pair(p, "=", "--swap", "OLD=NEW") for p in args.swap)
    if args.scope:
        given["scope"] = tuple(args.scope)
    blend: dict[str, Any] = {}
    for field, items, option in (("words", args.blend, "--blend"), ("substruct", args.blend_without, "--blend-without")):
        if items:
            blend[field] = sides(items, option)
    if args.blend_mask:
        blend["mask"] = open_picture(args.blend_mask)
    for field in ("start", "level", "keep", "middle"):
        if getattr(args, f"blend_{field}") is not None:
            blend[field] = getattr(args, f"blend_{field}")
    if args.blend_threshold is not None:
        blend["threshold"] = window(args.blend_threshold, "--blend-threshold")
    if blend:
        if not {"words", "mask"} & set(blend) and not args.scope:
            raise p2p.UsageError("the options of --blend need --blend, --blend-mask or --scope")
        given["local_blend"] = replace(p2p.LocalBlend(), **blend)
    return given


def record(args: argparse.Namespace) -> p2p.Record:
    return p2p.Record(text=MAPS) if args.report or args.leakage or args.scope else p2p.Record()


def number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise p2p.UsageError(f"{what}: {text!r} is not a number") from None


def window(text: str, what: str) -> float | tuple[float, float]:
    parts = [number(p, what) for p in text.split(":", 1)]
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def cross(items: list[str]) -> Any:
    named = [item.rpartition("=") for item in items]
    windows = once([(word or "default_", window(value, f"--cross {item}")) for item, (word, _, value) in zip(items, named)],
                   "--cross")
    if list(windows) == ["default_"]:
        return windows["default_"]
    return {"default_": 0.8} | windows


def once(items: list[tuple[str, Any]], option: str) -> dict[str, Any]:
    """Of two values for one name neither is dropped in silence."""
    for name, _ in items:
        if [n for n, _ in items].count(name) > 1:
            raise p2p.UsageError(f"{option}: given more than once for {'all words' if name == 'default_' else repr(name)}")
    return dict(items)


def pair(item: str, mark: str, option: str, form: str) -> tuple[str, str]:
    left, found, right = item.partition(mark)
    if not (left and found and right):
        raise p2p.UsageError(f"{option} {item!r}: expected {form}")
    return left, right


def sides(items: list[str], option: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """OLD:NEW, WORD for both prompts, OLD: or :NEW for one of them alone  ->  words of the source, words of the target"""
    split = [item.partition(":") if ":" in item else (item, ":", item) for item in items]
    if bad := [item for item, (old, _, new) in zip(items, split) if not (old or new) or ":" in new]:
        raise p2p.UsageError(f"{option} {bad[0]!r}: expected OLD:NEW, or a word of one prompt alone, as OLD: or :NEW")
    return tuple(old for old, _, _ in split if old), tuple(new for _, _, new in split if new)


def weight(item: str) -> tuple[str, float]:
    word, equals, value = item.rpartition("=")
    if not equals or not word:
        raise p2p.UsageError(f"--weight {item!r}: expected WORD=NUMBER")
    return word, number(value, f"--weight {item}")


def over(item: str) -> tuple[str, list[float]]:
    name, values = pair(item, "=", "--over", "NAME=VALUE,VALUE,...")
    return name, [number(v, f"--over {item}") for v in values.split(",")]

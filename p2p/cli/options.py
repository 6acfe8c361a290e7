"""From options of the command line to models and other arguments of the library."""
from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from typing import Any

import torch

import p2p
from p2p.blend import SOFT
from p2p.cli import values
from p2p.image import open_picture
from p2p.request.loading import find_device
from p2p.request.source import OWN
from p2p.show.pictures import difference
from p2p.weights.untrusted import printable


def device(args: argparse.Namespace) -> torch.device:
    return find_device(args.device, "--device")


def dtype(args: argparse.Namespace) -> torch.dtype | None:
    return getattr(torch, args.dtype) if args.dtype else None


def load(args: argparse.Namespace) -> p2p.Model:
    return p2p.load(**loading(args), device=device(args))


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `p2p.load`, without the device."""
    return dict(source="emoji" if args.model is None else args.model, family=args.family,
                prediction=args.prediction, dtype=dtype(args), vae=args.vae, text=args.text, ema=args.ema,
                clip_skip=args.clip_skip, zero_snr=args.zero_snr, lora=values.loras(args),
                embeddings=values.embeddings(args),
                # these change no picture beyond rounding (tile: beyond its seams)
                compile=args.compile, held=torch.float16 if args.half_weights else None,
                offload=args.offload, tile=args.tile)


def load_for_sampling(args: argparse.Namespace) -> tuple[p2p.Model, dict[str, Any]]:
    """The model, and the sampling arguments of `edit` and `generate`. Where no seed is given, one is drawn
    and printed."""
    seed = args.seed
    if seed is None:
        seed = secrets.randbelow(2**31)
        print(f"seed {seed}", file=sys.stderr)
    return load(args), dict(guidance_scale=args.cfg, seed=seed, **solver(args), height=args.height,
                            width=args.width)


def solver(args: argparse.Namespace) -> dict[str, Any]:
    """How many steps, of what kind, at which timesteps."""
    return dict(steps=args.steps, eta=args.eta, sampler=args.sampler, timestep_spacing=args.timestep_spacing,
                timesteps=values.timesteps(args))


def inverting(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of an inversion, but for its method, under their names in `invert`."""
    return dict(skip=args.skip, inner_steps=args.inner_steps, inversion_guidance=args.inversion_cfg,
                final_alpha=args.final_alpha, **{name: getattr(args, name) for name in OWN})


def progress(args: argparse.Namespace) -> bool:
    """Bars are for terminals: a log would keep every state of theirs."""
    return not args.quiet and sys.stderr.isatty()


def say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def edit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Edit` that the options set."""
    return with_blend(values.given(args))


def targets(args: argparse.Namespace, prompts: Sequence[str]) -> list[p2p.Edit]:
    """The edits that the options ask for, of these prompts."""
    settings = values.changed_by_target(args, len(prompts))
    return [p2p.Edit(prompt, **with_blend(each)) for prompt, each in zip(prompts, settings)]


def with_blend(settings: dict[str, Any]) -> dict[str, Any]:
    """With the local blend, or that of a scope: the edges of maps are soft unless that is said otherwise."""
    blend = opened(settings.get("local_blend", {}))
    if "scope" in settings or {"words", "substruct"} & blend.keys():
        blend = {"feather": SOFT} | blend
    return settings | {"local_blend": p2p.LocalBlend(**blend)} if blend else settings


def opened(blend: dict[str, Any]) -> dict[str, Any]:
    """The fields of a local blend, with the picture that its mask names."""
    return blend | {"mask": open_picture(blend["mask"])} if "mask" in blend else blend


def title(source: str, edits: Sequence[p2p.Edit]) -> str:
    """What a run does, for its folder: "cat to dog"."""
    found = dict.fromkeys(difference(source, e.prompt, e.equalizer) for e in edits)
    return ", ".join(filter(None, found)) or source


def record(args: argparse.Namespace, edits: Sequence[p2p.Edit]) -> p2p.Record:
    scoped = any(edit.scope for edit in edits)
    shown = args.report or args.leakage or scoped
    return p2p.Record(text=None, mean=True) if shown else p2p.Record()

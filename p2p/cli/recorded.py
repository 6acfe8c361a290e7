"""The models that a picture records, loaded again. Anybody may have written the record: it is not trusted."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import p2p
from p2p.cli import options, values
from p2p.cli.results import Stage
from p2p.cli.values import refuse
from p2p.request import add_ons
from p2p.weights.averages import taken_unasked
from p2p.weights.content import content
from p2p.weights.hub import is_id
from p2p.weights.load import BUNDLED, find


def model(args: argparse.Namespace, settings: dict[str, Any]) -> p2p.Model:
    """Loads the model that made a picture, with its options. Raises CheckpointError for another one."""
    places = settings.get("places") or {}
    held = settings.get("held") and getattr(torch, str(settings["held"]), None)
    files = {option: _place(args, option, places.get(option)) for option in ("vae", "text")}
    # older pictures lack them
    read = {name: settings[name] for name in ("tile", "ema", "clip_skip", "zero_snr") if name in settings}
    if (pipeline := places.get("pipeline")) and args.model is None:
        raise p2p.CheckpointError(f"{args.replay}: made by a {pipeline} in memory ({settings['model']}), "
                                  "which is no file: save it, pipe.save_pretrained(FOLDER), and say "
                                  "--model FOLDER")
    where = _place(args, "model", settings["model"])
    if "ema" not in settings and taken_unasked(find(where, vae=files["vae"]).unet.file):
        options.say([f"{args.replay} is of a version that took the averaged weights (EMA) of a file that "
                     "holds both, so they are taken again"])
        read["ema"] = True
    found = p2p.load(where, args.family, settings["prediction"], options.device(args),
                     getattr(torch, str(settings["dtype"]), None), held=held, compile=args.compile,
                     offload=args.offload, **files, **read, **_added(args, settings))
    _same_model(args, found, settings)
    return found


def _place(args: argparse.Namespace, option: str, recorded: str | None) -> str | Path | None:
    """The path of a file that a picture names: as given by the user, else as recorded, if it still exists.
    Other names are not looked up on the Hub, since anybody may have written them. Raises CheckpointError."""
    named = getattr(args, option)
    if named is not None or recorded is None or recorded in BUNDLED or Path(recorded).exists():
        return recorded if named is None else named
    wanted = f"It is the {option} recorded in {args.replay}: say with --{option} where it lies."
    if is_id(recorded):
        raise p2p.CheckpointError(f"{recorded}: not here, and not fetched from the Hub because a picture "
                                  f"names it. {wanted} If you trust it: --{option} {recorded}")
    raise p2p.CheckpointError(f"{recorded}: no such file. {wanted}")


def _added(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, tuple[add_ons.Pair, ...]]:
    """The add-ons that a picture records. Raises UsageError, CheckpointError."""
    added = {}
    for name, given in (("lora", values.loras(args)), ("embeddings", values.embeddings(args))):
        added[name] = add_ons.recorded(name, settings, given)
        if lost := [path for path, _ in added[name] if not given and not Path(path).exists()]:
            raise p2p.CheckpointError(f"{lost[0]}: no such file. It is of the {name} recorded in "
                                      f"{args.replay}: say with {add_ons.OPTIONS[name]} where it lies.")
    return added


def _same_model(args: argparse.Namespace, model: p2p.Model, settings: dict[str, Any],
                option: str = "model") -> None:
    """Raises CheckpointError unless the model is the recorded one, as far as it is recorded."""
    identity = model.identity()
    if "few_steps" in settings:   # by the name of a file, which may be another by now
        identity.setdefault("few_steps", None)
    if (settings.get("places") or {}).get("pipeline"):
        identity["sha256"] = content(model)   # of the weights, not of files
    required = identity if "version" in settings else ("sha256",)   # older pictures record less
    if lost := [k for k in identity if k not in settings and k in required]:
        options.say([f"{args.replay} does not say the {', '.join(lost)} of the {option} that made it, so "
                     "nobody can tell whether it was this one, read in this way"])
    parts = (("sha256", "weights", option), ("vae", "autoencoder", "vae"), ("text", "text", "text"))
    for name, part, file_option in parts:
        if name in settings and identity[name] != settings[name]:
            where = model.file if name == "sha256" else model.places.get(name, f"without --{name}")
            raise p2p.CheckpointError(f"{where}: not the {part} that made {args.replay} (sha256 "
                                      f"{str(identity[name])[:12]}, recorded {str(settings[name])[:12]}); "
                                      f"give the right one with --{file_option}")
    for name, option in add_ons.OPTIONS.items():
        for path, was, now in zip(model.places.get(name, ()), settings.get(name, ()), identity.get(name, ())):
            if was != now:
                raise p2p.CheckpointError(f"{path}: not the file that made {args.replay} (sha256 "
                                          f"{str(now['sha256'])[:12]}, recorded {str(was['sha256'])[:12]}); "
                                          f"give the right one with {option}")
    changed = [f"{name} {settings[name]!r}, here {identity[name]!r}" for name in identity
               if name in settings and identity[name] != settings[name]]
    if changed:
        raise p2p.CheckpointError(f"{model.file}: not read as it was for {args.replay}: {', '.join(changed)}")


def stage(args: argparse.Namespace, settings: dict[str, Any]) -> Stage:
    """Loads the super-resolution stage that a picture records. Raises UsageError, CheckpointError."""
    if isinstance(settings, list):
        raise p2p.UsageError(f"enlarged {len(settings)} times, which --from does not do: make the small "
                             "picture again, and enlarge it in Python")
    refuse(args, "--from a picture that was enlarged, which does as it records",
           ("upscale_steps", "upscale_cfg", "upscale_level", "upscale_edited"))
    text = _place(args, "text", (settings.get("places") or {}).get("text"))
    found = p2p.load(_place(args, "upscaler", settings["model"]), device=options.device(args),
                     dtype=getattr(torch, settings["dtype"]), text=text)
    _same_model(args, found, settings, "upscaler")
    return found, {k: settings[k] for k in ("steps", "guidance_scale", "eta", "noise_level", "edited")}

"""`p2p edit --from PNG`: the edit that made a picture, run again from the settings inside it."""
from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import p2p
from p2p.cli import options
from p2p.cli.output import Output
from p2p.cli.results import Stage, enlarged, stage, write_edit
from p2p.cli.values import refuse
from p2p.editors import find_editor
from p2p.image import FITS, from_base64
from p2p.request.checks import choice
from p2p.request.inverting import settings_recorded
from p2p.request.settings import from_settings
from p2p.run import Result
from p2p.show.pictures import read_settings
from p2p.weights.averages import taken_unasked
from p2p.weights.hub import is_id
from p2p.weights.load import BUNDLED, find


def run(args: argparse.Namespace) -> None:
    """Runs the edit again whose settings a picture holds. They may be a stranger's: the library refuses what
    is of the wrong kind, and what is not there or no mapping is said here."""
    s = read_settings(args.replay)
    try:
        result, source, large, out = _run_again(args, s)
    except (KeyError, TypeError, AttributeError) as error:
        raise p2p.UsageError(f"{args.replay}: its settings are not complete ({error})") from None
    except p2p.UsageError as error:
        raise p2p.UsageError(f"{args.replay}: {error}") from None
    write_edit(out, result, args, source, large)


def _run_again(args: argparse.Namespace, s: dict[str, Any]) -> tuple[Result, p2p.Inversion | None,
                                                                     Result | None, Output]:
    if s["command"] != "edit":
        raise p2p.UsageError(f'made by "p2p {s["command"]}", not by an edit')
    if s["seed"] is None and s["inversion"] is None:
        raise p2p.UsageError("made from a noise tensor given in Python, which is not recorded")
    edits = from_settings(s)
    out = Output(args.out, str(s["source"]))
    model = _recorded(args, s)
    how = dict(guidance_scale=s["guidance_scale"], proximal=s["proximal"], editor=find_editor(s["editor"]),
               negative_prompt=s.get("negative_prompt"), record=options.record(args), progress=not args.quiet)
    upscaler = _stage(args, s["upscale"]) if s.get("upscale") else stage(args, model.family)
    source = None
    if s["inversion"] is not None:
        source = _again(model, s["inversion"], not args.quiet)
    else:
        how |= {k: s[k] for k in ("steps", "seed", "eta", "height", "width")}
    result = p2p.edit(model, s["source"] if source is None else source, edits, **how)
    return result, source, enlarged(upscaler, result, args), out


def _again(model: p2p.Model, said: dict[str, Any], progress: bool) -> p2p.Inversion:
    """The inversion that an edit's settings describe."""
    if said["picture"] is None:
        raise p2p.UsageError("made from latents given in Python, which are not recorded")
    how = settings_recorded(said)
    # as fitted: of the size that it was run at
    picture, fit = from_base64(said["picture"]), said.get("fit", "crop")
    made = p2p.invert(model, picture, said["prompt"], method=said["method"], height=picture.height,
                      width=picture.width, progress=progress, **how)
    return replace(made, fit=choice("fit", fit, FITS))


def _recorded(args: argparse.Namespace, s: dict[str, Any]) -> p2p.Model:
    """The model that made a picture, read as it was then. Raises CheckpointError where it is another one."""
    places = s.get("places") or {}
    held = s.get("held") and getattr(torch, str(s["held"]), None)
    files = {option: _place(args, option, places.get(option)) for option in ("vae", "text")}
    # older pictures lack them
    read = {name: s[name] for name in ("tile", "ema", "clip_skip", "zero_snr") if name in s}
    where = _place(args, "model", s["model"])
    if "ema" not in s and taken_unasked(find(where, vae=files["vae"]).unet.file):
        options.say([f"{args.replay} is of a version that took the averaged weights (EMA) of a file that "
                     "holds both, so they are taken again"])
        read["ema"] = True
    model = p2p.load(where, args.family, s["prediction"], options.device(args),
                     getattr(torch, str(s["dtype"]), None), held=held, compile=args.compile,
                     offload=args.offload, **files, **read)
    _same_model(args, model, s)
    return model


def _place(args: argparse.Namespace, option: str, recorded: str | None) -> str | Path | None:
    """Where a file that a picture names lies: where the user says, else where it lay, if it is still there.
    What is not here is not looked for on the Hub, since anybody may have written the name."""
    given = getattr(args, option)
    if given is not None or recorded is None or recorded in BUNDLED or Path(recorded).exists():
        return recorded if given is None else given
    wanted = f"It is the {option} recorded in {args.replay}: say with --{option} where it lies."
    if is_id(recorded):
        raise p2p.CheckpointError(f"{recorded}: not here, and not fetched from the Hub because a picture "
                                  f"names it. {wanted} If you trust it: --{option} {recorded}")
    raise p2p.CheckpointError(f"{recorded}: no such file. {wanted}")


def _same_model(args: argparse.Namespace, model: p2p.Model, s: dict[str, Any], option: str = "model") -> None:
    """Raises CheckpointError unless all is the same that is recorded of a model."""
    found = model.identity()
    if lost := [k for k in found if k not in s and (k == "sha256" or "version" in s)]:   # older ones say less
        options.say([f"{args.replay} does not say the {', '.join(lost)} of the {option} that made it, so "
                     "nobody can tell whether it was this one, read in this way"])
    for name, what, of in (("sha256", "weights", option), ("vae", "autoencoder", "vae"),
                           ("text", "text", "text")):
        if name in s and found[name] != s[name]:
            where = model.file if name == "sha256" else model.places.get(name, f"without --{name}")
            raise p2p.CheckpointError(f"{where}: not the {what} that made {args.replay} (sha256 "
                                      f"{str(found[name])[:12]}, recorded {str(s[name])[:12]}); give the "
                                      f"right one with --{of}")
    if odd := [f"{name} {s[name]!r}, here {found[name]!r}" for name in found if name in s
               and found[name] != s[name]]:
        raise p2p.CheckpointError(f"{model.file}: not read as it was for {args.replay}: {', '.join(odd)}")


def _stage(args: argparse.Namespace, recorded: dict[str, Any]) -> Stage:
    """The super-resolution stage that a picture records. Raises UsageError, CheckpointError."""
    refuse(args, "--from a picture that was enlarged, which does as it records",
           ("upscale_steps", "upscale_cfg", "upscale_level",
           "upscale_edited"))
    text = _place(args, "text", (recorded.get("places") or {}).get("text"))
    model = p2p.load(_place(args, "upscaler", recorded["model"]), device=options.device(args),
                     dtype=getattr(torch, recorded["dtype"]), text=text)
    _same_model(args, model, recorded, "upscaler")
    return model, {k: recorded[k] for k in ("steps", "guidance_scale", "eta", "noise_level", "edited")}

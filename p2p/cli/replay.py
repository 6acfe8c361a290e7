"""`p2p edit --from PNG`: runs the edit that made a picture again, from the settings inside it."""
from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import p2p
from p2p.cli import options, values
from p2p.cli.checks import CHANGES, INVERSION, SCHEDULE
from p2p.cli.output import Output
from p2p.cli.results import Stage, check_stage, edited, enlarged, stage, write_edit
from p2p.cli.values import refuse
from p2p.editors import find_editor
from p2p.image import FITS, from_base64
from p2p.request import add_ons
from p2p.request.checks import choice, whole
from p2p.request.editing import edit_request
from p2p.request.inverting import GUIDANCE, expected, negative_read, settings_read, settings_recorded
from p2p.request.names import INSTEAD
from p2p.request.settings import from_settings
from p2p.request.source import FOLLOW, REPLACE_EMPTY
from p2p.request.start import guidance
from p2p.run import Result
from p2p.show.pictures import read_settings
from p2p.show.preview import shortened
from p2p.weights.averages import taken_unasked
from p2p.weights.content import content
from p2p.weights.hub import is_id
from p2p.weights.load import BUNDLED, find


def run(args: argparse.Namespace) -> None:
    """Runs the edit again whose settings a picture holds. They are not trusted: the library refuses values of
    the wrong type, and this function reports missing ones. Raises UsageError, CheckpointError."""
    settings = read_settings(args.replay)
    try:
        result, source, large, out = _run_again(args, settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise p2p.UsageError(f"{args.replay}: its settings are not complete ({error})") from None
    except p2p.UsageError as error:
        raise p2p.UsageError(f"{args.replay}: {error}") from None
    write_edit(out, result, args, source, large)


def _run_again(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[Result, p2p.Inversion | None,
                                                                     Result | None, Output]:
    if settings["command"] != "edit":
        raise p2p.UsageError(f'made by "p2p {settings["command"]}", not by an edit')
    if settings["seed"] is None and settings["inversion"] is None:
        raise p2p.UsageError("made from a noise tensor given in Python, which is not recorded")
    if settings.get("changed_between_steps"):
        raise p2p.UsageError("its latents were changed between steps by a function in Python, which is not "
                             "recorded")
    edits = _changed(args, from_settings(settings))
    out = Output(args.out, options.title(str(settings["source"]), edits))
    if changes := values.given_options(args, CHANGES):
        options.say([f"not as {args.replay} records: {', '.join(changes)}"])
    model = _recorded(args, settings)
    arguments = dict(guidance_scale=settings["guidance_scale"], proximal=settings["proximal"],
                     editor=find_editor(settings["editor"]), negative_prompt=settings.get("negative_prompt"))
    given = dict(guidance_scale=args.cfg, proximal=values.proximal(args),
                 negative_prompt=values.negative(args))
    if settings["editor"] is not None:
        refuse(args, "--from a picture of another editor, which injects into its own model alone",
               ["upscale_edited"])
    upscaler = (_stage(args, settings["upscale"]) if settings.get("upscale") else
                stage(args, model.family, model.dtype))
    source = None
    if (record := settings["inversion"]) is not None:
        refuse(args, "--from a real picture: it has its own timesteps, and the size that it was brought to",
               (*SCHEDULE, "height", "width"))
    else:
        refuse(args, "--from a picture that was generated", [name for name in INVERSION if name in CHANGES])
        arguments |= _sampling(args, settings)
    arguments |= {k: v for k, v in given.items() if v is not None}
    why = None
    if args.cfg is not None and not model.guided(guidance(model, args.cfg)):
        why = "nothing leads away from it without guidance"
    elif args.method in REPLACE_EMPTY:
        why = f"{args.method} has its own in its place"
    if why and args.negative is None and arguments["negative_prompt"] is not None:
        arguments["negative_prompt"] = None
        options.say([f"the negative prompt that is recorded is left out: {why}"])
    if record is not None:
        source = _again(args, model, record, edits, upscaler, **arguments)
    result = edited(args, model, settings["source"] if source is None else source, edits, upscaler,
                    record=options.record(args, edits), **arguments)
    return result, source, enlarged(upscaler, result, args), out


def _changed(args: argparse.Namespace, edits: list[p2p.Edit]) -> list[p2p.Edit]:
    """The recorded edits with what the options change of each. Raises UsageError."""
    out = []
    for edit, changes in zip(edits, values.changed_by_target(args, len(edits))):
        if edit.local_blend is None:
            changes = options.with_blend(changes)
        elif blend := changes.pop("local_blend", None):
            changes["local_blend"] = replace(edit.local_blend, **options.opened(blend))
        for name in ("equalizer", "swap", "cross_replace_steps", "layers"):
            if name in changes:
                changes[name] = _merged(name, getattr(edit, name), changes[name])
        out.append(replace(edit, **changes))
    return out


def _merged(field: str, recorded: Any, given: Any) -> Any:
    """What is recorded, with what options say of some words, or of one kind of attention. Raises
    UsageError."""
    named = isinstance(given, Mapping)
    if field == "layers":
        if named and not (recorded is None or isinstance(recorded, Mapping) or len(given) == 2):
            raise p2p.UsageError(f"--layers {next(iter(given))}=...: the picture records the same layers for "
                                 "both kinds of attention; say both, cross=... and self=...")
        return {**recorded, **given} if named and isinstance(recorded, Mapping) else given
    if field == "cross_replace_steps" and (named or isinstance(recorded, Mapping)):   # also all by their name
        given = given if named else {values.ALL: given}
        recorded = recorded if isinstance(recorded, Mapping) or recorded is None else {values.ALL: recorded}
    if not isinstance(given, Mapping):
        return given
    again = {word.casefold() for word in given}

    def replaced(word: str, value: Any) -> bool:
        return (bool({word.casefold(), re.sub(r"#\d+$", "", word.casefold())} & again)
                or (field == "swap" and value.casefold() in {new.casefold() for new in given.values()}))

    return {word: value for word, value in (recorded or {}).items() if not replaced(word, value)} | given


def _sampling(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """How a generated source was sampled, with what the options change of it; recorded settings that do not
    go with the changes are left to their defaults."""
    recorded = {k: settings[k] for k in ("steps", "seed", "eta", "height", "width")}
    later = SCHEDULE   # older pictures lack them
    recorded |= {k: settings[k] for k in later if k in settings}
    given = {k: v for k, v in dict(options.solver(args), seed=args.seed, height=args.height,
                                   width=args.width).items() if v is not None}
    for name, others in INSTEAD.items():
        if name in given:
            recorded |= dict.fromkeys(others)
    return recorded | given


def _again(args: argparse.Namespace, model: p2p.Model, record: dict[str, Any], edits: list[p2p.Edit],
           upscaler: Stage | None, **settings: Any) -> p2p.Inversion:
    """Makes the inversion again that an edit's settings record, with what the options change of it. Raises
    UsageError for faults of its edits too, before it spends minutes."""
    if record["picture"] is None:
        raise p2p.UsageError("made from latents given in Python, or from a trace of a prompt, which are not "
                             "recorded; edit the prompt itself")
    arguments, method = settings_recorded(record), record["method"] if args.method is None else args.method
    if method != record["method"]:   # the others are the former method's own
        common = ("steps", "guidance_scale", "final_alpha", "negative_prompt")
        if record["inversion_guidance"] != GUIDANCE.get(record["method"], 1.0):   # not that method's default
            common += ("inversion_guidance",)
        arguments = settings_read(method, {k: v for k, v in arguments.items() if k in common})
    given = dict(steps=args.steps, guidance_scale=args.cfg, eta=args.eta, seed=args.seed,
                 **options.inverting(args))
    if args.steps is not None:   # what counts steps stays as large a share of them
        arguments |= shortened(arguments, whole("steps", arguments["steps"]), args.steps)
    arguments |= {k: v for k, v in given.items() if v is not None}
    negative, changed = settings["negative_prompt"], (args.negative, args.method, args.inversion_cfg)
    if negative is None or changed == (None, None, None):
        negative = arguments.get("negative_prompt")
    read = negative_read(model, method, arguments.get("inversion_guidance"), negative)
    arguments["negative_prompt"] = read
    # the recorded picture is fitted already
    picture, fit = from_base64(record["picture"]), record.get("fit", "crop")
    arguments |= {"method": method, "height": picture.height, "width": picture.width}
    request = edit_request(model, expected(model, record["prompt"], **arguments), edits, **settings)
    check_stage(upscaler, model, request.source, request.edits, request.settled.shape)
    inversion = p2p.invert(model, picture, record["prompt"], progress=options.progress(args), **arguments)
    inversion = replace(inversion, fit=choice("fit", fit, FITS))
    if "queries" in record and inversion.method in FOLLOW:   # rounded, in a trace
        dtype = choice("queries", record["queries"], ("float16", "bfloat16", "float32", "float64"))
        inversion = p2p.trace(model, inversion, dtype=getattr(torch, dtype))
    return inversion


def _recorded(args: argparse.Namespace, settings: dict[str, Any]) -> p2p.Model:
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
    model = p2p.load(where, args.family, settings["prediction"], options.device(args),
                     getattr(torch, str(settings["dtype"]), None), held=held, compile=args.compile,
                     offload=args.offload, **files, **read, **_added(args, settings))
    _same_model(args, model, settings)
    return model


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


def _stage(args: argparse.Namespace, settings: dict[str, Any]) -> Stage:
    """Loads the super-resolution stage that a picture records. Raises UsageError, CheckpointError."""
    if isinstance(settings, list):
        raise p2p.UsageError(f"enlarged {len(settings)} times, which --from does not do: make the small "
                             "picture again, and enlarge it in Python")
    refuse(args, "--from a picture that was enlarged, which does as it records",
           ("upscale_steps", "upscale_cfg", "upscale_level", "upscale_edited"))
    text = _place(args, "text", (settings.get("places") or {}).get("text"))
    model = p2p.load(_place(args, "upscaler", settings["model"]), device=options.device(args),
                     dtype=getattr(torch, settings["dtype"]), text=text)
    _same_model(args, model, settings, "upscaler")
    return model, {k: settings[k] for k in ("steps", "guidance_scale", "eta", "noise_level", "edited")}

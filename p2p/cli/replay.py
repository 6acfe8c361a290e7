"""`p2p edit --from PNG` and `p2p generate --from PNG`: what made a picture is run again, from the settings
inside it. They are not trusted: the library refuses values of the wrong type."""
from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

import p2p
from p2p.cli import options, recorded, values
from p2p.cli.checks import CHANGES, INVERSION, SCHEDULE
from p2p.cli.output import Output
from p2p.cli.results import Stage, check_stage, edited, enlarged, generated, stage, write_edit
from p2p.cli.values import refuse
from p2p.editors import find_editor
from p2p.image import FITS, from_base64
from p2p.request.checks import choice, kind, whole
from p2p.request.editing import edit_request
from p2p.request.inverting import (
    GUIDANCE,
    expected,
    negative_read,
    reads_negative,
    settings_read,
    settings_recorded,
)
from p2p.request.names import changed
from p2p.request.settings import from_settings
from p2p.request.source import FOLLOW, REPLACE_EMPTY
from p2p.request.start import guidance
from p2p.run import Result
from p2p.show.pictures import read_settings
from p2p.show.preview import shortened
from p2p.weights.untrusted import brief


def run(args: argparse.Namespace) -> None:
    """Runs the edit again whose settings a picture holds. Raises UsageError, CheckpointError."""
    settings = read_settings(args.replay)
    with _reported(args):
        result, source, large, out = _run_again(args, settings)
    write_edit(out, result, args, source, large)


def generate(args: argparse.Namespace) -> tuple[Result, Result, Output]:
    """Generates again what a picture was made with.  -> it, the same enlarged where that is asked for, the
    output. Raises UsageError, CheckpointError."""
    settings = read_settings(args.replay)
    with _reported(args):
        if settings["command"] != "generate":
            raise p2p.UsageError(f'made by "p2p {settings["command"]}", not by p2p generate; p2p edit --from '
                                 "runs edits again")
        _refuse_noise(settings)
        prompts = kind("prompts", settings["prompts"], list)
        out = Output(args.out, str(next(iter(prompts), "")))
        _say_changes(args)
        model = recorded.model(args, settings)
        upscaler = _stage(args, model, settings)
        arguments = _asked(args, settings) | _sampling(args, settings)
        _leave_unread_negative(args, model, arguments)
        small = generated(args, model, prompts, **arguments)
        return small, enlarged(upscaler, small, args) or small, out


@contextmanager
def _reported(args: argparse.Namespace) -> Iterator[None]:
    """Names the picture in errors, and missing settings. Raises UsageError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise p2p.UsageError(f"{args.replay}: its settings are not complete ({error})") from None
    except p2p.UsageError as error:
        raise p2p.UsageError(f"{args.replay}: {error}") from None


def _run_again(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[Result, p2p.Inversion | None,
                                                                     Result | None, Output]:
    if settings["command"] != "edit":
        raise p2p.UsageError(f'made by "p2p {settings["command"]}", not by an edit; p2p generate --from runs '
                             "generate again")
    if settings["inversion"] is None:
        _refuse_noise(settings)
    if settings.get("changed_between_steps"):
        raise p2p.UsageError("its latents were changed between steps by a function in Python, which is not "
                             "recorded")
    edits = _changed(args, from_settings(settings))
    out = Output(args.out, options.title(str(settings["source"]), edits))
    _say_changes(args)
    model = recorded.model(args, settings)
    proximal = values.proximal(args)
    arguments = _asked(args, settings) | dict(
        proximal=settings["proximal"] if proximal is None else proximal,
        editor=find_editor(settings["editor"]))
    if settings["editor"] is not None:
        refuse(args, "--from a picture of another editor, which injects into its own model alone",
               ["upscale_edited"])
    upscaler = _stage(args, model, settings)
    source = None
    if (record := settings["inversion"]) is not None:
        refuse(args, "--from a real picture: it is sampled by the steps of its inversion, at its size",
               ("sampler", "height", "width"))
    else:
        refuse(args, "--from a picture that was generated", [name for name in INVERSION if name in CHANGES])
        arguments |= _sampling(args, settings)
    _leave_unread_negative(args, model, arguments)
    if record is not None:
        source = _again(args, model, record, edits, upscaler, **arguments)
    result = edited(args, model, settings["source"] if source is None else source, edits, upscaler,
                    record=options.record(args, edits), **arguments)
    return result, source, enlarged(upscaler, result, args), out


def _refuse_noise(settings: Mapping[str, Any]) -> None:
    """Raises UsageError."""
    if settings["seed"] is None:
        raise p2p.UsageError("made from a noise tensor given in Python, which is not recorded")


def _say_changes(args: argparse.Namespace) -> None:
    if changes := values.given_options(args, [name for name in CHANGES if hasattr(args, name)]):
        options.say([f"not as {args.replay} records: {', '.join(changes)}"])


def _stage(args: argparse.Namespace, model: p2p.Model, settings: Mapping[str, Any]) -> Stage | None:
    """The stage that is recorded, or else asked for. Raises UsageError, CheckpointError."""
    if settings.get("upscale"):
        return recorded.stage(args, settings["upscale"])
    return stage(args, model.family, model.dtype)


def _asked(args: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance, and what it leads away from, as recorded or as the options change it."""
    negative = values.negative(args)
    return dict(guidance_scale=settings["guidance_scale"] if args.cfg is None else args.cfg,
                negative_prompt=settings.get("negative_prompt") if negative is None else negative)


def _leave_unread_negative(args: argparse.Namespace, model: p2p.Model, arguments: dict[str, Any]) -> None:
    """Takes a recorded negative prompt out of the arguments, with a note, where a change leaves it unread."""
    why = None
    if args.cfg is not None and not model.guided(guidance(model, args.cfg)):
        why = "nothing leads away from it without guidance"
    elif getattr(args, "method", None) in REPLACE_EMPTY:
        why = f"{args.method} has its own in its place"
    if why and args.negative is None and arguments["negative_prompt"] is not None:
        arguments["negative_prompt"] = None
        options.say([f"the negative prompt that is recorded is left out: {why}"])


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


def _merged(field: str, was: Any, given: Any) -> Any:
    """What is recorded, with what options say of some words, or of one kind of attention. Raises
    UsageError."""
    named = isinstance(given, Mapping)
    if field == "layers":
        if named and not (was is None or isinstance(was, Mapping) or len(given) == 2):
            raise p2p.UsageError(f"--layers {next(iter(given))}=...: the picture records the same layers for "
                                 "both kinds of attention; say both, cross=... and self=...")
        return {**was, **given} if named and isinstance(was, Mapping) else given
    if field == "cross_replace_steps" and (named or isinstance(was, Mapping)):   # also all by their name
        given = given if named else {values.ALL: given}
        was = was if isinstance(was, Mapping) or was is None else {values.ALL: was}
    if not isinstance(given, Mapping):
        return given
    again = {word.casefold() for word in given}

    def replaced(word: str, value: Any) -> bool:
        return (bool({word.casefold(), re.sub(r"#\d+$", "", word.casefold())} & again)
                or (field == "swap" and value.casefold() in {new.casefold() for new in given.values()}))

    return {word: value for word, value in (was or {}).items() if not replaced(word, value)} | given


def _sampling(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """How a generated source was sampled, with what the options change of it; recorded settings that belong
    to another sampler, or in whose place an option stands, are left to their defaults."""
    kept = {k: settings[k] for k in ("steps", "seed", "eta", "height", "width")}
    later = SCHEDULE   # older pictures lack them
    kept |= {k: settings[k] for k in later if k in settings}
    given = {k: v for k, v in dict(options.solver(args), seed=args.seed, height=args.height,
                                   width=args.width).items() if v is not None}
    out = changed(kept, given)
    lost = [f"{name} {brief(kept[name])}" for name in ("eta", "timestep_spacing")
            if kept.get(name) and name not in out]
    if lost and "sampler" in given:
        options.say([f"left out, as recorded for another sampler: {', '.join(lost)}"])
    return out


def _again(args: argparse.Namespace, model: p2p.Model, record: dict[str, Any], edits: list[p2p.Edit],
           upscaler: Stage | None, **settings: Any) -> p2p.Inversion:
    """Makes the inversion again that an edit's settings record, with what the options change of it. Raises
    UsageError for faults of its edits too, before it spends minutes."""
    if record["picture"] is None:
        raise p2p.UsageError("made from latents given in Python, or from a trace of a prompt, which are not "
                             "recorded; edit the prompt itself")
    arguments, method = settings_recorded(record), record["method"] if args.method is None else args.method
    if method != record["method"]:   # the others are the former method's own
        common = ("steps", "timestep_spacing", "timesteps", "guidance_scale", "final_alpha",
                  "negative_prompt")
        if record["inversion_guidance"] != GUIDANCE.get(record["method"], 1.0):   # not that method's default
            common += ("inversion_guidance",)
        arguments = settings_read(method, {k: v for k, v in arguments.items() if k in common})
    given = dict(guidance_scale=args.cfg, seed=args.seed, **options.solver(args), **options.inverting(args))
    given = {k: v for k, v in given.items() if v is not None}
    steps = len(given["timesteps"]) if "timesteps" in given else args.steps
    if steps is not None:   # what counts steps stays as large a share of them
        arguments |= shortened(arguments, whole("steps", arguments["steps"]), steps)
    arguments = changed(arguments, given)
    negative, own = settings["negative_prompt"], arguments.get("negative_prompt")
    unchanged = (args.method, args.inversion_cfg) == (None, None)
    read_one = reads_negative(model, record["method"], record["inversion_guidance"])
    if negative is None or (args.negative is None and (unchanged or read_one)):
        negative = own
    arguments["negative_prompt"] = negative_read(model, method, arguments.get("inversion_guidance"), negative)
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

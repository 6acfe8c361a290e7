"""The results of an edit on the command line: enlargement, output files and notes."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import p2p
from p2p.cli import options
from p2p.cli.output import Output
from p2p.request.checks import finite, whole
from p2p.request.editing import edit_request
from p2p.request.ready import generation, prepared
from p2p.request.start import Low
from p2p.run import Result, run
from p2p.show.leakage import leakage, own_words
from p2p.show.preview import preview
from p2p.show.report import report

# the super-resolution stage that ships with a family
UPSCALERS = {"emoji": "emoji-upscaler", "emoji-flow": "emoji-upscaler"}
NOTHING = p2p.Record()                    # no maps
Stage = tuple[p2p.Model, dict[str, Any]]   # of super-resolution, and its settings


def stage(args: argparse.Namespace, family: str, dtype: torch.dtype | None) -> Stage | None:
    """Loads the super-resolution stage if the options name one. Raises UsageError, CheckpointError."""
    if not args.upscale and args.upscaler is None:
        return None
    name = UPSCALERS.get(family) if args.upscaler is None else args.upscaler
    if name is None:
        raise p2p.UsageError("--upscale: this model ships without a super-resolution stage; name one with "
                             "--upscaler")
    model = p2p.load(name, device=options.device(args), dtype=dtype, text=args.text)
    if args.upscale_edited and not model.text_encoders:
        raise p2p.UsageError(f"--upscale-edited: {name} reads no text, so there is no attention to inject "
                             "into")
    settings = dict(steps=args.upscale_steps, guidance_scale=args.upscale_cfg, noise_level=args.upscale_level,
                    edited=args.upscale_edited or None)
    settings = {k: v for k, v in settings.items() if v is not None}
    _check_stage(name, model, settings)
    return model, settings


def check_stage(stage: Stage | None, model: p2p.Model, source: str, edits: Sequence[p2p.Edit],
                shape: Sequence[int]) -> None:
    """Raises UsageError for edits that cannot be injected into the stage, before there is a picture. model,
    shape: of the small ones' latents, (..., H, W)."""
    if stage is None or not stage[1].get("edited"):
        return
    sides = [side * model.shrink for side in shape[-2:]]
    small = Low(torch.empty(1 + len(edits), 3, *sides, device="meta"), 0)
    try:
        edit_request(stage[0], source, edits, low=small)
    except p2p.UsageError as error:
        raise p2p.UsageError(f"--upscale-edited: of {stage[0].name}, {error}") from None


def _check_stage(name: str, model: p2p.Model, settings: dict[str, Any]) -> None:
    """Raises UsageError before there is a picture to be enlarged."""
    if not model.unet.enlarges:
        raise p2p.UsageError(f"--upscaler: {name} is no super-resolution stage, but a model of its own")
    total = len(model.alphas_cumprod)
    whole("--upscale-steps", settings.get("steps", 1), 1, total)
    whole("--upscale-level", settings.get("noise_level", 0), 0, total - 1)
    finite("--upscale-cfg", settings.get("guidance_scale", 1.0))


def edited(args: argparse.Namespace, model: p2p.Model, source: Any, targets: Any,
           upscaler: Stage | None = None, **settings: Any) -> Result:
    """As `p2p.edit`, but before the first step the notes are printed and what comes after is checked."""
    ready = prepared(model, source, targets, **settings)
    check_stage(upscaler, model, ready.prompts[0], ready.edits, ready.start.x.shape)
    options.say(list(dict.fromkeys(ready.notes)))
    return run(model, ready, settings.get("record", NOTHING), options.progress(args))


def generated(args: argparse.Namespace, model: p2p.Model, prompts: Any,
              record: p2p.Record = NOTHING, **settings: Any) -> Result:
    """As `p2p.generate`, but prints the notes before the first step."""
    ready = generation(model, prompts, record, **settings)
    options.say(list(dict.fromkeys(ready.notes)))
    return run(model, ready, record, options.progress(args))


def enlarged(stage: Stage | None, result: Result, args: argparse.Namespace) -> Result | None:
    return stage and p2p.upscale(stage[0], result, **stage[1], progress=options.progress(args))


def write_edit(out: Output, result: Result, args: argparse.Namespace, inversion: p2p.Inversion | None,
               large: Result | None) -> None:
    shown = large or result
    counted = [f"{taken(inversion)}; the edit, {result.rows}"] if inversion is not None else []
    options.say([*(note for note in shown.notes if note not in result.notes), *counted, *cost(args, shown)])
    if args.preview:
        out.picture("preview", preview(result), result.settings)
        out.write(args.quiet)
        return
    if inversion is not None and inversion.picture is not None:
        out.picture("input", inversion.picture)
    for name, image in zip(result.names(), shown.images):
        out.picture(name, image, shown.settings)
    out.picture("grid", shown.grid(), shown.settings)
    if large is not None:
        out.picture("small", result.grid(), result.settings)
    out.json("settings.json", shown.settings)
    if result.maps is not None:
        leaks = []
        if own_words(result):
            leaks = [leakage(result, k) for k in range(1, len(result.images))]
            out.json("leakage.json", [leak._asdict() for leak in leaks])
        else:
            options.say(["what else changed is not measured: the editor told the source another prompt"])
        for k, leak in enumerate(leaks, 1):
            local, where = result.edits[k - 1], ""
            if result.masks is not None and (local.scope or local.local_blend) is not None:
                share = (result.masks[k - 1] > 0).float().mean().item()
                where = f"; its mask let {share:.0%} of the picture change"
            options.say([f'"{result.prompts[k]}" is about {", ".join(leak.about) or "nothing"}; where the '
                         f"maps of these words are weak, {leak.outside:.1%} of the pixels changed visibly"
                         f"{where}"])
        if args.report:
            page = report(replace(shown, maps=result.maps, masks=result.masks), leaks)
            out.add("report.html", lambda path: path.write_text(page, encoding="utf-8"))
    out.write(args.quiet)


def taken(inversion: p2p.Inversion) -> str:
    return f"{inversion.method} inversion, {inversion.rows} rows of the network"


def cost(args: argparse.Namespace, *runs: Result) -> list[str]:
    """The note of --verbose. Rows are counted, since only those that a step needs are computed."""
    if not args.verbose:
        return []
    seconds = ", ".join(f"{name} {sum(r.timings[name] for r in runs):.2f} s" for name in runs[0].timings)
    return [f"{sum(r.rows for r in runs)} rows of the network; {seconds}"]

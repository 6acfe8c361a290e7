"""What each command of `p2p` does, given its parsed arguments."""
from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import p2p
from p2p import align
from p2p.cli import options
from p2p.cli.output import Output
from p2p.editors import find_editor
from p2p.edits import from_settings
from p2p.image import FITS, from_base64, open_picture
from p2p.models.t5 import EncodedPrompts
from p2p.models.text import tokenizer, tokens
from p2p.request.checks import choice
from p2p.request.prompts import check as check_prompt
from p2p.run import Result
from p2p.show.leakage import leakage
from p2p.show.pictures import grid, heat, names, overlay, read_settings, table
from p2p.show.report import report
from p2p.show.sweep import sweep as run_sweep
from p2p.sources.methods import settings_read
from p2p.weights.averages import taken_unasked
from p2p.weights.convert import convert as run_convert
from p2p.weights.deepfloyd import load_t5
from p2p.weights.hub import is_id
from p2p.weights.inspect import report as describe
from p2p.weights.load import BUNDLED, find
from p2p.weights.untrusted import printable

EDIT_OPTIONS = ("mode", "cross", "self_", "windows_over", "weight", "renormalise", "swap", "scope", "blend", "blend_without",
                "blend_mask", "blend_threshold", "blend_start", "blend_level", "blend_keep", "blend_middle", "aligner")
UPSCALERS = {"emoji": "emoji-upscaler"}   # the super-resolution stage that ships with a family


def edit(args: argparse.Namespace) -> None:
    if args.replay:
        if args.source is not None:
            raise p2p.UsageError("--from takes the prompts from the picture; give either prompts or --from")
        options.refuse(args, "--from, which does as the picture records", "image", "inversion", "method", "skip", "inner_steps",
                       "inversion_cfg", "final_alpha", "fit", "editor", "proximal", "negative", "steps", "seed", "eta", "height",
                       "width", "cfg", "dtype", "prediction", "ema", "clip_skip", "zero_snr", "half_weights", "tile", *EDIT_OPTIONS)
        return _replay(args)
    if args.inversion is not None and args.source is not None:   # the source prompt is in the file
        args.source, args.targets = None, [args.source, *args.targets]
    if args.inversion is not None and args.image is not None:
        raise p2p.UsageError("give --image or --inversion, not both")
    if not args.targets or (args.source is None and args.inversion is None):
        raise p2p.UsageError('edit needs a source prompt and at least one target: p2p edit "a cat on grass" "a dog on grass"')
    out = Output(args.out, args.source or args.targets[0])
    shared = options.edit_settings(args)
    source, sampling = args.source, {}
    if args.inversion is not None:
        options.refuse(args, "--inversion", "steps", "seed", "eta", "height", "width", "method", "skip", "inner_steps",
                       "inversion_cfg", "final_alpha", "fit")
        source = p2p.Inversion.load(args.inversion)
        model, sampling = options.load(args), dict(guidance_scale=args.cfg)
    elif args.image is not None:
        picture, model = open_picture(args.image), options.load(args)
        source, sampling = _invert(args, model, picture), dict(guidance_scale=args.cfg)
    else:
        options.refuse(args, "a source prompt alone", "method", "skip", "inner_steps", "inversion_cfg", "final_alpha", "fit")
        model, sampling = options.load_for_sampling(args)
    editor = find_editor(args.editor)
    if editor:
        options.refuse(args, "--editor (these are Prompt-to-Prompt's)", "mode", "cross", "self_", "windows_over", "weight",
                       "renormalise", "swap", "scope", "aligner")
    stage = _upscaler(args, model.family)
    result = p2p.edit(model, source, args.targets, **shared, **sampling, proximal=options.proximal(args), editor=editor,
                      negative_prompt=args.negative, record=options.record(args), progress=not args.quiet)
    _write_edit(out, result, args, source if isinstance(source, p2p.Inversion) else None, _upscale(stage, result, args))


def invert(args: argparse.Namespace) -> None:
    out = Output(args.out, args.source)
    options.refuse(args, "p2p invert: it is given to the edits", "negative")
    picture, model = open_picture(args.image), options.load(args)
    made = _invert(args, model, picture)
    _say([*model.notes, *model.remarks(args.source), *made.notes, _taken(made)])
    out.add("inversion.safetensors", made.save)
    out.picture("picture", made.picture)
    out.write(args.quiet)


def _invert(args: argparse.Namespace, model: p2p.Model, picture: Image.Image) -> p2p.Inversion:
    given = dict(method=args.method, skip=args.skip, inner_steps=args.inner_steps, inversion_guidance=args.inversion_cfg,
                 eta=args.eta, steps=args.steps, seed=args.seed, final_alpha=args.final_alpha, fit=args.fit)
    return p2p.invert(model, picture, args.source, guidance_scale=args.cfg, height=args.height, width=args.width,
                      progress=not args.quiet, **{k: v for k, v in given.items() if v is not None})


def _again(model: p2p.Model, said: dict[str, Any], progress: bool) -> p2p.Inversion:
    """The inversion that an edit's settings describe."""
    if said["picture"] is None:
        raise p2p.UsageError("made from latents given in Python, which are not recorded")
    names = ("steps", "skip", "guidance_scale", "inversion_guidance", "inner_steps", "eta", "seed", "final_alpha")
    how = settings_read(said["method"], {k: said.get(k) for k in names})
    picture, fit = from_base64(said["picture"]), said.get("fit", "crop")         # as fitted: of the size that it was run at
    made = p2p.invert(model, picture, said["prompt"], method=said["method"], height=picture.height, width=picture.width,
                      progress=progress, **how)
    return replace(made, fit=choice("fit", fit, FITS))


def _recorded(args: argparse.Namespace, s: dict[str, Any]) -> p2p.Model:
    """The model that made a picture, read as it was then. Raises CheckpointError where it is another one."""
    places = s.get("places") or {}
    held = s.get("held") and getattr(torch, str(s["held"]), None)
    files = {option: _place(args, option, places.get(option)) for option in ("vae", "text")}
    read = {name: s[name] for name in ("tile", "ema", "clip_skip", "zero_snr") if name in s}   # older pictures lack them
    where = _place(args, "model", s["model"])
    if "ema" not in s and taken_unasked(find(where, vae=files["vae"]).unet.file):
        _say([f"{args.replay} is of a version that took the averaged weights (EMA) of a file that holds both, so they are "
              "taken again"])
        read["ema"] = True
    model = p2p.load(where, args.family, s["prediction"], options.device(args),
                     getattr(torch, str(s["dtype"]), None), held=held, compile=args.compile, offload=args.offload, **files, **read)
    _same_model(args, model, s)
    return model


def _place(args: argparse.Namespace, option: str, recorded: str | None) -> str | Path | None:
    """Where a file that a picture names lies: where the user says, else where it lay, if it is still there. What is not here is
    not looked for on the Hub, since anybody may have written the name."""
    given = getattr(args, option)
    if given is not None or recorded is None or recorded in BUNDLED or Path(recorded).exists():
        return recorded if given is None else given
    wanted = f"It is the {option} recorded in {args.replay}: say with --{option} where it lies."
    if is_id(recorded):
        raise p2p.CheckpointError(f"{recorded}: not here, and not fetched from the Hub because a picture names it. {wanted} "
                                  f"If you trust it: --{option} {recorded}")
    raise p2p.CheckpointError(f"{recorded}: no such file. {wanted}")


def _same_model(args: argparse.Namespace, model: p2p.Model, s: dict[str, Any], option: str = "model") -> None:
    """Raises CheckpointError unless all is the same that is recorded of a model."""
    found = model.identity()
    for name, what, of in (("sha256", "weights", option), ("vae", "autoencoder", "vae"), ("text", "text", "text")):
        if name in s and found[name] != s[name]:
            where = model.file if name == "sha256" else model.places.get(name, f"without --{name}")
            raise p2p.CheckpointError(f"{where}: not the {what} that made {args.replay} (sha256 {str(found[name])[:12]}, recorded "
                                      f"{str(s[name])[:12]}); give the right one with --{of}")
    if odd := [f"{name} {s[name]!r}, here {found[name]!r}" for name in found if name in s and found[name] != s[name]]:
        raise p2p.CheckpointError(f"{model.file}: not read as it was for {args.replay}: {', '.join(odd)}")


def _replay(args: argparse.Namespace) -> None:
    """Runs the edit again whose settings a picture holds. They may be a stranger's: the library refuses what is of the wrong kind,
    and what is not there or no mapping is said here."""
    s = read_settings(args.replay)
    try:
        result, source, large, out = _run_again(args, s)
    except (KeyError, TypeError, AttributeError) as error:
        raise p2p.UsageError(f"{args.replay}: its settings are not complete ({error})") from None
    except p2p.UsageError as error:
        raise p2p.UsageError(f"{args.replay}: {error}") from None
    _write_edit(out, result, args, source, large)


def _run_again(args: argparse.Namespace, s: dict[str, Any]) -> tuple[Result, p2p.Inversion | None, Result | None, Output]:
    if s["command"] != "edit":
        raise p2p.UsageError(f'made by "p2p {s["command"]}", not by an edit')
    if s["seed"] is None and s["inversion"] is None:
        raise p2p.UsageError("made from a noise tensor given in Python, which is not recorded")
    edits = from_settings(s)
    out = Output(args.out, str(s["source"]))
    model = _recorded(args, s)
    how = dict(guidance_scale=s["guidance_scale"], proximal=s["proximal"], editor=find_editor(s["editor"]),
               negative_prompt=s.get("negative_prompt"), record=options.record(args), progress=not args.quiet)
    stage, source = _upscaler(args, model.family, s.get("upscale")), None
    if s["inversion"] is not None:
        source = _again(model, s["inversion"], not args.quiet)
    else:
        how |= {k: s[k] for k in ("steps", "seed", "eta", "height", "width")}
    result = p2p.edit(model, s["source"] if source is None else source, edits, **how)
    return result, source, _upscale(stage, result, args), out


def generate(args: argparse.Namespace) -> None:
    out = Output(args.out, args.prompts[0])
    model, sampling = options.load_for_sampling(args)
    result = p2p.generate(model, args.prompts, **sampling, negative_prompt=args.negative, progress=not args.quiet)
    _say([*result.notes, *_cost(args, result)])
    for i, image in enumerate(result.images):
        out.picture(str(i + 1), image, result.settings)
    out.picture("grid", grid(result.images, result.prompts), result.settings)
    out.json("settings.json", result.settings)
    out.write(args.quiet)


def maps(args: argparse.Namespace) -> None:
    """Attention maps of one picture, or of an edit, after and before the edit (the paper's figure 4)."""
    out = Output(args.out, args.prompt)
    shared = options.edit_settings(args) if args.targets else {}
    if not args.targets:
        options.refuse(args, "a prompt without targets", *EDIT_OPTIONS)
    if args.max_tokens < 1:
        raise p2p.UsageError(f"--max-tokens {args.max_tokens}: at least one position is needed")
    model, sampling = options.load_for_sampling(args)
    steps = None if args.steps_range is None else _steps(args.steps_range, sampling["steps"])
    layers = model.unet.text_sites()
    if args.site and not any(args.site in name for name in layers):
        raise p2p.UsageError(f"--site {args.site}: no layer that attends to text is named so; they are {', '.join(layers)}")
    record = p2p.Record(text=args.max_tokens, pixels=args.max_tokens if args.components else 0, before=bool(args.targets))
    sampling |= dict(record=record, negative_prompt=args.negative, progress=not args.quiet)
    if args.targets:
        result = p2p.edit(model, args.prompt, args.targets, **shared, **sampling)
    else:
        result = p2p.generate(model, args.prompt, **sampling)
    _say([*result.notes, *_cost(args, result)])
    which: dict[str, Any] = dict(sites=args.site, heads=args.head, side=args.side and _side(result, args.side), steps=steps)
    numbers: dict[str, Any] = {}
    rows = [("source" if args.targets else "", 0, False)]
    for k, name in enumerate(names(len(result.images))[1:], 1):
        rows += [(name, k, False), (f"{name}-before", k, True)]
    for name, row, before in rows:
        picture = result.images[row]
        each = result.maps.each_word(row, args.ends, before=before, **which)
        stem = f"{name}-" if name else ""
        if not before:
            out.picture(name or "picture", picture, result.settings)
        labels = [w for w, _ in each]
        out.picture(f"{stem}words", table([[picture, *(heat(m, picture.size) for _, m in each)],
                                           [picture, *(overlay(picture, m) for _, m in each)]],
                                          [f"{name or 'picture'}", *labels], ["map", "overlay"]))
        if args.components and not before:
            parts = result.maps.components(row, sites=args.site, heads=args.head, steps=steps)
            shown = [heat(parts[..., i], picture.size) for i in range(parts.shape[-1])]
            out.picture(f"{stem}components", table([[picture, *shown]], ["picture", *(f"{i + 1}" for i in range(len(shown)))]))
        numbers[name or "picture"] = {w: {"share": float(m.mean()), "max": float(m.max())} for w, m in each}
    out.json("maps.json", numbers)
    if args.arrays:
        out.add("maps.npz", result.maps.save)
    out.json("settings.json", result.settings)
    out.write(args.quiet)


def sweep(args: argparse.Namespace) -> None:
    out = Output(args.out, f"sweep {args.source}")
    over = options.once([options.over(item) for item in args.over], "--over")
    if "seed" in over:
        options.refuse(args, "--over seed=...", "seed")
    base = p2p.Edit(args.target, **options.edit_settings(args))
    model, sampling = options.load_for_sampling(args)
    done = run_sweep(model, args.source, base, over, **sampling, negative_prompt=args.negative, progress=not args.quiet)
    _say([*done.runs[0].notes, *_cost(args, *done.runs)])
    for r in done.runs:
        seed = f"seed{r.settings['seed']}-" if "seed" in over else ""
        out.picture(f"{seed}source", r.images[0], r.settings)
        for image, v in zip(r.images[1:], done.variants):
            name = "-".join(f"{re.sub(r'[^a-z0-9#]+', '-', n.lower())}{x:.15g}" for n, x in v.items()) or "edit"
            out.picture(f"{seed}{name}", image, r.settings)
    out.picture("table", done.table)
    out.json("settings.json", [r.settings for r in done.runs])
    out.write(args.quiet)


def show_tokens(args: argparse.Namespace) -> None:
    split = [tokens(p) for p in args.prompts]
    for t in split:
        print(t.text)
        for i, (token, (start, end)) in enumerate(zip(t.ids, t.spans)):
            print(f"  {i:3}  {token:5}  {tokenizer().decode([token]).strip():20} {t.text[start:end]}".rstrip())
    for target in split[1:]:
        length = max(77, len(split[0].ids), len(target.ids))
        mapper, a = align.refinement(split[0], target, length)
        print(f"{target.text!r} from {split[0].text!r}: token of the target <- token of the source")
        for j in range(len(target.ids)):
            print(f"  {j:3} <- {int(mapper[j]) if a[j] else 'new'}")


def encode(args: argparse.Namespace) -> None:
    out = Output(args.out, args.prompts[0])
    for prompt in args.prompts:
        _say(check_prompt(prompt))
    tower = load_t5(Path(args.model), options.device(args), getattr(torch, args.dtype))
    out.add("prompts.safetensors", EncodedPrompts.encoded_by(tower, args.prompts).save)
    out.write()


def inspect(args: argparse.Namespace) -> None:
    lines = describe(args.file, args.family, args.prediction, args.vae, args.hash, ema=args.ema, zero_snr=args.zero_snr)
    print("\n".join(map(printable, lines)))


def convert(args: argparse.Namespace) -> None:
    package = find(args.file, args.family, args.prediction, args.vae, args.ema, zero_snr=args.zero_snr)
    run_convert(package, args.out, args.half)
    print(args.out)


# ------------------------------------------------------------------------------------------------- writing results

_say = options.say


def _taken(inversion: p2p.Inversion) -> str:
    return f"{inversion.method} inversion, {inversion.rows} rows of the UNet"


def _cost(args: argparse.Namespace, *runs: Result) -> list[str]:
    """What --verbose adds: only the rows that a step needs are computed, so they are counted."""
    if not args.verbose:
        return []
    seconds = ", ".join(f"{name} {sum(r.timings[name] for r in runs):.2f} s" for name in runs[0].timings)
    return [f"{sum(r.rows for r in runs)} rows of the UNet; {seconds}"]


Stage = tuple[p2p.Model, dict[str, Any]]   # of super-resolution, and its settings


def _upscaler(args: argparse.Namespace, family: str, recorded: dict[str, Any] | None = None) -> Stage | None:
    """The super-resolution stage that is asked for, or recorded in the settings of a run to be done again, and its settings."""
    given = dict(steps=args.upscale_steps, guidance_scale=args.upscale_cfg, noise_level=args.upscale_level,
                 edited=args.upscale_edited or None)
    given = {k: v for k, v in given.items() if v is not None}
    if not (args.upscale or args.upscaler or recorded):
        if given:
            raise p2p.UsageError("--upscale-steps, --upscale-cfg, --upscale-level, --upscale-edited: not without --upscale")
        return None
    name = args.upscaler or (recorded["model"] if recorded else UPSCALERS.get(family))
    if name is None:
        raise p2p.UsageError("--upscale: this model ships without a super-resolution stage; name one with --upscaler")
    if recorded:
        text = _place(args, "text", (recorded.get("places") or {}).get("text"))
        stage = p2p.load(_place(args, "upscaler", name), device=options.device(args), dtype=getattr(torch, recorded["dtype"]),
                         text=text)
        _same_model(args, stage, recorded, "upscaler")
    else:
        stage = p2p.load(name, device=options.device(args), text=args.text)
    if given.get("edited") and not stage.text_encoders:
        raise p2p.UsageError(f"--upscale-edited: {name} reads no text, so there is no attention to inject into")
    return stage, {k: recorded[k] for k in ("steps", "guidance_scale", "eta", "noise_level", "edited")} if recorded else given


def _upscale(stage: Stage | None, result: Result, args: argparse.Namespace) -> Result | None:
    return stage and p2p.upscale(stage[0], result, **stage[1], progress=not args.quiet)


def _write_edit(out: Output, result: Result, args: argparse.Namespace, inversion: p2p.Inversion | None,
                large: Result | None) -> None:
    shown, n = large or result, len(result.images)
    counted = [f"{_taken(inversion)}; the edit, {result.rows}"] if inversion is not None else []
    _say([*shown.notes, *counted, *_cost(args, shown)])
    if inversion is not None and inversion.picture is not None:
        out.picture("input", inversion.picture)
    for name, image in zip(names(n), shown.images):
        out.picture(name, image, shown.settings)
    out.picture("grid", grid(shown.images, shown.prompts), shown.settings)
    if large is not None:
        out.picture("small", grid(result.images, result.prompts), result.settings)
    out.json("settings.json", shown.settings)
    if result.maps is not None:
        found = [leakage(result, k) for k in range(1, n)]
        out.json("leakage.json", [f._asdict() for f in found])
        for k, f in enumerate(found, 1):
            _say([f'"{result.prompts[k]}" is about {", ".join(f.about) or "nothing"}; elsewhere {f.outside:.1%} of '
                  "the pixels changed visibly"])
        if args.report:
            page = report(result, found)
            out.add("report.html", lambda path: path.write_text(page, encoding="utf-8"))
    out.write(args.quiet)


def _side(result: Result, side: int) -> tuple[int, int]:
    sides = result.maps.sides()
    for found in sides:
        if found[0] == side:
            return found
    raise p2p.UsageError(f"--side {side}: maps were recorded at {', '.join(f'{h} x {w}' for h, w in sides)}")


def _steps(text: str, n: int) -> range:
    found = options.window(text, "--at")
    first, end = (found, found + 1) if not isinstance(found, tuple) else found
    if not 0 <= first < end <= n or first != int(first) or end != int(end):
        raise p2p.UsageError(f"--at {text}: a step, or FIRST:END, of 0 to {n}")
    return range(int(first), int(end))

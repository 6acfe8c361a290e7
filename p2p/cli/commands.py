"""The commands for one run, given their parsed arguments, which `checks` has passed."""
from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

import p2p
from p2p.cli import options, replay, values
from p2p.cli.output import Output
from p2p.cli.results import Stage, check_stage, cost, edited, enlarged, generated, stage, taken, write_edit
from p2p.image import open_picture
from p2p.maps import AttentionMaps
from p2p.models.attention import SelfAttention
from p2p.request.editing import edit_request
from p2p.request.emphasis import prompt_tokens
from p2p.request.inverting import DEFAULT, expected, leads_away, negative_read
from p2p.request.loading import check_alone
from p2p.request.ready import prepared, prompt_notes
from p2p.request.source import LONE
from p2p.request.start import Sampling, fitting, solver
from p2p.run import Result, run
from p2p.show.pictures import heat, overlay, table
from p2p.show.preview import STEPS as PREVIEW_STEPS
from p2p.show.preview import shortened
from p2p.show.sweep import TOLD_APART, edits_of, shown
from p2p.show.sweep import sweep as run_sweep


def edit(args: argparse.Namespace) -> None:
    if args.replay is not None:
        return replay.run(args)
    prompts = values.prompts(args)
    targets = options.targets(args, prompts if args.inversion is not None else prompts[1:])
    settings = dict(proximal=values.proximal(args), editor=args.editor, negative_prompt=values.negative(args),
                    record=options.record(args, targets))
    inversion = args.inversion and p2p.Inversion.load(args.inversion)
    out = Output(args.out, options.title(inversion.prompt if inversion else prompts[0], targets))
    if inversion is not None:
        source = inversion
        model, sampling = options.load(args), dict(guidance_scale=args.cfg)
    elif args.image is not None:
        picture, model = open_picture(args.image), options.load(args)
        upscaler = stage(args, model.family, options.dtype(args))
        sampling = dict(guidance_scale=args.cfg)
        if args.preview and args.steps is None and args.timesteps is None:
            usual = _expected(args, model, picture).steps
            if usual > PREVIEW_STEPS:
                vars(args).update(shortened(vars(args), usual), steps=PREVIEW_STEPS)   # the inversion's too
        source = _inverted(args, model, picture, targets, upscaler, **settings, **sampling)
    else:
        source = prompts[0]
        model, sampling = options.load_for_sampling(args)
        if args.preview and args.steps is None and args.timesteps is None:
            sampling["steps"] = min(PREVIEW_STEPS, solver(model, Sampling(**options.solver(args)))[1])
    if args.image is None:
        upscaler = stage(args, model.family, options.dtype(args))
    result = edited(args, model, source, targets, upscaler, **settings, **sampling)
    write_edit(out, result, args, source if isinstance(source, p2p.Inversion) else None,
               enlarged(upscaler, result, args))


def invert(args: argparse.Namespace) -> None:
    out = Output(args.out, args.source)
    picture, model = open_picture(args.image), options.load(args)
    started = time.perf_counter()
    inversion = _invert(args, model, picture, _inversion_settings(args) |
                        dict(negative_prompt=values.negative(args)))
    seconds = [f"{time.perf_counter() - started:.2f} s"] if args.verbose else []
    options.say([*model.notes, *prompt_notes(model, [args.source]), *inversion.notes,
                 ", ".join([taken(inversion), *seconds])])
    out.add("inversion.safetensors", inversion.save)
    out.picture("picture", inversion.picture)
    out.write(args.quiet)


def _invert(args: argparse.Namespace, model: p2p.Model, picture: Image.Image,
            settings: dict[str, Any]) -> p2p.Inversion:
    return p2p.invert(model, picture, args.source, **settings, progress=options.progress(args))


def _expected(args: argparse.Namespace, model: p2p.Model, picture: Image.Image) -> p2p.Inversion:
    """What `_inverted` will give, without its latents. Raises UsageError."""
    _, (height, width), _ = fitting(model, picture, args.fit or "crop", args.height, args.width)
    return expected(model, args.source, **_before_edits(args, model) | dict(height=height, width=width))


def _inverted(args: argparse.Namespace, model: p2p.Model, picture: Image.Image, edits: list[p2p.Edit],
              upscaler: Stage | None = None, **settings: Any) -> p2p.Inversion:
    """The picture, inverted. Raises UsageError for faults in its edits too, before it spends minutes."""
    request = edit_request(model, _expected(args, model, picture), edits, **settings)
    check_stage(upscaler, model, request.source, request.edits, request.settled.shape)
    return _invert(args, model, picture, _before_edits(args, model))


def _before_edits(args: argparse.Namespace, model: p2p.Model) -> dict[str, Any]:
    """The arguments of `p2p.invert`, with the edits' negative prompt where inverting reads one."""
    read = negative_read(model, args.method or DEFAULT, args.inversion_cfg, values.negative(args))
    return _inversion_settings(args) | dict(negative_prompt=read)


def _inversion_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `p2p.invert` that were given."""
    given = dict(method=args.method, fit=args.fit, seed=args.seed, guidance_scale=args.cfg,
                 height=args.height, width=args.width, **options.solver(args), **options.inverting(args))
    return {k: v for k, v in given.items() if v is not None}


def generate(args: argparse.Namespace) -> None:
    if args.replay is not None:
        small, result, out = replay.generate(args)
    else:
        out = Output(args.out, args.prompts[0])
        model, sampling = options.load_for_sampling(args)
        upscaler = stage(args, model.family, options.dtype(args))
        many = len(args.seed) if isinstance(args.seed, list) and len(args.prompts) == 1 else 1
        small = generated(args, model, args.prompts * many, **sampling, negative_prompt=values.negative(args))
        result = enlarged(upscaler, small, args) or small
    options.say([*(note for note in result.notes if note not in small.notes), *cost(args, result)])
    for name, image in zip(result.names(), result.images):
        out.picture(name, image, result.settings)
    out.picture("grid", result.grid(), result.settings)
    if result is not small:
        out.picture("small", small.grid(), small.settings)
    out.json("settings.json", result.settings)
    out.write(args.quiet)


def maps(args: argparse.Namespace) -> None:
    """Attention maps of one picture, or of an edit, with and without the edit (the paper's figure 4)."""
    targets = options.targets(args, args.targets) if args.targets else []
    if args.image is not None and not targets:
        _check_unguided(args)
    out = Output(args.out, options.title(args.source, targets))
    if args.image is None:
        model, sampling = options.load_for_sampling(args)
        run_steps = solver(model, Sampling(**options.solver(args)))[1]
        size = model.latent_shape(args.height, args.width)[1:]
    else:
        picture, model = open_picture(args.image), options.load(args)
        planned, sampling = _expected(args, model, picture), dict(guidance_scale=args.cfg)
        size = planned.latents.shape[2:]
        # O-BELM's first step is the source's
        run_steps = planned.calls - (planned.method == "belm" and planned.calls > 1)
    steps = None if args.steps_range is None else _steps(args.steps_range, run_steps)
    _check_layers(model, args)
    apart = args.arrays or steps is not None or args.head is not None   # single steps and heads are shown
    record = p2p.Record(text=args.max_tokens, pixels=(args.max_tokens or 32 * 32) if args.components else 0,
                        before=bool(args.targets), mean=not apart, layers=args.site)
    selection = _selection(args, model, record, size) | dict(steps=steps)
    sampling |= dict(record=record, negative_prompt=values.negative(args))
    if args.image is not None:
        result = _run_on_picture(args, model, picture, targets, out, sampling)
    elif targets:
        result = edited(args, model, args.source, targets, **sampling)
    else:
        result = generated(args, model, args.source, **sampling)
    options.say(cost(args, result))
    _add_maps(args, out, result, selection, targets)
    if args.arrays:
        out.add("maps.npz", result.maps.save)
    out.json("settings.json", result.settings)
    out.write(args.quiet)


def _add_maps(args: argparse.Namespace, out: Output, result: Result, selection: dict[str, Any],
              targets: list[p2p.Edit]) -> None:
    """The pictures, the maps of their words and, where asked for, their components."""
    numbers: dict[str, Any] = {}
    rows = [("source" if args.targets else "", 0, False)]
    for k, name in enumerate(result.names()[1:] if targets else [], 1):
        rows += [(name, k, False), (f"{name}-before", k, True)]
    for name, row, before in rows:
        picture = result.images[row]
        each = result.maps.each_word(row, args.ends, before=before, **selection)
        stem, label = f"{name}-" if name else "", name.removesuffix("-before") if before else name
        if not before:
            out.picture(name or "picture", picture, result.settings)
        labels = [w for w, _ in each]
        out.picture(f"{stem}words", table([[picture, *(heat(m, picture.size) for _, m in each)],
                                           [picture, *(overlay(picture, m) for _, m in each)]],
                                          [label or "picture", *labels],
                                          ["map before" if before else "map", "overlay"]))
        if args.components and not before:
            parts = result.maps.components(row, sites=args.site, heads=args.head, steps=selection["steps"])
            columns = [heat(parts[..., i], picture.size) for i in range(parts.shape[-1])]
            heads = ["picture", *(f"{i + 1}" for i in range(len(columns)))]
            out.picture(f"{stem}components", table([[picture, *columns]], heads))
        numbers[name or "picture"] = {w: {"share": float(m.mean()), "max": float(m.max())} for w, m in each}
    out.json("maps.json", numbers)


def _run_on_picture(args: argparse.Namespace, model: p2p.Model, picture: Image.Image,
                    targets: list[p2p.Edit], out: Output, sampling: dict[str, Any]) -> Result:
    """The edits of a picture; without targets, one of the picture to what it is, whose first row counts."""
    edits = targets or [p2p.Edit(args.source, cross_replace_steps=0.0, self_replace_steps=0.0)]
    source = _inverted(args, model, picture, edits, **sampling)
    out.picture("input", source.picture)
    options.say([taken(source)])
    if targets:
        return edited(args, model, source, edits, **sampling)
    ready = prepared(model, source, edits, **sampling)
    options.say([*model.notes, *prompt_notes(model, [args.source]), *source.notes])   # none on that edit
    return run(model, ready, sampling["record"], options.progress(args))


def _check_unguided(args: argparse.Namespace) -> None:
    """Raises UsageError for options of guidance where the picture's row, shown alone, has none."""
    if (method := args.method or DEFAULT) in LONE:
        unguided = f"a picture alone, inverted by {method}: its row is not guided"
        read = leads_away(method, args.inversion_cfg)   # while inverting
        values.refuse(args, unguided, ("cfg",) if read else ("cfg", "negative"))


def _check_layers(model: p2p.Model, args: argparse.Namespace) -> None:
    """Raises UsageError for a model that draws nothing by itself, for a name of no layer, and for components
    without self-attention."""
    check_alone(model)
    layers, site = model.unet.text_sites(), args.site
    pixels = [layer.site for layer in model.unet.layers(SelfAttention)]
    if args.components and not any((site or "") in name for name in pixels):
        raise p2p.UsageError(f"--components: of self-attention, and no layer "
                             f"{'of this model' if site is None else f'named {site}'} attends to pixels alone"
                             f"{'; those that do: ' if pixels else ''}{', '.join(pixels)}")
    if site is not None and not any(site in name for name in layers):
        raise p2p.UsageError(f"--site {site}: no layer that attends to text is named so; they are "
                             f"{', '.join(layers)}")


def sweep(args: argparse.Namespace) -> None:
    over = values.over(args.over)
    if "seed" in over:
        args.seed = 0   # none is drawn and printed: the sweep has its own
    base = p2p.Edit(args.target, **options.edit_settings(args))
    out = Output(args.out, f"sweep {options.title(args.source, [base])}")
    source, sampling = args.source, dict(negative_prompt=values.negative(args))
    if args.image is None:
        model, sampled = options.load_for_sampling(args)
        sampling |= sampled
    else:
        picture, model = open_picture(args.image), options.load(args)
        sampling["guidance_scale"] = args.cfg
        edits = edits_of(model, _expected(args, model, picture), base, over)[2]
        source = _inverted(args, model, picture, edits, **sampling)
        out.picture("input", source.picture)
        options.say([taken(source)])
    done = run_sweep(model, source, base, over, **sampling, progress=options.progress(args))
    options.say([*done.runs[0].notes, *cost(args, *done.runs)])
    for r in done.runs:
        seed = f"seed{r.settings['seed']}-" if "seed" in over else ""
        out.picture(f"{seed}source", r.images[0], r.settings)
        for image, v in zip(r.images[1:], done.variants):
            parts = [re.sub(r"[^a-z0-9#]+", "-", n.lower()) + shown(x, TOLD_APART).replace(":", "-")
                     for n, x in v.items()]
            out.picture(seed + ("-".join(parts) or "edit"), image, r.settings)
    out.picture("table", done.table)
    out.json("settings.json", [r.settings for r in done.runs])
    out.write(args.quiet)


def web(args: argparse.Namespace) -> None:
    from p2p.web.serve import serve  # Gradio takes a second to import

    serve(options.load(args), args.host, args.port, args.share)


def _selection(args: argparse.Namespace, model: p2p.Model, record: p2p.Record,
               size: Sequence[int]) -> dict[str, Any]:
    """Which of the maps are shown that a run on latents of that size (H, W) will record. Raises UsageError
    where there are none, before the run."""
    pixels = model.unet.site_pixels(*size)
    planned = {site: torch.empty(1, 1, model.unet.get_submodule(site).heads, pixels[site], 1, device="meta")
               for site in record.sites(model.unet, *size)}
    maps = AttentionMaps([prompt_tokens(model, args.source)], [], (size[0], size[1]), 1, planned,
                         frozenset(layer.site for layer in model.unet.layers(SelfAttention)))
    chosen: dict[str, Any] = dict(sites=args.site, heads=args.head)
    sides = {shape[0]: shape for shape in reversed(maps.sides())}   # of one height, the largest
    if args.side is not None and args.side not in sides:
        there = ", ".join(f"{h} x {w}" for h, w in sides.values())
        raise p2p.UsageError(f"--side {args.side}: maps are recorded at {there}")
    if args.components:
        maps.mean(columns="pixels", **chosen)   # raises
    side = None if args.side is None else sides[args.side]
    maps.mean(side=side, **chosen)
    return chosen | dict(side=side)


def _steps(text: str, n: int) -> range:
    window = values.window(text, "--at")
    first, end = (window, window + 1) if not isinstance(window, tuple) else window
    if not 0 <= first < end <= n or first != int(first) or end != int(end):
        raise p2p.UsageError(f"--at {text}: a step, or FIRST:END, of 0 to {n}")
    return range(int(first), int(end))

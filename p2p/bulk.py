"""What the commands for many edits do, given their parsed arguments: batch, eval, dataset."""
from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from tqdm import tqdm

import p2p
from p2p import dataset, metrics, options, pie
from p2p.batch import Batch
from p2p.batch import run as run_batch
from p2p.edit import to_dict
from p2p.invert import METHODS
from p2p.run import EDITORS
from weights.emoji import recogniser


def batch(args: argparse.Namespace) -> int:
    for name in ("workers", "together"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise p2p.UsageError(f"--{name} must be a whole number from 1, not {value}")
    what = Batch(args.jobs, args.out, options.loading(args), args.device, args.together, args.retry_failed,
                 args.quiet, _defaults(args))
    counts = run_batch(what, args.engine, args.workers)
    if not args.quiet:
        print(", ".join(f"{n} {state}" for state, n in counts.items()), file=sys.stderr)
        if counts["failed"]:
            print(f"why they failed: {args.out / 'failed'}; --retry-failed runs them again", file=sys.stderr)
    print(args.out / "results.jsonl")
    return 1 if counts["failed"] or counts["open"] else 0


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the jobs that do not say otherwise, by the names and in the form of a list."""
    usual, given = (to_dict(p2p.Edit("", **settings)) for settings in ({}, options.edit_settings(args)))
    said = {"steps": args.steps, "guidance_scale": args.cfg, "seed": args.seed, "eta": args.eta,
            "height": args.height, "width": args.width, "method": args.method, "skip": args.skip,
            "inner_steps": args.inner_steps, "inversion_guidance": args.inversion_cfg,
            "final_alpha": args.final_alpha, "editor": args.editor, "proximal": options.proximal(args),
            "negative_prompt": args.negative}
    return {k: v for k, v in (said | given).items() if v is not None and v != usual.get(k)}


def evaluate(args: argparse.Namespace) -> None:
    methods, editors = args.methods.split(","), args.editors.split(",")
    for what, names, known in (("--methods", methods, METHODS), ("--editors", editors, ("p2p", *EDITORS))):
        if unknown := [name for name in names if name not in known]:
            raise p2p.UsageError(f"{what} {', '.join(unknown)}: known are {', '.join(known)}")
    if args.limit is not None and args.limit < 1:
        raise p2p.UsageError(f"--limit must be a whole number from 1, not {args.limit}")
    items = pie.read(args.data, args.limit)
    metrics.torchmetrics()
    judges = metrics.Judges(args.lpips and metrics.lpips(args.lpips), args.clip and metrics.clip(args.clip),
                            args.dino and metrics.structure(args.dino))
    sampling = {"steps": args.steps, "guidance_scale": args.cfg, "seed": args.seed}
    windows = {"cross_replace_steps": args.cross, "self_replace_steps": args.self_}
    ways = {m if e == "p2p" else f"{m}, {e}": {"method": m, **sampling, **(windows if e == "p2p" else {"editor": e})}
            for m in methods for e in editors}
    model = options.load(args)
    options.say(model.notes)
    report = pie.evaluate(model, items, ways, args.out, judges, blend=not args.no_blend, progress=not args.quiet)
    for convention in metrics.CONVENTIONS:
        print(f"{convention}\n{pie.table(report, convention)}\n")
    for name, rows in report.items():
        for key, why in list(rows["failed"].items())[:5]:
            print(f"{name}, {key} failed: {why}", file=sys.stderr)
    print(args.out / "pie.json")


def make_dataset(args: argparse.Namespace) -> None:
    for name in ("samples", "keep", "steps", "together"):
        if getattr(args, name) < 1:
            raise p2p.UsageError(f"--{name} must be a whole number from 1, not {getattr(args, name)}")
    pairs, model = dataset.read(args.prompts), options.load(args)
    options.say(model.notes)
    if args.clip is not None:
        embedder = metrics.clip(args.clip)
    elif model.family == "emoji":
        eye = recogniser.load()
        embedder = metrics.Embedder(lambda x: recogniser.embed(eye, torch.nn.functional.interpolate(2 * x - 1, 64, mode="area")),
                                    recogniser.embed_captions)
    else:
        raise p2p.UsageError("the filters compare pictures and texts: give --clip, open_clip's weights of OpenAI's ViT-L/14")
    least = args.min_image if args.min_image is not None else 0.7 if args.clip else 0.5
    recipe = dataset.Recipe(args.steps, args.samples, args.keep, image=least, direction=args.min_direction, text=args.min_text,
                            together=args.together, seed=args.seed)
    todo = len(dataset.remaining(pairs, args.out))
    bar = tqdm(dataset.make(model, pairs, args.out, embedder, recipe), total=todo, unit="prompt", disable=args.quiet)
    for pair, counts in bar:
        if why := next((name for name in counts if name.startswith("failed")), None):
            tqdm.write(f"prompt {pair.index}: {why}", file=sys.stderr)
    total = dataset.finish(args.out)
    if not args.quiet:
        print(", ".join(f"{name} {n}" for name, n in total.items()), file=sys.stderr)
    export = {"webdataset": dataset.webdataset, "parquet": dataset.parquet}.get(args.format)
    for file in [args.out / "seeds.json", *(export(args.out) if export else [])]:
        print(file)

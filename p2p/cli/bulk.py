"""The commands for many edits, given their parsed arguments: batch, eval, dataset."""
from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import p2p
from p2p.cli import options, values
from p2p.editors import EDITORS
from p2p.lists import dataset, metrics, pie, pie_data, pie_report, preview
from p2p.lists.batch import Batch, load_for, read_for, run_jobs
from p2p.lists.batch import run as run_batch
from p2p.lists.ip2p import Recipe
from p2p.lists.jobs import Job, Store
from p2p.lists.pie_report import read_json
from p2p.lists.protocol import GROUPS, PUBLISHED
from p2p.lists.protocol import find as find_method
from p2p.lists.work import Failure
from p2p.request.inverting import DEFAULT, READ_BY
from p2p.request.ready import unread_words
from p2p.request.settings import to_dict
from p2p.request.source import METHODS
from p2p.show.pictures import save_png
from p2p.show.preview import stacked
from p2p.show.sweep import shown
from p2p.weights.digest import sha256
from p2p.weights.emoji import recogniser
from p2p.weights.untrusted import printable

TOGETHER = 4   # jobs in one batch of the network


def batch(args: argparse.Namespace) -> int:
    together = TOGETHER if args.together is None else args.together
    config = Batch(args.jobs, args.out, options.loading(args), args.device, together, args.retry_failed,
                   args.quiet, _defaults(args))
    if args.preview is not None:
        return _preview_batch(config, args.preview)
    counts = run_batch(config, args.engine, args.workers)
    if not args.quiet:
        print(", ".join(f"{n} {state}" for state, n in counts.items()), file=sys.stderr)
        if counts["failed"]:
            print(f"why they failed: {args.out / 'failed'}; --retry-failed runs them again", file=sys.stderr)
    print(args.out / "results.jsonl")
    return 1 if counts["failed"] or counts["open"] else 0


def _preview_batch(config: Batch, n: int) -> int:
    """The first jobs of a list in few steps, as one picture; its path is printed."""
    model = load_for(config)
    rows, failed = [], 0
    for job, row in preview.jobs(model, read_for(config, model)[:n]):
        if isinstance(row, Failure):
            failed += 1
            print(f"line {job.line} fails: {printable(row.error)}", file=sys.stderr)
        else:
            rows.append(row)
    _put_preview(config.out, rows)
    return 1 if failed else 0


def _put_preview(out: Path, rows: list[Image.Image]) -> None:
    """Raises UsageError."""
    if not rows:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_png(out / "preview.png", stacked(rows))
    except OSError as error:
        raise p2p.UsageError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(out / "preview.png")


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Default settings of the jobs, with the names and types of a list."""
    defaults, edit = (to_dict(p2p.Edit("", **settings)) for settings in ({}, options.edit_settings(args)))
    settings = {**options.solver(args), "guidance_scale": args.cfg, "seed": args.seed,
                "height": args.height, "width": args.width, "method": args.method, "fit": args.fit,
                **options.inverting(args), "editor": args.editor, "proximal": values.proximal(args),
                "negative_prompt": values.negative(args)}
    return {k: v for k, v in (settings | edit).items() if v is not None and v != defaults.get(k)}


def evaluate(args: argparse.Namespace) -> int:
    ways = _ways(args)
    if all(way.job is None for way in ways.values()):
        values.refuse(args, "--pictures alone, which edits nothing", ("workers", "retry_failed"))
    items = pie_data.read(args.data, args.limit, None if args.types is None else args.types.split(","))
    metrics.torchmetrics()
    judges = metrics.Judges(args.lpips and metrics.lpips(args.lpips), args.clip and metrics.clip(args.clip),
                            args.dino and metrics.structure(args.dino),
                            tuple(filter(None, (args.lpips, args.clip, args.dino))))
    config = Batch(None, args.out, options.loading(args), args.device, 1, args.retry_failed, args.quiet)
    model = load_for(config, args.engine)
    rank = int(os.environ["RANK"]) if args.engine == "torchrun" else 0

    def run(jobs: Sequence[Job], folder: Path) -> None:
        run_jobs(model, jobs, replace(config, out=folder), args.engine, args.workers)
        store = Store(folder)
        waits = args.engine == "torchrun" and rank == 0
        while waits and not all(store.done(j) or store.failed(j) for j in jobs):
            time.sleep(1)   # for the other ranks

    data = hashlib.sha256((args.data / "mapping_file.json").read_bytes()).hexdigest()[:16]
    report = pie.evaluate(model, items, ways, args.out, judges, run=run, data=data, figures=rank == 0,
                          progress=options.progress(args))
    if rank:
        return 0
    for convention in metrics.CONVENTIONS:
        print(f"{convention}\n{pie_report.table(report, convention, published=args.compare is not None)}\n")
    if args.compare is not None:
        print(pie_report.published_table({name.split(", ")[0] for name in report}) + "\n")
    for name in ways:
        for key, why in list(report[name]["failed"].items())[:5]:
            print(printable(f"{name}, {key} failed: {why}"), file=sys.stderr)
    for file in ("pie.md", "pie.csv", "pie.json"):
        print(args.out / file)
    return 1 if any(report[name]["failed"] for name in ways) else 0


def _ways(args: argparse.Namespace) -> dict[str, pie.Way]:
    """The rows of the table, by name. Raises UsageError."""
    elsewhere = [values.pair(option, "=", "--pictures", "NAME=FOLDER") for option in args.pictures or ()]
    ways = [] if args.methods is None and (elsewhere or args.ways) else _methods(args)
    if args.ways is not None:
        form = 'expected {"NAME": {settings of a job, "like": a row of --methods}, ...}'
        rows = read_json(args.ways, form)
        if not isinstance(rows, dict) or not all(isinstance(settings, dict) for settings in rows.values()):
            raise p2p.UsageError(f"--ways {args.ways}: {form}")
        ways += [(name, pie.custom(settings)) for name, settings in rows.items()]
    ways += [(name, pie.pictures(Path(folder), args.strips)) for name, folder in elsewhere]
    for name, _ in ways:
        folder = Path(name).name == name and name.isprintable() and not name.startswith((".", "pie."))
        if not (name and folder) or [n for n, _ in ways].count(name) > 1:
            raise p2p.UsageError(f"{name!r}: a row's name is that of its folder in --out, and no other row "
                                 "has it")
    return dict(ways)


OPTIONS = {"steps": "steps", "guidance_scale": "cfg", "seed": "seed"}   # fields of `Method`


def _methods(args: argparse.Namespace) -> list[tuple[str, pie.Way]]:
    """Rows of the protocol. A published one with changed settings has them in its name; a corrected one keeps
    its name. Raises UsageError."""
    editors = ("p2p" if args.editors is None else args.editors).split(",")
    if unknown := [name for name in editors if name not in ("p2p", *EDITORS)]:
        raise p2p.UsageError(f"--editors {', '.join(unknown)}: known are {', '.join(('p2p', *EDITORS))}")
    names: list[str] = []
    typed = (DEFAULT if args.methods is None else args.methods).split(",")
    for name in typed:
        edited = [name if e == "p2p" else f"{name}, {e}" for e in editors]
        names += GROUPS.get(name) or (edited if name in METHODS else [name])
    if args.editors is not None and not any(name in METHODS for name in typed):
        raise p2p.UsageError(f"--editors: of corrected rows that are named ({', '.join(METHODS)}); published "
                             "ones and groups have their own")
    changes = {field: value for field, option in OPTIONS.items()
               if (value := getattr(args, option)) is not None}
    changes |= values.windows_of_all(args) | ({"blend": None} if args.no_blend else {})
    out, read = [], set()
    for name in dict.fromkeys(names):
        row = find_method(name)
        idle = {"cross", "self_", "blend"} if row.editor else set()
        idle |= set() if row.inversion in READ_BY["seed"] else {"seed"}
        read |= set(changes) - idle
        changed = {field: value for field, value in changes.items()
                   if field not in idle and value != getattr(row, field)}
        label = "".join(f", no {k}" if v is None else f", {k.strip('_')} {shown(v).replace(':', '-')}"
                        for k, v in changed.items())
        out.append((name + label if name in PUBLISHED else name, pie.method(name, **changed)))
    if unread := [_option(field) for field in changes if field not in read]:
        raise p2p.UsageError(f"{', '.join(unread)}: no row of --methods reads it (windows and blends are "
                             f"Prompt-to-Prompt's, and seeds are read by {' and '.join(READ_BY['seed'])})")
    return out


def _option(field: str) -> str:
    return "--no-blend" if field == "blend" else f"--{OPTIONS.get(field, field).strip('_')}"


def make_dataset(args: argparse.Namespace) -> int:
    pairs, model = dataset.read(args.prompts, args.format), options.load(args)
    options.say(model.notes)
    if args.clip is not None:
        embedder = metrics.clip(args.clip, prepare=metrics.squeezed)
    elif model.family in ("emoji", "emoji-flow"):
        eye = recogniser.load()

        def embed(x: torch.Tensor) -> torch.Tensor:
            return recogniser.embed(eye, torch.nn.functional.interpolate(2 * x - 1, 64, mode="area"))

        embedder = metrics.Embedder(embed, recogniser.embed_captions, sha256(recogniser.FILE))
    else:
        raise p2p.UsageError("the filters compare pictures and texts: give --clip, open_clip's weights of "
                             "OpenAI's ViT-L/14")
    least = args.min_image
    if least is None:
        least = 0.7 if args.clip else 0.5
    limits = {name: n for name in ("samples", "keep", "together") if (n := getattr(args, name)) is not None}
    recipe = Recipe(args.steps, image=least, direction=args.min_direction, text=args.min_text, seed=args.seed,
                    sampler=args.recipe, **limits)
    if args.preview is not None:
        _put_preview(args.out, list(preview.samples(model, pairs[: args.preview], embedder, recipe)))
        return 0
    todo = len(dataset.remaining(pairs, args.out))
    bar = tqdm(dataset.make(model, pairs, args.out, embedder, recipe), total=todo, unit="prompt",
               disable=args.quiet)
    failed = False
    for pair, counts in bar:
        for note in dict.fromkeys(note for prompt in pair.prompts for note in unread_words(model, prompt)):
            tqdm.write(f"prompt {pair.index}: note: {printable(note)}", file=sys.stderr)
        if why := next((name for name in counts if name.startswith("failed")), None):
            failed = True
            tqdm.write(f"prompt {pair.index}: {why}", file=sys.stderr)
    total = dataset.finish(args.out)
    if not args.quiet:
        print(", ".join(f"{name} {n}" for name, n in total.items()), file=sys.stderr)
    if left := len(dataset.remaining(pairs, args.out)):
        print(f"{left} of {len(pairs)} prompts failed: no sample of them could be drawn; the same command "
              "tries again",
              file=sys.stderr)
    export = {"webdataset": dataset.webdataset, "parquet": dataset.parquet}.get(args.format)
    for file in [args.out / "seeds.json", *(export(args.out) if export else [])]:
        print(file)
    return 1 if left or failed else 0

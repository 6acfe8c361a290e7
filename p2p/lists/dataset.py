"""A folder of training pairs in the layout of InstructPix2Pix's `generate_img_dataset.py`, sampled by
`p2p.lists.ip2p`:

    OUT/0000012/{prompt.json, SEED_0.jpg, SEED_1.jpg, ..., metadata.jsonl}

prompt.json is the list's entry with all its fields. metadata.jsonl has a line for each pair, the best first,
with the authors' keys, and is absent where no pair was kept. counts.json (which marks a finished folder) and
OUT/recipe.json are ours.
"""
from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from p2p.errors import UsageError
from p2p.lists import lines
from p2p.lists.ip2p import Kept, Prompts, Recipe, check
from p2p.lists.ip2p import samples as samples_of
from p2p.lists.lines import write
from p2p.lists.metrics import Embedder
from p2p.lists.pie_report import flat, read_json
from p2p.model import Model
from p2p.request.prompts import check as check_prompt
from p2p.weights.aside import appearing, aside, finished, sweep
from p2p.weights.untrusted import brief

WHOLE = "counts.json"   # the file that marks a finished folder


class Pair(NamedTuple):
    index: int               # of the entry: the folder's name
    prompts: Prompts
    entry: dict[str, Any]    # of the list, with all its fields


def read(file: Path) -> list[Pair]:
    """Reads a list in InstructPix2Pix's format: entries {"caption" (or "input"), "edit", "output"} with any
    other fields ("url"). Raises UsageError naming all invalid entries."""
    def parts(entry: Any, _: int) -> tuple[Prompts, dict[str, Any]]:
        form = '{"caption": ..., "edit": ..., "output": ...}'
        entry = lines.present(entry)
        both = isinstance(entry, dict) and {"caption", "input"} <= entry.keys()
        if not isinstance(entry, dict) or (both and entry["caption"] != entry["input"]):
            raise UsageError(f'expected {form}, or "input" instead of "caption"; not {brief(entry)}')
        texts = {"caption": entry.get("input")} | entry
        if absent := [k for k in ("caption", "edit", "output") if texts.get(k) is None]:
            raise UsageError(f"no {', '.join(map(repr, absent))}; expected {form}")
        if not all(isinstance(texts[k], str) for k in ("caption", "edit", "output")):
            raise UsageError("caption, edit and output are texts")
        check_prompt(texts["caption"])
        check_prompt(texts["output"])
        return Prompts(texts["caption"], texts["output"]), entry

    return [Pair(i, *parsed) for i, parsed in enumerate(lines.read(file, parts, "no prompt in it"))]


def _folder(pair: Pair, out: Path) -> Path:
    return out / f"{pair.index:07}"


def remaining(pairs: Sequence[Pair], out: Path) -> list[Pair]:
    """The pairs that have no finished folder yet."""
    return [pair for pair in pairs if not finished(_folder(pair, out) / WHOLE)]


def _same(pairs: Sequence[Pair], out: Path, recipe: Mapping[str, Any]) -> None:
    """Raises UsageError where the finished folders were made with other settings or prompts: they would stay
    unchanged under a recipe that is not theirs."""
    done = [pair for pair in pairs if finished(_folder(pair, out) / WHOLE)]
    if not done:
        return
    before, now = flat(_json(out / "recipe.json")), flat(dict(recipe))
    other = [f"{k} {before.get(k)!r}, not {v!r}" for k, v in now.items() if k != "model"
             and before.get(k) != v]
    for pair in done:
        folder = _folder(pair, out)
        entry = _json(folder / "prompt.json")
        if entry != pair.entry:
            other.append(f"{folder.name} from {entry}, not {pair.entry}")
    if other:
        raise UsageError(f"--out {out}: made with {'; '.join(other[:9])}. Ask for the same to go on, or give "
                         "another folder")


def make(model: Model, pairs: Sequence[Pair], out: Path, embedder: Embedder,
         recipe: Recipe) -> Iterator[tuple[Pair, Counter[str]]]:
    """Makes a folder for every pair that has none: samples until `keep` passed or `samples` were drawn; then
    the folder appears at once, unless none could be drawn.

    -> the pair, and how many samples were drawn, dropped by each filter and kept. Raises UsageError where the
    disk is full, and at once where existing folders were made with other settings, another model or another
    judge.
    """
    check(model, recipe)
    settings = asdict(recipe) | {"model": model.name, "identity": model.identity(), "judge": embedder.sha256}
    settings = json.loads(json.dumps(settings))   # tuples become lists
    _same(pairs, out, settings)
    return _made(model, pairs, out, embedder, recipe, settings)


@torch.no_grad()
def _made(model: Model, pairs: Sequence[Pair], out: Path, embedder: Embedder, recipe: Recipe,
          settings: Mapping[str, Any]) -> Iterator[tuple[Pair, Counter[str]]]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        write(out / "recipe.json", json.dumps(settings))
        for pair in remaining(pairs, out):
            best, counts = samples_of(model, pair.prompts, embedder, recipe)
            if counts["samples"]:   # else the next run tries again
                _put(_folder(pair, out), pair, best, counts)
            yield pair, counts
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); what is done is kept, start "
                         "again to go on") from None


def _put(folder: Path, pair: Pair, best: Sequence[Kept], counts: Counter[str]) -> None:
    with appearing(folder, WHOLE) as temporary:
        (temporary / "prompt.json").write_text(json.dumps(pair.entry), encoding="utf-8")
        (temporary / WHOLE).write_text(json.dumps(counts), encoding="utf-8")
        for info, images in best:
            for k, image in enumerate(images):
                image.save(temporary / f"{info['seed']}_{k}.jpg", quality=100)
        if best:
            rows = "".join(json.dumps(info) + "\n" for info, _ in best)
            (temporary / "metadata.jsonl").write_text(rows, encoding="utf-8")


def _json(file: Path) -> Any:
    """A file of an earlier run. Raises UsageError."""
    return read_json(file, "give another --out")


def finish(out: Path) -> Counter[str]:
    """Writes seeds.json, the list that InstructPix2Pix's `prepare_dataset.py` makes of such a folder.
    -> the counts of all prompts"""
    total, seeds = Counter(), []
    for folder in sorted(p for p in out.iterdir() if finished(p / WHOLE)):
        total.update(_json(folder / WHOLE))
        if drawn := [p.name.split("_")[0] for p in sorted(folder.glob("*_0.jpg"))]:
            seeds.append([folder.name, drawn])
    write(out / "seeds.json", json.dumps(seeds))
    return total


def samples(out: Path) -> Iterator[tuple[str, dict[str, Any], bytes, bytes]]:
    """Every kept sample of a finished folder: its name, its metadata, both pictures as JPEG."""
    for name, seeds in _json(out / "seeds.json"):
        folder = out / name
        prompt = _json(folder / "prompt.json")
        known = {str(d["seed"]): d for d in lines.read(folder / "metadata.jsonl", lambda d, _: d,
                                                       "no pair in it")}
        for seed in seeds:
            yield f"{name}_{seed}", prompt | known[seed], *((folder / f"{seed}_{k}.jpg").read_bytes()
                                                            for k in (0, 1))


def webdataset(out: Path, size: int = 1000) -> list[Path]:
    """Writes shards of `size` samples beside the folders: NAME.input.jpg, NAME.edited.jpg, NAME.json. They
    replace earlier ones when all are written. Raises UsageError where the disk is full."""
    remaining_, shards = samples(out), []
    with _exported(out) as temporary:
        while shard := list(islice(remaining_, size)):
            shards.append(f"shard-{len(shards):06}.tar")
            with tarfile.open(temporary / shards[-1], "w") as tar:
                for name, known, before, after in shard:
                    files = {"input.jpg": before, "edited.jpg": after, "json": json.dumps(known).encode()}
                    for suffix, content in files.items():
                        info = tarfile.TarInfo(f"{name}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    for old in set(out.glob("shard-*.tar")) - {out / name for name in shards}:   # of a longer export
        old.unlink()
    return [out / name for name in shards]


def parquet(out: Path) -> list[Path]:
    """Writes one table beside the folders: input_image and edited_image (bytes of JPEG), edit_prompt and all
    metadata. It replaces an earlier one when it is written. Raises UsageError where the disk is full."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError('parquet needs pyarrow: pip install "prompt-to-prompt[parquet]"') from None
    rows = [{"input_image": before, "edited_image": after, "edit_prompt": known["edit"],
             **{k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in known.items()}}
            for _, known, before, after in samples(out)]
    names = dict.fromkeys(name for row in rows for name in row)   # entries may differ in their fields
    rows = [{name: row.get(name) for name in names} for row in rows]
    with _exported(out) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary / "pairs.parquet")
    return [out / "pairs.parquet"]


@contextmanager
def _exported(out: Path) -> Iterator[Path]:
    """A temporary folder for the files of an export, which are moved into place when all are written."""
    try:
        with aside(out) as temporary:
            yield temporary
            for file in sorted(temporary.iterdir()):
                os.replace(file, out / file.name)
    except OSError as error:
        raise UsageError(f"--out {out}: the export cannot be written ({error.strerror}); the pairs are "
                         "there, and an earlier export is as it was") from None

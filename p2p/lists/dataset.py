"""A folder of training pairs as InstructPix2Pix's `generate_img_dataset.py` leaves it, sampled
by `p2p.lists.ip2p`:

    OUT/0000012/{prompt.json, SEED_0.jpg, SEED_1.jpg, ..., metadata.jsonl}

prompt.json is the list's entry, with all that it holds. metadata.jsonl has a line for each pair, the best
first, under the authors' names, and is absent where none was kept. counts.json (by which a finished folder is
known) and OUT/recipe.json are ours.
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

WHOLE = "counts.json"   # the file by which a finished folder is known


class Pair(NamedTuple):
    index: int               # of the entry: the folder's name
    prompts: Prompts
    said: dict[str, Any]     # the entry


def read(file: Path) -> list[Pair]:
    """Entries {"caption" (or "input"), "edit", "output"} and whatever else they hold ("url"), as
    InstructPix2Pix's lists have them. Raises UsageError that names those that are none."""
    def parts(said: Any, _: int) -> tuple[Prompts, dict[str, Any]]:
        form = '{"caption": ..., "edit": ..., "output": ...}'
        said = lines.present(said)
        if not isinstance(said, dict) or ("input" in said
                                          and said.get("caption", said["input"]) != said["input"]):
            raise UsageError(f'expected {form}, or "input" instead of "caption"; not {brief(said)}')
        texts = {"caption": said.get("input")} | said
        if absent := [k for k in ("caption", "edit", "output") if texts.get(k) is None]:
            raise UsageError(f"no {', '.join(map(repr, absent))}; expected {form}")
        if not all(isinstance(texts[k], str) for k in ("caption", "edit", "output")):
            raise UsageError("caption, edit and output are texts")
        check_prompt(texts["caption"]), check_prompt(texts["output"])
        return Prompts(texts["caption"], texts["output"]), said

    return [Pair(i, *found) for i, found in enumerate(lines.read(file, parts, "no prompt in it"))]


def _folder(pair: Pair, out: Path) -> Path:
    return out / f"{pair.index:07}"


def remaining(pairs: Sequence[Pair], out: Path) -> list[Pair]:
    """Those that have no finished folder yet."""
    return [pair for pair in pairs if not finished(_folder(pair, out) / WHOLE)]


def _same(pairs: Sequence[Pair], out: Path, recipe: Mapping[str, Any]) -> None:
    """Raises UsageError where the finished folders were made with other settings, or of other prompts: they
    would stay as they are, under a recipe that is not theirs."""
    done = [pair for pair in pairs if finished(_folder(pair, out) / WHOLE)]
    if not done:
        return
    before, now = flat(_json(out / "recipe.json")), flat(dict(recipe))
    other = [f"{k} {before.get(k)!r}, not {v!r}" for k, v in now.items() if k != "model"
             and before.get(k) != v]
    for pair in done:
        folder = _folder(pair, out)
        if (said := _json(folder / "prompt.json")) != pair.said:
            other.append(f"{folder.name} from {said}, not {pair.said}")
    if other:
        raise UsageError(f"--out {out}: made with {'; '.join(other[:9])}. Ask for the same to go on, or give "
                         "another folder")


@torch.no_grad()
def make(model: Model, pairs: Sequence[Pair], out: Path, embedder: Embedder,
         recipe: Recipe) -> Iterator[tuple[Pair, Counter[str]]]:
    """Every pair that has no folder yet: samples until `keep` passed or `samples` were drawn; then its folder
    appears at once, unless none could be drawn.

    -> the pair, and how many samples were drawn, dropped by each filter and kept. Raises UsageError where the
    disk is full, and where what is there was made with other settings, another model or another judge.
    """
    check(model, recipe)
    said = asdict(recipe) | {"model": model.name, "identity": model.identity(), "judge": embedder.sha256}
    said = json.loads(json.dumps(said))   # tuples are lists there
    _same(pairs, out, said)
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        write(out / "recipe.json", json.dumps(said))
        for pair in remaining(pairs, out):
            kept, counts = samples_of(model, pair.prompts, embedder, recipe)
            if counts["samples"]:   # else the next run tries again
                _put(_folder(pair, out), pair, kept, counts)
            yield pair, counts
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); what is done is kept, start "
                         "again to go on") from None


def _put(folder: Path, pair: Pair, kept: Sequence[Kept], counts: Counter[str]) -> None:
    with appearing(folder, WHOLE) as made:
        (made / "prompt.json").write_text(json.dumps(pair.said), encoding="utf-8")
        (made / WHOLE).write_text(json.dumps(counts), encoding="utf-8")
        for found, images in kept:
            for k, image in enumerate(images):
                image.save(made / f"{found['seed']}_{k}.jpg", quality=100)
        if kept:
            rows = "".join(json.dumps(found) + "\n" for found, _ in kept)
            (made / "metadata.jsonl").write_text(rows, encoding="utf-8")


def _json(file: Path) -> Any:
    """A file of an earlier run. Raises UsageError."""
    return read_json(file, "give another --out")


def finish(out: Path) -> Counter[str]:
    """Writes seeds.json, the list that InstructPix2Pix's `prepare_dataset.py` makes of such a folder; the
    counts of all prompts."""
    total, seeds = Counter(), []
    for folder in sorted(p for p in out.iterdir() if finished(p / WHOLE)):
        total.update(_json(folder / WHOLE))
        if found := [p.name.split("_")[0] for p in sorted(folder.glob("*_0.jpg"))]:
            seeds.append([folder.name, found])
    write(out / "seeds.json", json.dumps(seeds))
    return total


def samples(out: Path) -> Iterator[tuple[str, dict[str, Any], bytes, bytes]]:
    """Every kept sample of a finished folder: its name, what is known of it, both pictures as JPEG."""
    for name, seeds in _json(out / "seeds.json"):
        folder = out / name
        prompt = _json(folder / "prompt.json")
        known = {str(d["seed"]): d for d in lines.read(folder / "metadata.jsonl", lambda d, _: d,
                                                       "no pair in it")}
        for seed in seeds:
            yield f"{name}_{seed}", prompt | known[seed], *((folder / f"{seed}_{k}.jpg").read_bytes()
                                                            for k in (0, 1))


def webdataset(out: Path, size: int = 1000) -> list[Path]:
    """Shards of so many samples beside the folders: NAME.input.jpg, NAME.edited.jpg, NAME.json. They take the
    place of earlier ones when all are written. Raises UsageError where the disk is full."""
    found, shards = samples(out), []
    with _exported(out) as made:
        while some := list(islice(found, size)):
            shards.append(f"shard-{len(shards):06}.tar")
            with tarfile.open(made / shards[-1], "w") as tar:
                for name, known, before, after in some:
                    files = {"input.jpg": before, "edited.jpg": after, "json": json.dumps(known).encode()}
                    for suffix, content in files.items():
                        info = tarfile.TarInfo(f"{name}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    for old in set(out.glob("shard-*.tar")) - {out / name for name in shards}:   # of a longer export
        old.unlink()
    return [out / name for name in shards]


def parquet(out: Path) -> list[Path]:
    """One table beside the folders: input_image and edited_image (bytes of JPEG), edit_prompt and all that is
    known of each. It takes the place of an earlier one when it is written. Raises UsageError where the disk
    is full."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError('parquet needs pyarrow: pip install "prompt-to-prompt[parquet]"') from None
    rows = [{"input_image": before, "edited_image": after, "edit_prompt": known["edit"],
             **{k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in known.items()}}
            for _, known, before, after in samples(out)]
    names = dict.fromkeys(name for row in rows for name in row)   # entries may hold more than others do
    rows = [{name: row.get(name) for name in names} for row in rows]
    with _exported(out) as made:
        pq.write_table(pa.Table.from_pylist(rows), made / "pairs.parquet")
    return [out / "pairs.parquet"]


@contextmanager
def _exported(out: Path) -> Iterator[Path]:
    """A folder for the files of an export, which take their places when all are written."""
    try:
        with aside(out) as made:
            yield made
            for file in sorted(made.iterdir()):
                os.replace(file, out / file.name)
    except OSError as error:
        raise UsageError(f"--out {out}: the export cannot be written ({error.strerror}); the pairs are "
                         "there, and an earlier export is as it was") from None

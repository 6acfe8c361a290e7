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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
IMAGES = ("input_image", "edited_image", "edit_prompt")   # columns of the table
METADATA = ("seed", "p2p_threshold", "cfg_scale",                # of a sample
            *(f"clip_sim_{of}" for of in ("0", "1", "dir", "image")))
EXACT = 2**53           # whole numbers beyond are not what they were as a float
ROWS = 256              # of it that are held at once


class Pair(NamedTuple):
    index: int               # of the entry: the folder's name
    prompts: Prompts
    entry: dict[str, Any]    # of the list, with all its fields


def read(file: Path, export: str | None = None) -> list[Pair]:
    """Reads a list in InstructPix2Pix's format: entries {"caption" (or "input"), "edit", "output"} with any
    other fields ("url"). export: "webdataset" or "parquet", which is a table. Raises UsageError naming all
    invalid entries."""
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
        check_fields(entry, METADATA)
        if export == "parquet":
            _check_row(entry)
        check_prompt(texts["caption"])
        check_prompt(texts["output"])
        return Prompts(texts["caption"], texts["output"]), entry

    return [Pair(i, *parsed) for i, parsed in enumerate(lines.read(file, parts, "no prompt in it"))]


def _check_row(entry: Mapping[str, Any]) -> None:
    """Raises UsageError for an entry that cannot be a row of a table."""
    check_fields(entry, IMAGES)
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UsageError("a text holds half of a character (a lone surrogate), which a table cannot "
                         "hold") from None


def _folder(pair: Pair, out: Path) -> Path:
    return out / f"{pair.index:07}"


def _done(pair: Pair, out: Path) -> bool:
    return finished(_folder(pair, out) / WHOLE)


def remaining(pairs: Sequence[Pair], out: Path) -> list[Pair]:
    """The pairs that have no finished folder yet."""
    return [pair for pair in pairs if not _done(pair, out)]


def _same(pairs: Sequence[Pair], out: Path, recipe: Mapping[str, Any]) -> None:
    """Raises UsageError where the finished folders were made with other settings or prompts, or of more: they
    would stay unchanged under a recipe that is not theirs."""
    folders = {folder.name for folder in _finished(out)} if out.is_dir() else set()
    if not folders:
        return
    done = [pair for pair in pairs if _folder(pair, out).name in folders]
    before, now = flat(_json(out / "recipe.json")), flat(dict(recipe))
    free = {"model", *(() if recipe["sampler"] == "p2p" else ("together",))}   # p2p stops after a batch
    other = [f"{k} {before.get(k)!r}, not {now.get(k)!r}" for k in {**before, **now}   # some may be absent
             if k not in free and before.get(k) != now.get(k)]
    if more := sorted(folders - {_folder(pair, out).name for pair in pairs}):
        other.append(f"{len(more)} prompts that the list lacks ({', '.join(more[:3])})")
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
        for pair in pairs:
            if _done(pair, out):   # by now: another run may work on the same list
                continue
            best, counts = samples_of(model, pair.prompts, embedder, recipe)
            if counts["samples"]:   # else the next run tries again
                _put(pair, out, best, counts)
            yield pair, counts
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); what is done is kept, start "
                         "again to go on") from None


def _put(pair: Pair, out: Path, best: Sequence[Kept], counts: Counter[str]) -> None:
    try:
        with appearing(_folder(pair, out), WHOLE) as temporary:
            (temporary / "prompt.json").write_text(json.dumps(pair.entry), encoding="utf-8")
            (temporary / WHOLE).write_text(json.dumps(counts), encoding="utf-8")
            for info, images in best:
                for k, image in enumerate(images):
                    image.save(temporary / f"{info['seed']}_{k}.jpg", quality=100)
            if best:
                rows = "".join(json.dumps(info) + "\n" for info, _ in best)
                (temporary / "metadata.jsonl").write_text(rows, encoding="utf-8")
    except OSError:
        if not _done(pair, out):   # another run was first
            raise


def _json(file: Path) -> Any:
    """A file of an earlier run. Raises UsageError."""
    return read_json(file, "give another --out")


def finish(out: Path) -> Counter[str]:
    """Writes seeds.json, the list that InstructPix2Pix's `prepare_dataset.py` makes of such a folder.
    -> the counts of all prompts"""
    total, listed = Counter(), []
    for folder in _finished(out):
        total.update(_json(folder / WHOLE))
        if seeds := _seeds(folder):
            listed.append([folder.name, seeds])
    write(out / "seeds.json", json.dumps(listed))
    return total


def _finished(out: Path) -> list[Path]:
    return sorted(folder for folder in out.iterdir() if finished(folder / WHOLE))


def _seeds(folder: Path) -> list[str]:
    """Of the pairs in it, if there are any."""
    return [file.name.split("_")[0] for file in sorted(folder.glob("*_0.jpg"))]


def samples(out: Path) -> Iterator[tuple[str, dict[str, Any], list[Path]]]:
    """Every kept sample of a finished folder: its name, its metadata, the files of both pictures."""
    for folder in _finished(out):
        if not (seeds := _seeds(folder)):
            continue
        prompt = _json(folder / "prompt.json")
        known = {str(d["seed"]): d for d in lines.read(folder / "metadata.jsonl", lambda d, _: d,
                                                       "no pair in it")}
        check_fields(prompt, METADATA)
        for seed in seeds:
            yield f"{folder.name}_{seed}", prompt | known[seed], [folder / f"{seed}_{k}.jpg" for k in (0, 1)]


def webdataset(out: Path, size: int = 1000) -> list[Path]:
    """Writes shards of `size` samples beside the folders: NAME.input.jpg, NAME.edited.jpg, NAME.json. They
    replace earlier ones when all are written. Raises UsageError where the disk is full."""
    remaining_, shards = samples(out), []
    with _exported(out) as temporary:
        while shard := list(islice(remaining_, size)):
            shards.append(f"shard-{len(shards):06}.tar")
            with tarfile.open(temporary / shards[-1], "w") as tar:
                for name, known, pictures in shard:
                    before, after = (file.read_bytes() for file in pictures)
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
    metadata, a column that is not of one type as text. It replaces an earlier one when it is written. Raises
    UsageError where the disk is full, and as `check_fields` does."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError('parquet needs pyarrow: pip install -e ".[parquet]" in the clone') from None
    types: dict[str, set[str]] = {}   # entries may differ in their fields, and a field in its type
    for _, known, _ in samples(out):
        for name, value in known.items():
            types.setdefault(name, set()).add(_column(value))
    check_fields(types, IMAGES)
    columns = {name: pa.int64() if kinds <= {"int", "long"} else pa.float64() if kinds <= {"int", "float"}
               else pa.string() for name, kinds in types.items()}
    schema = pa.schema([(IMAGES[0], pa.binary()), (IMAGES[1], pa.binary()), (IMAGES[2], pa.string()),
                        *columns.items()])
    rows = ({IMAGES[0]: files[0].read_bytes(), IMAGES[1]: files[1].read_bytes(), IMAGES[2]: known["edit"],
             **{name: _cell(known.get(name), kind == pa.string()) for name, kind in columns.items()}}
            for _, known, files in samples(out))
    with _exported(out) as temporary, pq.ParquetWriter(temporary / "pairs.parquet", schema) as table:
        while some := list(islice(rows, ROWS)):
            table.write_table(pa.Table.from_pylist(some, schema))
    return [out / "pairs.parquet"]


def check_fields(names: Iterable[str], own: Sequence[str]) -> None:
    """Raises UsageError where fields of a list have the name of one that samples have of their `own`."""
    if taken := sorted(set(own) & set(names)):
        raise UsageError(f"{', '.join(taken)}: samples have a field of their own by this name; rename the "
                         "list's")


def _column(value: Any) -> str:
    """The type of a column that holds it: numbers as they are, all else as text."""
    if type(value) is int and -2**63 <= value < 2**63:
        return "int" if abs(value) <= EXACT else "long"
    return "float" if type(value) is float else "text"


def _cell(value: Any, text: bool) -> Any:
    return value if value is None or not text or isinstance(value, str) else json.dumps(value)


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

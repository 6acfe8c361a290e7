"""InstructPix2Pix's training pairs (Brooks et al. 2023, section 3.1): picture, instruction, edited picture, by Prompt-to-Prompt.

For every prompt pair many samples are drawn, each with a seed, a share of injected steps and a guidance of its own; the filters
of the paper choose among them. Output as its `generate_img_dataset.py` leaves it:

    OUT/0000012/{prompt.json, SEED_0.jpg, SEED_1.jpg, ..., metadata.jsonl}
"""
from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from p2p.errors import NumericsError, UsageError
from p2p.image import from_pil
from p2p.metrics import Embedder
from p2p.model import Model
from p2p.output import appearing, write
from p2p.together import edit_together

Kept = tuple[dict[str, Any], Sequence[Image.Image]]   # what is known of a sample, and its two pictures


class Pair(NamedTuple):
    index: int       # of the line: the folder's name
    caption: str
    instruction: str
    output: str      # the edited caption


@dataclass(frozen=True)
class Recipe:
    """The authors' numbers (for Stable Diffusion, whose guidance is 7.5; other models scale theirs)."""

    steps: int = 100
    samples: int = 100                  # a prompt, at most
    keep: int = 4                       # of these
    threshold: tuple[float, float] = (0.1, 0.9)     # share of the steps injected
    guidance: tuple[float, float] = (1.0, 2.0)      # times the model's own
    image: float = 0.7                  # least cosine between the two pictures
    direction: float = 0.2              # ... between their difference and that of the captions
    text: float = 0.2                   # ... between each picture and its caption
    together: int = 4                   # samples in a batch
    seed: int = 0


def read(file: Path) -> list[Pair]:
    """Lines {"caption" (or "input"), "edit", "output"}, as InstructPix2Pix's lists have them. Raises UsageError naming the line."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({error})") from None
    pairs = []
    for i, line in enumerate(lines):
        try:
            said = json.loads(line)
            texts = said.get("caption", said.get("input")), said["edit"], said["output"]
            if not all(isinstance(t, str) for t in texts):
                raise ValueError("caption, edit and output are texts")
            pairs.append(Pair(i, *texts))
        except (ValueError, KeyError, AttributeError) as error:
            raise UsageError(f'{file}, line {i + 1}: {error}; expected {{"caption": ..., "edit": ..., "output": ...}}') from None
    if not pairs:
        raise UsageError(f"{file}: no prompt in it")
    return pairs


def draw(pair: Pair, j: int, recipe: Recipe, model: Model) -> dict[str, float | int]:
    """Seed, injected share and guidance of a prompt's sample j: of the prompt alone, whatever else is in the list."""
    digest = hashlib.sha256(json.dumps([pair.caption, pair.output, recipe.seed, j]).encode()).digest()
    seed = int.from_bytes(digest[:4], "big") >> 1
    u, v = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    (a, b), (c, d) = recipe.threshold, recipe.guidance
    return {"seed": seed, "p2p_threshold": a + (b - a) * u, "cfg_scale": (c + (d - c) * v) * model.guidance_scale}


def similarities(before: Tensor, after: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Embedded pictures (B, D) and the two captions (2, D)  ->  the paper's four cosines, (B,) each"""
    return {"sim_0": F.cosine_similarity(before, texts[:1]), "sim_1": F.cosine_similarity(after, texts[1:]),
            "sim_image": F.cosine_similarity(before, after),
            "sim_dir": F.cosine_similarity(after - before, texts[1:] - texts[:1])}


def dropped(found: dict[str, float], recipe: Recipe) -> str | None:
    """The first filter that a sample does not pass."""
    least = {"sim_image": recipe.image, "sim_dir": recipe.direction, "sim_0": recipe.text, "sim_1": recipe.text}
    return next((name for name, value in least.items() if not found[name] >= value), None)


def _folder(pair: Pair, out: Path) -> Path:
    return out / f"{pair.index:07}"


def remaining(pairs: Sequence[Pair], out: Path) -> list[Pair]:
    """Those that have no folder yet."""
    return [pair for pair in pairs if not _folder(pair, out).exists()]


@torch.no_grad()
def make(model: Model, pairs: Sequence[Pair], out: Path, embedder: Embedder, recipe: Recipe) -> Iterator[tuple[Pair, Counter[str]]]:
    """Every pair that has no folder yet: samples until `keep` passed or `samples` were drawn; then its folder appears at once.

    -> the pair, and how many samples were drawn, dropped by each filter and kept. Raises UsageError where the disk is full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "recipe.json", json.dumps(asdict(recipe) | {"model": model.name, **model.identity()}))
        for pair in remaining(pairs, out):
            kept, counts = _samples(model, pair, embedder, recipe)
            _put(_folder(pair, out), pair, kept, counts)
            yield pair, counts
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); what is done is kept, start again to go on") from None


def _samples(model: Model, pair: Pair, embedder: Embedder, recipe: Recipe) -> tuple[list[Kept], Counter[str]]:
    texts, counts = embedder.texts([pair.caption, pair.output]), Counter(samples=0)
    passed: list[Kept] = []
    for first in range(0, recipe.samples, recipe.together):
        drawn = [draw(pair, j, recipe, model) for j in range(first, min(first + recipe.together, recipe.samples))]
        try:
            results = edit_together(model, [dict(
                source=pair.caption, targets=pair.output, seed=d["seed"], guidance_scale=d["cfg_scale"], steps=recipe.steps,
                cross_replace_steps=d["p2p_threshold"], self_replace_steps=d["p2p_threshold"]) for d in drawn])
        except (NumericsError, UsageError) as error:
            counts[f"failed: {error}"] += len(drawn)
            break
        pictures = [torch.cat([from_pil(r.images[k]) for r in results]) / 2 + 0.5 for k in range(2)]
        found = similarities(*(embedder.pictures(p) for p in pictures), texts)
        for i, (d, r) in enumerate(zip(drawn, results)):
            each = {name: values[i].item() for name, values in found.items()}
            why = dropped(each, recipe)
            counts.update(["samples", why or "passed"])
            if why is None:
                passed.append((d | each, r.images))
        if len(passed) >= recipe.keep:
            break
    kept = sorted(passed, key=lambda p: -p[0]["sim_dir"])[:recipe.keep]
    counts["kept"] = len(kept)
    return kept, counts


def _put(folder: Path, pair: Pair, kept: Sequence[Kept], counts: Counter[str]) -> None:
    said = {"caption": pair.caption, "edit": pair.instruction, "output": pair.output}
    with appearing(folder) as aside:
        (aside / "prompt.json").write_text(json.dumps(said))
        (aside / "counts.json").write_text(json.dumps(counts))
        for found, images in kept:
            for k, image in enumerate(images):
                image.save(aside / f"{found['seed']}_{k}.jpg", quality=100)
        (aside / "metadata.jsonl").write_text("".join(json.dumps(found) + "\n" for found, _ in kept))


def finish(out: Path) -> Counter[str]:
    """Writes seeds.json, the list that InstructPix2Pix's `prepare_dataset.py` makes of such a folder; the counts of all prompts."""
    total, seeds = Counter(), []
    for part in out.glob(".part-*"):
        shutil.rmtree(part, ignore_errors=True)
    for folder in sorted(p for p in out.iterdir() if (p / "counts.json").exists()):
        total.update(json.loads((folder / "counts.json").read_text()))
        if found := [p.name.split("_")[0] for p in sorted(folder.glob("*_0.jpg"))]:
            seeds.append([folder.name, found])
    write(out / "seeds.json", json.dumps(seeds))
    return total


def samples(out: Path) -> Iterator[tuple[str, dict[str, Any], bytes, bytes]]:
    """Every kept sample of a finished folder: its name, what is known of it, both pictures as JPEG."""
    for name, seeds in json.loads((out / "seeds.json").read_text()):
        folder = out / name
        prompt = json.loads((folder / "prompt.json").read_text())
        known = {str(d["seed"]): d for d in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())}
        for seed in seeds:
            yield f"{name}_{seed}", prompt | known[seed], *((folder / f"{seed}_{k}.jpg").read_bytes() for k in (0, 1))


def webdataset(out: Path, size: int = 1000) -> list[Path]:
    """Shards of so many samples beside the folders: NAME.input.jpg, NAME.edited.jpg, NAME.json."""
    files, tar = [], None
    for i, (name, known, before, after) in enumerate(samples(out)):
        if i % size == 0:
            if tar is not None:
                tar.close()
            files.append(out / f"shard-{i // size:06}.tar")
            tar = tarfile.open(files[-1], "w")
        for suffix, content in (("input.jpg", before), ("edited.jpg", after), ("json", json.dumps(known).encode())):
            info = tarfile.TarInfo(f"{name}.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if tar is not None:
        tar.close()
    return files


def parquet(out: Path) -> list[Path]:
    """One table beside the folders: input_image and edited_image (bytes of JPEG), edit_prompt and all that is known of each."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError('parquet needs pyarrow: pip install "prompt-to-prompt[parquet]"') from None
    rows = [{"input_image": before, "edited_image": after, "edit_prompt": known["edit"], **known}
            for _, known, before, after in samples(out)]
    pq.write_table(pa.Table.from_pylist(rows), out / "pairs.parquet")
    return [out / "pairs.parquet"]

"""Files that are added to a model: LoRA and its kin with their weights, textual inversions with their words.

The forms of `load`'s arguments `lora` and `embeddings`, what settings record of them, and how a replay finds
the files again.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from p2p.errors import UsageError
from p2p.request.checks import finite
from p2p.weights.detect import Package
from p2p.weights.digest import together
from p2p.weights.untrusted import brief

OPTIONS = {"lora": "--lora", "embeddings": "--embedding"}   # of the command line, by arguments of `load`
Pair = tuple[str | Path, Any]   # a file, and its weight or word; None: 1, or the file's own


def loras(given: Any) -> list[tuple[Path, float]]:
    """None, a path, a pair (path, weight) or a list of these. Raises UsageError."""
    return [(path, 1.0 if weight is None else finite("lora: the weight", weight))
            for path, weight in _pairs("lora", given, "weight", Real)]


def embeddings(given: Any) -> list[tuple[Path, str | None]]:
    """None, a path, {"<word>": path}, or a list of paths and of pairs (path, word). Raises UsageError."""
    if isinstance(given, Mapping):
        given = [(path, word) for word, path in given.items()]
    pairs = _pairs("embeddings", given, "word", ())
    if wrong := [word for _, word in pairs if word is not None and not isinstance(word, str)]:
        raise UsageError(f"embeddings: a word is a text, not {brief(wrong[0])}")
    return pairs


def _pairs(name: str, given: Any, value: str, second: Any) -> list[tuple[Path, Any]]:
    """second: the types of a second item that make two items one pair, not a list of two paths."""
    pair = isinstance(given, (list, tuple)) and len(given) == 2 and isinstance(given[1], second)
    items = [] if given is None else given if isinstance(given, (list, tuple)) and not pair else [given]
    out = []
    for item in items:
        path, more = item if isinstance(item, (list, tuple)) and len(item) == 2 else (item, None)
        if not isinstance(path, (str, Path)):
            raise UsageError(f"{name}: a path, a pair (path, {value}) or a list of these is needed, not "
                             f"{brief(item)}")
        out.append((Path(path), more))
    return out


# --------------------------------------------------------------------------------------------------- recorded

def identity(package: Package) -> dict[str, Any]:
    """Digests with weights and words, for JSON; empty where nothing is added."""
    added = {"lora": [{"sha256": together(a.files), "weight": a.value} for a in package.lora],
             "embeddings": [{"sha256": together(a.files), "words": list(a.value)}
                            for a in package.embeddings]}
    return {name: each for name, each in added.items() if each}


def places(package: Package) -> dict[str, list[str]]:
    added = {"lora": package.lora, "embeddings": package.embeddings}
    return {name: [str(a.path) for a in each] for name, each in added.items() if each}


def recorded(name: str, settings: Mapping[str, Any], given: Sequence[Pair]) -> tuple[Pair, ...]:
    """The add-ons that a run's settings record under that name: where they lay, or at the paths that are
    given, in turn.

    Raises UsageError where other ones are given; KeyError, TypeError, AttributeError for incomplete settings.
    """
    records, paths = settings.get(name) or [], (settings.get("places") or {}).get(name) or []
    values = [record["weight"] if name == "lora" else _lone(record["words"]) for record in records]
    differ = any(value not in (None, was) for (_, value), was in zip(given, values))
    if given and (differ or len(given) != len(values)):
        raise UsageError(f"{OPTIONS[name]}: {len(values)} files are recorded{': ' if values else ''}"
                         f"{', '.join(map(str, values))}; name as many, in this order")
    if not given and len(paths) != len(values):
        raise KeyError(f"places of {name}")
    return tuple(zip([path for path, _ in given] or map(str, paths), values))


def _lone(words: Sequence[str]) -> str | None:
    """The word of a file that holds one: the user may have named it."""
    return words[0] if len(words) == 1 else None

"""Untrusted text: parses JSON and "key: value" lines within bounds, and makes text harmless to print."""
from __future__ import annotations

import json
import math
import stat
import unicodedata
from pathlib import Path
from typing import Any

BYTES = 2**26                     # of a text file
VALUES, DEPTH = 2**22, 64         # of JSON: how many, how deep
LONGEST, WORD, NUMBERS = 2**14, 400, 16  # of a message: characters, of one word of it, numbers in a row
# turn what follows around
_TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def check_regular(path: Path) -> None:
    """Raises ValueError for a folder, and for a pipe, which would block when opened; OSError where nothing
    exists."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")


def read_text(path: Path, most: int = BYTES, errors: str = "strict") -> str:
    """Reads a file of UTF-8, with or without a byte order mark. Raises OSError, and ValueError for other
    files."""
    check_regular(path)
    with path.open("rb") as f:
        data = f.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes, which no such text has")
    return data.decode("utf-8-sig", errors)


def parse_json(text: str, nan: bool = False) -> Any:
    """Parses strict JSON: every key once, numbers finite. nan: NaN (pandas' missing value) is null.

    Raises ValueError, also for what takes too much memory to hold or too deep a recursion to walk through.
    """
    if sum(map(text.count, ",[{")) > VALUES:
        raise ValueError(f"more than {VALUES:,} values")
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_int=_whole, parse_float=_finite,
                           parse_constant=lambda name: None if nan and name == "NaN" else _finite(name))
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    level = [value]
    for _ in range(DEPTH):
        level = [v for x in level if isinstance(x, (dict, list))
                 for v in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise ValueError(f"nested more than {DEPTH} deep")
    return value


def parse_object(text: str) -> dict[str, Any]:
    """Parses a JSON object. Raises ValueError."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"holds {kind_of(value)}, not an object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"the key {twice[:WORD]!r} is there twice")
    return result


def _whole(text: str) -> int | float:
    """Integers beyond 64 bits become floats, as in other languages."""
    return int(text) if len(text) <= 20 else _finite(text)


def _finite(text: str) -> float:
    """A finite number. Raises ValueError, also for NaN, Infinity and -Infinity, which are not JSON."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{_cut(text, 40)} is no finite number")
    return value


def parse_settings(text: str) -> dict[str, str]:
    """"key: value" lines of a YAML file, however deep they stand."""
    settings = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip().replace("_", "").isalnum():
            settings[key.strip()] = value.partition("#")[0].strip("\"' \t")
    return settings


# ------------------------------------------------------------------------------------------------- messages

def printable(text: object) -> str:
    """Makes text fit for a terminal and a log: control characters are escaped, and long rows of numbers,
    words and texts lose their middle. A line may continue in indented ones, as ours do.
    """
    lines = _shortened(str(text)[:2**20]).split("\n  ")
    lines = [" ".join(_cut(_escaped(word), WORD) for word in line.split(" ")) for line in lines]
    return _cut("\n  ".join(lines), LONGEST)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    evil = {c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") or c in _TURNING}
    return "".join(c.encode("unicode_escape").decode() if c in evil else c for c in text)


def _shortened(text: str) -> str:
    out: list[str] = []
    row: list[str] = []
    for part in [*text.split(","), "end"]:
        if _is_number(part):
            row.append(part)
            continue
        out += row if len(row) <= NUMBERS else [*row[:4], f" ... {len(row) - 5} more ...", row[-1]]
        row = []
        out.append(part)
    return ",".join(out[:-1])


def _is_number(part: str) -> bool:
    try:
        return len(part) < 80 and math.isfinite(float(part.strip(" \n()[]{}")))
    except ValueError:
        return part.strip(" \n()[]{}") in ("nan", "inf", "-inf", "True", "False", "None")


def brief(value: object) -> str:
    """A value in a message: short, whatever it is (deeply nested values and long integers have no repr)."""
    try:
        text = " ".join(repr(value).split())
    except Exception:   # a repr of anybody's making
        text = kind_of(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind_of(value: object) -> str:
    """The kind of a value, with its article: "a list", "an object"; None is JSON's null."""
    name = type(value).__name__.strip("_").lower()
    return "null" if value is None else f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most * 2 // 3]} ... {text[len(text) - most // 4:]}"

"""Lists in files: JSON objects, one a line or all in one array; every fault is named at its line."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from p2p.errors import UsageError
from p2p.weights.aside import replacing
from p2p.weights.untrusted import parse_json

T = TypeVar("T")
NAMED = 100   # faults, at most
BYTES = 2**28   # of a list


def read(file: Path, parse: Callable[[Any, int], T], empty: str) -> list[T]:
    """What `parse` makes of each entry and its number, from 1: its line, or its place in the array. Blank
    lines are skipped, and counted. empty: what to say where there is no entry.

    Raises UsageError naming all entries that are not JSON, or for which `parse` raises one.
    """
    text = _text(file)
    array = text.lstrip().startswith("[")
    try:   # splitlines() would split at U+2028 too; joined files have a mark in their middle
        entries = list(enumerate(decoded(text) if array else text.replace("\n\ufeff", "\n").split("\n"), 1))
    except ValueError as error:
        raise UsageError(f"{file}: not a JSON array, nor JSON objects a line ({error})") from None
    found, wrong = [], []
    for number, entry in entries:
        if not array and not entry.strip():
            continue
        try:
            found.append(parse(entry if array else decoded(entry), number))
        except (UsageError, ValueError) as error:
            wrong.append(f"{'item' if array else 'line'} {number}: {error}")
    if wrong:
        more = [f"and {len(wrong) - NAMED} more"] if len(wrong) > NAMED else []
        raise UsageError(f"{file}: " + "\n  ".join(wrong[:NAMED] + more))
    if not found:
        raise UsageError(f"{file}: {empty}")
    return found


def _text(file: Path) -> str:
    """UTF-8, with or without its mark, whatever this machine's own encoding is."""
    try:
        with file.open("rb") as f:
            content = f.read(BYTES + 1)
    except (OSError, ValueError) as error:   # the latter for a path that holds a NUL
        raise UsageError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > BYTES:
        raise UsageError(f"{file}: a list of more than {BYTES:,} bytes; split it")
    if not (found := json.detect_encoding(content)).startswith("utf-8"):
        raise UsageError(f"{file}: {found.upper()} text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UsageError(f"{file}: line {line}: not UTF-8 text (byte {byte:#x}); save it as UTF-8") from None


def decoded(text: str) -> Any:
    """JSON as people's programs write it: NaN (pandas' sign for what is missing) is null.
    Raises ValueError."""
    try:
        return parse_json(text, nan=True)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"not JSON ({error.msg} at {where}character {error.colno})") from None


def present(value: Any) -> Any:
    """Without what is null: tables with a column for each setting have that where a row does not give it.
    None is left of an object that holds nothing else."""
    if isinstance(value, list):
        return [present(v) for v in value]
    if not isinstance(value, dict) or not value:
        return value
    return {k: kept for k, v in value.items() if (kept := present(v)) is not None} or None


def write(file: Path, text: str) -> None:
    """In one step, with a line's end. Raises UsageError."""
    try:
        with replacing(file) as made:
            made.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from None

"""Lists in files: JSON objects, one a line or all in one array; every fault is reported with its line."""
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
    """Reads a list, and returns the result of `parse` for each entry and its number, from 1: its line, or its
    place in the array. Blank lines are skipped, and counted. empty: the message where there is no entry.

    Raises UsageError naming all entries that are not JSON, or for which `parse` raises one.
    """
    text = _text(file)
    array = text.lstrip().startswith("[")
    try:   # splitlines() would split at U+2028 too; joined files have a mark in their middle
        entries = decoded(text) if array else text.replace("\n\ufeff", "\n").split("\n")
    except ValueError as error:
        raise UsageError(f"{file}: not a JSON array, nor JSON objects a line ({error})") from None
    parsed, wrong, more = [], [], 0
    for number, entry in enumerate(entries, 1):
        if not array and not entry.strip():
            continue
        try:
            parsed.append(parse(entry if array else decoded(entry), number))
        except (UsageError, ValueError) as error:
            if len(wrong) < NAMED:
                wrong.append(f"{'item' if array else 'line'} {number}: {error}")
            else:
                more += 1
    if wrong:
        raise UsageError(f"{file}: " + "\n  ".join(wrong + [f"and {more} more"] * bool(more)))
    if not parsed:
        raise UsageError(f"{file}: {empty}")
    return parsed


def _text(file: Path) -> str:
    """The file as UTF-8, with or without a byte order mark, whatever the locale. Raises UsageError."""
    try:
        with file.open("rb") as f:
            content = f.read(BYTES + 1)
    except (OSError, ValueError) as error:   # the latter for a path that holds a NUL
        raise UsageError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > BYTES:
        raise UsageError(f"{file}: a list of more than {BYTES:,} bytes; split it")
    if not (encoding := json.detect_encoding(content)).startswith("utf-8"):
        raise UsageError(f"{file}: {encoding.upper()} text; save it as UTF-8")
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
    """Removes null values, which tables with a column for each setting have where a row does not set it. An
    object with nothing else becomes None."""
    if isinstance(value, list):
        return [present(v) for v in value]
    if not isinstance(value, dict) or not value:
        return value
    return {k: inner for k, v in value.items() if (inner := present(v)) is not None} or None


def write(file: Path, text: str) -> None:
    """Writes the text and a newline atomically. Raises UsageError."""
    try:
        with replacing(file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from None

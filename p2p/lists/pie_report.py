"""The tables of a folder of PIE-Bench rows: pie.csv (every figure of every picture), pie.json (by column),
pie.md (means).

They are built from all rows in the folder, whichever run made them.
"""
from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from p2p.errors import UsageError
from p2p.lists.lines import write
from p2p.lists.metrics import COLUMNS, CONVENTIONS, NAMES, interval
from p2p.lists.published import FIGURES, SOURCES
from p2p.weights.untrusted import parse_json, read_text

# as the tables are published
SCALES = {"structure": 1e3, "PSNR": 1.0, "LPIPS": 1e3, "MSE": 1e4, "SSIM": 1e2, "CLIP": 1.0}
LABELS = ("method", "key", "editing_type", "seed", "convention", "error", "result", "judges")
FIGURES_FILE = "figures.csv"


def scale(column: str) -> float:
    return SCALES[column.split()[0]]


# ------------------------------------------------------------------------------------------------------ files

def read_json(file: Path, instead: str = "remove it, or give another --out") -> Any:
    """Reads a JSON file. instead: advice where it is damaged. Raises UsageError."""
    try:
        return parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read ({error}); {instead}") from None


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, each in value.items() for k, v in flat(each, f"{name}.{key}".lstrip(".")).items()}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*LABELS, *NAMES.values()])
    for row in rows:
        table.writerow([*(row[name] for name in LABELS), *(_cell(row["figures"][label]) for label in NAMES)])
    return text.getvalue().rstrip("\n")


def _cell(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def write_figures(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one row's table: a line for each picture and convention."""
    write(folder / FIGURES_FILE, _lines(rows))


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """The inverse of `write_figures`; empty where there is no file. Raises UsageError."""
    file = folder / FIGURES_FILE
    try:
        with file.open(encoding="utf-8", newline="") as f:
            return [{name: line[name] for name in LABELS}
                    | {"figures": {label: float(line[name]) if line[name] else None
                                   for label, name in NAMES.items()}}
                    for line in csv.DictReader(f)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UsageError(f"{file}: not figures of this program ({type(error).__name__}: {error}); remove it, "
                         "and they are measured again") from None


def build(out: Path) -> dict[str, Any]:
    """Writes pie.csv, pie.json and pie.md of all rows in the folder.

    -> {method: {"failed": {key: why}, "official" and "corrected": {column: figures by item}}}
    """
    rows = [row for folder in sorted(p for p in out.iterdir() if (p / FIGURES_FILE).is_file())
            for row in read_figures(folder)]
    report = gathered(rows)
    write(out / "pie.csv", _lines(rows))
    write(out / "pie.json", json.dumps(_numbers(report), indent=1))
    write(out / "pie.md", markdown(rows))
    return report


def gathered(rows: Iterable[Mapping[str, Any]], keys: Sequence[str] = ("method",)) -> dict[str, Any]:
    """Groups rows of figures by method (or more keys): which items failed, and the figures of each column."""
    report: dict[str, Any] = {}
    for row in rows:
        entry = report.setdefault(", type ".join(row[name] for name in keys),
                                  {"failed": {}, **{c: {} for c in CONVENTIONS}})
        if row["error"]:
            entry["failed"][row["key"]] = row["error"]
        for label, value in row["figures"].items():
            if value is not None:
                entry[row["convention"]].setdefault(label, []).append(value)
    return report


def _numbers(value: Any) -> Any:
    """Replaces numbers that are not finite by null, for JSON."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------- tables

def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    report, parts = gathered(rows), []
    others = [c for c in NAMES if c not in COLUMNS]
    for convention in CONVENTIONS:
        parts += [f"## {convention}", table(report, convention)]
        parts += [f"### {convention}: edited part, whole picture, source", table(report, convention, others)]
    if len({row["editing_type"] for row in rows}) > 1:
        kinds = gathered(sorted(rows, key=lambda row: (row["method"], row["editing_type"])),
                         ("method", "editing_type"))
        for convention in CONVENTIONS:
            parts += [f"### {convention}, by editing type", table(kinds, convention)]
    if len({row["judges"] for row in rows if not row["error"]}) > 1:
        parts.append("Not all rows were measured with the same networks: see the column judges of pie.csv.")
    return "\n\n".join(parts)


def table(report: Mapping[str, Any], convention: str, columns: Sequence[str] = COLUMNS,
          published: bool = False) -> str:
    """Markdown, in the published units; corrected figures with their 95 % interval. A column without weights
    is absent. published: below a row of an official table, the published figures of that method."""
    wanted = list(columns)
    columns = [c for c in wanted if any(v is not None for rows in report.values()
                                        for v in rows[convention].get(c, []))]
    absent = [c for c in wanted if c not in columns]
    head = [c + ("" if scale(c) == 1 else f" x {scale(c):g}") for c in columns]
    lines = [_line(["method", *head, "pictures", "failed"]), "|---" * (len(columns) + 3) + "|"]
    for name, rows in report.items():
        cells = [name]
        for c in columns:
            summary = interval(rows[convention].get(c, []))
            if summary is None:
                cells.append("none")
                continue
            mean, half = summary[0] * scale(c), summary[1] * scale(c)
            spread = f" ± {half:.2f}" if math.isfinite(half) else ""   # one picture has none
            official = convention == "official"
            cells.append(f"{mean:.2f}" if official else f"{mean:.2f}{spread} ({summary[2]})")
        count = len(rows[convention].get("MSE", []))
        lines.append(_line([*cells, count, len(rows["failed"])]))
        if published and convention == "official":
            lines += _published(name, columns)
    return "\n".join(lines) + (f"\n\nAbsent, for want of weights: {', '.join(absent)}." if absent else "")


def _line(cells: Iterable[object]) -> str:
    return "".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|"


def _published(name: str, columns: Sequence[str]) -> list[str]:
    return [_line([f"... published [{f.source}]", *(_figure(f.figures.get(c)) for c in columns), 700, ""])
            for f in FIGURES if f.name == name.split(", ")[0]]


def published_table(leave_out: Collection[str] = ()) -> str:
    """All published figures of methods without a row here, and the sources of figures."""
    lines = ["| published | model | " + " | ".join(COLUMNS) + " | from |", "|---" * (len(COLUMNS) + 3) + "|"]
    for f in FIGURES:
        if f.name not in leave_out:
            figures = " | ".join(_figure(f.figures.get(c)) for c in COLUMNS)
            lines.append(f"| {f.name} | {f.model} | {figures} | [{f.source}] |")
    sources = "\n".join(f"[{name}] {description}" for name, description in SOURCES.items())
    return "\n".join(lines) + "\n\n" + sources


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

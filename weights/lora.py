"""LoRA and its kin: files of changes, merged into a model's weights as these are read; no adapter is left
when it runs.

Every key is used, or named and refused; a file that does not fit is refused before a weight is read.
"""
from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2p.weights import deltas, few_steps, refuse
from p2p.weights.deltas import DORA, DORA_PEFT, Change
from p2p.weights.detect import Added, Package, listed
from p2p.weights.errors import CheckpointError
from p2p.weights.files import TensorFile, open_file
from p2p.weights.fill import DTYPES
from p2p.weights.lora_names import COMPONENTS, CONTEXT, Place, families, layers, parsed
from p2p.weights.untrusted import parse_object, read_text

IN_FOLDERS = tuple(f"{stem}{suffix}" for stem in ("pytorch_lora_weights", "adapter_model")
                   for suffix in (".safetensors", ".bin"))
BIASES = ("diff_b", "b_norm")
PATTERNS = 10_000   # of a LoRA's alphas
Shape = tuple[int, ...]


@dataclass
class AddOn:
    """A file of changes: those of each layer's weight, and of each bias."""

    file: TensorFile
    changes: list[tuple[str, str, dict[str, str]]]             # layer as named there, kind, keys by role
    alphas: dict[str, float] = field(default_factory=dict)     # by their keys
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)   # PEFT's, by component; "": of all
    settings_file: Path | None = None

    def shapes(self, keys: Mapping[str, str]) -> dict[str, Shape]:
        return {role: self.file.shapes[key] for role, key in keys.items()}

    def kinds(self) -> str:
        dora = any(keys.keys() & {DORA, DORA_PEFT} for _, _, keys in self.changes)
        return " and ".join(dict.fromkeys(kind for _, kind, _ in self.changes)) + " (DoRA)" * dora

    def summary(self) -> str:
        """Its kinds, ranks and alphas."""
        ranks = {r for _, kind, keys in self.changes if (r := deltas.rank(kind, self.shapes(keys)))}
        parts = [self.kinds()]
        for name, found in (("rank", ranks), ("alpha", set(self.alphas.values()))):
            ends = [f"{value:g}" for value in (min(found), max(found))] if found else []
            parts += [f"{name} {' to '.join(dict.fromkeys(ends))}"] if ends else []
        return ", ".join(parts)

    def inputs(self) -> dict[str, int]:
        """The input widths of layers, where the shapes tell them."""
        seen = {"LoRA": "down", "LoHa": "hada_w1_b", "difference": "diff"}
        shapes = {layer: self.shapes(keys).get(seen.get(kind, "")) for layer, kind, keys in self.changes}
        return {layer: shape[1] for layer, shape in shapes.items() if shape is not None and len(shape) > 1}

    def families(self) -> list[str]:
        """The families that it may be made for."""
        down = {layer: self.file.shapes[keys["down"]] for layer, _, keys in self.changes if "down" in keys}
        ends = [shape for layer, shape in down.items() if layer.endswith(("proj_in", "proj_out"))]
        return families([layer for layer, _, _ in self.changes], self.inputs(), ends)


# ----------------------------------------------------------------------------------------------------- a file

def holds_changes(names: Iterable[str]) -> bool:
    """Whether a file is an add-on of a kind known here: half of its keys or more are such."""
    known = [parsed(name) is not None for name in names]
    return 0 < len(known) <= 2 * sum(known)


def open_add_on(path: Path) -> AddOn:
    """A file of changes, or the folder in which diffusers or PEFT saved one. Raises CheckpointError."""
    where = next((path / name for name in IN_FOLDERS if (path / name).exists()), path)
    if where.is_dir():
        raise CheckpointError(f"{path}: a folder without {' or '.join(IN_FOLDERS[::2])}; give the file of "
                              "the LoRA itself.")
    file = open_file(where)
    if not holds_changes(file.shapes):
        refuse.by_name(where, file.shapes, file.is_fp8())
        raise CheckpointError(f"{where}: no LoRA or the like: it holds {len(file.shapes)} tensors "
                              f"({', '.join(list(file.shapes)[:3])} ...). A whole model is given with "
                              "--model.")
    if unknown := sorted(key for key in file.shapes if parsed(key) is None):
        raise CheckpointError(f"{where}: {listed('tensors are not understood', unknown)}. Without them it "
                              "would do something else.")
    check_numbers(file, [key for key in file.shapes if not key.endswith(".alpha")])
    if odd := sorted(key for key in file.metadata if parsed(key) is not None):
        raise CheckpointError(f"{where}: {listed('numbers are no tensors', odd)}. Save them as tensors.")
    found, beside = _settings(file)
    add_on = AddOn(file, _grouped(file), settings=found, settings_file=beside)
    add_on.alphas = {key: _alpha(file, key) for _, _, keys in add_on.changes if (key := keys.get("alpha"))}
    return add_on


def check_numbers(file: TensorFile, keys: Iterable[str]) -> None:
    """Raises CheckpointError for what is not stored in a floating-point type that is read."""
    known = {*DTYPES, *DTYPES.values()}
    if odd := sorted(key for key in keys if file.dtypes[key] not in known):
        raise CheckpointError(f"{file.path}: {odd[0]} is stored as {file.dtypes[odd[0]]}; supported: "
                              f"{', '.join(DTYPES)}.")


def _grouped(file: TensorFile) -> list[tuple[str, str, dict[str, str]]]:
    """Raises CheckpointError for layers of which a part is missing, or there twice."""
    found: dict[tuple[str, bool], dict[str, str]] = {}
    for key in file.shapes:
        layer, role = parsed(key) or ("", "")
        group = found.setdefault((layer, role in BIASES), {})
        if role in group:
            raise CheckpointError(f"{file.path}: {group[role]} and {key} are the same of one layer.")
        group[role] = key
    whole = [(layer, deltas.kind_of(set(keys)), keys) for (layer, _), keys in found.items()]
    broken = sorted(f"{layer} has {', '.join(sorted(keys))} alone" for layer, kind, keys in whole if not kind)
    if broken:
        raise CheckpointError(f"{file.path}: {listed('layers are not complete', broken)}. It is damaged, or "
                              "of a kind that is not known here.")
    return [(layer, kind, keys) for layer, kind, keys in whole if kind is not None]


def _alpha(file: TensorFile, key: str) -> float:
    value = float(file[key]) if math.prod(file.shapes[key]) == 1 else math.nan
    if not math.isfinite(value):
        raise CheckpointError(f"{file.path}: {key} is not one finite number. It is damaged.")
    return value


def _settings(file: TensorFile) -> tuple[dict[str, dict[str, Any]], Path | None]:
    """PEFT's settings by component, from the metadata, where diffusers saves them, or from a file beside
    PEFT's own, which is returned too. Raises CheckpointError."""
    beside = file.path.with_name("adapter_config.json")
    metadata = file.metadata.get("lora_adapter_metadata")
    used = beside if file.path.stem == "adapter_model" and beside.is_file() else None
    try:
        read = parse_object(read_text(used)) if used else {} if metadata is None else parse_object(metadata)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.path}: PEFT's settings, which hold alpha, cannot be read ({error})."
                              ) from None
    if not all(isinstance(v or {}, dict) for k, v in read.items() if k.endswith("alpha_pattern")):
        raise CheckpointError(f"{file.path}: alpha_pattern in PEFT's settings is no object.")
    out: dict[str, dict[str, Any]] = {"": read}
    for key, value in read.items():
        component, _, name = key.partition(".")
        out.setdefault(component, {})[name] = value
    return out, used


def _scale(add_on: AddOn, kind: str, keys: Mapping[str, str], place: Place) -> float:
    """alpha / rank; alpha defaults to the rank. Raises ValueError."""
    settings = add_on.settings.get(COMPONENTS[place.part], add_on.settings[""])
    rank = deltas.rank(kind, add_on.shapes(keys))
    if rank is None:   # of a LoKr with whole factors: PEFT has one in its settings, others scale it by 1
        rank = settings.get("r")
        if rank is None:
            return 1.0
        if type(rank) is not int or rank < 1:
            raise ValueError(f"its r is {str(rank)[:40]}")
    if "alpha" in keys:
        return add_on.alphas[keys["alpha"]] / rank
    alpha = settings.get("lora_alpha", settings.get("alpha", rank))   # the latter of LoHa and LoKr
    if len(patterns := settings.get("alpha_pattern") or {}) > PATTERNS:
        raise ValueError(f"its alpha_pattern holds {len(patterns):,} paths; no network has as many layers")
    for pattern, value in patterns.items():
        path = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", path):   # PEFT takes any regular expression; a stranger's is not run
            raise ValueError(f"its alpha_pattern {pattern[:60]!r} is no path")
        if place.path == path or (path == pattern and place.path.endswith(f".{path}")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"its lora_alpha is {str(alpha)[:40]}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") is True else rank)


# ----------------------------------------------------------------------------------------------- into a model

def attach_loras(package: Package, given: Sequence[tuple[Path, float]]) -> None:
    """Adds the changes of files, each with a weight, to the parts of a package, and a note on each. Raises
    CheckpointError."""
    if not given:
        return
    if package.sampling.flow is not None:
        raise CheckpointError(f"{given[0][0]}: no LoRA is merged into models of the family {package.family} "
                              "yet; merge it by another program, and use the model that this writes.")
    names, shapes = layers(package)
    for path, weight in given:
        add_on = open_add_on(path)
        made = _fitted(add_on, weight, package, names, shapes)
        for part, name, change in made:
            [package.unet, *package.text][part].changes.setdefault(name, []).append(change)
        counts = Counter(_where(package, part, name) for part, name, _ in made)
        into = ", ".join(f"{n} of {where}" for where, n in counts.items())
        package.notes.append(f"{path.name}, merged with weight {weight:g}: {add_on.summary()}; weights: "
                             f"{into}")
        if weight:
            few_steps.apply(package, add_on.file)
        files = [add_on.file.path, *([add_on.settings_file] if add_on.settings_file else [])]
        package.lora.append(Added(path, {file.name: file for file in files}, weight))


def _where(package: Package, part: int, name: str) -> str:
    if part == 0:
        return "the UNet"
    config, layer = package.text[part - 1].config, re.match(r"transformer\.resblocks\.(\d+)", name)
    normed = config.final_norm or config.pooled_dim
    idle = int(layer[1]) >= config.layers if layer else name.startswith("ln_final") and not normed
    return "text layers that the model does not read" if idle else "the text"


def _fitted(add_on: AddOn, weight: float, package: Package, names: Mapping[str, Place],
            shapes: Sequence[Mapping[str, Shape]]) -> list[tuple[int, str, Change]]:
    """Each change, with the part and the tensor that it is for. Raises CheckpointError unless all fit."""
    made: list[tuple[int, str, Change]] = []
    strange, wrong = [], []
    for layer, kind, keys in add_on.changes:
        place = names.get(layer)
        name = place and place.names.get("bias" if keys.keys() & set(BIASES) else "weight")
        if place is None or name is None:
            strange.append(layer)
            continue
        held = {role: key for role, key in keys.items() if role != "alpha"}
        want = shapes[place.part][name]
        want = want[::-1] if place.transposed else (want[0] // place.share[1], *want[1:])
        try:
            deltas.check(kind, add_on.shapes(held), want)
            scale = _scale(add_on, kind, keys, place)
        except ValueError as error:
            wrong.append(f"{layer} ({error})")
            continue
        change = Change(add_on.file, kind, held, scale, weight, place.share, place.transposed)
        made.append((place.part, name, change))
    if strange or wrong:
        found = (("layers that the model does not have", strange), ("layers that do not fit", wrong))
        raise CheckpointError(f"{add_on.file.path}: {_misfit(add_on, package)}: "
                              + "; ".join(listed(what, each, 3) for what, each in found if each))
    return made


def _misfit(add_on: AddOn, package: Package) -> str:
    """What it is for, and what the model is."""
    others = [family for family in add_on.families() if family != package.family]
    theirs = next((width for layer, width in add_on.inputs().items() if CONTEXT.search(layer)), None)
    ours = package.unet.config.context_dim
    widths = [f", which reads text of width {w}" if theirs and theirs != ours else "" for w in (theirs, ours)]
    made_for = "not made for this model"
    if others:
        made_for = f"made for a model of the family {' or '.join(others)}"
    return (f"{add_on.kinds()} {made_for}{widths[0]}; {package.where} is of the family "
            f"{package.family}{widths[1]}")


def describe(path: Path) -> list[str]:
    """A readable description. Raises CheckpointError."""
    add_on = open_add_on(path)
    names = [layer for layer, _, _ in add_on.changes]
    parts = Counter("text" if re.match(r"lora_te|text_|clip_", name) else "UNet" for name in names)
    return [f"{path}", f"add-on      {add_on.summary()}",
            f"family      {' or '.join(add_on.families()) or 'unknown'}",
            *(f"{part:11} {n} weights changed" for part, n in parts.items()),
            f"note        give it beside its base model: --lora {path}"]

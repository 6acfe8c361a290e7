"""Averaged weights (EMA) of the UNet, which some files hold beside the plain ones."""
from __future__ import annotations

from collections.abc import Iterable

from p2p.weights import keys
from p2p.weights.errors import CheckpointError
from p2p.weights.files import Renamed, TensorFile

COUNTERS = (keys.EMA + "decay", keys.EMA + "num_updates")   # which hold no weights
NOT_USED = "its plain weights are used, not the averaged ones (EMA) that it holds too"
USED = "averaged weights (EMA) used"


def held(names: Iterable[str]) -> list[str]:
    """Those of averaged weights, whatever they average."""
    return sorted(k for k in names if k.startswith(keys.EMA) and k not in COUNTERS)


def taken_unasked(file: TensorFile) -> bool:
    """Whether versions that did not record `ema` took this file's averages: those under LDM's own names."""
    return keys.EMA + "diffusion_modelinput_blocks00weight" in file.shapes


def averaged(file: TensorFile, wanted: bool, notes: list[str]) -> TensorFile:
    """The file as it is; wanted: with the averages in place of the UNet's plain weights. Which of them, where there are
    both, is noted, and what is left of the averages. Unless asked for they are left alone, as elsewhere: a merge may
    still carry those of its base.

    Their names are the plain ones, or these less "model." or the whole prefix; with every dot left out (as LDM saves
    them, less "model."), or with the dots. Raises CheckpointError.
    """
    plain, there = [k for k in file.shapes if k.startswith(keys.UNET)], held(file.shapes)
    forms = [{k: keys.EMA + form(k.removeprefix(prefix)) for k in plain} for prefix in ("model.", "", keys.UNET)
             for form in (lambda name: name.replace(".", ""), str)]
    twins = max(forms, key=lambda names: sum(t in file.shapes for t in names.values()))
    found = sum(t in file.shapes for t in twins.values())
    if not wanted:
        notes += [NOT_USED] if there else []
        return file
    if not there:
        raise CheckpointError(f"{file.path}: no averaged weights (EMA) in it; leave out ema.")
    if found < len(twins):
        raise CheckpointError(f"{file.path}: averaged weights (EMA) are there for {found} of {len(twins)} UNet tensors "
                              f"under the names that are known (in the file: {there[0]}, ...); leave out ema to use the "
                              "plain ones.")
    notes.append(USED)
    if left := sorted({*there} - {*twins.values()}):
        notes.append(f"{len(left)} averaged tensors (EMA) are of no part of the UNet and are not used: {left[0]}, ...")
    return Renamed(file, {k: k for k in file.shapes} | twins)

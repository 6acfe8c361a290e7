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
    """The names of averaged weights, of any part."""
    return sorted(k for k in names if k.startswith(keys.EMA) and k not in COUNTERS)


def taken_unasked(file: TensorFile) -> bool:
    """Whether versions that did not record `ema` took this file's averages: those under LDM's own names."""
    return keys.EMA + "diffusion_modelinput_blocks00weight" in file.shapes


def averaged(file: TensorFile, wanted: bool, notes: list[str]) -> TensorFile:
    """The file; wanted: with the averages in place of the UNet's plain weights. Notes say which of the two
    are used, and which averages are not. They are not used by default, as in other programs: a merge may
    still carry those of its base.

    Their names are the plain ones, or these less "model." or the whole prefix; with every dot left out (as
    LDM saves them, less "model."), or with the dots. Raises CheckpointError.
    """
    plain, averaged_names = [k for k in file.shapes if k.startswith(keys.UNET)], held(file.shapes)
    forms = [{k: keys.EMA + form(k.removeprefix(prefix)) for k in plain}
             for prefix in ("model.", "", keys.UNET)
             for form in (lambda name: name.replace(".", ""), str)]
    twins = max(forms, key=lambda names: sum(t in file.shapes for t in names.values()))
    present = sum(t in file.shapes for t in twins.values())
    if not wanted:
        notes += [NOT_USED] if averaged_names else []
        return file
    if not averaged_names:
        raise CheckpointError(f"{file.path}: no averaged weights (EMA) in it; leave out ema.")
    if present < len(twins):
        raise CheckpointError(f"{file.path}: averaged weights (EMA) are there for {present} of {len(twins)} "
                              "UNet tensors under the names that are known (in the file: "
                              f"{averaged_names[0]}, ...); leave out ema to use the plain ones.")
    notes.append(USED)
    if unused := sorted({*averaged_names} - {*twins.values()}):
        notes.append(f"{len(unused)} averaged tensors (EMA) are of no part of the UNet and are not used: "
                     f"{unused[0]}, ...")
    return Renamed(file, {k: k for k in file.shapes} | twins)

"""Averaged weights (EMA) of the UNet, which some files hold beside the plain ones."""
from __future__ import annotations

from p2p.weights import keys
from p2p.weights.errors import CheckpointError
from p2p.weights.files import Renamed, TensorFile

EMA = "model_ema."


def averaged(file: TensorFile, wanted: bool, notes: list[str]) -> TensorFile:
    """The file as it is; wanted: with the averages in place of the UNet's plain weights. Which of them, where there are
    both, is noted. Unless asked for the averages are left alone, as elsewhere: a merge may still carry those of its base.

    Their names are those of the plain ones with every dot left out, as LDM saves them, or with the dots.
    Raises CheckpointError.
    """
    plain = {k: k.removeprefix("model.") for k in file.shapes if k.startswith(keys.UNET)}
    forms = (lambda name: name.replace(".", ""), str)
    both = [{k: EMA + form(name) for k, name in plain.items()} for form in forms]
    twins = max(both, key=lambda names: sum(t in file.shapes for t in names.values()))
    there = sum(t in file.shapes for t in twins.values())
    if not wanted:
        if there:
            notes.append("its plain weights are used, not the averaged ones (EMA) that it holds too")
        return file
    if not there:
        raise CheckpointError(f"{file.path}: no averaged weights (EMA) in it; leave out ema.")
    if there < len(twins):
        raise CheckpointError(f"{file.path}: averaged weights (EMA) are there for {there} of {len(twins)} UNet tensors; "
                              "leave out ema to use the plain ones.")
    notes.append("averaged weights (EMA) used")
    return Renamed(file, {k: k for k in file.shapes} | twins)

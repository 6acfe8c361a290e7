"""What is said of an edit: what was decided, and what of it changes nothing."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from p2p.blend import Blend
from p2p.edits import Tables
from p2p.request.asked import Asked
from p2p.request.effect import blend_idle, blends_without, editor_idle, idle, self_idle, without
from p2p.request.inverting import unguided
from p2p.request.source import FOLLOW
from p2p.request.start import Sampling, Settled, Start, late


def remarks(a: Asked, start: Start, made: Sequence[Tables], blend: Blend | None,
            planned: Sequence[Any]) -> list[str]:
    """made: the tables of Prompt-to-Prompt's edits, from which the run was planned."""
    steps, shape, inversion = start.schedule.steps, start.x.shape[1:], a.inversion
    notes = [] if inversion is not None else late(a.model, start.schedule)
    notes += _of_tables(a, made, steps) if a.editor is None else _of_editor(a, planned, steps)
    notes += sampling_idle(a.sampling, a.settled, known=inversion is not None)
    if inversion is not None and a.settled.guidance_scale == 1:
        notes += unguided(inversion.method)
    notes += a.notes
    if a.editor is None:
        notes += self_idle(a.edits, a.model, shape)
    if blend is not None:
        idle_blends = zip(a.edits, blend_idle(a.blends, blend, steps))
        notes += [f'"{e.prompt}": {why}' for e, why in idle_blends if why]
        alike = inversion is None or inversion.method in FOLLOW
        notes += blends_without(a.edits, blend, a.model, shape, alike)
    return notes


def _of_tables(a: Asked, made: Sequence[Tables], steps: int) -> list[str]:
    source, notes = a.tokens[0], []
    for m, (e, t), chosen in zip(made, a.pairs(), a.chosen):
        if chosen:
            notes.append(f'"{e.prompt}": mode {e.mode} (chosen from the prompts)')
        if source.ids == t.ids and idle(m):
            notes.append(f'"{e.prompt}": the same prompt, and no weight that is injected: this edit changes '
                         "nothing")
        idle_options = without(m, source, t, e, e.mode, steps, a.model.length, a.whole)
        notes += [f'"{e.prompt}": {why}' for why in idle_options]
    return notes


def _of_editor(a: Asked, planned: Sequence[Any], steps: int) -> list[str]:
    notes = editor_idle(a.editor, planned, steps)
    for (e, t), chosen in zip(a.pairs(), a.chosen):
        if not chosen and e.scope is None:
            notes.append(f'"{e.prompt}": mode changes nothing: it is of Prompt-to-Prompt, in whose stead the '
                         "editor injects")
        if a.inversion is None and a.tokens[0].ids == t.ids and a.editor.source_prompt in (None, a.source):
            notes.append(f'"{e.prompt}": the same prompt: this edit changes nothing')
    return notes


def sampling_idle(sampling: Sampling, settled: Settled, known: bool = False) -> list[str]:
    """Of a run's sampling what changes nothing. known: its source is inverted or traced."""
    notes = []
    if sampling.proximal is not None and settled.guidance_scale == 1:
        notes.append("proximal changes nothing: at guidance_scale 1 there is no guidance")
    elif sampling.proximal is not None and sampling.proximal[1] == 0:
        what = "nothing" if sampling.proximal[0] == "l0" else "next to nothing"
        notes.append(f"proximal {sampling.proximal[0]} changes {what}: from quantile 0 on all differences "
                     "count")
    if sampling.negative_prompt == "":
        notes.append("negative_prompt changes nothing: guidance leads away from the empty prompt anyhow")
    if any(seed != 0 for seed in settled.seeds):
        if known:
            notes.append("seed changes nothing: the noise is that of the inversion, or of the traced source")
        elif sampling.x_T is not None and not settled.eta and sampling.low is None:
            notes.append("seed changes nothing: the noise is x_T, and none is drawn in steps of eta 0")
    return notes

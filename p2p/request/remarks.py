"""The notes on an edit: what was decided, and which of its settings change nothing."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from p2p.blend import Blend, LocalBlend
from p2p.edits import Edit, Tables
from p2p.model import Model
from p2p.models.text import Tokens
from p2p.request import windows
from p2p.request.editing import EditRequest
from p2p.request.editor import Guiding
from p2p.request.effect import (
    blend_idle,
    blends_without,
    editor_idle,
    emphasis_idle,
    hybrid_edited,
    idle,
    idle_options,
    layers_idle,
    self_idle,
)
from p2p.request.emphasis import below_zero, read
from p2p.request.inverting import unguided, why_unguided
from p2p.request.negative import negatives
from p2p.request.source import FOLLOW, Inversion
from p2p.request.start import Sampling, Settled, Start, late_start


def remarks(request: EditRequest, start: Start, edit_tables: Sequence[Tables], blend: Blend | None,
            planned: Sequence[Any]) -> list[str]:
    """All notes on a run. edit_tables: of Prompt-to-Prompt's edits, from which the run was planned."""
    steps, shape, inversion = start.schedule.steps, start.x.shape[1:], request.inversion
    notes = [] if inversion is not None else late_start(request.model, start.schedule, request.sampling)
    if request.editor is None:
        notes += _of_tables(request, edit_tables, steps)
    else:
        notes += _of_editor(request, planned, steps)
    notes += sampling_idle(request.model, request.sampling, request.settled, inversion)
    if inversion is not None:
        notes += unguided(request.model, inversion.method, request.settled.guidance_scale)
    notes += [*request.notes, *emphasis_idle(request.edits)]
    if request.editor is None:
        notes += self_idle(request.given, request.edits, request.model, shape)
        notes += layers_idle(request.given, request.edits, edit_tables, request.model.unet)
    if blend is not None:
        each = zip(request.edits, request.blends, blend.start.tolist(), blend.fixed)
        notes += [f'"{e.prompt}": {why}' for e, b, start, mask in each
                  if b is not None and (why := blend_idle(b, start, mask, steps))]
        as_stored = inversion is None or inversion.method in FOLLOW
        notes += blends_without(request.edits, blend, request.model, shape, as_stored)
    return notes


def _of_tables(request: EditRequest, edit_tables: Sequence[Tables], steps: int) -> list[str]:
    source, notes = request.tokens[0], []
    for current, (e, t), given, blend in zip(edit_tables, request.pairs(), request.given, request.blends):
        notes += _chosen(source, t, e, given, request.model.length) + below_zero(e.prompt, e.equalizer or {})
        if _same_rows(request, e, t, blend) and idle(current):
            notes.append(f'"{e.prompt}": the same prompt, and no weight that is injected: this edit changes '
                         "nothing")
        found = idle_options(current, source, t, given, e.mode, steps, request.model.length,
                             request.schedule_steps, hybrid_edited(current, request.model.unet))
        notes += [f'"{e.prompt}": {why}' for why in found]
    return notes


def _same_rows(request: EditRequest, edit: Edit, target: Tokens, blend: LocalBlend | None) -> bool:
    """Whether a target's row is its source's, but for what is injected."""
    sampling, inversion, editor = request.sampling, request.inversion, request.editor
    same_text = (request.tokens[0].ids == target.ids and read(request.source).plain
                 and read(edit.prompt).plain)
    by_editor = editor is not None and (editor.source_prompt not in (None, request.source)
                                        or (request.batch.guided and not editor.guided_source))
    one_noise = sampling.low is None and (sampling.x_T is None or len(sampling.x_T) == 1)
    negative = set(negatives(sampling.negative_prompt, len(request.prompts)))
    sampled = inversion is None or (
        _traced(request, inversion, negative) if inversion.method in FOLLOW else
        blend is None and not (request.batch.guided and request.batch.lone_source))
    return same_text and not by_editor and one_noise and len(negative) == 1 and sampled


def _traced(request: EditRequest, inversion: Inversion, negative: set[str]) -> bool:
    """Whether it is the trace of a prompt that was guided as this run is, and not a picture's."""
    drawn = inversion.method == "direct" and inversion.seed is not None
    guided = inversion.guidance_scale, {inversion.negative_prompt or ""}, None
    return drawn and guided == (request.settled.guidance_scale, negative, request.sampling.proximal)


def _chosen(source: Tokens, target: Tokens, edit: Edit, given: Edit, length: int) -> list[str]:
    """What was chosen from the prompts."""
    usual = windows.usual(source, target, str(edit.mode), length)
    by_word = dict(usual.cross) if isinstance(usual.cross, dict) else {"default_": usual.cross}
    cross = [f"cross_replace_steps {by_word.pop('default_')}", *(f"of {w!r} {v}" for w, v in by_word.items())]
    defaults = [said for name, said in (("cross_replace_steps", ", ".join(cross)),
                                        ("self_replace_steps", f"self_replace_steps {usual.self_}"))
                if getattr(given, name) is None]
    chosen = [f"mode {edit.mode} (chosen from the prompts)"] * (given.mode is None)
    chosen += [f"{usual.does}: {', '.join(defaults)}"] if defaults else []
    return [f'"{edit.prompt}": {"; ".join(chosen)}'] if chosen else []


def _of_editor(request: EditRequest, planned: Sequence[Any], steps: int) -> list[str]:
    notes = [] if isinstance(request.editor, Guiding) else editor_idle(request.editor, planned, steps)
    asked = request.settled.guidance_scale != request.model.guidance_scale
    if isinstance(request.editor, Guiding) and asked and not request.model.unet.reads_guidance:
        notes.append(f"guidance_scale changes nothing: editor {type(request.editor).__name__} stands in the "
                     "place of guidance")
    for (e, t), given, blend in zip(request.pairs(), request.given, request.blends):
        if given.mode is not None and e.scope is None:
            notes.append(f'"{e.prompt}": mode changes nothing: it is of Prompt-to-Prompt, which the '
                         "editor replaces")
        if _same_rows(request, e, t, blend):
            notes.append(f'"{e.prompt}": the same prompt: this edit changes nothing')
    return notes


def sampling_idle(model: Model, sampling: Sampling, settled: Settled,
                  inversion: Inversion | None = None) -> list[str]:
    """Notes on a run's sampling that changes nothing, or that the model was not made for. inversion: of its
    source, which is inverted or traced."""
    notes, known = [], inversion is not None
    if not model.text_encoders and settled.guidance_scale != 1:
        notes.append(f"guidance_scale changes nothing: {why_unguided(model)}")
    own = inversion is not None and inversion.method == "turbo-edit"   # its authors guide such models
    if model.guidance_scale == 1 and model.guided(settled.guidance_scale) and not own:
        notes.append(f"guidance_scale {settled.guidance_scale:g}: this model was made to run without "
                     "guidance; with it, it takes twice the rows, and pictures are often over-saturated")
    if sampling.proximal is not None and not model.guided(settled.guidance_scale):
        notes.append(f"proximal changes nothing: {why_unguided(model)}")
    elif sampling.proximal is not None and sampling.proximal[1] == 0:
        what = "nothing" if sampling.proximal[0] == "l0" else "next to nothing"
        notes.append(f"proximal {sampling.proximal[0]} changes {what}: from quantile 0 on all differences "
                     "count")
    if sampling.negative_prompt is not None and not known and not any(negatives(sampling.negative_prompt, 1)):
        notes.append("negative_prompt changes nothing: guidance leads away from the empty prompt anyhow")
    if any(seed != 0 for seed in settled.seeds):
        if known:
            notes.append("seed changes nothing: the noise is that of the inversion, or of the traced source")
        elif sampling.x_T is not None and not settled.eta and sampling.low is None:
            notes.append("seed changes nothing: the noise is x_T, and none is drawn in steps of eta 0")
    return notes

"""The request for an edit: all of it that can be checked, or decided, before the network runs.

A single edit and each line of a list go through `edit_request`, so that a list is refused for the same
reasons as an edit, before its first line runs.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import p2p
from p2p import align
from p2p.blend import LocalBlend, listed, placed
from p2p.denoise import Batch
from p2p.edits import Edit, check, choose_mode, decided
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.text import Tokens
from p2p.request import layers
from p2p.request.checks import choice, finite, share
from p2p.request.editor import Editor, Guiding, without_guidance
from p2p.request.effect import left_out
from p2p.request.emphasis import notes as weight_notes
from p2p.request.emphasis import prompt_tokens, weights_as_equalizer
from p2p.request.names import EDITING, SAMPLING, understood
from p2p.request.negative import check_negative, check_sources, negatives
from p2p.request.prompts import check as check_prompt
from p2p.request.record import Record
from p2p.request.schedules import check_schedule, timestep_tuple
from p2p.request.settings import WINDOWS_UNREAD
from p2p.request.source import LONE, Inversion
from p2p.request.start import Sampling, Settled, guidance, own_sampler, settle
from p2p.request.words import by_breadth, check_blend, check_swaps
from p2p.sampler import PROXIMAL, guide, proximal_guide
from p2p.scope import scoped
from p2p.weights.untrusted import brief


@dataclass(frozen=True)
class EditRequest:
    """An edit, checked: its source loaded, its prompts tokenised, its modes chosen."""

    model: Model
    source: str
    inversion: Inversion | None
    sampling: Sampling
    settled: Settled
    batch: Batch                 # the rows of the run
    editor: Editor | None
    record: Record
    edits: list[Edit]
    tokens: list[Tokens]         # of the source, then of each target
    blends: list[LocalBlend | None]   # by target, with its scope expressed as a blend
    given: list[Edit]            # before modes and windows were chosen: None where they were not given
    notes: list[str]             # on what scopes leave out

    @property
    def prompts(self) -> list[str]:
        """Of the source, then of each target."""
        return [self.source, *(edit.prompt for edit in self.edits)]

    @property
    def told(self) -> list[str]:
        """The rows' prompts: an editor may tell the source another one than its own."""
        other = None if self.editor is None else self.editor.source_prompt
        return [self.source if other is None else other, *self.prompts[1:]]

    @property
    def schedule_steps(self) -> int | None:
        """How often the network is asked along the whole schedule, of which an inversion may leave some steps
        out; None without one."""
        return None if self.inversion is None else replace(self.inversion, skip=0).calls

    @property
    def recorded(self) -> list[Edit]:
        """The edits as settings record them: without what another editor does not read."""
        edits = [layers.for_network(e, self.model.unet) for e in self.edits]
        if self.editor is None:
            return edits
        edits = [replace(e, **WINDOWS_UNREAD) for e in edits]
        return [replace(e, mode=None) if e.scope is None else e for e in edits]

    def pairs(self) -> list[tuple[Edit, Tokens]]:
        return list(zip(self.edits, self.tokens[1:]))


def edit_request(model: Model, source: str | Inversion | Path, targets: str | Edit | Sequence[str | Edit], *,
                 editor: Editor | str | None = None, record: Record = Record(),
                 **settings: Any) -> EditRequest:
    """Checks the arguments of `edit`. source: also an inversion that has no latents yet, see
    `inverting.expected`. Raises UsageError."""
    settings = understood(settings, EDITING + SAMPLING, "an edit")
    editor = _checked_editor(model, editor, record)
    sampling = Sampling(**{k: v for k, v in settings.items() if k in SAMPLING})
    if sampling.proximal is not None:
        proximal_by(sampling.proximal)   # raises
        sampling = replace(sampling, proximal=(sampling.proximal[0], float(sampling.proximal[1])))
    source = Inversion.load(source) if isinstance(source, Path) else source
    inversion = source if isinstance(source, Inversion) else None
    if inversion is not None:
        source, sampling = inversion.prompt, _sampled_from(inversion, model, sampling)
    sampling = without_guidance(editor, inversion, sampling, settings)
    n = len(targets) if isinstance(targets, (list, tuple)) else 1
    # sizes and memory first: what they refuse is said before faults of single edits
    batch = _batch(model, inversion, editor, sampling, n)
    settled = settle(model, sampling, [sampling.seed], 1 + n, targets=n, record=record, rows=batch.rows,
                     calls=None if inversion is None else inversion.calls)
    written = _edits(targets, {k: v for k, v in settings.items() if k in EDITING})
    for prompt in (source, *(e.prompt for e in written)):
        check_prompt(prompt)   # raises
    check_negative(model, sampling.negative_prompt, settled.guidance_scale, 1 + n, inversion)
    given = [weights_as_equalizer(model, e) for e in written]   # brackets leave their prompts
    if editor is not None:
        refuse_p2p_settings(written, given)
    tokens, told = _tokens(model, [source, *(e.prompt for e in given)], editor, sampling)
    edits = [decided(tokens[0], t, e, choose_mode(tokens[0], e, t), model.length)
             for e, t in zip(given, tokens[1:])]
    # notes on the prompts as they are now are made with all others
    bracketed = [w.prompt for w, e in zip(written, given) if w.prompt != e.prompt]
    notes = [note for prompt in bracketed for note in check_prompt(prompt)]
    blends = []
    for e, t in zip(edits, tokens[1:]):
        _check_words(e, tokens[0], t, model.length, windows=editor is None)
        blend, ignored = _local_blend(e, tokens[0], told, t, model.length)
        blends.append(blend)
        notes += ignored
        layers.chosen(e.layers, model.unet)   # raises
    placed(blends, model.unet, settled.shape[1:])   # raises
    check_sources(sampling.negative_prompt, batch, inversion)
    return EditRequest(model, source, inversion, sampling, settled, batch, editor, record, edits, tokens,
                       blends, given, notes)


def _batch(model: Model, inversion: Inversion | None, editor: Editor | None, sampling: Sampling,
           targets: int) -> Batch:
    if isinstance(editor, Guiding):
        return Batch(1, targets, True, lone_source=True)
    apart = inversion is not None and not mixes_rows(sampling)
    lone = apart and inversion.method in LONE and not (editor is not None and editor.guided_source)
    absent = apart and inversion.queries is not None and editor is None
    return Batch(1, targets, model.guided(guidance(model, sampling.guidance_scale)), lone, absent)


def mixes_rows(sampling: Sampling) -> bool:
    """Whether guidance depends on all rows together, and so on the source's unconditional row too."""
    return sampling.proximal is not None and sampling.proximal[0].startswith("published")


def _tokens(model: Model, prompts: Sequence[str], editor: Editor | None,
            sampling: Sampling) -> tuple[list[Tokens], Tokens]:
    """The tokens of source and targets, and of what the source's row is told. Raises UsageError, also for a
    prompt that is read beside them: where only other prompts were encoded beforehand, or a part of a word is
    weighed."""
    against = negatives(sampling.negative_prompt, 1)
    for other in filter(None, (*against, editor and editor.source_prompt)):
        prompt_tokens(model, other)   # raises
    for prompt in (*prompts, *against):
        weight_notes(model, prompt)   # raises
    told = prompts[0] if editor is None or editor.source_prompt is None else editor.source_prompt
    return [prompt_tokens(model, prompt) for prompt in prompts], prompt_tokens(model, told)


def _local_blend(edit: Edit, source: Tokens, told: Tokens, target: Tokens,
                 length: int) -> tuple[LocalBlend | None, list[str]]:
    """The local blend of an edit, of its scope too, and notes on words that the scope leaves out. told: what
    the source's row is. Raises UsageError."""
    notes, mode = [], str(edit.mode)
    if edit.scope is not None and (edit.local_blend is None or edit.local_blend.words is None):
        notes = [f'"{edit.prompt}": {why}' for why in left_out(source, target, edit, mode, length)]
    blend = scoped(source, target, edit, mode, length).local_blend
    check_blend(blend, told, target, length)
    return blend, notes


def _checked_editor(model: Model, editor: Editor | str | None, record: Record) -> Editor | None:
    """The editor, also by its name. Raises UsageError."""
    if not model.text_encoders:
        raise UsageError(f"{model.name} reads no text, so there is no attention to inject into")
    Record.check(record)
    if isinstance(editor, str):
        editor = p2p.editors.find_editor(editor)   # by the facade: editors import this module
    if isinstance(editor, type) or (editor is not None and not isinstance(editor, Editor)):
        raise UsageError("editor: a name, such as \"masactrl\", or an object with plan, guided_source and "
                         f"source_prompt is needed, such as p2p.MasaCtrl(), not {brief(editor)}")
    if editor is not None and not is_dataclass(editor):
        raise UsageError(f"editor: {type(editor).__name__} is no dataclass; make it one (@dataclass): its "
                         "fields are recorded, so that the edit can be done again")
    if (check_network := getattr(editor, "check", None)) is not None:
        check_network(model.unet)
    if editor is not None and record.before:
        raise UsageError("record.before: maps before the edit are Prompt-to-Prompt's; another editor leaves "
                         "those of text alone")
    return editor


def _sampled_from(inversion: Inversion, model: Model, sampling: Sampling) -> Sampling:
    """The sampling of an inversion's edit. Raises UsageError for another model, and for settings that the
    inversion has fixed."""
    inversion.check(model)
    height, width = (side * model.shrink for side in inversion.latents.shape[2:])
    own, spacing, given = own_sampler(model), sampling.timestep_spacing, sampling.timesteps
    check_schedule(own if sampling.sampler is None else sampling.sampler, spacing, given)
    usual = None if inversion.timesteps or model.flow else model.timestep_spacing
    for name, value, stored in (
            ("sampler", sampling.sampler, own), ("timesteps", timestep_tuple(given), inversion.timesteps),
            ("timestep_spacing", spacing, inversion.timestep_spacing or usual)):
        if value not in (None, stored):
            raise UsageError(f"{name}: an inverted or traced source is sampled by {own}, at the timesteps "
                             "that it was made at; leave it out")
    fixed = {"steps": inversion.steps, "eta": inversion.eta, "height": height, "width": width}
    for name, stored in fixed.items():
        value = getattr(sampling, name)
        if value is not None and finite(name, value) != stored:
            raise UsageError(f"{name} is {stored} in this inversion, not {value}: leave it out, or invert "
                             "the picture again")
    if sampling.x_T is not None:
        raise UsageError("x_T is stored in this inversion: leave it out")
    scale = inversion.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
    scale = guidance(model, scale)
    if inversion.queries is not None and model.unet.reads_guidance and scale != inversion.guidance_scale:
        raise UsageError(f"guidance_scale {scale}: the trace holds queries and keys of guidance "
                         f"{inversion.guidance_scale}, which {model.name} reads: leave it out, or trace "
                         "again")
    negative = sampling.negative_prompt
    if negative is None and model.guided(scale):
        negative = inversion.negative_prompt
    return replace(sampling, sampler=own, negative_prompt=negative, steps=inversion.steps,
                   timestep_spacing=inversion.timestep_spacing, timesteps=inversion.timesteps,
                   eta=inversion.eta if own == "ddim" else None, x_T=inversion.latents[-1:],
                   guidance_scale=scale)


def _edits(targets: str | Edit | Sequence[str | Edit], settings: dict[str, Any]) -> list[Edit]:
    """The targets as edits; settings: of those that are plain prompts. Raises UsageError."""
    items = [targets] if isinstance(targets, (str, Edit)) else targets
    if not isinstance(items, (list, tuple)) or not all(isinstance(t, (str, Edit)) for t in items):
        raise UsageError(f"targets: {brief(targets)} is neither a prompt nor an Edit, nor a list of them")
    if not items:
        raise UsageError("no target prompt given")
    if settings and all(isinstance(t, Edit) for t in items):
        raise UsageError(f"{', '.join(settings)}: belongs to targets given as plain prompts; write it into "
                         "the Edit")
    edits = [t if isinstance(t, Edit) else Edit(t, **settings) for t in items]
    for e in edits:
        check(e)
        if e.layers is not None:
            layers.check(e.layers)
    return edits


def refuse_p2p_settings(edits: Sequence[Edit], read: Sequence[Edit] | None = None) -> None:
    """Raises UsageError for settings of an edit that Prompt-to-Prompt alone reads, and another editor would
    ignore. read: the edits without their brackets, which weigh attention."""
    for e, without in zip(edits, edits if read is None else read):
        unread = [f.name for f in fields(e) if getattr(e, f.name) not in (None, f.default)
                  and f.name not in ("prompt", "mode", "local_blend", "scope", "emphasis")]
        if unread:
            raise UsageError(f"{e.prompt:.60}: {', '.join(unread)}: of Prompt-to-Prompt, which the "
                             "editor replaces; leave it out")
        if without.equalizer != e.equalizer:
            raise UsageError(f"{e.prompt:.60}: brackets weigh attention, which is Prompt-to-Prompt's; take "
                             'them out, or weigh the text: emphasis="embedding" (--emphasis embedding)')


def _check_words(edit: Edit, source: Tokens, target: Tokens, length: int, windows: bool) -> None:
    """Raises UsageError for words that an edit names and its prompts lack, and for prompts that its mode does
    not take, or that differ only beyond what the tower reads. windows: Prompt-to-Prompt injects."""
    if source.ids != target.ids and align.read_ids(source, length) == align.read_ids(target, length):
        furthest = max(part.length for part in align.parts(target, length))
        raise UsageError(f'"{edit.prompt[:40]}...": what differs from the source lies beyond the {furthest} '
                         "tokens that the text tower reads; shorten the prompt")
    if edit.mode == "replace" and (windows or edit.scope is not None):
        align.paired_words(source, target)
    for word, c in (edit.equalizer or {}).items():
        finite(f'equalizer: the weight of "{word}"', c)
    cross = edit.cross_replace_steps if isinstance(edit.cross_replace_steps, Mapping) else {}
    for said in (edit.equalizer or {}, {word: at for word, at in cross.items() if word != "default_"}):
        by_breadth(said, target, length)   # raises
    for word in (*listed(edit.scope or ()), *(edit.swap or {})):
        align.word_tokens(source, word, length)
    check_swaps(edit.swap or {}, target, length)


def proximal_by(proximal: tuple[str, float] | None) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Guidance by `proximal_guide` with this norm and quantile; by the plain rule where None. Raises
    UsageError."""
    if proximal is None:
        return guide
    try:
        norm, quantile = proximal if isinstance(proximal, (list, tuple)) else ()
        if choice("norm", norm, PROXIMAL) and share("quantile", quantile) == 1:
            raise ValueError
    except (TypeError, ValueError):
        raise UsageError(f"proximal: {brief(proximal)} must be a norm ({', '.join(PROXIMAL)}) and a quantile "
                         "from 0 to below 1") from None
    return lambda uncond, cond, scale: proximal_guide(uncond, cond, scale, norm, quantile)

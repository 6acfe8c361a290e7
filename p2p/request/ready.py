"""A run, checked and laid out: what is asked -> all that `denoise` is given."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from p2p.blend import Blend, prepare
from p2p.blend import idle as blend_idle
from p2p.denoise import Batch, Known
from p2p.edits import Edit, Tables, check, choose_mode, idle, plan, tables, to_settings
from p2p.errors import UsageError
from p2p.model import Conditioning, Model
from p2p.models.attention import AttentionEdit
from p2p.models.text import Tokens
from p2p.models.unet import UNet
from p2p.request.checks import choice, finite, share
from p2p.request.effect import blends_without, without
from p2p.request.prompts import check as check_prompt
from p2p.request.record import Record
from p2p.request.schedules import Schedule
from p2p.request.source import FOLLOW, Inversion, Queries
from p2p.request.start import Sampling, Start, begin, guidance, late
from p2p.sampler import PROXIMAL, Stepper, guide, proximal_guide, stepper
from p2p.scope import scoped
from p2p.weights.untrusted import brief

Plan = Sequence[AttentionEdit | Mapping[str, Any] | None]
SAMPLING = tuple(f.name for f in fields(Sampling))
EDITING = tuple(f.name for f in fields(Edit))[1:]


@runtime_checkable
class Editor(Protocol):
    """Another way to inject than Prompt-to-Prompt's, see `p2p.editors`."""

    guided_source: bool          # a known source is run unconditionally too
    source_prompt: str | None    # what the source is told; None: its own prompt

    def plan(self, unet: UNet, batch: Batch, steps: int, device: torch.device) -> list[Any]:
        """For each step an edit by site, or one for all."""


class Ready(NamedTuple):
    """All that is left is to sample."""

    prompts: list[str]                       # one a row, of an edit the source first
    start: Start
    batch: Batch
    step: Stepper
    empty: Conditioning | list[Conditioning] | None   # of the unconditional rows
    settings: dict[str, Any]
    notes: list[str]
    plan: Plan | None = None
    tables: Sequence[Tables] = ()            # of Prompt-to-Prompt's edits, from which the plan was made
    blend: Blend | None = None
    known: Known | None = None
    guide: Callable[..., Tensor] = guide
    guidance_scale: float | Tensor = 1.0
    edits: Sequence[Edit] = ()               # as they were understood


@dataclass
class Asked:
    """An edit as asked for, its source looked up, its prompts split."""

    model: Model
    source: str
    inversion: Inversion | None
    start: Start
    edits: list[Edit]
    sampling: Sampling
    editor: Editor | None
    record: Record
    tokens: list[Tokens]         # of the source, then of each target
    notes: list[str]
    chosen: list[bool]           # by target, whether its mode was chosen from the prompts

    def pairs(self) -> list[tuple[Edit, Tokens]]:
        return list(zip(self.edits, self.tokens[1:]))


def prepared(model: Model, source: str | Inversion | Path, targets: str | Edit | Sequence[str | Edit], *,
             editor: Editor | None = None, record: Record = Record(), **settings: Any) -> Ready:
    """The arguments of `edit`, checked and laid out. Raises UsageError."""
    asked = _asked(model, source, targets, editor, record, settings)
    inversion, edits, start = asked.inversion, asked.edits, asked.start
    if inversion is None:
        asked.notes += late(model, start.schedule)
    start, known, before = (start, None, None) if inversion is None else _from_inversion(start, inversion)
    steps, whole = start.schedule.steps, None if inversion is None else inversion.steps
    edits[:] = [replace(e, mode=choose_mode(asked.tokens[0], e, t)) for e, t in asked.pairs()]
    _check_read(asked)
    made = () if editor is not None else [tables(asked.tokens[0], t, e, e.mode, steps, model.length, whole)
                                          for e, t in asked.pairs()]
    asked.notes += _remarks(asked, made, steps, whole)
    fit = "pad" if inversion is not None and inversion.fit == "pad" else "crop"
    said = run_settings(model, "edit", start, asked.sampling) | {
        "source": asked.source, **to_settings(edits, start.x.shape[2:], fit), "proximal": asked.sampling.proximal,
        "editor": editor and {"name": type(editor).__name__, **asdict(editor)},   # type: ignore[call-overload]
        "inversion": inversion and inversion.settings()}
    understood = list(edits)
    edits[:] = [scoped(asked.tokens[0], t, e, e.mode, model.length) for e, t in asked.pairs()]
    blend = prepare([e.local_blend for e in edits], asked.tokens[0], asked.tokens[1:], unet=model.unet, steps=steps,
                    size=start.x.shape[2:], how=fit, length=model.length, device=model.device)
    if blend is not None:
        asked.notes += [f'"{e.prompt}": {why}' for e, why in zip(edits, blend_idle(blend, steps)) if why]
        alike = inversion is None or inversion.method in FOLLOW
        asked.notes += blends_without(edits, blend, model, start.x.shape[1:], alike)
    batch = _batch(asked, start)
    planned = _planned(asked, batch, made, steps)
    if known is not None and inversion is not None and inversion.queries is not None and batch.absent:
        known = known._replace(queries=Queries(inversion.queries, model), run=[False] * steps)
    elif known is not None and known.follow and not _looked_at(asked, blend):   # a known source is run where it is read
        reads = _reads(made) if editor is None else [bool(step) for step in planned]
        planned, known = [step if read else None for step, read in zip(planned, reads)], known._replace(run=reads)
    empty = empty_prompts(model, inversion, batch.unconditional, start.size, asked.sampling.negative_prompt)
    step = stepper(start.schedule, model.prediction, model.clip, start.eta, start.noise, before)
    told = asked.source if editor is None or editor.source_prompt is None else editor.source_prompt
    by = guide if asked.sampling.proximal is None else proximal_by(asked.sampling.proximal)
    return Ready([told, *(e.prompt for e in edits)], start, batch, step, empty, said, asked.notes, planned, made, blend, known,
                 by, start.guidance_scale, understood)


def _asked(model: Model, source: str | Inversion | Path, targets: str | Edit | Sequence[str | Edit], editor: Editor | None,
           record: Record, settings: dict[str, Any]) -> Asked:
    """Raises UsageError."""
    if not model.text_encoders:
        raise UsageError(f"{model.name} reads no text, so there is no attention to inject into")
    Record.check(record)
    if editor is not None and not isinstance(editor, Editor):
        raise UsageError(f"editor: an object is needed, such as p2p.MasaCtrl() or p2p.PlugAndPlay(), not {brief(editor)}")
    if editor is not None and record.before:
        raise UsageError("record.before: maps before the edit are Prompt-to-Prompt's; another editor leaves those of text alone")
    if unknown := [name for name in settings if name not in SAMPLING + EDITING]:
        raise UsageError(f"{', '.join(unknown)}: no setting of an edit; known: {', '.join(EDITING + SAMPLING)}")
    sampling = Sampling(**{k: v for k, v in settings.items() if k in SAMPLING})
    if sampling.proximal is not None:
        proximal_by(sampling.proximal)
    source = Inversion.load(source) if isinstance(source, Path) else source
    inversion, notes = source if isinstance(source, Inversion) else None, list(model.notes)
    if inversion is not None:
        _fits(inversion, model, sampling)
        notes += inversion.notes
        source, scale = inversion.prompt, sampling.guidance_scale
        sampling = replace(sampling, steps=inversion.steps, eta=inversion.eta, x_T=inversion.latents[-1:],
                           guidance_scale=inversion.guidance_scale if scale is None else scale)
    n = len(targets) if isinstance(targets, (list, tuple)) else 1
    start = begin(model, sampling, [sampling.seed], 1 + n, targets=n, record=record)   # before there is an edit for each
    edits = _edits(targets, {k: v for k, v in settings.items() if k in EDITING})
    if editor is not None:
        without_editor(edits)
    tokens = split_prompts(model, [source, *(e.prompt for e in edits)], notes)
    return Asked(model, source, inversion, start, edits, sampling, editor, record, tokens, notes, [e.mode is None for e in edits])


def _edits(targets: str | Edit | Sequence[str | Edit], settings: dict[str, Any]) -> list[Edit]:
    """Targets as edits; `settings` are those of plain prompts. Raises UsageError."""
    listed = [targets] if isinstance(targets, (str, Edit)) else targets
    if not isinstance(listed, (list, tuple)) or not all(isinstance(t, (str, Edit)) for t in listed):
        raise UsageError(f"targets: {brief(targets)} is neither a prompt nor an Edit, nor a list of them")
    if not listed:
        raise UsageError("no target prompt given")
    if settings and all(isinstance(t, Edit) for t in listed):
        raise UsageError(f"{', '.join(settings)}: belongs to targets given as plain prompts; write it into the Edit")
    edits = [t if isinstance(t, Edit) else Edit(t, **settings) for t in listed]
    for e in edits:
        check(e)
    return edits


def without_editor(edits: Sequence[Edit]) -> None:
    """Raises UsageError for what Prompt-to-Prompt alone reads of an edit: another editor would drop it in silence."""
    for e in edits:
        if said := [f.name for f in fields(e) if f.name not in ("prompt", "mode", "local_blend", "scope")
                    and getattr(e, f.name) not in (None, f.default)]:
            raise UsageError(f"{e.prompt:.60}: {', '.join(said)}: of Prompt-to-Prompt, in whose stead the editor "
                             "injects; leave it out")


def _fits(inversion: Inversion, model: Model, sampling: Sampling) -> None:
    """Raises UsageError for another model, or settings that an inversion has fixed."""
    inversion.check(model)
    size = tuple(side * model.shrink for side in inversion.latents.shape[2:])
    for name, made in (("steps", inversion.steps), ("eta", inversion.eta), ("height", size[0]), ("width", size[1])):
        given = getattr(sampling, name)
        if given is not None and finite(name, given) != made:
            raise UsageError(f"{name} is {made} in this inversion, not {given}: leave it out, or invert the picture again")
    if sampling.x_T is not None:
        raise UsageError("x_T is stored in this inversion: leave it out")


def _from_inversion(start: Start, inversion: Inversion) -> tuple[Start, Known, tuple[Tensor, float] | None]:
    """The steps that the inversion covers, its latents as the loop wants them, noisiest first, and of O-BELM x one level
    above the first step."""
    schedule = start.schedule.ending(inversion.final_alpha)
    schedule = Schedule(schedule.timesteps[inversion.skip:], schedule.alphas[inversion.skip:])
    path = inversion.latents.flip(0).to(start.x.device)
    known, before = Known(path, inversion.method in FOLLOW), None
    if inversion.offsets is not None:
        known = known._replace(offsets=inversion.offsets.to(start.x.device))
    start = start._replace(schedule=schedule, noise=[torch.zeros_like(path[:1])] * schedule.steps if start.eta else [])
    if inversion.method == "belm" and schedule.steps > 1:   # two levels are needed to go on: the first step is the source's
        start = start._replace(schedule=Schedule(schedule.timesteps[1:], schedule.alphas[1:]),
                               x=path[1].expand(len(start.x), -1, -1, -1))
        before = path[0].expand(len(start.x), -1, -1, -1), float(schedule.alphas[0])
        known = known._replace(path=path[1:])
    return start, known, before


def _check_read(asked: Asked) -> None:
    """Raises UsageError where nothing that is read of a target differs from the source."""
    source, last = asked.tokens[0], asked.model.length - 1
    for e, t in asked.pairs():
        if source.ids != t.ids and source.ids[:last] == t.ids[:last]:
            raise UsageError(f'"{e.prompt[:40]}...": what differs from the source lies beyond the {last + 1} tokens that '
                             "the text tower reads; shorten the prompt")


def _remarks(asked: Asked, made: Sequence[Tables], steps: int, whole: int | None) -> list[str]:
    """What was decided of the edits, and what changes nothing. made: of Prompt-to-Prompt's edits."""
    model, source, notes = asked.model, asked.tokens[0], []
    for m, (e, t), chosen in zip(made, asked.pairs(), asked.chosen):
        if chosen:
            notes.append(f'"{e.prompt}": mode {e.mode} (chosen from the prompts)')
        if source.ids == t.ids and idle(m):
            notes.append(f'"{e.prompt}": the same prompt, and no weight that is injected: this edit changes nothing')
        notes += [f'"{e.prompt}": {why}' for why in without(m, source, t, e, e.mode, steps, model.length, whole)]
    sampling = asked.sampling
    if sampling.proximal is not None and guidance(model, sampling.guidance_scale) == 1:
        notes.append("proximal changes nothing: at guidance_scale 1 there is no guidance")
    if sampling.x_T is not None and asked.inversion is None and sampling.seed != 0 and not sampling.eta:
        notes.append("seed changes nothing: the noise is x_T, and none is drawn in steps of eta 0")
    if asked.inversion is not None and sampling.seed != 0:
        notes.append("seed changes nothing: the noise is that of the inversion, or of the traced source")
    return notes


def _whole_batch(sampling: Sampling) -> bool:
    """Does guidance look at all rows together, the source's unconditional one too?"""
    return sampling.proximal is not None and sampling.proximal[0].startswith("published")


def _batch(asked: Asked, start: Start) -> Batch:
    inversion, editor = asked.inversion, asked.editor
    lone = inversion is not None and inversion.method in (*FOLLOW, "negative-prompt") and not _whole_batch(asked.sampling) \
        and not (editor is not None and editor.guided_source)
    absent = inversion is not None and inversion.queries is not None and editor is None and not _whole_batch(asked.sampling)
    return Batch(1, len(asked.edits), start.guidance_scale != 1, lone, absent)


def _planned(asked: Asked, batch: Batch, made: Sequence[Tables], steps: int) -> Plan:
    model = asked.model
    if asked.editor is not None:
        return asked.editor.plan(model.unet, batch, steps, model.device)
    return plan(made, batch, model.device, model.dtype, dense=model.compiled)


def _reads(made: Sequence[Tables]) -> list[bool]:
    """For each step, whether any target borrows anything of the source."""
    return torch.stack([t.reads_text() | t.inject for t in made]).any(0).tolist()


def _looked_at(asked: Asked, blend: Blend | None) -> bool:
    """Does something beside the edits read the source's row at every step?"""
    return bool(asked.record.text or asked.record.pixels or (blend is not None and blend.sites)) or _whole_batch(asked.sampling)


def empty_prompts(model: Model, inversion: Inversion | None, n: int, size: tuple[int, int], negative_prompt: str | None
                  ) -> Conditioning | list[Conditioning] | None:
    """What n guided rows are told in place of a prompt. Raises UsageError."""
    if negative_prompt is not None:
        check_prompt(negative_prompt)
    if negative_prompt is not None and not n:
        raise UsageError("negative_prompt: nothing leads away from it without guidance; give a guidance_scale other than 1, or "
                         "leave it out")
    method = None if inversion is None else inversion.method
    if negative_prompt is not None and method in ("negative-prompt", "null-text"):
        raise UsageError(f"negative_prompt: an inversion by {method} has its own in its place; leave it out, or invert by direct")
    if not n:
        return None
    if negative_prompt:
        return model.condition([negative_prompt] * n, *size)
    if method == "negative-prompt":
        return model.condition([inversion.prompt] * n, *size)
    null = model.null(n, *size)
    if inversion is not None and inversion.null_context is not None:
        contexts = inversion.null_context.to(null.context)
        return [null._replace(context=c.expand(n, -1, -1)) for c in contexts]
    return null


def proximal_by(proximal: tuple[str, float]) -> Callable[[Tensor, Tensor, float], Tensor]:
    try:
        norm, quantile = proximal if isinstance(proximal, (list, tuple)) else ()
        if choice("norm", norm, PROXIMAL) and share("quantile", quantile) == 1:
            raise ValueError
    except (TypeError, ValueError):
        raise UsageError(f"proximal: {brief(proximal)} must be a norm ({', '.join(PROXIMAL)}) and a quantile from 0 to below "
                         "1") from None
    return lambda uncond, cond, scale: proximal_guide(uncond, cond, scale, norm, quantile)


def split_prompts(model: Model, prompts: Sequence[str], notes: list[str]) -> list[Tokens]:
    """Splits the prompts, and notes what is remarkable in them. None for a model that reads no text."""
    written = [check_prompt(prompt) for prompt in prompts]
    if not model.text_encoders:
        return []
    for prompt, remarks in dict(zip(prompts, written)).items():
        notes += [*model.remarks(prompt), *remarks]
    return [model.tokens(p) for p in prompts]


def run_settings(model: Model, command: str, start: Start, sampling: Sampling) -> dict[str, Any]:
    """What every run records of itself."""
    from p2p import __version__  # not above: it imports this

    seeds = [sampling.seed] if not isinstance(sampling.seed, (list, tuple)) else [int(s) for s in sampling.seed]
    seed = None if sampling.x_T is not None else int(seeds[0]) if len(seeds) == 1 else seeds
    return {
        "command": command, "model": model.name, "places": dict(model.places), **model.identity(), "steps": start.schedule.steps,
        "guidance_scale": start.guidance_scale, "negative_prompt": sampling.negative_prompt, "seed": seed, "eta": start.eta,
        "height": start.size[0], "width": start.size[1], "device": model.device.type, "torch": torch.__version__,
        "version": __version__,
    }

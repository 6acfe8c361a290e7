"""A run, checked and laid out: what is asked -> all that `denoise` is given."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2p import __version__
from p2p.blend import Blend, prepare
from p2p.denoise import Batch, Known
from p2p.edits import Edit, Tables, plan, tables
from p2p.model import Conditioning, Model
from p2p.models.attention import AttentionEdit
from p2p.request.asked import Asked, Editor, asked, proximal_by
from p2p.request.prompts import check as check_prompt
from p2p.request.record import Record
from p2p.request.remarks import remarks
from p2p.request.schedules import Schedule
from p2p.request.settings import to_settings
from p2p.request.source import FOLLOW, Inversion, Queries
from p2p.request.start import Sampling, Start, begun
from p2p.sampler import Stepper, guide, stepper

Plan = Sequence[AttentionEdit | Mapping[str, Any] | None]


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


def prepared(model: Model, source: str | Inversion | Path, targets: str | Edit | Sequence[str | Edit], *,
             editor: Editor | None = None, record: Record = Record(), **settings: Any) -> Ready:
    """The arguments of `edit`, checked and laid out. Raises UsageError."""
    a = asked(model, source, targets, editor=editor, record=record, **settings)
    inversion = a.inversion
    start, known, before = begun(model, a.sampling, a.settled, 1 + len(a.edits)), None, None
    if inversion is not None:
        start, known, before = _from_inversion(start, inversion)
    steps, size, fit = start.schedule.steps, start.x.shape[2:], "crop" if inversion is None else inversion.fit
    own, length = a.tokens[0], model.length
    made = [tables(own, t, e, e.mode, steps, length, a.whole) for e, t in a.pairs()] if editor is None else []
    blend = prepare(a.blends, own, a.tokens[1:], unet=model.unet, steps=steps, size=size, how=fit,
                    length=length, device=model.device)
    batch = _batch(a)
    planned = plan(made, batch, model.device, model.dtype, dense=model.compiled) if editor is None else \
        editor.plan(model.unet, batch, steps, model.device)
    prompts = [a.source, *(e.prompt for e in a.edits)]
    notes = [*model.notes, *(() if inversion is None else inversion.notes), *prompt_notes(model, prompts),
             *remarks(a, start, made, blend, planned)]
    if inversion is not None and inversion.queries is not None and batch.absent:
        known = known._replace(queries=Queries(inversion.queries, model), run=[False] * steps)
    elif known is not None and known.follow and not _looked_at(a, blend):   # a source is run where it is read
        reads = _reads(made) if editor is None else [bool(step) for step in planned]
        planned, known = [step if read else None
                          for step, read in zip(planned, reads)], known._replace(run=reads)
    said = run_settings(model, "edit", start, a.sampling) | {
        "source": a.source, **to_settings(a.recorded, size, fit), "proximal": a.sampling.proximal,
        "editor": editor and {"name": type(editor).__name__, **asdict(editor)},  # type: ignore[call-overload]
        "inversion": inversion and inversion.settings()}
    empty = empty_prompts(model, inversion, batch.unconditional, start.size, a.sampling.negative_prompt)
    step = stepper(start.schedule, model.prediction, model.clip, start.eta, start.noise, before)
    told = a.source if editor is None or editor.source_prompt is None else editor.source_prompt
    by = guide if a.sampling.proximal is None else proximal_by(a.sampling.proximal)
    return Ready([told, *prompts[1:]], start, batch, step, empty, said, notes, planned, made, blend, known,
                 by, start.guidance_scale, a.edits)


def _from_inversion(start: Start, inversion: Inversion) -> tuple[Start, Known, tuple[Tensor, float] | None]:
    """The steps that the inversion covers, its latents as the loop wants them, noisiest first, and of O-BELM
    x one level above the first step."""
    schedule = start.schedule.ending(inversion.final_alpha)
    schedule = Schedule(schedule.timesteps[inversion.skip:], schedule.alphas[inversion.skip:])
    path = inversion.latents.flip(0).to(start.x.device)
    known, before = Known(path, inversion.method in FOLLOW), None
    if inversion.offsets is not None:
        known = known._replace(offsets=inversion.offsets.to(start.x.device))
    start = start._replace(schedule=schedule,
                           noise=[torch.zeros_like(path[:1])] * schedule.steps if start.eta else [])
    # two levels are needed to go on: the first step is the source's
    if inversion.method == "belm" and schedule.steps > 1:
        start = start._replace(schedule=Schedule(schedule.timesteps[1:], schedule.alphas[1:]),
                               x=path[1].expand(len(start.x), -1, -1, -1))
        before = path[0].expand(len(start.x), -1, -1, -1), float(schedule.alphas[0])
        known = known._replace(path=path[1:])
    return start, known, before


def _whole_batch(sampling: Sampling) -> bool:
    """Does guidance look at all rows together, the source's unconditional one too?"""
    return sampling.proximal is not None and sampling.proximal[0].startswith("published")


def _batch(a: Asked) -> Batch:
    inversion, editor = a.inversion, a.editor
    apart = inversion is not None and not _whole_batch(a.sampling)
    lone = apart and inversion.method in (*FOLLOW, "negative-prompt") \
        and not (editor is not None and editor.guided_source)
    absent = apart and inversion.queries is not None and editor is None
    return Batch(1, len(a.edits), a.settled.guidance_scale != 1, lone, absent)


def _reads(made: Sequence[Tables]) -> list[bool]:
    """For each step, whether any target borrows anything of the source."""
    return torch.stack([t.reads_text() | t.inject for t in made]).any(0).tolist()


def _looked_at(a: Asked, blend: Blend | None) -> bool:
    """Does something beside the edits read the source's row at every step?"""
    maps = a.record.text or a.record.pixels or (blend is not None and blend.sites)
    return bool(maps) or _whole_batch(a.sampling)


def empty_prompts(model: Model, inversion: Inversion | None, n: int, size: tuple[int, int],
                  negative_prompt: str | None
                  ) -> Conditioning | list[Conditioning] | None:
    """What n guided rows are told in place of a prompt."""
    if not n:
        return None
    if negative_prompt:
        return model.condition([negative_prompt] * n, *size)
    if inversion is not None and inversion.method == "negative-prompt":
        return model.condition([inversion.prompt] * n, *size)
    null = model.null(n, *size)
    if inversion is not None and inversion.null_context is not None:
        contexts = inversion.null_context.to(null.context)
        return [null._replace(context=c.expand(n, -1, -1)) for c in contexts]
    return null


def prompt_notes(model: Model, prompts: Sequence[str]) -> list[str]:
    """What is remarkable in prompts. Raises UsageError for what is none."""
    written = {prompt: check_prompt(prompt) for prompt in prompts}
    if not model.text_encoders:   # it reads none
        return []
    return [note for prompt, notes in written.items() for note in [*model.remarks(prompt), *notes]]


def run_settings(model: Model, command: str, start: Start, sampling: Sampling) -> dict[str, Any]:
    """What every run records of itself."""
    seeds = [sampling.seed] if not isinstance(sampling.seed,
                                              (list, tuple)) else [int(s) for s in sampling.seed]
    seed = None if sampling.x_T is not None else int(seeds[0]) if len(seeds) == 1 else seeds
    return {
        "command": command, "model": model.name, "places": dict(model.places), **model.identity(),
        "steps": start.schedule.steps, "guidance_scale": start.guidance_scale,
        "negative_prompt": sampling.negative_prompt, "seed": seed, "eta": start.eta, "height": start.size[0],
        "width": start.size[1], "device": model.device.type, "torch": torch.__version__,
        "version": __version__,
    }

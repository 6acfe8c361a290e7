"""From the arguments of `edit` and `generate` to all those of `denoise`."""
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
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.attention import AttentionEdit
from p2p.models.conditioning import Conditioning
from p2p.models.text import TextEncoder
from p2p.request import layers
from p2p.request.editing import EditRequest, edit_request, mixes_rows, proximal_by
from p2p.request.editor import Editor, Guiding
from p2p.request.emphasis import condition, parsed, prompt_tokens
from p2p.request.emphasis import notes as weights_notes
from p2p.request.names import SAMPLING, understood
from p2p.request.negative import check_negative, negatives
from p2p.request.offload import at_work
from p2p.request.prompts import check as check_prompt
from p2p.request.record import Record
from p2p.request.remarks import remarks, sampling_idle
from p2p.request.schedules import Level
from p2p.request.settings import to_settings
from p2p.request.solvers import SOLVED, asked, descent
from p2p.request.source import FOLLOW, Inversion, Queries
from p2p.request.start import Sampling, Start, begun, late_start, settle, stepper_of
from p2p.sampler import Stepper, guide
from p2p.weights.untrusted import brief

Plan = Sequence[AttentionEdit | Mapping[str, Any] | None]


class Ready(NamedTuple):
    """A run that is ready to be sampled."""

    prompts: list[str]                       # one a row; in an edit the source comes first
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
    edits: Sequence[Edit] = ()               # with the modes that were chosen


def prepared(model: Model, source: str | Inversion | Path, targets: str | Edit | Sequence[str | Edit], *,
             editor: Editor | str | None = None, record: Record = Record(), **settings: Any) -> Ready:
    """Checks the arguments of `edit`, and lays out its run. Raises UsageError."""
    request = edit_request(model, source, targets, editor=editor, record=record, **settings)
    start, known, before = begun(model, request.sampling, request.settled, len(request.prompts)), None, None
    if request.inversion is not None:
        start, known, before = _from_inversion(model, start, request.inversion)
    blend = _blend(request, start)
    edit_tables, planned = _tables_and_plan(request, start.schedule.steps)
    notes = _notes(request, start, edit_tables, blend, planned)
    if known is not None:
        known, planned = _run_where_read(request, blend, edit_tables, known, planned)
    by, empty = _guidance(request, start)
    return Ready(request.told, start, request.batch, _stepper(request, start, before), empty,
                 _recorded(request, start), notes, plan=planned, tables=edit_tables, blend=blend, known=known,
                 guide=by, guidance_scale=start.guidance_scale, edits=request.edits)


def generation(model: Model, prompts: str | Sequence[str], record: Record = Record(),
               **settings: Any) -> Ready:
    """Checks the arguments of `generate`, and lays out its run. Raises UsageError."""
    known = tuple(name for name in SAMPLING if name != "proximal")
    sampling = Sampling(**understood(settings, known, "generate"))
    Record.check(record)
    if record.before:
        raise UsageError("record.before: maps before the edit are an edit's; leave it out")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds: list[Any] = list(sampling.seed) if isinstance(sampling.seed, (list, tuple)) else [sampling.seed]
    if not isinstance(prompts, (list, tuple)):
        raise UsageError(f"prompts are a text or a list of texts, not {brief(prompts)}")
    if not prompts or len(seeds) not in (1, len(prompts)):
        raise UsageError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed, or one for each "
                         "prompt")
    settled = settle(model, sampling, seeds, len(prompts), record=record)
    check_negative(model, sampling.negative_prompt, settled.guidance_scale, len(prompts))
    notes = [*model.notes, *late_start(model, settled.schedule, sampling),
             *prompt_notes(model, [*prompts, *negatives(sampling.negative_prompt, 1)]),
             *sampling_idle(model, sampling, settled)]
    start = begun(model, sampling, settled, len(prompts))
    batch = Batch(len(prompts), 0, model.guided(start.guidance_scale))
    recorded = run_settings(model, "generate", start, sampling, settled.seeds) | {"prompts": list(prompts)}
    empty = empty_prompts(model, None, batch.unconditional, start.size, sampling.negative_prompt)
    return Ready(list(prompts), start, batch, stepper_of(model, start), empty, recorded, notes,
                 guidance_scale=start.guidance_scale)


def _blend(request: EditRequest, start: Start) -> Blend | None:
    told = prompt_tokens(request.model, request.told[0])   # whose words the source's maps are of
    return prepare(request.blends, told, request.tokens[1:], unet=request.model.unet,
                   steps=start.schedule.steps, size=start.x.shape[2:], fit=_fit(request),
                   length=request.model.length, device=request.model.device)


def _fit(request: EditRequest) -> str:
    """How pictures that are given, masks among them, are fitted: as the inverted one was."""
    return "crop" if request.inversion is None else request.inversion.fit


def _tables_and_plan(request: EditRequest, steps: int) -> tuple[list[Tables], Plan]:
    """What is edited at each step; of Prompt-to-Prompt also the tables that tell it."""
    model, unet, batch, source = request.model, request.model.unet, request.batch, request.tokens[0]
    if request.editor is not None:
        return [], request.editor.plan(unet, batch, steps, model.device)
    edit_tables = [tables(source, target, layers.for_network(edit, unet), steps, model.length,
                          request.schedule_steps)._replace(layers=layers.chosen(edit.layers, unet))
                   for edit, target in request.pairs()]
    return edit_tables, plan_by_site(model, edit_tables, batch)


def _notes(request: EditRequest, start: Start, edit_tables: Sequence[Tables], blend: Blend | None,
           planned: Plan) -> list[str]:
    model, inversion = request.model, request.inversion
    prompts = [*request.told, *negatives(request.sampling.negative_prompt, 1)]
    return [*model.notes, *(() if inversion is None else inversion.notes), *prompt_notes(model, prompts),
            *remarks(request, start, edit_tables, blend, planned)]


def _run_where_read(request: EditRequest, blend: Blend | None, edit_tables: Sequence[Tables], known: Known,
                    planned: Plan) -> tuple[Known, Plan]:
    """At which steps the source's row is run: with stored queries and keys at none, else where an edit reads
    them. The edits of the other steps, which do nothing, go: their row numbers count that row."""
    inversion = request.inversion
    if inversion.queries is not None and request.batch.absent:
        stored = Queries(inversion.queries, request.model)
        return known._replace(queries=stored, run=[False] * len(planned)), planned
    if not known.follow or _source_is_watched(request, blend):
        return known, planned
    reads = _source_is_read(edit_tables) if request.editor is None else [bool(step) for step in planned]
    return known._replace(run=reads), [step if read else None for step, read in zip(planned, reads)]


def _stepper(request: EditRequest, start: Start, before: tuple[Tensor, Level] | None) -> Stepper:
    inversion = request.inversion
    if inversion is not None and inversion.method in SOLVED:
        return descent(request.model, inversion, start.schedule)
    return stepper_of(request.model, start, before)


def _recorded(request: EditRequest, start: Start) -> dict[str, Any]:
    """What the run records of itself, to be done again."""
    inversion, editor, sampling = request.inversion, request.editor, request.sampling
    source = None if inversion is None else inversion.settings()
    kept = {x.dtype for x in ((inversion and inversion.queries) or {}).values()} - {request.model.dtype}
    if kept:   # of a trace, rounded to another dtype
        source["queries"] = str(kept.pop()).removeprefix("torch.")
    return run_settings(request.model, "edit", start, sampling, request.settled.seeds) | {
        "source": request.source, **to_settings(request.recorded, start.x.shape[2:], _fit(request)),
        "proximal": sampling.proximal,
        "editor": editor and {"name": type(editor).__name__, **asdict(editor)},  # type: ignore[call-overload]
        "inversion": source}


def _guidance(request: EditRequest, start: Start) -> tuple[
        Callable[..., Tensor], Conditioning | list[Conditioning] | None]:
    """How predictions join, and what the unconditional rows are told."""
    model, sampling, n = request.model, request.sampling, request.batch.unconditional
    if isinstance(request.editor, Guiding):
        return request.editor.guide, condition(model, [request.source] * n, *start.size)
    empty = empty_prompts(model, request.inversion, n, start.size, sampling.negative_prompt)
    return proximal_by(sampling.proximal), empty


def plan_by_site(model: Model, edit_tables: Sequence[Tables], batch: Batch,
                  sources: Sequence[int] | None = None) -> Plan:
    """An edit a step, of all layers, or by site where a target is limited to some; see `plan`."""
    planned = plan(edit_tables, batch, model.device, model.dtype, sources=sources, dense=model.compiled)
    if all(t.layers is None for t in edit_tables):
        return planned
    return [None if edit is None else layers.by_site(edit, edit_tables) for edit in planned]


def _from_inversion(model: Model, start: Start, inversion: Inversion
                    ) -> tuple[Start, Known, tuple[Tensor, Level] | None]:
    """The start at the inversion's own steps, its stored latents noisiest first, and for O-BELM x one level
    noisier than the first step, with its level."""
    schedule = start.schedule.ending(inversion.final_alpha).after(inversion.skip)
    schedule = asked(model, schedule, inversion)
    path = inversion.latents.flip(0).to(start.x.device)
    known, before = Known(path, inversion.method in FOLLOW), None
    if inversion.offsets is not None:
        known = known._replace(offsets=inversion.offsets.to(start.x.device))
    start = start._replace(schedule=schedule, x=path[:1].expand(len(start.x), -1, -1, -1),
                           # eta's noise is in the offsets
                           noise=[torch.zeros_like(path[:1])] * schedule.steps if start.eta else [])
    # two levels are needed to go on: the first step is the source's
    if inversion.method == "belm" and schedule.steps > 1:
        start = start._replace(schedule=schedule.after(1),
                               x=path[1].expand(len(start.x), -1, -1, -1))
        before = path[0].expand(len(start.x), -1, -1, -1), schedule.levels[0]
        known = known._replace(path=path[1:])
    return start, known, before


def _source_is_read(edit_tables: Sequence[Tables]) -> list[bool]:
    """For each step, whether any target reads the source's attention."""
    return torch.stack([t.reads_text() | t.inject for t in edit_tables]).any(0).tolist()


def _source_is_watched(request: EditRequest, blend: Blend | None) -> bool:
    """Whether anything beside the edits reads the source's row at every step."""
    maps = request.record.anything or (blend is not None and bool(blend.sites))
    return maps or mixes_rows(request.sampling)


def empty_prompts(model: Model, inversion: Inversion | None, n: int, size: tuple[int, int],
                  negative_prompt: str | Sequence[str] | None) -> Conditioning | list[Conditioning] | None:
    """The conditioning of n unconditional rows, one for all steps or one for each; None for no rows."""
    if not n:
        return None
    if any(each := negatives(negative_prompt, n)[-n:]):
        if all(each):
            return condition(model, each, *size)
        rows = {prompt: condition(model, [prompt], *size) if prompt else model.null(1, *size)
                for prompt in each}
        return Conditioning.cat([rows[prompt] for prompt in each])
    if inversion is not None and inversion.method == "negative-prompt":
        return condition(model, [inversion.prompt] * n, *size)
    null = model.null(n, *size)
    if inversion is not None and inversion.null_context is not None:
        contexts = inversion.null_context.to(null.context)
        return [null._replace(context=c.expand(n, -1, -1)) for c in contexts]
    return null


def prompt_notes(model: Model, prompts: Sequence[str]) -> list[str]:
    """Notes on prompts. Raises UsageError for what is not a prompt."""
    written = {prompt: check_prompt(prompt) for prompt in prompts}
    if not model.text_encoders:   # it reads no text
        return []
    return [note for prompt, notes in written.items()
            for note in (*unread_words(model, parsed(model, prompt).text), *notes,
                         *weights_notes(model, prompt))]


def unread_words(model: Model, prompt: str) -> list[str]:
    """Notes on what the text towers cut off a prompt, and on words that they do not know."""
    model.tokens(prompt)   # raises where only other prompts were encoded beforehand
    notes, alike = [], len({tower.config.context_length for tower in model.text_encoders}) == 1
    for tower in model.text_encoders:
        t, length = tower.tokens(prompt), tower.config.context_length
        if len(t.ids) > length:
            name = "the text tower" if alike else "CLIP" if isinstance(tower, TextEncoder) else "T5"
            notes.append(f'"{prompt[:40]}...": {len(t.ids)} tokens, {name} reads {length}: cut off '
                         f'"{t.text[t.spans[length - 1][0]:]}"')
        with at_work(model.offload, model.device, tower):
            unknown = tower.unknown(torch.tensor(t.ids, device=model.device)).tolist()
        words = dict.fromkeys(t.text[s:e] for (s, e), u in zip(t.spans, unknown) if u)
        if words:
            notes.append(f'"{prompt}": this model has never seen {", ".join(words)}')
    return list(dict.fromkeys(notes))


def run_settings(model: Model, command: str, start: Start, sampling: Sampling,
                 seeds: list[int]) -> dict[str, Any]:
    """What every run records of itself."""
    seed = None if sampling.x_T is not None else seeds[0] if len(seeds) == 1 else seeds
    return {
        "command": command, "model": model.name, "places": dict(model.places), **model.identity(),
        "steps": start.schedule.steps, "guidance_scale": start.guidance_scale,
        "negative_prompt": sampling.negative_prompt, "seed": seed, "eta": start.eta, "sampler": start.sampler,
        "timestep_spacing": sampling.timestep_spacing,
        "timesteps": None if sampling.timesteps is None else [int(t) for t in sampling.timesteps],
        "height": start.size[0], "width": start.size[1], "device": model.device.type,
        "torch": torch.__version__, "version": __version__,
    }

"""`generate` and `edit`: from prompts to pictures, with everything recorded that is needed to do it again."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from p2p.blend import idle as blend_idle
from p2p.blend import prepare
from p2p.denoise import Known, denoise
from p2p.edits import Edit, check, choose_mode, idle, plan, readers, scoped, tables, to_settings
from p2p.errors import UsageError
from p2p.image import to_pil
from p2p.maps import AttentionMaps, Collector
from p2p.model import Conditioning, Model, find_model
from p2p.models.attention import Record
from p2p.models.layers import keep_freed_memory
from p2p.models.text import Tokens
from p2p.models.unet import UNet
from p2p.request.checks import choice, finite, flag, share, whole
from p2p.request.effect import blends_without, without
from p2p.request.prompts import check as check_prompt
from p2p.request.source import FOLLOW, Inversion, Queries
from p2p.request.start import Low, Start, begin, late
from p2p.sampler import PROXIMAL, Schedule, proximal_guide
from p2p.weights.untrusted import brief


@runtime_checkable
class Editor(Protocol):
    """Another way to inject than Prompt-to-Prompt's, see `p2p.editors`."""

    guided_source: bool          # a known source is run unconditionally too
    source_prompt: str | None    # what the source is told; None: its own prompt

    def plan(self, unet: UNet, n: int, guided: int, *, steps: int, length: int, device: torch.device, dtype: torch.dtype
             ) -> list[Any]:
        """For each step an edit, or one by site, of a source and n - 1 targets; guided: the unconditional rows before them."""


@dataclass
class Result:
    """What a run gives; of an edit the source comes first."""

    images: list[Image.Image]
    latents: Tensor                  # (B, C, H, W), float32, CPU
    prompts: list[str]
    settings: dict[str, Any]         # all that is needed to run it again
    notes: list[str] = field(default_factory=list)   # what was decided, or looks like a mistake
    maps: AttentionMaps | None = None                # what `record` asked for
    masks: Tensor | None = None                      # (N, 1, H, W) bool, where local edits could act in the end, CPU
    rows: int = 0                                    # of the UNet that it took
    timings: dict[str, float] = field(default_factory=dict)   # seconds spent on text, steps and pictures


def edit(model: Model | str | Path, source: str | Inversion | Path, targets: str | Edit | Sequence[str | Edit], *,
         steps: int | None = None, guidance_scale: float | None = None, seed: int = 0, x_T: Tensor | None = None,
         eta: float | None = None, height: int | None = None, width: int | None = None, proximal: tuple[str, float] | None = None,
         editor: Editor | None = None, negative_prompt: str | None = None,
         low: Low | None = None, record: Record = Record(), progress: bool = False, **settings: Any) -> Result:
    """Edits the picture of `source` into one per target, all in one batch (Algorithm 1 of the paper).

    model: or what `load` loads it from, for this call alone. source: a prompt, or a real picture as `invert` gives it, or the
    path where it is saved (then steps, eta and size are those of the inversion).
    targets: `Edit`s, or prompts, for which `settings` holds the fields of `Edit`: mode, cross_replace_steps,
    self_replace_steps, self_max_tokens, windows_over, equalizer, renormalise, swap, local_blend, scope, aligner.
    steps: 50 where None. guidance_scale: None for the model's own (7.5 for Stable Diffusion). seed: of the shared initial
    noise, unless x_T (1 or B, C, H, W) is given. eta: 0 for DDIM, 1 for DDPM; the step noise is shared too. height, width: of the
    pictures in pixels, None for the size that the model was made for. proximal: guidance along the large differences
    alone, see `proximal_guide`: (norm, quantile). editor: another way to inject than Prompt-to-Prompt's, which takes no windows
    or weights. negative_prompt: what guidance leads away from, in place of the empty
    prompt. low: what a super-resolution stage enlarges, see `upscale`.
    record: which attention maps to keep in `maps`.
    Raises UsageError for words, windows or sizes that do not fit, NumericsError for values that are not finite.
    """
    model = find_model(model)
    ready = prepared(model, source, targets, steps=steps, guidance_scale=guidance_scale, seed=seed, x_T=x_T, eta=eta, height=height,
                     width=width, proximal=proximal, editor=editor, negative_prompt=negative_prompt, low=low, record=record,
                     **settings)
    return run(model, ready, record, progress)


class Ready(NamedTuple):
    """A run, checked and laid out: all that is left is to sample."""

    prompts: list[str]                       # one a row, of an edit the source first
    start: Start
    null: Conditioning | list[Conditioning] | None
    settings: dict[str, Any]
    notes: list[str]
    how: Mapping[str, Any] = MappingProxyType({})   # what `denoise` is told besides: plan, blend, known, guide


def prepared(model: Model, source: str | Inversion, targets: str | Edit | Sequence[str | Edit], *, steps: int | None = None,
             guidance_scale: float | None = None, seed: int = 0, x_T: Tensor | None = None, eta: float | None = None,
             height: int | None = None, width: int | None = None, proximal: tuple[str, float] | None = None,
             editor: Editor | None = None, negative_prompt: str | None = None, low: Low | None = None,
             record: Record = Record(), **settings: Any) -> Ready:
    """The arguments of `edit`, checked. Raises UsageError."""
    if not model.text_encoders:
        raise UsageError(f"{model.name} reads no text, so there is no attention to inject into")
    _check_record(record)
    if editor is not None and not isinstance(editor, Editor):
        raise UsageError(f"editor: an object is needed, such as p2p.MasaCtrl() or p2p.PlugAndPlay(), not {brief(editor)}")
    source = Inversion.load(source) if isinstance(source, Path) else source
    if editor is not None and record.before:
        raise UsageError("record.before: maps before the edit are Prompt-to-Prompt's; another editor leaves those of text alone")
    how: dict[str, Any] = {} if proximal is None else dict(guide=_proximal(proximal))
    whole_batch = proximal is not None and proximal[0].startswith("published")   # its threshold is of all rows, the source's too
    notes: list[str] = list(model.notes)
    inversion = source if isinstance(source, Inversion) else None
    if inversion is not None:
        _fits(inversion, model, steps, eta, height, width, x_T)
        notes += inversion.notes
        source, steps, eta, x_T = inversion.prompt, inversion.steps, inversion.eta, inversion.latents[-1:]
        guidance_scale = inversion.guidance_scale if guidance_scale is None else guidance_scale
    count = len(targets) if isinstance(targets, (list, tuple)) else 1
    start = begin(model, [seed], 1 + count, x_T, 50 if steps is None else steps, guidance_scale, eta, height, width, low, count,
                  record)
    notes += late(model, start.schedule) if inversion is None else []
    edits = _edits(targets, settings)
    if editor is not None:
        _without_editor(edits)
    prompts = [source, *(e.prompt for e in edits)]
    split = _tokens(model, prompts, notes)
    modes = [choose_mode(split[0], e, t) for e, t in zip(edits, split[1:])]
    for e, m, t in zip(edits, modes, split[1:]):
        if e.mode is None and editor is None:
            notes.append(f'"{e.prompt}": mode {m} (chosen from the prompts)')
        if split[0].ids != t.ids and split[0].ids[:model.length - 1] == t.ids[:model.length - 1]:
            raise UsageError(f'"{e.prompt[:40]}...": what differs from the source lies beyond the {model.length} tokens that '
                             "the text tower reads; shorten the prompt")
        if split[0].ids == t.ids and editor is None and idle(*tables(split[0], t, e, m, steps or 50, model.length)):
            notes.append(f'"{e.prompt}": the same prompt, and no weight that is injected: this edit changes nothing')
    known = None
    if inversion is not None:
        start, known = _from_inversion(start, inversion)
        if inversion.queries is not None and editor is None and not whole_batch:
            known = known._replace(queries=Queries(inversion.queries, model), run=[False] * start.schedule.steps)
        if whole_batch or (editor is not None and editor.guided_source):
            known = known._replace(guided=True)
    absent = known is not None and known.queries is not None
    edits = [replace(e, mode=m) for e, m in zip(edits, modes)]
    fitted = "pad" if inversion is not None and inversion.fit == "pad" else "crop"
    said = _settings(model, "edit", start, None if x_T is not None else int(seed)) | {
        "source": source, **to_settings(edits, start.x.shape[2:], fitted), "proximal": proximal,
        "editor": editor and {"name": type(editor).__name__, **asdict(editor)}, "negative_prompt": negative_prompt,
        "inversion": inversion and inversion.settings()}
    common = dict(steps=start.schedule.steps, length=model.length, device=model.device)
    guided = 0 if start.guidance_scale == 1 else len(prompts) - (known is not None and not known.guided)
    whole = None if inversion is None else inversion.steps
    if editor is None:
        for e, m, t in zip(edits, modes, split[1:]):
            notes += [f'"{e.prompt}": {why}' for why in without(split[0], t, e, m, common["steps"], model.length, whole)]
    if proximal is not None and start.guidance_scale == 1:
        notes.append("proximal changes nothing: at guidance_scale 1 there is no guidance")
    if x_T is not None and inversion is None and seed != 0 and not start.eta:
        notes.append("seed changes nothing: the noise is x_T, and none is drawn in steps of eta 0")
    if inversion is not None and seed != 0:
        notes.append("seed changes nothing: the noise is that of the inversion, or of the traced source")
    edits = [scoped(split[0], t, e, m, model.length) for t, e, m in zip(split[1:], edits, modes)]
    rows = dict(dtype=model.dtype, **common)
    if editor is not None:
        edit_plan = editor.plan(model.unet, len(prompts), guided, **rows)
    else:
        edit_plan = plan(split[0], split[1:], edits, modes, rows=len(prompts) - absent + guided, absent=absent,
                         whole=whole, **rows)
    blend = prepare([e.local_blend for e in edits], split[0], split[1:], size=start.x.shape[2:], how=fitted, **common)
    if blend is not None:
        notes += [f'"{e.prompt}": {why}' for e, why in zip(edits, blend_idle(blend, start.schedule.steps)) if why]
        notes += blends_without(edits, blend, model, start.x.shape[1:], alike=known is None or known.follow)
    mapped = record.text or record.pixels or (blend is not None and blend.pixels)
    if known is not None and known.follow and not mapped and not whole_batch:   # a known source is run where it is read
        reads = (readers(split[1:], edits, common["steps"], model.length, whole) if editor is None
                 else [bool(step) for step in edit_plan])
        edit_plan = [step if read else None for step, read in zip(edit_plan, reads)]
        known = known if absent else known._replace(run=reads)
    null = _null(model, inversion, guided, start.size, negative_prompt)
    if editor is not None and editor.source_prompt is not None:
        prompts[0] = editor.source_prompt
    return Ready(prompts, start, null, said, notes, how | dict(plan=edit_plan, blend=blend, known=known))


def _check_record(record: Record) -> None:
    """Raises UsageError."""
    if not isinstance(record, Record):
        raise UsageError(f"record: a Record is needed, not {brief(record)}")
    for name, value in record._asdict().items():
        if isinstance(Record._field_defaults[name], bool):
            flag(f"record.{name}", value)
        else:
            whole(f"record.{name}", value, least=0, most=2**62)
    if record.before and not (record.text or record.pixels):
        raise UsageError("record.before: of maps that are recorded; say with text or pixels up to which size")


def _without_editor(edits: Sequence[Edit]) -> None:
    """Raises UsageError for what Prompt-to-Prompt alone reads of an edit: another editor would drop it in silence."""
    for e in edits:
        if said := [f.name for f in fields(e) if f.name not in ("prompt", "mode", "local_blend", "scope")
                    and getattr(e, f.name) not in (None, f.default)]:
            raise UsageError(f"{e.prompt:.60}: {', '.join(said)}: of Prompt-to-Prompt, in whose stead the editor "
                             "injects; leave it out")


def _edits(targets: str | Edit | Sequence[str | Edit], settings: dict[str, Any]) -> list[Edit]:
    """Targets as edits; `settings` are those of plain prompts. Raises UsageError."""
    known = [f.name for f in fields(Edit)][1:]
    if unknown := [name for name in settings if name not in known]:
        raise UsageError(f"{', '.join(unknown)}: no setting of an edit; known: {', '.join(known)}")
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


def _fits(inversion: Inversion, model: Model, steps: int | None, eta: float | None, height: int | None, width: int | None,
          x_T: Tensor | None) -> None:
    """Raises UsageError for another model, or settings that an inversion has fixed."""
    inversion.check(model)
    size = tuple(side * model.shrink for side in inversion.latents.shape[2:])
    for name, given, made in (("steps", steps, inversion.steps), ("eta", eta, inversion.eta), ("height", height, size[0]),
                              ("width", width, size[1])):
        if given is not None and finite(name, given) != made:
            raise UsageError(f"{name} is {made} in this inversion, not {given}: leave it out, or invert the picture again")
    if x_T is not None:
        raise UsageError("x_T is stored in this inversion: leave it out")


def _from_inversion(start: Start, inversion: Inversion) -> tuple[Start, Known]:
    """The steps that the inversion covers, and its latents as the loop wants them, noisiest first."""
    schedule = start.schedule.ending(inversion.final_alpha)
    schedule = Schedule(schedule.timesteps[inversion.skip:], schedule.alphas[inversion.skip:])
    path = inversion.latents.flip(0).to(start.x.device)
    known = Known(path, inversion.method in FOLLOW, inversion.method not in (*FOLLOW, "negative-prompt"))
    if inversion.offsets is not None:
        known = known._replace(offsets=inversion.offsets.to(start.x.device))
    start = start._replace(schedule=schedule, noise=[torch.zeros_like(path[:1])] * schedule.steps if start.eta else [])
    if inversion.method == "belm" and schedule.steps > 1:   # two levels are needed to go on: the first step is the source's
        start = start._replace(schedule=Schedule(schedule.timesteps[1:], schedule.alphas[1:]),
                               x=path[1].expand(len(start.x), -1, -1, -1))
        known = known._replace(path=path[1:], before=path[0].expand(len(start.x), -1, -1, -1), above=schedule.alphas[0])
    return start, known


def _null(model: Model, inversion: Inversion | None, n: int, size: tuple[int, int], negative_prompt: str | None
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


def _proximal(proximal: tuple[str, float]) -> Callable[[Tensor, Tensor, float], Tensor]:
    try:
        norm, quantile = proximal if isinstance(proximal, (list, tuple)) else ()
        if choice("norm", norm, PROXIMAL) and share("quantile", quantile) == 1:
            raise ValueError
    except (TypeError, ValueError):
        raise UsageError(f"proximal: {brief(proximal)} must be a norm ({', '.join(PROXIMAL)}) and a quantile from 0 to below "
                         "1") from None
    return lambda uncond, cond, scale: proximal_guide(uncond, cond, scale, norm, quantile)


def generate(model: Model | str | Path, prompts: str | Sequence[str], *, steps: int = 50, guidance_scale: float | None = None,
             seed: int | Sequence[int] = 0, x_T: Tensor | None = None, eta: float | None = None, height: int | None = None,
             width: int | None = None, negative_prompt: str | None = None, low: Low | None = None, record: Record = Record(),
             progress: bool = False) -> Result:
    """One picture per prompt; arguments as in `edit`. seed: one for all prompts, or one for each."""
    model = find_model(model)
    _check_record(record)
    if record.before:
        raise UsageError("record.before: maps before the edit are an edit's; leave it out")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = [seed] if not isinstance(seed, (list, tuple)) else list(seed)
    if not isinstance(prompts, (list, tuple)):
        raise UsageError(f"prompts are a text or a list of texts, not {brief(prompts)}")
    if not prompts or len(seeds) not in (1, len(prompts)):
        raise UsageError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed, or one for each prompt")
    start = begin(model, seeds, len(prompts), x_T, steps, guidance_scale, eta, height, width, low, record=record)
    notes: list[str] = [*model.notes, *late(model, start.schedule)]
    _tokens(model, prompts, notes)
    seeds = [int(s) for s in seeds]
    recorded = None if x_T is not None else seeds[0] if len(seeds) == 1 else seeds
    settings = _settings(model, "generate", start, recorded) | {"prompts": list(prompts), "negative_prompt": negative_prompt}
    null = _null(model, None, len(prompts) if start.guidance_scale != 1 else 0, start.size, negative_prompt)
    return run(model, Ready(prompts, start, null, settings, notes), record, progress)


def run(model: Model, ready: Ready, record: Record, progress: bool) -> Result:
    """Samples, and collects what was asked for."""
    if record.queries:
        raise UsageError("record.queries: queries and keys are kept by p2p.trace, maps alone by a run")
    prompts, start, null, settings, notes, how = ready
    flag("progress", progress)
    began = time.perf_counter()
    text = model.condition(prompts, *start.size)
    if start.low is not None:
        enlarged = dict(low=start.low.to(model.dtype), level=start.level)
        text, null = text._replace(**enlarged), null and null._replace(**enlarged)
    read = time.perf_counter()
    loop = denoise(model, start.x, text, null, start.schedule, guidance_scale=start.guidance_scale, eta=start.eta,
                   noise=start.noise or None, record=record, **how)
    x, masks, rows, collector = start.x, None, 0, Collector()
    bar = tqdm(loop, total=start.schedule.steps, disable=not (progress and sys.stderr.isatty()), leave=False, unit="step")
    keep_freed_memory(model.device)
    for step in bar:
        x, masks, rows = step.x, step.mask, rows + step.rows
        if record.text or record.pixels:
            if not step.maps:
                raise UsageError(f"no attention map has at most {max(record.text, record.pixels)} positions in a picture of "
                                 f"{start.size[0]} x {start.size[1]} pixels; record larger ones, or choose a smaller picture")
            collector.add(step.t, step.maps)
    latents, sampled = x.cpu(), time.perf_counter()
    pictures = to_pil(model.decode(x))
    timings = {"text": read - began, "steps": sampled - read, "pictures": time.perf_counter() - sampled}
    maps = collector.result([model.tokens(p) for p in prompts], tuple(x.shape[2:]), model.length,
                            model.unet.pixel_sites()) if collector.timesteps else None
    return Result(pictures, latents, list(prompts), settings, list(dict.fromkeys(notes)), maps,
                  None if masks is None else masks.cpu(), rows, timings)


def _tokens(model: Model, prompts: Sequence[str], notes: list[str]) -> list[Tokens]:
    """Splits the prompts, and notes what is remarkable in them. None for a model that reads no text."""
    written = [check_prompt(prompt) for prompt in prompts]
    if not model.text_encoders:
        return []
    for prompt, remarks in dict(zip(prompts, written)).items():
        notes += [*model.remarks(prompt), *remarks]
    return [model.tokens(p) for p in prompts]


def _settings(model: Model, command: str, start: Start, seed: int | list[int] | None) -> dict[str, Any]:
    from p2p import __version__  # not above: it imports this

    return {
        "command": command, "model": model.name, "places": dict(model.places), **model.identity(), "steps": start.schedule.steps,
        "guidance_scale": start.guidance_scale, "seed": seed, "eta": start.eta, "height": start.size[0], "width": start.size[1],
        "device": model.device.type, "torch": torch.__version__, "version": __version__,
    }

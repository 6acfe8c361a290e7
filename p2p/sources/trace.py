"""A source computed once for many edits: its latents, and the queries and keys that edits read at every
step."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from p2p.denoise import Batch, denoise
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.attention import QK, Attention
from p2p.request.checks import flag
from p2p.request.emphasis import condition
from p2p.request.inverting import schedule_of
from p2p.request.loading import find_model
from p2p.request.memory import afford, qk_shapes
from p2p.request.negative import check_negative, negatives
from p2p.request.prompts import check as check_prompt
from p2p.request.ready import empty_prompts, prompt_notes
from p2p.request.remarks import sampling_idle
from p2p.request.schedules import timestep_tuple
from p2p.request.solvers import asked
from p2p.request.source import FLOATS, FOLLOW, Inversion
from p2p.request.start import Sampling, begun, late_start, not_distilled, settle, stepper_of
from p2p.weights.untrusted import brief


def size(model: Model, steps: int, dtype: torch.dtype | None = None, height: int | None = None,
         width: int | None = None) -> int:
    """Bytes that `trace` of a picture will hold; dtype None: the model's."""
    shape = model.latent_shape(height, width)
    numbers = sum(n * d for qk in qk_shapes(model, *shape[1:]).values() for n, d in qk)   # a step
    latents = 4 * shape[0] * shape[1] * shape[2]
    return steps * numbers * (dtype or model.dtype).itemsize + (steps + 1) * latents


def _afford(model: Model, steps: int, dtype: torch.dtype, sides: Sequence[int]) -> None:
    """Raises UsageError for more queries and keys than the machine has memory for."""
    height, width = (side * model.shrink for side in sides)
    afford({"queries, keys and latents": size(model, steps, dtype, height, width)})


@torch.no_grad()
def trace(model: Model | str | Path, source: str | Inversion | Path, *, dtype: torch.dtype | None = None,
          latents_only: bool = False, progress: bool = False, **sampling: object) -> Inversion:
    """Computes once what edits need of their source: pass the result to `edit` in its place.

    source: a prompt (sampling: steps, timestep_spacing, timesteps, guidance_scale, seed, x_T, height, width,
    negative_prompt as in `generate`; eta 0), or an inversion whose source follows its stored latents
    (`source.FOLLOW`). An edit then runs 2 rows a step for each target, one without guidance; latents_only:
    stores no queries, and the source's row is run. dtype: of the queries and keys (None: the model's;
    torch.float16 halves them). `size` says beforehand how many bytes. Its `notes` are those of an edit on the
    source. Raises as `edit` does.
    """
    model = find_model(model)
    not_distilled(model, "a source is traced")
    if isinstance(source, Path):
        source = Inversion.load(source)
    if flag("latents_only", latents_only) and dtype is not None:
        raise UsageError("dtype: of the queries and keys, none of which latents_only keeps; leave one of "
                         "them out")
    dtype = model.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:   # those that `Inversion.load` takes
        raise UsageError(f"dtype: {brief(dtype)} is none of the floating types "
                         f"{', '.join(map(str, FLOATS))}")
    if not isinstance(source, Inversion):
        check_prompt(source)
    known = ("steps", "guidance_scale", "seed", "x_T", "height", "width", "negative_prompt",
             "timestep_spacing", "timesteps")
    known = () if isinstance(source, Inversion) else known
    if unknown := [name for name in sampling if name not in known]:
        inverted = "the trace of an inverted source: it was inverted with its own"
        why = f"a trace; known: {', '.join(known)}" if known else inverted
        raise UsageError(f"{', '.join(unknown)}: no setting of {why}")
    flag("progress", progress)
    if isinstance(source, Inversion):
        if source.method not in FOLLOW:
            raise UsageError(f"an inversion by {source.method} is not traced: its source is sampled again "
                             f"in every edit; use {' or '.join(FOLLOW)}")
        source.check(model)
        if not latents_only:
            _afford(model, len(source.latents) - 1, dtype, source.latents.shape[2:])
        stored = {} if latents_only else _queries(model, source, dtype, progress)
        inversion = replace(source, rows=source.rows + (len(source.latents) - 1 if stored else 0))
    else:
        inversion, stored = _sampled(model, source, not latents_only, dtype, progress,
                                 Sampling(eta=0.0, sampler="ddim", **sampling))
    return replace(inversion, queries=stored or None)


def _sampled(model: Model, prompt: str, queries: bool, dtype: torch.dtype, progress: bool, sampling: Sampling
             ) -> tuple[Inversion, dict[str, Tensor]]:
    """The latents of a generated picture at every step as an inversion, and its queries and keys."""
    settled = settle(model, sampling, [sampling.seed], 1)
    start = begun(model, sampling, settled, 1)
    steps, batch = start.schedule.steps, Batch(1, 0, model.guided(start.guidance_scale))
    if queries:
        _afford(model, steps, dtype, start.x.shape[2:])
    check_negative(model, sampling.negative_prompt, start.guidance_scale, 1)
    empty = empty_prompts(model, None, batch.unconditional, start.size, sampling.negative_prompt)
    text = model.unet.with_guidance(condition(model, [prompt], *start.size), start.guidance_scale)
    loop = denoise(model, start.x, text, empty, start.schedule,
                   stepper_of(model, start), batch,
                   guidance_scale=start.guidance_scale, watch=_sites(model) if queries else ())
    path, rows, stored = [start.x], 0, {}
    for step in tqdm(loop, total=steps, disable=not progress, leave=False,
                     unit="step"):
        path.append(step.x)
        rows += batch.rows
        _keep(stored, step.index, steps, step.seen, dtype)
    notes = [*late_start(model, start.schedule, sampling),
             *prompt_notes(model, [prompt, *negatives(sampling.negative_prompt, 1)]),
             *sampling_idle(model, sampling, settled)]
    inversion = Inversion(prompt, "direct", torch.cat(path[::-1]).cpu(), steps, 0, start.guidance_scale, 1.0,
                      None, 0.0, int(sampling.seed), model.family, model.prediction, model.sha256, rows,
                      timestep_spacing=sampling.timestep_spacing,
                      timesteps=timestep_tuple(sampling.timesteps),
                      overrides=model.overrides, notes=tuple(dict.fromkeys(notes)),
                      negative_prompt=negatives(sampling.negative_prompt, 1)[0] or None)
    return inversion, stored


def _sites(model: Model) -> list[str]:
    return [layer.site for layer in model.unet.layers(Attention)]


def _keep(stored: dict[str, Tensor], i: int, steps: int, seen: dict[str, QK], dtype: torch.dtype) -> None:
    """Stores the queries and keys of the source's conditional row at step i; the first step allocates their
    tensors."""
    for site, qk in seen.items():
        for part, x in zip("qk", qk):
            name = f"{site}.{part}"
            if name not in stored:
                stored[name] = torch.empty(steps, *x.shape[1:], dtype=dtype)
            stored[name][i] = x[-1]


def _queries(model: Model, inversion: Inversion, dtype: torch.dtype, progress: bool) -> dict[str, Tensor]:
    """All queries and keys by site, from one row a step on the stored latents.

    -> (T, N, h d) each, noisiest first, CPU
    """
    pixels = tuple(side * model.shrink for side in inversion.latents.shape[2:])
    text = model.unet.with_guidance(condition(model, [inversion.prompt], *pixels), inversion.guidance_scale)
    text = model.read(text)
    stored, path = {}, inversion.latents.flip(0)
    schedule = schedule_of(model, inversion, inversion.latents.shape[2:]).after(inversion.skip)
    timesteps = asked(model, schedule, inversion).timesteps
    for i, t in enumerate(tqdm(timesteps, disable=not progress, leave=False,
                               unit="step")):
        seen = model.predict(path[i][None].to(model.device), t, text, watch=_sites(model))[2]
        _keep(stored, i, len(timesteps), seen, dtype)
    return stored

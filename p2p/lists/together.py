"""Edits of several sources in one batch: the rows of all sources, then those of all targets, each pointing
at its own source."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from p2p.blend import Blend
from p2p.denoise import Batch
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.conditioning import Conditioning
from p2p.request.memory import check_run
from p2p.request.ready import Ready, plan_by_site, prepared
from p2p.request.start import stepper_of
from p2p.run import Result, run


def edit_together(model: Model, jobs: Sequence[Mapping[str, Any]], *, progress: bool = False) -> list[Result]:
    """Runs several edits in one batch. A job is a mapping of arguments of `edit`: source and targets, seed,
    guidance_scale, eta, steps, height, width and the fields of `Edit` (for real pictures, editors and
    proximal guidance use `edit`). Steps, sizes, eta and the sites of blends must be the same in all. The
    pictures are those of `edit`, up to rounding. Raises UsageError.
    """
    if any("record" in job for job in jobs):
        raise UsageError("edits run together record no maps: use edit")
    return run_together(model, [prepared(model, **job) for job in jobs], progress=progress)


def run_together(model: Model, ready: Sequence[Ready], *, progress: bool = False) -> list[Result]:
    """Runs these in one batch, see `edit_together`.  -> one result each. Raises UsageError."""
    if any(r.settings["inversion"] or r.settings["editor"] or r.settings["proximal"]
           or r.start.low is not None for r in ready):
        raise UsageError("edits run together start from prompts, without editor or proximal guidance: use "
                         "edit")
    common = [{"timesteps": r.start.schedule.timesteps, "noise levels": r.start.schedule.levels,
               "sampler": r.start.sampler,
               "height, width": r.start.size, "eta": r.start.eta,
               "level and middle of blends": (r.blend.side, r.blend.sites)
               if r.blend and r.blend.sites else None}   # a mask alone has none
              for r in ready]
    for name in common[0] if common else ():
        values = {settings[name] for settings in common} - {None}
        if len(values) > 1:
            raise UsageError(f"edits run together need the same {name}, not "
                             f"{' and '.join(map(str, sorted(values)))}")
    if len({r.batch.guided for r in ready}) > 1:
        raise UsageError("edits with and without guidance cannot run together")
    if not ready:
        return []
    start, targets = ready[0].start, sum(len(r.prompts) - 1 for r in ready)
    rows = len(ready) + targets
    check_run(model, rows, tuple(start.x.shape[1:]), start.schedule.steps,
              rows=rows * (1 + ready[0].batch.guided), noises=rows * len(start.noise), targets=targets)
    return _parted(ready, run(model, _joined(model, ready), progress=progress))


def _joined(model: Model, ready: Sequence[Ready]) -> Ready:
    """One run with all rows: those of all sources, then those of all targets."""
    def ordered(parts: Sequence[Any]) -> list[Any]:
        return [p[:1] for p in parts] + [p[1:] for p in parts]

    start, targets = ready[0].start, [len(r.prompts) - 1 for r in ready]
    batch = Batch(len(ready), sum(targets), ready[0].batch.guided)
    x = torch.cat(ordered([r.start.x for r in ready]))
    noise = [torch.cat(ordered([z.expand(1 + count, -1, -1, -1) for z, count in zip(each, targets)]))
             for each in zip(*(r.start.noise for r in ready))]
    scales = torch.tensor([r.start.guidance_scale for r in ready], device=x.device)
    scales = torch.cat(ordered([s.expand(1 + count) for s, count in zip(scales, targets)])).view(-1, 1, 1, 1)
    sources = [j for j, n in enumerate(targets) for _ in range(n)]
    tables = [t for r in ready for t in r.tables]
    return Ready(
        list(chain(*ordered([r.prompts for r in ready]))), start._replace(x=x, noise=noise), batch,
        stepper_of(model, start._replace(noise=noise)),
        _conditioned([r.empty for r in ready], ordered) if batch.guided else None, {}, [],
        plan_by_site(model, tables, batch, sources), tables,
        _blends([r.blend for r in ready], targets), guidance_scale=scales)


def _conditioned(parts: Sequence[Conditioning], ordered: Callable[[list[Any]], list[Any]]) -> Conditioning:
    """The rows of all, in order."""
    return Conditioning._make(None if each[0] is None else torch.cat(ordered(each)) for each in zip(*parts))


def _blends(blends: Sequence[Blend | None], targets: Sequence[int]) -> Blend | None:
    template = max(filter(None, blends), key=lambda b: len(b.sites), default=None)
    if template is None:
        return None
    parts = [b or _no_blend(template, n) for b, n in zip(blends, targets)]
    columns = pad_sequence([row for b in parts for row in b.columns], batch_first=True)
    source_row = torch.cat([torch.full((n,), j, device=columns.device) for j, n in enumerate(targets)])
    joined = (torch.cat([getattr(b, name) for b in parts])
              for name in ("threshold", "start", "everywhere", "fixed", "sampled"))
    feather, reach = torch.cat([b.feather for b in parts]), max(b.reach for b in parts)
    return Blend(template.side, columns, *joined, source_row, feather, reach, template.sites)


def _no_blend(template: Blend, n: int) -> Blend:
    """n targets without a blend, of the shapes of another one."""
    device = template.source_row.device
    return Blend(template.side, template.columns.new_zeros(n, *template.columns.shape[1:]),
                 template.threshold.new_zeros(n, 2), template.start.new_zeros(n),
                 torch.ones(n, dtype=torch.bool, device=device),
                 torch.ones_like(template.fixed[:1]).expand(n, -1, -1, -1),
                 torch.zeros(n, dtype=torch.bool, device=device), template.source_row.new_zeros(n),
                 template.feather.new_zeros(n), 0, template.sites)


def _parted(ready: Sequence[Ready], joined: Result) -> list[Result]:
    targets = [len(r.prompts) - 1 for r in ready]
    firsts = [len(ready) + k for k in accumulate(targets, initial=0)]
    out = []
    for j, (r, n, first) in enumerate(zip(ready, targets, firsts)):
        rows = [j, *range(first, first + n)]
        masks = joined.masks[first - len(ready):][:n] if r.blend is not None else None
        out.append(Result([joined.images[i] for i in rows], joined.latents[rows], r.prompts, r.settings,
                          list(dict.fromkeys(r.notes)), masks=masks,
                          rows=r.batch.rows * r.start.schedule.steps, timings=joined.timings,
                          edits=list(r.edits)))
    return out

"""Edits of several sources in one batch: the rows of all sources, then those of all targets, each pointing at its own source."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from p2p.blend import Blend
from p2p.edits import agreed
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.attention import AttentionEdit, Record, same_tables
from p2p.run import Ready, Result, prepared, run
from p2p.sampler import guide


def edit_together(model: Model, jobs: Sequence[Mapping[str, Any]], *, progress: bool = False) -> list[Result]:
    """One result for each job, a mapping of the arguments of `edit`: source and targets, seed, guidance_scale, eta, steps, height,
    width and the fields of `Edit` (for real pictures, editors and proximal guidance use `edit`). Steps, sizes, eta and the
    level of blends must be the same in all. The pictures are those of `edit`, up to rounding. Raises UsageError.
    """
    if any("record" in job for job in jobs):
        raise UsageError("edits run together record no maps: use edit")
    return run_together(model, [prepared(model, **job) for job in jobs], progress=progress)


def run_together(model: Model, ready: Sequence[Ready], *, progress: bool = False) -> list[Result]:
    """The same of edits that are prepared."""
    if any(r.settings["inversion"] or r.settings["editor"] or r.settings["proximal"] or r.start.low is not None for r in ready):
        raise UsageError("edits run together start from prompts, without editor or proximal guidance: use edit")
    what = [{"steps": r.start.schedule.steps, "height, width": r.start.size, "eta": r.start.eta,
             "guidance_scale 1, or not": r.start.guidance_scale == 1,
             "level and middle of blends": (r.how["blend"].side, r.how["blend"].middle) if r.how["blend"] else None} for r in ready]
    for name in what[0] if what else ():
        found = {w[name] for w in what} - {None}
        if len(found) > 1:
            raise UsageError(f"edits run together need the same {name}, not {' and '.join(map(str, sorted(found)))}")
    return ready and _parted(ready, run(model, _joined(model, ready), Record(), progress))


def _joined(model: Model, ready: Sequence[Ready]) -> Ready:
    """One run of them all."""
    def ordered(parts: Sequence[Any]) -> list[Any]:
        return [p[:1] for p in parts] + [p[1:] for p in parts]

    start, targets = ready[0].start, [len(r.prompts) - 1 for r in ready]
    prompts, n = list(chain(*ordered([r.prompts for r in ready]))), len(ready) + sum(targets)
    x = torch.cat(ordered([r.start.x for r in ready]))
    noise = [torch.cat(ordered([z.expand(1 + count, -1, -1, -1) for z, count in zip(each, targets)]))
             for each in zip(*(r.start.noise for r in ready))]
    scales = torch.tensor([r.start.guidance_scale for r in ready], device=x.device)
    scales = torch.cat(ordered([s.expand(1 + count) for s, count in zip(scales, targets)])).view(-1, 1, 1, 1)
    guided = start.guidance_scale != 1
    how = dict(plan=_plans([r.how["plan"] for r in ready], n * (1 + guided)),
               blend=_blends([r.how["blend"] for r in ready], targets),
               guide=lambda uncond, cond, _: guide(uncond, cond, scales))
    null = model.null(n, *start.size) if guided else None
    return Ready(prompts, start._replace(x=x, noise=noise), null, {}, [], how)


def _plans(plans: Sequence[Sequence[AttentionEdit]], rows: int) -> list[AttentionEdit]:
    """Plans that were made for runs of their own, for a batch of so many rows that ends in all sources and all targets."""
    sizes = [len(plan[0].source) for plan in plans]
    first = rows - sum(sizes) - len(sizes)                                           # the row of the first source
    device = plans[0][0].source.device
    source = torch.cat([torch.full((n,), first + j, device=device) for j, n in enumerate(sizes)])
    own = torch.arange(rows - len(source), rows, device=device)
    out, last = [], ()
    for step in zip(*plans):
        if not last or not all(map(same_tables, step, last)):
            mix, keep = torch.cat([e.mix for e in step]), torch.cat([e.keep for e in step])
        last = step
        injected = torch.cat([e.self_source == e.source for e in step])
        renormalise = None
        if any(e.renormalise is not None for e in step):
            renormalise = torch.cat([torch.zeros_like(e.source, dtype=torch.bool) if e.renormalise is None else e.renormalise
                                     for e in step])
        out.append(AttentionEdit(source, mix, keep, torch.where(injected, source, own),
                                 torch.cat([e.self_max_tokens for e in step]), renormalise,
                                 only=agreed(e.only for e in step), injected=agreed(e.injected for e in step)))
    return out


def _blends(blends: Sequence[Blend | None], targets: Sequence[int]) -> Blend | None:
    given = next(filter(None, blends), None)
    if given is None:
        return None
    device, fixed = given.of.device, given.fixed[:1]
    parts = [b or Blend(given.side, given.columns.new_zeros(n, *given.columns.shape[1:]), given.threshold.new_zeros(n, 2),
                        given.start.new_zeros(n), torch.ones(n, dtype=torch.bool, device=device),
                        torch.ones_like(fixed).expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.bool, device=device),
                        given.of.new_zeros(n), given.middle) for b, n in zip(blends, targets)]
    columns = pad_sequence([row for b in parts for row in b.columns], batch_first=True)
    of = torch.cat([torch.full((n,), j, device=device) for j, n in enumerate(targets)])
    return Blend(given.side, columns, *(torch.cat([getattr(b, name) for b in parts])
                                        for name in ("threshold", "start", "everywhere", "fixed", "sampled")), of,
                 given.middle)


def _parted(ready: Sequence[Ready], whole: Result) -> list[Result]:
    targets = [len(r.prompts) - 1 for r in ready]
    firsts = [len(ready) + k for k in accumulate(targets, initial=0)]
    out = []
    for j, (r, n, first) in enumerate(zip(ready, targets, firsts)):
        rows = [j, *range(first, first + n)]
        masks = whole.masks[first - len(ready):][:n] if r.how["blend"] is not None else None
        halves = 1 if r.start.guidance_scale == 1 else 2
        out.append(Result([whole.images[i] for i in rows], whole.latents[rows], r.prompts, r.settings, list(dict.fromkeys(r.notes)),
                          masks=masks, rows=halves * len(rows) * r.start.schedule.steps, timings=whole.timings))
    return out

"""Algorithm 1 of the paper: source and targets denoised side by side, attention edited on the way."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2p.blend import Blend, local_blend, word_maps
from p2p.errors import NumericsError
from p2p.model import Model
from p2p.models.attention import QK, AttentionEdit, Edits
from p2p.models.conditioning import Conditioning
from p2p.request.checks import tensor
from p2p.request.schedules import Schedule
from p2p.sampler import Stepper, guide


class Batch(NamedTuple):
    """Which rows the network runs, in their order: those told the empty prompt, sources, targets;
    unconditional rows stand as their conditional ones do."""

    sources: int
    targets: int
    guided: bool = True          # guidance: each row has an unconditional one
    lone_source: bool = False    # ... but not the source
    absent: bool = False         # the source is not run: `AttentionEdit.cached` holds what is read of it

    @property
    def conditional(self) -> int:
        return self.sources * (not self.absent) + self.targets

    @property
    def unconditional(self) -> int:
        if not self.guided:
            return 0
        return self.targets if self.lone_source or self.absent else self.conditional

    @property
    def rows(self) -> int:
        return self.unconditional + self.conditional

    def source(self, j: int = 0) -> int:
        """The row of a source; of one that is not run, the first after the last."""
        return self.rows if self.absent else self.unconditional + j

    def shown(self, device: torch.device) -> Tensor:
        """(S + N,) long: the rows of all sources and targets, whose maps are looked at."""
        sources = [self.source(j) for j in range(self.sources)]
        return torch.tensor([*sources, *range(self.rows - self.targets, self.rows)], device=device)

    def spread(self, x: Tensor) -> Tensor:
        """x of the conditional rows, for all rows.  (conditional, ...) -> (rows, ...)"""
        return torch.cat([x[len(x) - self.unconditional:], x]) if self.unconditional else x

    def joined(self, out: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The network's output of all rows (rows, ...) -> that of the conditional ones (conditional, ...),
        joined with their unconditional ones where there are any."""
        if not self.unconditional:
            return out
        uncond, lone, cond = out.split([self.unconditional, self.conditional - self.unconditional,
                                        self.unconditional])
        return torch.cat([lone, join(uncond, cond)])


@dataclass
class Step:
    """What one step gave. Between steps, x may be changed."""

    index: int               # 0 .. T - 1
    t: int | float
    x: Tensor                # (S + N, C, H, W) after the step, in single precision, or an inversion's double
    x_0: Tensor              # (S + N, C, H, W), the predicted picture; (N, ...) where the source is not run
    seen: dict[str, QK]      # queries and keys of the sites that were watched: all rows of the batch
    edit: Any                # that acted, or None
    batch: Batch
    mask: Tensor | None      # (N, 1, H, W) bool: where targets may differ from the source, with `blend`
    maps: Any = None         # of `steps`: this step's AttentionMaps, where they were asked for

    def changed(self, before: Tensor) -> Tensor:
        """x, in the place of `before`. Raises UsageError for one that does not fit there."""
        return tensor("step.x", getattr(self, "x", None), *before.shape).detach().to(before)


class Known(NamedTuple):
    """What is known of the source, row 0, before it is edited. Noisiest first."""

    path: Tensor                    # (T + 1, C, H, W): its latents before the first step and after each
    follow: bool = False            # put row 0 on them after every step
    offsets: Tensor | None = None   # (T, C, H, W): added to every row after each step
    run: Sequence[bool] | None = None   # (T,), with `follow` alone: at which steps row 0 is run; None: all
    queries: Sequence[Mapping[str, QK]] | None = None   # (T), by site: q and k, for steps without row 0

    def absent(self, i: int) -> bool:
        return self.run is not None and not self.run[i]

    def with_queries(self, edit: Edits, i: int) -> Edits:
        """The edit of step i, with what is stored of the source."""
        if self.queries is None or edit is None:
            return edit
        if isinstance(edit, AttentionEdit):
            return edit._replace(cached=self.queries[i])
        return {site: each._replace(cached=self.queries[i]) for site, each in edit.items()}

    def corrected(self, x: Tensor, i: int, targets: int) -> Tensor:
        """x after step i, with the offsets that the inversion stored; with `follow` row 0 is set to its
        latents, whether it was run or not."""
        x = x if self.offsets is None else x + self.offsets[i]
        return torch.cat([self.path[i + 1][None], x[-targets:]]) if self.follow else x


class Inputs:
    """Timestep and conditioning of every step. The text is read once, until other rows or
    other texts follow."""

    def __init__(self, model: Model, prompts: Conditioning,
                 empty: Conditioning | Sequence[Conditioning] | None, timesteps: Sequence[float],
                 device: torch.device):
        self.model, self.prompts, self.empty = model, prompts, empty
        self.last: tuple[Batch, int] | None = None
        self.constant = empty is None or isinstance(empty, Conditioning)   # over the steps
        self.timesteps = torch.tensor(timesteps, device=device)            # no step waits for a copy

    def __call__(self, i: int, batch: Batch) -> tuple[Any, Conditioning]:
        """Timestep and conditioning of all rows."""
        if self.last != (now := (batch, 0 if self.constant else i)):
            conditioning = self.prompts.rows(batch.sources) if batch.absent else self.prompts
            if batch.unconditional:
                empty = self.empty
                assert empty is not None
                if not isinstance(empty, Conditioning):
                    empty = empty[i]
                empty = empty.rows(len(empty.context) - batch.unconditional)
                conditioning = Conditioning.cat([empty, conditioning])
            self.read, self.last = self.model.read(conditioning), now
            self.times = self.model.times(self.timesteps, self.read) if self.constant else self.timesteps
        return self.times[i], self.read


@torch.no_grad()
def denoise(model: Model, x: Tensor, prompts: Conditioning,
            empty: Conditioning | Sequence[Conditioning] | None, schedule: Schedule, step: Stepper,
            batch: Batch, *, guidance_scale: float | Tensor = 7.5, guide: Any = guide,
            plan: Sequence[AttentionEdit | Mapping[str, Any] | None] | None = None,
            watch: Collection[str] = (), blend: Blend | None = None,
            known: Known | None = None) -> Iterator[Step]:
    """Yields every step of x (S + N, C, H, W): the sources' rows and then the targets', see `Batch`.

    prompts: of these rows; empty: of the unconditional ones, the same at all steps or one for each. step: see
    `sampler.stepper`. batch: `known`, not its `absent`, says at which steps the source is not run. guide: how
    the two predictions join, by a scale for all rows or (rows, 1, 1, 1). plan: an AttentionEdit a step, or
    one by site. watch: sites whose queries and keys come back. blend: local edits, see `blend.prepare`.
    known: of a source computed before. Raises NumericsError where a step is not finite (on a GPU after the
    last step, for the first that was not).
    """
    inputs, check = Inputs(model, prompts, empty, schedule.timesteps, x.device), Finite(schedule, model)
    total: float | Tensor = 0.0
    mask, sites = None, {*watch, *(blend.sites if blend is not None else ())}
    for i, t in enumerate(schedule.timesteps):
        edit = plan[i] if plan else None
        if known is not None and known.absent(i):
            batch, x = batch._replace(absent=True), x[-batch.targets:]
            edit = known.with_queries(edit, i)
        else:
            batch = batch._replace(absent=False)
        t_in, text = inputs(i, batch)
        out, variance, seen = model.predict(batch.spread(x), t_in, text, edit, sites)   # lines 6 to 9
        out = batch.joined(out, lambda uncond, cond: guide(uncond, cond, guidance_scale))
        x, x_0 = step(i, x, out, None if variance is None else variance[-len(x):])
        x = x if known is None else known.corrected(x, i, batch.targets)
        check(i, x)
        if blend is not None:
            total = total + word_maps(model.unet, seen, edit, batch.shown(x.device), blend)
            x, mask = local_blend(x, total, blend, i, None if known is None else known.path[i + 1][None])
        made = Step(i, t, x, x_0, {site: seen[site] for site in watch}, edit, batch, mask)
        yield made
        x = made.changed(x)


class Finite:
    """Finds the first step that was not finite. A GPU would have to be waited for at every step: there all
    are looked at in the end."""

    def __init__(self, schedule: Schedule, model: Model):
        self.schedule, self.model = schedule, model
        self.found: list[Tensor] = []

    def __call__(self, i: int, x: Tensor) -> None:
        """Raises NumericsError."""
        self.found.append(x.isfinite().all())
        if not x.is_cpu and i + 1 < self.schedule.steps:
            return
        for j, fine in enumerate(torch.stack(self.found).tolist()):
            if not fine:
                raise NumericsError(f"sampling step {j + 1} of {self.schedule.steps} (t = "
                                    f"{self.schedule.timesteps[j]}) gave values that are not finite: "
                                    f"{too_large(self.model)}")


def too_large(model: Model) -> str:
    """What may have led out of the finite numbers."""
    if model.dtype == torch.float32:
        return "a weight, the guidance or the initial noise is too large"
    return f"the network runs in {model.dtype}: try float32"

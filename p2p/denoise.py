"""Algorithm 1 of the paper: source and targets denoised side by side, attention edited on the way."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from p2p.blend import Blend, local_blend, word_maps
from p2p.errors import NumericsError
from p2p.model import Conditioning, Model
from p2p.models.attention import QK, AttentionEdit, Record, same_tables
from p2p.models.blocks import Maps
from p2p.sampler import Schedule, belm_step, ddim_step, ddpm_step, guide, x0_and_eps


class Step(NamedTuple):
    index: int               # 0 .. N-1
    t: int
    x: Tensor                # (B, C, H, W) after the step, float32
    maps: Maps               # as recorded, by site: the B conditional rows, then with record.before the targets again
    mask: Tensor | None      # (N, 1, H, W) bool: where targets may differ from the source, with `blend`
    rows: int                # of the network in this step


class Known(NamedTuple):
    """What an inversion knows of the source, row 0. Noisiest first."""

    path: Tensor                    # (T + 1, C, H, W): its latents before the first step and after each
    follow: bool = False            # put row 0 on them after every step
    guided: bool = True             # row 0 is guided; if not, its unconditional row is not run
    offsets: Tensor | None = None   # (T, C, H, W): added to every row after each step
    before: Tensor | None = None    # (B, C, H, W): x one level above; the steps are then O-BELM's
    above: float = 0.0              # alphas_cumprod of that level
    run: Sequence[bool] | None = None   # (T), if it is followed: the steps in which row 0 is run; in the others nothing reads it
    queries: Sequence[Mapping[str, QK]] | None = None   # (T), by site: its q and k, for steps in which it is not run


def too_large(model: Model) -> str:
    """What may have led out of the finite numbers."""
    if model.dtype == torch.float32:
        return "a weight, the guidance or the initial noise is too large"
    return f"the network runs in {model.dtype}: try float32"


def _check(finite: list[Tensor], schedule: Schedule, model: Model) -> None:
    """Names the first of the steps so far that was not finite."""
    for i, fine in enumerate(torch.stack(finite).tolist()):
        if not fine:
            raise NumericsError(f"sampling step {i + 1} of {schedule.steps} (t = {schedule.timesteps[i]}) gave values that are not "
                                f"finite: {too_large(model)}")


@torch.no_grad()
def denoise(model: Model, x: Tensor, text: Conditioning, null: Conditioning | Sequence[Conditioning] | None, schedule: Schedule,
            *, guidance_scale: float = 7.5, guide: Callable[[Tensor, Tensor, float], Tensor] = guide,
            plan: Sequence[AttentionEdit | Mapping] | None = None, eta: float = 0.0, noise: Sequence[Tensor] | None = None,
            record: Record = Record(), blend: Blend | None = None, known: Known | None = None) -> Iterator[Step]:
    """Yields every step of the B rows of x (B, C, H, W); row 0 is the source, the targets follow.

    text: the prompts, B rows; null: the empty one, a row for each guided one, for all steps or step by step; at
    guidance_scale 1 only the prompts' rows are run. guide: how the two predictions join. plan: one AttentionEdit a step
    (or one by site), its row numbers counted in the network's batch, see `edit.plan`. blend: local edits, see
    `blend.prepare`; they restore the known latents where there are any. noise: with eta > 0 one tensor a step, shared by
    the rows. Raises NumericsError where a step is not finite.
    """
    guided = guidance_scale != 1.0
    constant = null is None or isinstance(null, Conditioning)                     # over the steps
    alone = 1 if known is not None and not known.guided else 0                    # row 0 has no unconditional row
    record = record._replace(exactly=blend.pixels if blend is not None else 0,
                             mean=record.mean or not (record.text or record.pixels))   # a blend reads the heads' mean alone
    of_pixels = model.unet.pixel_sites()
    seen, mask, above = 0.0, None, (known.before, known.above) if known is not None else (None, 0.0)
    edit, absent, finite = None, None, []
    times = torch.tensor(schedule.timesteps, device=x.device)                     # no number of a step is read back
    for i, (t, a_t, a_prev) in enumerate(schedule):
        edit, before = plan[i] if plan else None, edit
        absent, was = known is not None and known.run is not None and not known.run[i], absent
        anew = absent != was or not constant
        if anew:
            rows, empty = text, null if constant else null[i]
            if absent:
                rows, empty = text.rows(1), empty.rows(1) if guided and not alone else empty
            if guided:
                rows = Conditioning.cat([empty, rows])                            # R rows, the edited ones last
            rows = model.read(rows)
            at = model.times(times, rows) if constant else times
        x, single = (x[1:], 0) if absent else (x, alone)
        x_in = torch.cat([x[single:], x]) if guided else x                        # (R, C, H, W)
        if anew or not same_tables(edit, before):
            told = model.under(rows, edit)
        if absent and edit is not None:
            edit = edit._replace(cached=known.queries[i])
        of_prompts = record._replace(rows=len(x))
        out, variance, maps = model.predict(x_in, at[i], told, edit, of_prompts)     # lines 6 to 8 in one pass
        uncond, out = out[:-len(x)], out[-len(x):]
        if guided:
            out = torch.cat([out[:single], guide(uncond, out[single:], guidance_scale)])
        x_0, eps = x0_and_eps(x, out, a_t, model.prediction, model.clip if above[0] is None else None)
        if variance is not None and eta == 1:
            x = ddpm_step(x, x_0, a_t, a_prev, noise[i], variance[-len(x):])       # that of the prompts' rows
        elif above[0] is None:
            x = ddim_step(x_0, eps, a_t, a_prev, eta, noise[i] if noise is not None else None)   # line 9
        else:
            x, above = belm_step(above[0], x, eps, above[1], a_t, a_prev), (x, a_t)
        if known is not None and known.offsets is not None:
            x = x + known.offsets[i]
        if known is not None and known.follow:
            x = torch.cat([known.path[i + 1][None], x if absent else x[1:]])
        finite.append(x.isfinite().all())
        if x.is_cpu or i + 1 == schedule.steps:                                   # a GPU would have to be waited for
            _check(finite, schedule, model)
        if blend is not None:
            seen = seen + word_maps({site: m[:len(x)] for site, m in maps.items() if site not in of_pixels}, blend)
            maps = {site: m for site, m in maps.items() if site in of_pixels or m.shape[2] <= record.text}   # not the blend's
            x, mask = local_blend(x, seen, blend, i, None if known is None else known.path[i + 1][None])
        yield Step(i, t, x, maps, mask, len(x_in))

"""Algorithm 1 of the paper: source and targets denoised side by side, attention edited on the way."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention import AttentionEdit, Record
from p2p.blend import Blend, local_blend, word_maps
from p2p.errors import NumericsError
from p2p.model import Conditioning, Model
from p2p.sampler import ddim_step, guide, x0_and_eps
from p2p.schedule import Schedule


class Step(NamedTuple):
    index: int               # 0 .. N-1
    t: int
    x: Tensor                # (B, C, H, W) after the step, float32
    maps: dict[str, Tensor]  # as recorded, by site: the B conditional rows, then with record.before the targets again
    mask: Tensor | None      # (N, 1, H, W) bool: where targets may differ from the source, with `blend`


@torch.no_grad()
def denoise(model: Model, x: Tensor, text: Conditioning, null: Conditioning | None, schedule: Schedule, *,
            guidance_scale: float = 7.5, plan: Sequence[AttentionEdit] | None = None, eta: float = 0.0,
            noise: Sequence[Tensor] | None = None, record: Record = Record(),
            blend: Blend | None = None) -> Iterator[Step]:
    """Yields every step of the B rows of x (B, C, H, W); row 0 is the source, the targets follow.

    text, null: the prompts and the empty one, B rows each; at guidance_scale 1 only the prompts' rows are run.
    plan: one AttentionEdit a step, its row numbers counted in the network's batch, see `edit.plan`.
    blend: local edits, see `blend.prepare`; noise: with eta > 0 one tensor a step, shared by the rows. Raises
    NumericsError where a step is not finite.
    """
    guided = guidance_scale != 1.0
    rows = Conditioning.cat([null, text]) if guided else text                     # R rows, the edited ones last
    if blend is not None:
        record = record._replace(text=max(record.text, blend.pixels))
    seen, mask = 0.0, None
    for i, (t, a_t, a_prev) in enumerate(schedule):
        x_in = torch.cat([x, x]) if guided else x                                 # (R, C, H, W)
        out, maps = model.unet(x_in.to(model.dtype), t, rows.context, edit=plan[i] if plan else None, record=record,
                               vector=rows.vector)
        out = out.float()                                                         # lines 6 to 8 in one pass
        if guided:
            out = guide(*out.chunk(2), guidance_scale)
        x_0, eps = x0_and_eps(x, out, a_t, model.prediction, model.clip)
        x = ddim_step(x_0, eps, a_t, a_prev, eta, noise[i] if noise is not None else None)   # line 9
        if not x.isfinite().all():
            raise NumericsError(f"sampling step {i + 1} of {schedule.steps} (t = {t}) gave values that are not finite; "
                                f"the network runs in {model.dtype}: try float32")
        maps = {site: m[len(x):] if guided else m for site, m in maps.items()}    # conditional rows
        if blend is not None:
            seen = seen + word_maps({site: m[:len(x)] for site, m in maps.items()}, blend)
            x, mask = local_blend(x, seen, blend, i)
        yield Step(i, t, x, maps, mask)

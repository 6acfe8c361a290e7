"""Large pictures in squares: bounded memory at any size."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(f: Callable[[Tensor], Tensor], x: Tensor, tile: int, scale: int) -> Tensor:
    """f, which enlarges `scale` times, on overlapping squares of x (B, C, H, W); where they overlap, the mean
    weighs each by the distance from its edge.  -> (B, C', scale H, scale W)"""
    def starts(n: int) -> list[int]:
        return [*range(0, max(1, n - tile), tile - tile // 4), max(0, n - tile)]

    def ramp(n: int) -> Tensor:
        i = torch.arange(n, device=x.device) + 0.5
        return torch.minimum(i, n - i)

    total = weights_ = torch.zeros(())   # made with the first square
    for top in dict.fromkeys(starts(x.shape[2])):
        for left in dict.fromkeys(starts(x.shape[3])):
            part = f(x[:, :, top:top + tile, left:left + tile]).float()
            if not total.ndim:
                total = part.new_zeros(*part.shape[:2], scale * x.shape[2], scale * x.shape[3])
                weights_ = torch.zeros_like(total[:1, :1])
            h, w = part.shape[2:]
            weight = ramp(h)[:, None] * ramp(w)
            at = (..., slice(scale * top, scale * top + h), slice(scale * left, scale * left + w))
            total[at] += part * weight
            weights_[at] += weight
    return total / weights_

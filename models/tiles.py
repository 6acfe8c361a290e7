"""Large pictures in tiles: bounded memory at any size."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(f: Callable[[Tensor], Tensor], x: Tensor, tile: int, scale: int) -> Tensor:
    """Applies f, which enlarges `scale` times, to overlapping squares of x (B, C, H, W); where they overlap,
    their mean, weighted by the distance from each edge.  -> (B, C', scale H, scale W)"""
    def starts(n: int) -> list[int]:
        return [*range(0, max(1, n - tile), tile - tile // 4), max(0, n - tile)]

    def ramp(n: int) -> Tensor:
        i = torch.arange(n, device=x.device) + 0.5
        return torch.minimum(i, n - i)

    total = weights = torch.zeros(())   # allocated with the first square
    for top in dict.fromkeys(starts(x.shape[2])):
        for left in dict.fromkeys(starts(x.shape[3])):
            part = f(x[:, :, top:top + tile, left:left + tile]).float()
            if not total.ndim:
                total = part.new_zeros(*part.shape[:2], scale * x.shape[2], scale * x.shape[3])
                weights = torch.zeros_like(total[:1, :1])
            h, w = part.shape[2:]
            weight = ramp(h)[:, None] * ramp(w)
            window = (..., slice(scale * top, scale * top + h), slice(scale * left, scale * left + w))
            total[window] += part * weight
            weights[window] += weight
    return total / weights

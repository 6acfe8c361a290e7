"""Masks as users give them: pictures and tensors, bright where an edit may act."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from p2p.errors import UsageError
from p2p.image import PIXELS, as_picture, brightness, to_base64
from p2p.image import fit as fit_picture
from p2p.request.checks import unreadable


def fixed(mask: Image.Image | str | Path | Tensor | None, size: tuple[int, int], fit: str = "crop") -> Tensor:
    """(1, H, W) bool at the latents' size; a position counts if half of it is bright.
    fit: "crop" or "pad", see `image.fit`."""
    if mask is None:
        return torch.ones(1, *size, dtype=torch.bool)
    check_mask(mask)
    if not isinstance(mask, Tensor):
        mask = brightness(as_picture(mask))
        grey = fit_picture(mask, size, fit, Image.Resampling.BOX).convert("L")
        return torch.from_numpy(np.array(grey))[None] > 127
    return F.interpolate(mask.float().cpu()[None, None], size=size, mode="area")[0] >= 0.5


def picture_of(mask: Image.Image | str | Path | Tensor | None) -> str | None:
    """A mask as a grey picture in base64, for JSON."""
    if mask is None:
        return None
    return to_base64(brightness(as_picture(mask)) if not isinstance(mask, Tensor) else
                     Image.fromarray((mask.float() * 255).round().byte().cpu().numpy()))


def check_mask(mask: Any) -> None:
    """Raises UsageError."""
    if not isinstance(mask, Tensor):
        as_picture(mask, "local_blend: a mask is a picture or a (H, W) tensor; mask")
    elif why := unreadable(mask):
        raise UsageError(f"local_blend: a mask is a picture or a (H, W) tensor, not one of {mask.dtype} "
                         f"({why})")
    elif mask.numel() > PIXELS:
        raise UsageError(f"local_blend: a mask of {tuple(mask.shape)} has more than {PIXELS:,} positions; "
                         "make it smaller")
    elif mask.ndim != 2 or not mask.numel():
        raise UsageError(f"local_blend: a mask is a picture or a (H, W) tensor, not {mask.dtype} "
                         f"{tuple(mask.shape)}")
    elif not (mask >= 0).all() or not (mask <= 1).all():
        raise UsageError(f"local_blend: a mask tensor holds values from 0 to 1, not {mask.min().item():g} to "
                         f"{mask.max().item():g}")

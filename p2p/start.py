"""Where a run begins: noise, timesteps and sizes, checked."""
from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from p2p.errors import UsageError
from p2p.model import Model
from p2p.schedule import Schedule

UPSCALING = 4   # of a super-resolution stage, per side


class Low(NamedTuple):
    """What a super-resolution stage enlarges."""

    pictures: Tensor             # (B, 3, h, w) in [-1, 1], one a prompt
    noise_level: int             # timestep of the noise that is put on them first


def draw(shape: Sequence[int], seeds: Sequence[int], count: int) -> list[Tensor]:
    """Standard normal noise (len(seeds), *shape) `count` times: float32 on the CPU, one generator a seed, so that
    neither device nor batch changes a picture."""
    for seed in seeds:
        if not isinstance(seed, Integral) or isinstance(seed, bool) or not -2**63 <= seed < 2**64:
            raise UsageError(f"a seed is a whole number from -2^63 to 2^64 - 1, not {seed!r}")
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
    return [torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]) for _ in range(count)]


class Start(NamedTuple):
    """Where a run begins, checked."""

    x: Tensor                   # (B, C, H, W), float32
    noise: list[Tensor]         # one a step, if eta > 0
    schedule: Schedule
    guidance_scale: float
    eta: float
    size: tuple[int, int]       # height, width in pixels
    low: Tensor | None = None   # (B, 3, height, width): enlarged and noised, for super-resolution
    level: Tensor | None = None # (B,)


def check_latents(name: str, x: Tensor, rows: tuple[int, ...], model: Model) -> None:
    """Raises UsageError unless x is a tensor (one of `rows`, C, H, W) that the model takes."""
    channels = model.unet.config.in_channels
    expected = f"expected ({' or '.join(str(n) for n in dict.fromkeys(rows))}, {channels}, height, width)"
    if not isinstance(x, Tensor):
        raise UsageError(f"{name}: {type(x).__name__} given; a tensor is {expected}")
    if x.ndim != 4 or x.shape[0] not in rows or x.shape[1] != channels:
        raise UsageError(f"{name} {'have' if name.endswith('s') else 'has'} the shape {tuple(x.shape)}; {expected}")
    model.latent_shape(x.shape[2] * model.shrink, x.shape[3] * model.shrink)


def guidance(model: Model, asked: float | None) -> float:
    """None: the model's own. 0 is the prompt alone, as 1 is and as everywhere else; by the formula it would be no prompt."""
    return model.guidance_scale if asked is None else 1.0 if asked == 0 else asked


def begin(model: Model, seeds: list[int], n: int, x_T: Tensor | None, steps: int, guidance_scale: float | None, eta: float | None,
          height: int | None, width: int | None, low: Low | None = None) -> Start:
    guidance_scale = guidance(model, guidance_scale)
    eta = model.eta if eta is None else eta
    if bool(model.unet.config.low_channels) != (low is not None):
        raise UsageError(f"{model.name} is {'no' if low else 'a'} super-resolution stage: "
                         + ("it takes prompts alone" if low else "it enlarges the pictures of another model, see `upscale`"))
    if not isinstance(steps, Integral) or steps < 1:
        raise UsageError(f"steps must be a whole number from 1, not {steps!r}")
    if not isinstance(guidance_scale, Real) or not abs(guidance_scale) < float("inf"):
        raise UsageError(f"guidance_scale must be a finite number, not {guidance_scale!r}")
    if not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise UsageError(f"eta must lie within 0 and 1, not {eta!r}")
    if low is not None:
        if len(low.pictures) != n or not 0 <= low.noise_level < len(model.alphas_cumprod):
            raise UsageError(f"{len(low.pictures)} pictures to enlarge and {n} prompts; noise_level {low.noise_level} (from 0 to "
                             f"{len(model.alphas_cumprod) - 1})")
        height, width = (UPSCALING * side for side in low.pictures.shape[2:])
    shape = model.latent_shape(height, width)
    if x_T is not None:
        check_latents("x_T", x_T, (1, n), model)
    count = 1 + (steps if eta else 0)
    drawn = draw(shape if x_T is None else x_T.shape[1:], seeds, count + (low is not None))
    noise = [z.to(model.device) for z in drawn]
    x = noise[0] if x_T is None else x_T.to(model.device, torch.float32)
    start = Start(x.expand(n, -1, -1, -1), noise[1:count], model.schedule(steps), guidance_scale, eta,   # same noise in all
                  (x.shape[2] * model.shrink, x.shape[3] * model.shrink))                            # (Algorithm 1, line 4)
    return start if low is None else start._replace(**_conditioned(model, low, noise[-1]))


def _conditioned(model: Model, low: Low, noise: Tensor) -> dict[str, Tensor]:
    """The pictures at full size, with noise of their level (Saharia et al. 2022, section 2.4): neither x_T's nor a step's."""
    pictures = low.pictures.to(model.device, torch.float32)
    size = [UPSCALING * side for side in pictures.shape[2:]]
    large = F.interpolate(pictures, size, mode="bilinear", align_corners=model.align_corners)
    a = float(model.alphas_cumprod[low.noise_level])
    level = torch.full((len(large),), low.noise_level, device=model.device)
    return {"low": a**0.5 * large + (1 - a) ** 0.5 * noise, "level": level}

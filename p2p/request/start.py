"""Where a run begins: noise, timesteps and sizes, checked."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from p2p.errors import UsageError
from p2p.image import FITS, as_picture, own_size
from p2p.model import Model
from p2p.request.checks import choice, finite, share, unreadable, whole
from p2p.request.loading import check_alone
from p2p.request.memory import check_run
from p2p.request.record import Record
from p2p.request.schedules import DISTILLED, SAMPLERS, Level, Schedule, check_schedule
from p2p.sampler import Stepper, stepper
from p2p.weights.few_steps import FEW
from p2p.weights.untrusted import brief

UPSCALING = 4   # of a super-resolution stage, per side


class Low(NamedTuple):
    """What a super-resolution stage enlarges."""

    pictures: Tensor             # (B, 3, h, w) in [-1, 1], one a prompt
    noise_level: int             # timestep of the noise that is put on them first


def check_seed(seed: object) -> int:
    """Raises UsageError."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -2**63 <= seed < 2**64:
        raise UsageError(f"a seed is a whole number from -2^63 to 2^64 - 1, not {brief(seed)}")
    return int(seed)


def draw(shape: Sequence[int], seeds: Sequence[int], count: int) -> list[Tensor]:
    """Standard normal noise (len(seeds), *shape) `count` times: float32 on the CPU, one generator a seed, so
    that neither device nor batch changes a picture."""
    seeds = [check_seed(seed) for seed in seeds]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return [torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]) for _ in range(count)]


@dataclass(frozen=True)
class Sampling:
    """How a run samples. None stands for the model's default, or for that of an inversion.

    steps: the model's own (50; Stable Diffusion 3 Medium 28, 3.5 Large 40; of few steps, as its file says),
    unless the source has them. guidance_scale: 7.5 for Stable Diffusion; at 1 (or 0) only the prompts are
    run. seed: of the initial noise, shared by all rows, unless x_T (1 or B, C, H, W) is given. eta: 0 for
    DDIM, 1 for DDPM; the step noise is shared too ("tcd": 0.3; "dpm++" and "lcm" have their own). height,
    width: of the pictures in pixels. sampler: "ddim", "dpm++" (2M), "lcm" or "tcd". timestep_spacing:
    "leading", "trailing" or "linspace", and of "dpm++" also "karras"; timesteps: falling, in place of evenly
    spaced ones. proximal: guidance along the large differences only, (norm, quantile), see
    `sampler.proximal_guide`. negative_prompt: what guidance leads away from, in place of the empty prompt:
    for all rows, or a list of one for each, the source first. low: what a super-resolution stage enlarges,
    see `upscale`.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | Sequence[int] = 0
    x_T: Tensor | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    sampler: str | None = None
    timestep_spacing: str | None = None
    timesteps: Sequence[int] | None = None
    proximal: tuple[str, float] | None = None
    negative_prompt: str | Sequence[str] | None = None
    low: Low | None = None


class Start(NamedTuple):
    """Where a run begins, checked."""

    x: Tensor                   # (B, C, H, W), float32; float64 where the latents given were
    noise: list[Tensor]         # one a step, (1 or B, C, H, W), if eta > 0
    schedule: Schedule          # an entry for each call of the network, of which some solvers need several
    guidance_scale: float
    eta: float
    sampler: str
    size: tuple[int, int]       # height, width in pixels
    low: Tensor | None = None   # (B, 3, height, width): enlarged and noised, for super-resolution
    level: Tensor | None = None # (B,): timesteps of the noise on low


def fitting(model: Model, picture: Image.Image | str | Path, fit: str, height: int | None = None,
            width: int | None = None, instead: str = "") -> tuple[Image.Image, tuple[int, int], list[str]]:
    """A picture upright, the size (height, width) to which `image.fit` brings it, and a note
    on what that crops, and what to do `instead`.

    fit: "crop" or "pad" to height x width (None: the model's), see `image.fit`; "own": to about as many
    pixels as the model's own size has, in the picture's own shape. Raises UsageError.
    """
    choice("fit", fit, FITS)
    picture = as_picture(picture)
    if fit == "own":
        if height is not None or width is not None:
            raise UsageError('height, width: fit "own" takes those of the picture; leave these out, or '
                             'choose "crop" or "pad"')
        height, width = own_size(picture, model.size, model.unit, model.largest)
    _, *size = model.latent_shape(height, width)
    height, width = (side * model.shrink for side in size)
    shares = picture.height / height, picture.width / width
    notes = []
    if fit != "pad" and min(shares) < 0.99 * max(shares):   # a pixel or two is nobody's loss
        seen = [round(side * min(shares)) for side in (width, height)]
        keeps = '--pad (fit="pad") keeps all of it' + ("" if fit == "own" else ", --fit own its shape")
        notes.append(f"the picture's {picture.width} x {picture.height} is cropped to the {seen[0]} x "
                     f"{seen[1]} around its centre, for the model's {width} x {height}: {instead or keeps}")
    return picture, (height, width), notes


def late_start(model: Model, schedule: Schedule, sampling: Sampling = Sampling()) -> list[str]:
    """A note where the first step lies far below the noisiest level: it reads pure noise as a picture of its
    own level, and an inversion ends there."""
    total, first, steps = len(model.alphas_cumprod) or 1000, schedule.timesteps[0], schedule.steps
    if first >= 0.9 * total:
        return []
    if sampling.timesteps is not None:
        return [f"the first timestep is {first:g} of {total}: pure noise is taken for a picture of that "
                "level"]
    near = sorted((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - steps))

    def reaches(n: int) -> bool:
        with suppress(UsageError):   # more steps than the sampler has timesteps
            how = sampling.sampler or model.sampler, sampling.timestep_spacing
            return model.schedule(n, *how).timesteps[0] >= 0.9 * total
        return False

    better = next(filter(reaches, near), None)
    return [f"{steps} steps start at t = {first} of {total}: counted from the clean end, they do not "
            f"reach the noisiest {(total - first) / total:.0%}" + (f"; {better} do" if better else "")]


def check_latents(name: str, x: Tensor, rows: tuple[int, ...], model: Model) -> None:
    """Raises UsageError unless x is a tensor (one of `rows`, C, H, W) that the model takes. Of planned
    inversions it has no values yet (on torch's "meta" device), see `check_values`."""
    channels = model.unet.config.in_channels
    expected = f"expected ({' or '.join(str(n) for n in dict.fromkeys(rows))}, {channels}, height, width)"
    if not isinstance(x, Tensor):
        raise UsageError(f"{name}: {type(x).__name__} given; a tensor is {expected}")
    if (why := unreadable(x)) and not x.is_meta:
        raise UsageError(f"{name}: {x.dtype} ({why}) given; real and dense numbers are {expected}")
    if x.ndim != 4 or x.shape[0] not in rows or x.shape[1] != channels:
        raise UsageError(f"{name} {'have' if name.endswith('s') else 'has'} the shape {tuple(x.shape)}; "
                         f"{expected}")
    model.latent_shape(x.shape[2] * model.shrink, x.shape[3] * model.shrink)


def check_values(name: str, x: Tensor) -> Tensor:
    """The tensor. Raises UsageError for one without values."""
    if x.is_meta:
        raise UsageError(f"{name}: a tensor on meta, without values")
    return x


def guidance(model: Model, scale: float | None) -> float:
    """The guidance scale, or the model's default where None. 0 means no guidance, as 1 does and as in other
    programs; by the formula it would mean no prompt."""
    return model.guidance_scale if scale is None else finite("guidance_scale", scale) or 1.0


def own_sampler(model: Model) -> str:
    """The sampler of an inversion and of its edits: DDIM, or the one that a model was distilled for (inverted
    by ddcm alone)."""
    return model.sampler if model.sampler in DISTILLED else "ddim"


def not_distilled(model: Model, what: str, instead: str = "") -> None:
    """Raises UsageError for a model that other steps than DDIM's were distilled into. instead: what else
    takes them."""
    if model.sampler in DISTILLED:
        raise UsageError(f"{what} in small steps, and {model.name} was distilled for those of "
                         f"{model.sampler}: use {instead}the model that it was made from")


class Settled(NamedTuple):
    """The part of a run that is decided before any noise is drawn."""

    schedule: Schedule
    guidance_scale: float
    eta: float
    sampler: str
    shape: tuple[int, int, int]   # of the latents, (C, H, W)
    seeds: list[int]


def settle(model: Model, sampling: Sampling, seeds: Sequence[object], n: int, *, targets: int = 0,
           record: Record = Record(), rows: int | None = None, calls: int | None = None) -> Settled:
    """Checks the sampling of n prompts, `targets` of them edits. seeds: one for all, or one for each. rows:
    of the network, None for each prompt's own; calls: of the network, None for one a step. Raises UsageError,
    also for a run that needs more memory than the machine has: nothing is allocated here."""
    guidance_scale = guidance(model, sampling.guidance_scale)
    sampler, steps, eta = solver(model, sampling)
    if sampling.low is None:
        check_alone(model)
    elif not model.unet.enlarges:
        raise UsageError(f"{model.name} is no super-resolution stage: it takes prompts alone")
    shape = model.latent_shape(*_sides(model, sampling, n))
    schedule = model.schedule(steps, sampler, sampling.timestep_spacing, sampling.timesteps, eta, shape[1:])
    drawn = [check_seed(seed) for seed in seeds]
    check_run(model, n, shape, steps if calls is None else calls, targets=targets, record=record,
              rows=n * (1 + model.guided(guidance_scale)) if rows is None else rows,
              noises=len(drawn) * (1 + (steps if eta else 0) + (sampling.low is not None)))
    return Settled(schedule, guidance_scale, eta, sampler, shape, drawn)


def solver(model: Model, sampling: Sampling) -> tuple[str, int, float]:
    """The sampler, the number of steps and eta of a run. Raises UsageError for those that do not go
    together."""
    sampler = model.sampler if sampling.sampler is None else choice("sampler", sampling.sampler, SAMPLERS)
    usual = {"ddim": model.eta, "dpm++": 0.0, "lcm": 1.0, "tcd": 0.3}[sampler]
    eta = share("eta", usual if sampling.eta is None else sampling.eta)
    if sampler in ("dpm++", "lcm") and eta != usual:
        noise = "adds no noise" if sampler == "dpm++" else "draws all of its noise anew"
        raise UsageError(f"eta {eta:g}: {sampler} {noise}; leave eta out, or sample by ddim or tcd")
    spacing, timesteps = sampling.timestep_spacing, sampling.timesteps
    check_schedule(sampler, spacing, timesteps)
    if spacing is not None and (timesteps is not None or sampler in DISTILLED):
        why = "timesteps are given one by one" if timesteps is not None else \
            f"{sampler} visits the timesteps that its model was distilled at"
        raise UsageError(f"timestep_spacing: {why}; leave it out")
    usual_steps = model.steps if sampler == model.sampler or sampler not in DISTILLED else FEW
    if timesteps is None:
        return sampler, whole("steps", usual_steps if sampling.steps is None else sampling.steps), eta
    if sampling.steps not in (None, len(timesteps)):
        raise UsageError(f"steps: {len(timesteps)} timesteps are given, not {sampling.steps}; leave steps "
                         "out")
    return sampler, whole("the number of timesteps", len(timesteps)), eta


def stepper_of(model: Model, start: Start, before: tuple[Tensor, Level] | None = None) -> Stepper:
    """The step function of a run, see `sampler.stepper`."""
    return stepper(start.schedule, model.prediction, model.clip, start.eta, start.noise, before,
                   start.sampler)


def begun(model: Model, sampling: Sampling, settled: Settled, n: int) -> Start:
    """Draws the noise of n rows whose sampling was checked by `settle`."""
    low, x_T = sampling.low, sampling.x_T
    schedule, guidance_scale, eta, sampler, shape, seeds = settled
    count = 1 + (schedule.steps if eta else 0)
    noise = [z.to(model.device) for z in draw(shape, seeds, count + (low is not None))]
    x = noise[0] if x_T is None else check_values("x_T", x_T).to(model.device, torch.float32)
    # the same noise in all rows
    start = Start(x.expand(n, -1, -1, -1), noise[1:count], schedule, guidance_scale, eta, sampler,
                  (x.shape[2] * model.shrink, x.shape[3] * model.shrink))
    return start if low is None else start._replace(**_conditioned(model, low, noise[-1]))


def _sides(model: Model, sampling: Sampling, n: int) -> tuple[int | None, int | None]:
    """Height and width in pixels: as requested, or those of the tensors that the run starts from. Raises
    UsageError."""
    derived: tuple[int, ...] = ()   # from x_T or the small pictures
    if sampling.low is not None:
        _check_low(sampling.low, n, model)
        derived = tuple(UPSCALING * side for side in sampling.low.pictures.shape[2:])
    if sampling.x_T is not None:
        check_latents("x_T", sampling.x_T, (1, n), model)
        derived = tuple(model.shrink * side for side in sampling.x_T.shape[2:])
    requested = sampling.height, sampling.width
    for name, value, side in zip(("height", "width"), requested, derived):
        if value is not None and whole(name, value) != side:
            raise UsageError(f"{name}: {value} asked for, and what the run starts from makes it {side}; "
                             "leave it out")
    return derived or requested   # type: ignore[return-value]


def _check_low(low: Low, n: int, model: Model) -> None:
    """Raises UsageError."""
    if not isinstance(low, Low):
        raise UsageError(f"low: a Low is needed, see `upscale`, not {brief(low)}")
    whole("noise_level", low.noise_level, least=0, most=len(model.alphas_cumprod) - 1)
    x: Any = low.pictures
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[:2] != (n, 3) or x.ndim != 4:
        raise UsageError(f"low: the pictures to enlarge are ({n}, 3, height, width), one a prompt, not "
                         f"{brief(getattr(x, 'shape', x))}")


def _conditioned(model: Model, low: Low, noise: Tensor) -> dict[str, Tensor]:
    """Conditioning on the pictures, enlarged to full size and noised to their level (Saharia et al. 2022,
    section 2.4). noise: drawn apart from x_T's and the steps'."""
    pictures = low.pictures.to(model.device, torch.float32)
    size = [UPSCALING * side for side in pictures.shape[2:]]
    large = F.interpolate(pictures, size, mode="bilinear", align_corners=model.align_corners)
    a = float(model.alphas_cumprod[low.noise_level])
    level = torch.full((len(large),), low.noise_level, device=model.device)
    return {"low": a**0.5 * large + (1 - a) ** 0.5 * noise, "level": level}

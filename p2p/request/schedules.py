"""Which timesteps a run visits, by name of the spacing or one by one; float64 numbers of no device."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from p2p.errors import UsageError
from p2p.request.checks import choice
from p2p.weights.scheduler import Flow
from p2p.weights.untrusted import brief

SAMPLERS = ("ddim", "dpm++", "lcm", "tcd")
SPACINGS = ("leading", "trailing", "linspace", "karras")
DISTILLED = ("lcm", "tcd")   # they visit timesteps that their models were distilled at


class Level(NamedTuple):
    """What x holds of picture and noise: x = alpha x_0 + sigma eps."""

    alpha: float
    sigma: float

    @staticmethod
    def of(alphas_cumprod: float) -> Level:
        """The level of DDPM and DDIM, whose squares sum to 1."""
        return Level(alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5)

    @staticmethod
    def at(share: float, flow: bool) -> Level:
        """The level with that share of noise, of a flow or of DDPM."""
        size = 1.0 if flow else math.hypot(1 - share, share)
        return Level((1 - share) / size, share / size)

    @property
    def scale(self) -> float:
        """x over it is a flow's x: picture and noise in shares that sum to 1."""
        return self.alpha + self.sigma

    @property
    def share(self) -> float:
        """Of noise: the time t of a flow, from 0 for the picture to 1 for noise."""
        return self.sigma / self.scale


@dataclass(frozen=True)
class Schedule:
    """N steps from noise to picture. Iterating gives (t, level, next level)."""

    timesteps: tuple[int, ...] | tuple[float, ...]   # falling
    levels: tuple[Level, ...]    # N + 1: of each timestep, then of the end
    lower: tuple[Level, ...] = ()   # of TCD (N): to which a step goes before noise is added

    def __iter__(self) -> Iterator[tuple[int | float, Level, Level]]:
        return iter(list(zip(self.timesteps, self.levels, self.levels[1:])))

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def after(self, n: int) -> Schedule:
        """The steps that follow the first n."""
        return Schedule(self.timesteps[n:], self.levels[n:], self.lower[n:])

    def ending(self, final_alpha: float | None) -> Schedule:
        """These steps, the last one ending at that alphas_cumprod; None: unchanged. Raises UsageError."""
        if final_alpha is None:
            return self
        last = self.levels[-2]
        if final_alpha < last.alpha**2 / (last.alpha**2 + last.sigma**2):
            raise UsageError(f"final_alpha {float(final_alpha):g}: the picture holds more noise than the "
                             f"last timestep's level, {last.alpha**2:g}; give at least that")
        return replace(self, levels=(*self.levels[:-1], Level.of(final_alpha)))


def check_schedule(sampler: object, spacing: object, timesteps: object) -> None:
    """Raises UsageError for what is of the wrong kind."""
    choice("sampler", sampler, SAMPLERS)
    if spacing is not None:
        choice("timestep_spacing", spacing, SPACINGS)
    fits = isinstance(timesteps, (list, tuple)) and all(isinstance(t, Integral) for t in timesteps)
    if timesteps is not None and not fits:
        raise UsageError(f"timesteps: a list of whole numbers is needed, not {brief(timesteps)}")


def timestep_tuple(timesteps: Iterable[int] | None) -> tuple[int, ...] | None:
    """Given timesteps, of any kind of whole numbers, as they are kept."""
    return None if timesteps is None else tuple(int(t) for t in timesteps)


def sampler_schedule(sampler: str, alphas_cumprod: Tensor, steps: int, *, offset: int = 1,
                     final_alpha: float | None = None, spacing: str | None = None,
                     usual_spacing: str = "leading", timesteps: Sequence[int] | None = None,
                     eta: float = 0.0) -> Schedule:
    """The schedule that one of `SAMPLERS` runs through. spacing: None for the usual one. timesteps: in place
    of evenly spaced ones. eta: of TCD, whose steps it makes go lower before noise is added. Raises
    UsageError."""
    check_schedule(sampler, spacing, timesteps)
    spacing = usual_spacing if spacing is None else spacing
    if sampler in DISTILLED:
        found = consistency_schedule(alphas_cumprod, steps) if timesteps is None else \
            listed_schedule(alphas_cumprod, timesteps)
        if sampler == "lcm":
            return found.ending(1.0)
        table, ends = alphas_cumprod.tolist(), (*found.timesteps[1:], 0)
        return replace(found, lower=tuple(Level.of(table[int((1 - eta) * t)]) for t in ends))
    if sampler == "ddim":
        if timesteps is not None:
            return listed_schedule(alphas_cumprod, timesteps, final_alpha)
        return ddim_schedule(alphas_cumprod, steps, offset, final_alpha, spacing)
    if timesteps is not None:
        return listed_schedule(alphas_cumprod, timesteps, 1.0)
    return dpm_schedule(alphas_cumprod, steps, offset, spacing)


def ddim_schedule(alphas_cumprod: Tensor, steps: int, offset: int = 1, final_alpha: float | None = None,
                  spacing: str = "leading") -> Schedule:
    """Evenly spaced timesteps, each step ending at the level where the next begins (not 1000 // N below, as
    in diffusers: another level with linspace spacing, and with trailing where N does not divide 1000).

    alphas_cumprod (1000,). spacing, as Lin et al. 2023, table 2, and diffusers name it, with the same
    timesteps: "leading": offset, offset + 1000 // N, ..., as Stable Diffusion samples; "trailing": ...,
    999 - 1000 / N, 999, from pure noise (models of few steps, or of zero terminal SNR); "linspace": 0,
    ..., 999. `offset` 1 or 0, of leading alone (the official Prompt-to-Prompt code: 1). `final_alpha` is
    what the last step reaches: None for alphas_cumprod[0] (set_alpha_to_one False, Stable Diffusion), 1.0
    for the clean picture.
    """
    total = _length(alphas_cumprod, steps)
    return listed_schedule(alphas_cumprod, _rising(total, steps, offset, spacing)[::-1], final_alpha)


def listed_schedule(alphas_cumprod: Tensor, timesteps: Iterable[int],
                    final_alpha: float | None = None) -> Schedule:
    """The schedule of these timesteps. Raises UsageError unless they fall."""
    listed = tuple(int(t) for t in timesteps)
    total = len(alphas_cumprod)
    if not listed or not all(0 <= t < total for t in listed) or any(s <= t for s, t in pairwise(listed)):
        raise UsageError(f"timesteps must fall, from {total - 1} at most to 0 at least; not "
                         f"{brief(list(listed))}")
    table = alphas_cumprod.tolist()
    ends = table[0] if final_alpha is None else final_alpha
    return Schedule(listed, tuple(Level.of(a) for a in (*(table[t] for t in listed), ends)))


def dpm_schedule(alphas_cumprod: Tensor, steps: int, offset: int = 1, spacing: str = "leading") -> Schedule:
    """The timesteps of diffusers' DPMSolverMultistepScheduler, whose leading and linspace count one step more
    than DDIM's; to the clean picture. "karras": levels of Karras et al. 2022, Eq. 5, with rho 7, at which
    the network is given the nearest timesteps."""
    total = _length(alphas_cumprod, steps)
    if spacing == "karras":
        log_sigmas = _log_sigmas(alphas_cumprod)
        low, high = (float(log_sigmas[i].exp()) ** (1 / 7) for i in (0, -1))
        sigmas = np.linspace(high, low, steps) ** 7
        timesteps = np.interp(np.log(sigmas), log_sigmas.numpy(), np.arange(total)).round()
        return Schedule(tuple(int(t) for t in timesteps), _levels(sigmas.tolist()))
    if spacing in ("leading", "linspace") and steps == total:
        raise UsageError(f"steps must be from 1 to {total - 1} by dpm++ with {spacing} timesteps, not "
                         f"{steps}")
    more = int(spacing in ("leading", "linspace"))
    rising = _rising(total, steps + more, offset, spacing)[more:]
    return listed_schedule(alphas_cumprod, rising[::-1], 1.0)


def flow_sampler_schedule(sampler: str, flow: Flow, steps: int, tokens: int, *, spacing: str | None = None,
                          timesteps: Sequence[int] | None = None) -> Schedule:
    """The schedule of a flow model by "ddim", which is Euler's rule there, or "dpm++". timesteps: 1000 times
    the shares of noise, in place of the model's. Raises UsageError."""
    check_schedule(sampler, spacing, timesteps)
    if sampler in DISTILLED:
        raise UsageError(f"sampler {sampler}: its steps are of models with alphas_cumprod, and this one is a "
                         "flow; sample by ddim or dpm++")
    if spacing is not None:
        raise UsageError("timestep_spacing: a flow's levels are spaced by its own shift; leave it out, or "
                         "give timesteps")
    if timesteps is None:
        return flow_schedule(flow, steps, tokens)
    falls = all(s > t for s, t in pairwise(timesteps))
    if not timesteps or not falls or not all(0 < t <= 1000 for t in timesteps):
        raise UsageError(f"timesteps of a flow must fall, from 1000 at most to 1 at least; not "
                         f"{brief(list(timesteps))}")
    return sigma_levels(t / 1000 for t in timesteps)


def flow_schedule(flow: Flow, steps: int, tokens: int = 0) -> Schedule:
    """Levels of a flow, from noise to the clean picture, at timesteps 1000 sigma: sigma falls evenly and is
    then shifted, s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, Eq. 23), so that more steps are noisy.

    tokens: of the picture, on which FLUX's shift depends. Where the shift is `twice`, the levels fall to a
    thousandth, which diffusers' FlowMatchEulerDiscreteScheduler has shifted before (not by a shift that
    depends on tokens); else to 1 / steps, as in FLUX.
    """
    if not 1 <= steps <= 1000:
        raise UsageError(f"steps must be from 1 to 1000, not {steps}")
    shift = flow.shift
    if flow.dynamic is not None:
        (low, from_), (high, to) = flow.dynamic
        shift = math.exp(from_ + (tokens - low) / (high - low) * (to - from_))

    def shifted(sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    end = 1 / 1000 if flow.twice else 1 / steps
    if flow.twice and flow.dynamic is None:
        end = shifted(end)
    sigmas = np.linspace(1, end, steps).tolist()
    return sigma_levels(map(shifted, sigmas))


def sigma_levels(sigmas: Iterable[float]) -> Schedule:
    """The schedule of a flow at these shares of noise, falling, and then of the clean picture."""
    falling = [*sigmas, 0.0]
    return Schedule(tuple(1000 * sigma for sigma in falling[:-1]),
                    tuple(Level(1 - sigma, sigma) for sigma in falling))


def timesteps_at(alphas_cumprod: Tensor, levels: Sequence[Level]) -> list[float]:
    """The timesteps of levels: of a flow, whose alphas_cumprod is empty, 1000 t; else fractions, between the
    two timesteps whose shares of noise enclose the level's own."""
    shares = [level.share for level in levels]
    if not len(alphas_cumprod):
        return [1000 * share for share in shares]
    known = [Level.of(a).share for a in alphas_cumprod.tolist()]
    return np.interp(shares, known, range(len(known))).tolist()


def consistency_schedule(alphas_cumprod: Tensor, steps: int, origin: int = 50) -> Schedule:
    """Evenly spaced ones of the `origin` timesteps with which a latent consistency model was distilled, from
    the noisiest (Luo et al. 2023, as in diffusers' LCMScheduler and TCDScheduler)."""
    if not 1 <= steps <= origin:
        raise UsageError(f"steps must be from 1 to {origin}, as many as the model was distilled with, not "
                         f"{steps}")
    total = _length(alphas_cumprod, steps)
    timesteps = np.arange(origin, 0, -1) * (total // origin) - 1
    return listed_schedule(alphas_cumprod,
                           timesteps[np.floor(np.linspace(0, origin, steps, endpoint=False)).astype(int)])


def sigma_schedule(alphas_cumprod: Tensor, steps: int) -> Schedule:
    """k-diffusion's default noise levels of a model with discrete timesteps (`get_sigmas`).

    Timesteps fall evenly from the last to 0 and are fractions; between two, log(sigma) is interpolated, where
    sigma^2 = (1 - a) / a; the last step ends at the clean picture.
    """
    total, log_sigmas = _length(alphas_cumprod, steps), _log_sigmas(alphas_cumprod)
    t = torch.linspace(total - 1, 0, steps, dtype=torch.float64)
    sigmas = torch.lerp(log_sigmas[t.floor().long()], log_sigmas[t.ceil().long()], t.frac()).exp()
    return Schedule(tuple(t.tolist()), _levels(sigmas.tolist()))


def _levels(sigmas: Iterable[float]) -> tuple[Level, ...]:
    """Of sigma / alpha, and then of the clean picture."""
    return tuple(Level.of(1 / (1 + sigma**2)) for sigma in (*sigmas, 0.0))


def _length(alphas_cumprod: Tensor, steps: int) -> int:
    """Number of timesteps of the schedule. Raises UsageError for more steps than that."""
    if not 1 <= steps <= len(alphas_cumprod):
        raise UsageError(f"steps must be from 1 to {len(alphas_cumprod)}, not {steps}")
    return len(alphas_cumprod)


def _rising(total: int, steps: int, offset: int, spacing: str) -> np.ndarray:
    """The timesteps of DDIM, see `ddim_schedule`, from the cleanest on. Raises UsageError."""
    if spacing == "leading":
        stride = total // steps
        # of 1000 steps the first is 999
        return np.arange(steps) * stride + min(offset, total - 1 - (steps - 1) * stride)
    if spacing == "trailing":
        return np.arange(total, 0, -total / steps)[:steps][::-1].round() - 1
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()
    raise UsageError(f"timestep_spacing {brief(spacing)} is not known; known: leading, trailing, linspace, "
                     "and karras by the sampler dpm++")


def _log_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """log(sigma) of every timestep, with sigma^2 = (1 - a) / a.  -> (1000,) float64"""
    table = alphas_cumprod.double().cpu()
    if not table[-1] > 0:
        raise UsageError(f"at t = {len(table) - 1} there is nothing but noise (zero terminal SNR): no sigma "
                         "is so large; leave out zero_snr, or sample by DDIM")
    return ((1 - table) / table).log() / 2

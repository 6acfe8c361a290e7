"""The numbers of one step: which timesteps a run visits, and pure functions of tensors from one to the next.

a_t is the product of alphas up to t (alphas_cumprod, DDIM's alpha_t); schedules hold float64
numbers of no device.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from p2p.errors import UsageError
from p2p.weights.untrusted import brief


class Schedule(NamedTuple):
    """N steps from noise to picture. Iterating gives (t, alphas_cumprod[t], that of the next step)."""

    timesteps: tuple[int, ...] | tuple[float, ...]   # falling
    alphas: tuple[float, ...]    # N + 1: of each timestep, then of the end

    def __iter__(self) -> Iterator[tuple[int | float, float, float]]:   # type: ignore[override]
        return iter(list(zip(self.timesteps, self.alphas, self.alphas[1:])))

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def ending(self, final_alpha: float | None) -> Schedule:
        """These steps, the last one to that alphas_cumprod; None: as they are. Raises UsageError."""
        if final_alpha is not None and final_alpha < self.alphas[-2]:
            raise UsageError(f"final_alpha {float(final_alpha):g}: the picture holds more noise than the last "
                             f"timestep's level, {self.alphas[-2]:g}; give at least that")
        return self if final_alpha is None else Schedule(self.timesteps, (*self.alphas[:-1], final_alpha))


def ddim_schedule(alphas_cumprod: Tensor, steps: int, offset: int = 1, final_alpha: float | None = None,
                  spacing: str = "leading") -> Schedule:
    """Evenly spaced timesteps, each step ending at the level where the next begins (not 1000 // N below, as
    in diffusers, which is another level where N does not divide 1000 and the spacing is not leading).

    alphas_cumprod (1000,). spacing, as Lin et al. 2023, table 2, and diffusers name it, with the same
    timesteps: "leading": offset, offset + 1000 // N, ..., as Stable Diffusion samples; "trailing": ...,
    999 - 1000 / N, 999, from pure noise (models of few steps, or of zero terminal SNR); "linspace": 0,
    ..., 999. `offset` 1 or 0, of leading alone (the official Prompt-to-Prompt code: 1). `final_alpha` is
    what the last step reaches: None for alphas_cumprod[0] (set_alpha_to_one False, Stable Diffusion), 1.0
    for the clean picture.
    """
    total = len(alphas_cumprod)
    if not 1 <= steps <= total:
        raise UsageError(f"steps must be from 1 to {total}, not {steps}")
    if spacing == "leading":
        stride = total // steps
        # of 1000 steps the first is 999
        rising = np.arange(steps) * stride + min(offset, total - 1 - (steps - 1) * stride)
    elif spacing == "trailing":
        rising = np.arange(total, 0, -total / steps)[:steps][::-1].round() - 1
    elif spacing == "linspace":
        rising = np.linspace(0, total - 1, steps).round()
    else:
        raise UsageError(f"timestep_spacing {brief(spacing)} is not known; known: leading, trailing, "
                         "linspace")
    timesteps = [int(t) for t in rising[::-1]]
    table = alphas_cumprod.tolist()
    alphas = [table[t] for t in timesteps]
    return Schedule(tuple(timesteps), (*alphas, table[0] if final_alpha is None else final_alpha))


def sigma_schedule(alphas_cumprod: Tensor, steps: int) -> Schedule:
    """k-diffusion's default noise levels of a model with discrete timesteps (`get_sigmas`).

    Timesteps fall evenly from the last to 0 and are fractions; between two, log(sigma) is interpolated, where
    sigma^2 = (1 - a) / a; the last step ends at the clean picture.
    """
    total = len(alphas_cumprod)
    if not 1 <= steps <= total:
        raise UsageError(f"steps must be from 1 to {total}, not {steps}")
    table = alphas_cumprod.double().cpu()
    if not table[-1] > 0:
        raise UsageError(f"at t = {total - 1} there is nothing but noise (zero terminal SNR): no sigma is so "
                         "large; leave out zero_snr, or sample by DDIM")
    log_sigmas = ((1 - table) / table).log() / 2
    t = torch.linspace(total - 1, 0, steps, dtype=torch.float64)
    sigmas = torch.lerp(log_sigmas[t.floor().long()], log_sigmas[t.ceil().long()], t.frac()).exp()
    return Schedule(tuple(t.tolist()), (*(1 / (1 + sigmas**2)).tolist(), 1.0))


def guide(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2021, Eq. 6); linear, so the same for eps, v and x_0."""
    return uncond + guidance_scale * (cond - uncond)


Clip = float | tuple[float, float] | None


def bounded(x_0: Tensor, clip: Clip) -> Tensor:
    """x_0 (B, ...) within a bound, or by dynamic thresholding (Saharia et al. 2022, section 2.3): with
    (quantile, most), each picture within the quantile of its own size, at least 1 and at most `most`, and
    scaled to [-1, 1]."""
    if isinstance(clip, tuple):
        quantile, most = clip
        s = _quantile(x_0.flatten(1).abs(), quantile).clamp(1, most).view(-1, *[1] * (x_0.ndim - 1))
        return x_0.maximum(-s).minimum(s) / s
    return x_0 if clip is None else x_0.clamp(-clip, clip)


def x0_and_eps(x_t: Tensor, out: Tensor, a_t: float, prediction: str = "eps",
               clip: Clip = None) -> tuple[Tensor, Tensor]:
    """The network's prediction ("eps", "v" or "x0") as picture and noise of

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps

    `clip`: bound of x_0 in pixel models, see `bounded` (the noise is then the one that fits
    the bounded picture).
    """
    alpha, sigma = a_t**0.5, (1 - a_t) ** 0.5
    if prediction == "eps":
        x_0, eps = (x_t - sigma * out) / alpha, out                     # DDIM Eq. 9
    elif prediction == "v":
        x_0, eps = alpha * x_t - sigma * out, alpha * out + sigma * x_t  # Salimans and Ho 2022, appendix D
    elif prediction == "x0":
        x_0, eps = out, (x_t - alpha * out) / sigma
    else:
        raise ValueError(f"prediction {prediction!r}: eps, v or x0")
    if clip is not None:
        x_0 = bounded(x_0, clip)
        eps = (x_t - alpha * x_0) / sigma
    return x_0, eps


def ddim_step(x_0: Tensor, eps: Tensor, a_t: float, a_prev: float, eta: float = 0.0,
              noise: Tensor | None = None) -> Tensor:
    """x_{t-1} from x_t's picture and noise (DDIM Eq. 12). eta 0: deterministic, and a_prev < a_t steps back
    towards noise; eta 1: DDPM; eta > 0 needs `noise`."""
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5 if eta else 0.0   # Eq. 16
    x = a_prev**0.5 * x_0 + max(1 - a_prev - sigma**2, 0.0) ** 0.5 * eps
    return x + sigma * noise if sigma > 0 else x


def ddpm_step(x_t: Tensor, x_0: Tensor, a_t: float, a_prev: float, noise: Tensor,
              v: Tensor | None = None) -> Tensor:
    """x_{t-1} ~ q(x_{t-1} | x_t, x_0) (DDPM Eq. 6 and 7), with the alphas of a strided schedule.

    v: a learned variance, from -1 for that of q to 1 for beta, between them in the logarithm (Nichol and
    Dhariwal 2021, Eq. 15). The step to the clean picture (a_prev 1) has no noise.
    """
    alpha = a_t / a_prev
    beta = 1 - alpha
    mean = a_prev**0.5 * beta / (1 - a_t) * x_0 + alpha**0.5 * (1 - a_prev) / (1 - a_t) * x_t
    variance = (1 - a_prev) / (1 - a_t) * beta
    if variance <= 0:
        return mean
    if v is None:
        return mean + variance**0.5 * noise
    share = (v + 1) / 2
    return mean + (0.5 * (share * math.log(beta) + (1 - share) * math.log(variance))).exp() * noise


BELM_FROM_NOISE = ("belm cannot begin where there is nothing but noise (zero terminal SNR): it divides by "
                   "what is left of the picture; give skip 1 or more, or another method")


def _belm(a_next: float, a_t: float, a_prev: float) -> tuple[float, float, float]:
    """Coefficients of x_{t+1}, x_t and eps in O-BELM (Wang et al. 2024); h are steps of sigma / alpha."""
    if not a_next > 0:
        raise UsageError(BELM_FROM_NOISE)
    ratio = lambda a: ((1 - a) / a) ** 0.5  # noqa: E731
    h_next, h = ratio(a_next) - ratio(a_t), ratio(a_t) - ratio(a_prev)
    w = (h / h_next) ** 2
    slope = -h * (h_next + h) / h_next * a_prev**0.5
    return w * (a_prev / a_next) ** 0.5, (1 - w) * (a_prev / a_t) ** 0.5, slope


def belm_step(x_next: Tensor, x_t: Tensor, eps: Tensor, a_next: float, a_t: float, a_prev: float) -> Tensor:
    """x_{t-1} from the two levels above it: second order, one prediction a step, and exactly invertible."""
    far, near, slope = _belm(a_next, a_t, a_prev)
    return far * x_next + near * x_t + slope * eps


def belm_step_up(x_prev: Tensor, x_t: Tensor, eps: Tensor, a_prev: float, a_t: float,
                 a_next: float) -> Tensor:
    """x_{t+1}: the inverse of `belm_step`."""
    far, near, slope = _belm(a_next, a_t, a_prev)
    return (x_prev - near * x_t - slope * eps) / far


def _quantile(sizes: Tensor, share: float) -> Tensor:
    """Of each row (B, N), in single precision at least.  -> (B,)"""
    return sizes.to(torch.promote_types(sizes.dtype, torch.float32)).quantile(share, dim=1).to(sizes.dtype)


PROXIMAL = ("l0", "l1", "published", "published-l1")


def proximal_guide(uncond: Tensor, cond: Tensor, guidance_scale: float, norm: str = "l0",
                   quantile: float = 0.7) -> Tensor:
    """Guidance along the large differences alone (Han et al. 2024, ProxEdit): those from a
    quantile of their size on.

    norm "l0": kept as they are, and "l1": less the threshold, which are the proximal operators of these
    norms, with a threshold a row. "published" and "published-l1": what ProxEdit's code
    (phymhan/prompt-to-prompt, PnPInversion) computes under the names l0 and l1, with one threshold for
    all rows: the first shrinks as "l1" does; the second takes the threshold off twice where the
    difference is positive, adds it again where that is below 0, and so is neither monotonic nor odd.
    uncond, cond: (B, C, H, W), the source's row first.
    """
    delta = cond - uncond
    size = delta.abs()
    sizes = size.flatten(1) if norm in ("l0", "l1") else size.flatten()[None]
    limit = _quantile(sizes, quantile).view(-1, *[1] * (delta.ndim - 1))
    if norm == "l0":
        kept = torch.where(size >= limit, delta, torch.zeros_like(delta))
    else:
        kept = delta - delta.clamp(-limit, limit)
    if norm == "published-l1":
        kept = torch.where(kept > 0, kept - limit, kept)
        kept = torch.where(kept < 0, kept + limit, kept)
    return uncond + guidance_scale * kept


# (step, x, prediction, learned variance) -> x
Stepper = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]


def stepper(schedule: Schedule, prediction: str, clip: Clip, eta: float = 0.0,
            noise: Sequence[Tensor] | None = None, before: tuple[Tensor, float] | None = None) -> Stepper:
    """The step of a run: DDIM, or DDPM where eta is 1 and the network gives a variance; noise: one tensor
    a step for eta > 0, shared by the rows. before: x one level above the first step, and its
    alphas_cumprod: O-BELM's steps."""
    above = before

    def step(i: int, x: Tensor, out: Tensor, variance: Tensor | None) -> Tensor:
        nonlocal above
        a_t, a_prev = schedule.alphas[i:i + 2]
        if above is not None:
            eps = x0_and_eps(x, out, a_t, prediction)[1]
            x_next, (above_x, a_next) = x, above
            above = (x_next, a_t)
            return belm_step(above_x[-len(x):], x, eps, a_next, a_t, a_prev)
        x_0, eps = x0_and_eps(x, out, a_t, prediction, clip)
        if variance is not None and eta == 1:
            return ddpm_step(x, x_0, a_t, a_prev, noise[i], variance)
        return ddim_step(x_0, eps, a_t, a_prev, eta, noise[i] if noise else None)

    return step

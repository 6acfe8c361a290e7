"""The numbers of one step: pure functions of tensors from one noise level to the next.

A level (alpha, sigma) says what x holds of picture and noise: x_t = alpha x_0 + sigma eps. In DDPM and DDIM
alpha^2 is alphas_cumprod and sigma^2 the rest; in a flow alpha and sigma sum to 1.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from p2p.errors import UsageError
from p2p.request.schedules import Level, Schedule


def guide(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2021, Eq. 6); linear, so it applies to eps, v and x_0."""
    return uncond + guidance_scale * (cond - uncond)


Clip = float | tuple[float, float] | None


def bounded(x_0: Tensor, clip: Clip) -> Tensor:
    """Clips x_0 (B, ...) to a bound, or thresholds it dynamically (Saharia et al. 2022, section 2.3): with
    (quantile, most), each picture is clipped to the quantile of its absolute values, at least 1 and at most
    `most`, and scaled to [-1, 1]."""
    if isinstance(clip, tuple):
        quantile, most = clip
        s = _quantile(x_0.flatten(1).abs(), quantile).clamp(1, most).view(-1, *[1] * (x_0.ndim - 1))
        return x_0.maximum(-s).minimum(s) / s
    return x_0 if clip is None else x_0.clamp(-clip, clip)


def x0_and_eps(x_t: Tensor, out: Tensor, level: Level, prediction: str = "eps",
               clip: Clip = None) -> tuple[Tensor, Tensor]:
    """Converts the network's prediction ("eps", "v", "x0" or "flow") to picture and noise of x_t.

    clip: bound of x_0 in pixel models, see `bounded` (the noise is then recomputed from the bounded picture).
    """
    alpha, sigma = level
    if prediction == "eps":
        x_0, eps = (x_t - sigma * out) / alpha, out                     # DDIM Eq. 9
    elif prediction == "v":
        x_0, eps = alpha * x_t - sigma * out, alpha * out + sigma * x_t  # Salimans and Ho 2022, appendix D
    elif prediction == "flow":
        x_0, eps = x_t - sigma * out, x_t + alpha * out                 # out = eps - x_0, alpha + sigma = 1
    elif prediction == "x0":
        x_0, eps = out, (x_t - alpha * out) / sigma
    else:
        raise ValueError(f"prediction {prediction!r}: eps, v, x0 or flow")
    if clip is not None:
        x_0 = bounded(x_0, clip)
        eps = (x_t - alpha * x_0) / sigma
    return x_0, eps


def velocity(x_t: Tensor, out: Tensor, level: Level, prediction: str = "eps", clip: Clip = None) -> Tensor:
    """What a flow's network would have predicted, dx/dt = eps - x_0 of x / (alpha + sigma) at
    t = sigma / (alpha + sigma): every model is a flow in these coordinates."""
    x_0, eps = x0_and_eps(x_t, out, level, prediction, clip)
    return eps - x_0


def along(x: Tensor, v: Tensor, level: Level, after: Level) -> Tensor:
    """x carried along a velocity to another level, by Euler's rule: DDIM's step, written as a flow's."""
    return after.scale * (x / level.scale + (after.share - level.share) * v)


def controlled(x: Tensor, v: Tensor, level: Level, end: Tensor, at: Level, strength: float) -> Tensor:
    """The velocity with a share of the one that leads straight to `end`, which is x at the level `at`
    (RF-Inversion, Rout et al. 2024, algorithms 1 and 2)."""
    straight = (end / at.scale - x / level.scale) / (at.share - level.share)
    return v + strength * (straight - v)


def _added(level: Level, after: Level) -> float:
    """The variance of the noise that comes in between `after` and the noisier `level` (DDPM's beta_t)."""
    return max(level.sigma**2 - (level.alpha / after.alpha * after.sigma) ** 2, 0.0)


def ddim_step(x_0: Tensor, eps: Tensor, level: Level, after: Level, eta: float = 0.0,
              noise: Tensor | None = None) -> Tensor:
    """x after the step from the picture and noise of x before it (DDIM Eq. 12). eta 0: deterministic, of a
    flow Euler's step, and with a noisier `after` a step back towards noise; eta 1: DDPM; eta > 0 needs
    `noise`."""
    fresh = eta * after.sigma / level.sigma * _added(level, after) ** 0.5 if eta else 0.0   # Eq. 16
    x = after.alpha * x_0 + max(after.sigma**2 - fresh**2, 0.0) ** 0.5 * eps
    if not fresh > 0:
        return x
    assert noise is not None
    return x + fresh * noise


def ddpm_step(x_t: Tensor, x_0: Tensor, level: Level, after: Level, noise: Tensor,
              v: Tensor | None = None) -> Tensor:
    """x_{t-1} ~ q(x_{t-1} | x_t, x_0) (DDPM Eq. 6 and 7), with the alphas of a strided schedule.

    v: a learned variance, from -1 for that of q to 1 for beta, between them in the logarithm (Nichol and
    Dhariwal 2021, Eq. 15). The step to the clean picture has no noise.
    """
    beta, kept = _added(level, after), (after.sigma / level.sigma) ** 2
    mean = after.alpha * beta / level.sigma**2 * x_0 + level.alpha / after.alpha * kept * x_t
    variance = kept * beta
    if variance <= 0:
        return mean
    if v is None:
        return mean + variance**0.5 * noise
    share = (v + 1) / 2
    return mean + (0.5 * (share * math.log(beta) + (1 - share) * math.log(variance))).exp() * noise


def dpmpp_step(x_t: Tensor, x_0: Tensor, level: Level, after: Level,
               before: tuple[Tensor, Level] | None = None) -> Tensor:
    """x after the step by DPM-Solver++ (Lu et al. 2022, algorithm 2, "2M"). before: x_0 of the step before
    and its level, None for first order."""
    if after.sigma <= 0:
        return x_0
    def log_snr(level: Level) -> float:   # -inf of nothing but noise: DDIM's step, then one of first order
        return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf

    h = log_snr(after) - log_snr(level)
    if before is not None:
        x_0 = x_0 + (x_0 - before[0]) * (h / (log_snr(level) - log_snr(before[1])) / 2)
    return after.sigma / level.sigma * x_t - after.alpha * math.expm1(-h) * x_0


def lcm_step(x_t: Tensor, x_0: Tensor, t: float, after: Level, noise: Tensor) -> Tensor:
    """A step of latent consistency models (Luo et al. 2023): the picture with fresh noise, or without noise
    where `after` has none. The boundary condition's coefficients are those of the authors' code (sigma_data
    1/2, timesteps scaled by 10)."""
    skip = 0.25 / ((10 * t) ** 2 + 0.25)
    picture = skip * x_t + 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5 * x_0
    return picture if after.sigma <= 0 else after.alpha * picture + after.sigma * noise


def tcd_step(x_0: Tensor, eps: Tensor, lower: Level, after: Level, noise: Tensor | None) -> Tensor:
    """A step of trajectory consistency distillation (Zheng et al. 2024, algorithm 4): down to a lower level,
    then noise up to `after`. noise None: the last step, which ends at the lower level."""
    x_s = lower.alpha * x_0 + lower.sigma * eps
    return x_s if noise is None else after.alpha / lower.alpha * x_s + _added(after, lower) ** 0.5 * noise


BELM_FROM_NOISE = ("belm cannot begin where there is nothing but noise (zero terminal SNR): it divides by "
                   "what is left of the picture; give skip 1 or more, or another method")


def _belm(above: Level, level: Level, after: Level) -> tuple[float, float, float]:
    """Coefficients of x one level above, x and eps in O-BELM (Wang et al. 2024); h are steps of
    sigma / alpha."""
    if not above.alpha > 0:
        raise UsageError(BELM_FROM_NOISE)
    ratio = lambda level: level.sigma / level.alpha  # noqa: E731
    h_above, h = ratio(above) - ratio(level), ratio(level) - ratio(after)
    w = (h / h_above) ** 2
    slope = -h * (h_above + h) / h_above * after.alpha
    return w * after.alpha / above.alpha, (1 - w) * after.alpha / level.alpha, slope


def belm_step(x_above: Tensor, x_t: Tensor, eps: Tensor, above: Level, level: Level, after: Level) -> Tensor:
    """x after the step from the two levels above: second order, one prediction a step, and exactly
    invertible."""
    far, near, slope = _belm(above, level, after)
    return far * x_above + near * x_t + slope * eps


def belm_step_up(x_after: Tensor, x_t: Tensor, eps: Tensor, after: Level, level: Level,
                 above: Level) -> Tensor:
    """x one level above: the inverse of `belm_step`."""
    far, near, slope = _belm(above, level, after)
    return (x_after - near * x_t - slope * eps) / far


def _quantile(sizes: Tensor, share: float) -> Tensor:
    """The quantile `share` of each row (B, N), in single precision at least.  -> (B,)"""
    return sizes.to(torch.promote_types(sizes.dtype, torch.float32)).quantile(share, dim=1).to(sizes.dtype)


PROXIMAL = ("l0", "l1", "published", "published-l1")


def proximal_guide(uncond: Tensor, cond: Tensor, guidance_scale: float, norm: str = "l0",
                   quantile: float = 0.7) -> Tensor:
    """Guidance along the large differences only (Han et al. 2024, ProxEdit): those from a quantile of their
    absolute values on.

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
        limited = torch.where(size >= limit, delta, torch.zeros_like(delta))
    else:
        limited = delta - delta.clamp(-limit, limit)
    if norm == "published-l1":
        limited = torch.where(limited > 0, limited - limit, limited)
        limited = torch.where(limited < 0, limited + limit, limited)
    return uncond + guidance_scale * limited


# (step, x, prediction, learned variance) -> x after the step, and the picture x_0 that was predicted. Where
# nothing reads a stored source, x comes without its row: of what a step remembers the last len(x) rows count.
Stepper = Callable[[int, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def stepper(schedule: Schedule, prediction: str, clip: Clip, eta: float = 0.0,
            noise: Sequence[Tensor] | None = None, before: tuple[Tensor, Level] | None = None,
            sampler: str = "ddim") -> Stepper:
    """The step function of a run by one of `schedules.SAMPLERS`; "ddim" is DDPM where eta is 1 and the
    network predicts a variance.

    noise: one tensor a step, for all rows or for each, for eta > 0, "lcm" and "tcd". before: x one level
    noisier than the first step, and its level, for O-BELM's steps.
    """
    previous: Any = before   # what a second-order step remembers: x or x_0, and its level

    def step(i: int, x: Tensor, out: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        nonlocal previous
        level, after = schedule.levels[i:i + 2]
        z: Any = noise[i] if noise else None
        if before is not None:   # unbounded, as in its authors' code
            x_0, eps = x0_and_eps(x, out, level, prediction)
            (x_above, above), previous = previous, (x, level)
            return belm_step(x_above[-len(x):], x, eps, above, level, after), x_0
        x_0, eps = x0_and_eps(x, out, level, prediction, clip)
        if sampler == "dpm++":
            x, previous = dpmpp_step(x, x_0, level, after, previous), (x_0, level)
        elif sampler == "lcm":
            x = lcm_step(x, x_0, schedule.timesteps[i], after, z)
        elif sampler == "tcd":
            last = i + 1 == schedule.steps
            x = tcd_step(x_0, eps, schedule.lower[i], after, None if last else z)
        elif variance is not None and eta == 1 and noise:
            x = ddpm_step(x, x_0, level, after, z, variance)
        else:
            x = ddim_step(x_0, eps, level, after, eta, z)
        return x, x_0

    return step

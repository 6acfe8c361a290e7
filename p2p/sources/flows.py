"""Inversions that follow a flow's velocity from the picture to the noise; of every model, in the coordinates
of `sampler.velocity`. Each returns latents (T + 1, C, H, W), the picture's first, at the levels of
`solvers.asked`."""
from __future__ import annotations

import torch
from torch import Tensor

from p2p.request.schedules import Level, Schedule
from p2p.request.solvers import Reader, euler, midpoint
from p2p.request.source import Inversion
from p2p.request.start import draw
from p2p.sampler import Stepper, along
from p2p.sources.given import Run


def uni_inv(run: Run, planned: Inversion) -> Tensor:
    """Inverts Euler's steps (Jiao et al. 2025, Uni-Inv). A step from the noise uses the velocity at its
    noisier end; here that end is guessed by a step with the velocity before, and asked. The guess makes an
    error of third order a step; DDIM inversion, which asks where it stands, one of second order."""
    reader, scale = Reader.of(run.model, run.schedule), planned.inversion_guidance
    x, latents = run.x_0, [run.x_0]
    v = reader.velocity(x, run.predict(x, reader.timestep, scale), run.schedule.levels[-1])
    for t, after, before in run.upwards():
        guess = along(x, v, before, after)
        v = reader.velocity(guess, run.predict(guess, t, scale), after)
        x = along(x, v, before, after)
        latents.append(x)
    return torch.cat(latents)


def by_midpoints(run: Run, planned: Inversion) -> Tensor:
    """RF-Solver and FireFlow, see `solvers.midpoint`: the same steps upwards."""
    reader = Reader.of(run.model, run.schedule)
    schedule = reader.upwards(run.schedule)
    return _ascent(run, planned, schedule, midpoint(schedule, reader))


def rf_inversion(run: Run, planned: Inversion) -> Tensor:
    """The controlled forward ODE (Rout et al. 2024, algorithm 1): the velocity is drawn to that which leads
    to a sample of noise, by a share of `gamma`."""
    noise, = draw(run.x_0.shape[1:], [planned.seed or 0], 1)
    reader = Reader.of(run.model, run.schedule)
    schedule, strengths = reader.upwards(run.schedule), (planned.gamma or 0.0,) * run.schedule.steps
    step = euler(schedule, reader, noise.to(run.x_0), Level(0.0, 1.0), strengths)
    return _ascent(run, planned, schedule, step)


def _ascent(run: Run, planned: Inversion, schedule: Schedule, step: Stepper) -> Tensor:
    x, latents = run.x_0, [run.x_0]
    for i, t in enumerate(run.with_bar(schedule.timesteps)):
        x, _ = step(i, x, run.predict(x, t, planned.inversion_guidance), None)
        latents.append(x)
    return torch.cat(latents)


METHODS = {"uni-inv": uni_inv, "rf-solver": by_midpoints, "fireflow": by_midpoints,
           "rf-inversion": rf_inversion}

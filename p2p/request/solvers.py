"""How the inversions of flows step, up to the noise and down again: at which levels the network is asked, and
where its velocity leads. Of every model, in the coordinates of `sampler.velocity`.

    rf-solver      the midpoint rule, of second order: the network is asked twice a step (Wang et al. 2024
                   write it as Taylor's formula with a difference quotient, which is the same)
    fireflow       the midpoint rule, with the velocity of the last midpoint for the first half of a step: of
                   second order, one call a step and one to begin with (Deng et al. 2024)
    rf-inversion   Euler's rule, the velocity drawn to the noise on the way up and to the picture on the way
                   down (Rout et al. 2024)
    flow-edit      Euler's rule, the velocity averaged over several noises (Kulikov et al. 2024)
    ddcm           the picture alone: all noise is new at every step (Xu et al. 2023, InfEdit)
"""
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from p2p.model import Model
from p2p.request.schedules import Level, Schedule, timesteps_at
from p2p.request.source import Inversion
from p2p.sampler import Stepper, along, controlled, velocity, x0_and_eps

MIDPOINT = ("rf-solver", "fireflow")
SOLVED = (*MIDPOINT, "rf-inversion", "flow-edit", "ddcm")   # edits of all others: `sampler.stepper`


def asked(model: Model, schedule: Schedule, inversion: Inversion) -> Schedule:
    """One entry for each call of the network, `inversion.calls` in all: rf-solver's levels with their
    midpoints, fireflow's first level and then the midpoints alone, flow-edit's levels n_avg times each but
    for the last n_min."""
    method = inversion.method
    if method == "flow-edit":
        plain = schedule.steps - (inversion.n_min or 0)
        often = [inversion.n_avg or 1 if i < plain else 1 for i in range(schedule.steps)]
        asks = [ask for ask, n in zip(zip(schedule.timesteps, schedule.levels), often) for _ in range(n)]
    elif method in MIDPOINT:
        own = list(zip(schedule.timesteps, schedule.levels))
        between = [Level.at((level.share + after.share) / 2, model.flow is not None)
                   for _, level, after in schedule]
        middles = list(zip(timesteps_at(model.alphas_cumprod, between), between))
        both = [ask for pair in zip(own, middles) for ask in pair]
        asks = both if method == "rf-solver" else [own[0], *middles]
    else:
        return schedule
    timesteps, levels = zip(*asks)
    return Schedule(timesteps, (*levels, schedule.levels[-1]))


class Reader(NamedTuple):
    """How what a network predicts is read, and the lowest level at which it is asked."""

    prediction: str
    clip: Any
    timestep: float
    lowest: Level

    @staticmethod
    def of(model: Model, schedule: Schedule) -> Reader:
        """The lowest level is that of timestep 0; of a network that gives the picture x_0, the schedule's
        last with noise: its velocity (x - x_0) / sigma would be divided by almost nothing."""
        if "x0" in (model.prediction, getattr(model.unet.config, "says", None)):
            lowest = schedule.timesteps[-1], schedule.levels[-2]
        else:
            lowest = 0, Level(1.0, 0.0) if model.flow else Level.of(float(model.alphas_cumprod[0]))
        return Reader(model.prediction, model.clip, *lowest)

    def velocity(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        return velocity(x, out, max(level, self.lowest, key=lambda each: each.sigma), self.prediction,
                        self.clip)

    def upwards(self, schedule: Schedule) -> Schedule:
        """A schedule from the picture to the noise: every level asks at its own timestep."""
        return Schedule((self.timestep, *schedule.timesteps[:0:-1]), schedule.levels[::-1])


def midpoint(schedule: Schedule, reader: Reader) -> Stepper:
    """The step function of the midpoint rule, on the levels of `asked`.

    From the midpoint that a velocity led to, x goes back to where that step began, then by the midpoint's own
    velocity to where it ends, and by the same on to the next level at which the network is asked. At a level
    of the steps' own, where no midpoint lies between, this is the first half of a step.
    """
    start, v_before = schedule.levels[0].share, 0.0

    def step(i: int, x: Tensor, out: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        nonlocal start, v_before
        level, after = schedule.levels[i:i + 2]
        v, middle = reader.velocity(x, out, level), level.share
        end = 2 * middle - start
        x_end = x / level.scale + (start - middle) * v_before + (end - start) * v
        start, v_before = end, v
        return after.scale * (x_end + (after.share - end) * v), x / level.scale - level.share * v

    return step


def euler(schedule: Schedule, reader: Reader, to: Tensor | None = None, at: Level | None = None,
          strengths: tuple[float, ...] = ()) -> Stepper:
    """The step function of Euler's rule. to, at, strengths: what the velocity is drawn to, at which level,
    and how much in each of the first steps, see `controlled`. Where levels repeat, x waits, and then goes by
    the mean of their velocities."""
    held: list[Tensor] = []

    def step(i: int, x: Tensor, out: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        level, after = schedule.levels[i:i + 2]
        v = reader.velocity(x, out, level)
        if to is not None and at is not None and i < len(strengths) and level != at:
            v = controlled(x, v, level, to, at, strengths[i])
        x_0, rows = x / level.scale - level.share * v, len(x)
        held.append(v)
        if level == after:
            return x, x_0
        rows = min(map(len, held))   # a source that is not run at all of them is put on its path anyhow
        mean = sum(each[-rows:] for each in held) / len(held)
        held.clear()
        return along(x[-rows:], mean, level, after), x_0

    return step


def consistent(schedule: Schedule, reader: Reader) -> Stepper:
    """The step function of DDCM: the predicted picture, scaled; its fresh noise is in the stored offsets."""
    def step(i: int, x: Tensor, out: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        level, after = schedule.levels[i:i + 2]
        x_0, _ = x0_and_eps(x, out, level, reader.prediction, reader.clip)
        return after.alpha * x_0, x_0

    return step


def descent(model: Model, inversion: Inversion, schedule: Schedule) -> Stepper:
    """The step function of the edits of an inversion by one of `SOLVED`, on the levels of `asked`. The last
    lines are rf-inversion's."""
    reader, method = Reader.of(model, schedule), inversion.method
    if method in MIDPOINT:
        return midpoint(schedule, reader)
    if method == "ddcm":
        return consistent(schedule, reader)
    if method == "flow-edit":
        return euler(schedule, reader)
    assert inversion.control is not None
    picture = inversion.latents[:1].to(model.device)
    strengths = (inversion.control,) * inversion.control_calls
    return euler(schedule, reader, picture, schedule.levels[-1], strengths)

"""How fast the solvers of flows converge, on a velocity in closed form."""
import math
from types import SimpleNamespace

import pytest
import torch

from p2p.request.schedules import Level, sigma_levels
from p2p.request.solvers import Reader, asked, euler, midpoint
from p2p.sources import flows
from p2p.sources.given import Run
from p2p.sources.methods import _ddim

pytestmark = pytest.mark.slow


class Mixture:
    """A model whose velocity is known: pixels of two Gaussians. x = (1 - t) x_0 + t eps, so E[x_0 | x] and E[eps | x] are
    means of those of the two, weighted by their share of p_t(x)."""

    prediction, clip, flow, alphas_cumprod, unet = "flow", None, True, torch.empty(0), SimpleNamespace(
        config=None, reads_guidance=False, with_guidance=lambda conditioning, scale: conditioning)
    means, spread = (-1.0, 0.6), 0.5

    def guided(self, guidance_scale):
        return guidance_scale != 1

    def predict(self, x, t, conditioning):
        t = float(t) / 1000
        mean, var = torch.tensor(self.means, dtype=x.dtype) * (1 - t), (1 - t) ** 2 * self.spread**2 + t**2
        off = x[..., None] - mean
        weight = (-off.square() / (2 * var)).softmax(-1)
        x_0 = mean / (1 - t) if t < 1 else torch.tensor(self.means, dtype=x.dtype)
        x_0 = x_0 + (1 - t) * self.spread**2 / var * off
        return ((t / var * off - x_0) * weight).sum(-1), None, {}


def uniform(steps, top=0.96):
    return sigma_levels([top * (steps - i) / steps for i in range(steps)])


def up(method, steps, x_0):
    """Latents (T + 1, ...) by a method."""
    planned = SimpleNamespace(method=method, inversion_guidance=1.0, n_avg=None, n_min=None)
    run = Run(Mixture(), x_0, None, None, None, None, asked(Mixture(), uniform(steps), planned), False)
    return _ddim(run, 1.0, 1) if method == "ddim" else flows.METHODS[method](run, planned)


def down(method, steps, x):
    reader, schedule = Reader("flow", None, 0, Level(1.0, 0.0)), uniform(steps)
    schedule = asked(Mixture(), schedule, SimpleNamespace(method=method))
    step = midpoint(schedule, reader) if method in ("rf-solver", "fireflow") else euler(schedule, reader)
    for i, t in enumerate(schedule.timesteps):
        x = step(i, x, Mixture().predict(x, t, None)[0], None)[0]
    return x


PIXELS = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)


def orders(errors):
    """Of convergence, from the errors at twice as many steps each time."""
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


@pytest.mark.parametrize("method, order", [("ddim", 1), ("uni-inv", 1), ("rf-solver", 2), ("fireflow", 2)])
def test_the_order_of_a_solver(method, order):
    """Uni-Inv is implicit Euler: of first order as a solver, whatever it undoes."""
    for solve in (lambda *how: up(*how)[-1:], down):
        exact = solve("rf-solver", 800, PIXELS)
        found = orders([(solve(method, steps, PIXELS) - exact).abs().max().item() for steps in (25, 50, 100)])
        assert all(abs(each - order) < 0.2 for each in found), found


@pytest.mark.parametrize("method, order", [("ddim", 1), ("uni-inv", 2), ("rf-solver", 2), ("fireflow", 2)])
def test_the_order_of_a_reconstruction(method, order):
    """There and back: Uni-Inv's guess is wrong by a third order of each step, so all of them by a second."""
    found = orders([(down(method, steps, up(method, steps, PIXELS)[-1:]) - PIXELS).abs().max().item() for steps in (25, 50, 100)])
    assert all(each > order - 0.2 for each in found) and (order == 2 or found[-1] < 1.2), found

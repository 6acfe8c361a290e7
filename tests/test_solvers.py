"""Solvers and schedules of few steps, against diffusers with the same noises, on a network that is a formula."""
import pytest
import torch
from oracles import diffusers

from p2p.errors import UsageError
from p2p.request.schedules import Level, consistency_schedule, ddim_schedule, dpm_schedule, listed_schedule
from p2p.sampler import dpmpp_step, lcm_step, tcd_step, x0_and_eps
from p2p.weights.detect import scaled_linear

ABAR = scaled_linear()
TRAINED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def rand(seed):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x, t):
    """Anything smooth that depends on both."""
    return torch.tanh(x * 0.7 + x.roll(1, -1) * 0.2) + 0.1 * torch.sin(torch.as_tensor(t / 100.0))


def whole_run(scheduler, x, **kw):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **kw).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_dpmpp_is_that_of_diffusers(steps, spacing):
    karras = spacing == "karras"
    peer = diffusers.DPMSolverMultistepScheduler(
        **TRAINED, steps_offset=1, use_karras_sigmas=karras, timestep_spacing="leading" if karras else spacing)
    peer.set_timesteps(steps)
    schedule = dpm_schedule(ABAR, steps, 1, spacing)
    assert list(schedule.timesteps) == peer.timesteps.tolist()
    x, before = rand(1), None
    wanted = whole_run(peer, x)
    for t, level, after in schedule:
        x_0, _ = x0_and_eps(x, network(x, t), level)
        x, before = dpmpp_step(x, x_0, level, after, before), (x_0, level)
    assert (x - wanted).abs().max() < 1e-5 * wanted.std()


def test_dpmpp_may_take_every_step_but_the_last():
    for spacing in ("leading", "linspace"):
        assert dpm_schedule(ABAR, 999, 1, spacing).timesteps == tuple(range(999, 0, -1))


def patched(monkeypatch, module, noises):
    """diffusers draws these noises in turn."""
    left = iter(noises)
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: next(left))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_is_that_of_diffusers(steps, monkeypatch):
    peer = diffusers.LCMScheduler(**TRAINED)
    peer.set_timesteps(steps)
    schedule = consistency_schedule(ABAR, steps)
    assert list(schedule.timesteps) == peer.timesteps.tolist()
    x, noises = rand(1), [rand(10 + i) for i in range(steps)]
    patched(monkeypatch, "scheduling_lcm", noises)
    wanted = whole_run(peer, x)
    for (t, level, after), noise in zip(schedule.ending(1.0), noises):
        x = lcm_step(x, x0_and_eps(x, network(x, t), level)[0], t, after, noise)
    assert (x - wanted).abs().max() < 1e-5 * wanted.std()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd_is_that_of_diffusers(steps, eta, monkeypatch):
    peer = diffusers.TCDScheduler(**TRAINED)
    peer.set_timesteps(steps)
    schedule = consistency_schedule(ABAR, steps)
    assert list(schedule.timesteps) == peer.timesteps.tolist()
    x, noises = rand(1), [rand(10 + i) for i in range(steps)]
    patched(monkeypatch, "scheduling_tcd", noises)
    wanted = whole_run(peer, x, eta=eta)
    for i, (t, level, after) in enumerate(schedule):
        lower = Level.of(float(ABAR[int((1 - eta) * ([*schedule.timesteps, 0][i + 1]))]))
        noise = noises[i] if eta and i + 1 < steps else None
        x = tcd_step(*x0_and_eps(x, network(x, t), level), lower, after, noise)
    assert (x - wanted).abs().max() < 1e-5 * wanted.std()


def test_euler_ancestral_on_trailing_timesteps_is_ddim_with_eta_1(monkeypatch):
    """What Turbo models are sampled by; x / sqrt(a) are the coordinates of k-diffusion."""
    from p2p.sampler import ddim_step

    peer = diffusers.EulerAncestralDiscreteScheduler(**TRAINED, timestep_spacing="trailing")
    peer.set_timesteps(4)
    schedule, noises = ddim_schedule(ABAR, 4, spacing="trailing", final_alpha=1.0), [rand(10 + i) for i in range(4)]
    assert list(schedule.timesteps) == peer.timesteps.tolist()
    patched(monkeypatch, "scheduling_euler_ancestral_discrete", noises)
    x = rand(1)
    y = x / schedule.levels[0].alpha
    for (t, level, after), noise, s in zip(schedule, noises, peer.timesteps):
        x = ddim_step(*x0_and_eps(x, network(x, t), level), level, after, 1.0, noise)
        y = peer.step(network(peer.scale_model_input(y, s), s), s, y).prev_sample
    assert (x - y).abs().max() < 1e-4 * y.std()


def test_any_falling_timesteps_will_do():
    schedule = listed_schedule(ABAR, [800, 400, 3])
    assert schedule.timesteps == (800, 400, 3) and schedule.levels == tuple(Level.of(float(ABAR[t])) for t in (800, 400, 3, 0))


@pytest.mark.parametrize("timesteps", [[], [1000], [-1], [4, 4], [3, 5]])
def test_other_timesteps_are_refused(timesteps):
    with pytest.raises(UsageError, match="must fall"):
        listed_schedule(ABAR, timesteps)


def test_more_steps_than_a_model_was_distilled_with_are_refused():
    with pytest.raises(UsageError, match="1 to 50"):
        consistency_schedule(ABAR, 51)

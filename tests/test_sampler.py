"""Schedules and steps, against diffusers and against each other."""
import pytest
import torch
from oracles import diffusers

import p2p
from p2p import sampler
from p2p.errors import UsageError
from p2p.request import schedules
from p2p.request.schedules import Level, ddim_schedule
from p2p.request.source import METHODS
from p2p.sampler import ddim_step, ddpm_step, guide, x0_and_eps
from p2p.weights.detect import scaled_linear

ABAR = scaled_linear()
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def rand(seed):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(kind, steps, prediction="eps", **kw):
    s = getattr(diffusers, kind)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                 steps_offset=1, prediction_type=NAMES[prediction], **kw)
    s.set_timesteps(steps)
    return s


@pytest.mark.parametrize("steps", [1, 4, 7, 30, 50, 333])
def test_timesteps_are_those_of_diffusers(steps):
    assert list(ddim_schedule(ABAR, steps).timesteps) == oracle("DDIMScheduler", steps, set_alpha_to_one=False).timesteps.tolist()


def test_published_ends_of_the_schedule():
    s = ddim_schedule(ABAR, 50)
    assert s.timesteps[0] == 981 and s.timesteps[-1] == 1 and s.steps == 50
    assert s.levels[-1] == Level.of(float(ABAR[0])) and ABAR[0] == pytest.approx(0.99915) and ABAR[-1] == pytest.approx(0.0047, abs=1e-4)
    assert ddim_schedule(ABAR, 50, offset=0).timesteps[0] == 980
    assert ddim_schedule(ABAR, 50, final_alpha=1.0).levels[-1] == (1, 0)
    assert all(isinstance(x, float) for level in s.levels for x in level)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts(steps):
    with pytest.raises(UsageError, match="1 to 1000"):
        ddim_schedule(ABAR, steps)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_steps_are_those_of_diffusers(prediction, eta, to_one):
    reference = oracle("DDIMScheduler", 5, prediction, set_alpha_to_one=to_one)
    x, out, noise = rand(1), rand(2), rand(3)
    for t, level, after in ddim_schedule(ABAR, 5, final_alpha=1.0 if to_one else None):
        wanted = reference.step(out, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        got = ddim_step(*x0_and_eps(x, out, level, prediction), level, after, eta, noise)
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max(), f"t = {t}"
        x = wanted


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_predictions_say_the_same(prediction):
    """x_t = alpha x_0 + sigma eps whatever the network predicts."""
    x, out, level = rand(1), rand(2), Level(0.7, 0.3) if prediction == "flow" else Level.of(0.3)
    x_0, eps = x0_and_eps(x, out, level, prediction)
    assert (level.alpha * x_0 + level.sigma * eps - x).abs().max() < 1e-12
    said = {"eps": eps, "v": level.alpha * eps - level.sigma * x_0, "x0": x_0, "flow": eps - x_0}
    assert (said[prediction] - out).abs().max() < 1e-12


def test_clipped_picture_keeps_its_noisy_picture():
    x, out, level = rand(1), 3 * rand(2), Level.of(0.3)
    x_0, eps = x0_and_eps(x, out, level, "x0", clip=1.0)
    assert x_0.abs().max() == 1 and (level.alpha * x_0 + level.sigma * eps - x).abs().max() < 1e-12


def test_ddpm_is_ddim_with_eta_one():
    x, out, noise = rand(1), rand(2), rand(3)
    for _, level, after in ddim_schedule(ABAR, 5):
        x_0, eps = x0_and_eps(x, out, level)
        assert (ddpm_step(x, x_0, level, after, noise) - ddim_step(x_0, eps, level, after, 1.0, noise)).abs().max() < 1e-12


def test_a_ddim_step_can_be_undone():
    """With the same noise estimate the deterministic step is invertible."""
    x, eps, level, after = rand(1), rand(2), Level.of(0.3), Level.of(0.5)
    x_0, _ = x0_and_eps(x, eps, level)
    y = ddim_step(x_0, eps, level, after)
    back, _ = x0_and_eps(y, eps, after)
    assert (ddim_step(back, eps, after, level) - x).abs().max() < 1e-12


def test_guidance():
    u, c = rand(1), rand(2)
    assert torch.equal(guide(u, c, 0.0), u) and (guide(u, c, 1.0) - c).abs().max() < 1e-15
    assert (guide(u, c, 7.5) - (7.5 * c - 6.5 * u)).abs().max() < 1e-12


@pytest.fixture(scope="module")
def from_noise(sd1_file):
    """A model of zero terminal SNR, whose first step of few is at pure noise."""
    import dataclasses

    model = p2p.load(sd1_file, family="sd1", device="cpu", prediction="v", zero_snr=True)
    return dataclasses.replace(model, timestep_spacing="trailing")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inversions_end_in_pure_noise_or_say_why_not(from_noise, method):
    """No division by what is left of the picture there, which is 0."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    more = {"inner_steps": 1} if method in ("null-text", "fixed-point") else {}
    if method == "belm":
        with pytest.raises(p2p.UsageError, match="belm cannot begin where there is nothing but noise.*give skip 1"):
            p2p.invert(from_noise, x, "a cat", method=method, steps=3)
        more["skip"] = 1
    inv = p2p.invert(from_noise, x, "a cat", method=method, steps=3, **more)
    assert p2p.edit(from_noise, inv, "a dog").latents.isfinite().all()


@pytest.mark.slow
def test_steps_from_pure_noise_divide_by_nothing(from_noise):
    for eta in (0.0, 0.5, 1.0):
        assert p2p.generate(from_noise, "a cat", steps=2, eta=eta, height=64, width=64).latents.isfinite().all()
    with pytest.raises(p2p.UsageError, match="at t = 999 there is nothing but noise.*no sigma is so large"):
        schedules.sigma_schedule(from_noise.alphas_cumprod, 3)
    multistep = p2p.generate(from_noise, "a cat", steps=3, sampler="dpm++", height=64, width=64)   # its first step is of first order
    first = p2p.generate(from_noise, "a cat", steps=1, sampler="dpm++", height=64, width=64)
    assert multistep.latents.isfinite().all()
    assert torch.allclose(first.latents, p2p.generate(from_noise, "a cat", steps=1, height=64, width=64).latents, atol=0.1)
    with pytest.raises(p2p.UsageError, match="belm cannot begin"):
        sampler.belm_step(*[torch.zeros(1)] * 3, *map(Level.of, (0.0, 0.5, 0.9)))

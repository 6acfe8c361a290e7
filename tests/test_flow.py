"""Flow models: levels (1 - sigma, sigma) by the schedulers of diffusers, Euler's rule as DDIM, and the bundled one."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import diffusers

import p2p
from p2p.errors import UsageError
from p2p.models.mmdit import EMOJI_FLOW, build
from p2p.request.schedules import Level, flow_schedule, sigma_levels
from p2p.sampler import ddim_step, dpmpp_step, x0_and_eps
from p2p.weights.scheduler import Flow

SD3 = Flow(shift=3.0, twice=True)
FLUX_DEV = Flow(dynamic=((256, 0.5), (4096, 1.15)))
SOURCE, SWAP = "a cat on grass", "a dog on grass"


@pytest.fixture(scope="module")
def flow():
    return p2p.load("emoji-flow", device="cpu")


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_levels_are_those_of_diffusers(steps):
    """Stable Diffusion 3's, shifted twice; FLUX.1 dev's, by the number of tokens; schnell's, not shifted."""
    sd3 = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sd3.set_timesteps(steps)
    given = np.linspace(1, 1 / steps, steps)
    dev = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    schnell = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    schnell.set_timesteps(sigmas=given)
    moving = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)   # of Stable Diffusion 3: its end is not shifted
    moving.set_timesteps(steps, mu=1.15)
    cases = [(SD3, 4096, sd3), (Flow(), 4096, schnell), (Flow(twice=True, dynamic=FLUX_DEV.dynamic), 4096, moving)]
    for tokens in (256, 1024, 4096):
        dev.set_timesteps(sigmas=given, mu=0.5 + (tokens - 256) / (4096 - 256) * (1.15 - 0.5))
        for ours, theirs in zip(flow_schedule(FLUX_DEV, steps, tokens).levels, dev.sigmas.tolist(), strict=True):
            assert ours.sigma == pytest.approx(theirs, abs=2e-7) and ours.alpha == 1 - ours.sigma
    for rule, tokens, theirs in cases:
        ours = flow_schedule(rule, steps, tokens)
        assert [level.sigma for level in ours.levels] == pytest.approx(theirs.sigmas.tolist(), abs=2e-7)
        assert list(ours.timesteps) == pytest.approx(theirs.timesteps.tolist(), abs=2e-4)


def test_eulers_rule_is_ddim():
    x, v = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for s, s_next in ((1.0, 0.9), (0.5, 0.3), (0.2, 0.0), (0.0, 0.4)):
        level, after = Level(1 - s, s), Level(1 - s_next, s_next)
        assert (ddim_step(*x0_and_eps(x, v, level, "flow"), level, after) - (x + (s_next - s) * v)).abs().max() < 1e-12


def test_noise_that_comes_in_keeps_the_level():
    """With eta 1 a step from x_t of a known picture ends at the level of the next, whatever that is: the variance is right."""
    g = torch.Generator().manual_seed(0)
    x_0, eps, z = torch.randn(3, 4, 100_000, generator=g, dtype=torch.float64)
    for level, after in ((Level(0.1, 0.9), Level(0.6, 0.4)), (Level(0.0, 1.0), Level(0.3, 0.7)), (Level.of(0.2), Level.of(0.7))):
        x = ddim_step(x_0, eps, level, after, 1.0, z)
        assert x.std().item() == pytest.approx((after.alpha**2 + after.sigma**2) ** 0.5, rel=1e-2)


def test_dpmpp_after_nothing_but_noise_is_of_first_order():
    """The step before it was infinite: what it remembers of the picture counts for nothing."""
    x, a, b = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    middle, after = Level(0.5, 0.5), Level(0.8, 0.2)
    first, second = dpmpp_step(x, b, middle, after), dpmpp_step(x, b, middle, after, (a, Level(0.1, 0.9)))
    assert torch.equal(dpmpp_step(x, b, middle, after, (a, Level(0.0, 1.0))), first) and not torch.allclose(second, first, atol=1e-3)


def test_dpmpp_begins_at_nothing_but_noise():
    """Of a picture that is known, every step is exact, the first one from sigma 1 too."""
    x_0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, before = eps, None
    for _, level, after in flow_schedule(Flow(shift=3.0), 6):
        x, before = dpmpp_step(x, x_0, level, after, before), (x_0, level)
        assert (x - (after.alpha * x_0 + after.sigma * eps)).abs().max() < 1e-12


@pytest.mark.slow
@torch.no_grad()
def test_a_network_that_says_the_picture_gives_its_velocity():
    torch.manual_seed(0)
    net = build(EMOJI_FLOW).double()
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    x, context = torch.randn(2, 3, 16, 24, dtype=torch.float64), torch.randn(2, 5, 128, dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.2], dtype=torch.float64)
    v, _ = net(x, 1000 * sigma, context)
    net.config = replace(EMOJI_FLOW, says="velocity")
    x_0, _ = net(x, 1000 * sigma, context)
    assert (x - sigma.view(-1, 1, 1, 1) * v - x_0).abs().max() < 1e-9
    net.config = EMOJI_FLOW
    for at, s in zip(net.times(1000 * sigma, net.read(context), torch.float64), sigma):
        assert (net(x, at, net.read(context))[0] - net(x, float(1000 * s), context)[0]).abs().max() < 1e-6   # sinusoids are float32


# ------------------------------------------------------------------------------------------------ the bundled flow model

@pytest.mark.slow
def test_the_source_is_as_it_is_alone_and_equal_prompts_give_equal_pictures(flow):
    r = p2p.edit(flow, SOURCE, [SWAP, p2p.Edit(SOURCE, mode="replace")], steps=4, seed=1)
    alone = p2p.generate(flow, SOURCE, steps=4, seed=1)
    assert (r.latents[0] - alone.latents[0]).abs().max() < 1e-4 and (r.latents[2] - r.latents[0]).abs().max() < 1e-4
    assert (r.latents[1] - r.latents[0]).abs().max() > 0.1


@pytest.mark.slow
def test_a_run_is_eulers_rule_written_out(flow):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    r = p2p.generate(flow, SOURCE, steps=5, x_T=x)
    sigmas = np.linspace(1, 1 / 5, 5)
    sigmas = [*(3 * sigmas / (1 + 2 * sigmas)), 0.0]
    context = flow.text([SOURCE]), flow.text([""])
    for s, s_next in zip(sigmas, sigmas[1:]):
        cond, uncond = (flow.unet(x, 1000 * s, c)[0] for c in context)
        x = x + (s_next - s) * (uncond + 3.0 * (cond - uncond))
    assert (r.latents - x).abs().max() < 1e-4


@pytest.fixture(scope="module")
def picture(flow):
    return p2p.generate(flow, SOURCE, steps=10, seed=2, height=32, width=32).images[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["noise", "ddim", "fixed-point", "belm", "negative-prompt", "null-text", "direct", "edit-friendly"])
def test_inversions_of_a_flow(flow, picture, method):
    """Those that are exact give the picture back; all give something that an edit goes on from."""
    more = {"belm": dict(skip=1), "null-text": dict(inner_steps=1)}.get(method, {})
    inv = p2p.invert(flow, picture, SOURCE, method=method, steps=6, height=32, width=32, **more)
    r = p2p.edit(flow, inv, [SOURCE, SWAP], guidance_scale=1.0 if method == "belm" else None)
    assert r.latents.isfinite().all()
    if method in ("direct", "edit-friendly"):
        assert (r.latents[0] - inv.latents[0]).abs().max() < 1e-4
    if method == "belm":   # alone; what an edit injects is another network's
        alone = p2p.edit(flow, inv, SOURCE, guidance_scale=1.0, cross_replace_steps=0.0, self_replace_steps=0.0).latents
        assert (alone - flow.encode(picture)).abs().max() < 1e-3
    if method == "edit-friendly":
        assert (r.latents[0] - flow.encode(picture)[0]).abs().max() < 1e-4


@pytest.mark.slow
def test_samplers_and_timesteps_of_flows(flow):
    for sampler in ("ddim", "dpm++"):
        assert p2p.generate(flow, SOURCE, steps=3, sampler=sampler).latents.isfinite().all()
    r = p2p.generate(flow, SOURCE, timesteps=[1000, 700, 300])
    assert r.settings["timesteps"] == [1000, 700, 300] and flow.schedule(3, timesteps=[1000, 700, 300]) == sigma_levels([1, 0.7, 0.3])
    for more, why in (({"sampler": "lcm"}, "this one is a flow"), ({"timestep_spacing": "trailing"}, "its own shift"),
                      ({"timesteps": [0]}, "must fall"), ({"timesteps": [300, 700]}, "must fall"), ({"steps": 1001}, "1 to 1000")):
        with pytest.raises(UsageError, match=why):
            p2p.generate(flow, SOURCE, **more)
    with pytest.raises(UsageError, match="a flow ends at the clean picture"):
        p2p.invert(flow, torch.zeros(1, 3, 64, 64), SOURCE, final_alpha=1.0)


def test_the_file_is_small_enough(flow):
    assert flow.file.stat().st_size <= 14_000_000

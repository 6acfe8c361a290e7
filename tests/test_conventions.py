"""Where codes disagree there is a switch: each side of it against its formula, and settings that nothing reads refused."""
import pytest
import torch
from plans import tables

import p2p
import p2p.sampler
from p2p.blend import prepare, word_maps
from p2p.edits import Edit
from p2p.models.maps import site_maps
from p2p.models.text import tokens
from p2p.request.inverting import READ_BY, settings_read
from p2p.request.source import METHODS
from p2p.sampler import proximal_guide
from p2p.weights.emoji.world import render, sample

SOURCE, TARGET, STEPS = "a red cat on grass", "a red dog on grass", 4
VALUES = {"inversion_guidance": 2.0, "inner_steps": 2, "eta": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def picture():
    return render(sample(1, 5, "held out"))[0]


@pytest.fixture(scope="module")
def small():
    """(1, 3, 32, 32)"""
    return render(sample(1, 5, "held out"), 32)[0]


@pytest.fixture(scope="module")
def x_0(picture):
    """Latents for a small Stable Diffusion 1: (1, 4, 8, 8)."""
    x = torch.nn.functional.avg_pool2d(picture, 8)
    return torch.cat([x, x[:, :1]], dim=1)


# ------------------------------------------------------------------------------------------- settings that are read, or not

@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_setting_is_read_or_refused(narrow, small, method):
    """Read: the result or what comes of it differs. Refused: by name, with the methods that read it."""
    plain = p2p.invert(narrow, small, SOURCE, method=method, steps=2, skip=0)
    for name, value in VALUES.items():
        if method in READ_BY[name]:
            other = p2p.invert(narrow, small, SOURCE, method=method, steps=2, skip=0, **{name: value})
            told = [(a.latents, a.null_context, a.offsets) for a in (plain, other)]
            assert any(a is not None and not torch.equal(a, b) for a, b in zip(*told)), name
            assert other.settings()[name] == value
        else:
            with pytest.raises(p2p.UsageError, match=f"{name}: {method} inversion does not read it"):
                p2p.invert(narrow, small, SOURCE, method=method, steps=2, **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["direct", "negative-prompt", "null-text"])
def test_guidance_while_inverting_is_that_of_the_path(narrow, picture, method):
    """PnPInversion's ablation inverts with guidance: the path is then that of guided DDIM."""
    how = dict(steps=2, inversion_guidance=2.5)
    path = p2p.invert(narrow, picture, SOURCE, method="ddim", **how).latents
    assert torch.equal(p2p.invert(narrow, picture, SOURCE, method=method, inner_steps=1 if method == "null-text" else None,
                                  **how).latents, path)


def test_settings_of_an_inversion_are_those_it_reads():
    assert settings_read("ddim", {**VALUES, "steps": 5}) == {"inversion_guidance": 2.0, "steps": 5}


# ------------------------------------------------------------------------------------------------------ proximal guidance

def test_published_proximal_guidance_is_proxedits_code():
    """proximal_guidance_forward.py: one threshold for both rows; "l0" takes a clamped copy off, "l1" then corrects each sign."""
    g = torch.Generator().manual_seed(0)
    uncond, cond = torch.randn(2, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    cond[0] = uncond[0]                     # of negative-prompt inversion the source row has no difference, and counts all the same
    delta = cond - uncond
    threshold = delta.abs().quantile(0.75)
    soft = delta - delta.clamp(-threshold, threshold)
    assert torch.allclose(proximal_guide(uncond, cond, 7.5, "published", 0.75), uncond + 7.5 * soft, atol=1e-12)
    twice = torch.where(soft > 0, soft - threshold, soft)
    twice = torch.where(twice < 0, twice + threshold, twice)
    assert torch.allclose(proximal_guide(uncond, cond, 7.5, "published-l1", 0.75), uncond + 7.5 * twice, atol=1e-12)


def test_proximal_operators_are_those_of_their_norms():
    """l0 keeps or drops, l1 shrinks to nothing by the threshold, each row by its own quantile: odd and monotonic, unlike the code."""
    delta = torch.linspace(-3, 3, 25, dtype=torch.float64).view(1, 1, 5, 5)
    zero, limit = torch.zeros_like(delta), delta.abs().quantile(0.5)
    assert torch.equal(proximal_guide(zero, delta, 1.0, "l0", 0.5), torch.where(delta.abs() >= limit, delta, zero))
    shrunk = delta.sign() * (delta.abs() - limit).clamp(min=0)
    assert torch.allclose(proximal_guide(zero, delta, 1.0, "l1", 0.5), shrunk, atol=1e-12)
    both = torch.cat([delta, 10 * delta])
    rows = proximal_guide(torch.zeros_like(both), both, 1.0, "l1", 0.5)
    assert torch.allclose(rows[1], 10 * rows[0], atol=1e-12)


@pytest.mark.slow
def test_published_proximal_guidance_reads_the_sources_row(narrow, picture):
    """Ours needs the targets' rows alone; the published threshold is taken of the source's too."""
    inv = p2p.invert(narrow, picture, SOURCE, method="negative-prompt", steps=STEPS)
    ours, published = (p2p.edit(narrow, inv, TARGET, proximal=(norm, 0.7)) for norm in ("l1", "published"))
    assert (ours.rows, published.rows) == (3 * STEPS, 4 * STEPS)
    assert (ours.latents[1] - published.latents[1]).abs().max() > 1e-3
    traced = p2p.trace(narrow, SOURCE, steps=STEPS)
    assert p2p.edit(narrow, traced, TARGET, proximal=("published", 0.7)).rows == 4 * STEPS


# ----------------------------------------------------------------------------------------------------------------- blends

@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddim", "negative-prompt", "null-text", "direct"])
def test_outside_of_a_blend_stands_the_picture_or_the_sampled_source(narrow, small, method):
    inv = p2p.invert(narrow, small, SOURCE, method=method, steps=STEPS, inner_steps=1 if method == "null-text" else None)
    mask = torch.zeros(32, 32)
    mask[:16] = 1
    for keep in ("stored", "sampled"):
        blend = p2p.LocalBlend(mask=mask, start=0.0, keep=keep)
        r = p2p.edit(narrow, inv, TARGET, local_blend=blend)
        outside = {"stored": small[0], "sampled": r.latents[0]}[keep]
        assert torch.equal(r.latents[1][:, 16:], outside[:, 16:])
        assert r.settings["targets"][0]["local_blend"]["keep"] == keep
    assert (r.latents[0] - small[0]).abs().max() > 1e-3 or method == "direct"


@torch.no_grad()
def test_the_middle_block_counts_where_it_is_asked_for(narrow):
    """RoyiRa's SDXL code takes all maps of the side, the middle block's among them; the official code has none of it."""
    s, t, unet = tokens("a cat"), tokens("a dog"), narrow.unet
    own = [site for site in unet.text_sites() if unet.site_pixels(64, 64)[site] == 64]
    assert len(own) == 4 and sum(site.startswith("mid_block") for site in own) == 1
    _, seen = unet(torch.randn(2, 3, 64, 64), 9, torch.randn(2, 32, 128), watch=own)
    rows, length = torch.arange(2), 32
    maps = {site: site_maps(unet.get_submodule(site), seen[site], None, rows)[0].mean(1) for site in own}
    for middle in (False, True):
        blend = prepare([p2p.LocalBlend(words=("cat", "dog"), level=8, middle=middle)], s, [t], unet=unet, steps=4, length=length,
                        size=(64, 64), device=torch.device("cpu"))
        sites = [site for site in own if middle or not site.startswith("mid_block")]
        heads = torch.tensor([unet.get_submodule(site).heads for site in sites])
        wanted = (torch.stack([maps[site][..., 2] for site in sites]) * heads[:, None, None]).sum(0) / heads.sum()   # words at 2
        assert blend.sites == tuple(sites) and torch.allclose(word_maps(unet, seen, None, rows, blend)[0, 0], wanted, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- windows

def test_windows_over_the_schedule_count_what_an_inversion_leaves_out():
    """Edit-friendly's code makes the table of all T steps and reads it from the first step that is run."""
    s, t = tokens("a cat"), tokens("a dog")
    steps, whole = 38, 50
    for over, ends in (("run", int(0.6 * (steps + 1))), ("schedule", int(0.6 * (whole + 1)))):
        mix, keep, *_ = tables(s, t, Edit("a dog", cross_replace_steps=0.6, windows_over=over), "replace", steps, 77, whole)
        assert mix.shape[0] == steps and [bool(k.any()) for k in keep].index(True) == ends


@pytest.mark.slow
def test_windows_over_the_schedule_reach_self_attention(narrow, picture):
    """With half of the steps left out, half of the schedule is all of the run."""
    inv = p2p.invert(narrow, picture, SOURCE, steps=8, skip=4)
    half, all_ = (p2p.edit(narrow, inv, p2p.Edit(TARGET, self_replace_steps=s, cross_replace_steps=0.0, windows_over=over)).latents
                  for s, over in ((0.5, "schedule"), (1.0, "run")))
    assert torch.equal(half, all_)
    none = p2p.edit(narrow, inv, p2p.Edit(TARGET, self_replace_steps=0.5, cross_replace_steps=0.0)).latents
    assert (none - half)[1].abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ where the picture stands

def belm_published(model, x_T, steps, told):
    """zituitui/BELM, samplers/BELM.py: timesteps from noise, the last level alpha 1, DDIM first; float64."""
    times = model.schedule(steps).timesteps
    abar = [model.alphas_cumprod[t].item() for t in times] + [1.0]
    xs = [x_T]
    for i, t in enumerate(times):
        eps = model.predict(xs[-1], t, told)[0]
        (a_t, s_t), (a_s, s_s) = ((a**0.5, (1 - a) ** 0.5) for a in (abar[i], abar[i + 1]))
        if i == 0:
            xs.append(a_s / a_t * xs[-1] + (s_s - s_t * a_s / a_t) * eps)
            continue
        a_p, s_p = abar[i - 1] ** 0.5, (1 - abar[i - 1]) ** 0.5
        d1, d2, d3 = s_t / a_t - s_p / a_p, s_s / a_s - s_t / a_t, s_s / a_s - s_p / a_p
        xs.append(d2 * d3 * a_s / d1 * eps + (d2 / d1) ** 2 * (a_s / a_p) * xs[-2] + (d1 - d2) * d3 / d1**2 * (a_s / a_t) * xs[-1])
    return xs


@pytest.mark.slow
@torch.no_grad()
def test_belm_ends_where_it_is_told(sd1, x_0):
    """With final_alpha 1 each step up is the inverse of the published step down; without, the picture is at alphas_cumprod[0]."""
    model = p2p.load(sd1.file, family="sd1", device="cpu", dtype=torch.float64)
    told = model.condition([SOURCE])
    inv = p2p.invert(model, x_0.double(), SOURCE, method="belm", steps=6, final_alpha=1.0)
    assert (p2p.edit(model, inv, SOURCE, guidance_scale=1.0, cross_replace_steps=0.0, self_replace_steps=0.0).latents[1]
            - x_0[0]).abs().max() < 1e-6
    noisy = [*inv.latents.flip(0)[:, None]]
    schedule = model.schedule(6).ending(1.0)
    for i in range(1, 6):       # the published formula from the two levels above, at every step
        a = schedule.levels
        eps = model.predict(noisy[i], schedule.timesteps[i], told)[0]
        want = p2p.sampler.belm_step(noisy[i - 1], noisy[i], eps, a[i - 1], a[i], a[i + 1])
        assert (want - noisy[i + 1]).abs().max() < 1e-6 * noisy[i + 1].abs().max()
    xs, own = belm_published(model, noisy[0], 6, told), [noisy[0]]
    for i in range(6):
        eps = model.predict(own[-1], schedule.timesteps[i], told)[0]
        a = schedule.levels
        own.append(p2p.sampler.ddim_step(*p2p.sampler.x0_and_eps(own[-1], eps, a[i]), a[i], a[i + 1]) if i == 0 else
                   p2p.sampler.belm_step(own[-2], own[-1], eps, a[i - 1], a[i], a[i + 1]))
    assert (xs[-1] - own[-1]).abs().max() < 1e-9 * xs[-1].abs().max()
    other = p2p.invert(model, x_0.double(), SOURCE, method="belm", steps=6)
    assert (other.latents[-1] - inv.latents[-1]).abs().max() > 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_belm_passes_levels_that_coincide(sd1, x_0):
    """1000 steps visit t = 0, whose level is where Stable Diffusion's picture stands: a step of no length."""
    schedule = sd1.schedule(1000)
    assert schedule.timesteps == tuple(range(999, -1, -1)) and schedule.levels[-1] == schedule.levels[-2]
    inv = p2p.invert(sd1, x_0, SOURCE, method="belm", steps=1000, skip=992)
    r = p2p.edit(sd1, inv, SOURCE, guidance_scale=1.0, cross_replace_steps=0.0, self_replace_steps=0.0)
    assert inv.latents.isfinite().all() and (r.latents - x_0).abs().max() < 1e-3


def test_the_level_of_the_picture_is_recorded_and_checked(narrow, picture):
    inv = p2p.invert(narrow, picture, SOURCE, method="direct", steps=2, final_alpha=0.99995)
    assert inv.settings()["final_alpha"] == 0.99995 and (p2p.edit(narrow, inv, TARGET).latents[0] - picture[0]).abs().max() < 1e-5
    for wrong in (0, 1.5, "1"):
        with pytest.raises(p2p.UsageError, match="final_alpha must lie"):
            p2p.invert(narrow, picture, SOURCE, method="ddim", steps=2, final_alpha=wrong)


# --------------------------------------------------------------------------------------------------------- negative prompts

@pytest.mark.slow
@torch.no_grad()
def test_a_negative_prompt_stands_in_place_of_the_empty_one(sd1):
    g = torch.Generator().manual_seed(1)
    x_T = torch.randn(1, 4, 8, 8, generator=g)
    r = p2p.generate(sd1, "a cat", steps=1, guidance_scale=7.5, x_T=x_T, negative_prompt="a blurry dog")
    t, level, after = next(iter(sd1.schedule(1)))
    bad, good = (sd1.unet(x_T, t, sd1.text([p]))[0] for p in ("a blurry dog", "a cat"))
    eps = bad + 7.5 * (good - bad)
    want = after.alpha * (x_T - level.sigma * eps) / level.alpha + after.sigma * eps
    assert (r.latents - want).abs().max() < 1e-4 * want.std() and r.settings["negative_prompt"] == "a blurry dog"
    edited = p2p.edit(sd1, "a cat", "a dog", steps=1, x_T=x_T, negative_prompt="a blurry dog")
    assert (edited.latents[0] - r.latents[0]).abs().max() < 1e-4 * want.std()


def test_a_negative_prompt_that_cannot_act_is_refused(narrow, picture):
    for method in ("negative-prompt", "null-text"):
        inv = p2p.invert(narrow, picture, SOURCE, method=method, steps=1, inner_steps=1 if method == "null-text" else None)
        with pytest.raises(p2p.UsageError, match="has its own in its place"):
            p2p.edit(narrow, inv, TARGET, negative_prompt="a dog")
    with pytest.raises(p2p.UsageError, match="without guidance"):
        p2p.generate(narrow, SOURCE, steps=1, guidance_scale=1.0, negative_prompt="a dog")
    with pytest.raises(p2p.UsageError, match="a list of one for each row, is needed, not 5"):
        p2p.generate(narrow, SOURCE, steps=1, negative_prompt=5)

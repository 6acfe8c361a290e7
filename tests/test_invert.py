"""Real pictures: what each inversion promises, and that any of them starts any edit."""
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import p2p
from p2p.errors import UsageError
from p2p.image import fit, from_pil
from p2p.request.inverting import READ_BY, expected
from p2p.request.schedules import Level
from p2p.request.source import METHODS
from p2p.sampler import belm_step, belm_step_up, guide, proximal_guide
from p2p.weights.emoji.world import caption, render, sample

STEPS = 5
SOURCE, TARGET = "a red cat on grass", "a red dog on grass"


@pytest.fixture(scope="module")
def picture(emoji):
    """A picture that no network made, (1, 3, 64, 64)."""
    return render(sample(1, 5, "held out"))[0]


@pytest.fixture(scope="module")
def small():
    """The same, (1, 3, 32, 32): for what holds at any size."""
    return render(sample(1, 5, "held out"), 32)[0]


def few(method):
    """Inner steps for what holds of any number of them."""
    return {"inner_steps": 2} if method in READ_BY["inner_steps"] else {}


@pytest.fixture(scope="module")
def prompt():
    return caption(sample(1, 5, "held out"))[0]


# -------------------------------------------------------------------------------------------------- against the original

@pytest.mark.slow
def test_inversions_of_the_original_code(sd1, golden, undecoded):
    meta, g = golden
    g = {k.removeprefix("inversion."): v for k, v in g.items() if k.startswith("inversion.")}
    common = dict(steps=4, guidance_scale=meta["cfg"])

    def close(got, want, tol):
        assert (got.reshape(want.shape) - want).abs().max() <= tol * want.std()

    close(p2p.invert(sd1, g["z0"], "a cat on grass", method="ddim", **common).latents, g["ddim_latents"], 1e-3)
    null = p2p.invert(sd1, g["z0"], "a cat on grass", method="null-text", inner_steps=3, **common)
    # Adam's steps keep their size however small a gradient is: where that is rounding alone, so is the step's sign, and
    # machines differ by up to two steps of 0.01 an iteration. Nearly all numbers agree; none is further off than that.
    off = (null.null_context.reshape(g["null_text_3_inner"].shape) - g["null_text_3_inner"]).abs()
    assert off.max() <= 2 * 0.01 * 3 and off.mean() <= 5e-4
    direct = p2p.invert(sd1, g["z0"], "a cat on grass", method="direct", **common)
    r = p2p.edit(sd1, direct, "a dog on grass", mode="replace", cross_replace_steps=0.6, self_replace_steps=0.4)
    close(r.latents, g["direct_p2p"], 1e-3)


# ------------------------------------------------------------------------------------------------------------ round trips

@pytest.mark.slow
@pytest.mark.parametrize("method", ["direct", "edit-friendly"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_source_is_exact_at_any_guidance(emoji, picture, prompt, method, guidance_scale):
    inv = p2p.invert(emoji, picture, prompt, method=method, steps=STEPS)
    r = p2p.edit(emoji, inv, [prompt, "a blue castle at night"], guidance_scale=guidance_scale)
    assert (r.latents[0] - picture[0]).abs().max() < 1e-4
    assert (r.latents[2] - picture[0]).abs().max() > 0.1


@pytest.mark.slow
def test_edit_friendly_noise_leads_an_unguided_target_back_too(emoji, picture, prompt):
    """The offsets are what the network misses: the same prompt without guidance comes to the picture's latents one step from
    the end, and then to what the network makes of them."""
    for eta in (0.3, 1.0):
        inv = p2p.invert(emoji, picture, prompt, method="edit-friendly", steps=STEPS, eta=eta)
        r = p2p.edit(emoji, inv, prompt, guidance_scale=1.0, cross_replace_steps=0.0, self_replace_steps=0.0)
        want = emoji.predict(inv.latents[1:2], emoji.schedule(STEPS).timesteps[-1], emoji.condition([prompt], 64, 64))[0]
        assert (r.latents[1] - want[0].clamp(-1, 1)).abs().max() < 1e-4 and torch.equal(inv.offsets[-1], torch.zeros_like(inv.offsets[-1]))


def test_belm_is_its_own_inverse():
    g = torch.Generator().manual_seed(0)
    x, y, eps = (torch.randn(1, 3, 8, 8, generator=g, dtype=torch.float64) for _ in range(3))
    levels = [Level.of(a) for a in (0.3, 0.5, 0.7)]
    assert torch.allclose(belm_step_up(belm_step(x, y, eps, *levels), y, eps, *levels[::-1]), x, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["emoji", "sd1"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_belm_reconstructs_in_float64(request, family, guidance_scale, small):
    model = request.getfixturevalue(family)
    double = p2p.load(model.file, family=family, device="cpu", dtype=torch.float64)
    x_0 = torch.nn.functional.avg_pool2d(small, 4).double() if family == "sd1" else small.double()
    x_0 = torch.cat([x_0, x_0[:, :1]], dim=1) if family == "sd1" else x_0
    inv = p2p.invert(double, x_0, SOURCE, method="belm", steps=6, inversion_guidance=guidance_scale)
    r = p2p.edit(double, inv, SOURCE, guidance_scale=guidance_scale, cross_replace_steps=0.0, self_replace_steps=0.0)
    assert (r.latents - x_0).abs().max() < 1e-6
    assert any("belm leaves out the bound" in note for note in inv.notes) == (family == "emoji")


@pytest.mark.slow
def test_fixed_point_undoes_a_step_better_than_a_guess(emoji, prompt, small):
    """Reconstruction without guidance, by the number of iterations."""
    @cache
    def error(method, **settings):
        inv = p2p.invert(emoji, small, prompt, method=method, steps=10, **settings)
        r = p2p.edit(emoji, inv, prompt, guidance_scale=1.0)
        return (r.latents[0] - small[0]).square().mean().item()

    assert error("fixed-point", inner_steps=5) < error("ddim") < error("noise")


@pytest.mark.slow
def test_guidance_breaks_ddim_and_null_text_repairs_it(emoji, picture, prompt):
    """The paper's figure 11, and what came after it."""
    @cache
    def error(method, guidance_scale):
        inner = 3 if method == "null-text" else None
        inv = p2p.invert(emoji, picture, prompt, method=method, steps=6, guidance_scale=guidance_scale, inner_steps=inner)
        return (p2p.edit(emoji, inv, prompt).latents[0] - picture[0]).square().mean().item()

    assert error("ddim", 1.0) < error("ddim", 4.0) < error("ddim", 8.0)
    assert error("null-text", 8.0) < error("ddim", 8.0)
    assert error("negative-prompt", 8.0) == pytest.approx(error("ddim", 1.0), rel=1e-3)


@pytest.mark.slow
def test_null_text_touches_no_weight(emoji, small, prompt):
    before = {k: v.clone() for k, v in emoji.unet.state_dict().items()}
    inv = p2p.invert(emoji, small, prompt, method="null-text", steps=2, inner_steps=2)
    assert inv.null_context.shape == (2, emoji.length, 128) and not inv.null_context.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in emoji.unet.state_dict().items())
    assert all(p.grad is None for p in emoji.unet.parameters())


# ------------------------------------------------------------------------------------------------------------- the edits

EDITS = {
    "swap": dict(targets=TARGET), "refine": dict(targets="a red cat on grass at night"),
    "reweight": dict(targets=SOURCE, equalizer={"red": -1.0}), "blend": dict(targets=TARGET, local_blend=p2p.LocalBlend(words=("cat", "dog"))),
    "scope": dict(targets=TARGET, scope="cat"), "two": dict(targets=[TARGET, "a blue cat on grass"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_inversion_starts_every_edit(narrow, small, method):
    inv = p2p.invert(narrow, small, SOURCE, method=method, steps=3, skip=1 if method in ("noise", "edit-friendly") else 0, **few(method))
    calls = {"rf-solver": 6, "fireflow": 4}.get(method, 3 - inv.skip)
    assert inv.latents.shape == (calls + 1, 3, 32, 32) and torch.equal(inv.latents[0], small[0])
    for name, settings in EDITS.items():
        r = p2p.edit(narrow, inv, **settings)
        assert r.latents.isfinite().all() and (r.latents[1] - r.latents[0]).abs().max() > 1e-3, name


@pytest.mark.slow
def test_the_default_leaves_out_a_quarter_of_the_steps(narrow, small):
    """Edit-friendly inversion as in its PIE-Bench runs, 12 of 50; each other step but the last takes one row."""
    inv = p2p.invert(narrow, small, SOURCE, steps=10)
    assert (inv.method, inv.skip, inv.rows) == ("edit-friendly", 2, 7)
    assert p2p.invert(narrow, small, SOURCE, steps=10, skip=0).rows == 9
    assert p2p.invert(narrow, small, SOURCE, steps=10, method="direct").skip == 0


@pytest.mark.slow
def test_outside_of_a_blend_the_picture_itself_comes_back(narrow, small):
    """Not its reconstruction: the stored latents (paper, section 4 and figure 12)."""
    mask = torch.zeros(32, 32)
    mask[:, :15] = 1
    for method in METHODS:
        inv = p2p.invert(narrow, small, SOURCE, method=method, steps=4, **few(method))
        r = p2p.edit(narrow, inv, TARGET, local_blend=p2p.LocalBlend(mask=mask, start=0.5))
        assert torch.equal(r.latents[1][:, :, 15:], small[0][:, :, 15:])


@pytest.mark.slow
def test_rows_are_those_that_matter(narrow, small):
    """Direct inversion: one row a step to invert; in an edit three where the target reads the source, else two; a source that
    is sampled anew costs a fourth, to the end."""
    inv = p2p.invert(narrow, small, SOURCE, method="direct", steps=10)
    assert inv.rows == 10 and p2p.edit(narrow, inv, TARGET).rows == 8 * 3 + 2 * 2
    assert p2p.edit(narrow, inv, [TARGET] * 2).rows == 8 * 5 + 2 * 4
    assert p2p.edit(narrow, inv, TARGET, record=p2p.Record(text=256)).rows == 30
    assert p2p.edit(narrow, inv, TARGET, cross_replace_steps=0.0, self_replace_steps=0.0).rows == 20
    assert p2p.edit(narrow, inv, TARGET, cross_replace_steps=(0.2, 0.4), self_replace_steps=(0.6, 0.7)).rows == 20 + 3
    mask = p2p.LocalBlend(mask=torch.ones(1, 1))
    assert p2p.edit(narrow, inv, TARGET, local_blend=mask).rows == 8 * 3 + 2 * 2          # a mask alone reads no map
    assert p2p.edit(narrow, replace(inv, method="ddim"), TARGET).rows == 40


@pytest.mark.slow
def test_a_source_that_nothing_reads_is_left_out(narrow, small):
    """The pictures are those of a run that computes it to the end."""
    inv = p2p.invert(narrow, small, SOURCE, method="direct", steps=6)
    for settings in (dict(cross_replace_steps=0.5, self_replace_steps=0.3), dict(cross_replace_steps=0.0, self_replace_steps=0.0),
                     dict(cross_replace_steps=(0.4, 0.6), self_replace_steps=(0.9, 1.0)), dict(editor=p2p.PlugAndPlay(0.5, 0.3))):
        short = p2p.edit(narrow, inv, [TARGET, "a bird on grass"], **settings)
        whole = p2p.edit(narrow, inv, [TARGET, "a bird on grass"], **settings, record=p2p.Record(text=256))
        assert short.rows < whole.rows and (short.latents - whole.latents).abs().max() < 1e-3


@pytest.mark.slow
def test_saved_and_loaded_it_is_the_same(narrow, small, tmp_path):
    image = Image.fromarray(((small[0].permute(1, 2, 0) + 1) * 127.5).byte().numpy())
    for method in METHODS:
        inv = p2p.invert(narrow, image, SOURCE, method=method, steps=3, height=32, width=32, **few(method))
        inv.save(tmp_path / "inv.safetensors")
        again = p2p.Inversion.load(tmp_path / "inv.safetensors")
        assert again.settings() == inv.settings() and again.picture.tobytes() == image.tobytes()
        a, b = (p2p.edit(narrow, i, TARGET).latents for i in (inv, again))
        assert torch.equal(a, b) and again.version == p2p.__version__ and f"{3 - inv.skip} of 3 steps" in repr(again)


def test_a_file_from_before_versions_were_recorded_is_read(narrow, tmp_path):
    file = tmp_path / "inv.safetensors"
    p2p.invert(narrow, torch.zeros(1, 3, 16, 16), SOURCE, steps=2).save(file)
    with safe_open(file, "pt") as f:
        tensors, settings = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["inversion"])
    del settings["version"]
    save_file(tensors, file, {"inversion": json.dumps(settings)})
    assert p2p.Inversion.load(file).version is None


@pytest.mark.slow
def test_null_text_goes_on_when_its_rate_has_fallen_to_zero(shallow):
    """The official rate, 0.01 (1 - i / 100), is negative from the 102nd step on, which Adam refuses."""
    inv = p2p.invert(shallow, torch.zeros(1, 3, 16, 16), SOURCE, method="null-text", steps=103, inner_steps=1)
    assert len(inv.null_context) == 103 and torch.equal(inv.null_context[102], inv.null_context[100])


@pytest.mark.slow
def test_another_model_or_other_settings_are_refused(emoji, sd1, picture, tmp_path):
    inv = p2p.invert(emoji, picture, SOURCE, steps=4)
    with pytest.raises(UsageError, match="another model"):
        p2p.edit(sd1, inv, TARGET)
    with pytest.raises(UsageError, match="another model"):
        p2p.edit(emoji, replace(inv, sha256="0" * 64), TARGET)
    for settings in (dict(steps=5), dict(eta=0.5), dict(height=128), dict(x_T=picture)):
        with pytest.raises(UsageError, match=f"{next(iter(settings))} is"):
            p2p.edit(emoji, inv, TARGET, **settings)
    for bad, message in ((dict(method="magic"), "magic"), (dict(skip=50), "skip"), (dict(eta=0.0), "eta"),
                         (dict(height=64), "latents have their size")):
        with pytest.raises(UsageError, match=message):
            p2p.invert(emoji, picture, SOURCE, **bad)
    with pytest.raises(UsageError, match="latents have the shape"):
        p2p.invert(emoji, torch.zeros(2, 3, 64, 64), SOURCE)
    with pytest.raises(UsageError, match="is a super-resolution stage"):
        p2p.invert(p2p.load("emoji-upscaler", device="cpu"), picture, SOURCE)
    (tmp_path / "x").write_text("x")
    for file, message in ((tmp_path / "x", "not an inversion"), (tmp_path / "none", "no such file")):
        with pytest.raises(UsageError, match=message):
            p2p.Inversion.load(file)


# -------------------------------------------------------------------------------------------------- pictures and guidance

@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_any_mode_is_fitted(mode):
    colour = Image.new("RGB", (90, 60), (255, 0, 0))
    image = Image.fromarray(np.full((60, 90), 65535, np.uint16)) if mode == "I;16" else colour.convert(mode)
    assert fit(image, (32, 48)).size == (48, 32) and fit(image, (32, 48)).mode == "RGB"


def test_fitting_covers_crops_the_centre_and_lays_on_white():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert (from_pil(fit(wide, (50, 50)))[0, :, 25, :] == torch.tensor([-1.0, -1, 1])[:, None]).float().mean() > 0.9
    assert fit(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (8, 8)).getpixel((3, 3)) == (255, 255, 255)
    turned = Image.new("RGB", (20, 10), "red")
    turned.getexif()[0x0112] = 6
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    turned.paste("blue", (0, 0, 10, 10))
    assert fit(turned, (20, 10)).size == (10, 20)


def test_proximal_operators():
    """Hard: what is small is dropped, the rest kept; soft: the rest less the threshold; both odd, soft monotone."""
    g = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 1, 40, 50, generator=g), torch.randn(2, 1, 40, 50, generator=g)
    limit = delta.abs().flatten(1).quantile(0.7, dim=1).view(2, 1, 1, 1)
    hard, soft = (proximal_guide(u, u + delta, 1.0, norm, 0.7) - u for norm in ("l0", "l1"))
    small = delta.abs() <= limit * (1 - 1e-5)
    large = delta.abs() > limit * (1 + 1e-5)
    assert 0.69 < small.float().mean() < 0.71 and hard[small].abs().max() < 1e-6 and soft[small].abs().max() < 1e-6
    assert torch.allclose(hard[large], delta[large], atol=1e-5)
    assert torch.allclose(soft[large], (delta - delta.sign() * limit)[large], atol=1e-5)
    assert torch.allclose(proximal_guide(u, u - delta, 1.0, "l1", 0.7) - u, -soft, atol=1e-5)
    assert torch.allclose(proximal_guide(u, u + delta, 7.5, "l0", 0.0), guide(u, u + delta, 7.5), atol=1e-4)


@pytest.mark.parametrize("method, skip, inner_steps", [
    ("edit-friendly", 12, None), ("flow-edit", 17, None), ("fixed-point", 0, 5), ("null-text", 0, 10), ("direct", 0, None), ("turbo-edit", 0, None)])
def test_defaults_are_those_of_the_published_runs(narrow, method, skip, inner_steps):
    """Of 50 steps: 12 left out in PIE-Bench runs of edit-friendly inversion, 17 in FlowEdit's of Stable Diffusion 3."""
    planned = expected(narrow, SOURCE, method=method, steps=50)
    assert (planned.skip, planned.inner_steps) == (skip, inner_steps)

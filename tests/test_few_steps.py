"""Models of few steps: what their folders say is done; guidance that is an input of the network needs no unconditional rows."""
import json

import families
import pytest
import torch
from oracles import diffusers

import p2p
from p2p.cli.parser import main
from p2p.errors import CheckpointError, UsageError
from p2p.request.start import draw
from p2p.weights.convert import convert
from p2p.weights.load import find

TRAINED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    """A small random latent consistency model, as its authors lay it out."""
    parts, folder = families.build("sd1"), tmp_path_factory.mktemp("lcm")
    parts["unet"] = families.randomised(diffusers.UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=32), 5)
    families.save(parts, folder / "made", "sd1")
    diffusers.LCMScheduler(**TRAINED).save_pretrained(folder / "made" / "scheduler")
    convert(find(folder / "made"), folder / "lcm")   # with tokenizers
    return folder / "lcm"


def folder_of(tmp_path, scheduler):
    folder = families.save(families.build("sd1"), tmp_path / "model", "sd1")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.slow
def test_a_run_is_that_of_diffusers_pipeline(lcm, monkeypatch):
    model = p2p.load(lcm, device="cpu")
    assert (model.sampler, model.steps, model.guidance_scale) == ("lcm", 4, 7.5) and "lcm samples" in " ".join(model.notes)
    side = 8 * model.shrink
    r = p2p.generate(model, "a cat", guidance_scale=6.0, seed=2, height=side, width=side)
    noise = draw(model.latent_shape(side, side), [2], 5)
    left = iter(noise[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: next(left))
    pipe = diffusers.LatentConsistencyModelPipeline.from_pretrained(lcm, safety_checker=None, requires_safety_checker=False)
    with torch.no_grad():
        theirs = pipe("a cat", num_inference_steps=4, guidance_scale=6.0, height=side, width=side, latents=noise[0].clone(),
                      output_type="latent").images
    assert (r.latents - theirs).abs().max() < 1e-4 * theirs.std() and r.rows == 4


@pytest.mark.slow
def test_an_edit_runs_as_many_rows_as_there_are_prompts(lcm):
    model = p2p.load(lcm, device="cpu")
    size = dict(height=16, width=16, seed=1)
    r = p2p.edit(model, "a cat", "a dog", **size)
    assert r.rows == 2 * 4
    assert torch.allclose(r.latents[:1], p2p.generate(model, "a cat", **size).latents, atol=1e-4)
    assert not torch.allclose(r.latents, p2p.edit(model, "a cat", "a dog", guidance_scale=2, **size).latents)
    for call, message in ((lambda: p2p.generate(model, "a", negative_prompt="b", **size), "distilled with its guidance"),
                          (lambda: p2p.invert(model, torch.zeros(1, 4, 8, 8), "a"), "edit-friendly inverts in small steps, .* use ddcm, or"),
                          (lambda: p2p.trace(model, "a"), "a source is traced in small steps")):
        with pytest.raises(UsageError, match=message):
            call()


@pytest.mark.slow
def test_converted_both_ways_it_is_the_same(lcm, tmp_path):
    convert(find(lcm), tmp_path / "one.safetensors")
    convert(find(tmp_path / "one.safetensors"), tmp_path / "back")
    a, b, c = (p2p.load(x, device="cpu") for x in (lcm, tmp_path / "one.safetensors", tmp_path / "back"))
    assert a.sampler == b.sampler == c.sampler == "lcm"
    for other in (b, c):
        assert all(torch.equal(x, y) for x, y in zip(a.unet.state_dict().values(), other.unet.state_dict().values(), strict=True))


def test_other_consistency_grids_are_refused(lcm, tmp_path):
    with pytest.raises(CheckpointError, match="original_inference_steps 100; supported: 50"):
        p2p.load(folder_of(tmp_path, diffusers.LCMScheduler(**TRAINED, original_inference_steps=100)))


FEW = {   # a folder's scheduler, and what it is sampled by: the sampler, steps, guidance and first timesteps
    "tcd": (diffusers.TCDScheduler(**TRAINED), ("tcd", 4, 1.0), (999, 759)),
    "lcm lora, merged": (diffusers.LCMScheduler(**TRAINED), ("lcm", 4, 1.0), (999, 759)),
    "turbo": (diffusers.EulerDiscreteScheduler(**TRAINED, timestep_spacing="trailing"), ("ddim", 50, 7.5), (999, 979)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_a_word_swap_from_the_command_line(tmp_path, capsys, name):
    """The source's row is the source alone."""
    scheduler, wanted, first = FEW[name]
    folder = folder_of(tmp_path, scheduler)
    model = p2p.load(folder, device="cpu")
    assert (model.sampler, model.steps, model.guidance_scale) == wanted
    assert model.schedule(model.steps, model.sampler).timesteps[:2] == first
    size = ["--height", "16", "--width", "16", "--seed", "1", "--model", str(folder), "-o", str(tmp_path / "out")]
    few = ["--steps", "2", "--cfg", "0"] if name == "turbo" else []
    assert main(["edit", "a cat", "a dog", *few, *size]) == 0
    source = capsys.readouterr().out.split()[0]
    assert main(["generate", "a cat", *few, *size]) == 0
    assert p2p.image.open_picture(source).tobytes() == p2p.image.open_picture(capsys.readouterr().out.split()[0]).tobytes()
    settings = json.loads(p2p.image.open_picture(source).info["prompt_to_prompt"])
    assert settings["sampler"] == wanted[0] and settings["steps"] == (2 if few else 4)


@pytest.mark.slow
def test_a_folder_of_turbo_is_known_by_its_name_where_its_config_says_trailing(tmp_path):
    for spacing, few in (("trailing", True), ("leading", False)):
        (tmp_path / spacing).mkdir()
        folder = folder_of(tmp_path / spacing, diffusers.EulerDiscreteScheduler(**TRAINED, timestep_spacing=spacing))
        model = p2p.load(folder.rename(folder.with_name("sd-turbo")), device="cpu")
        assert ((model.steps, model.guidance_scale) == (4, 1.0)) == few == any("few steps by its name" in note for note in model.notes)


@pytest.mark.slow
def test_a_unet_that_predicts_the_picture(tmp_path):
    """One step of Lightning: x_0 from pure noise, on trailing timesteps."""
    folder = folder_of(tmp_path, diffusers.EulerDiscreteScheduler(**TRAINED, timestep_spacing="trailing", prediction_type="sample"))
    model = p2p.load(folder, device="cpu")
    r = p2p.generate(model, "a cat", steps=1, guidance_scale=0, seed=1, height=16, width=16)
    x = draw(model.latent_shape(16, 16), [1], 1)[0]
    x_0 = model.predict(x, 999, model.read(model.condition(["a cat"])))[0]
    first, last = model.schedule(1).levels
    eps = (x - first.alpha * x_0) / first.sigma
    assert model.prediction == "x0" and (r.latents - (last.alpha * x_0 + last.sigma * eps)).abs().max() < 1e-4

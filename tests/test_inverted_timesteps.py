"""Timesteps of a picture's inversion, or of a trace, and of its edits: those that were asked for."""
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.errors import UsageError
from p2p.lists import jobs
from p2p.request.source import METHODS
from p2p.show.pictures import read_settings
from p2p.weights import sealed

LISTED = [900, 600, 250]
ONCE = ("turbo-edit", "null-text")   # slow, or of few steps: their schedule is made where the others' is


@pytest.fixture(scope="module")
def x():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ONCE])
def test_a_spacing_is_that_of_a_model_made_for_it(shallow, x, undecoded, method):
    made_for = replace(shallow, timestep_spacing="trailing")
    told, own = p2p.invert(shallow, x, "a cat", method=method, steps=3, timestep_spacing="trailing"), \
        p2p.invert(made_for, x, "a cat", method=method, steps=3)
    assert torch.equal(told.latents, own.latents)
    assert not torch.equal(told.latents, p2p.invert(shallow, x, "a cat", method=method, steps=3).latents)
    assert torch.equal(p2p.edit(shallow, told, "a dog").latents, p2p.edit(made_for, own, "a dog").latents)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_models_own_timesteps_one_by_one_are_its_schedule(models, undecoded, kind):
    model = models[kind]
    x = torch.rand(1, *model.latent_shape())
    own = model.schedule(3, size=x.shape[2:]).timesteps
    if kind == "flow":   # whose own are no whole numbers
        own = [round(t) for t in own]
    listed = p2p.invert(model, x, "a cat", method="direct", timesteps=own)
    assert listed.steps == 3 and listed.timesteps == tuple(own)
    usual = p2p.invert(model, x, "a cat", method="direct", steps=3)
    assert torch.allclose(listed.latents, usual.latents, atol=0 if kind == "eps" else 0.05)


def test_noise_stands_at_the_levels_of_the_timesteps(shallow):
    inverted = p2p.invert(shallow, torch.zeros(1, 3, 64, 64), "a cat", method="noise", timesteps=LISTED)
    sigma = (1 - shallow.alphas_cumprod[LISTED[::-1]]).sqrt().float()
    ratio = inverted.latents[1:] / inverted.latents[-1:]   # one noise at all levels
    assert torch.allclose(ratio.mean((1, 2, 3)), sigma / sigma[-1], rtol=1e-4)


@pytest.mark.slow
def test_a_source_traced_at_timesteps_is_the_one_that_an_edit_samples(shallow, undecoded):
    traced = p2p.trace(shallow, "a cat", timesteps=LISTED, seed=4)
    once = p2p.edit(shallow, "a cat", "a dog", timesteps=LISTED, seed=4)
    assert torch.allclose(p2p.edit(shallow, traced, "a dog").latents, once.latents, atol=1e-4)
    spaced = p2p.trace(shallow, "a cat", steps=3, timestep_spacing="linspace", seed=4, latents_only=True)
    once = p2p.edit(shallow, "a cat", "a dog", steps=3, timestep_spacing="linspace", seed=4)
    assert torch.allclose(p2p.edit(shallow, spaced, "a dog").latents, once.latents, atol=1e-4)


@pytest.mark.slow
def test_a_traced_picture_is_asked_at_its_own(shallow, x, undecoded):
    inverted = p2p.invert(shallow, x, "a cat", method="direct", timesteps=LISTED)
    traced = p2p.edit(shallow, p2p.trace(shallow, inverted), "a dog").latents
    assert torch.allclose(traced, p2p.edit(shallow, inverted, "a dog").latents, atol=1e-4)


def test_saved_and_loaded_they_are_the_same(shallow, x, tmp_path):
    for how in (dict(timesteps=LISTED), dict(steps=2, timestep_spacing="trailing"), dict(steps=2)):
        inverted = p2p.invert(shallow, x, "a cat", method="ddim", **how)
        inverted.save(tmp_path / "inverted.safetensors")
        assert p2p.Inversion.load(tmp_path / "inverted.safetensors").settings() == inverted.settings()


@pytest.mark.slow
@pytest.mark.parametrize("told, message", [
    ({"timesteps": [900, 600]}, "2 timesteps for 3 steps"), ({"timesteps": [900, "6", 250]}, "timesteps is"),
    ({"timesteps": []}, "timesteps is"), ({"timesteps": 900}, "timesteps is"), ({"timesteps": [True, 6, 2]}, "timesteps is"),
    ({"timestep_spacing": ["leading"]}, "timestep_spacing is"), ({"timestep_spacing": "even"}, "timestep_spacing is"),
    ({"timesteps": [250, 600, 900]}, "timesteps must fall"),
    ({"timesteps": [1000, 6, 2]}, "timesteps must fall"), ({"timesteps": [10**30, 6, 2]}, "timesteps is"),
    ({"timestep_spacing": "trailing"}, "timesteps are given one by one")])
def test_a_file_that_says_others_is_refused(shallow, x, tmp_path, told, message):
    inverted, file = p2p.invert(shallow, x, "a cat", method="ddim", timesteps=LISTED), tmp_path / "inverted.safetensors"
    sealed.save({"latents": inverted.latents}, file, {"inversion": json.dumps(inverted.settings() | told)})
    with pytest.raises(UsageError, match=message):
        p2p.edit(shallow, p2p.Inversion.load(file), "a dog")


BAD = {"sampler 'dpm\\+\\+': a picture is inverted by its method": dict(sampler="dpm++"),
       "timestep_spacing: timesteps are given one by one": dict(timesteps=LISTED, timestep_spacing="trailing"),
       "steps: 3 timesteps are given, not 2": dict(timesteps=LISTED, steps=2), "timesteps must fall": dict(timesteps=LISTED[::-1]),
       "timestep_spacing: karras is of the sampler dpm": dict(timestep_spacing="karras"), "a list of whole numbers": dict(timesteps="900")}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_go_together_is_refused(shallow, x, message):
    with pytest.raises(UsageError, match=message):
        p2p.invert(shallow, x, "a cat", method="ddim", **BAD[message])


def test_its_edits_have_no_others(shallow, x):
    inverted = p2p.invert(shallow, x, "a cat", method="ddim", timesteps=LISTED, sampler="ddim")
    assert p2p.edit(shallow, inverted, "a dog", timesteps=LISTED).settings["timesteps"] == LISTED
    for other in (dict(timesteps=[900, 600, 200]), dict(timestep_spacing="trailing"), dict(sampler="lcm")):
        with pytest.raises(UsageError, match="an inverted or traced source is sampled by ddim, at the timesteps that it was made at"):
            p2p.edit(shallow, inverted, "a dog", **other)


def test_a_late_start_is_said_where_nobody_asked_for_it(shallow, x):
    assert not p2p.invert(shallow, x, "a cat", method="ddim", timesteps=[500, 250]).notes
    notes = p2p.invert(replace(shallow, timestep_spacing="leading"), x, "a cat", method="ddim", steps=3, timestep_spacing="leading").notes
    assert [note for note in notes if note.startswith("3 steps start at t = 667 of 1000")]


@pytest.mark.slow
@pytest.mark.parametrize("how", [dict(timesteps=LISTED), dict(steps=3, timestep_spacing="trailing")], ids=["listed", "spaced"])
def test_in_one_command_in_two_in_a_list_and_again_they_are_the_same(once, tmp_path, how):
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    options = ["--method", "direct"]
    for name, value in how.items():
        options += [f"--{name.replace('_', '-')}", ",".join(map(str, value)) if name == "timesteps" else str(value)]

    def edited(name, *argv):
        assert main([*argv, "-q", "-o", str(tmp_path / name)]) == 0
        made, = (tmp_path / name).glob("*/edit.png")
        return made

    made = [edited("one", "edit", "--image", str(tmp_path / "photo.png"), "a cat", "a dog", *options)]
    assert main(["invert", str(tmp_path / "photo.png"), "a cat", *options, "-q", "-o", str(tmp_path / "inverted")]) == 0
    inverted, = (tmp_path / "inverted").glob("*/inversion.safetensors")
    made += [edited("two", "edit", "--inversion", str(inverted), "a dog"), edited("again", "edit", "--from", str(made[0]))]
    job = {"source": "a cat", "targets": "a dog", "image": "photo.png", "method": "direct"}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(job | how))
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "list"), "-q"]) == 0
    made += list((tmp_path / "list").glob("*/edit.png"))
    assert len({p2p.image.open_picture(p).tobytes() for p in made}) == 1 and len(made) == 4
    for change, read in ((["--steps", "2"], (2, how.get("timestep_spacing"), None)), (["--timesteps", "800,100"], (2, None, [800, 100])),
                         (["--method", "ddim"], (3, how.get("timestep_spacing"), how.get("timesteps")))):
        settings = read_settings(edited(change[1], "edit", "--from", str(made[0]), *change))
        assert tuple(settings["inversion"][k] for k in ("steps", "timestep_spacing", "timesteps")) == read == \
            tuple(settings[k] for k in ("steps", "timestep_spacing", "timesteps"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"timesteps": [900, 400]}, {"steps": 2, "timestep_spacing": "trailing"}], ids=["listed", "spaced"])
def test_a_source_that_is_sampled_again_has_them_too(once, tmp_path, how):
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    job = {"source": "a cat", "targets": "a dog", "image": "photo.png", "method": "ddim", "path": "resampled"}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(job | how))
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "list"), "-q"]) == 0


def test_what_pictures_lack_of_a_lists_sampler_is_left_out_of_them(shallow, tmp_path):
    """The spacing of another sampler, with that sampler."""
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    picture, plain = {"source": "a cat", "targets": "a dog", "image": "photo.png", "method": "ddim"}, {"source": "a cat", "targets": "a dog"}
    file = tmp_path / "jobs.jsonl"
    file.write_text(f"{json.dumps(picture)}\n{json.dumps(plain)}\n")
    told = {"sampler": "dpm++", "timestep_spacing": "karras", "steps": 3}
    pictured, generated = jobs.read(file, shallow, told)
    assert not {"sampler", "timestep_spacing"} & pictured.others.keys() and generated.others == {k: told[k] for k in list(told)[:2]}
    assert [note for note in pictured.notes if "karras is of the sampler dpm++" in note]
    for line, defaults in ((picture | {"timestep_spacing": "karras"}, {}), (picture, {"timestep_spacing": "karras"})):
        file.write_text(json.dumps(line))
        with pytest.raises(UsageError, match="timestep_spacing: .*karras is of the sampler dpm"):
            jobs.read(file, shallow, defaults)


def test_the_models_own_spacing_by_its_name_is_no_other(shallow, x, undecoded):
    inverted = p2p.invert(shallow, x, "a cat", method="ddim", steps=2)
    assert p2p.edit(shallow, inverted, "a dog", timestep_spacing=shallow.timestep_spacing).settings["timestep_spacing"] is None
    with pytest.raises(UsageError, match="at the timesteps that it was made at"):
        p2p.edit(shallow, inverted, "a dog", timestep_spacing="linspace")


def test_what_an_edit_of_it_cannot_read_is_named(shallow, x):
    inverted = p2p.invert(shallow, x, "a cat", method="ddim", steps=2)
    for name in ("sampler", "timestep_spacing", "timesteps"):
        for value in (torch.ones(2).numpy(), {}, [], "x", 3, 10**80, [10**80]):
            with pytest.raises(UsageError, match=name):
                p2p.edit(shallow, inverted, "a dog", **{name: value})

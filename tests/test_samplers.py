"""Samplers and timesteps as settings of a run: whole runs against diffusers' schedulers, with the same noises."""
import json
from dataclasses import replace

import pytest
import torch
from oracles import diffusers

import p2p
from p2p.cli.parser import main
from p2p.errors import UsageError
from p2p.request.start import draw
from p2p.sampler import guide
from p2p.show.pictures import read_settings

TRAINED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
EASY = dict(steps=4, guidance_scale=2.0, seed=3)


def rate(model, x, t):
    """The guided prediction for "a cat"."""
    text = model.read(p2p.model.Conditioning.cat([model.null(1), model.condition(["a cat"])]))
    return guide(*model.predict(x.expand(2, -1, -1, -1), t, text)[0].chunk(2), 2.0)


PEERS = {   # our settings, and diffusers' scheduler, with what `step` takes
    "ddim, leading": (dict(), "DDIM", dict(set_alpha_to_one=False, clip_sample=False), {}),
    "ddim, trailing": (dict(timestep_spacing="trailing"), "DDIM",
                       dict(set_alpha_to_one=False, clip_sample=False, timestep_spacing="trailing"), {}),
    "ddim, listed": (dict(steps=None, timesteps=[900, 500, 20]), "DDIM", None, {}),
    "dpm++": (dict(sampler="dpm++"), "DPMSolverMultistep", dict(timestep_spacing="leading"), {}),
    "dpm++, karras": (dict(sampler="dpm++", timestep_spacing="karras"), "DPMSolverMultistep", dict(use_karras_sigmas=True), {}),
    "dpm++, trailing": (dict(sampler="dpm++", timestep_spacing="trailing"), "DPMSolverMultistep", dict(timestep_spacing="trailing"), {}),
    "lcm": (dict(sampler="lcm"), "LCM", dict(), {}),
    "tcd": (dict(sampler="tcd"), "TCD", dict(), dict(eta=0.3)),
    "tcd, eta 0": (dict(sampler="tcd", eta=0.0), "TCD", dict(), dict(eta=0.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PEERS)
def test_a_run_is_that_of_diffusers(sd1, monkeypatch, case):
    ours, name, settings, extra = PEERS[case]
    trained = {k: v for k, v in TRAINED.items() if name not in ("LCM", "TCD") or k != "steps_offset"}
    size = dict(height=32, width=32)
    r = p2p.generate(sd1, "a cat", **EASY | size | ours)
    noise = draw(sd1.latent_shape(32, 32), [3], 1 + 4)
    x, left = noise[0], iter(noise[1:])
    if settings is None:   # DDIM by hand
        levels = [*(float(sd1.alphas_cumprod[t]) for t in ours["timesteps"]), float(sd1.alphas_cumprod[0])]
        for t, a, b in zip(ours["timesteps"], levels, levels[1:]):
            eps = rate(sd1, x, t)
            x = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
    else:
        peer = getattr(diffusers, f"{name}Scheduler")(**trained, **settings)
        peer.set_timesteps(4)
        if name in ("LCM", "TCD"):
            monkeypatch.setattr(f"diffusers.schedulers.scheduling_{name.lower()}.randn_tensor", lambda *a, **k: next(left))
        for t in peer.timesteps:
            x = peer.step(rate(sd1, x, int(t)), t, x, **extra).prev_sample
    assert (r.latents - x).abs().max() < 1e-4 * x.std()


@pytest.mark.slow
def test_turbo_is_ddim_with_fresh_noise_on_trailing_timesteps(sd1, monkeypatch):
    """Euler ancestral, which Turbo models are sampled by, is eta 1."""
    peer = diffusers.EulerAncestralDiscreteScheduler(**TRAINED, timestep_spacing="trailing")
    peer.set_timesteps(4)
    noise = draw(sd1.latent_shape(32, 32), [3], 1 + 4)
    left = iter(noise[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *a, **k: next(left))
    x = noise[0] / sd1.alphas_cumprod[999] ** 0.5
    for t in peer.timesteps:
        x = peer.step(rate(sd1, peer.scale_model_input(x, t).float(), int(t)), t, x).prev_sample
    sd1_final = replace(sd1, final_alpha=1.0)
    r = p2p.generate(sd1_final, "a cat", **EASY, height=32, width=32, eta=1.0, timestep_spacing="trailing")
    assert (r.latents - x).abs().max() < 1e-4 * x.std()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(sampler="dpm++"), dict(sampler="lcm"), dict(sampler="tcd"), dict(timesteps=[999, 500, 20], steps=None),
                                      dict(timestep_spacing="trailing")], ids=str)
def test_row_0_of_an_edit_is_the_source_alone(narrow, settings):
    source, settings = "a cat on grass", EASY | settings
    r = p2p.edit(narrow, source, "a dog on grass", **settings)
    assert torch.allclose(r.latents[:1], p2p.generate(narrow, source, **settings).latents, atol=1e-5)
    assert r.settings["sampler"] == settings.get("sampler", "ddim")


BAD = {
    "sampler .heun. is not known": dict(sampler="heun"), "eta 0.5: dpm.. adds no noise": dict(sampler="dpm++", eta=0.5),
    "eta 0: lcm draws": dict(sampler="lcm", eta=0), "lcm visits the timesteps": dict(sampler="lcm", timestep_spacing="trailing"),
    "timesteps are given one by one": dict(timesteps=[900, 20], timestep_spacing="trailing"),
    "karras. is not known": dict(timestep_spacing="karras"), "must fall": dict(timesteps=[20, 900]),
    "2 timesteps are given, not 7": dict(timesteps=[900, 20], steps=7), "whole numbers is needed": dict(timesteps="900"),
    "at most with|from 1 to 50": dict(sampler="tcd", steps=51),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_go_together_is_refused(narrow, message):
    with pytest.raises(UsageError, match=message):
        p2p.edit(narrow, "a cat", "a dog", **BAD[message])


def test_four_steps_unless_told(narrow):
    assert p2p.generate(narrow, "a cat", sampler="lcm").settings["steps"] == 4


def test_an_inverted_source_has_its_own(narrow):
    inv = p2p.invert(narrow, torch.zeros(1, 3, 16, 16), "a cat", method="ddim", steps=2)
    with pytest.raises(UsageError, match="sampler: an inverted or traced source is sampled by ddim"):
        p2p.edit(narrow, inv, "a dog", sampler="dpm++")


@pytest.mark.slow
def test_from_the_command_line_from_a_list_and_again(tmp_path, capsys):
    how = ["--sampler", "dpm++", "--timestep-spacing", "karras", "--steps", "3", "--seed", "1"]
    assert main(["edit", "a cat", "a dog", *how, "-o", str(tmp_path / "a")]) == 0
    made = capsys.readouterr().out.split()[1]
    assert read_settings(made)["timestep_spacing"] == "karras"
    assert main(["edit", "--from", made, "-o", str(tmp_path / "b")]) == 0
    again = capsys.readouterr().out.split()[1]
    job = {"source": "a cat", "targets": "a dog", "steps": 3, "seed": 1, "sampler": "dpm++", "timestep_spacing": "karras"}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(job) + "\n" + json.dumps(job | {"timestep_spacing": None, "timesteps": [900, 500, 3]}) + "\n")
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "c")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "c" / "results.jsonl").read_text().splitlines()]
    pixels = [p2p.image.open_picture(p).tobytes() for p in (made, again, tmp_path / "c" / rows[0]["images"][1])]
    assert pixels[0] == pixels[1] == pixels[2]
    assert read_settings(tmp_path / "c" / rows[1]["images"][1])["timesteps"] == [900, 500, 3]


@pytest.mark.parametrize("argv, message", [
    (["edit", "a", "b", "--timesteps", "9,x"], "expected whole numbers"),
    (["edit", "a", "b", "--image", "x.png", "--sampler", "dpm++"], "--sampler: not with --image"),
    (["invert", "x.png", "a", "--timesteps", "3,x"], "expected whole numbers"),
    (["invert", "x.png", "a", "--sampler", "ddim"], "--sampler: not with p2p invert")])
def test_options_that_do_not_fit_are_refused(capsys, argv, message):
    assert main(argv) == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_prompts_run_together_keep_their_own_negatives(narrow):
    from p2p.lists.together import edit_together
    jobs = [dict(source="a cat", targets="a dog", negative_prompt=n, **EASY) for n in ("a bird", None)]
    together = edit_together(narrow, jobs)
    for job, found in zip(jobs, together):
        assert torch.allclose(found.latents, p2p.edit(narrow, **job).latents, atol=1e-4)

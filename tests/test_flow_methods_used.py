"""Inversions and editors of flows are used as all others: settings, blends, traces, notes, replays, lists."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_flow_methods import SIDE, SOURCE, STEPS, TARGET, edited

import p2p
from p2p.cli.parser import main
from p2p.image import to_pil
from p2p.lists import jobs
from p2p.models.mmdit import Flux
from p2p.weights.emoji.world import render, sample

pytestmark = pytest.mark.slow


OWN = {"gamma": ("rf-inversion", 0.2), "control": ("rf-inversion", 0.3), "control_steps": ("rf-inversion", 0.7),
       "n_avg": ("flow-edit", 2), "n_min": ("flow-edit", 1)}


@pytest.mark.parametrize("name", OWN)
def test_a_setting_acts_is_recorded_and_is_refused_elsewhere(models, picture, tmp_path, name):
    method, value = OWN[name]
    more = {"control_steps": 0.7} if name == "control" else {}   # 0.25 of 3 steps is none
    plain, other = (p2p.invert(models["flow"], picture, SOURCE, method=method, steps=STEPS, **more | given)
                    for given in ({}, {name: value}))
    assert not torch.equal(edited(models["flow"], plain), edited(models["flow"], other))
    assert other.settings()[name] == value and plain.settings()[name] is not None
    other.save(tmp_path / "i.safetensors")
    again = p2p.Inversion.load(tmp_path / "i.safetensors")
    assert again.settings() == other.settings() and torch.equal(edited(models["flow"], again), edited(models["flow"], other))
    with pytest.raises(p2p.UsageError, match=f"{name}: direct inversion does not read it"):
        p2p.invert(models["flow"], picture, SOURCE, method="direct", **{name: value})
    for wrong in (-1, "x", 2**20):
        with pytest.raises(p2p.UsageError, match=name):
            p2p.invert(models["flow"], picture, SOURCE, method=method, steps=STEPS, **{name: wrong})
    replace(other, **{name: None}).save(tmp_path / "broken.safetensors")
    with pytest.raises(p2p.UsageError, match=f"{name} is None, of the method {method}"):
        p2p.Inversion.load(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("kind, method", [("eps", "rf-solver"), ("flow", "fireflow"), ("flow", "rf-inversion")])
def test_outside_of_a_blend_stands_the_picture(models, picture, kind, method):
    """Stored latents are those of every call, midpoints too; a blend that acts at midpoints is not undone by the next step."""
    inv = p2p.invert(models[kind], picture, SOURCE, method=method, steps=STEPS)
    mask = torch.zeros(SIDE, SIDE)
    mask[: SIDE // 2] = 1
    r = p2p.edit(models[kind], inv, TARGET, local_blend=p2p.LocalBlend(mask=mask, start=0.0))
    assert torch.equal(r.latents[1][:, SIDE // 2:], picture[0][:, SIDE // 2:])
    assert len(inv.latents) == inv.calls + 1 and r.settings["inversion"]["steps"] == STEPS


@pytest.mark.parametrize("method", ["flow-edit", "ddcm"])
def test_a_followed_source_is_traced(models, picture, method):
    own = {"n_avg": 2} if method == "flow-edit" else {}
    inv = p2p.invert(models["eps"], picture, SOURCE, method=method, steps=STEPS, **own)
    plain, traced = (p2p.edit(models["eps"], each, TARGET).latents for each in (inv, p2p.trace(models["eps"], inv)))
    assert (plain - traced).abs().max() < 1e-3


def test_uni_edit_refuses_what_it_does_not_read(models, picture):
    inv = p2p.invert(models["flow"], picture, SOURCE, method="uni-inv", steps=STEPS)
    for settings, said in ((dict(negative_prompt="x"), "negative_prompt: of guidance"), (dict(proximal=("l0", 0.7)), "proximal: of"),
                           (dict(cross_replace_steps=0.2), "cross_replace_steps: of Prompt-to-Prompt")):
        with pytest.raises(p2p.UsageError, match=said):
            p2p.edit(models["flow"], inv, TARGET, editor=p2p.UniEdit(), **settings)
    with pytest.raises(p2p.UsageError, match="invert one first"):
        p2p.edit(models["flow"], SOURCE, TARGET, editor=p2p.UniEdit())
    r = p2p.edit(models["flow"], inv, TARGET, editor=p2p.UniEdit(), guidance_scale=2.0)
    assert any("guidance_scale changes nothing: editor UniEdit" in note for note in r.notes)
    assert not any("UniEdit" in note for note in p2p.edit(models["flow"], inv, TARGET, editor=p2p.UniEdit()).notes)


def test_distilled_guidance_is_an_input_of_both_of_uni_edits_rows(models, picture):
    """Rows without it would be of another model."""
    flow = models["flow"]
    net = Flux(replace(flow.unet.config, guidance=True))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    model = replace(flow, unet=net.requires_grad_(False).eval())
    inv = p2p.invert(model, picture, SOURCE, method="uni-inv", steps=STEPS)
    made = [p2p.edit(model, inv, [TARGET, SOURCE], editor=p2p.UniEdit(), guidance_scale=g).latents for g in (1.0, 4.0)]
    assert (made[0][1] - made[1][1]).abs().max() > 1e-3
    assert all((r[2] - r[0]).abs().max() < 1e-4 for r in made)
    led = p2p.edit(model, inv, TARGET, editor=p2p.UniEdit(), guidance_scale=4.0)
    assert not any("guidance_scale changes nothing" in note for note in led.notes)   # it does


def test_a_flow_that_begins_late_says_so(models):
    short, whole = (p2p.generate(models["flow"], SOURCE, timesteps=steps, height=32, width=32) for steps in ([300, 100], [1000, 500]))
    assert any("the first timestep is 300 of 1000: pure noise is taken for" in note for note in short.notes)
    assert not any("first timestep" in note for note in whole.notes)


def test_a_controlled_step_of_no_length_divides_by_nothing(models, picture):
    """The last one where steps are spaced from t = 0 on, and the picture is taken to be at its level."""
    model = replace(models["eps"], prediction="v", timestep_spacing="linspace", final_alpha=None)
    inv = p2p.invert(model, picture, SOURCE, method="rf-inversion", steps=3, control_steps=1.0)
    assert all(step.x_0.isfinite().all() for step in p2p.steps(model, inv, TARGET))


def test_the_authors_guidance_of_turbo_edit_is_not_warned_against(models, picture):
    model = replace(models["eps"], guidance_scale=1.0, steps=4)
    said = {method: p2p.edit(model, p2p.invert(model, picture, SOURCE, method=method), TARGET, guidance_scale=1.5).notes
            for method in ("turbo-edit", "direct")}
    assert ["made to run without guidance" in " ".join(notes) for notes in said.values()] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--method", "rf-inversion", "--gamma", "0.3", "--control", "0.8", "--control-steps", "0.5"],
    ["--method", "flow-edit", "--n-avg", "2", "--n-min", "1"], ["--method", "uni-inv", "--editor", "uni-edit"], ["--method", "rf-solver"]])
def test_a_picture_is_replayed(models, monkeypatch, tmp_path, capsys, options):
    monkeypatch.setattr("p2p.load", lambda *given, **more: models["flow"])
    to_pil(render(sample(1, 5, "held out"), SIDE)[0])[0].save(tmp_path / "photo.png")
    argv = ["edit", SOURCE, TARGET, "--image", str(tmp_path / "photo.png"), "--steps", "3", "--height", "16", "--width", "16", *options]

    def made(*argv):
        assert main([*argv, "-o", str(tmp_path / "out")]) == 0
        return capsys.readouterr().out.split()[2]   # after the picture and its reconstruction

    first = made(*argv)
    assert Path(first).read_bytes() == Path(made("edit", "--from", first)).read_bytes()


def test_a_job_holds_them(models, tmp_path):
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "photo.png")
    entry = {"source": SOURCE, "targets": [TARGET], "image": "photo.png", "steps": 3, "height": 16, "width": 16}
    lines = [{"method": "flow-edit", "n_avg": 2}, {"method": "flow-edit"}, {"method": "rf-inversion", "control": 0.5},
             {"method": "uni-inv", "editor": {"name": "uni-edit", "omega": 2.0}}, {"method": "direct"}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(json.dumps(entry | line) for line in lines))
    read = jobs.read(tmp_path / "jobs.jsonl", models["flow"])
    assert len({job.id for job in read}) == 5 and read[0].inversion(models["flow"])["n_avg"] == 2
    assert not {"n_avg", "control", "gamma"} & read[4].settings().keys()
    (tmp_path / "jobs.jsonl").write_text(json.dumps(entry | {"method": "direct", "n_avg": 2}))
    with pytest.raises(p2p.UsageError, match="n_avg: direct inversion does not read it"):
        jobs.read(tmp_path / "jobs.jsonl", models["flow"])

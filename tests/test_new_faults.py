"""Faults that an examiner found in weights, layers, samplers, negative prompts and steps: each its right value."""
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import p2p
from p2p import align
from p2p.cli.parser import main
from p2p.editors import find_editor
from p2p.errors import UsageError
from p2p.lists.together import edit_together
from p2p.models.text import tokens
from p2p.request.emphasis import equalizer, read
from p2p.request.inverting import expected, schedule_of
from p2p.request.solvers import descent
from p2p.request.source import METHODS
from p2p.show.pictures import read_settings, save_png
from p2p.show.sweep import sweep
from p2p.weights import fill

EASY = dict(steps=2, seed=1)


@pytest.mark.slow
def test_escaped_brackets_of_a_target_are_text_and_replay(narrow, tmp_path, capsys):
    r = p2p.edit(narrow, "a cat on grass", r"a \(dog\) on (grass:1.5)", **EASY)
    assert r.edits[0].equalizer == {"grass": 1.5} and not any("weights on" in note for note in r.notes)
    plain = narrow.condition(["a (dog) on grass"]).context
    assert torch.allclose(p2p.request.emphasis.condition(narrow, [r.edits[0].prompt], 64, 64).context, plain, atol=1e-6)
    assert main(["edit", "a cat", r"a \(dog\)", "--steps", "1", "--seed", "1", "-o", str(tmp_path)]) == 0
    made = capsys.readouterr().out.split()[1]
    assert main(["edit", "--from", made, "-o", str(tmp_path)]) == 0
    assert Image.open(made).tobytes() == Image.open(capsys.readouterr().out.split()[1]).tobytes()


@pytest.mark.slow
def test_weights_are_refused_beside_other_editors(narrow):
    editor = find_editor("masactrl")
    with pytest.raises(UsageError, match='brackets weigh attention.*emphasis="embedding"'):
        p2p.edit(narrow, "a cat", "a (dog:1.5)", editor=editor, **EASY)
    weighed = p2p.edit(narrow, "a cat", "a (dog:1.5)", emphasis="embedding", editor=editor, **EASY)
    assert not torch.allclose(weighed.latents, p2p.edit(narrow, "a cat", "a dog", editor=editor, **EASY).latents, atol=1e-4)
    plain = p2p.edit(narrow, "a cat", "a dog", emphasis="embedding", editor=editor, **EASY)
    assert any("emphasis changes nothing" in note for note in plain.notes) and not any("emphasis" in note for note in weighed.notes)


@pytest.mark.slow
def test_text_is_weighed_beside_another_editor_wherever_it_is_said(tmp_path, capsys):
    argv = ["edit", "a cat", "a (dog:1.5)", "--editor", "masactrl", "--steps", "1", "--seed", "1", "-o", str(tmp_path / "edit"), "--device", "cpu"]
    assert main(argv) == 2 and "--emphasis embedding" in capsys.readouterr().err
    assert main([*argv, "--emphasis", "embedding"]) == 0
    made = read_settings(next((tmp_path / "edit").rglob("edit.png")))
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"source": "a cat", "targets": ["a (dog:1.5)"], "editor": "masactrl", "steps": 1, "seed": 1}) + "\n")
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "--emphasis", "embedding", "-q", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert read_settings(next((tmp_path / "out").rglob("edit.png")))["targets"] == made["targets"]


@pytest.mark.parametrize("prompt", ["cat 2 and a (cat:3)", "route 2 and (route:1.4) 66", "day 1, (day:1.3) 2"])
def test_a_weight_lands_on_its_own_word(prompt):
    t = tokens(read(prompt).text)
    (name, _), = equalizer(read(prompt), tokens).items()
    word = name.partition("#")[0]
    second = [i for i, (s, e) in enumerate(t.spans) if t.text[s:e] == word][1]
    assert align.word_tokens(t, name, 77) == [second]
    rooms = tokens("room #2 and room #3")
    assert [align.word_tokens(rooms, f"room #{n}", 77) for n in (2, 3)] == [[1, 2, 3], [5, 6, 7]]


def test_a_negative_prompt_that_no_row_of_the_source_reads_is_refused(narrow):
    inv = p2p.invert(narrow, torch.zeros(1, 3, 64, 64), "a cat", method="direct", steps=2)
    with pytest.raises(UsageError, match="given for the source"):
        p2p.edit(narrow, inv, "a dog", negative_prompt=["a bird", "a tree"])
    p2p.edit(narrow, inv, "a dog", negative_prompt=["", "a tree"])


def test_so_it_is_before_a_picture_is_inverted_for_it(tmp_path, capsys, once, monkeypatch):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "x.png")
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("the network ran"))
    assert main(["edit", "a cat", "a dog", "--image", str(tmp_path / "x.png"), "--method", "direct", "--negative", "a bird",
                 "--negative", "a tree", "-o", str(tmp_path / "out")]) == 2
    assert "given for the source" in capsys.readouterr().err


def test_an_editor_whose_fields_cannot_be_recorded_is_refused(narrow):
    class Mine:
        guided_source, source_prompt = True, None

        def plan(self, unet, batch, steps, device):
            return [None] * steps

    with pytest.raises(UsageError, match="editor: Mine is no dataclass"):
        p2p.edit(narrow, "a cat", "a dog", editor=Mine(), steps=1)
    p2p.edit(narrow, "a cat", "a dog", editor=dataclass(Mine)(), steps=1)
    with pytest.raises(UsageError, match=r"source_prompt is needed, such as p2p.MasaCtrl\(\)"):
        p2p.edit(narrow, "a cat", "a dog", editor=p2p.MasaCtrl, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda s: setattr(s, "x", s.x + 0.3), lambda s: s.x.add_(0.3)])
def test_steps_changed_in_python_are_recorded_and_not_replayed(narrow, tmp_path, capsys, change):
    r = p2p.edit(narrow, "a cat", "a dog", on_step=change, **EASY)
    save_png(tmp_path / "a.png", r.images[1], r.settings)
    assert main(["edit", "--from", str(tmp_path / "a.png"), "-o", str(tmp_path)]) == 2
    assert "changed between steps" in capsys.readouterr().err
    assert "changed_between_steps" not in p2p.edit(narrow, "a cat", "a dog", on_step=lambda s: None, **EASY).settings


@pytest.mark.slow
def test_a_last_step_is_as_the_others(narrow):
    r = p2p.edit(narrow, "a cat", "a dog", on_step=lambda s: setattr(s, "x", s.x.double().requires_grad_()), **EASY)
    assert r.latents.dtype == torch.float32 and not r.latents.requires_grad
    x = torch.zeros(2, 3, 64, 64)
    for bad, said in ((x.long(), r"torch.int64 of \(2, 3, 64, 64\)"), (x.to("meta"), "meta"), (x.to_sparse(), "torch.sparse_coo"),
                      (torch.nested.nested_tensor([x[0], x[0, :, :9]]), "nested"), (x[:1], r"of \(1, 3, 64, 64\)"), (None, "None")):
        with pytest.raises(UsageError, match=rf"step.x must be a tensor of floating-point numbers \(2, 3, 64, 64\), not .*{said}"):
            p2p.edit(narrow, "a cat", "a dog", on_step=lambda s, bad=bad: setattr(s, "x", bad), **EASY)


@pytest.mark.parametrize("bad, said", [(lambda x: x.to("meta"), "on meta, without values"), (lambda x: x.to_sparse(), "sparse_coo"),
                                       (lambda x: torch.nested.nested_tensor([x, x]), "nested"), (lambda x: x.to(torch.complex64), "complex"),
                                       (lambda x: x.to(torch.float8_e4m3fn), "fp8")])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_tensors_whose_numbers_are_not_there_are_named(narrow, bad, said):
    x, mask = bad(torch.zeros(1, 3, 64, 64)), bad(torch.zeros(4, 4))
    for ask in (lambda: p2p.generate(narrow, "a cat", steps=1, x_T=x), lambda: p2p.edit(narrow, "a cat", "a dog", steps=1, x_T=x),
                lambda: p2p.trace(narrow, "a cat", steps=1, x_T=x), lambda: p2p.invert(narrow, x, "a cat", steps=1),
                lambda: p2p.edit(narrow, "a cat", "a dog", steps=1, local_blend=p2p.LocalBlend(mask=mask, start=0.0))):
        with pytest.raises(UsageError, match=said):
            ask()


def test_an_x_that_was_deleted(narrow):
    with pytest.raises(UsageError, match="step.x must be a tensor .* not None"):
        p2p.edit(narrow, "a cat", "a dog", on_step=lambda s: delattr(s, "x"), **EASY)


def test_other_noise_levels_are_not_run_together(narrow):
    karras = dict(source="a cat", targets="a dog", sampler="dpm++", timestep_spacing="karras", steps=4)
    listed = dict(source="a cat", targets="a dog", sampler="dpm++", timesteps=list(narrow.schedule(4, "dpm++", "karras").timesteps))
    with pytest.raises(UsageError, match="same noise levels"):
        edit_together(narrow, [karras, listed])


@pytest.mark.slow
def test_dpm_begins_where_there_is_nothing_but_noise():
    """By DDIM's step; its second one, which would look back through an infinite step, is of first order."""
    model = p2p.load("emoji", device="cpu", zero_snr=True)
    first, second = (step.x_0 for step in p2p.steps(model, "a cat", "a dog", sampler="dpm++", timestep_spacing="trailing", steps=2))
    assert first.isfinite().all() and second.isfinite().all() and second.std() > 0.1


@pytest.mark.slow
def test_a_step_of_an_inversion_that_leads_to_nothing_but_noise_is_said():
    model = replace(p2p.load("emoji", device="cpu", zero_snr=True), timestep_spacing="trailing")
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for method, skip, said in (("ddim", 0, True), ("ddim", 1, False), ("fixed-point", 0, True), ("direct", 0, True), ("direct", 1, False)):
        inversion = p2p.invert(model, noise, "a cat", method=method, steps=4, skip=skip)
        still = (inversion.latents[-1] - inversion.latents[-2]).abs().max() < 1e-5   # what the note says
        assert any("its last step leads to nothing but noise" in note for note in inversion.notes) == said == still
    flow = p2p.invert("emoji-flow", noise, "a cat", method="ddim", steps=2)   # which ends in noise and stands nowhere
    assert not any("nothing but noise" in note for note in flow.notes) and (flow.latents[-1] - flow.latents[-2]).abs().max() > 0.1


def test_a_share_of_steps_is_not_rounded_down_by_a_rounding_error(narrow):
    planned = expected(narrow, "a cat", method="rf-inversion", steps=100, control_steps=0.29)
    assert planned.control_calls == 29 and int(0.29 * 100) == 28
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2p.request.solvers.controlled", lambda x, v, *_: drawn.append(1) or v)
        step = descent(narrow, replace(planned, latents=torch.zeros(101, 3, 8, 8)), schedule := schedule_of(narrow, planned, (8, 8)))
        for i in range(schedule.steps):
            step(i, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), None)
    assert len(drawn) == 29


def test_a_stage_without_text_enlarges_weighted_prompts(narrow):
    small = p2p.generate(narrow, "a (cat:1.5)", **EASY)
    assert p2p.upscale("emoji-upscaler", small, steps=1).images[0].width == 4 * small.images[0].width


def test_sweeps_over_layers_in_every_form(narrow):
    forms = [None, ("up", "mid"), {"cross": "up"}, (0, 0.5), "down"]
    assert len(sweep(narrow, "a cat", "a dog", {"layers": forms}, steps=1).runs[0].images) == 6
    with pytest.raises(UsageError, match="the sweep is over layers"):
        sweep(narrow, "a cat", p2p.Edit("a dog", layers="up"), {"layers": ["mid"]}, steps=1)


def test_timesteps_of_numpy_are_recorded(narrow):
    r = p2p.generate(narrow, "a cat", timesteps=[np.int64(900), np.int64(20)])
    assert json.loads(json.dumps(r.settings))["timesteps"] == [900, 20]


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [["a (ca)t", "a dog"], ["a cat", "a (do)g", "--emphasis", "embedding"],
                                     ["a cat", "a dog", "--negative", "(ug)ly"]])
def test_parts_of_words_are_refused_before_a_picture_is_inverted(tmp_path, monkeypatch, capsys, prompts):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("the network ran"))
    assert main(["edit", *prompts, "--image", str(tmp_path / "a.png"), "-o", str(tmp_path)]) == 2
    assert "part of a word" in capsys.readouterr().err


def noted(model, *args, **settings):
    return " ".join(p2p.edit(model, *args, **EASY | settings).notes)


@pytest.mark.slow
def test_notes_are_true(narrow):
    assert "changes nothing" not in noted(narrow, "a (cat:1.5) on grass", "a cat on grass")
    assert "changes nothing" not in noted(narrow, "a cat on grass", p2p.Edit("a (cat:1.5) on grass", emphasis="embedding"))
    assert "emphasis changes nothing" in noted(narrow, "a cat", p2p.Edit("a dog", emphasis="embedding"))
    assert "layers changes nothing: all layers are chosen" in noted(narrow, "a cat", "a dog", layers=(0.0, 1.0))
    nothing, cross, down = "change nothing: nothing is injected there", {"cross": "up"}, {"self": "down"}
    closed, opened = {"cross_replace_steps": 0.0, "self_replace_steps": 0.0}, {"cross_replace_steps": 1.0, "self_replace_steps": 1.0}
    for windows, layers, idle in ((closed | {"self_replace_steps": 1.0}, cross, f"layers of cross-attention {nothing}"),
                                  (opened | {"self_replace_steps": 0.0}, cross | down, f"layers of self-attention {nothing}"),
                                  (closed, "up", "layers changes nothing: nothing is injected in any step"),
                                  (closed | {"self_replace_steps": 1.0}, "up", None), (opened, cross | down, None)):
        said = noted(narrow, "a cat", "a dog", layers=layers, **windows)
        assert idle in said if idle else "layers" not in said
    assert "has never seen zebra" in noted(narrow, "a cat", "a dog", negative_prompt="a zebra")
    assert 'a weight is written "(word:1.3)"' in noted(narrow, "a cat", "a (dog:1e3)")
    assert "pure noise is taken for a picture of that level" in " ".join(p2p.generate(narrow, "a cat", timesteps=[100, 50]).notes)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_windows_over_the_schedule_count_calls_of_the_network(narrow, method):
    """A midpoint is a call of its own; without a step left out both countings are one."""
    inversion = p2p.invert(narrow, Image.new("RGB", (64, 64), "red"), "a cat", method=method, steps=4, skip=0)
    run, schedule = (p2p.edit(narrow, inversion, "a dog", windows_over=over).latents for over in ("run", "schedule"))
    assert torch.equal(run, schedule)


@pytest.mark.slow
def test_a_flow_methods_own_settings_are_changed_by_from(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    assert main(["edit", "--image", str(tmp_path / "p.png"), "a cat", "a dog", "--method", "rf-inversion", "--steps", "3", "-o", str(tmp_path)]) == 0
    made = next(p for p in capsys.readouterr().out.split() if p.endswith("edit.png"))
    assert main(["edit", "--from", made, "--gamma", "0.1", "-o", str(tmp_path)]) == 0
    again = next(p for p in capsys.readouterr().out.split() if p.endswith("edit.png"))
    assert read_settings(again)["inversion"]["gamma"] == 0.1 and Image.open(again).tobytes() != Image.open(made).tobytes()
    assert main(["edit", "--from", made, "--n-avg", "2", "-o", str(tmp_path)]) == 2 and "n_avg" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["masactrl", "plug-and-play"])
def test_an_edit_by_another_editor_replays(tmp_path, capsys, editor):
    assert main(["edit", "a cat", "a dog", "--editor", editor, "--steps", "2", "--seed", "1", "-o", str(tmp_path)]) == 0
    made = next(p for p in capsys.readouterr().out.split() if p.endswith("edit.png"))
    settings = read_settings(made)
    settings["targets"][0]["self_max_tokens"] = 1024   # as it was recorded before
    save_png(Path(made), Image.open(made), settings)
    assert main(["edit", "--from", made, "-o", str(tmp_path)]) == 0
    again = next(p for p in capsys.readouterr().out.split() if p.endswith("edit.png"))
    assert Image.open(again).tobytes() == Image.open(made).tobytes()


def test_what_a_flow_cannot_do_is_refused_by_its_name(flow_lora, tmp_path, capsys):
    with pytest.raises(p2p.CheckpointError, match="no LoRA is merged"):
        p2p.load("emoji-flow", lora=flow_lora, device="cpu")
    (tmp_path / "p.jsonl").write_text('{"caption": "a cat", "edit": "x", "output": "a dog"}\n')
    assert main(["dataset", "--recipe", "ip2p", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--model", "emoji-flow"]) == 2
    assert "take the recipe p2p" in capsys.readouterr().err


@pytest.fixture
def flow_lora(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({f"lora_unet_x.lora_{part}.weight": torch.zeros(2, 2) for part in ("up", "down")}, file)
    return file


@pytest.mark.slow
def test_a_preview_leaves_out_the_same_share_of_the_steps(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    assert main(["edit", "--image", str(tmp_path / "p.png"), "a cat", "a dog", "--skip", "25", "--preview", "-o", str(tmp_path / "o")]) == 0
    file, = (tmp_path / "o").rglob("preview.png")
    assert (read_settings(file)["inversion"]["steps"], read_settings(file)["inversion"]["skip"]) == (10, 5)


def test_fp8_in_a_part_of_a_folder_is_named():
    """It ended in a traceback: the library has no least and greatest of such numbers."""
    part = SimpleNamespace(file=MappedTensors(a=torch.zeros(2, 2).to(torch.float8_e4m3fn)))
    source = SimpleNamespace(keys=["a"], share=(0, 1), swapped=False, transposed=False)
    with pytest.raises(p2p.CheckpointError, match="m.safetensors: a is fp8; use the fp16"):
        fill._tensor(part, source, torch.zeros(2, 2))


class MappedTensors(dict):
    path = Path("m.safetensors")


def test_a_fault_is_named_once_and_in_the_words_of_its_user(narrow, tmp_path, capsys):
    """The field's name stands there once, lists and mappings are written out, a path is no prompt."""
    jobs = [{"editor": {"name": "masactrl", "start": 7}}, {"layers": {"self": ["nowhere", [0.9, 0.95]]}}]
    (tmp_path / "j.jsonl").write_text("\n".join(json.dumps({"source": "a cat", "targets": ["a dog"], **job}) for job in jobs))
    assert main(["batch", str(tmp_path / "j.jsonl"), "-o", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "line 1: editor: start must lie" in said and "line 2: layers: no layer" in said and "by 'nowhere', [0.9, 0.95];" in said
    assert "cross_replace_steps 0.8, of 'beach' 0.4" in noted(narrow, "a cat on the grass", "a cat on the beach")
    with pytest.raises(UsageError, match="a path would be read as a prompt"):
        p2p.edit(narrow, str(tmp_path / "inverted.safetensors"), "a dog")


@pytest.mark.slow
def test_the_note_on_a_scope_says_how_much_its_mask_lets_change(tmp_path, capsys):
    """What lies outside of the words' own regions, and what the mask let through, are two shares."""
    assert main(["edit", "a cat on grass", "a cat on grass at night", "--scope", "cat", "--steps", "3", "-o", str(tmp_path)]) == 0
    assert "maps of these words are weak" in (said := capsys.readouterr().err) and "its mask let " in said

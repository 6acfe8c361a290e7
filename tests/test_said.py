"""What a user should hear before the first step: weights that break pictures, brackets that hold no word, what a trace reads."""
from dataclasses import replace

import pytest
import torch
from PIL import Image

import p2p
from p2p.errors import UsageError
from p2p.image import to_pil
from p2p.request.prompts import check
from p2p.show.sweep import sweep
from p2p.weights.emoji.world import render, sample


@pytest.mark.parametrize("edit, word", [(p2p.Edit("a cat on grass", equalizer={"grass": -1.0}), "grass x -1"),
                                        ("a (cat:-0.5) on grass", "cat x -0.5")])
def test_a_weight_below_0_is_said_to_break_pictures(narrow, edit, word):
    notes = p2p.edit(narrow, "a cat on grass", edit, steps=2).notes
    assert sum(f"weights below 0 ({word})" in note for note in notes) == 1


@pytest.mark.slow
def test_a_weight_below_0_on_the_embedding_too(narrow):
    assert any("weights below 0 (cat x -2)" in n for n in p2p.generate(narrow, "a (cat:-2) on grass", steps=1).notes)
    for weight in (0, 0.5, 2):
        r = p2p.edit(narrow, "a cat on grass", "a cat on grass", equalizer={"cat": weight}, steps=1)
        assert not any("below 0" in n for n in r.notes)
    runs = sweep(narrow, "a cat on grass", "a cat on grass", {"weight:cat": [-1, 1.5]}, steps=1).runs
    assert any("weights below 0 (cat x -1)" in n for n in runs[0].notes)


@pytest.mark.parametrize("prompt, shown", [("a (:1.3) cat", "(:1.3)"), ("a () cat", "()"), ("a [ ] cat", "[ ]"),
                                           ("a ((:2)) cat", "((:2)"), ("a cat ( : -1 )", "( : -1 )")])
def test_brackets_without_a_word_are_named(prompt, shown):
    assert any(f"{shown} holds no word" in note for note in check(prompt))


@pytest.mark.parametrize("prompt", ["a (cat:1.3)", r"a \() cat", "a ( cat )", "a (cat) [here]", r"a (\(:1.3)", "((a):1.3)"])
def test_brackets_that_hold_one_are_not(prompt):
    assert not any("holds no word" in note for note in check(prompt))


@pytest.mark.slow
def test_a_trace_says_what_an_edit_says_of_its_source(narrow):
    source = "a (cat:1.2) on () unicorn grass"
    traced = p2p.trace(narrow, source, steps=7, negative_prompt="", latents_only=True)
    said = p2p.generate(narrow, source, steps=7, negative_prompt="").notes
    assert len(said) >= 5 and [n for n in said if n not in narrow.notes] == list(traced.notes)
    edited = p2p.edit(narrow, traced, "a dog on grass").notes
    assert set(traced.notes) <= set(edited) and len(edited) == len(set(edited))


@pytest.mark.slow
@pytest.mark.parametrize("own, asked", [(1.0, 5.0), (1.0, None), (7.5, 5.0)])
def test_guidance_of_a_model_made_to_run_without_it(narrow, own, asked):
    """schnell, Turbo, Lightning ...: it may be asked for, and acts."""
    r = p2p.edit(replace(narrow, guidance_scale=own), "a cat", "a dog", steps=1, guidance_scale=asked)
    assert any("made to run without guidance" in note for note in r.notes) == (own == 1 and asked is not None)
    assert r.rows == (2 if own == 1 and asked is None else 4)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("masactrl", p2p.MasaCtrl), ("plug-and-play", p2p.PlugAndPlay)])
def test_an_editor_may_be_named(narrow, name, kind):
    named, made = (p2p.edit(narrow, "a cat on grass", "a dog on grass", steps=3, editor=e) for e in (name, kind()))
    assert torch.equal(named.latents, made.latents) and named.settings == made.settings
    (step,) = p2p.steps(narrow, "a cat on grass", "a dog on grass", steps=1, editor=name)
    assert step.x.shape[0] == 2


@pytest.mark.parametrize("bad", ["masa", "", 3])
def test_an_editor_of_another_name_is_refused(narrow, bad):
    with pytest.raises(UsageError, match="masactrl"):
        p2p.edit(narrow, "a cat", "a dog", editor=bad)


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_a_path_may_stand_for_a_picture_and_a_name_for_a_model(narrow, emoji, tmp_path, monkeypatch):
    """Everywhere that one is wanted."""
    monkeypatch.setattr("p2p.request.loading.load", lambda source, **_: narrow if source == "emoji" else None)
    picture = to_pil(render(sample(1, 0))[0])[0]
    file = tmp_path / "photo.png"
    picture.save(file)
    inversions = [p2p.invert(model, p, "a cat on grass", steps=3, method="ddim")
                  for model, p in ((narrow, picture), ("emoji", file), ("emoji", str(file)))]
    assert all(torch.equal(inv.latents, inversions[0].latents) for inv in inversions)
    assert torch.equal(narrow.encode(picture), narrow.encode(str(file)))
    saved = tmp_path / "photo.safetensors"
    inversions[0].save(saved)
    mask = tmp_path / "mask.png"
    Image.new("L", (64, 64), 255).save(mask)
    runs = [p2p.edit("emoji", source, "a dog on grass", local_blend=p2p.LocalBlend(mask=m))
            for source, m in ((inversions[0], Image.new("L", (64, 64), 255)), (saved, mask), (saved, str(mask)))]
    assert all(torch.equal(r.latents, runs[0].latents) for r in runs)
    made = [p2p.generate("emoji", "a cat", steps=1), sweep("emoji", "a cat", "a dog", {"cross": [0.5]}, steps=1).runs[0],
            next(p2p.steps("emoji", "a cat", "a dog", steps=1)), p2p.trace("emoji", "a cat", steps=1)]
    assert len(made) == 4

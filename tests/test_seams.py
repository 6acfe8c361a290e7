"""Where parts meet: editors and blends, notes and what the rows are, names of words and what they name."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import p2p
from p2p import Edit, LocalBlend, UsageError
from p2p.align import word_tokens
from p2p.cli import main
from p2p.models.t5 import tokens as t5_tokens
from p2p.models.text import tokens as clip_tokens
from p2p.models.unet import UNet
from p2p.request import masks
from p2p.request.emphasis import condition
from p2p.run import _with_masks_as_fitted
from p2p.show.leakage import leakage
from p2p.show.sweep import sweep

CAT, DOG = "a red cat on grass", "a red dog on grass"
NOTHING = "this edit changes nothing"


def test_a_blend_reads_the_words_of_the_prompt_that_the_source_is_told(narrow, undecoded):
    told = p2p.PlugAndPlay(source_prompt="")
    for settings in (dict(local_blend=LocalBlend(("cat", "dog"))), dict(scope="cat")):
        with pytest.raises(UsageError, match='no word "cat" in the prompt ""'):
            p2p.edit(narrow, CAT, Edit(DOG, **settings), steps=2, editor=told)
    ours = dict(steps=2, editor=p2p.PlugAndPlay(source_prompt="a cat"), record=p2p.Record(text=None))
    result = p2p.edit(narrow, CAT, Edit(DOG, local_blend=LocalBlend(("cat", "dog"), start=0.0)), **ours)
    with pytest.raises(UsageError, match="leave source_prompt out"):
        leakage(result)


def test_notes_are_on_the_prompt_that_the_source_is_told(emoji, undecoded):
    notes = p2p.edit(emoji, CAT, DOG, steps=1, editor=p2p.PlugAndPlay(source_prompt="a xyzzy")).notes
    assert any("xyzzy" in note and "never seen" in note for note in notes)


SAME = [dict(negative_prompt=["", "red"]), dict(x_T=torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))),
        dict(editor=p2p.PlugAndPlay())]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SAME, ids=["negative prompts", "noises", "Plug-and-Play"])
def test_rows_that_differ_are_not_said_to_be_the_same(narrow, undecoded, settings):
    result = p2p.edit(narrow, CAT, Edit(CAT), steps=2, **settings)
    assert (result.latents[0] - result.latents[1]).abs().max() > 1e-3 and not any(NOTHING in note for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, dict(editor="masactrl"), dict(editor=p2p.PlugAndPlay(), guidance_scale=1)])
def test_rows_that_are_the_same_are_said_to_be(narrow, undecoded, settings):
    result = p2p.edit(narrow, CAT, Edit(CAT), steps=2, **settings)
    assert (result.latents[0] - result.latents[1]).abs().max() < 1e-4 and any(NOTHING in note for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize("method, blend, same", [("ddim", False, True), ("ddim", True, False), ("direct", False, False),
                                                 ("edit-friendly", False, False)])
def test_a_source_that_follows_its_latents_or_keeps_them_is_another_row(narrow, undecoded, method, blend, same):
    inversion = p2p.invert(narrow, Image.effect_noise((64, 64), 90).convert("RGB"), CAT, method=method, steps=3)
    half = LocalBlend(mask=Image.fromarray(np.repeat([[0, 255]], 2, axis=0).astype(np.uint8))) if blend else None
    result = p2p.edit(narrow, inversion, Edit(CAT, local_blend=half))
    assert ((result.latents[0] - result.latents[1]).abs().max().item() < 1e-4) is same
    assert any(NOTHING in note for note in result.notes) is same


def test_a_traced_prompt_is_the_same_row_at_its_own_guidance(narrow, undecoded):
    traced = p2p.trace(narrow, CAT, steps=2)
    for settings, same in (({}, True), (dict(guidance_scale=1.5), False)):
        result = p2p.edit(narrow, traced, Edit(CAT), **settings)
        assert ((result.latents[0] - result.latents[1]).abs().max().item() < 1e-4) is same
        assert any(NOTHING in note for note in result.notes) is same


@pytest.mark.parametrize("target, said", [("a dog and a big dog", {"dog": 0.5, "big dog": 2.0}), ("a big red dog", {"big red": 0.5, "red dog": 2.0})])
def test_names_that_share_a_word_and_have_others_too_are_refused(narrow, target, said):
    for settings in (dict(equalizer=said), dict(cross_replace_steps={word: value / 4 for word, value in said.items()})):
        with pytest.raises(UsageError, match="share a word"):
            p2p.edit(narrow, target, Edit(target, **settings), steps=1)
    p2p.edit(narrow, target, Edit(target, equalizer=dict.fromkeys(said, 2.0)), steps=1)   # they agree


def test_a_digit_is_not_a_part_of_a_number():
    prompt = clip_tokens("10 dogs and 1 cat in 2021")
    assert word_tokens(prompt, "1", 77) == [prompt.ids.index(prompt.ids[word_tokens(prompt, "cat", 77)[0]]) - 1]
    assert len(word_tokens(prompt, "2021", 77)) == 4 and len(word_tokens(prompt, "10", 77)) == 2
    with pytest.raises(UsageError, match='no word "2"'):
        word_tokens(prompt, "2", 77)


def test_letters_that_grow_in_small_leave_the_others_small():
    def pieces(prompt, return_offsets_mapping):
        spans, at = [], 0
        for word in prompt.split():
            at = prompt.index(word, at)
            spans.append((at, at + len(word)))
        return {"input_ids": [*range(3, 3 + len(spans)), 1], "offset_mapping": [*spans, (0, 0)]}
    prompt = t5_tokens(pieces, "A Cat in İstanbul", masked=False)
    assert word_tokens(prompt, "cat", 512) == word_tokens(prompt, "Cat", 512) == [1] and word_tokens(prompt, "İstanbul", 512) == [3]


def test_a_weight_beyond_the_cut_weighs_nothing(narrow):
    long = "a red cat on grass " * 6
    plain, weighed = (condition(narrow, [long + word], 64, 64).context for word in ("big", "(big:1.5)"))
    assert torch.equal(plain, weighed)
    assert not torch.equal(plain, condition(narrow, [long.replace("cat", "(cat:1.5)", 1) + "big"], 64, 64).context)


def test_layers_of_text_alone_are_none_between_pixels(narrow):
    text_only = replace(narrow.unet.config, mid_attention="added text", down_attention=(None, "added text", "added text"),
                        up_attention=(None, "added text", "added text"))
    network = UNet(text_only)
    assert network.text_sites() and network.pixel_sites() == []
    result = p2p.edit(replace(narrow, unet=network), CAT, DOG, steps=1, editor="masactrl")
    assert any("editor MasaCtrl changes nothing" in note for note in result.notes)


def test_a_stage_reads_masks_as_the_run_did():
    half = np.zeros((100, 200), np.uint8)
    half[:, :60] = 255
    edit = Edit("a dog", local_blend=LocalBlend(mask=Image.fromarray(half)))
    for fit in "pad", "crop":
        small = SimpleNamespace(edits=[edit, Edit("a bird")], latents=torch.zeros(3, 3, 16, 16), settings={"inversion": {"fit": fit}})
        masked, other = _with_masks_as_fitted(small)
        assert torch.equal(masked.local_blend.mask, masks.fixed(edit.local_blend.mask, (16, 16), fit)[0]) and other == Edit("a bird")


def test_a_weight_that_others_cover_is_said_to_be_covered(narrow):
    notes = p2p.edit(narrow, CAT, Edit("a red cat on grass", equalizer={"red cat": 0.5, "red": 2.0, "cat": 3.0}), steps=2).notes
    assert any("red cat" in note and "other names say as much of its words" in note for note in notes)


def test_a_report_is_written_where_the_source_was_told_another_prompt(narrow, once, tmp_path, capsys):
    p2p.edit(narrow, CAT, DOG, steps=1, editor=p2p.PlugAndPlay(source_prompt="a cat")).save(tmp_path / "first")
    assert main(["edit", "--from", str(tmp_path / "first" / "edit.png"), "--report", "--out", str(tmp_path / "again")]) == 0
    assert next((tmp_path / "again").rglob("report.html")) and not list((tmp_path / "again").rglob("leakage.json"))
    assert "what else changed is not measured" in capsys.readouterr().err


def test_a_picture_of_a_scoped_edit_is_replayed_with_what_else_changed(narrow, once, tmp_path):
    p2p.edit(narrow, CAT, Edit(DOG, scope="cat"), steps=1).save(tmp_path / "first")
    assert main(["edit", "--from", str(tmp_path / "first" / "edit.png"), "--out", str(tmp_path / "again"), "-q"]) == 0
    assert next((tmp_path / "again").rglob("leakage.json"))


@pytest.mark.slow
def test_the_report_of_an_enlarged_edit_has_the_times_of_both(once, tmp_path):
    assert main(["edit", "a cat", "a dog", "--steps", "1", "--upscale", "--upscale-steps", "1", "--report", "--out", str(tmp_path), "-q"]) == 0
    page, large = next(tmp_path.rglob("report.html")).read_text(), p2p.upscale("emoji-upscaler", p2p.edit("emoji", "a cat", "a dog", steps=1), steps=1)
    assert all(f"<td>{name}<td>" in page for name in large.timings) and "256" in page


def test_seeds_of_a_sweep_are_checked_before_the_first_run(narrow, monkeypatch):
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(UsageError, match="seed"):
        sweep(narrow, CAT, DOG, {"seed": [1, 2**64]}, steps=1)


def test_a_trace_is_of_a_dtype_that_its_file_may_have(narrow):
    with pytest.raises(UsageError, match="dtype: torch.float8_e4m3fn is none of"):
        p2p.trace(narrow, CAT, steps=1, dtype=torch.float8_e4m3fn)


@pytest.mark.slow
def test_null_text_in_half_precision_follows_the_gradient_of_single(narrow):
    """A mean over all numbers of a large picture has gradients below what float16 can hold."""
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    half = replace(narrow, unet=copy.deepcopy(narrow.unet).half(), text_encoders=[copy.deepcopy(t).half() for t in narrow.text_encoders])
    found, wanted = (p2p.invert(m, picture, CAT, method="null-text", steps=2, inner_steps=1, guidance_scale=1.01) for m in (half, narrow))
    start = narrow.text([""])
    moved, meant = (inv.null_context[:1] - start for inv in (found, wanted))
    assert torch.nn.functional.cosine_similarity(moved.flatten(), meant.flatten(), dim=0) > 0.99

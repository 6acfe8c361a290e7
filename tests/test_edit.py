"""From what the user asks to tensors per step."""
import numpy as np
import pytest
import torch
from plans import tables

import p2p
from p2p.align import word_tokens
from p2p.denoise import Batch
from p2p.edits import Edit, check, choose_mode, cross_alpha, plan, weights, window
from p2p.errors import UsageError
from p2p.models.text import tokens
from p2p.request.ready import prepared

SOURCE, SWAP = "a cat on grass", "a dog on grass"

L = 77


@pytest.mark.parametrize("source, target, mode", [
    ("a cat", "a dog", "replace"), ("a cat", "a big cat", "refine"), ("a cat", "A  cat", "reweight"),
    ("a cat on grass", "a cat", "refine"), ("a hippopotamus", "a cat", "replace")])
def test_mode_is_chosen_from_the_prompts(source, target, mode):
    assert choose_mode(tokens(source), Edit(target), tokens(target)) == mode
    assert choose_mode(tokens(source), Edit(target, mode="refine"), tokens(target)) == "refine"


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@pytest.mark.parametrize("lo, hi", [(0, 1), (0, 0.8), (0.2, 0.5), (0.3, 0.3), (0, 0)])
def test_cross_window_rounds_like_the_official_code(steps, lo, hi):
    alpha = cross_alpha((lo, hi), tokens("a cat"), steps, L)
    wanted = [int(lo * (steps + 1)) <= i < int(hi * (steps + 1)) for i in range(steps)]
    assert alpha.shape == (steps, L) and (alpha == torch.tensor(wanted)[:, None]).all()


@pytest.mark.parametrize("steps", [1, 4, 9, 50])
@pytest.mark.parametrize("lo, hi", [(0, 1), (0, 0.4), (0.25, 0.5), (0.3, 0.3), (0.99, 1)])
def test_self_window_rounds_like_the_official_code(steps, lo, hi):
    """Unlike the windows of cross-attention: int(share * steps)."""
    s, t = tokens("a cat"), tokens("a dog")
    made = tables(s, t, Edit(t.text, self_replace_steps=(lo, hi)), "replace", steps, L)
    assert made.inject.tolist() == [int(lo * steps) <= i < int(hi * steps) for i in range(steps)]


@pytest.mark.parametrize("old, new", [("cat", "hippopotamus"), ("hippopotamus", "cat"), ("cat", "dog")])
def test_a_swap_in_a_refinement_hands_all_attention_over(old, new):
    """However many tokens either has, and no more than there is."""
    s, t = tokens(f"a {old} on grass"), tokens(f"a big {new} on grass")
    mix, keep, *_ = tables(s, t, Edit(t.text, swap={old: new}, cross_replace_steps=1.0), "refine", 3, L)
    i, j = word_tokens(s, old, L), word_tokens(t, new, L)
    assert torch.allclose(mix[:, i][:, :, j].sum(-1), torch.ones(3, len(i), dtype=torch.float64)) and (keep[:, j] == 0).all()
    assert torch.allclose(mix[:, :, j].sum((1, 2)), torch.full((3,), len(i) + 0.0, dtype=torch.float64))


def test_window_by_word():
    """What is not named is injected throughout; "default_" sets it; later words win."""
    t = tokens("a red cat on grass")
    alpha = cross_alpha({"default_": 0.5, "red cat": (0.5, 1.0)}, t, 9, L)
    assert alpha[:, [2, 3]].bool().all(1).tolist() == [False] * 5 + [True] * 4
    assert alpha[:, [1, 4]].bool().all(1).tolist() == [True] * 5 + [False] * 4
    assert cross_alpha({"cat": 0.0}, t, 9, L)[:, 3].sum() == 0 and cross_alpha({"cat": 0.0}, t, 9, L)[:, 2].all()


@pytest.mark.parametrize("bad", [1.2, -0.1, (0.5, 0.2), (0.1, 0.2, 0.3), "half", None, True, float("nan")])
def test_bad_window_is_an_error(bad):
    with pytest.raises(UsageError, match="self_replace_steps"):
        window(bad, "self_replace_steps")


def test_weights_by_word():
    t = tokens("a fluffy red ball")
    c = weights({"fluffy": -2, "red ball": 3.0}, t, L)
    assert c[2] == -2 and (c[3:5] == 3).all() and c.sum() == L - 3 - 2 + 6 - 0
    with pytest.raises(UsageError, match="green"):
        weights({"green": 1.0}, t, L)
    with pytest.raises(UsageError, match="finite"):
        weights({"red": float("inf")}, t, L)


def test_word_injected_alone():
    """Only the columns of one word come from the source; all others are the target's own."""
    s, t = tokens("a cat on grass"), tokens("a cat on sand")
    mix, keep, *_ = tables(s, t, Edit(t.text, cross_replace_steps={"default_": 0.0, "cat": 1.0}), "replace", 5, L)
    assert (keep[:, 2] == 0).all() and keep.sum() == 5 * (L - 1)
    assert (mix[:, 2, 2] == 1).all() and mix.sum() == 5


def test_targets_keep_their_own_settings():
    """Two targets in one batch: each row of the plan is what the target alone would have."""
    s = tokens("a red cat on grass")
    edits = [Edit("a blue cat on grass", cross_replace_steps=0.4, self_replace_steps=0.2, self_max_tokens=64),
             Edit("a red cat on grass at night", mode="refine", equalizer={"night": 2}, self_replace_steps=(0.5, 1.0),
                  self_max_tokens=1024)]
    targets = [tokens(e.prompt) for e in edits]
    made = [tables(s, t, e, m, 10, L) for e, t, m in zip(edits, targets, ["replace", "refine"])]
    both = plan(made, Batch(1, 2), torch.device("cpu"), torch.float64, dense=True)
    for i in range(2):
        alone = plan(made[i:i + 1], Batch(1, 1, guided=False), torch.device("cpu"), torch.float64, dense=True)
        for step, (b, a) in enumerate(zip(both, alone)):
            assert torch.equal(b.mix[i], a.mix[0]) and torch.equal(b.keep[i], a.keep[0])
            assert b.source.tolist() == [3, 3] and a.source.tolist() == [0]
            row = 3 if (step < 2 if i == 0 else step >= 5) else 4 + i
            assert b.pixels[:, i].tolist() == [row, row, 4 + i]
    assert both[0].max_pixels.tolist() == [64, 1024]


@pytest.mark.parametrize("edits", [
    [Edit("a dog on grass", cross_replace_steps=(0.2, 0.7), self_replace_steps=(0.1, 0.4))],
    [Edit("a cat on grass", equalizer={"cat": 3.0})],
    [Edit("a big cat on grass", cross_replace_steps=0.5, self_replace_steps=0.0)],
    [Edit("a dog on grass", cross_replace_steps={"default_": 0.5, "dog": 0.2}, self_replace_steps=1.0)],
    [Edit("a dog on grass", self_replace_steps=(0.5, 1.0)), Edit("a cat on sand", self_replace_steps=0.8)],
])
def test_what_is_not_edited_is_absent(edits):
    """A step has tables where they say something, and rows of pixels where some are borrowed; without both there is no edit."""
    s, targets = tokens("a cat on grass"), [tokens(e.prompt) for e in edits]
    made = [tables(s, t, e, choose_mode(s, e, t), 10, L) for e, t in zip(edits, targets)]
    how = Batch(1, len(edits)), torch.device("cpu"), torch.float64
    sparse, dense = plan(made, *how), plan(made, *how, dense=True)
    own = torch.arange(how[0].rows - len(edits), how[0].rows)
    for some, full in zip(sparse, dense):
        text = bool(full.mix.any() or (full.keep != 1).any())
        pixels = bool((full.pixels[0] != own).any())
        assert (some is None) == (not text and not pixels)
        assert some is None or ((some.mix is None) != text and (some.pixels is None) != pixels)
    assert len({(e is None, e and e.mix is None, e and e.pixels is None) for e in sparse}) > 1   # windows open and close


def test_unknown_choices_are_errors():
    s, t = tokens("a cat"), tokens("a dog")
    with pytest.raises(UsageError, match="replace, refine, reweight"):
        choose_mode(s, Edit("a dog", mode="swap"), t)
    with pytest.raises(UsageError, match="exact, official"):
        tables(s, t, Edit("a dog", aligner="fuzzy"), "replace", 5, L)


@pytest.mark.parametrize("call, message", {
    "settings beside Edits": (lambda m: p2p.edit(m, SOURCE, p2p.Edit(SWAP), cross_replace_steps=0.1), "cross_replace_steps: belongs"),
    "unknown setting": (lambda m: p2p.edit(m, SOURCE, SWAP, crossreplace=0.1), "crossreplace: no setting"),
    "reweight of another prompt": (lambda m: p2p.edit(m, SOURCE, "a big cat", mode="reweight"), "one and the same prompt"),
    "no targets": (lambda m: p2p.edit(m, SOURCE, None), "targets: None"),
    "equalizer": (lambda m: p2p.edit(m, SOURCE, SWAP, equalizer=[("dog", 2)]), "equalizer: "),
    "swap": (lambda m: p2p.edit(m, SOURCE, SWAP, swap={"cat": 3}), "swap: "),
    "scope": (lambda m: p2p.edit(m, SOURCE, SWAP, scope=[]), "scope: "),
    "window": (lambda m: p2p.edit(m, SOURCE, SWAP, cross_replace_steps="01"), "cross_replace_steps: '01'"),
    "self_max_tokens": (lambda m: p2p.edit(m, SOURCE, SWAP, self_max_tokens="abc"), "self_max_tokens must be"),
    "blend": (lambda m: p2p.edit(m, SOURCE, SWAP, local_blend=("cat", "dog")), "local_blend: "),
    "seed": (lambda m: p2p.edit(m, SOURCE, SWAP, seed=10**30), "a seed is"),
    "height": (lambda m: p2p.generate(m, SOURCE, height=0), "height must be"),
    "side of x_T": (lambda m: p2p.generate(m, SOURCE, x_T=torch.zeros(1, 3, 63, 64)), "height must be"),
    "guidance": (lambda m: p2p.generate(m, SOURCE, guidance_scale="a"), "guidance_scale must be"),
    "device": (lambda m: p2p.load("emoji", device="warp"), "device warp"),
    "too small maps": (lambda m: p2p.generate(m, SOURCE, steps=1, record=p2p.Record(text=10)), "no attention map has at most 10"),
}.values())
def test_what_cannot_be_meant_is_an_error_that_says_so(emoji, call, message):
    with pytest.raises(UsageError, match=message):
        call(emoji)


@pytest.mark.slow
@pytest.mark.parametrize("how, said", [(dict(equalizer={"cat": 1.0}), True), (dict(equalizer={"cat": 3.0}, cross_replace_steps=0.0), True),
                                       (dict(equalizer={"cat": 3.0}), False), (dict(), True)])
def test_an_edit_that_changes_nothing_is_said(emoji, how, said):
    r = p2p.edit(emoji, SOURCE, p2p.Edit(SOURCE, **how), steps=2)
    assert any("changes nothing" in note for note in r.notes) == said


def test_numpy_numbers_are_numbers():
    assert window(np.float32(0.5), "w") == (0.0, 0.5)
    assert weights({"cat": np.float32(2)}, tokens("a cat"), 8)[2] == 2


@pytest.mark.parametrize("words", [("dog", "dog#1"), ("dog#1", "dog")])
def test_what_is_said_of_one_occurrence_counts_beside_what_is_said_of_all(words):
    """In whatever order; two names of the same columns must agree."""
    target = tokens("a dog and a dog on grass")
    c = weights({word: {"dog": 2.0, "dog#1": 3.0}[word] for word in words}, target, L)
    assert [i for i in range(L) if c[i] == 3] == [2] and [i for i in range(L) if c[i] == 2] == [5]
    alpha = cross_alpha({word: {"dog": 0.0, "dog#1": 1.0}[word] for word in words}, target, 4, L)
    assert alpha[:, 2].all() and not alpha[:, 5].any()
    with pytest.raises(UsageError, match='"dog" and "Dog" are the same word'):
        weights({"dog": 2.0, "Dog": 3.0}, target, L)
    assert weights({"dog": 2.0, "Dog": 2.0}, target, L)[2] == 2


def test_two_words_are_not_swapped_for_one():
    with pytest.raises(UsageError, match="each once"):
        check(p2p.Edit("a dog on grass", swap={"cat": "dog", "house": "dog"}))


def test_numbers_of_numpy_are_recorded(narrow, tmp_path):
    easy = dict(steps=1, guidance_scale=3.0)
    p2p.edit(narrow, "a cat", "a dog", proximal=("l0", np.float32(0.5)), **easy).save(tmp_path / "proximal")
    p2p.edit(narrow, "a cat", "a dog", editor=p2p.MasaCtrl(start=np.float32(0.1)), **easy).save(tmp_path / "editor")
    p2p.invert(narrow, torch.zeros(1, 3, 64, 64), "a cat", method="ddim", steps=1, final_alpha=np.float32(1)).save(tmp_path / "x.safetensors")


@pytest.mark.parametrize("steps", [800, 898])
def test_as_many_steps_as_the_sampler_has_are_taken(narrow, steps):
    """A note looks for a number of steps that reach the noisiest, some of which no sampler takes."""
    assert prepared(narrow, "a cat", ["a dog"], steps=steps, sampler="dpm++", timestep_spacing="leading").start.schedule.steps == steps

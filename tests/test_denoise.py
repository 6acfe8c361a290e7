"""Algorithm 1 on whole models: what an edit leaves alone, and that nothing is hidden in the modules."""
import literal
import pytest
import torch

import p2p
from p2p.errors import NumericsError, UsageError
from p2p.models import attention
from p2p.request.start import draw

SETTINGS = dict(steps=6, seed=3, height=32, width=32)
PAIR = ("a red cat on grass", "a red dog on grass")


def close(a, b, tol=2e-4):
    assert (a - b).abs().max() <= tol * b.std()


@pytest.fixture(scope="module")
def edited(narrow):
    return p2p.edit(narrow, *PAIR, **SETTINGS)


@pytest.mark.slow
def test_source_row_is_the_source_alone(narrow, edited):
    close(edited.latents[:1], p2p.generate(narrow, PAIR[0], **SETTINGS).latents)


def test_edit_differs_from_source_and_from_plain_regeneration(narrow, edited):
    plain = p2p.generate(narrow, PAIR[1], **SETTINGS).latents
    for other in (edited.latents[:1], plain):
        assert (edited.latents[1:] - other).abs().max() > 0.05


def test_no_window_is_no_edit(narrow):
    r = p2p.edit(narrow, *PAIR, cross_replace_steps=0.0, self_replace_steps=0.0, **SETTINGS)
    close(r.latents[1:], p2p.generate(narrow, PAIR[1], **SETTINGS).latents)


@pytest.mark.slow
@pytest.mark.parametrize("pair, mode, edits", [
    (PAIR, "replace", literal.word_swap), (("a red cat on grass", "a big red cat on snowy grass"), "refine", literal.refinement)])
def test_edits_are_algorithm_1_written_out(narrow, pair, mode, edits):
    """With every map formed, source and target in runs of their own: tests/literal.py."""
    with torch.no_grad():
        *_, wanted = literal.algorithm_1(narrow, *pair, edits(narrow, *pair, 6, 0.8), int(0.4 * 6), 6, seed=3, size=(32, 32))
    got = p2p.edit(narrow, pair[0], p2p.Edit(pair[1], mode=mode), **SETTINGS).latents
    close(got, wanted)
    assert (got[1] - got[0]).abs().max() > 0.05


def test_the_formula_is_the_code_that_runs(narrow, monkeypatch):
    """`edited_attend` is called once for every layer that reads text, at every step that is edited."""
    calls = []
    monkeypatch.setattr(attention, "edited_attend", lambda *a, of=attention.edited_attend: calls.append(1) or of(*a))
    p2p.edit(narrow, *PAIR, cross_replace_steps=0.5, self_replace_steps=0.9, **SETTINGS)
    assert len(calls) == 3 * len(narrow.unet.text_sites())                              # int(0.5 (6 + 1)) steps


def test_a_fork_replaces_the_formula_in_one_line(narrow, monkeypatch):
    """An edit that is not linear changes `edited_probs` and multiplies: here the linear one, so that nothing changes."""
    def explicit(q, k, v, q_src, k_src, mix, keep):
        p, e = attention.attend_probs(q, k), len(mix)
        return torch.cat([p[:-e], attention.edited_probs(p[-e:], attention.attend_probs(q_src, k_src), mix, keep)]) @ v

    wanted = p2p.edit(narrow, *PAIR, **SETTINGS).latents
    monkeypatch.setattr(attention, "edited_attend", explicit)
    close(p2p.edit(narrow, *PAIR, **SETTINGS).latents, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replace", "refine", "reweight"])
def test_source_as_its_own_target_changes_nothing(narrow, mode):
    r = p2p.edit(narrow, PAIR[0], PAIR[0], mode=mode, **SETTINGS)
    close(r.latents[1:], r.latents[:1])
    assert any("changes nothing" in note for note in r.notes)


def test_weight_one_changes_nothing_and_two_does(narrow):
    r = p2p.edit(narrow, PAIR[0], [p2p.Edit(PAIR[0], equalizer={"red": c}) for c in (1.0, 2.0)], **SETTINGS)
    close(r.latents[1], r.latents[0])
    assert (r.latents[2] - r.latents[0]).abs().max() > 0.02


@pytest.mark.slow
def test_targets_do_not_touch_each_other(narrow, edited):
    """A target's picture is the same alone, among others, and in another order."""
    others = [p2p.Edit("a red cat on grass at night", cross_replace_steps=0.5), p2p.Edit(PAIR[0], equalizer={"red": -2})]
    first = p2p.edit(narrow, PAIR[0], [PAIR[1], *others], **SETTINGS).latents
    last = p2p.edit(narrow, PAIR[0], [*others[::-1], PAIR[1]], **SETTINGS).latents
    close(first[1:2], edited.latents[1:])
    close(last[[0, 3, 2, 1]], first)


def test_same_call_gives_same_bits_and_no_module_attribute_changes(narrow, edited):
    def states():
        return {name: {k: id(v) for k, v in vars(m).items()} for part in (narrow.unet, narrow.text_encoders[0])
                for name, m in part.named_modules()}

    before = states()
    again = p2p.edit(narrow, *PAIR, **SETTINGS)
    assert torch.equal(again.latents, edited.latents) and states() == before
    assert list(map(lambda i: i.tobytes(), again.images)) == list(map(lambda i: i.tobytes(), edited.images))


def test_stochastic_sampling_shares_its_noise(narrow):
    r = p2p.edit(narrow, PAIR[0], PAIR[0], eta=1.0, **SETTINGS)
    close(r.latents[1:], r.latents[:1])
    assert (r.latents[0] - p2p.generate(narrow, PAIR[0], **SETTINGS).latents[0]).abs().max() > 0.05


def test_guidance_one_runs_half_the_rows(narrow, monkeypatch):
    rows, forward = [], narrow.unet.forward
    monkeypatch.setattr(narrow.unet, "forward", lambda x, *a, **k: rows.append(len(x)) or forward(x, *a, **k))
    p2p.edit(narrow, *PAIR, guidance_scale=1.0, **SETTINGS)
    p2p.edit(narrow, *PAIR, guidance_scale=2.0, **SETTINGS)
    assert rows == [2] * 6 + [4] * 6


def test_noise_belongs_to_the_seed():
    """Neither the number of pictures nor their order changes a picture's noise."""
    a, b = draw((3, 4, 4), [7, 8], 2), draw((3, 4, 4), [8], 2)
    assert torch.equal(a[0][1], b[0][0]) and torch.equal(a[1][1], b[1][0])


def test_one_seed_for_all_prompts_or_one_for_each(narrow):
    both = p2p.generate(narrow, list(PAIR), steps=2, seed=[3, 4]).latents
    close(both[1:], p2p.generate(narrow, PAIR[1], steps=2, seed=4).latents)
    with pytest.raises(UsageError, match="2 prompts and 3 seeds"):
        p2p.generate(narrow, list(PAIR), steps=2, seed=[1, 2, 3])


def test_result_records_what_is_needed(narrow, edited):
    assert edited.latents.shape == (2, 3, 32, 32) and edited.latents.dtype == torch.float32
    assert [i.size for i in edited.images] == [(32, 32)] * 2 and edited.prompts == list(PAIR)
    s = edited.settings
    assert s["seed"] == 3 and s["steps"] == 6 and s["source"] == PAIR[0] and len(s["sha256"]) == 64
    assert s["targets"][0]["prompt"] == PAIR[1] and s["targets"][0]["mode"] == "replace"
    again = p2p.edit(narrow, s["source"], [p2p.Edit(**t) for t in s["targets"]], steps=s["steps"], seed=s["seed"],
                     guidance_scale=s["guidance_scale"], eta=s["eta"], height=s["height"], width=s["width"])
    assert torch.equal(again.latents, edited.latents)


def test_bad_requests_name_what_is_wrong(narrow):
    for words, kw in {"mode .refine.": dict(targets="a big red cat on grass", mode="replace"),
                      'no word "bird"': dict(targets=PAIR[1], equalizer={"bird": 2}),
                      "between 0 and 1": dict(targets=PAIR[1], cross_replace_steps=1.5),
                      "expected .1 or 2, 3,": dict(targets=PAIR[1], x_T=torch.zeros(1, 4, 64, 64)),
                      "whole number": dict(targets=PAIR[1], steps=0), "no target": dict(targets=[]),
                      "eta": dict(targets=PAIR[1], eta=2.0)}.items():
        with pytest.raises(UsageError, match=words):
            p2p.edit(narrow, PAIR[0], **kw)


def test_long_and_unknown_prompts_are_said(narrow):
    long = "a cat " * 40
    notes = p2p.generate(narrow, [long, "a zebra on grass"], steps=1).notes
    assert any("cut off" in n and "tokens" in n for n in notes) and any("never seen zebra" in n for n in notes)
    with pytest.raises(UsageError, match="beyond"):
        p2p.edit(narrow, long + "dog", long + "bird", steps=1)


def test_values_that_are_not_finite_name_their_step(narrow):
    x = torch.full((1, 3, 64, 64), float("nan"))
    with pytest.raises(NumericsError, match="step 1 of 2"):
        p2p.generate(narrow, "a cat", steps=2, x_T=x)

"""Options that change nothing are said to: found by comparing tables, so whatever leaves them equal is found."""
import pytest
import torch
from PIL import Image
from plans import tables

import p2p
from p2p.edits import choose_mode
from p2p.errors import UsageError
from p2p.request.effect import idle_options, left_out

SOURCE, SWAPPED, REFINED, L = "a cat on grass", "a dog on grass", "a cat on grass at night", 77

IDLE = {   # (target, settings, what is said of it)
    "weight outside of the window": (SWAPPED, dict(cross_replace_steps=0.0, equalizer={"dog": 2.0}), 'weight of "dog"'),
    "weight on a word with no window": (SWAPPED, dict(cross_replace_steps={"dog": 0.0}, equalizer={"dog": 2.0}), 'weight of "dog"'),
    "weight in the same prompt": (SOURCE, dict(cross_replace_steps=0.0, equalizer={"cat": -1.0}), 'weight of "cat"'),
    "weight of an added word": (REFINED, dict(cross_replace_steps={"night": 0.0}, equalizer={"night": 3.0}), 'weight of "night"'),
    "swap outside of the window": ("a big dog on grass", dict(cross_replace_steps=0.0, swap={"cat": "dog"}), 'swap of "cat"'),
    "swap of what is swapped": (SWAPPED, dict(mode="replace", swap={"cat": "dog"}), "mode replace pairs it"),
    "renormalised own maps": (SWAPPED, dict(cross_replace_steps=0.0, renormalise=True), "renormalise changes nothing"),
    "renormalised whole maps": (SWAPPED, dict(renormalise=True), "renormalise changes nothing"),
    "aligner of one prompt": (SOURCE, dict(aligner="official", equalizer={"cat": 2.0}), "aligner official .* alike"),
    "aligner and no window": ("a hippopotamus on grass", dict(aligner="official", cross_replace_steps=0.0), "aligner .* injected in none"),
    "window of an added word": (REFINED, dict(cross_replace_steps={"default_": 0.8, "night": 0.2}), 'window of "night"'),
    "cross window of no step": (SWAPPED, dict(cross_replace_steps=0.01), "cross_replace_steps 0.01 covers none of the 10"),
    "self window of no step": (SWAPPED, dict(self_replace_steps=(0.51, 0.52)), "self_replace_steps .* covers none"),
    "self window and no size": (SWAPPED, dict(self_replace_steps=0.6, self_max_tokens=0), "self_replace_steps changes nothing"),
    "size and no self window": (SWAPPED, dict(self_replace_steps=0.0, self_max_tokens=64), "self_max_tokens changes nothing"),
    "windows over a whole schedule": (SWAPPED, dict(windows_over="schedule"), "windows_over changes nothing"),
    "level of a mask": (SWAPPED, dict(local_blend=p2p.LocalBlend(mask=torch.ones(2, 2), level=8)), "level changes nothing"),
    "threshold of a mask": (SWAPPED, dict(local_blend=p2p.LocalBlend(mask=torch.ones(2, 2), threshold=0.5)), "threshold changes"),
    "second threshold": (SWAPPED, dict(local_blend=p2p.LocalBlend(words=("cat", "dog"), threshold=(0.3, 0.5))), "second threshold"),
    "weight 1": (SWAPPED, dict(equalizer={"dog": 1.0}), 'weight of "dog" .* changes nothing: it is 1'),
    "weight 1 of a closed window": (SWAPPED, dict(equalizer={"dog": 1}, cross_replace_steps=0.0), "it is 1"),
    "threshold 0": (SWAPPED, dict(local_blend=p2p.LocalBlend(words=("cat", "dog"), threshold=0)), "at threshold 0 the words limit"),
    "threshold 0 of substruct": (SWAPPED, dict(local_blend=p2p.LocalBlend(
        words=("cat", "dog"), substruct=("grass", "grass"), threshold=(0.3, 0))), "at threshold 0 substruct leaves nothing"),
    "scope and words": (SWAPPED, dict(scope="cat", local_blend=p2p.LocalBlend(words=("cat", "dog"))), "scope changes nothing"),
}
ACTS = [(SWAPPED, {}), (SWAPPED, dict(equalizer={"dog": 2.0})), (REFINED, dict(cross_replace_steps=0.0)), (SOURCE, dict(equalizer={"cat": 2.0})),
        (SWAPPED, dict(cross_replace_steps=0.5, renormalise=True, equalizer={"dog": 2.0})), (SWAPPED, dict(self_replace_steps=0.0)),
        (SWAPPED, dict(cross_replace_steps={"default_": 0.8, "dog": 0.2})), ("a big dog on grass", dict(swap={"cat": "dog"})),
        (SWAPPED, dict(self_max_tokens=0)), (SWAPPED, dict(scope="cat")), (REFINED, dict(equalizer={"night": 3.0})),
        ("a hippopotamus on grass", dict(aligner="official")),
        (SWAPPED, dict(local_blend=p2p.LocalBlend(words=("cat", "dog"), substruct=("grass", "grass"), threshold=(0.3, 0.5), level=8)))]


def said(model, target, settings, steps=10, whole=None):
    s, t = model.tokens(SOURCE), model.tokens(target)
    edit = p2p.Edit(target, **settings)
    given = s, t, edit, choose_mode(s, edit, t), steps, L, whole
    return idle_options(tables(*given), *given)


@pytest.mark.parametrize("what", IDLE)
def test_options_that_change_nothing_are_named(narrow, what):
    import re
    target, settings, wanted = IDLE[what]
    found = said(narrow, target, settings)
    assert len(found) == 1 and re.search(wanted, found[0]), found


@pytest.mark.parametrize("target, settings", ACTS)
def test_options_that_act_are_not(narrow, target, settings):
    assert said(narrow, target, settings) == []


@pytest.mark.slow
def test_what_is_said_is_so(narrow):
    """The pictures with the option and without it are the same."""
    target, settings, _ = IDLE["weight outside of the window"]
    with_, left = (p2p.edit(narrow, SOURCE, target, steps=3, **s) for s in (settings, {"cross_replace_steps": 0.0}))
    assert torch.equal(with_.latents, left.latents) and any('weight of "dog"' in n for n in with_.notes)


def test_options_of_the_run_that_change_nothing_are_named(narrow):
    common = dict(steps=1, guidance_scale=1.0)
    assert any("proximal changes nothing" in n for n in p2p.edit(narrow, SOURCE, SWAPPED, proximal=("l0", 0.7), **common).notes)
    assert any("seed changes nothing" in n for n in p2p.edit(narrow, SOURCE, SWAPPED, seed=5, x_T=torch.zeros(1, 3, 64, 64), **common).notes)
    for bad, message in ((dict(record=p2p.Record(before=True)), "before"), (dict(x_T=torch.zeros(1, 3, 64, 64), height=128), "height"),
                         (dict(editor=p2p.MasaCtrl(), equalizer={"dog": 2.0}), "equalizer"),
                         (dict(editor=p2p.PlugAndPlay(), cross_replace_steps=0.2), "cross_replace_steps")):
        with pytest.raises(UsageError, match=message):
            p2p.edit(narrow, SOURCE, SWAPPED, **bad, **common)
    with pytest.raises(UsageError, match="dtype"):
        p2p.trace(narrow, SOURCE, steps=1, latents_only=True, dtype=torch.float16)
    with pytest.raises(UsageError, match="before"):
        p2p.generate(narrow, SOURCE, steps=1, record=p2p.Record(text=64, before=True))


# ---------------------------------------------------------------------------------------------------------------- scope

@pytest.mark.parametrize("target, settings, noted", [
    ("a cat on grass at night", {}, "at, night"), ("a big cat on grass at night", {}, "at, night"), ("a cat with a hat on grass", {}, "with, a"),
    ("a big cat on grass", {}, None), ("a dog on grass", {}, None), ("a dog on sand", {}, "sand"), (SOURCE, dict(equalizer={"cat": 2.0}), None),
    (SOURCE, dict(equalizer={"cat": 2.0, "grass": 2.0}), "grass")])
def test_what_a_scope_leaves_out_is_said(narrow, target, settings, noted):
    s, t = narrow.tokens(SOURCE), narrow.tokens(target)
    edit = p2p.Edit(target, scope="cat", **settings)
    found = left_out(s, t, edit, choose_mode(s, edit, t), L)
    assert found == [] if noted is None else noted in found[0] and "(cat)" in found[0]


@pytest.mark.parametrize("target, settings", [("a cat on sand", {}), (SOURCE, dict(equalizer={"grass": 2.0})), ("a cat", {})])
def test_a_scope_with_nothing_of_the_change_in_it_is_refused(narrow, target, settings):
    with pytest.raises(UsageError, match="nothing of what changes"):
        p2p.edit(narrow, SOURCE, target, scope="cat", steps=1, **settings)


# ------------------------------------------------------------------------------------------------------------- schedule

@pytest.mark.parametrize("steps, first, better", [(400, 799, 500), (300, 898, 250), (501, 501, 500), (4, 751, 10), (1, 1, 10)])
def test_steps_that_start_late_are_said_to(narrow, steps, first, better):
    from p2p.request.start import late_start
    schedule = narrow.schedule(steps)
    (note,) = late_start(narrow, schedule)
    assert schedule.timesteps[0] == first and f"{steps} steps start at t = {first} of 1000" in note
    assert note.endswith(f"; {better} do") and narrow.schedule(better).timesteps[0] >= 900
    assert all(late_start(narrow, narrow.schedule(n)) == [] for n in (10, 20, 25, 50, 100, 250, 500, 1000))


def test_every_run_says_that_it_starts_late(narrow):
    for notes in (p2p.generate(narrow, SOURCE, steps=2).notes, p2p.edit(narrow, SOURCE, SWAPPED, steps=2).notes,
                  p2p.invert(narrow, Image.new("RGB", (64, 64)), SOURCE, steps=2, method="noise").notes):
        assert sum("2 steps start at t = 501" in n for n in notes) == 1


@pytest.fixture(scope="module")
def picture():
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


@pytest.mark.slow
@pytest.mark.parametrize("method, acts", [("ddim", True), ("direct", False), ("edit-friendly", False), (None, False)])
def test_what_stands_outside_of_a_blend_is_the_same_where_the_source_follows_it(narrow, picture, method, acts):
    source = SOURCE if method is None else p2p.invert(narrow, picture, SOURCE, method=method, steps=2)
    steps = {} if method else {"steps": 2}
    runs = [p2p.edit(narrow, source, SWAPPED, local_blend=p2p.LocalBlend(words=("cat", "dog"), start=0.0, keep=keep), **steps)
            for keep in ("stored", "sampled")]
    assert any("keep changes nothing" in n for n in runs[1].notes) is not acts
    assert not any("keep changes nothing" in n for n in runs[0].notes)
    assert torch.allclose(runs[0].latents, runs[1].latents, atol=1e-5) is not acts


@pytest.mark.slow
def test_the_middle_block_is_named_where_it_changes_nothing(narrow, sd1):
    """It counts at the side of the maps, and there beside others: else alone it counts anyhow."""
    def notes(model, level, **size):
        blend = p2p.LocalBlend(words=("cat", "dog"), start=0.0, level=level, middle=True)
        return "".join(n for n in p2p.edit(model, SOURCE, SWAPPED, steps=1, local_blend=blend, **size).notes if "middle" in n)

    assert "it has no maps of 16 x 16" in notes(narrow, 4) and notes(narrow, 8) == ""
    assert "it alone has maps of 2 x 2" in notes(sd1, 8, height=128, width=128)


@pytest.mark.slow
def test_a_seed_beside_a_known_source_is_named(narrow, picture):
    for source in (p2p.invert(narrow, picture, SOURCE, method="direct", steps=2), p2p.trace(narrow, SOURCE, steps=2)):
        assert any("seed changes nothing" in n for n in p2p.edit(narrow, source, SWAPPED, seed=5).notes)
        assert not any("seed" in n for n in p2p.edit(narrow, source, SWAPPED).notes)

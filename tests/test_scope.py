"""Edits about one thing: what they touch, what else changed, and settings swept over."""
from dataclasses import replace

import pytest
import torch
from PIL import ImageOps
from plans import tables

import p2p
from p2p.cli.parser import main
from p2p.edits import choose_mode
from p2p.errors import UsageError
from p2p.image import to_pil
from p2p.scope import scoped, subject
from p2p.show.leakage import leakage, region
from p2p.show.pictures import read_settings
from p2p.show.sweep import sweep, variant

pytestmark = pytest.mark.usefixtures("once")
SOURCE, TARGET = "a cat next to a red cat on grass", "a cat next to a red dog on grass"
L = 32


@pytest.mark.parametrize("source, target, settings, wanted", [
    (SOURCE, TARGET, {}, (["cat#2"], ["dog"])),
    (SOURCE, TARGET, dict(scope="red"), (["red"], ["red"])),
    (SOURCE, TARGET, dict(scope=("red", "cat#2")), (["red", "cat#2"], ["red", "dog"])),
    (SOURCE, "a cat next to a big red cat on grass", {}, ([], ["big"])),
    (SOURCE, "a cat next to a big red cat on grass", dict(scope="cat#2"), (["cat#2"], ["big", "cat#2"])),
    (SOURCE, SOURCE, dict(equalizer={"red": 2.0}), (["red"], ["red"])),
    ("a cat on grass", "a hippopotamus on grass", {}, (["cat"], ["hippopotamus"])),
    ("a cat on grass", "a big dog on grass", dict(swap={"cat": "dog"}), (["cat"], ["big", "dog"])),
    ("a cat on grass", "a cat", {}, (["on", "grass"], [])),
    ("a cat", "a cat at night", dict(scope="cat"), (["cat"], ["cat"])), ("a cat", "a cat with a hat", dict(scope="cat"), (["cat"], ["cat"])),
    ("a cat on grass", "a big and very red cat on wet grass", dict(scope="cat"), (["cat"], ["very", "red", "cat"])),
    ("a cat on grass", "an orange cat on grass", dict(scope="cat"), (["cat"], ["an", "orange", "cat"])),
])
def test_what_an_edit_is_about(narrow, source, target, settings, wanted):
    s, t = narrow.tokens(source), narrow.tokens(target)
    edit = p2p.Edit(target, **settings)
    assert subject(s, t, edit, choose_mode(s, edit, t), L) == wanted


def test_a_scope_is_a_local_blend_with_all_other_words_as_rivals(narrow):
    s, t = narrow.tokens(SOURCE), narrow.tokens(TARGET)
    e = scoped(s, t, p2p.Edit(TARGET, scope="cat#2", cross_replace_steps=0.5, local_blend=p2p.LocalBlend(threshold=0.2)), "replace", L)
    assert e.scope is None and e.cross_replace_steps == 0.5
    assert e.local_blend == p2p.LocalBlend(words=(["cat#2"], ["dog"]), threshold=0.2, rivals=(
        ["a#1", "cat#1", "next", "to", "a#2", "red", "on", "grass"], ["a#1", "cat", "next", "to", "a#2", "red", "on", "grass"]))
    own = p2p.LocalBlend(words=("red", "red"), threshold=0.5)
    assert scoped(s, t, p2p.Edit(TARGET, scope="cat#2", local_blend=own), "replace", L).local_blend == own


@pytest.mark.slow
@pytest.mark.parametrize("source, target, scope", [("a dog on grass", "a dog on grass at night", "dog"), ("a cat on grass", "a cat on grass at night", "cat"),
                                                   ("a cat on grass", "a cat with a red hat on grass", "cat")])
def test_what_is_added_elsewhere_acts_inside_of_the_scope(emoji, source, target, scope):
    """Its words do not widen the scope, nor do they compete with it."""
    r = p2p.edit(emoji, source, p2p.Edit(target, scope=scope), steps=10, seed=1)
    mask, moved = r.masks[0, 0], (r.latents[1] - r.latents[0]).abs().amax(0)
    assert 0.02 < mask.float().mean() < 0.7 and moved[mask].max() > 0.1
    assert torch.equal(r.latents[1][:, ~mask], r.latents[0][:, ~mask])


def test_swap_and_refine_in_one_edit(narrow):
    """The new word takes the old one's column, added words keep their own, the rest is aligned."""
    s, t = narrow.tokens("a cat on grass"), narrow.tokens("a big dog on snowy grass")
    mix, keep, *_ = tables(s, t, p2p.Edit(t.text, swap={"cat": "dog"}, cross_replace_steps=1.0), "refine", 2, L)
    partner = {j: int(mix[0, :, j].argmax()) for j in range(8) if mix[0, :, j].any()}
    assert partner == {0: 0, 1: 1, 3: 2, 4: 3, 6: 4, 7: 5} and keep[0, [2, 5]].tolist() == [1, 1] and keep[0].sum() == 2 + 0
    with pytest.raises(UsageError, match="bird"):
        tables(s, t, p2p.Edit(t.text, swap={"bird": "dog"}), "refine", 2, L)


@pytest.mark.slow
def test_everything_in_one_edit(narrow):
    """Swap, refinement, two weights, windows by word and a blend: runs, and differs from each left out."""
    full = dict(mode="refine", swap={"cat": "dog"}, equalizer={"red": 2.0, "grass": -1.0},
                cross_replace_steps={"default_": 0.8, "dog": 0.4}, local_blend=p2p.LocalBlend(words=("cat", "red dog"), threshold=0.2))
    edits = [p2p.Edit("a red dog on grass", **full)]
    edits += [p2p.Edit("a red dog on grass", **{k: v for k, v in full.items() if k != name}) for name in full if name != "mode"]
    r = p2p.edit(narrow, "a cat on grass", edits, steps=8, seed=1)
    assert all((r.latents[1] - r.latents[k]).abs().max() > 1e-3 for k in range(2, len(edits) + 1))


@pytest.fixture(scope="module")
def pair(narrow):
    """The same swap without and with a scope."""
    return p2p.edit(narrow, SOURCE, [p2p.Edit(TARGET, cross_replace_steps=0.3), p2p.Edit(TARGET, cross_replace_steps=0.3, scope="cat#2")],
                    steps=10, seed=2, record=p2p.Record(text=256))


@pytest.mark.slow
def test_scope_keeps_the_rest(pair):
    free, kept = leakage(pair, 1), leakage(pair, 2)
    assert free.about == kept.about == ["cat#2", "dog"]
    assert kept.outside <= free.outside and set(kept.by_word) == set(free.by_word) and "cat#1" in kept.by_word
    free, kept = ((pair.latents[k] == pair.latents[0]).all(0).float().mean() for k in (1, 2))
    assert free < 0.01 < kept   # share of the pixels that are the source's to the bit


def test_leakage_counts_what_it_should(pair):
    """No change, none counted; all changed, all counted; without maps it says what is missing."""
    still = replace(pair, images=[pair.images[0]] * 3)
    assert leakage(still).outside == 0 and set(leakage(still).by_word.values()) == {0}
    turned = replace(pair, images=[pair.images[0], *[ImageOps.solarize(pair.images[0], 0)] * 2])
    assert leakage(turned).outside > 0.9
    before, after = pair.maps.word("cat#2", 0), pair.maps.word("dog", 1)
    about = region(before, (64, 64), 0.5) | region(after, (64, 64), 0.5)
    grey = torch.full((3, 64, 64), -1.0)
    for where, step, least, most in ((about, 255, 0, 0), (~about, 255, 1, 1), (~about, 16, 0, 0), (~about, 17, 1, 1)):   # of 255: noticed above 16
        changed = torch.where(where, grey + 2 * step / 255, grey)
        pictures = [to_pil(x[None])[0] for x in (grey, changed)]
        assert least <= leakage(replace(pair, images=[*pictures, pictures[1]])).outside <= most
    with pytest.raises(UsageError, match="record"):
        leakage(replace(pair, maps=None))


@pytest.mark.slow
def test_sweep_shares_its_source_and_lays_out_its_table(narrow):
    """Values of the first setting along the columns, of the second along the rows; the source at the left."""
    done = sweep(narrow, SOURCE, TARGET, {"cross": [0.2, 0.8], "weight:red": [-1, 0, 2]}, steps=2)
    assert len(done.runs) == 1 and done.runs[0].latents.shape[0] == 7
    assert done.variants[:3] == [{"weight:red": -1, "cross": 0.2}, {"weight:red": -1, "cross": 0.8}, {"weight:red": 0, "cross": 0.2}]
    alone = p2p.edit(narrow, SOURCE, TARGET, cross_replace_steps=0.8, equalizer={"red": -1.0}, steps=2)
    assert (alone.latents[1] - done.runs[0].latents[2]).abs().max() < 1e-3
    seeds = sweep(narrow, SOURCE, TARGET, {"seed": [3, 4], "self": [0, 0.5, 1]}, steps=2)
    assert [r.settings["seed"] for r in seeds.runs] == [3, 4]
    assert seeds.table.width > done.table.width and seeds.table.height < done.table.height   # 4 columns, 2 rows; 3 and 3


@pytest.mark.parametrize("over, message", [({}, "one or two"), ({"cross": []}, "at least one"), ({"size": [1]}, '"size" is not known'),
                                           ({"cross": [1], "self": [1], "seed": [1]}, "one or two"), ({"cross": [2.0]}, "between 0 and 1")])
def test_bad_sweeps_are_named(narrow, over, message):
    with pytest.raises(UsageError, match=message):
        sweep(narrow, SOURCE, TARGET, over, steps=1)


@pytest.mark.slow
def test_sweep_and_scope_commands(capsys, tmp_path):
    short = ["--steps", "2", "--seed", "1", "-o", str(tmp_path)]
    assert main(["sweep", SOURCE, TARGET, "--over", "cross=0,1", "--over", "seed=1,2", *short[:2], *short[4:]]) == 0
    out, err = capsys.readouterr()
    assert [line.rpartition("/")[2] for line in out.split()] == [
        "seed1-source.png", "seed1-cross0.png", "seed1-cross1.png", "seed2-source.png", "seed2-cross0.png", "seed2-cross1.png", "table.png"]
    assert err.count("mode replace") == 1
    assert main(["edit", SOURCE, TARGET, "--scope", "cat#2", "--blend-threshold", "0.5", "--renormalise", *short]) == 0
    out, err = capsys.readouterr()
    assert "is about cat#2, dog; where the maps of these words are weak, " in err
    said = read_settings(out.split()[0])["targets"][0]
    assert said["scope"] == ["cat#2"] and said["local_blend"]["threshold"] == 0.5 and said["renormalise"] is True
    assert main(["edit", "--from", out.split()[1], "-o", str(tmp_path)]) == 0
    again = capsys.readouterr().out.split()
    assert [open(p, "rb").read() for p in again] == [open(p, "rb").read() for p in out.split()]
    for bad, message in ((["--blend-start", "0.5"], "need --blend"), (["--swap", "cat"], "OLD=NEW"), (["--scope", "bird"], "bird")):
        assert main(["edit", SOURCE, TARGET, *bad, *short]) == 2 and message in capsys.readouterr().err


def test_a_sweep_over_all_words_leaves_the_windows_of_single_words():
    base = p2p.Edit("a dog", cross_replace_steps={"dog": 0.3}, equalizer={"dog": 2.0})
    assert variant(base, "cross", 0.5).cross_replace_steps == {"dog": 0.3, "default_": 0.5}
    assert variant(base, "weight:a", 3.0).equalizer == {"dog": 2.0, "a": 3.0}
    assert variant(p2p.Edit("a dog"), "cross", 0.5).cross_replace_steps == 0.5


@pytest.mark.slow
def test_a_scope_of_the_whole_prompt_has_no_rivals(narrow):
    """Nothing is left to compete with its words."""
    r = p2p.edit(narrow, "a cat", p2p.Edit("a dog", scope="a cat"), steps=2)
    words = p2p.LocalBlend(words=(["a", "cat"], ["a", "dog"]))
    assert torch.equal(r.latents, p2p.edit(narrow, "a cat", p2p.Edit("a dog", local_blend=words), steps=2).latents)

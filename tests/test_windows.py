"""The default windows: by what the edit does, said, recorded, and overruled by those that are given."""
import pytest
import torch
from plans import tables

import p2p
from p2p.edits import Edit, choose_mode
from p2p.models.text import tokens
from p2p.request import windows
from p2p.request.layers import for_network
from p2p.request.settings import from_settings, to_settings

SOURCE = "a cat on grass"
ADDS = windows.ADDS
KINDS = [
    ("a cat on grass", "a dog on grass", windows.SWAPS), ("a red cat", "a blue cat", windows.SWAPS),
    ("a photo of a cat", "a painting of a cat", windows.SWAPS), ("a cat", "a cat", windows.WEIGHS),
    ("a cat on grass", "a cat next to a house on grass", ADDS), ("a cat", "a dog and a cat", ADDS),
    ("a cat", "A cat, wearing glasses", ADDS), ("a cat", "a cat with a pair of shoes", ADDS),
    ("cats", "cats and dogs", ADDS), ("a bowl of fruit", "a bowl of fruit and a cat", ADDS),
    ("a cat next to a house on grass", "a cat on grass", windows.DESCRIBES), ("a cat, a dog", "a cat", windows.DESCRIBES),
    ("a cat with a hat", "a dog", windows.DESCRIBES),
    ("a cat", "a red cat", windows.DESCRIBES), ("a red cat", "a cat", windows.DESCRIBES),
    ("a cat on grass", "a cat in the desert", windows.DESCRIBES), ("a cat", "a cat on snowy grass", windows.DESCRIBES),
    ("a cat", "a sketch of a cat", windows.DESCRIBES), ("a cat", "a black and white photo of a big cat", windows.DESCRIBES),
    ("a photo of a cat", "an oil painting of a cat", windows.DESCRIBES), ("a bowl of fruit", "a wooden bowl of fruit", windows.DESCRIBES),
    ("", "", windows.WEIGHS),
]


@pytest.mark.parametrize("source, target, kind", KINDS)
def test_what_an_edit_does_is_told_from_its_words(source, target, kind):
    a, b = tokens(source), tokens(target)
    assert windows.usual(a, b, choose_mode(a, Edit(target), b), 77) == kind


@pytest.mark.slow
@pytest.mark.parametrize("target, kind", [("a dog on grass", windows.SWAPS), ("a cat and a dog on grass", ADDS)])
def test_the_default_is_said_recorded_and_what_runs(narrow, target, kind):
    r = p2p.edit(narrow, SOURCE, target, steps=5)
    mode = "refine" if kind is ADDS else "replace"
    assert (f'"{target}": mode {mode} (chosen from the prompts); {kind.does}: cross_replace_steps {kind.cross}, '
            f"self_replace_steps {kind.self_}") in r.notes
    (recorded,) = r.settings["targets"]
    assert (recorded["cross_replace_steps"], recorded["self_replace_steps"]) == (kind.cross, kind.self_)
    given = p2p.edit(narrow, SOURCE, target, steps=5, cross_replace_steps=kind.cross, self_replace_steps=kind.self_)
    assert torch.equal(r.latents, given.latents) and not any(kind.does in note for note in given.notes)
    assert from_settings(r.settings) == [for_network(e, narrow.unet) for e in r.edits] and r.edits == given.edits


def test_a_window_that_is_given_wins_alone(narrow):
    r = p2p.edit(narrow, SOURCE, "a cat and a dog on grass", steps=1, cross_replace_steps=0.8)
    assert (r.edits[0].cross_replace_steps, r.edits[0].self_replace_steps) == (0.8, ADDS.self_)
    assert any(note.endswith(f"{ADDS.does}: self_replace_steps {ADDS.self_}") for note in r.notes)
    word = p2p.edit(narrow, SOURCE, p2p.Edit("a cat and a dog on grass", cross_replace_steps={"dog": 0.1}), steps=1)
    assert word.edits[0].cross_replace_steps == {"dog": 0.1}


PLACES = [("a cat in the snow", "a cat in the desert", ["desert"]), ("a cat on grass", "a cat at night", ["at", "night"]),
          ("a cat on a red boat", "a cat on a blue boat", ["blue"]), ("a dog. A cat on sand.", "a dog. A dog on grass.", ["grass."]),
          ("snow and a cat in snow", "snow and a cat in sand", ["sand"]), ("a cat in sand, snow", "a cat in snow, snow", ["snow,"])]


@pytest.mark.slow
@pytest.mark.parametrize("source, target, words", PLACES)
def test_the_words_of_a_swapped_place_have_short_windows(narrow, source, target, words):
    edit = p2p.edit(narrow, source, target, steps=1).edits[0]
    assert edit.mode == "replace" and edit.self_replace_steps == 0.4
    assert edit.cross_replace_steps == {"default_": 0.8, **dict.fromkeys(words, 0.4)}


def test_a_swap_beyond_what_the_text_tower_reads_has_no_window(narrow):
    long = "a dog " * 20 + "in the "
    r = p2p.edit(narrow, "a cat " + long + "snow", "a cat " + long[:-4].replace("dog", "car", 1) + "the sand", steps=1)
    assert r.edits[0].cross_replace_steps == 0.8


def test_tables_of_an_edit_without_windows(narrow):
    a, b = tokens(SOURCE), tokens("a cat and a dog on grass")
    unset, full = (tables(a, b, Edit(b.text, **given), "refine", 10, 77) for given in (
        {}, dict(cross_replace_steps=ADDS.cross, self_replace_steps=ADDS.self_)))
    assert torch.equal(unset.mix, full.mix) and torch.equal(unset.keep, full.keep)
    assert torch.equal(unset.inject, full.inject)


def test_another_editor_has_no_windows_and_its_older_pictures_are_read(narrow):
    r = p2p.edit(narrow, SOURCE, "a cat and a dog on grass", editor=p2p.MasaCtrl(), steps=1)
    assert r.settings["targets"][0]["cross_replace_steps"] is None and not any("_steps" in n for n in r.notes)
    older = r.settings | to_settings([Edit("a dog", cross_replace_steps=0.8, self_replace_steps=0.4)], (64, 64))
    (edit,) = from_settings(older)
    assert p2p.edit(narrow, SOURCE, edit, editor=p2p.MasaCtrl(), steps=1).edits[0].prompt == "a dog"

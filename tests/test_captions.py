"""Captions, file and folder names tell edits apart."""
import numpy as np
import pytest
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.show.pictures import captions, difference, grid, marked, names, slug, table

SOURCE = "a cat on grass"


@pytest.mark.parametrize("target, weights, said", [
    ("a dog on grass", None, "cat to dog"), ("a cat on foggy grass", {"foggy": 2.0}, "with foggy, foggy × 2"), (SOURCE, {"cat": -0.5}, "cat × -0.5"),
    ("a cat", None, "without on grass"), (SOURCE, None, ""), ("a big dog at night", None, "cat on grass to big dog at night")])
def test_what_an_edit_does(target, weights, said):
    assert difference(SOURCE, target, weights) == said


def test_captions_say_in_what_edits_of_one_prompt_differ():
    edits = [p2p.Edit("a dog", cross_replace_steps=0.2), p2p.Edit("a dog", cross_replace_steps={"default_": 0.8, "dog": (0, 0.4)}),
             p2p.Edit("a cat", equalizer={"cat": 2}, layers=("up", (0.2, 1.0)))]
    found = captions([SOURCE, "a dog", "a dog", "a cat"], edits)
    assert found == [SOURCE, "a dog (cross 0.2)", "a dog (cross 0.8 dog=0:0.4)", "a cat (cat × 2)"]
    assert captions(["a cat"], []) == ["a cat"]
    whole, car = p2p.Edit("a car"), p2p.Edit("a car", scope=("red", "car"), layers="up")
    assert captions(["a", "a car", "a car"], [whole, car])[1:] == ["a car", "a car (scope red:car, layers up)"]   # what it has not is not said


def test_captions_tell_blends_of_one_prompt_apart():
    hard, soft = (p2p.LocalBlend(words=("cat", "dog"), feather=f) for f in (0.0, 4.0))
    edits = [p2p.Edit("a dog", local_blend=blend) for blend in (None, hard, soft)]
    assert captions(["a cat", *["a dog"] * 3], edits)[2:] == ["a dog (blend words cat:dog, blend feather 0)", "a dog (blend words cat:dog, blend feather 4)"]
    masked = p2p.Edit("a dog", local_blend=p2p.LocalBlend(mask=Image.new("L", (8, 8))))
    assert captions(["a cat", "a dog", "a dog"], [edits[0], masked])[1:] == ["a dog", "a dog (blend mask)"]


def test_signs_at_a_word_do_not_make_it_new():
    assert marked("a cat on grass", 'a "cat" on grass, at night!') == [
        ("a", False), ('"cat"', False), ("on", False), ("grass,", False), ("at", True), ("night!", True)]


@pytest.mark.parametrize("caption", ["猫が草の上にいる" * 4, "W" * 100])
def test_a_word_that_is_longer_than_its_picture_is_broken(caption):
    """It stays in its own column, below its picture."""
    sheet = np.asarray(grid([Image.new("RGB", (64, 64))] * 2, [caption, ""], 64))
    below, column = sheet[76:], sheet.shape[1] // 2
    assert (below[:, :column] != below[-1, -1]).any() and (below[:, column:] == below[-1, -1]).all()


def test_no_caption_is_drawn_as_a_box(narrow):
    """Pillow's font has no multiplication sign."""
    picture = Image.new("RGB", (64, 64))
    drawn, written = (grid([picture] * 2, ["a cat", f"a cat (cat {sign} 2)"]).tobytes() for sign in "×x")
    assert drawn == written


def test_emoji_are_drawn_by_their_names(narrow):
    picture = Image.new("RGB", (64, 64))
    for seen, said in (("a 🐱 on grass", "a [cat face] on grass"), ("✨❤️ a cat", "[sparkles][heavy black heart] a cat"),
                       ("a 👩\u200d🎤", "a [woman][microphone]"),
                       ("a café – “Zürich”, ½", 'a cafe - "Zurich", 1/2'), ("20€ 猫 \u0301\ue000", "20[euro sign] [u+732b] [u+e000]")):
        assert grid([picture] * 2, [seen, seen]).tobytes() == grid([picture] * 2, [said, said]).tobytes()
        assert table([[picture]], [seen], [seen], corner=seen).tobytes() == table([[picture]], [said], [said], corner=said).tobytes()


def test_names_of_files_are_safe_and_their_own():
    assert names(2, ["cat to dog"]) == ["source", "edit"] and names(3) == ["source", "edit-1", "edit-2"]
    assert names(4, ["cat to ../dog", "cat to 猫", "foggy × 2"]) == ["source", "edit-1-cat-to-dog", "edit-2-cat-to", "edit-3-foggy-x-2"]
    assert slug("../..") == "" and len(slug("word " * 50)) <= 48


def test_a_result_is_saved_and_shown_by_what_its_edits_do(narrow, tmp_path):
    r = p2p.edit(narrow, SOURCE, ["a dog on grass", p2p.Edit(SOURCE, equalizer={"grass": 2.0})], steps=1)
    assert r.captions() == [SOURCE, "a dog on grass", "a cat on grass (grass × 2)"]
    assert [f.name for f in r.save(tmp_path / "x")][1:3] == ["edit-1-cat-to-dog.png", "edit-2-grass-x-2.png"]
    twice = p2p.generate(narrow, ["a cat", "a cat"], seed=[3, 4], steps=1)
    assert twice.captions() == ["a cat (seed 3)", "a cat (seed 4)"] and twice.names() == ["1", "2"]


@pytest.mark.slow
@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("argv, folder", [
    (["edit", SOURCE, "a dog on grass"], "0001-cat-to-dog"), (["edit", SOURCE, SOURCE, "--weight", "cat=2"], "0001-cat-x-2"),
    (["edit", SOURCE, "a dog on grass", "a cat"], "0001-cat-to-dog-without-on-grass"), (["maps", SOURCE], "0001-a-cat-on-grass"),
    (["maps", SOURCE, "a dog on grass"], "0001-cat-to-dog"), (["sweep", SOURCE, "a dog on grass", "--over", "cross=0,1"], "0001-sweep-cat-to-dog"),
    (["generate", "../猫"], "0001-run")])
def test_a_folder_is_named_by_what_was_done(tmp_path, argv, folder):
    assert main([*argv, "--steps", "1", "--seed", "1", "-q", "-o", str(tmp_path)]) == 0
    assert [f.name for f in tmp_path.iterdir()] == [folder]

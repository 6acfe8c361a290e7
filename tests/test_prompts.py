"""Other programs' prompt syntax is refused before anything is computed, with what to write; ordinary text is left alone."""
import time

import pytest
from PIL import Image

import p2p
from p2p.errors import UsageError
from p2p.request.prompts import check

SYNTAX = {
    "(dog)1.3 on grass": "--weight dog=1.3", "a (dog)++ here": "--weight dog=1.2",
    "a (dog)--": "--weight dog=1.2", "a [dog:cat:.4]": "--cross", "a [dog:0.5] x": "--cross", "a [dog::10]": "--cross",
    "a [dog|cat] here": "--cross", "{red|blue} car": "--cross", "{{dog}}": "emphasis", "a dog <lora:fluffy:0.8>": "add-on", "<hypernet:x:1> a": "add-on",
    "a dog embedding:bad": "add-on", "a cat BREAK a dog": "leave it out", "a cat AND a dog": '"and"', "grass BREAK": '"break"',
    "cat.swap(dog)": "conjunction", '("a cat", "a dog").blend(0.7, 0.3)': "conjunction", '("x", "y").and()': "conjunction",
}
ORDINARY = ["a cat on grass", "a sign that says SALT AND PEPPER", "A CAT AND A DOG", 'the word "BREAK"', "bread and butter",
            "a poster (ratio 16:9)", "at noon (12:00)", "(Psalm 23:4) in stone", "a film from 1999: the end", "c++ and c--",
            "a photo (2)", "a (dog:1.4) on [grass]", "a ((dog))", "x > y < z", "cat, dog: friends", "f(x)/2", "a heart <3", "2 + 2 [a joke]", ""]


@pytest.mark.parametrize("prompt", SYNTAX)
def test_other_programs_syntax_is_refused_with_what_to_write(prompt):
    with pytest.raises(UsageError) as refused:
        check(prompt)
    assert SYNTAX[prompt] in str(refused.value) and prompt in str(refused.value)


@pytest.mark.parametrize("prompt", ORDINARY)
def test_ordinary_text_is_left_alone(prompt):
    check(prompt)


@pytest.mark.parametrize("prompt, noted", [("{x}", True), ("a dog++", True), ("a cat", False), ("a ) cat", False), (r"a \(dog:1.4\)", True)])
def test_what_is_text_is_said_to_be(prompt, noted):
    assert bool(check(prompt)) == noted


@pytest.mark.parametrize("prompt, weight", [
    ("a dog:1.4 on grass", "dog=1.4"), ("a dog:1.4, a cat", "dog=1.4"), ("a dog:.5.", "dog=0.5"), ("hot dog::2", "dog=2"),
    ("food::-1", "food=-1"), ("dog::1.5 [x]", "dog=1.5"), ("a fluffy-dog:1.10", "fluffy-dog=1.1")])
def test_a_word_with_a_decimal_factor_is_text_and_said_to_be(prompt, weight):
    """A habit from programs in which it is a weight in brackets (and "::" one without them)."""
    assert f"is read as text; if a weight is meant, write the word alone, and weigh it in an edit: --weight {weight} " in check(prompt)[0]


@pytest.mark.parametrize("prompt", ["ratio 16:9", "at 12:30", "scale 1:2.5", "psalm 23:4", "a cat: 1.5 m tall", "room dog:14", "v:1.4.5",
                                    "std::vector", "a map 1:25.000", "https://x.y:80.1/z"])
def test_other_colons_are_ordinary_text(prompt):
    assert check(prompt) == []


@pytest.mark.parametrize("prompt", ["(" * 10**5, "[" * 10**5, "((" * 10**5 + "))", "(a:" * 10**5, "[a:" * 10**5, "<lora:" * 10**5,
                                    "(a " * 10**5 + ":1", "( " * 10**5, "(" + " " * 10**5 + ")", "a" * 10**6, "[a|" * 10**5,
                                    "a-" * 9999, "a'" * 9999, "a:" * 9999, "a:1." * 4999, "a::" * 6666, "a:" + "1" * 19_990])
def test_no_prompt_takes_long_to_check(prompt):
    began = time.process_time()
    try:
        check(prompt)
    except UsageError as error:
        assert len(str(error)) < 600
    assert time.process_time() - began < 30


def test_every_entrance_checks(emoji, monkeypatch):
    monkeypatch.setattr(p2p.Model, "predict", None)   # nothing is computed
    bad, good, picture = "a [dog:cat:0.4]", "a dog", Image.new("RGB", (64, 64))
    for enter in (lambda: p2p.generate(emoji, [good, bad]), lambda: p2p.edit(emoji, bad, good), lambda: p2p.edit(emoji, good, bad),
                  lambda: p2p.edit(emoji, good, [p2p.Edit(bad)]), lambda: p2p.invert(emoji, picture, bad), lambda: p2p.trace(emoji, bad)):
        with pytest.raises(UsageError, match="a schedule"):
            enter()
    monkeypatch.undo()
    assert any("{dog} is read as text" in note for note in p2p.generate(emoji, "a {dog}", steps=1).notes)

"""Weights in the prompt, as AUTOMATIC1111's web UI reads them."""
import pytest
import torch

import p2p
from p2p import align
from p2p.cli.parser import main
from p2p.errors import UsageError
from p2p.image import open_picture
from p2p.models.text import tokens
from p2p.request.emphasis import condition, equalizer, escaped, read, token_weights, weigh
from p2p.show.pictures import read_settings

READ = {   # as that program's documentation has them, or follows from its rules
    "a cat": [("a cat", 1)],
    "a (cat) here": [("a ", 1), ("cat", 1.1), (" here", 1)],
    "a [cat]": [("a ", 1), ("cat", 1 / 1.1)],
    "((cat))": [("cat", 1.21)],
    "(a [red] dog:1.5)": [("a ", 1.5), ("red", 1.5 / 1.1), (" dog", 1.5)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
    "(unbalanced": [("unbalanced", 1.1)],
    "unbalanced)": [("unbalanced)", 1)],
    r"\(literal\] [\(it]": [("(literal] ", 1), ("(it", 1 / 1.1)],
    "(meet at 10:30)": [("meet at 10:30", 1.1)],
    "(studio 54:1.3)": [("studio 54", 1.3)],
    "(cat:-1)": [("cat", -1)],
    "": [],
}


@pytest.mark.parametrize("prompt", READ)
def test_brackets_and_weights(prompt):
    found = read(prompt).parts
    assert [t for t, _ in found] == [t for t, _ in READ[prompt]]
    assert [w for _, w in found] == pytest.approx([w for _, w in READ[prompt]])


@pytest.mark.parametrize("text", ["a cat", "a (cat) [here]", r"back\slash \( (", "(a:1.3)"])
def test_escaped_text_comes_back_as_it_is(text):
    assert read(escaped(text)).text == text and read(escaped(text)).plain


def test_words_of_a_target_are_faders():
    """By name: the second "cat" alone; phrases word by word; punctuation stays out."""
    assert equalizer(read("a cat and a (cat:1.5), (red dog:2)"), tokens) == {"cat#2": 1.5, "red": 2, "dog": 2}
    assert equalizer(read("a cat, (a (cat), here:0.5)"), tokens) == pytest.approx(
        {"a#2": 0.5, "cat#2": 0.55, ",#2": 0.5, "here": 0.5})
    assert equalizer(read("a cat"), tokens) == {}


def test_names_of_tokens_find_these_tokens():
    prompt = tokens("a cat, a (cat) and the cats' cat.")
    for _, columns in align.words(prompt):
        assert align.word_tokens(prompt, align.name_of(prompt, columns, {}), 77) == columns
    first = align.words(prompt)[4][1]   # "(cat)": its bracket alone ends within a word of the text, none of its tokens
    assert align.word_tokens(prompt, align.name_of(prompt, first[:1], {}), 77) == first[:1]


@pytest.mark.parametrize("prompt", ["a (cat:2)s", "sub(marine)"])
def test_a_part_of_a_word_is_refused(prompt):
    with pytest.raises(UsageError, match="part of a word"):
        token_weights(read(prompt), tokens)


def test_embeddings_are_weighed_by_the_rule_written_out():
    """z m mean(z) / mean(z m), each tower's own; ends and padding weigh 1."""
    z = torch.randn(77, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
    weights = token_weights(read("a (red:1.4) [dog]"), tokens)
    assert weights == pytest.approx([1, 1, 1.4, 1 / 1.1, 1])
    m = torch.ones(77, 1, dtype=torch.float64)
    m[2], m[3] = 1.4, 1 / 1.1
    expected = [part * m * part.mean() / (part * m).mean() for part in (z[:, :2], z[:, 2:])]
    assert torch.allclose(weigh(z, weights, (2, 3)), torch.cat(expected, 1), rtol=1e-12)
    assert torch.allclose(weigh(z, [1.0] * 4, (5,)), z, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ in runs

EASY = dict(steps=2, seed=1)


def test_a_weight_in_a_target_is_its_equalizer(narrow):
    a = p2p.edit(narrow, "a cat on grass", "a (dog:1.5) on [grass]", **EASY)
    b = p2p.edit(narrow, "a cat on grass", "a dog on grass", equalizer={"dog": 1.5, "grass": 1 / 1.1}, **EASY)
    assert torch.equal(a.latents, b.latents) and a.prompts == b.prompts == ["a cat on grass", "a dog on grass"]
    assert a.settings["targets"] == b.settings["targets"]


@pytest.mark.slow
def test_elsewhere_it_is_on_the_embedding(narrow):
    """In a source, in `generate`, in what guidance leads away from, and in a target that asks for it."""
    weighted = narrow.condition(["a red cat"]).context[0]
    weighted = weigh(weighted, [1, 1, 1.5, 1, 1], [weighted.shape[1]])
    found = condition(narrow, ["a (red:1.5) cat", "a red cat"], 64, 64).context
    assert torch.allclose(found[0], weighted, atol=1e-6) and torch.allclose(found[1], narrow.condition(["a red cat"]).context[0], atol=1e-6)
    whole = p2p.generate(narrow, ["a (red:1.5) cat", "a red cat"], **EASY).latents
    assert not torch.equal(whole[0], whole[1])
    r = p2p.edit(narrow, "a (red:1.5) cat", p2p.Edit("a (red:1.5) dog", emphasis="embedding"), **EASY)
    assert torch.allclose(r.latents[0], whole[0], atol=1e-5)
    weights_as_equalizer = p2p.edit(narrow, "a (red:1.5) cat", "a (red:1.5) dog", **EASY)
    assert not torch.equal(r.latents[1], weights_as_equalizer.latents[1])
    lead = [p2p.generate(narrow, "a cat", negative_prompt=n, **EASY).latents for n in ("a bird", "a (bird:1.9)")]
    assert not torch.equal(*lead)


@pytest.mark.slow
def test_an_inverted_source_keeps_its_weights(narrow):
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    invs = [p2p.invert(narrow, picture, p, method="ddim", steps=2) for p in ("a (red:1.9) cat", "a red cat")]
    assert not torch.equal(invs[0].latents, invs[1].latents) and invs[0].prompt == "a (red:1.9) cat"
    assert not torch.equal(*(p2p.edit(narrow, inv, "a red dog").latents[0] for inv in invs))


@pytest.mark.parametrize("prompt, message", [("a (dog:2)s", "part of a word"), ("[a:b:0.4]", "a schedule"), ("a (dog", None)])
def test_in_runs_others_are_refused_or_hold_to_the_end(narrow, prompt, message):
    if message is None:
        assert p2p.edit(narrow, "a cat", prompt, **EASY).prompts[1] == "a dog"
    else:
        with pytest.raises(UsageError, match=message):
            p2p.edit(narrow, "a cat", prompt, **EASY)


def test_brackets_of_a_text_are_written_with_a_backslash(narrow):
    with pytest.raises(UsageError, match=r"write \\\( and \\\) for brackets that are text"):
        p2p.generate(narrow, "f(x)", **EASY)
    assert torch.equal(condition(narrow, [r"f\(x\)"], 64, 64).context, narrow.condition(["f(x)"]).context)
    with pytest.raises(UsageError, match="more than 200 brackets"):
        read("(a" * 300)


def test_a_word_is_weighed_once(narrow):
    with pytest.raises(UsageError, match="both weight dog"):
        p2p.edit(narrow, "a cat", p2p.Edit("a (dog:2)", equalizer={"dog": 3}), **EASY)


@pytest.mark.slow
def test_weights_are_noted_recorded_and_replayed(tmp_path, capsys):
    argv = ["edit", "a (red:1.4) cat", "a (red:1.2) dog", "--emphasis", "embedding", "--steps", "2", "--seed", "1", "-o", str(tmp_path)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert '"a (red:1.2) dog": weights on the embedding: red x 1.2' in err
    made = out.split()[1]
    assert main(["edit", "--from", made, "-o", str(tmp_path)]) == 0
    assert open_picture(made).tobytes() == open_picture(capsys.readouterr().out.split()[1]).tobytes()
    assert read_settings(made)["source"] == "a (red:1.4) cat"

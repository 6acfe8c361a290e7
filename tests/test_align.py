"""Words, tokens and the two alignments."""
import pytest
import torch

from p2p import align
from p2p.errors import UsageError
from p2p.models.text import tokenizer, tokens

L = 77
PROMPTS = ["a photo of a cat riding a bicycle", "Ünïcode & émojis: 2 cats!", "  a   cat,on\tgrass ", "don’t &amp; x", "", "𝔘😀 !?"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_the_tokenizers(prompt):
    t = tokens(prompt)
    assert t.ids == [49406, *tokenizer().encode(prompt), 49407]
    assert len(t.spans) == len(t.ids)
    assert [t.text[s:e] for s, e in t.spans[1:-1]] == [t.text[s:e].strip() for s, e in t.spans[1:-1]]


@pytest.mark.parametrize("prompt, word, want", [
    ("a cat on grass", "cat", [2]), ("A  Cat, on grass", "cat", [2]), ("a cat on grass", "CAT", [2]),
    ("a big cat on grass", "big cat", [2, 3]), ("a cat and a cat", "cat", [2, 5]), ("(cat)", "cat", [2]),
    ("a cat and a cat", "cat#2", [5]), ("a cat and a cat", "a cat#1", [1, 2]), ("room #2", "#2", [2, 3]),
    ("a schnauzer on grass", "schnauzer", [2, 3]), ("a cat on grass", "a cat on grass", [1, 2, 3, 4]),
    ("a tiger on grass", "tiger,", [2]), ("a tiger on grass", '"tiger"', [2]), ("a tiger, on grass", "tiger on", [2, 3, 4]),
    ("a tiger, on grass", "tiger,", [2, 3]), ("a t-shirt", "t shirt", [2, 3, 4]), ("a cat and a cat", "(cat)#2", [5]),
])
def test_word_is_found(prompt, word, want):
    assert align.word_tokens(tokens(prompt), word, L) == want


@pytest.mark.parametrize("prompt, word", [("a category", "cat"), ("a concat", "cat"), ("a cat", "dog"), ("a cat", ""),
                                          ("a cat on grass", "cat grass"), ("a cat and a cat", "cat#3"), ("a cat", "dog#1"),
                                          ("a cat", "cat#0")])
def test_absent_word_is_an_error_that_names_it(prompt, word):
    with pytest.raises(UsageError, match=f'"{word}"'):
        align.word_tokens(tokens(prompt), word, L)


def test_word_beyond_the_text_tower_is_an_error():
    with pytest.raises(UsageError, match="beyond token 75"):
        align.word_tokens(tokens("a " * 80 + "cat"), "cat", L)


def test_words_end_where_the_text_tower_stops_reading():
    """Of 8 tokens the last one is the end's, so the seventh word is beyond; one that is there twice counts once."""
    prompt = tokens("one two three four five six seven two")
    assert align.word_tokens(prompt, "six", 8) == [6] and align.word_tokens(prompt, "two", 8) == [2]
    with pytest.raises(UsageError, match='"seven" stands beyond token 6'):
        align.word_tokens(prompt, "seven", 8)


SWAPS = [("a cat on grass", "a dog on grass"), ("a cat on hill", "a hippopotamus on hill"),
         ("a schnauzer on hill", "a cat on hill"),
         ("a schnauzer and a hippopotamus", "a hippopotamus and a cat"), ("cat", "dog"), ("a " * 90, "b " * 90),
         ("a cat, on grass", "a dog on grass")]


@pytest.mark.parametrize("source, target", SWAPS)
@pytest.mark.parametrize("length", [77, 32])
def test_replacement_moves_all_attention(source, target, length):
    """Rows of M sum to 1: whatever attention the source gave, the target's columns hold all of it."""
    m = align.replacement(tokens(source), tokens(target), length)
    assert (m.sum(1) - 1).abs().max() < 1e-12 and m.min() >= 0


def test_replacement_joins_words():
    """1 -> n pieces is shared out, n -> 1 is summed, and the tail stays with its word."""
    s, t = tokens("a cat on hill"), tokens("a hippopotamus on hill")
    n = len(t.ids) - len(s.ids) + 1
    m = align.replacement(s, t, L)
    assert n > 1 and torch.allclose(m[2, 2:2 + n], torch.full((n,), 1 / n, dtype=torch.float64))
    assert m[3, 2 + n] == m[4, 3 + n] == m[5, 4 + n] == m[6, 5 + n] == 1      # on, hill, end, first padding
    back = align.replacement(t, s, L)
    assert (back[2:2 + n, 2] == 1).all() and back[2 + n, 3] == 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_aligned_with_itself_is_the_identity(prompt):
    t = tokens(prompt)
    assert torch.equal(align.replacement(t, t, L), torch.eye(L, dtype=torch.float64))
    mapper, a = align.refinement(t, t, L)
    assert torch.equal(mapper, torch.arange(L)) and a.all()


def test_replacement_needs_equal_word_counts():
    with pytest.raises(UsageError, match="refine"):
        align.replacement(tokens("a cat"), tokens("a big cat"), L)


def test_refinement_finds_the_kept_words():
    s, t = tokens("a castle next to a river"), tokens("children drawing of a castle next to a river")
    mapper, a = align.refinement(s, t, L)
    assert a[1:4].sum() == 0 and torch.equal(mapper[4:10], torch.arange(1, 7)) and a[4:10].all()
    assert mapper[10] == 7                                                    # the ends belong together
    assert torch.equal(mapper[11:L], torch.arange(11, L)) and a[11:].all()     # and so does padding in the same place


def test_refinement_of_a_shorter_prompt():
    """Removed words: every target token has its own source token; padding where the source has words has none."""
    s, t = tokens("a big red cat on grass"), tokens("a cat on grass")
    mapper, a = align.refinement(s, t, L)
    assert mapper[:6].tolist() == [0, 1, 4, 5, 6, 7] and a[:6].all()
    assert (a == 0).nonzero().flatten().tolist() == [6, 7] and torch.equal(mapper[8:], torch.arange(8, L))
    assert len(set(mapper[a > 0].tolist())) == int(a.sum())


ADDED = [("a cat", "a big cat"), ("a castle next to a river", "children drawing of a castle next to a river"),
         ("a cat on grass", "a cat with a hat on grass, at night"), ("a photo of a house", "a photo of a house in the schnauzer park")]


@pytest.mark.parametrize("source, target", ADDED)
@pytest.mark.parametrize("length", [77, 32])
def test_exact_is_official_where_words_are_added(source, target, length):
    """The official mapper misplaces what follows removed words alone: added ones, the ends and all padding are right."""
    exact, official = (f(tokens(source), tokens(target), length) for f in (align.refinement, align.official_refinement))
    assert torch.equal(exact[1], official[1]) and torch.equal(exact[0] * exact[1], official[0] * official[1])


def test_padding_of_a_swap_belongs_to_the_padding_in_the_same_place():
    """As in the official mapper; where only one text is padded, the surplus stays with the first padding of both."""
    for pair in (("a cat on hill", "a hippopotamus on hill"), ("a hippopotamus on hill", "a cat on hill")):
        s, t = map(tokens, pair)
        exact, official = align.replacement(s, t, L), align.official_replacement(s, t, L)
        first = max(len(s.ids), len(t.ids)) + 1
        assert torch.equal(exact[first:, first:], torch.eye(L - first, dtype=torch.float64))
        shifted = abs(len(s.ids) - len(t.ids))
        assert torch.equal(official[first:L - shifted, first:L - shifted], exact[first:L - shifted, first:L - shifted])


@pytest.mark.parametrize("source, target, swap", [
    ("a cat on grass", "a dog on grass", True), ("a cat on grass", "a dog on sand", True), ("cat", "dog", True),
    ("a cat and a dog", "a dog and a cat", True), ("a huge dog on grass", "a dog on foggy grass", False),
    ("a red cat on the beach", "a cat on the snowy beach", False), ("a cat", "a big cat", False), ("a cat", "", False)])
def test_a_swap_changes_words_in_place(source, target, swap):
    assert align.is_swap(tokens(source), tokens(target)) == swap


def test_official_replacement_misplaces_the_tail():
    """The fault that `aligner="official"` reproduces: after the last swap, column j reads source column j."""
    m = align.official_replacement(tokens("a cat on hill"), tokens("a hippopotamus on hill"), L)
    tail = len(tokens("a hippopotamus on hill").ids) - 3
    assert m[tail, tail] == 1 and m[3, tail] == 0
    same = ("a cat on grass", "a dog on grass")
    assert torch.equal(align.official_replacement(*map(tokens, same), L), align.replacement(*map(tokens, same), L))


def test_official_refinement_reads_padding_in_place():
    mapper, a = align.official_refinement(tokens("a castle"), tokens("a big castle"), L)
    assert mapper[:5].tolist() == [0, 1, 0, 2, 3] and a[:5].tolist() == [1, 1, 0, 1, 1]
    assert torch.equal(mapper[5:], torch.arange(5, L)) and a[5:].all()


def test_replacement_of_texts_that_are_cut_moves_all_attention():
    """What has no partner because one text is cut goes to the end of the other: no row of M is empty."""
    long = " ".join(["a cat next to a house"] * 6)
    for old, new, length in (("cat", "hippopotamus", 32), ("house", "antidisestablishmentarianism", 32), ("cat", "dog", 20)):
        for a, b in ((long, long.replace(old, new)), (long.replace(old, new), long)):
            m = align.replacement(tokens(a), tokens(b), length)
            assert torch.allclose(m.sum(1), torch.ones(length, dtype=torch.float64)) and (m.sum(0) > 0).all()


def test_words_are_cleaned_as_the_tokenizer_cleans_the_prompt():
    assert align.word_tokens(tokens("a dog’s house"), "dog’s", 77) == align.word_tokens(tokens("a dog's house"), "dog's", 77)


def test_an_occurrence_beyond_the_text_tower_does_not_count():
    prompt = tokens("a cat " + "very " * 30 + "big cat")
    assert align.word_tokens(prompt, "cat", 32) == [2]


def test_a_word_that_occurs_a_thousand_times_is_looked_for_once(monkeypatch):
    looked = []
    monkeypatch.setattr(align, "_occurrences", lambda *a, real=align._occurrences: looked.append(a[1]) or real(*a))
    named = align.named_words(tokens("cat " * 1000))
    assert named[0] == ("cat#1", [1]) and named[-1] == ("cat#1000", [1000]) and looked == ["cat"]


def test_the_official_mapper_reads_what_the_tower_reads():
    m = align.official_replacement(tokens("a cat " * 20 + "on grass"), tokens("a dog " * 20 + "on grass"), 32)
    assert m.shape == (32, 32) and torch.equal(m, torch.eye(32, dtype=torch.float64))

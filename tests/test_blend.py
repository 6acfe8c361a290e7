"""Local edits against an oracle written out pixel by pixel, and what a mask promises."""
import literal
import numpy as np
import pytest
import torch
from PIL import Image

import p2p
from p2p import align
from p2p.blend import fixed
from p2p.edits import choose_mode, cross_alpha, decided
from p2p.errors import UsageError

SOURCE, SWAP, REFINED = (f"a red {words}" for words in (
    "cat next to a tree on grass", "dog next to a tree on grass", "cat next to a tree on grass at night"))
STEPS = 6
SIZE = {"emoji": (64, 64), "sd1": (192, 192)}


def columns(model, prompt, words):
    """Token positions of single words, counted by hand: each of these words is one token."""
    return [prompt.split().index(w) + 1 for w in words]


def oracle_mask(maps, model, prompts, blend, size):
    """One target's mask from `maps`: a list over steps of {site: (2, heads, pixels, L)}; loops, no tricks."""
    level = blend.level or 4
    side = size // level
    near = [range(max(i - 1, 0), min(i + 2, side)) for i in range(side)]

    def share(words, row, pooled=True):
        """Their attention in the source (row 0) or the target, over its maximum: side lists of side numbers."""
        total = torch.zeros(side**2, dtype=torch.float64)
        for step in maps:
            fitting = {site: m.double() for site, m in step.items() if m.shape[2] == side**2}
            kept = [m for site, m in fitting.items() if "mid_block" not in site] or list(fitting.values())
            for c in columns(model, prompts[row], words):
                total += torch.cat([m[row, :, :, c] for m in kept]).mean(0)       # of all sites and heads
        field = (total / total.max()).view(side, side).tolist()
        return [[max(field[y][x] for y in near[i] for x in near[j]) for j in range(side)] for i in range(side)] if pooled else field

    def competes(rival, own):
        flat = [(r, o) for rs, os in zip(rival, own) for r, o in zip(rs, os)]
        wide = sum(r > 0.5 for r, _ in flat) >= 0.3 * len(flat)
        return not wide and max(o for r, o in flat if r == max(flat)[0]) < 0.5

    limits = blend.threshold if isinstance(blend.threshold, tuple) else (blend.threshold,) * 2
    on = torch.zeros(2, side, side, dtype=torch.bool)                             # words, substruct
    for row in range(2):
        own = share(blend.words[row], row)
        rivals = [share([word], row) for word in (blend.rivals or ((), ()))[row]]
        rivals = [r for r in rivals if competes(r, own)]
        minus = share(blend.substruct[row], row, pooled=False) if blend.substruct else [[0] * side] * side
        for i in range(side):
            for j in range(side):
                on[0, i, j] |= own[i][j] > max([limits[0], *(r[i][j] for r in rivals)])
                on[1, i, j] |= minus[i][j] > limits[1]
    return (on[0] & ~on[1]).repeat_interleave(level, 0).repeat_interleave(level, 1)


def columns_of(model, prompts, edit, steps):
    """What tests/literal.py injects for this edit at every step; every word of these prompts is one token."""
    source, target = map(model.tokens, prompts)
    refined = align.refinement(source, target, model.length)
    mapper, aligned = refined if edit.mode == "refine" else (range(model.length), [True] * model.length)
    alpha = cross_alpha(edit.cross_replace_steps, target, steps, model.length)
    return [{j: ([int(mapper[j])], 1.0) for j in range(model.length) if a[j] and aligned[j]} for a in alpha]


@torch.no_grad()
def oracle(model, prompts, edit, steps):
    """Algorithm 1 with a local edit, written out: the latents of source and target."""
    source, target = map(model.tokens, prompts)
    edit = decided(source, target, edit, choose_mode(source, edit, target), model.length)
    size, blend, seen = SIZE[model.family], edit.local_blend, []

    def inside(i, *maps):
        seen.append({site: torch.cat([m[site][..., -model.length:] for m in maps]) for site in model.unet.text_sites()})
        if blend is None or i < int(blend.start * steps):
            return torch.tensor(True)
        return oracle_mask(seen, model, prompts, blend, model.latent_shape(*size)[1])

    self_steps = int(edit.self_replace_steps * steps)
    *_, latents = literal.algorithm_1(model, *prompts, columns_of(model, prompts, edit, steps), self_steps, steps,
                                      size=size, local_blend=inside)
    return latents


@pytest.fixture(scope="module", autouse=True)
def passes():
    """The oracle's passes that change no map are made once: every case has the source's, and the target's of the empty prompt
    until it blends."""
    real, made = literal.DM, {}

    def DM(model, z, t, context, change=None):
        key = id(model.unet), t, z.numpy().tobytes(), context.numpy().tobytes(), change is None
        if key in made:
            out, maps = made[key]
            assert all(change(site, M, pixels) is M for site, M, pixels in maps)
            return out
        maps, changed = [], []

        def look(site, M, pixels):
            used = change(site, M, pixels)
            maps.append((site, M, pixels))
            changed.append(used is not M)
            return used

        out = real(model, z, t, context, *([look] if change else []))
        if not any(changed):
            made[key] = out, maps
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(literal, "DM", DM)
        yield


CASES = {
    "words": p2p.LocalBlend(words=(["cat"], ["dog"])),
    "several words": p2p.LocalBlend(words=(["cat", "tree"], ["dog", "tree"]), threshold=0.5),
    "other words taken out": p2p.LocalBlend(words=(["red", "cat"], ["red", "dog"]), substruct=(["tree"], ["tree"]), threshold=(0.2, 0.6)),
    "rivals": p2p.LocalBlend(words=(["cat"], ["dog"]), rivals=(["red", "tree", "grass"], ["tree", "on"]), threshold=0.1),
    "from the start": p2p.LocalBlend(words=(["cat"], ["dog"]), start=0.0, threshold=0.1),
    "late": p2p.LocalBlend(words=(["cat"], ["dog"]), start=0.7),
    "coarser maps": p2p.LocalBlend(words=(["cat"], ["dog"]), level=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("family, name", [*(("emoji" if name == "rivals" else "narrow", name) for name in CASES), ("sd1", "other words taken out"), ("sd1", "rivals"), ("sd1", "late")])
def test_blend_equals_its_definition(request, undecoded, family, name):
    """Whole runs, windows open and closed on the way, hybrid attention (emoji's) and cross-attention (sd1)."""
    model, blend = request.getfixturevalue(family), CASES[name]
    edit = p2p.Edit(SWAP, mode="replace", cross_replace_steps={"default_": 0.6, "dog": (0.2, 0.5)}, self_replace_steps=0.3,
                    local_blend=blend)
    height, width = SIZE[model.family]
    r = p2p.edit(model, SOURCE, [edit], steps=STEPS, height=height, width=width)
    wanted = oracle(model, [SOURCE, SWAP], edit, STEPS)
    assert (r.latents - wanted).abs().max() <= 1e-3 * wanted.std()


@pytest.mark.slow
def test_targets_blend_each_in_its_own_way(narrow):
    edits = [p2p.Edit(SWAP, mode="replace", local_blend=CASES["words"]), p2p.Edit(REFINED, mode="refine"),
             p2p.Edit(SWAP, mode="replace", local_blend=CASES["late"])]
    r = p2p.edit(narrow, SOURCE, edits, steps=STEPS)
    for prompt, edit, found in zip((SWAP, REFINED, SWAP), edits, r.latents[1:]):
        wanted = oracle(narrow, [SOURCE, prompt], edit, STEPS)[1]
        assert (found - wanted).abs().max() <= 1e-3 * wanted.std()


@pytest.mark.slow
def test_outside_the_mask_the_picture_is_the_source(narrow):
    """To the bit, whatever the start: the last step copies the source's pixels."""
    mask = torch.zeros(64, 64)
    mask[20:50, 10:40] = 1
    r = p2p.edit(narrow, SOURCE, p2p.Edit(REFINED, local_blend=p2p.LocalBlend(mask=mask, start=0.9)), steps=STEPS)
    same = (r.latents[1] == r.latents[0]).all(0)
    assert same[mask == 0].all() and not same[mask == 1].all() and torch.equal(r.masks[0, 0], mask > 0)


@pytest.mark.slow
def test_a_mask_limits_the_words(narrow):
    """Words alone, a mask alone, and both: both is where the two agree."""
    words = p2p.LocalBlend(words=("cat", "dog"), start=0.0, threshold=0.2)
    where = p2p.edit(narrow, SOURCE, SWAP, local_blend=words, steps=STEPS).masks[0, 0]
    middle = int(where.nonzero()[:, 1].median())     # a mask that ends amid the words' region
    mask = torch.zeros(64, 64)
    mask[:, :middle] = 1
    both = p2p.LocalBlend(words=("cat", "dog"), start=0.0, threshold=0.2, mask=Image.fromarray((mask * 255).byte().numpy()))
    r = p2p.edit(narrow, SOURCE, [p2p.Edit(SWAP, local_blend=b) for b in (words, both)], steps=STEPS)
    changed = [(r.latents[k] != r.latents[0]).any(0) for k in (1, 2)]
    assert changed[0][:, middle:].any() and changed[1][:, :middle].any() and not changed[1][:, middle:].any()


@pytest.mark.parametrize("blend, message", {
    p2p.LocalBlend(): "words or a mask", p2p.LocalBlend(words=("cat", "bird")): 'no word "bird"',
    p2p.LocalBlend(words="cat"): "pairs", p2p.LocalBlend(mask=torch.ones(8, 8), rivals=("tree", "tree")): "give words", p2p.LocalBlend(words=("cat", "dog"), threshold=1.5): "threshold",
    p2p.LocalBlend(words=("cat", "dog"), start=2): "start", p2p.LocalBlend(words=("cat", "dog"), level=5): "no attention to text at 13 x 13",
    p2p.LocalBlend(words=("cat", "dog"), level=2): "choose another level",
}.items())
def test_bad_blends_are_named(narrow, blend, message):
    with pytest.raises(UsageError, match=message):
        p2p.edit(narrow, SOURCE, SWAP, local_blend=blend, steps=2)


@pytest.mark.slow
def test_maps_of_pixels_are_not_taken_for_maps_of_text(narrow):
    """At 4 x 8 positions there are as many pixels as tokens: recording self-attention changes no mask, and no mean."""
    words, size = p2p.LocalBlend(words=("cat", "dog"), start=0.0, level=8), dict(height=32, width=64)
    plain = p2p.edit(narrow, SOURCE, SWAP, local_blend=words, steps=STEPS, record=p2p.Record(text=32), **size)
    both = p2p.edit(narrow, SOURCE, SWAP, local_blend=words, steps=STEPS, record=p2p.Record(text=32, pixels=32), **size)
    assert plain.maps.sides() == both.maps.sides("pixels") == [(4, 8)] and narrow.length == 32
    assert torch.equal(plain.masks, both.masks) and torch.equal(plain.maps.mean(1), both.maps.mean(1))


@pytest.mark.slow
def test_maps_that_a_blend_alone_reads_are_not_recorded(narrow):
    words = p2p.LocalBlend(words=("cat", "dog"))
    r = p2p.edit(narrow, SOURCE, SWAP, local_blend=words, steps=2, record=p2p.Record(pixels=8 * 8))
    assert r.maps.sides("pixels") == [(8, 8)] and not r.maps.sides("text")
    with pytest.raises(UsageError, match="no attention map has at most 10"):
        p2p.edit(narrow, SOURCE, SWAP, local_blend=words, steps=2, record=p2p.Record(text=10))


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(66, 64), (64, 70), (62, 58)])
def test_blends_at_sizes_that_no_level_divides(narrow, height, width):
    """The maps are a quarter of the picture's sides, rounded up."""
    r = p2p.edit(narrow, SOURCE, SWAP, local_blend=p2p.LocalBlend(words=("cat", "dog")), steps=STEPS, height=height, width=width)
    kept = ~r.masks[0, 0]
    assert r.masks.shape == (1, 1, height, width) and kept.any() and torch.equal(r.latents[1][:, kept], r.latents[0][:, kept])


@pytest.mark.slow
@pytest.mark.parametrize("weight", [-2.0, -0.5, 0.0])
def test_a_negative_weight_does_not_turn_the_mask_inside_out(narrow, weight):
    words = p2p.LocalBlend(words=("cat", "cat"), start=0.0)
    r = p2p.edit(narrow, SOURCE, [p2p.Edit(SOURCE, equalizer={"cat": c}, cross_replace_steps=1.0, local_blend=words)
                                 for c in (1.0, weight)], steps=STEPS)
    assert 0 < r.masks[1].float().mean() <= r.masks[0].float().mean() < 1


def test_masks_of_any_kind_are_bright_where_they_are_bright():
    grey = np.full((8, 8), 400, np.uint16)
    for mask, share in ((Image.fromarray(grey), 0), (Image.new("RGBA", (8, 8), (255, 255, 255, 0)), 0), (Image.new("1", (8, 8), 1), 1)):
        assert fixed(mask, (4, 4)).float().mean() == share
    with pytest.raises(UsageError, match="0 to 1"):
        fixed(torch.full((8, 8), 100, dtype=torch.uint8), (4, 4))


@pytest.mark.slow
def test_a_threshold_alone_in_a_tuple_is_of_both(narrow):
    one, two, bird = (p2p.Edit(f"a {word} on grass", local_blend=p2p.LocalBlend(words=("cat", word), threshold=th, start=0.0))
                      for word, th in (("dog", (0.2,)), ("dog", 0.2), ("bird", (0.2, 0.5))))
    first, second = (p2p.edit(narrow, "a cat on grass", [e, bird], steps=2).latents for e in (one, two))
    assert torch.equal(first, second)

"""Attention maps, what they add up to, and what is drawn from them."""
import numpy as np
import pytest
import torch
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.errors import UsageError
from p2p.maps import AttentionMaps
from p2p.show.pictures import heat, overlay

pytestmark = pytest.mark.usefixtures("once")
SOURCE, TARGET = "a cat next to a red cat on grass", "a cat next to a red dog on grass"
STEPS = 4


@pytest.fixture(scope="module")
def run(narrow):
    return p2p.edit(narrow, SOURCE, TARGET, steps=STEPS, cross_replace_steps=0.5,
                    record=p2p.Record(text=256, pixels=256, before=True))


@pytest.mark.slow
def test_recording_changes_nothing(narrow, run):
    plain = p2p.edit(narrow, SOURCE, TARGET, steps=STEPS, cross_replace_steps=0.5)
    assert plain.maps is None and torch.equal(plain.latents, run.latents)


def test_every_site_step_row_and_head_is_there(narrow, run):
    """16 x 16 and 8 x 8 positions; source, target, and the target again before the edit."""
    m = run.maps
    assert m.sides() == [(16, 16), (8, 8)] and m.sides("pixels") == [(16, 16), (8, 8)]
    assert len(m.timesteps) == STEPS and m.timesteps == sorted(m.timesteps, reverse=True)
    assert {v.shape[:2] for v in m.sites.values()} == {(STEPS, 3)}
    assert all(v.shape[3] in (64, 256) and v.shape[4] in (narrow.length, v.shape[3]) for v in m.sites.values())


def test_rows_sum_to_one_over_text_and_over_pixels(run):
    """Cross-attention alone (down): over the tokens; self-attention: over the pixels; hybrid: the text's part is less."""
    assert (run.maps.mean(0, sites="down").sum(-1) - 1).abs().max() < 5e-3
    assert (run.maps.mean(0, columns="pixels").sum(-1) - 1).abs().max() < 5e-3
    assert run.maps.mean(0, sites="up").sum(-1).max() < 1


def test_words_are_their_tokens_added_and_the_whole_is_its_words(run):
    m = run.maps
    each = dict(m.each_word(0, ends=True))
    assert list(each) == ["<start>", "a#1", "cat#1", "next", "to", "a#2", "red", "cat#2", "on", "grass", "<end>"]
    assert torch.allclose(each["cat#1"] + each["cat#2"], m.word("cat"), atol=1e-6)
    assert torch.allclose(m.word("red cat"), each["red"] + each["cat#2"], atol=1e-6)
    assert torch.allclose(sum(each.values()), m.mean(0)[..., :len(each)].sum(-1), atol=1e-5)


def test_steps_heads_and_sites_average_to_the_whole(run):
    m = run.maps
    whole = m.mean(1)
    assert torch.allclose(torch.stack([m.mean(1, steps=[i]) for i in range(STEPS)]).mean(0), whole, atol=1e-5)
    down = m.mean(1, sites="down")
    heads = next(v for k, v in m.sites.items() if "down" in k and v.shape[3] == 256).shape[2]
    assert torch.allclose(torch.stack([m.mean(1, heads=[h], sites="down") for h in range(heads)]).mean(0), down, atol=1e-5)
    assert m.mean(1, side=(8, 8)).shape[:2] == (8, 8)


def test_maps_before_and_after_the_edit(run):
    """While the window is open a swapped word has the old word's map; before the edit it has its own; later no edit is left."""
    m = run.maps
    early, late = dict(steps=[0]), dict(steps=[STEPS - 1])
    assert torch.allclose(m.word("dog", 1, **early), m.word("cat#2", 0, **early), atol=1e-4)
    assert not torch.allclose(m.word("dog", 1, before=True, **early), m.word("dog", 1, **early), atol=1e-3)
    assert torch.allclose(m.mean(1, before=True, **late), m.mean(1, **late), atol=1e-6)


def test_components_are_pictures_of_the_layout(run):
    parts = run.maps.components(0)
    assert parts.shape == (16, 16, 3) and parts.min() == 0 and parts.max() == 1
    flat = (parts - parts.mean((0, 1))).flatten(0, 1)
    flat = flat / flat.norm(dim=0)
    assert (flat.T @ flat - torch.eye(3)).abs().max() < 1e-4   # uncorrelated


def test_the_sign_of_a_component_is_that_of_its_maps():
    """However their pixels are numbered: a picture and its edit are coloured alike."""
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        p, order = torch.rand(1, 1, 1, 36, 36, generator=g) ** 3, torch.randperm(36, generator=g)
        one, other = (AttentionMaps([None], [0.0], (12, 12), 8, {"x": m}, frozenset("x")).components().flatten(0, 1)
                      for m in (p, p[..., order, :][..., order]))
        assert torch.allclose(one[order], other, atol=1e-4)


def test_non_square_maps(sd1):
    r = p2p.generate(sd1, "a cat", steps=1, height=128, width=64, record=p2p.Record(text=1024))
    assert r.maps.sides()[0] == (16, 8) and r.maps.word("cat", side=(16, 8)).shape == (16, 8)
    assert r.maps.word("cat").shape == (4, 2)        # a quarter of the latents' sides, as in the paper's figures


@pytest.mark.parametrize("call, message", [
    (lambda m: m.word("bird"), 'no word "bird"'), (lambda m: m.mean(5), "row must be a whole number from 0 to 1, not 5"), (lambda m: m.mean(0, before=True), "before=True"),
    (lambda m: m.mean(side=(3, 3)), "recorded: "), (lambda m: m.mean(sites="cellar"), "cellar"),
    (lambda m: m.word("cat", columns="pixels"), "columns: those of text"), (lambda m: m.each_word(columns="text"), "columns: those of text"),
    (lambda m: m.components(columns="text"), "columns: those of pixels")])
def test_what_was_not_recorded_is_said(run, call, message):
    with pytest.raises(UsageError, match=message):
        call(run.maps)


def test_heat_grows_brighter_and_survives_nothing():
    brightness = np.array(heat(torch.linspace(0, 1, 64)[None]).convert("L"), dtype=int)[0]
    assert (np.diff(brightness) >= 0).all() and brightness[0] < 10 and brightness[-1] > 200
    assert np.array(heat(torch.zeros(2, 2))).max() < 10
    assert overlay(Image.new("RGB", (32, 48)), torch.rand(4, 4)).size == (32, 48)


def test_a_map_lies_on_the_picture_as_it_is_shown():
    """Grey of 16 bits, divided by 257 and not clipped; paper where it is transparent."""
    grey, values = np.full((8, 8), 150 * 257, np.uint16), torch.rand(2, 2)
    sixteen, eight = Image.fromarray(grey), Image.new("L", (8, 8), 150)
    assert overlay(sixteen, values).tobytes() == overlay(eight, values).tobytes()
    assert overlay(Image.new("RGBA", (8, 8)), values).tobytes() == overlay(Image.new("L", (8, 8), 255), values).tobytes()


@pytest.mark.slow
def test_maps_command(capsys, tmp_path):
    argv = ["maps", SOURCE, TARGET, "--steps", "2", "--seed", "0", "--ends", "--components", "--arrays", "-o", str(tmp_path)]
    assert main(argv) == 0
    folder = next(tmp_path.iterdir())
    names = {"source.png", "edit.png", "source-words.png", "edit-words.png", "edit-before-words.png", "source-components.png",
             "edit-components.png", "maps.npz", "maps.json", "settings.json"}
    assert {p.name for p in folder.iterdir()} == names
    arrays = np.load(folder / "maps.npz")
    assert len(arrays["timesteps"]) == 2 and arrays["tokens_1"][0] == 49406
    assert any(k.endswith("attn2") and arrays[k].shape[1] == 3 for k in arrays)
    for options, message in ((["--side", "5"], "16 x 16"), (["--at", "7"], "FIRST:END"), (["--site", "cellar"], "cellar")):
        assert main([*argv[:-2], *options, "-o", str(tmp_path / "bad")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "bad").exists()

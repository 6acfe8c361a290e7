"""Masks are kept as they were decided, once a run, and decide alike when the run is done again."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import p2p
from p2p.blend import SOFT, fixed
from p2p.cli.parser import main
from p2p.edits import Edit
from p2p.request.settings import from_dict, from_settings, to_dict, to_settings
from p2p.show.pictures import read_settings

pytestmark = pytest.mark.usefixtures("once")
SOURCE, TARGET = "a cat on grass", "a dog on grass"


def again(mask, size, how="crop"):
    """The mask that settings hold, read from JSON."""
    said = json.loads(json.dumps(to_settings([Edit(TARGET, local_blend=p2p.LocalBlend(mask=mask))], size, how)))
    return from_settings(said)[0].local_blend.mask


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 97), st.integers(1, 97), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_masks_of_any_size_are_decided_alike_again(height, width, rows, columns, tensor, seed):
    values = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    mask = values if tensor else Image.fromarray((values * 255).byte().numpy())
    assert torch.equal(fixed(again(mask, (rows, columns)), (rows, columns)), fixed(mask, (rows, columns)))


@pytest.mark.slow
def test_a_large_mask_is_kept_small_and_once(narrow):
    """12 megapixels and three targets, two of which share it."""
    large = Image.effect_noise((4000, 3000), 200)
    blends = [p2p.LocalBlend(mask=large), p2p.LocalBlend(words=("cat", "dog"), mask=large.copy()), p2p.LocalBlend(mask=Image.new("L", (9, 9), 255))]
    r = p2p.edit(narrow, SOURCE, [Edit(TARGET, local_blend=b) for b in blends], steps=1)
    text = json.dumps(r.settings)
    assert len(text) < 8000 and [t["local_blend"]["mask"] for t in r.settings["targets"]] == [0, 0, 1] and len(r.settings["masks"]) == 2
    done = p2p.edit(narrow, SOURCE, from_settings(json.loads(text)), steps=1)
    assert torch.equal(done.latents, r.latents) and torch.equal(done.masks, r.masks) and done.settings == r.settings


@pytest.mark.slow
@pytest.mark.parametrize("mask", [torch.rand(7, 5, generator=torch.Generator().manual_seed(1)), torch.rand(200, 3), torch.eye(64) > 0.5,
                                  Image.new("LA", (30, 90), (255, 128)), Image.new("CMYK", (5, 5)), Image.new("1", (1, 1), 1)])
def test_an_edit_with_a_mask_runs_again_to_the_same_latents(narrow, mask):
    r = p2p.edit(narrow, SOURCE, TARGET, steps=1, local_blend=p2p.LocalBlend(mask=mask))
    done = p2p.edit(narrow, SOURCE, from_settings(json.loads(json.dumps(r.settings))), steps=1)
    assert torch.equal(done.latents, r.latents) and done.settings == r.settings


def test_a_mask_alone_has_no_level_of_maps(narrow):
    """Which would be said to change nothing when the edit is run again from its record."""
    made = p2p.edit(narrow, "a cat", "a dog", steps=1, local_blend=p2p.LocalBlend(mask=torch.eye(4)))
    blend = from_settings(made.settings)[0].local_blend
    assert blend.level is None and not [note for note in p2p.edit(narrow, "a cat", from_settings(made.settings), steps=1).notes if "level" in note]
    words = p2p.edit(narrow, "a cat", "a dog", steps=1, scope="cat", local_blend=p2p.LocalBlend(mask=torch.eye(4)))
    assert from_settings(words.settings)[0].local_blend.level is not None


def test_a_mask_alone_is_a_picture_in_json(tmp_path):
    """Where no run is there to decide it, as in a list of jobs."""
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(values).save(tmp_path / "m.png")
    for mask in (Image.fromarray(values), tmp_path / "m.png", str(tmp_path / "m.png"), torch.from_numpy(values / 255.0)):
        said = json.loads(json.dumps(to_dict(Edit(TARGET, local_blend=p2p.LocalBlend(mask=mask)))))
        assert np.array_equal(from_dict(said).local_blend.mask, values)


@pytest.mark.parametrize("said", [None, 3, [], "x", {}, {"prompt": "x", "size": 3}, {"prompt": "x", "local_blend": 3},
                                  {"prompt": "x", "local_blend": {"mask": 7}}, {"prompt": "x", "local_blend": {"mask": True}},
                                  {"prompt": "x", "local_blend": {"mask": "no picture"}}, {"prompt": "x", "local_blend": {"size": 1}}])
def test_what_is_no_edit_is_said(said):
    with pytest.raises(p2p.UsageError):
        from_dict(said)


@pytest.mark.slow
def test_a_mask_is_padded_as_the_picture_was(narrow):
    """A wide picture and a mask of its left half: padded, the edited half is the left one, top to bottom."""
    wide, left = Image.new("RGB", (128, 64)), Image.new("L", (128, 64))
    left.paste(255, (0, 0, 64, 64))
    for how, share in (("pad", 32), ("crop", 32)):
        inverted = p2p.invert(narrow, wide, SOURCE, method="direct", steps=1, fit=how)
        r = p2p.edit(narrow, inverted, TARGET, local_blend=p2p.LocalBlend(mask=left, start=0.0))
        assert r.masks[0, 0, :, :share].all() and not r.masks[0, 0, :, share:].any()
    quarter = Image.new("L", (128, 64))
    quarter.paste(255, (0, 0, 32, 64))   # a quarter at the left: padded it is there, cropped it is gone
    for how, kept in (("pad", 16), ("crop", 0)):
        assert fixed(quarter, (64, 64), how)[0].all(0).sum() == kept
        inverted = p2p.invert(narrow, wide, SOURCE, method="direct", steps=1, fit=how)
        r = p2p.edit(narrow, inverted, TARGET, local_blend=p2p.LocalBlend(mask=quarter, start=0.0))
        assert r.masks[0, 0].all(0).sum() == kept


@pytest.mark.slow
def test_an_upscaled_edit_with_a_mask_runs_again_to_the_same_pixels(capsys, tmp_path):
    Image.effect_noise((300, 200), 200).save(tmp_path / "mask.png")
    asked = ["edit", SOURCE, TARGET, "--blend-mask", str(tmp_path / "mask.png"), "--steps", "1", "--seed", "1", "-o", str(tmp_path),
             "--upscale", "--upscale-steps", "1"]
    assert main(asked) == 0
    made = capsys.readouterr().out.split()
    assert main(["edit", "--from", made[1], "-o", str(tmp_path)]) == 0
    for a, b in zip(made, capsys.readouterr().out.split()):
        assert open(a, "rb").read() == open(b, "rb").read()


# ----------------------------------------------------------------------------------------------------- the word of one side

@pytest.mark.slow
@pytest.mark.parametrize("items, words", [([":dog"], ([], ["dog"])), (["cat:"], (["cat"], [])), (["cat:dog", ":grass"], (["cat"], ["dog", "grass"])),
                                          (["grass"], (["grass"], ["grass"]))])
@pytest.mark.parametrize("option, name", [("--blend", "words"), ("--blend-without", "substruct")])
def test_a_blend_takes_the_word_of_one_prompt_alone(narrow, capsys, tmp_path, items, words, option, name):
    given = [x for item in items for x in (option, item)] + (["--blend", "on"] if name == "substruct" else [])
    assert main(["edit", SOURCE, TARGET, *given, "--steps", "1", "--seed", "1", "-o", str(tmp_path), "-q"]) == 0
    (file,) = tmp_path.glob("*/edit.png")
    said = read_settings(file)["targets"][0]["local_blend"]
    assert said[name] == list(words)
    wanted = p2p.LocalBlend(**{"words": (["on"], ["on"]), name: words}, feather=SOFT)
    r = p2p.edit(narrow, SOURCE, TARGET, steps=1, seed=1, local_blend=wanted)
    assert np.array_equal(np.asarray(r.images[1]), np.asarray(Image.open(file)))


@pytest.mark.parametrize("item", [":", "", "a:b:c"])
def test_what_names_no_word_is_refused(capsys, item, tmp_path):
    assert main(["edit", SOURCE, TARGET, "--blend", item, "-o", str(tmp_path)]) == 2
    assert "--blend" in capsys.readouterr().err

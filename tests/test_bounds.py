"""What a few bytes may ask for: pictures, masks, prompts, lists, levels, and files that are none."""
import os
import struct
import time

import numpy as np
import pytest
import torch
from pickle_bytes import archive, dictionary, tensor, text
from PIL import Image

import p2p
from p2p.image import PIXELS, open_picture, shown
from p2p.lists import lines
from p2p.request.prompts import LONGEST, check
from p2p.weights.files import open_file

SOURCE, TARGET = "a cat on grass", "a dog on grass"


@pytest.mark.slow
def test_pictures_have_a_bound(tmp_path):
    side = int(PIXELS**0.5) + 1
    Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(p2p.UsageError, match="more than 67,108,864 pixels"):
        open_picture(tmp_path / "x.png")
    with pytest.raises(p2p.UsageError, match="positions"):
        p2p.edit("emoji", SOURCE, TARGET, local_blend=p2p.LocalBlend(mask=torch.ones(side, side, dtype=torch.bool)))


@pytest.mark.parametrize("values, said", [([0, 70000], "0 to 70000"), ([-5000, 300], "-5000 to 300")])
def test_values_that_no_viewer_shows_are_refused(values, said):
    with pytest.raises(p2p.UsageError, match=said):
        shown(Image.fromarray(np.array([values], np.int32)))


def test_named_pipes_are_no_files(tmp_path, emoji):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(p2p.UsageError, match="not a file"):
        open_picture(tmp_path / "x")
    with pytest.raises(p2p.UsageError, match="not a file"):
        p2p.edit(emoji, tmp_path / "x", TARGET)


def test_prompts_and_lists_have_a_bound(tmp_path, monkeypatch):
    with pytest.raises(p2p.UsageError, match="characters"):
        check("a " * LONGEST)
    monkeypatch.setattr(lines, "BYTES", 100)
    (tmp_path / "x").write_text("[]" * 100)
    with pytest.raises(p2p.UsageError, match="more than 100 bytes"):
        lines.read(tmp_path / "x", lambda said, _: said, "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("content", [
    archive(text("m" * (1 << 20)) + b"q\0" + b"0" + b"".join(b"h\0\x8c\x01a\x930" for _ in range(260_000)) + dictionary(weight=tensor())),
    archive(b"\x8b" + struct.pack("<i", 8 << 20) + b"\1" * ((8 << 20) - 1) + b"\x81" + b"q\0}" + b"h\0Ns" * 300_000 + b"0"
            + dictionary(weight=tensor()))], ids=["names", "numbers"])
def test_long_names_and_numbers_of_pickles_take_no_time(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    began = time.process_time()
    try:
        open_file(tmp_path / "x.ckpt")
    except p2p.CheckpointError:
        pass
    assert time.process_time() - began < 30   # it took minutes


@pytest.mark.parametrize("method", ["ddim", "edit-friendly"])
def test_a_picture_noisier_than_the_last_level_is_refused(emoji, method):
    with pytest.raises(p2p.UsageError, match="final_alpha 0.5: the picture holds more noise"):
        p2p.invert(emoji, Image.new("RGB", (64, 64)), SOURCE, method=method, steps=4, final_alpha=0.5)


@pytest.mark.parametrize("prompt, what", [("a (dog:1.4", "not closed"), ("a __animal__ on grass", "wildcard")])
def test_other_programs_syntax_is_refused(prompt, what):
    with pytest.raises(p2p.UsageError, match=what):
        check(prompt)


def test_what_may_be_text_is_noted():
    assert "C++" in check("a C++ logo")[0] and check("a dog - on grass") == []

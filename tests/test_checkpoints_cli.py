"""Every family from the command line: edits, inversions, inspection, conversion."""
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.image import from_pil, to_pil
from p2p.request.inverting import READ_BY
from p2p.request.source import METHODS
from p2p.show.pictures import read_settings

loaded = cache(p2p.load)


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """A file is read once for all commands that ask the same of it."""
    monkeypatch.setattr(p2p, "load", loaded)


def load(path, **kw):
    return p2p.load(path, device="cpu", dtype=torch.float32, **kw)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_edits_from_the_command_line(made, single, tmp_path, capsys, prediction):
    """The edits of the bundled model, on every family: swap, refine and weights, non-square, source = source alone."""
    argv = ["edit", "a red cat on grass", "a red dog on grass", "a big red cat on grass", "--weight", "red=2",
            "--model", str(single), "--prediction", prediction, "--steps", "3", "--seed", "1", "--height", "16", "--width", "32", "-o", str(tmp_path)]
    assert main(argv) == 0
    files = capsys.readouterr().out.split()
    assert read_settings(files[1])["prediction"] == prediction
    model = load(single, prediction=prediction)
    r = p2p.edit(model, "a red cat on grass", "a red dog on grass", steps=3, seed=1, height=16, width=32)
    alone = p2p.generate(model, "a red cat on grass", steps=3, seed=1, height=16, width=32)
    assert r.images[0].size == (32, 16) and (r.latents[:1] - alone.latents).abs().max() < 2e-3 * alone.latents.std()
    assert main(["edit", "--from", files[0], "-o", str(tmp_path)]) == 0
    again = capsys.readouterr().out.split()
    assert (tmp_path / again[0]).read_bytes() == (tmp_path / files[0]).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_inversions_from_the_command_line(made, single, tmp_path, capsys, prediction, method):
    """Every way to invert, on every family, non-square; the edit is blended, so the picture comes back around it."""
    Image.linear_gradient("L").resize((90, 50)).convert("RGB").save(tmp_path / "photo.png")
    argv = ["edit", "a red cat on grass", "a red dog on grass", "--image", str(tmp_path / "photo.png"), "--method", method,
            "--model", str(single), "--prediction", prediction, "--steps", "2", "--height", "16", "--width", "32",
            *(["--inner-steps", "2"] if method in READ_BY["inner_steps"] else []), "--blend-mask", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out")]
    assert main(argv) == 0
    files = capsys.readouterr().out.split()
    pictures = [np.array(Image.open(f)).astype(int) for f in files[:3]]
    assert pictures[0].shape == (16, 32, 3) and (pictures[1] != pictures[2]).any()
    if method in ("direct", "edit-friendly"):   # the source is the autoencoder's picture of the input
        model = load(single, prediction=prediction)
        wanted = to_pil(model.decode(model.encode(from_pil(Image.open(files[0])))))[0]
        assert np.abs(pictures[1] - np.array(wanted)).max() <= 1


@pytest.mark.slow
def test_inspect_and_convert_commands(made, single, tmp_path, capsys):
    family, _, folder = made
    for path in (single, folder):
        assert main(["inspect", str(path), "--hash"]) == 0
        out = capsys.readouterr().out
        assert f"family      {family}" in out and "prediction  eps" in out and "sha256" in out
    assert main(["convert", str(folder), str(tmp_path / "x.safetensors"), "--half"]) == 0
    assert main(["convert", str(folder), str(tmp_path / "x.safetensors")]) == 3
    assert main(["inspect", str(tmp_path / "absent")]) == 3

"""Real pictures in `p2p sweep` and `p2p maps`: inverted once, by the options that `p2p edit --image` has."""
import numpy as np
import pytest
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.request.source import LONE, METHODS
from p2p.show.pictures import read_settings

pytestmark = pytest.mark.usefixtures("once")
SOURCE, TARGET = "a cat on grass", "a dog on grass"
SHORT = ["--steps", "3", "-q"]


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    Image.effect_noise((96, 64), 90).convert("RGB").save(file)
    return file


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def run(out, *argv):
    assert main([*map(str, argv), *SHORT, "-o", str(out)]) == 0
    return sorted(out.iterdir())[-1]


def inverted(model, photo, fit="crop", **settings):
    return p2p.invert(model, photo, SOURCE, steps=3, fit=fit, **settings)


@pytest.mark.slow
def test_a_sweep_inverts_its_picture_once(narrow, photo, tmp_path, monkeypatch):
    calls, real = [], p2p.invert
    monkeypatch.setattr(p2p, "invert", lambda *a, **k: calls.append(a) or real(*a, **k))
    folder = run(tmp_path / "out", "sweep", "--image", photo, SOURCE, TARGET, "--over", "cross=0,1", "--over", "self=0,1",
                 "--method", "direct", "--fit", "pad", "--cfg", 3)
    assert len(calls) == 1
    inversion = inverted(narrow, photo, "pad", method="direct", guidance_scale=3.0)
    first = p2p.edit(narrow, inversion, [p2p.Edit(TARGET, cross_replace_steps=0.0, self_replace_steps=0.0)], guidance_scale=3.0)
    assert same(Image.open(folder / "source.png"), first.images[0]) and same(Image.open(folder / "input.png"), inversion.picture)
    of_four, alone = (np.asarray(image, int) for image in (Image.open(folder / "self0-cross0.png"), first.images[1]))
    assert abs(of_four - alone).max() <= 1   # batches of other sizes round otherwise, on CPUs of some kinds
    said = read_settings(folder / "source.png")
    recorded = said["inversion"]
    assert (recorded["method"], recorded["fit"], recorded["steps"], said["guidance_scale"]) == ("direct", "pad", 3, 3.0)
    assert len(said["targets"]) == 4


@pytest.mark.slow
def test_a_picture_of_a_sweep_runs_again(photo, tmp_path):
    """What is recorded is an edit: all its targets are made again."""
    folder = run(tmp_path / "out", "sweep", "--image", photo, SOURCE, TARGET, "--over", "cross=0,1")
    assert main(["edit", "--from", str(folder / "source.png"), "-q", "-o", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").iterdir()
    made = {Image.open(f).tobytes() for f in again.glob("*.png") if f.stem not in ("grid", "input")}
    assert made == {Image.open(f).tobytes() for f in folder.glob("*.png") if f.stem not in ("table", "input")} and len(made) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["edit-friendly", "ddim", "belm", "null-text"])
def test_maps_of_a_picture_are_those_of_its_row_in_an_edit(narrow, photo, tmp_path, method):
    folder = run(tmp_path / "alone", "maps", "--image", photo, SOURCE, "--method", method, "--arrays")
    both = run(tmp_path / "both", "maps", "--image", photo, SOURCE, TARGET, "--method", method, "--arrays")
    alone, beside = (np.load(f / "maps.npz") for f in (folder, both))
    sites = [name for name in alone.files if not name.startswith(("tokens", "timesteps"))]
    assert sites and all(np.abs(alone[s][:, 0].astype("f4") - beside[s][:, 0]).max() < 2e-3 for s in sites)
    assert same(Image.open(folder / "input.png"), inverted(narrow, photo, method="direct").picture)
    r = p2p.edit(narrow, inverted(narrow, photo, method=method), TARGET)
    shown = np.asarray(Image.open(folder / "picture.png"), dtype=int)
    assert np.abs(shown - np.asarray(r.images[0])).max() <= 1
    names = {f.stem for f in folder.iterdir()}
    assert {"picture", "words", "maps", "settings", "input"} <= names and {"edit", "edit-before-words"} <= {f.stem for f in both.iterdir()}
    assert read_settings(folder / "picture.png")["inversion"]["method"] == method


@pytest.mark.slow
@pytest.mark.parametrize("method, n", [("edit-friendly", 3), ("belm", 2), ("ddim", 3)])
def test_steps_of_maps_are_those_that_are_run(photo, tmp_path, capsys, method, n):
    argv = ["maps", "--image", str(photo), SOURCE, "--method", method, *SHORT, "-o", str(tmp_path / "out"), "--at"]
    assert main([*argv, str(n - 1)]) == 0
    assert main([*argv, str(n)]) == 2 and f"of 0 to {n}" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", [("--cfg", "3"), ("--negative", "a dog")])
def test_guidance_of_a_picture_alone_is_read_or_refused(photo, tmp_path, capsys, method, option, monkeypatch):
    """A row that follows what is stored of it is not guided: an option of guidance would do nothing."""
    class Reached(Exception):
        pass

    def stop(*_, **__):
        raise Reached

    monkeypatch.setattr("p2p.cli.options.load", stop)
    argv = ["maps", "--image", str(photo), SOURCE, "--method", method, *option, *SHORT, "-o", str(tmp_path / "out")]
    if method in LONE and (method, option[0]) != ("rf-inversion", "--negative"):   # which is inverted under it
        assert main(argv) == 2 and f"{option[0]}: not with a picture alone" in capsys.readouterr().err
    else:
        with pytest.raises(Reached):
            main(argv)
    with pytest.raises(Reached):
        main([*argv[:4], TARGET, *argv[4:]])


WRONG = {
    "--method: not with a source prompt alone": ["sweep", SOURCE, TARGET, "--over", "cross=0,1", "--method", "ddim"],
    "--skip: not with a source prompt alone": ["maps", SOURCE, "--skip", "1"],
    "--fit: not with a source prompt alone": ["maps", SOURCE, TARGET, "--pad"],
    "--image: not with --over seed": ["sweep", "--image", "PHOTO", SOURCE, TARGET, "--over", "seed=1,2"],
    "--sampler: not with --image": ["sweep", "--image", "PHOTO", SOURCE, TARGET, "--over", "cross=0", "--sampler", "dpm++"],
    "timesteps must fall": ["maps", "--image", "PHOTO", SOURCE, "--timesteps", "499,999,1"],
    "--cross: not with a prompt without targets": ["maps", "--image", "PHOTO", SOURCE, "--cross", "0.5"],
    "inner_steps: direct inversion does not read it": ["sweep", "--image", "PHOTO", SOURCE, TARGET, "--over", "cross=0", "--method",
                                                       "direct", "--inner-steps", "2"],
    "seed: ddim inversion does not read it": ["maps", "--image", "PHOTO", SOURCE, "--method", "ddim", "--seed", "1"],
    "gamma: edit-friendly inversion": ["maps", "--image", "PHOTO", SOURCE, TARGET, "--gamma", "0.5"],
    "invalid int value": ["maps", "--image", "PHOTO", SOURCE, "--seed", "1,2"],
    'no word "bird"': ["sweep", "--image", "PHOTO", SOURCE, TARGET, "--over", "weight:bird=1,2"],
    "not a picture": ["sweep", "--image", "NONE", SOURCE, TARGET, "--over", "cross=0"],
    "no such file": ["maps", "--image", "MISSING", SOURCE],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_go_together_is_refused_before_anything_is_inverted(photo, tmp_path, capsys, monkeypatch, message):
    monkeypatch.setattr("p2p.sources.methods._inverted", lambda *_: pytest.fail("it was inverted"))
    (tmp_path / "none.png").write_text("no picture")
    places = {"PHOTO": photo, "NONE": tmp_path / "none.png", "MISSING": tmp_path / "missing.png"}
    assert main([str(places.get(a, a)) for a in WRONG[message]] + [*SHORT[:2], "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()

"""What decides pixels is hashed and recorded, and a picture is made again from the same or not at all."""
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import families
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import p2p
from p2p import CheckpointError, UsageError
from p2p.cli.parser import main
from p2p.lists import jobs
from p2p.show.pictures import read_settings, save_png
from p2p.weights import digest, hub
from p2p.weights.convert import single_file
from p2p.weights.load import find

SMALL = ["--steps", "2", "--height", "16", "--width", "16", "--seed", "3"]
EDIT = ["edit", "a red cat on grass", "a red dog on grass", *SMALL]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parts = families.build("sd1")
    return families.save(parts, tmp_path_factory.mktemp("sd1") / "folder", "sd1", max_shard_size="300KB")


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    """A single file that holds plain and averaged weights."""
    state = single_file(find(folder))
    twins = {"model_ema." + k.removeprefix("model."): v * 1.1 for k, v in state.items() if k.startswith("model.diffusion_model.")}
    path = tmp_path_factory.mktemp("file") / "m.safetensors"
    save_file(state | twins, path)
    return path


@pytest.fixture(scope="module")
def vae(folder, tmp_path_factory):
    state = {k: v * 1.05 for k, v in single_file(find(folder)).items() if k.startswith("first_stage_model.")}
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file({k.removeprefix("first_stage_model."): v for k, v in state.items()}, path)
    return path


def load(path, **kw):
    return p2p.load(path, device="cpu", **kw)


# ------------------------------------------------------------------------------------------------------------------ digests

def test_a_digest_is_computed_once_and_never_after_the_content_changed(tmp_path, monkeypatch):
    path, opened = tmp_path / "m", []
    path.write_bytes(b"a" * 1000)
    monkeypatch.setattr(digest, "SETTLED", -1)
    of = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self) if self == path else None, of(self, *a, **k))[1])
    want = hashlib.sha256(b"a" * 1000).hexdigest()
    assert [digest.sha256(path) for _ in range(3)] == [want] * 3 and len(opened) == 1
    before = path.stat()
    with of(path, "r+b") as f:                                                   # the same size, place, inode and time
        f.write(b"b")
    while True:   # file systems' clocks may tick every 10 ms
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if path.stat().st_ctime_ns != before.st_ctime_ns:
            break
    assert digest.sha256(path) == hashlib.sha256(b"b" + b"a" * 999).hexdigest()


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, monkeypatch):
    """Its time may not tell the next change from this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "SETTLED", 60)
    (tmp_path / "m").write_bytes(b"a")
    digest.sha256(tmp_path / "m")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["a file in its place", "empty entries", "other text", "not text", "a folder"])
def test_a_cache_that_cannot_be_used_only_costs_time(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(digest, "SETTLED", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "m"
    path.write_bytes(b"weights")
    if damage == "a file in its place":
        (tmp_path / "cache").write_text("")
    else:
        digest.sha256(path)
        [entry] = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
        entry.unlink()
        if damage == "a folder":
            entry.mkdir()
        else:
            entry.write_bytes({"empty entries": b"", "other text": b"0" * 63, "not text": b"\xff" * 64}[damage])
    assert digest.sha256(path) == hashlib.sha256(b"weights").hexdigest()


def test_many_may_ask_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "SETTLED", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "m").write_bytes(b"x" * 10**6)
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(lambda _: digest.sha256(tmp_path / "m"), range(64)))
    assert found == {hashlib.sha256(b"x" * 10**6).hexdigest()}
    assert [len(p.read_text()) for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [64]


@pytest.mark.slow
def test_a_single_file_is_known_by_its_own_sha256(file, vae, capsys):
    """As `sha256sum` gives it, so that pictures made before are made again; a separate autoencoder has a line of its own."""
    want = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (file, vae)]
    assert load(file).sha256 == want[0]
    assert main(["inspect", str(file), "--hash", "--vae", str(vae)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"sha256      {want[0]}", f"vae sha256  {want[1]}"]


def scaled(path):
    save_file({k: v * 1.01 for k, v in load_file(path).items()}, path)


def said(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DECIDES = {
    "a shard of the UNet": lambda m: scaled(sorted((m / "unet").glob("*-of-*.safetensors"))[-1]),
    "the autoencoder": lambda m: scaled(next((m / "vae").glob("*.safetensors"))),
    "the text tower": lambda m: scaled(next((m / "text_encoder").glob("*.safetensors"))),
    "the scheduler": lambda m: said(m / "scheduler" / "scheduler_config.json", timestep_spacing="trailing"),
    "the scale": lambda m: said(m / "vae" / "config.json", scaling_factor=0.2),
    "the padding": lambda m: ((m / "tokenizer").mkdir(), (m / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "!"}')),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DECIDES)
def test_every_file_of_a_folder_that_decides_pixels_is_hashed(folder, tmp_path, what, capsys):
    """A picture of it is then not made again, and a list of jobs is another one; the same folder elsewhere is the same."""
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "README.md").write_text("a licence")
    assert main([*EDIT, "--model", str(moved), "-o", str(tmp_path / "out")]) == 0
    picture = capsys.readouterr().out.split()[1]
    before, was = load(moved), load(moved).sha256
    assert was == load(folder).sha256 and len(was) == 64
    identity = jobs.parse({"source": "a cat", "targets": ["a dog"]}, 1, tmp_path, before).id
    DECIDES[what](moved)
    after = load(moved)
    assert after.sha256 != was
    assert jobs.parse({"source": "a cat", "targets": ["a dog"]}, 1, tmp_path, after).id != identity
    assert main(["edit", "--from", picture, "-o", str(tmp_path / "out")]) == 3
    assert "not the weights that made" in capsys.readouterr().err
    assert main(["edit", "--from", picture, "--model", str(folder), "-o", str(tmp_path / "out")]) == 0


# ------------------------------------------------------------------------------------------------------------- made again

ASKED = {"vae": ["--vae", "VAE"], "ema": ["--ema"], "clip_skip": ["--clip-skip", "1"], "zero_snr": ["--zero-snr"],
         "held": ["--half-weights"], "tile": ["--tile", "8"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_what_was_asked_of_a_model_is_recorded_and_done_again(file, vae, tmp_path, capsys, name):
    """With other pixels than without it; and it is part of a job's identity."""
    size = ["--height", "32", "--width", "32"] if name == "tile" else []
    options = [str(vae) if o == "VAE" else o for o in ASKED[name]]
    argv = [*EDIT, *size, "--model", str(file), "-o", str(tmp_path)]
    assert main(argv) == main([*argv, *options]) == 0
    made = capsys.readouterr().out.split()
    plain, picture = made[1], made[len(made) // 2 + 1]
    assert Image.open(plain).tobytes() != Image.open(picture).tobytes()
    s = read_settings(Path(picture))
    assert s[name] and not read_settings(Path(plain))[name] and s["version"] == p2p.__version__
    assert s.items() >= {"prediction": "eps", "family": "sd1", "dtype": "float32"}.items()
    assert main(["edit", "--from", picture, "-o", str(tmp_path)]) == 0
    again = capsys.readouterr().out.split()
    assert [Path(p).read_bytes() for p in again] == [Path(p).read_bytes() for p in made[len(made) // 2:]]
    keyword = {"held": torch.float16, "tile": 8, "vae": vae, "clip_skip": 1}.get(name, True)
    models = [load(file), load(file, **{name: keyword})]
    ids = {jobs.parse({"source": "a cat", "targets": ["a dog"]}, 1, tmp_path, m).id for m in models}
    assert len(ids) == 2 and models[0].sha256 == models[1].sha256
    if name not in ("vae",):
        assert main(["edit", "--from", picture, *options, "-o", str(tmp_path)]) == 2
        assert f"{options[0]}: not with --from" in capsys.readouterr().err


@pytest.mark.slow
def test_another_autoencoder_is_not_taken_for_the_recorded_one(file, vae, folder, tmp_path, capsys):
    argv = [*EDIT, "--model", str(file), "-o", str(tmp_path)]
    assert main(argv) == main([*argv, "--vae", str(vae)]) == 0
    made = capsys.readouterr().out.split()
    plain, picture = made[1], made[len(made) // 2 + 1]
    for source, options in ((plain, ["--vae", str(vae)]), (picture, ["--vae", str(folder)])):
        assert main(["edit", "--from", source, *options, "-o", str(tmp_path)]) == 3
        assert "not the autoencoder that made" in capsys.readouterr().err
    moved = shutil.copy(vae, tmp_path / "moved.safetensors")
    assert main(["edit", "--from", picture, "--vae", str(moved), "-o", str(tmp_path)]) == 0
    assert Image.open(capsys.readouterr().out.split()[1]).tobytes() == Image.open(picture).tobytes()


@pytest.mark.slow
def test_pictures_made_before_are_made_again(file, tmp_path, capsys):
    """Their settings say less: what they lack is as it always was."""
    assert main([*EDIT, "--model", str(file), "-o", str(tmp_path)]) == 0
    picture = Path(capsys.readouterr().out.split()[1])
    new = ("places", "vae", "text", "ema", "clip_skip", "zero_snr", "held", "tile", "version")
    old = {k: v for k, v in read_settings(picture).items() if k not in new}
    save_png(tmp_path / "old.png", Image.open(picture), old)
    assert main(["edit", "--from", str(tmp_path / "old.png"), "-o", str(tmp_path)]) == 0
    assert Image.open(capsys.readouterr().out.split()[1]).tobytes() == Image.open(picture).tobytes()


@pytest.mark.slow
def test_pictures_made_before_of_averages_are_made_of_them_again(file, tmp_path, capsys):
    """The versions that record no "ema" took the averages wherever a file had them under LDM's names."""
    state = {k.replace(".", "").replace("model_ema", "model_ema.") if k.startswith("model_ema.") else k: v
             for k, v in load_file(file).items()}
    save_file(state, tmp_path / "ldm.safetensors")
    for options in ([], ["--ema"]):
        assert main([*EDIT, "--model", str(tmp_path / "ldm.safetensors"), *options, "-o", str(tmp_path)]) == 0
    made = capsys.readouterr().out.split()
    plain, picture = Path(made[1]), Path(made[len(made) // 2 + 1])
    old = {k: v for k, v in read_settings(picture).items() if k != "ema"}
    save_png(tmp_path / "old.png", Image.open(picture), old)
    assert main(["edit", "--from", str(tmp_path / "old.png"), "-o", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert Image.open(out.split()[1]).tobytes() == Image.open(picture).tobytes() != Image.open(plain).tobytes()
    assert "old.png is of a version that took the averaged weights" in err


@pytest.mark.slow
def test_an_inversion_is_edited_with_the_model_that_it_was_made_with(file, vae, tmp_path):
    plain, other = load(file), load(file, vae=vae)
    inv = p2p.invert(other, Image.new("RGB", (16, 16), "red"), "a cat", method="ddim", steps=2, height=16, width=16)
    inv.save(tmp_path / "inv.safetensors")
    inv = p2p.Inversion.load(tmp_path / "inv.safetensors")
    p2p.edit(load(file, vae=vae), inv, "a dog")
    for model in (plain, load(file, vae=vae, clip_skip=1)):
        with pytest.raises(UsageError, match="made with .*vae.*: load it as it was"):
            p2p.edit(model, inv, "a dog")


# ------------------------------------------------------------------------------------------- a stranger's picture, the Hub

@pytest.mark.slow
@pytest.mark.parametrize("field, option", [("model", "--model"), ("vae", "--vae"), ("text", "--text"), ("upscaler", "--upscaler")])
def test_nothing_is_fetched_because_a_picture_names_it(file, tmp_path, capsys, monkeypatch, field, option):
    for name in ("download", "download_vae"):
        monkeypatch.setattr(hub, name, lambda repo: pytest.fail(f"asked the Hub for {repo}"))
    assert main([*EDIT, "--model", str(file), "-o", str(tmp_path)]) == 0
    picture = Path(capsys.readouterr().out.split()[1])
    s = read_settings(picture)
    for named, what in (("org/name", "not fetched from the Hub"), ("/no/such/file.safetensors", "no such file")):
        changed = {"model": {"model": named}, "upscaler": {"upscale": {"model": named, "dtype": "float32"}}}
        save_png(tmp_path / "theirs.png", Image.open(picture), s | changed.get(field, {"places": {field: named}}))
        assert main(["edit", "--from", str(tmp_path / "theirs.png"), "-o", str(tmp_path)]) == 3
        err = capsys.readouterr().err
        assert what in err and f"say with {option} where it lies" in err and named in err
        assert (f"{option} org/name" in err) == (named == "org/name")


@pytest.mark.slow
def test_what_the_user_names_is_fetched(file, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "download", lambda repo, ema: asked.append(repo) or file)
    assert main([*EDIT, "--model", str(file), "-o", str(tmp_path)]) == 0
    picture = capsys.readouterr().out.split()[1]
    assert main(["edit", "--from", picture, "--model", "org/name", "-o", str(tmp_path)]) == 0 and asked == ["org/name"]
    with pytest.raises(CheckpointError, match="no such file"):
        load("./org/name")

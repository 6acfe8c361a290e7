"""`p2p convert` writes all of a model or nothing, over nothing, and clears away what killed runs left."""

import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from p2p import CheckpointError
from p2p.cli.parser import main
from p2p.weights import aside, sealed
from p2p.weights.convert import convert
from p2p.weights.load import find

OUTS = ["out.safetensors", "out"]


def left(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTS)
def test_a_full_disk_leaves_nothing(tmp_path, sd1_file, small_files, name, capsys):
    with small_files:
        assert main(["convert", str(sd1_file), str(tmp_path / name)]) == 3
    said = capsys.readouterr().err
    assert (
        f"{tmp_path / name}: cannot be written (" in said
        and "File too large" in said
        and "nothing is left" in said
    )
    assert left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("No space left on device"),
        OSError(28, "No space left on device"),
    ],
)
@pytest.mark.parametrize("name", OUTS)
def test_whatever_the_writer_raises(tmp_path, sd1_file, monkeypatch, name, error):
    def full(*args):
        raise error

    monkeypatch.setattr(sealed, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written .*No space left on device"):
        convert(find(sd1_file), tmp_path / name)
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", OUTS)
def test_a_place_that_cannot_be_written(tmp_path, sd1_file, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written .(Not a directory|File exists)"):
        convert(find(sd1_file), tmp_path / "file" / name)


def links(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("links_", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize(
    "appear",
    [lambda p: p.write_text("mine"), lambda p: p.mkdir(), links],
    ids=["file", "folder", "dead link"],
)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_nothing_is_overwritten(tmp_path, sd1_file, monkeypatch, name, appear, when, links_):
    out, written = tmp_path / name, sealed.save_file

    def meanwhile(*args):
        written(*args)
        if not os.path.lexists(out):
            appear(out)

    if when == "before":
        appear(out)
    monkeypatch.setattr(sealed, "save_file", meanwhile)
    if not links_:
        monkeypatch.setattr(os, "link", refuses)
    with pytest.raises(
        CheckpointError,
        match=f"{name}: (is there already|appeared while it was written); nothing is overwritten",
    ):
        convert(find(sd1_file), out)
    assert left(tmp_path) == [name]
    assert (
        (out.is_file() and out.read_text() == "mine")
        or (out.is_dir() and left(out) == [])
        or out.is_symlink()
    )


def refuses(*args):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.slow
def test_a_disk_without_links_is_written_all_the_same(tmp_path, sd1_file, monkeypatch, sd1_tensors):
    monkeypatch.setattr(os, "link", refuses)
    convert(find(sd1_file), tmp_path / "out.safetensors")
    assert (
        left(tmp_path) == ["out.safetensors"]
        and len(find(tmp_path / "out.safetensors").unet.file.shapes) > 100
    )


@pytest.mark.slow
def test_what_a_killed_run_left_is_cleared_away(tmp_path, sd1_file):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, living = (f".p2p-{aside._host()}-{pid}-{aside._born(pid) or 0}-abc" for pid in (ended.pid, os.getppid()))
    for name in (dead, living):
        (tmp_path / name).mkdir()
    convert(find(sd1_file), tmp_path / "out.safetensors")
    assert left(tmp_path) == [living, "out.safetensors"]


@pytest.mark.slow
def test_modes_are_those_of_any_file(tmp_path, sd1_file):
    before = os.umask(0o022)
    try:
        convert(find(sd1_file), tmp_path / "out")
        convert(find(sd1_file), tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    mode = {name: (tmp_path / name).stat().st_mode & 0o777
            for name in ("out", "out/unet/config.json", "out/unet/diffusion_pytorch_model.safetensors", "out.safetensors")}
    assert [*mode.values()] == [0o755, 0o644, 0o644, 0o644], mode


@pytest.mark.slow
def test_a_suffix_in_capitals_is_a_file_too(tmp_path, sd1_file):
    convert(find(sd1_file), tmp_path / "out.SAFETENSORS")
    assert (tmp_path / "out.SAFETENSORS").is_file() and len(find(tmp_path / "out.SAFETENSORS").unet.file.shapes) > 100

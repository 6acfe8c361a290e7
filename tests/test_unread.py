"""Settings that a job does not read: none is recorded, none makes another job of it, and none is ignored where it is given."""
import json

import pytest
from PIL import Image

from p2p import UsageError
from p2p.cli.parser import main
from p2p.lists import jobs, pie, protocol
from p2p.request.source import METHODS

BASE = {"source": "a cat on grass", "targets": ["a dog on grass"]}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.png")
    return tmp_path


def read(folder, model, *said, **defaults):
    file = folder / "jobs.jsonl"
    file.write_text("".join(json.dumps(BASE | each) + "\n" for each in said))
    return jobs.read(file, model, defaults)


PICTURE = {"image": "photo.png", "steps": 2}
READ = {"seed": ("noise", "rf-inversion", "flow-edit", "ddcm", "turbo-edit", "edit-friendly"), "eta": ("turbo-edit", "edit-friendly"),
        "inner_steps": ("fixed-point", "null-text")}
VALUES = {"seed": 5, "eta": 0.5, "inner_steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_job_holds_what_its_method_reads(emoji, folder, method):
    said = PICTURE | {"method": method}
    plain = read(folder, emoji, said)[0]
    for name, value in VALUES.items():
        reads = method in READ[name]
        assert (name in plain.settings()) == reads
        with_it = read(folder, emoji, said, PICTURE | {"method": READ[name][-1]}, **{name: value})   # of another line
        assert (with_it[0].id != plain.id) == reads and with_it[0].settings().get(name) == (value if reads else None)
        if not reads:
            with pytest.raises(UsageError, match=f"{name}: no job of this list reads it .line 1: {method} inversion"):
                read(folder, emoji, said, **{name: value})


@pytest.mark.slow
def test_defaults_that_nothing_reads_are_refused_before_anything_runs(folder, capsys):
    file, out = folder / "jobs.jsonl", folder / "out"
    file.write_text(json.dumps(BASE | PICTURE | {"method": "direct"}) + "\n")
    for option in (["--seed", "5"], ["--inner-steps", "3"], ["--eta", "0.5"]):
        assert main(["batch", str(file), "--out", str(out), *option]) == 2
        assert "no job of this list reads it" in capsys.readouterr().err and not out.exists()
    assert main(["batch", str(file), "--out", str(out), "-q"]) == 0
    said = json.loads(next(out.glob("*/job.json")).read_text())
    assert not {"seed", "eta", "inner_steps"} & said.keys() and said["method"] == "direct"
    row = json.loads((out / "results.jsonl").read_text())
    assert row["state"] == "done" and row["seed"] is None


def test_what_another_editor_does_not_read_is_refused_and_not_inherited(emoji, folder):
    plain = read(folder, emoji, {"editor": "masactrl"})[0]
    assert read(folder, emoji, {"editor": "masactrl"}, {}, cross_replace_steps=0.5)[0].id == plain.id
    with pytest.raises(UsageError, match="cross_replace_steps: no job of this list reads it .*which the editor replaces"):
        read(folder, emoji, {"editor": "masactrl"}, cross_replace_steps=0.5)
    for own in ({"cross": 0.5}, {"targets": [{"prompt": "a dog", "weight": {"dog": 2}}]}):
        with pytest.raises(UsageError, match="line 2: .*which the editor replaces"):
            read(folder, emoji, {}, {"editor": "masactrl"} | own)
    assert len(read(folder, emoji, {"editor": "masactrl", "scope": "cat"}, {"cross": 0.5})) == 2


def test_a_negative_prompt_is_not_for_inversions_with_their_own(emoji, folder):
    with pytest.raises(UsageError, match="negative_prompt: null-text inversion does not read it"):
        read(folder, emoji, PICTURE | {"method": "null-text", "negative_prompt": "grey"})
    assert "negative_prompt" not in read(folder, emoji, PICTURE | {"method": "null-text"}, {}, negative_prompt="grey")[0].others


# ------------------------------------------------------------------------------------------- rows like one of the protocol

def told(settings, emoji, folder, blended=""):
    item = protocol.Item("k", folder / "photo.png", "a cat on grass", "a dog on grass", blended, [])
    return pie._job_or_picture(pie.custom(settings), item, emoji, 1)


@pytest.mark.parametrize("like, changed, gone, kept", [
    ("edit-friendly-inversion+p2p", {"method": "direct"}, ["seed", "eta"], {"skip": 12}),
    ("directinversion+p2p_guidance_1_5", {"method": "noise"}, ["inversion_guidance"], {"seed": 0}),
    ("ddim+pnp", {"method": "null-text"}, ["negative_prompt"], {"path": "inverted"}),
    ("ddim+p2p", {"editor": "masactrl"}, ["proximal"], {"editor": "masactrl"}),
    ("ddim+masactrl", {"editor": None, "cross": 0.5}, ["editor"], {}),
    ("edit-friendly-inversion+p2p", {"method": None}, [], {"seed": 1234, "method": "edit-friendly"})])
def test_what_a_changed_row_does_not_read_is_not_inherited(emoji, folder, like, changed, gone, kept):
    job = told({"like": like} | changed, emoji, folder, "cat dog")
    assert isinstance(job, jobs.Job), job
    said = job.settings()
    assert not said.keys() & set(gone) and said | kept == said


@pytest.mark.parametrize("settings, why", [
    ({"like": "ddim+masactrl", "cross": 0.5}, "cross_replace_steps: of Prompt-to-Prompt"),
    ({"like": "ddim+p2p", "editor": "masactrl", "self": 0.5}, "self_replace_steps: of Prompt-to-Prompt"),
    ({"like": "directinversion+p2p", "seed": 3}, "seed: direct inversion does not read it"),
    ({"method": "null-text", "path": "resampled"}, "path: null-text inversion does not read it"),
    ({"steps": 3000}, "steps must be from 1 to 1000, not 3000"), ({"height": 63}, "height must be a positive multiple"),
    ({"method": "ddim", "steps": 3, "skip": 3}, "skip, which leaves steps to run, must be a whole number from 0 to 2, not 3")])
def test_rows_that_cannot_be_meant_are_refused_before_anything_is_written(emoji, folder, settings, why):
    item = protocol.Item("k", folder / "photo.png", "a cat on grass", "a dog on grass", "cat dog", [])
    ways = {"fine": pie.custom({"method": "noise", "steps": 1}), "mine": pie.custom(settings)}
    with pytest.raises(UsageError, match=f"mine: (the target: )?{why}"):
        pie.evaluate(emoji, [item], ways, folder / "out", pie.Judges())
    assert not (folder / "out").exists()

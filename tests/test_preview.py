"""Before a long run: a few edits in few steps, where local edits may change, and what the judge says. Nothing else is written."""
import json

import pytest
import torch
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.lists import ip2p
from p2p.lists.jobs import parse
from p2p.lists.preview import quick
from p2p.show.pictures import grid, read_settings
from p2p.show.preview import STEPS, preview, stacked

SOURCE, TARGET = "a cat on grass", "a dog on grass"


def test_a_local_edit_is_shown_again_dark_where_it_may_not_change(narrow):
    mask = torch.zeros(16, 16)
    mask[:, 8:] = 1
    r = p2p.edit(narrow, SOURCE, [TARGET, p2p.Edit(TARGET, local_blend=p2p.LocalBlend(mask=mask))], steps=1)
    dark = Image.composite(r.images[2], r.images[2].point(lambda v: v // 4), Image.linear_gradient("L").rotate(90).resize((64, 64)).point(
        lambda v: 255 * (v > 127)))
    want = grid([*r.images, dark], [*r.captions(), f"{r.captions()[2]} (where it may change)"])
    assert preview(r).tobytes() == want.tobytes()
    plain = p2p.edit(narrow, SOURCE, TARGET, steps=1)
    assert preview(plain).tobytes() == plain.grid().tobytes()


def test_rows_are_stacked():
    sheet = stacked([Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 30), "blue")])
    assert sheet.size == (20, 40) and [sheet.getpixel(at) for at in ((19, 9), (9, 39), (10, 39))] == [(255, 0, 0), (0, 0, 255), (255,) * 3]


@pytest.mark.parametrize("line, steps, skip", [
    ({}, STEPS, None), ({"steps": 5}, 5, None), ({"steps": 20}, STEPS, None), ({"timesteps": list(range(900, 0, -90))}, 10, None),
    ({"image": "x.png", "method": "edit-friendly", "steps": 50, "skip": 25}, STEPS, STEPS // 2),
    ({"image": "x.png", "method": "ddim", "steps": 50}, STEPS, None), ({"image": "x.png", "method": "flow-edit", "steps": 50, "n_min": 25}, STEPS, None)])
def test_a_job_is_shortened_to_the_same_share_of_its_steps(narrow, tmp_path, line, steps, skip):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    job = quick(parse({"source": SOURCE, "targets": TARGET, **line}, 1, tmp_path, narrow))
    assert (job.sampling["steps"], job.inverting.get("skip")) == (steps, skip)
    assert job.inverting.get("n_min") in (None, STEPS // 2)


@pytest.mark.slow
@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("more, steps", [([], STEPS), (["--steps", "2"], 2), (["--sampler", "lcm"], 4), (["--blend", "cat:dog"], STEPS)])
def test_edit_writes_its_preview_alone(tmp_path, more, steps):
    assert main(["edit", SOURCE, TARGET, "--seed", "1", "--preview", *more, "-o", str(tmp_path)]) == 0
    file, = tmp_path.rglob("*.*")
    assert file.name == "preview.png" and read_settings(file)["steps"] == steps


@pytest.mark.parametrize("more", [["--report"], ["--leakage"], ["--upscale"]])
def test_edit_refuses_what_a_preview_does_not_write(tmp_path, capsys, more):
    assert main(["edit", SOURCE, TARGET, "--preview", *more, "-o", str(tmp_path)]) == 2
    assert f"{more[0]}: not with --preview" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_batch_shows_the_first_jobs_and_what_fails(tmp_path, capsys):
    lines = [{"source": SOURCE, "targets": TARGET}, {"source": SOURCE, "targets": TARGET, "local_blend": {"words": ["cat", "dog"]}},
             {"source": SOURCE, "targets": TARGET, "seed": 3}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "out"), "--preview", "2"]) == 0
    assert [f.name for f in (tmp_path / "out").rglob("*")] == ["preview.png"]
    shown = Image.open(tmp_path / "out/preview.png")
    assert shown.size[0] == 3 * (256 + 12) + 12 and shown.size[1] > 2 * 256
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"image": "broken.png", "source": SOURCE, "targets": TARGET}))
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "other"), "--preview", "2"]) == 1
    assert "line 1 fails: " in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "other"), "--preview", "0"]) == 2


@pytest.mark.parametrize("argv, said", [
    (["batch", "x.jsonl", "--workers", "2"], "--workers: not with --preview"), (["batch", "x.jsonl", "--retry-failed"], "--retry-failed: not with"),
    (["batch", "x.jsonl", "--together", "2"], "--together: not with --preview"),
    (["batch", "x.jsonl", "--engine", "ray"], "--engine ray: not with --preview"),
    *((["dataset", "x.jsonl", "--recipe", "p2p", f"--{name}", "1"], f"--{name}: not with --preview") for name in ("samples", "keep", "together")),
    (["dataset", "x.jsonl", "--recipe", "p2p", "--format", "parquet"], "--format parquet: not with --preview")])
def test_what_a_preview_does_not_read_is_refused(tmp_path, capsys, argv, said):
    assert main([*argv, "--preview", "1", "-o", str(tmp_path)]) == 2 and said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_dataset_shows_a_sample_of_each_prompt_and_the_judges_verdict(tmp_path, monkeypatch):
    entries = [{"caption": SOURCE, "edit": "make it a dog", "output": TARGET}] * 3
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    said = []
    monkeypatch.setattr("p2p.lists.preview.grid", lambda pictures, captions: said.append(captions) or grid(pictures, captions))
    assert main(["dataset", "--recipe", "ip2p", str(tmp_path / "prompts.jsonl"), "-o", str(tmp_path / "out"), "--steps", "2", "--preview", "2",
                 "--min-image", "1"]) == 0
    assert main(["dataset", "--recipe", "ip2p", str(tmp_path / "prompts.jsonl"), "-o", str(tmp_path / "no"), "--preview", "1", "--min-image", "2"]) == 2
    assert [f.name for f in (tmp_path / "out").rglob("*")] == ["preview.png"] and len(said) == 2
    assert said[0][0].startswith(f"{SOURCE} (text ") and "dropped by clip_sim_image" in said[0][1]


@pytest.mark.slow
def test_a_sample_of_a_preview_is_the_first_of_the_run(emoji):
    """What it says of a sample is what the run will record of it."""
    from p2p.lists import preview as before
    from p2p.lists.dataset import Pair
    from p2p.lists.metrics import Embedder

    embedder = Embedder(lambda x: x.flatten(1), lambda texts: torch.ones(len(texts), 3 * 64 * 64))
    recipe = ip2p.Recipe(steps=1, samples=1, image=-1, direction=-1, text=-1)
    pair = ip2p.Prompts(SOURCE, TARGET)
    (kept, pictures), = ip2p.samples(emoji, pair, embedder, recipe)[0]
    row, = before.samples(emoji, [Pair(0, pair, {})], embedder, recipe)
    captions = [f"{SOURCE} (text {kept['clip_sim_0']:.2f})",
                f"{TARGET} (text {kept['clip_sim_1']:.2f}, direction {kept['clip_sim_dir']:.2f}, image {kept['clip_sim_image']:.2f}: kept)"]
    assert row.tobytes() == grid(pictures, captions).tobytes()

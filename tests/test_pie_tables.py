"""PIE-Bench's folder of results: rows that are continued or refused, their figures, and the tables of all."""
import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_pie_protocol import item

import p2p
from benchmarks.pie_shaped import make
from p2p import UsageError
from p2p.cli import bulk
from p2p.cli.parser import _parsed, main, parsers
from p2p.image import fit
from p2p.lists import metrics, pie, pie_data, pie_report


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pie")
    make(folder, 3)
    return folder


@pytest.fixture
def one_thread():
    """As workers and ranks have: several share a sum out in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(data, out, *more):
    return ["eval", "pie", "--data", str(data), "--out", str(out), "-q", *more]


def rows_of(out):
    with (out / "pie.csv").open(newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.slow
def test_a_second_run_adds_rows_and_overwrites_none(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(data, out, "--methods", "noise", "--steps", "2")) == 0
    first = [r for r in rows_of(out)]
    assert main(command(data, out, "--methods", "directinversion+p2p,ddim+masactrl", "--steps", "2", "--limit", "1")) == 0
    said = capsys.readouterr().out
    assert "| noise | " in said and "| directinversion+p2p, steps 2 | " in said and "| ddim+masactrl, steps 2 | " in said
    again = rows_of(out)
    assert [r for r in again if r["method"] == "noise"] == first and len(first) == 6 and len(again) == 6 + 2 + 2
    assert {r["convention"] for r in first} == {"official", "corrected"} and {r["seed"] for r in first} == {"0"}
    assert set(json.loads((out / "pie.json").read_text())) == {"noise", "directinversion+p2p, steps 2", "ddim+masactrl, steps 2"}
    assert "### official, by editing type" in (out / "pie.md").read_text()


@pytest.mark.slow
def test_other_settings_are_refused_and_the_same_ones_measure_nothing_again(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    asked = command(data, out, "--methods", "noise", "--limit", "2")
    assert main([*asked, "--steps", "2"]) == 0
    before = (out / "pie.csv").read_bytes()
    assert main([*asked, "--steps", "3"]) == 2 and "steps 2, now 3" in capsys.readouterr().err
    assert main([*asked, "--steps", "2", "--cross", "0.5"]) == 2 and "cross 0.4, now 0.5" in capsys.readouterr().err
    assert main([*asked, "--steps", "2", "--dtype", "bfloat16"]) == 2 and "bfloat16" in capsys.readouterr().err
    measured = []
    monkeypatch.setattr(pie, "measure", lambda *a, real=metrics.measure: measured.append(1) or real(*a))
    assert main([*asked, "--steps", "2"]) == 0 and not measured and (out / "pie.csv").read_bytes() == before
    assert main([*command(data, out, "--methods", "noise"), "--steps", "2"]) == 0 and len(measured) == 2   # the third, by both


@pytest.mark.slow
def test_figures_that_no_judge_of_this_run_measures_stay(data, tmp_path, capsys, monkeypatch):
    """Measured with CLIP's weights at first, and then without any."""
    out = tmp_path / "out"
    asked = command(data, out, "--methods", "noise", "--limit", "1", "--steps", "1")
    assert main(asked) == 0
    file = out / "noise" / "figures.csv"
    rows = pie_report.read_figures(file.parent)
    for row in rows:
        row["judges"], row["figures"]["structure"] = "of another run", 0.25
        row["figures"]["PSNR"] = 1.0
    pie_report.write_figures(file.parent, rows)
    assert main(asked) == 0
    assert {(row["figures"]["structure"], row["figures"]["PSNR"] > 1) for row in pie_report.read_figures(file.parent)} == {(0.25, True)}


def test_a_padded_picture_is_compared_with_its_padded_edit(tmp_path):
    picture = Image.effect_noise((128, 64), 90).convert("RGB")
    picture.save(tmp_path / "source.png")
    fit(picture, (64, 64), "pad").save(tmp_path / "edit.png")
    of = item()._replace(picture=tmp_path / "source.png")
    padded, cropped = (pie._measured(of, tmp_path / "edit.png", how, pie.Way({}), metrics.Judges())["corrected"]["MSE"]
                       for how in ("pad", "crop"))
    assert padded == 0 < cropped


def test_rows_are_checked_by_prompts_that_the_model_can_encode(data, emoji, tmp_path, monkeypatch):
    """A model of prompts that were encoded beforehand has none but those of the benchmark."""
    items, tokens = pie_data.read(data, limit=1), p2p.Model.tokens
    known = {items[0].source, items[0].target, ""}

    def of_known(model, prompt):
        if prompt not in known:
            raise UsageError(f'the prompt "{prompt}" is not among the encoded ones')
        return tokens(model, prompt)
    monkeypatch.setattr(p2p.Model, "tokens", of_known)
    pie._check("noise", pie.custom({"method": "noise"}), items[0], emoji)


@pytest.mark.slow
def test_the_table_is_tidy_and_failures_are_rows(data, tmp_path, capsys):
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    mapping = json.loads((folder / "mapping_file.json").read_text())
    keys = list(mapping)
    (folder / "annotation_images" / mapping[keys[0]]["image_path"]).unlink()
    mapping[keys[1]]["blended_word"] = "lion"                                    # refused before it runs
    (folder / "mapping_file.json").write_text(json.dumps(mapping))
    asked = command(folder, out, "--methods", "noise", "--steps", "2")
    assert main(asked) == 1
    rows = rows_of(out)
    assert [r["key"] for r in rows if r["error"]] == [keys[0]] * 2 + [keys[1]] * 2
    assert "no such file" in rows[0]["error"] and "blended_word" in rows[2]["error"]
    assert list(rows[0]) == ["method", "key", "editing_type", "seed", "convention", "error", "result", "judges",
                             *metrics.NAMES.values()]
    fine = rows[-1]
    assert fine["convention"] == "corrected" and fine["lpips"] == "" and float(fine["psnr_unedit_part"]) > 0
    assert fine["editing_type"] == mapping[keys[2]]["editing_type_id"] and not fine["error"]
    assert "| noise | " in capsys.readouterr().out
    picture = next((data / "annotation_images").rglob(f"{keys[0]}.png"))
    shutil.copy(picture, folder / "annotation_images" / mapping[keys[0]]["image_path"])
    assert main(asked) == 1 and main([*asked, "--retry-failed"]) == 1            # the other one is still refused
    assert [r["key"] for r in rows_of(out) if r["error"]] == [keys[1]] * 2


@pytest.mark.slow
def test_pictures_of_another_program_and_strips(data, tmp_path, capsys):
    mapping = json.loads((data / "mapping_file.json").read_text())
    whole, strips = tmp_path / "whole", tmp_path / "strips"
    whole.mkdir()
    for i, (key, said) in enumerate(mapping.items()):
        picture = Image.open(data / "annotation_images" / said["image_path"]).convert("RGB")
        picture.save(whole / f"{key}.png")
        strip = Image.new("RGB", (4 * picture.width, picture.height), "black")
        strip.paste(picture, (3 * picture.width, 0))
        if i:
            (strips / said["image_path"]).parent.mkdir(parents=True, exist_ok=True)
            strip.save(strips / said["image_path"])
    out = tmp_path / "out"
    assert main(command(data, out, "--pictures", f"copies={whole}")) == 0
    assert main(command(data, out, "--pictures", f"panels={strips}", "--strips", "--compare", "published")) == 1
    said = capsys.readouterr()
    assert "panels, " in said.err and "holds neither" in said.err and "| directinversion+p2p | SD1.4 | 11.65 |" in said.out
    report = json.loads((out / "pie.json").read_text())
    assert report["copies"]["official"]["MSE"] == [0, 0, 0] and report["panels"]["official"]["MSE"] == [0, 0]
    assert report["copies"]["official"]["PSNR"] == [None] * 3 and len(report["panels"]["failed"]) == 1


@pytest.mark.slow
def test_one_picture_that_cannot_be_judged_is_a_row(data, tmp_path, capsys):
    """A strip that is not said to be one would be compared in the middle; and one too small for a figure ends no evaluation."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for key, size in zip(json.loads((data / "mapping_file.json").read_text()), ((256, 64), (4, 4), (64, 64))):
        Image.new("RGB", size).save(folder / f"{key}.png")
    assert main(command(data, tmp_path / "out", "--pictures", f"a={folder}")) == 1
    first, second, third = rows_of(tmp_path / "out")[::2]
    assert "look like 4 panels" in first["error"] and "--strips" in first["error"] and second["error"] and not third["error"]
    assert main(command(data, tmp_path / "out", "--pictures", f"a={folder}", "--workers", "2")) == 2
    assert "--workers: not with --pictures alone" in capsys.readouterr().err


def test_a_published_row_at_its_own_settings_keeps_its_name():
    def names(*more):
        return list(bulk._ways(_parsed("eval", parsers()[1]["eval"], ["pie", "--data", "x", "--out", "y", "--methods", *more])))
    assert names("directinversion+p2p", "--steps", "50", "--cfg", "7.5") == ["directinversion+p2p"]
    assert names("edit-friendly-inversion+p2p", "--no-blend") == ["edit-friendly-inversion+p2p"]
    assert names("directinversion+p2p", "--steps", "20") == ["directinversion+p2p, steps 20"]


@pytest.mark.slow
def test_workers_make_the_same_rows(data, tmp_path, capsys, one_thread):
    here, there = tmp_path / "here", tmp_path / "there"
    asked = ("--methods", "noise", "--steps", "2", "--limit", "2")
    assert main(command(data, here, *asked)) == main(command(data, there, *asked, "--workers", "2")) == 0
    assert (here / "pie.csv").read_bytes() == (there / "pie.csv").read_bytes()
    assert main(command(data, there, *asked, "--workers", "0")) == 2 and "--workers" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_torchrun_make_the_same_rows(data, tmp_path, one_thread):
    """The first rank waits for the others' pictures, and measures them all."""
    here, there = tmp_path / "here", tmp_path / "there"
    asked = ("--methods", "noise", "--steps", "2")
    assert main(command(data, here, *asked)) == 0
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "p2p",
                          *command(data, there, *asked, "--engine", "torchrun")], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert (here / "pie.csv").read_bytes() == (there / "pie.csv").read_bytes() and len(rows_of(there)) == 2 * 3


@pytest.mark.slow
def test_rows_of_ones_own(data, tmp_path, capsys):
    out, ways = tmp_path / "out", tmp_path / "ways.json"
    ways.write_text(json.dumps({"mine": {"method": "noise", "steps": 2, "cross": 0.2},
                                "like ours": {"like": "noise", "steps": 2, "self": 0.1}}))
    assert main(command(data, out, "--ways", str(ways), "--limit", "1")) == 0
    assert {r["method"] for r in rows_of(out)} == {"mine", "like ours"}
    ways.write_text(json.dumps({"mine": {"method": "noise", "steps": 2, "cross": 0.3}}))
    assert main(command(data, out, "--ways", str(ways), "--limit", "1")) == 2
    assert "cross 0.2, now 0.3" in capsys.readouterr().err
    for content, said in (({"a": {"method": "noises"}}, "noises"), ({"a/b": {}}, "folder"), ({"a": 1}, "expected"), ([], "expected")):
        ways.write_text(json.dumps(content))
        assert main(command(data, out, "--ways", str(ways))) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("more, said", [
    (("--methods", "edict+p2p"), "EDICT"), (("--methods", "directinversion+p2p", "--editors", "masactrl"), "--editors"),
    (("--methods", "ddim+masactrl", "--cross", "0.3"), "--cross"), (("--strips",), "--strips"),
    (("--methods", "ddim,direct", "--seed", "3"), "--seed"), (("--methods", "corrected", "--editors", "masactrl"), "--editors"),
    (("--types", "99"), "editing type 99"), (("--pictures", "a=nowhere"), "no such folder"), (("--pictures", "a"), "NAME=FOLDER")])
def test_what_cannot_be_meant_is_refused(data, tmp_path, capsys, more, said):
    assert main(command(data, tmp_path / "out", *more)) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more, said", [
    (("--cross", "7"), "cross_replace_steps: one share"), (("--steps", "0"), "steps: one number, whole and from 1"),
    (("--steps", "2000"), "steps must be from 1 to 1000, not 2000"), (("--cfg", "nan"), "guidance_scale: one finite number"),
    (("--seed", str(2**70)), "seed: one number"), (("--self", "-1"), "self_replace_steps: one share")])
def test_settings_that_no_picture_can_have_are_refused_before_anything_is_written(data, tmp_path, capsys, more, said):
    asked = command(data, tmp_path / "out", "--methods", "ddim,noise,directinversion+masactrl", "--limit", "1")
    assert main([*asked, *more]) == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("row", [["--methods", "noise", "--steps", "2"], ["--pictures", "copies=PICTURES"]])
def test_pictures_that_were_exchanged_are_refused(data, tmp_path, capsys, row):
    """Figures of a row stay those of the pictures that it was made of, whichever of them a run is about."""
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    mapping = json.loads((folder / "mapping_file.json").read_text())
    files = {key: folder / "annotation_images" / said["image_path"] for key, said in mapping.items()}
    (tmp_path / "made").mkdir()
    for key, file in files.items():
        Image.open(file).save(tmp_path / "made" / f"{key}.png")
    row = [word.replace("PICTURES", str(tmp_path / "made")) for word in row]
    last = list(files)[2]
    held = files[last].read_bytes()
    files[last].unlink()
    assert main(command(folder, out, *row, "--limit", "2")) == 0
    assert main(command(folder, out, *row)) == 1                                 # it is not there yet
    files[last].write_bytes(held)
    assert main(command(folder, out, *row)) == 0
    before = (out / "pie.csv").read_bytes()
    Image.new("RGB", (64, 64), "red").save(files[last])
    capsys.readouterr()
    for limit in ([], ["--types", mapping[last]["editing_type_id"]]):
        assert main(command(folder, out, *row, *limit)) == 2
        err = capsys.readouterr().err
        assert "of other pictures of the benchmark" in err and last in err and (out / "pie.csv").read_bytes() == before
    files[last].write_bytes(held)
    assert main(command(folder, out, *row)) == 0 and (out / "pie.csv").read_bytes() == before


def test_a_table_without_figures_has_as_many_cells_as_headings():
    report = {"noise": {"failed": {"k": "why"}, "official": {}, "corrected": {}}}
    for convention in metrics.CONVENTIONS:
        lines = pie_report.table(report, convention, published=True).splitlines()[:3]
        assert {line.count("|") for line in lines} == {4} and lines[2] == "| noise | 0 | 1 |"


def test_published_figures_stand_beside_their_rows():
    report = {"directinversion+p2p": {"failed": {}, "official": {"PSNR": [27.0], "MSE": [0.0033]}, "corrected": {}}}
    shown = pie_report.table(report, "official", published=True)
    assert "| ... published [PnPInversion] | 27.22 | 32.86 | 700 | |" in shown and "27.19" in shown
    assert "published" not in pie_report.table(report, "corrected", published=True)
    others = pie_report.published_table({"directinversion+p2p"})
    assert "| ddim+pnp | SD1.5 | 28.22 | 22.28 | 113.46 | 83.64 | 79.05 | 25.41 | 22.55 |" in others and "27.22" not in others


def test_results_under_a_jpg_are_judged_as_jpeg_by_the_official_convention(tmp_path):
    """The scripts save four panels in one file, under the picture's name. The first column of the last panel has its neighbour's
    colour in it; the border counts as edited."""
    rng = np.random.default_rng(0)
    strip = rng.integers(0, 256, (64, 256, 3), np.uint8)
    Image.fromarray(strip).save(tmp_path / "strip.jpg")
    panel = np.asarray(Image.open(tmp_path / "strip.jpg").crop((192, 0, 256, 64)))
    assert np.array_equal(np.asarray(pie._stored(Image.fromarray(strip[:, 192:])))[:, 1:], panel[:, 1:])
    source = Image.fromarray(np.asarray(Image.fromarray(strip[:, :64]).resize((64, 64))))
    for suffix in ("jpg", "png"):
        source.save(tmp_path / f"source.{suffix}", quality=100, subsampling=0)
        Image.fromarray(strip[:, 192:]).save(tmp_path / "edit.png")
        of = item()._replace(picture=tmp_path / f"source.{suffix}")
        plain, jpeg = (pie._measured(of, tmp_path / "edit.png", "crop", pie.Way({}, jpeg=j), metrics.Judges()) for j in (False, True))
        assert (plain["official"]["MSE"] != jpeg["official"]["MSE"]) == (suffix == "jpg")
        assert plain["corrected"] == pytest.approx(jpeg["corrected"], nan_ok=True)

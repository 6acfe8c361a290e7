"""PIE-Bench's rows: what the published scripts do with an item, as jobs; the folder, its tables, and what may not be mixed."""
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

import p2p
from benchmarks.pie_shaped import make
from p2p import UsageError
from p2p.cli.parser import main
from p2p.image import fit, from_base64
from p2p.lists import metrics, pie, pie_data, pie_report, protocol


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pie")
    make(folder, 3)
    return folder


def item(source="a red cat on grass", target="a red dog on grass", blended="cat dog"):
    return protocol.Item("k", pie.Path("k.png"), source, target, blended, [], "1", "k.png")


def told(name, model, *given, **changed):
    return protocol.job(protocol.replace(protocol.find(name), **changed), item(*given), model)


# ---------------------------------------------------------------------------- run_editing_*.py, row by row

P2P = {"source": "a red cat on grass", "targets": ["a red dog on grass"], "steps": 50, "guidance_scale": 7.5,
       "mode": "refine", "cross_replace_steps": 0.4, "self_replace_steps": 0.6, "self_max_tokens": 1024, "windows_over": "run",
       "aligner": "official", "fit": "square", "equalizer": {"dog": 2.0},
       "local_blend": {"words": [["cat"], ["dog"]], "keep": "sampled"}}
BARE = {k: P2P[k] for k in ("source", "targets", "steps", "guidance_scale", "fit")}
PNP = BARE | {"editor": {"name": "plug-and-play", "source_prompt": ""}, "negative_prompt": "ugly, blurry, black, low res, unrealistic"}


@pytest.mark.parametrize("name, wanted", [
    ("ddim+p2p", P2P | {"method": "ddim"}),
    ("null-text-inversion+p2p", P2P | {"method": "null-text"}),
    ("negative-prompt-inversion+p2p", P2P | {"method": "negative-prompt"}),
    ("directinversion+p2p", P2P | {"method": "direct"}),
    ("null-text-inversion+proximal-guidance", P2P | {"method": "null-text", "proximal": ["published", 0.75]}),
    ("negative-prompt-inversion+proximal-guidance", P2P | {"method": "negative-prompt", "proximal": ["published", 0.75]}),
    ("edit-friendly-inversion+p2p", {k: v for k, v in P2P.items() if k not in ("equalizer", "local_blend")} | {
        "method": "edit-friendly", "seed": 1234, "skip": 12, "mode": "replace", "self_max_tokens": 256, "windows_over": "schedule"}),
    ("ddim+masactrl", BARE | {"source": "", "method": "ddim", "editor": "masactrl"}),
    ("directinversion+masactrl", BARE | {"source": "", "method": "direct", "editor": "masactrl"}),
    ("ddim+pnp", PNP | {"method": "ddim", "path": "resampled"}),
    ("directinversion+pnp", PNP | {"method": "direct"}),
    ("directinversion+p2p_guidance_25_75", P2P | {"method": "direct", "inversion_guidance": 2.5}),
    ("directinversion+p2p_guidance_0_1", P2P | {"method": "direct", "inversion_guidance": 0.0, "guidance_scale": 1.0}),
    ("ablation_directinversion_step_100+p2p", P2P | {"method": "direct", "steps": 100})])
def test_published_rows_are_what_the_scripts_do(emoji, name, wanted):
    said = told(name, emoji)
    assert said.pop("image").endswith("k.png") and said == wanted


def test_every_named_row_of_the_published_tables_is_there_or_refused_by_name():
    assert len([n for n in protocol.PUBLISHED if "_guidance_" in n]) == 20 and len(protocol.GROUPS["published"]) == 11
    for name in ("stylediffusion+p2p", "edict+p2p", "edict+direct_forward", "ddim+pix2pix-zero", "instruct-pix2pix",
                 "instruct-diffusion", "blended-latent-diffusion", "ablation_null-latent-inversion+p2p",
                 "ablation_null-text-inversion_single_branch+p2p_a800", "ablation_directinversion_04+p2p",
                 "ablation_directinversion_interval_24+p2p", "ablation_directinversion_add-source+p2p"):
        with pytest.raises(UsageError, match="not offered, for want of"):
            protocol.find(name)
    with pytest.raises(UsageError, match="no method; published: ddim"):
        protocol.find("ddim+p2q")


@pytest.mark.parametrize("blended, words, weight", [
    ("cat dog", (["cat"], ["dog"]), {"dog": 2.0}),
    ("cat dog red grass", (["cat"], ["dog"]), {"dog": 2.0}),                  # the first two of any number
    ("red cat dog", (["red"], []), None),                                    # the second word is none of the target
    ("tiger dog", ([], ["dog"]), {"dog": 2.0}), ("cat lion", (["cat"], []), None),
    ("Cat dog", ([], ["dog"]), {"dog": 2.0}), ("cat dog,", (["cat"], []), None),   # equality, with case and punctuation
    ("grass a", (["grass"], ["a#1", "a#2"]), {"a#1": 2.0, "a#2": 2.0})])
def test_published_blends_look_words_up_by_equality(emoji, blended, words, weight):
    said = told("ddim+p2p", emoji, "a red cat on grass", "a red dog and a grass", blended)
    assert tuple(said["local_blend"]["words"]) == words and said.get("equalizer") == weight


def test_a_word_with_its_punctuation_is_another_one(emoji):
    said = told("ddim+p2p", emoji, "a red cat, on grass", "a red dog on grass", "cat, dog")
    assert said["local_blend"]["words"] == [["cat,"], ["dog"]]
    assert told("ddim+p2p", emoji, "a red cat, on grass", "a red dog on grass", "cat dog")["local_blend"]["words"] == [[], ["dog"]]


def test_words_of_neither_prompt_make_the_target_the_source_and_the_item_stays(emoji, tmp_path):
    said = told("ddim+p2p", emoji, "a red cat on grass", "a red dog on grass", "sky lion")
    mask = from_base64(said["local_blend"]["mask"])
    assert np.asarray(mask).max() == 0 and "equalizer" not in said and "words" not in said["local_blend"]
    with pytest.raises(UsageError, match="one word"):
        told("ddim+p2p", emoji, "a red cat on grass", "a red dog on grass", "cat")
    assert "local_blend" not in told("ddim+p2p", emoji, "a red cat on grass", "a red dog on grass", "")


def test_edit_friendly_replaces_where_the_prompts_have_as_many_words(emoji):
    row = "edit-friendly-inversion+p2p"
    assert told(row, emoji, "a cat on grass", "a dog on ice", "cat dog")["mode"] == "replace"
    assert told(row, emoji, "a huge dog on grass", "a dog on foggy grass", "")["mode"] == "replace"     # ours refines
    assert told(row, emoji, "a cat on grass", "a black cat on grass", "")["mode"] == "refine"


def test_corrected_rows_choose_modes_and_fail_where_words_are_missing(emoji):
    said = told("direct", emoji, "a red cat on grass", "a red dog on grass", "red cat dog")
    assert said["local_blend"] == {"words": ["red cat", "dog"], "keep": "stored"} and said["equalizer"] == {"dog": 2.0}
    assert "mode" not in said and said["aligner"] == "exact" and said["fit"] == "crop" and said["method"] == "direct"
    with pytest.raises(UsageError, match="blended_word"):
        told("direct", emoji, "a red cat on grass", "a red dog on grass", "lion dog")
    assert told("ddim, plug-and-play", emoji)["editor"] == "plug-and-play"


def test_pictures_are_fitted_as_load_512_does():
    """[:, :, :3], the middle square by whole pixels, Image.resize as it is."""
    rng = np.random.default_rng(0)
    for h, w in ((40, 70), (71, 40), (33, 33)):
        a = rng.integers(0, 256, (h, w, 4), np.uint8)
        b = a[:, :, :3]
        b = b[:, (w - h) // 2:(w - h) // 2 + h] if h < w else b[(h - w) // 2:(h - w) // 2 + w]
        wanted = np.array(Image.fromarray(b).resize((64, 64)))
        assert np.array_equal(np.asarray(protocol.square(Image.fromarray(a), (64, 64))), wanted)


@pytest.mark.slow
@torch.no_grad()
def test_the_resampled_path_is_the_published_list(emoji):
    """extract_latents: inverted with the prompt, sampled again without guidance, reversed; step i is given entry -1 - i of a list
    without the noise itself, and the target starts from its last one."""
    inv = p2p.invert(emoji, Image.new("RGB", (64, 64), "teal"), "a red cat on grass", method="ddim", steps=6)
    found = protocol.resampled(emoji, inv)
    x, after = inv.latents[-1:], []
    schedule, text = emoji.schedule(6), emoji.condition(["a red cat on grass"])
    for t, a_t, a_prev in schedule:
        out = emoji.predict(x, t, text)[0]
        x = p2p.sampler.ddim_step(*p2p.sampler.x0_and_eps(x, out, a_t, emoji.prediction, emoji.clip), a_t, a_prev)
        after.append(x)
    latents = after[::-1]                                         # latent_reconstruction.reverse()
    given = [latents[-1 - i] for i in range(6)]
    assert found.method == "direct" and len(found.latents) == 7
    assert all((found.latents[6 - i] - given[i][0]).abs().max() < 1e-5 for i in range(6))


# ---------------------------------------------------------------------------------------- the folder and its tables

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
def test_workers_make_the_same_rows(data, tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    asked = ("--methods", "noise", "--steps", "2", "--limit", "2")
    assert main(command(data, here, *asked)) == main(command(data, there, *asked, "--workers", "2")) == 0
    assert (here / "pie.csv").read_bytes() == (there / "pie.csv").read_bytes()
    assert main(command(data, there, *asked, "--workers", "0")) == 2 and "--workers" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_torchrun_make_the_same_rows(data, tmp_path):
    """The first rank waits for the others' pictures, and measures them all."""
    here, there = tmp_path / "here", tmp_path / "there"
    asked = ("--methods", "noise", "--steps", "2")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)   # as the ranks: several share a sum out in another order
    try:
        assert main(command(data, here, *asked)) == 0
    finally:
        torch.set_num_threads(threads)
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
    (("--methods", "ddim,direct", "--seed", "3"), "--seed"),
    (("--types", "99"), "editing type 99"), (("--pictures", "a=nowhere"), "no such folder"), (("--pictures", "a"), "NAME=FOLDER")])
def test_what_cannot_be_meant_is_refused(data, tmp_path, capsys, more, said):
    assert main(command(data, tmp_path / "out", *more)) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("name, said", [
    ("null-text-inversion+p2p_a800", "null-text-inversion.p2p as it ran on one kind of GPU; ask for null-text-inversion.p2p, "),
    ("null-text-inversion+p2p_3090", "on one kind of GPU"), ("ablation_null-latent-inversion+p2p_3090", "for want of null-text's"),
    ("ablation_directinversion_step_30+p2p", "20, 100 and 500 steps; for others ask for directinversion.p2p with --steps 30"),
    ("stylediffusion+p2p", "not offered, for want of StyleDiffusion's network, which is trained for each picture; compare")])
def test_names_of_the_published_tables_get_an_answer(name, said):
    with pytest.raises(UsageError, match=said):
        protocol.find(name)


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


def test_a_row_is_recorded_with_the_keys_of_its_first_version():
    """So that a row that was begun with an earlier version goes on."""
    published = {name: protocol.recorded(protocol.find(name)) for name in ("ddim+p2p", "ddim+masactrl")}
    assert {name: row["told"] for name, row in published.items()} == {"ddim+p2p": "prompt", "ddim+masactrl": "nothing"}
    assert all("source_conditioning" not in row for row in published.values())
    assert published["ddim+masactrl"]["inversion"] == "ddim" and published["ddim+masactrl"]["fit"] == "square"

"""InstructPix2Pix's recipe: samples drawn by the prompt alone, the paper's filters, its folder, and nothing lost on the way."""
import io
import json
import re
import shutil
import tarfile
from contextlib import redirect_stderr

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from p2p import NumericsError
from p2p.cli import bulk
from p2p.cli.parser import main
from p2p.lists import dataset, ip2p

PROMPTS = [("a cat on grass", "make it a dog", "a dog on grass"), ("a red car", "make it blue", "a blue car"),
           ("a house on grass", "keep it", "a house on grass")]


def listed(file):
    entries = [dict(zip(("caption", "edit", "output"), p)) for p in PROMPTS]
    entries[0] |= {"url": "https://example.org/cat.jpg", "input": PROMPTS[0][0]}
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


@pytest.fixture
def prompts(tmp_path):
    return listed(tmp_path / "prompts.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(a finished folder with its export, what was said): other folders are compared with it, and copies of it go on."""
    folder, said = tmp_path_factory.mktemp("finished"), io.StringIO()
    with redirect_stderr(said):
        assert main(command(listed(folder / "prompts.jsonl"), folder / "out", "--format", "webdataset")) == 0
    return folder / "out", said.getvalue()


def command(prompts, out, *more, recipe="ip2p"):
    return ["dataset", "--recipe", recipe, str(prompts), "--out", str(out), "--steps", "3", "--samples", "5", "--keep", "2", *more]


def tree(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != "recipe.json"}


@pytest.mark.slow
def test_words_that_the_model_does_not_know_are_named(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"caption": "a cat on grass", "edit": "make it a zebra", "output": "a zebra on grass"}) + "\n")
    main(command(file, tmp_path / "out", "--samples", "1", "--steps", "1"))
    assert 'prompt 0: note: "a zebra on grass": this model has never seen zebra' in capsys.readouterr().err


@pytest.mark.slow
def test_pairs_are_kept_as_the_original_lays_them_out(prompts, finished):
    out, said = finished
    seeds = json.loads((out / "seeds.json").read_text())
    assert [name for name, _ in seeds] == ["0000000", "0000001"]      # two of the same prompt have no direction in common
    for name, found in seeds:
        rows = [json.loads(line) for line in (out / name / "metadata.jsonl").read_text().splitlines()]
        assert sorted(str(r["seed"]) for r in rows) == sorted(found) and len(found) == 2
        assert [r["clip_sim_dir"] for r in rows] == sorted((r["clip_sim_dir"] for r in rows), reverse=True)
        for r in rows:
            assert list(r) == ["seed", "p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"]
            assert r["clip_sim_image"] >= 0.5 and min(r["clip_sim_dir"], r["clip_sim_0"], r["clip_sim_1"]) >= 0.2
            assert 0.1 <= r["p2p_threshold"] <= 0.9 and 3 <= r["cfg_scale"] <= 6
            assert all(Image.open(out / name / f"{r['seed']}_{k}.jpg").size == (64, 64) for k in (0, 1))
        assert json.loads((out / name / "prompt.json").read_text()) == json.loads(prompts.read_text().splitlines()[int(name)])
    assert json.loads((out / "0000002" / "counts.json").read_text())["kept"] == 0 and "kept 4" in said and "samples 15" in said
    assert not (out / "0000002" / "metadata.jsonl").exists()          # there it is opened when a pair is kept
    with tarfile.open(out / "shard-000000.tar") as tar:
        names = tar.getnames()
        assert len(names) == 12 and json.load(tar.extractfile(names[2]))["output"] == PROMPTS[0][2]
        assert Image.open(io.BytesIO(tar.extractfile(names[1]).read())).size == (64, 64)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_files(prompts, finished, tmp_path, capsys):
    whole, out = finished[0], tmp_path / "out"
    real = dataset._put

    def stopped(pair, *rest):
        if pair.index == 1:
            raise OSError(28, "No space left on device")
        real(pair, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_put", stopped)
        assert main(command(prompts, out, "-q")) == 2 and "No space left" in capsys.readouterr().err
    first = (out / "0000000" / "metadata.jsonl").stat().st_mtime_ns
    assert main(command(prompts, out, "--format", "webdataset", "-q")) == 0 and tree(out) == tree(whole)
    assert (out / "0000000" / "metadata.jsonl").stat().st_mtime_ns == first


def test_a_sample_depends_on_its_prompt_alone(emoji):
    recipe = ip2p.Recipe()
    drawn = [ip2p.drawn(ip2p.Prompts(*PROMPTS[0][::2]), j, recipe, emoji) for j in range(200)]
    assert drawn[3] == ip2p.drawn(ip2p.Prompts(*PROMPTS[0][::2]), 3, recipe, emoji) != drawn[4]
    assert len({d["seed"] for d in drawn}) == 200 and 2**31 < max(d["seed"] for d in drawn) < 2**32
    for name, low, high in (("p2p_threshold", 0.1, 0.9), ("cfg_scale", 3.0, 6.0)):
        values = torch.tensor([d[name] for d in drawn])
        assert low <= values.min() < low + 0.05 * (high - low) and high >= values.max() > high - 0.05 * (high - low)


def test_filters_are_cosines():
    before, after = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = ip2p.similarities(before, after, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert {k: v.tolist() for k, v in found.items()} == {
        "clip_sim_0": [1, 1], "clip_sim_1": [1, 0], "clip_sim_image": [0, 1], "clip_sim_dir": [pytest.approx(1), 0]}
    recipe, one, two = ip2p.Recipe(), *({k: v[i].item() for k, v in found.items()} for i in range(2))
    assert ip2p.dropped(one, recipe) == "clip_sim_image" and ip2p.dropped(two, recipe) == "clip_sim_dir"
    good = dict(clip_sim_0=0.2, clip_sim_1=0.2, clip_sim_image=0.7, clip_sim_dir=0.2)
    assert ip2p.dropped(good, recipe) is None and ip2p.dropped(good | {"clip_sim_1": float("nan")}, recipe) == "clip_sim_1"


@pytest.mark.slow
def test_prompt_to_prompts_own_pairs_stop_early_and_mix_with_no_others(prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(prompts, out, recipe="p2p")) == 0
    counts = json.loads((out / "0000000" / "counts.json").read_text())
    assert counts["samples"] == 4 and json.loads((out / "recipe.json").read_text())["sampler"] == "p2p"
    assert "clip_sim_dir" in json.loads((out / "0000000" / "metadata.jsonl").read_text().splitlines()[0])
    capsys.readouterr()
    assert main(command(prompts, out)) == 2
    said = capsys.readouterr().err
    assert "sampler 'p2p'" in said and "prompt/s" not in said   # refused before anything seems to have begun


MODEL = [["--dtype", "bfloat16"], ["--half-weights"], ["--prediction", "eps"], ["--tile", "16"]]


@pytest.mark.slow
@pytest.mark.parametrize("other", MODEL)
def test_another_model_or_judge_does_not_go_on(prompts, tmp_path, capsys, other, monkeypatch, once):
    """Whatever changes pixels, or which of them are kept; files that only lie elsewhere do not."""
    out, few = tmp_path / "out", ["--samples", "1", "--steps", "1", "-q"]
    assert main(command(prompts, out, *few)) == 0
    before = tree(out), (out / "recipe.json").read_bytes()
    assert main(command(prompts, out, *few, *other)) == 2 and "identity." in capsys.readouterr().err
    moved = shutil.copy(bulk.recogniser.FILE, tmp_path / "eye.safetensors")
    monkeypatch.setattr(bulk.recogniser, "FILE", moved)
    assert main(command(prompts, out, *few)) == 0
    monkeypatch.setattr(bulk, "sha256", lambda file: "0" * 64)
    assert main(command(prompts, out, *few)) == 2 and "judge" in capsys.readouterr().err
    assert (tree(out), (out / "recipe.json").read_bytes()) == before


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sampler", "judge"])
def test_a_prompt_of_which_nothing_can_be_drawn_is_said_and_tried_again(prompts, tmp_path, capsys, monkeypatch, where, once):
    out, few = tmp_path / "out", ["--samples", "2", "--steps", "1"]
    real = ip2p.similarities if where == "judge" else ip2p.SAMPLERS["ip2p"]

    def broken(*given):
        found = real(*given)
        if where == "judge":
            return found | {"clip_sim_dir": found["clip_sim_dir"] * float("nan")}
        raise NumericsError("values that are not finite")

    with pytest.MonkeyPatch.context() as patch:
        if where == "judge":
            patch.setattr(ip2p, "similarities", broken)
        else:
            patch.setitem(ip2p.SAMPLERS, "ip2p", broken)
        assert main(command(prompts, out, *few)) == 1
    err = capsys.readouterr().err
    assert "prompt 0: failed: " in err and "not finite" in err and "3 of 3 prompts failed" in err
    assert not list(out.glob("0*")) and json.loads((out / "seeds.json").read_text()) == []
    assert main(command(prompts, out, "-q", *few)) == 0 and len(list(out.glob("0*"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("error", [NumericsError("values that are not finite"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_sample_fails_alone_whatever_it_was_batched_with(emoji, prompts, tmp_path, monkeypatch, capsys, error, once):
    real, recipe = ip2p.SAMPLERS["ip2p"], ip2p.Recipe()
    bad = ip2p.drawn(ip2p.Prompts(*PROMPTS[0][::2]), 1, recipe, emoji)["seed"]

    def broken(model, prompts, given, steps):
        if any(d["seed"] == bad for d in given):
            raise error
        return real(model, prompts, given, steps)
    monkeypatch.setitem(ip2p.SAMPLERS, "ip2p", broken)
    for together in "1", "4":
        assert main(command(prompts, tmp_path / together, "--together", together, "--keep", "5")) == 1
        counts = json.loads((tmp_path / together / "0000000" / "counts.json").read_text())
        assert counts["samples"] == 4 and counts[f"failed: {error}"] == 1
        assert main(command(prompts, tmp_path / together, "--together", together, "--keep", "5")) == 0   # nothing is left to be tried
    names = [{p.name for p in (tmp_path / together).rglob("*.jpg")} for together in "14"]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_run_goes_on_with_a_smaller_batch(prompts, finished, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / "out")
    assert main(command(prompts, out, "--together", "2", "-q")) == 0
    assert main(command(prompts, out, "--keep", "1", "-q")) == 2 and "keep" in capsys.readouterr().err


@pytest.mark.slow
def test_folders_of_prompts_that_the_list_lacks_are_not_mixed_in(prompts, finished, tmp_path, capsys):
    out, before = shutil.copytree(finished[0], tmp_path / "out"), tree(finished[0])
    prompts.write_text(prompts.read_text().splitlines()[0])
    assert main(command(prompts, out, "-q")) == 2 and "made with 2 prompts that the list lacks (0000001, 0000002)" in capsys.readouterr().err
    assert tree(out) == before


@pytest.mark.slow
def test_two_runs_of_one_list_share_it(prompts, finished, tmp_path, monkeypatch, capsys):
    """The other one finishes a folder while this one samples for it, and the next one before its turn."""
    out, real = tmp_path / "out", dataset.samples_of

    def slow(model, asked, *given):
        found = real(model, asked, *given)
        for folder in ("0000000", "0000001"):
            if not (out / folder).exists():
                shutil.copytree(finished[0] / folder, out / folder)
        return found
    monkeypatch.setattr(dataset, "samples_of", slow)
    assert main(command(prompts, out, "-q")) == 0
    assert {k: v for k, v in tree(out).items() if "shard" not in k} == {k: v for k, v in tree(finished[0]).items() if "shard" not in k}


def test_pure_noise_has_no_sigma(prompts, tmp_path, capsys):
    assert main(command(prompts, tmp_path / "out", "--zero-snr")) == 2 and "zero terminal SNR" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_parquet_holds_the_same_pairs(prompts, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    assert main(command(prompts, out, "--format", "parquet", "-q")) == 0
    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    assert len(rows) == 4 and rows[0]["edit_prompt"] == PROMPTS[0][1] and rows[0]["url"].endswith("cat.jpg")
    assert rows[3]["url"] is None and rows[3]["caption"] == PROMPTS[1][0]
    assert Image.open(io.BytesIO(rows[3]["edited_image"])).size == (64, 64)


@pytest.mark.slow
def test_a_field_of_several_types_is_text_and_columns_are_no_fields(finished, prompts, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")
    monkeypatch.setattr(dataset, "ROWS", 3)   # more than one group of rows
    for folder, fields in (("0000000", {"n": 1, "id": 1, "big": 2**64, "odd": 2**60 + 1, "long": 2**60 + 1}),
                           ("0000001", {"n": 2.5, "id": "b", "big": 2, "odd": 0.5, "long": 1})):
        file = out / folder / "prompt.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    rows = pq.read_table(*dataset.parquet(out)).to_pylist()
    assert [(rows[i]["n"], rows[i]["id"], rows[i]["big"]) for i in (0, 3)] == [(1.0, "1", str(2**64)), (2.5, "b", "2")]
    assert [(rows[i]["odd"], rows[i]["long"]) for i in (0, 3)] == [(str(2**60 + 1), 2**60 + 1), ("0.5", 1)]
    entry = {"caption": "a cat on grass", "edit": "a dog", "output": "a dog on grass", "input_image": "cats/1.png"}
    prompts = tmp_path / "list.jsonl"
    prompts.write_text(json.dumps(entry))
    assert main(command(prompts, tmp_path / "new", "--format", "parquet")) == 2 and "input_image: samples have" in capsys.readouterr().err
    prompts.write_text(json.dumps(entry | {"seed": 3}))
    for form in (), ("--format", "webdataset"), ("--format", "parquet"):
        assert main(command(prompts, tmp_path / "new", *form)) == 2 and "seed: samples" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_model_with_something_less_does_not_go_on(prompts, tmp_path, capsys):
    """A LoRA that only the earlier run had, say: settings that stand in no record of this one."""
    out = tmp_path / "out"
    assert main(command(prompts, out, "--samples", "1", "--steps", "1", "-q")) == 0
    recipe = json.loads((out / "recipe.json").read_text())
    recipe["identity"]["lora"] = [["0" * 64, 0.8]]
    (out / "recipe.json").write_text(json.dumps(recipe))
    assert main(command(prompts, out, "--samples", "1", "--steps", "1", "-q")) == 2
    assert "identity.lora" in capsys.readouterr().err and json.loads((out / "recipe.json").read_text()) == recipe


@pytest.mark.parametrize("line, said", [('{"caption": "a", "edit": "\\ud83d", "output": "c"}', "line 1: .*half of a character"), ("{}", "'edit'"), ('{"caption": 1, "edit": "b", "output": "c"}', "texts"), ("no", "line 1")])
def test_other_lists_are_refused(tmp_path, capsys, line, said):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    assert main(command(tmp_path / "p.jsonl", tmp_path / "out", "--format", "parquet")) == 2 and re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_models_need_clip(prompts, tmp_path, capsys, sd1_file):
    assert main(command(prompts, tmp_path / "out", "--model", str(sd1_file), "--family", "sd1")) == 2
    assert "--clip" in capsys.readouterr().err

"""What can be known to be wrong with a job before it runs is named at its line, in the words in which `edit` refuses it."""
import json
import os
import time

import pytest
from PIL import Image

import p2p
from p2p import UsageError
from p2p.cli import values
from p2p.cli.parser import main
from p2p.lists import dataset, jobs, work
from p2p.show.pictures import difference, marked, read_settings
from p2p.show.sweep import shown

pytestmark = pytest.mark.usefixtures("once")
JOB = {"source": "a cat on grass", "targets": ["a dog on grass"], "steps": 1, "cfg": 1}
PICTURE = {"image": "fine.png", "method": "ddim"}
FAULTS = {   # (what a line says, what is said of it)
    "weight": ({"weight": {"bird": 2}}, 'no word "bird" in the prompt "a dog on grass"'),
    "weight of the second": ({"weight": {"dog#2": 2}}, 'holds "dog" 1 times'),
    "window": ({"cross": {"default_": 0.8, "cat": 0.2}}, 'no word "cat" in the prompt "a dog on grass"'),
    "swap from": ({"swap": {"bird": "dog"}}, 'no word "bird" in the prompt "a cat on grass"'),
    "swap to": ({"swap": {"cat": "bird"}}, 'no word "bird" in the prompt "a dog on grass"'),
    "scope": ({"scope": "bird"}, 'no word "bird"'),
    "scope beside the change": ({"scope": "grass"}, "nothing of what changes"),
    "scope of an editor": ({"scope": "bird", "editor": "masactrl"}, 'no word "bird"'),
    "blend of the source": ({"local_blend": {"words": ["dog", "dog"]}}, 'no word "dog" in the prompt "a cat on grass"'),
    "blend of the target": ({"local_blend": {"words": ["cat", "cat"]}}, 'no word "cat" in the prompt "a dog on grass"'),
    "substruct": ({"local_blend": {"words": ["cat", "dog"], "substruct": ["tree", []]}}, 'no word "tree"'),
    "rivals": ({"local_blend": {"words": ["cat", "dog"], "rivals": ["tree", []]}}, 'no word "tree"'),
    "level": ({"local_blend": {"words": ["cat", "dog"], "level": 3}}, "no attention to text at 22 x 22 positions"),
    "two levels": ({"targets": [{"prompt": f"a {w} on grass", "local_blend": {"words": ["cat", w], "level": level}}
                                for w, level in (("dog", 4), ("bird", 8))]}, "one level for all targets"),
    "mode": ({"mode": "replace", "targets": "a big dog on grass"}, "a word swap needs as many words"),
    "reweight": ({"mode": "reweight"}, 'mode "reweight" is for one and the same prompt'),
    "syntax": ({"source": "a [cat:dog:0.4] on grass"}, "in the syntax of other programs"),
    "syntax of a target": ({"targets": ["a dog on grass", "a [dog|cat]"]}, "in the syntax of other programs"),
    "beyond what is read": ({"source": "a " * 100 + "cat", "targets": "a " * 100 + "dog"}, "beyond the 32 tokens"),
    **{f"{name} {size}": ({name: size}, f"{name} must be a positive multiple of 2") for name in ("height", "width")
       for size in (1, 63, 2**63, 2**62, 10**4)},
    "steps": ({"steps": 1001}, "steps must be from 1 to 1000"),
    **{f"guidance {x:g}": ({"cfg": x}, "guidance_scale must be a finite number") for x in (1e308, -1e30)},
    "negative prompt": ({"negative_prompt": "grey"}, "nothing leads away from it"),
    "syntax of the negative prompt": ({"negative_prompt": "[grey|red]", "cfg": 2}, "in the syntax of other programs"),
    "skip": (PICTURE | {"skip": 1}, "skip, which leaves steps to run, must be a whole number from 0 to 0, not 1"),
    "eta": (PICTURE | {"method": "edit-friendly", "eta": 0}, "eta must lie above 0"),
    "final alpha": (PICTURE | {"final_alpha": 0.5}, "final_alpha 0.5"),
    "inversion guidance": (PICTURE | {"inversion_cfg": 1e300}, "inversion_guidance must be a finite number"),
    "inner steps": (PICTURE | {"method": "null-text", "inner_steps": 10**7}, "inner_steps must be a whole number"),
    "picture's size": (PICTURE | {"height": 63}, "height must be a positive multiple of 2"),
    "words of a picture": (PICTURE | {"weight": {"bird": 2}}, 'no word "bird"'),
    "picture": ({"image": "absent.png"}, "absent.png: no such file"), "folder": ({"image": "folder.png"}, "folder.png: not a file"),
    "pipe": ({"image": "pipe.png"}, "pipe.png: not a file"), "long name": ({"image": "x" * 5000}, "too long"),
    "picture's place": ({"image": "fine.png/x.png"}, "ot a directory"),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (64, 64), "green").save(tmp_path / "fine.png")
    return tmp_path


def listed(folder, *rows):
    (folder / "jobs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "jobs.jsonl"


def run(folder, *more):
    return main(["batch", str(folder / "jobs.jsonl"), "--out", str(folder / "out"), *more])


def states(folder):
    return [json.loads(line)["state"] for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", FAULTS)
def test_it_is_said_of_its_line_as_of_a_single_edit(emoji, folder, monkeypatch, what):
    """At its line, no more than it, and with the network never run; at its turn the job would say the same."""
    monkeypatch.setattr(p2p.Model, "predict", None)
    said, wanted = FAULTS[what]
    with pytest.raises(UsageError) as error:
        jobs.read(listed(folder, JOB, JOB | said), emoji)
    assert wanted in str(error.value) and "line 2: " in str(error.value) and "line 1: " not in str(error.value)
    monkeypatch.undo()   # a picture is inverted before its words are looked for
    with pytest.raises(UsageError) as alone:
        work._ready(emoji, jobs.parse(JOB | said, 2, folder, emoji))
    assert str(error.value).endswith(f"line 2: {alone.value}")


@pytest.mark.slow
def test_all_are_named_and_nothing_is_written(emoji, folder, capsys):
    listed(folder, JOB, *(JOB | said for said, _ in FAULTS.values()))
    assert run(folder) == 2
    err = capsys.readouterr().err
    assert all(f"line {i}: " in err for i in range(2, 2 + len(FAULTS))) and "line 1: " not in err and not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("said", [
    {"targets": ["a dog on grass", "a cat on grass"], "weight": {"grass": 2}}, {"scope": "cat"}, {"height": 32, "width": 96},
    {"cross": {"dog": 0.1}, "swap": {"cat": "dog"}}, {"local_blend": {"words": [[], "dog"]}}, PICTURE | {"fit": "own"},
    PICTURE | {"fit": "square"}, PICTURE | {"method": "edit-friendly", "skip": 0, "eta": 0.5}, {"proximal": ["l0", 0.5], "cfg": 2},
    PICTURE | {"method": "null-text", "cfg": 2}, {"editor": "masactrl", "scope": "cat"}, {"negative_prompt": "grey", "cfg": 2}])
def test_what_would_run_is_read(emoji, folder, said):
    (job,) = jobs.read(listed(folder, JOB | said), emoji)
    assert work._ready(emoji, job).prompts


@pytest.mark.slow
def test_no_picture_is_decoded_and_a_thousand_lines_take_about_a_second(emoji, folder, monkeypatch):
    for name in ("open", "new"):
        monkeypatch.setattr(Image, name, None)
    blend = {"weight": {"dog": 2}, "local_blend": {"words": ["cat", "dog"]}, "cross": {"default_": 0.8, "dog": 0.2}}
    rows = [{"source": f"a cat on grass, number {i}", "targets": f"a dog on grass, number {i}", "seed": i, "steps": 20} |
            (PICTURE | {"seed": None} if i % 2 else {}) | blend for i in range(1000)]
    listed(folder, *rows)
    began = time.process_time()
    assert len(jobs.read(folder / "jobs.jsonl", emoji)) == 1000
    assert time.process_time() - began < 30   # 0.8 s where nothing else runs; pictures decoded, it is minutes


def test_what_nobody_foresaw_is_left_to_the_jobs_turn(emoji, folder, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("a fault of ours")

    monkeypatch.setattr("p2p.lists.job.edit_request", broken)
    assert len(jobs.read(listed(folder, JOB, JOB | {"seed": 1}), emoji)) == 2


# ------------------------------------------------------------------------------------------- lists that were begun

@pytest.mark.slow
def test_a_fault_of_a_line_that_is_done_does_not_stop_the_others(folder, monkeypatch, capsys):
    """Its picture is gone since, or a later version refuses what an earlier one ran."""
    first = JOB | {"image": "fine.png", "method": "noise"}
    listed(folder, first, JOB)
    assert run(folder, "-q") == 0
    (folder / "fine.png").unlink()
    listed(folder, first, JOB, JOB | {"seed": 1})
    assert run(folder, "-q") == 1                            # as before: the picture's job fails alone
    assert states(folder) == ["failed", "done", "done"]
    listed(folder, JOB, JOB | {"image": "fine.png", "method": "ddim"})
    assert run(folder, "-q") == 2 and "line 2: " in capsys.readouterr().err   # which was never done
    known = jobs.check
    monkeypatch.setattr(jobs, "check", lambda model, job: known(model, job) if job.sampling["seed"] else pytest.fail("it is done"))
    listed(folder, JOB, JOB | {"seed": 2})
    assert run(folder, "-q") == 0 and states(folder) == ["done", "done"]


# ------------------------------------------------------------------------------------------------------- other lists

def test_prompts_of_a_data_set_are_checked_as_others_are(tmp_path):
    pair = {"caption": "a cat", "edit": "make it a dog", "output": "a dog"}
    (tmp_path / "x").write_text("\n".join(json.dumps(pair | more) for more in ({}, {"caption": "a [cat:dog:0.4]"}, {"output": "a [dog|cat]"})))
    with pytest.raises(UsageError) as error:
        dataset.read(tmp_path / "x")
    assert all(f"line {i}: " in str(error.value) for i in (2, 3)) and "line 1: " not in str(error.value)


@pytest.mark.parametrize("mark, name", [("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("utf-16-le", "UTF-16-LE"), ("utf-32-be", "UTF-32-BE")])
def test_other_encodings_are_named(emoji, tmp_path, mark, name):
    (tmp_path / "x").write_bytes(json.dumps(JOB).encode(mark))
    with pytest.raises(UsageError, match=f"{name} text; save it as UTF-8"):
        jobs.read(tmp_path / "x", emoji)


@pytest.mark.parametrize("said", ["not JSON", "[1]", '{"a": 1}'])
def test_a_file_of_rows_that_is_none_is_not_advised_to_be_removed(tmp_path, capsys, said):
    (tmp_path / "ways.json").write_text(said)
    assert main(["eval", "pie", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--ways", str(tmp_path / "ways.json")]) == 2
    err = capsys.readouterr().err
    assert 'expected {"NAME": {settings of a job' in err and "remove" not in err and "another --out" not in err


def test_processes_that_torchrun_starts_are_not_counted_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "1")
    listed(tmp_path, JOB)
    assert run(tmp_path, "--engine", "torchrun", "--workers", "2") == 2 and "--workers: torchrun starts" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- of the command line, all at once

def refused(capsys, monkeypatch, *argv):
    """What is said of a command that is refused before anything is sampled."""
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("sampled"))
    assert main([str(each) for each in argv]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("over, given", [("self=0,0.5", ["--self", "0.9"]), ("cross=0,0.5", ["--cross", "0.9"]),
                                         ("weight:dog=0,1", ["--weight", "dog=5"]), ("layers=up,mid", ["--layers", "up"])])
def test_what_a_sweep_varies_is_not_given_too(tmp_path, capsys, monkeypatch, over, given):
    said = refused(capsys, monkeypatch, "sweep", "a cat on grass", "a dog on grass", "--over", over, *given, "-o", tmp_path)
    assert f"the sweep is over {over.partition('=')[0]}; leave it out" in said


@pytest.mark.parametrize("given, said", [(["--upscale-steps", 0], "--upscale-steps"), (["--upscale-level", 5000], "--upscale-level"),
                                         (["--upscale-cfg", "nan"], "--upscale-cfg"), (["--upscaler", "emoji"], "no super-resolution stage")])
def test_a_stage_that_cannot_be_is_refused_before_there_is_a_picture(tmp_path, capsys, monkeypatch, given, said):
    more = [] if "--upscaler" in given else ["--upscale"]
    assert said in refused(capsys, monkeypatch, "edit", "a cat on grass", "a dog on grass", *more, *given, "-o", tmp_path)


def test_seeds_of_a_sweep_are_exact(capsys):
    assert values.over(["seed=9007199254740993,1234567"]) == {"seed": [9007199254740993, 1234567]}
    assert [shown(seed) for seed in (9007199254740993, 1234567)] == ["9007199254740993", "1234567"]
    with pytest.raises(p2p.UsageError, match="whole numbers"):
        values.over(["seed=1.5"])


def test_captions_of_long_prompts_take_no_time():
    began = time.process_time()
    source, target = "a cat " * 5000, "a dog " * 5000
    assert difference(source, target).startswith("cat to dog") and sum(new for _, new in marked(source, target)) == 100
    assert time.process_time() - began < 5


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_a_blend_that_a_replay_adds_is_soft_as_any(tmp_path, capsys):
    assert main(["edit", "a cat on grass", "a dog on grass", "--steps", "1", "-q", "-o", str(tmp_path / "made")]) == 0
    (made,) = tmp_path.glob("made/*/edit.png")
    for k, (told, feather) in enumerate(((["--blend", "cat:dog"], 2), (["--scope", "cat"], 2), (["--blend", "cat:dog", "--blend-feather", "0"], 0))):
        assert main(["edit", "--from", str(made), *told, "-q", "-o", str(tmp_path / str(k))]) == 0
        (again,) = tmp_path.glob(f"{k}/*/edit.png")
        assert read_settings(again)["targets"][0]["local_blend"]["feather"] == feather, told

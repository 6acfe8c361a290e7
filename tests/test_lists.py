"""Lists as people's programs write them, and hostile ones: every fault is named at its line, and a job fails alone."""
import ast
import base64
import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from p2p import UsageError
from p2p.cli.parser import main
from p2p.image import from_base64
from p2p.lists import batch, dataset, jobs, work

pytestmark = pytest.mark.usefixtures("once")
ROOT = Path(__file__).parents[1]
JOB = {"source": "a cat on grass", "targets": ["a dog on grass"], "steps": 1, "cfg": 1}
PAIR = {"caption": "a cat", "edit": "make it a dog", "output": "a dog"}


def listed(folder, *rows):
    (folder / "jobs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "jobs.jsonl"


def run(folder, *more):
    return main(["batch", str(folder / "jobs.jsonl"), "--out", str(folder / "out"), *more])


def rows(folder):
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- reading

SAID = [json.dumps({**JOB, "source": f"a café cat {i}"}, ensure_ascii=False) for i in range(2)]
WRITTEN = {
    "plain": "\n".join(SAID), "windows": "\r\n".join(SAID) + "\r\n", "a mark": "\ufeff" + "\n".join(SAID),
    "joined, each with its mark": "\ufeff" + "\n\ufeff".join(SAID), "an array": "[" + ",".join(SAID) + "]",
    "an indented array": "\ufeff\n " + json.dumps(list(map(json.loads, SAID)), indent=2), "blank lines": f"\n\n{SAID[0]}\n \n{SAID[1]}\n\n",
}


@pytest.mark.parametrize("written", WRITTEN)
def test_lists_in_any_form_ask_for_the_same(emoji, tmp_path, written):
    (tmp_path / "x").write_bytes(WRITTEN[written].encode())
    found = jobs.read(tmp_path / "x", emoji)
    assert [j.source for j in found] == ["a café cat 0", "a café cat 1"]
    assert [j.id for j in found] == [jobs.parse(json.loads(s), 1, tmp_path, emoji).id for s in SAID]
    assert [j.line for j in found] == ([3, 5] if written == "blank lines" else [1, 2])
    pairs = [json.dumps({**PAIR, "caption": f"a café {i}"}, ensure_ascii=False) for i in range(2)]
    for job, pair in zip(SAID, pairs):
        (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes().replace(job.encode(), pair.encode()))
    if written != "an indented array":
        assert [(p.index, p.prompts.caption) for p in dataset.read(tmp_path / "x")] == [(0, "a café 0"), (1, "a café 1")]


def test_lines_end_at_line_feeds_alone(emoji, tmp_path):
    """U+2028 and its like are text to JSON, and line ends to str.splitlines."""
    source = "a cat\u2028on\u0085grass"
    (tmp_path / "x").write_text(json.dumps(JOB | {"source": source}, ensure_ascii=False), encoding="utf-8")
    assert [j.source for j in jobs.read(tmp_path / "x", emoji)] == [source]


@pytest.mark.parametrize("read", [lambda file, model: jobs.read(file, model), lambda file, _: dataset.read(file)], ids=["jobs", "pairs"])
@pytest.mark.parametrize("content, said", [
    ("\n\n{}\n\n{", ["line 3: ", "line 5: not JSON"]), ("[{}, 3]", ["item 1: ", "item 2: "]), ("[{},\n}", ["not a JSON array", "line 2"]),
    ('{"a": 1, "a": 2}', ["line 1: the key 'a' is there twice"]), ('{"a": 1e999}', ["line 1: 1e999 is no finite number"]),
    ('{"a": Infinity}', ["line 1: Infinity is no finite"]), ("\n" + "[" * 10**5, ["nested more than 64 deep"]),
    ("\n{\"a\": " + "[" * 80 + "]" * 80 + "}", ["line 2: nested more than 64 deep"]),
    ("\n\n", ["no "]), (b"{}\n{\"a\": \"caf\xe9\"}", ["line 2: not UTF-8 text (byte 0xe9)"]), ("{}".encode("utf-16"), ["UTF-16"]),
    ("x\n" * 150, ["line 1: not JSON", "line 100: ", "and 50 more"]), ("{\"a\": \"\x1b[31m\"}", ["line 1: not JSON"])])
def test_faults_of_a_list_are_named_at_their_lines(emoji, tmp_path, read, content, said):
    (tmp_path / "x").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        read(tmp_path / "x", emoji)
    assert all(part in str(error.value) for part in (*said, str(tmp_path / "x"))) and len(str(error.value)) < 20_000


def test_what_tables_write_is_meant(emoji, tmp_path):
    """pandas has a column a setting: NaN or null where a row has none, and floats where one value is missing."""
    def identity(**said):
        return jobs.parse(JOB | said, 1, tmp_path, emoji).id

    nan = json.loads("NaN", parse_constant=lambda _: None)
    assert identity() == identity(seed=nan, image=None, mode=None, skip=None, local_blend=None, equalizer={"cat": None}, tags=None, id=None)
    assert identity() == identity(guidance_scale=None) == identity(targets=[{"prompt": "a dog on grass", "mode": None}])
    assert identity(seed=3, height=64) == identity(seed=3.0, height=64.0) != identity()
    assert identity(cfg=1.0) == identity(cfg=1) and identity(equalizer={"dog": 2}) == identity(weight={"dog": 2.0})
    (tmp_path / "x").write_text('{"source": "a cat", "target": "a dog", "seed": NaN, "weight": {"dog": NaN}, "tags": {"split": NaN}}')
    assert jobs.read(tmp_path / "x", emoji)[0].sampling["seed"] == 0
    for seed in (0.5, 1e17, True, "1", 2**64):
        with pytest.raises(UsageError, match="seed: one number"):
            identity(seed=seed)


def test_a_mask_is_recorded_once_for_all_targets(emoji, tmp_path):
    """Not once a target; of two masks each."""
    blends = [{"words": ["cat", "dog"], "mask": mask(size)} for size in ((4, 4), (4, 4), (8, 8))]
    line = {"source": "a cat", "targets": [{"prompt": "a dog", "local_blend": blend} for blend in blends]}
    said = jobs.parse(line, 1, tmp_path, emoji).settings()
    assert len(said["masks"]) == 2 and [t["local_blend"]["mask"] for t in said["targets"]] == [0, 0, 1]
    assert from_base64(said["masks"][1]).size == (8, 8)
    other = jobs.parse({**line, "targets": line["targets"][:2] + line["targets"][:1]}, 1, tmp_path, emoji)
    assert other.id != jobs.parse(line, 1, tmp_path, emoji).id


@pytest.mark.slow
def test_every_text_file_is_opened_in_one_encoding():
    """Not in that of the machine: Path.read_text and its like take it unless they are told."""
    def named(call):
        return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")

    def binary(call):
        words = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
        return any(isinstance(w, str) and "b" in w and len(w) <= 3 for w in words)

    left, seen = [], 0
    for file in [f for folder in ("p2p", "models", "weights", "benchmarks") for f in (ROOT / folder).rglob("*.py")]:
        for call in (n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
            owner = getattr(getattr(call.func, "value", None), "id", "")
            method = isinstance(call.func, ast.Attribute)   # `p2p.weights.untrusted.read_text`, a function, has the one encoding
            if (method and named(call) in ("read_text", "write_text")) or (
                    named(call) == "open" and owner not in ("Image", "tarfile", "os")):
                seen += 1
                if not binary(call) and not {k.value.value for k in call.keywords if k.arg == "encoding"} & {"utf-8", "utf-8-sig", "ascii"}:
                    left.append(f"{file.name}:{call.lineno}")
    assert not left and seen > 20


# ------------------------------------------------------------------------------------------------------------ hostile lines

def mask(size=(4, 4)):
    buffer = io.BytesIO()
    Image.new("L", size, 255).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


WRONG = [   # one setting each, of a wrong kind or beyond its range
    *({"steps": v} for v in (0, -1, 2.5, "10", True, [4], {}, 10**9)), *({"seed": v} for v in (1.5, "0", [1], -2**70, 2**70)),
    *({"guidance_scale": v} for v in ("7.5", True, [1], {}, 10**400)), *({"eta": v} for v in (-1, 2, "0", [0])),
    *({"height": v} for v in (0, -64, 64.5, "64", [64])), *({"width": v} for v in (0, {}, True)),
    *({"image": v} for v in (3, [], {}, True, "", "a\0b")), *({"image": "a.png", "skip": v} for v in (0.5, -1, "3", [])),
    *({"image": "a.png", "method": v} for v in ("nonsense", ["ddim"], 3, {})), *({"image": "a.png", "inner_steps": v} for v in (0, 2.5, "5")),
    *({"image": "a.png", "inversion_guidance": v} for v in ("1", [1], True)), {"skip": 3}, {"method": "ddim"},
    *({"editor": v} for v in (["masactrl"], 3, "nonsense", {}, {"name": ["masactrl"]}, {"name": "masactrl", "start": "x"},
                              {"name": "masactrl", "nonsense": 1}, True)),
    *({"proximal": v} for v in ("l0", ["l0"], ["l9", 0.5], ["l0", 2], ["l0", "x"], [["l0"], 0.5], 3, {"l0": 1})),
    *({"mode": v} for v in ("nonsense", ["replace"], 3, True)), *({"aligner": v} for v in ("nonsense", ["exact"], {})),
    *({"cross_replace_steps": v} for v in (2, "x", [0.1], [0.8, 0.2], [0, 1, 1], {"dog": "x"}, {"": 0.5}, True, [True, True], ["0", "1"])),
    *({"self_replace_steps": v} for v in (-0.1, {}, [0.5, "x"], {"dog": 0.5}, "0.5")), *({"self_max_tokens": v} for v in (-1, 2.5, "x", [])),
    *({"equalizer": v} for v in (2, ["dog"], {"dog": "2"}, {"dog": True}, {"dog": 1e31}, {"": 2}, "dog")), *({"renormalise": v} for v in (1, "yes", [])),
    *({"swap": v} for v in ("cat", ["cat", "dog"], {"cat": 3}, {"cat": ["dog"]}, {"cat": ""})), *({"scope": v} for v in (3, [], [3], "", {}, [["cat"]])),
    *({"local_blend": v} for v in ("cat", ["cat", "dog"], 3, {}, {"words": "cat"}, {"words": ["cat"]}, {"words": ["cat", 3]},
                                   {"words": ["cat", "dog"], "level": [4]}, {"words": ["cat", "dog"], "level": 0},
                                   {"words": ["cat", "dog"], "level": {}}, {"words": ["cat", "dog"], "threshold": 1},
                                   {"words": ["cat", "dog"], "threshold": [0.1, 0.2, 0.3]}, {"words": ["cat", "dog"], "start": "x"},
                                   {"words": ["cat", "dog"], "nonsense": 1}, {"mask": "no picture"}, {"mask": 3}, {"mask": mask()[:-30]},
                                   {"mask": base64.b64encode(b"not a picture").decode()}, {"mask": ["x"]}, {"substruct": ["cat", "dog"]})),
    *({"source": v} for v in (3, [], {}, True, "\ud800")), *({"targets": v} for v in ([], 3, [3], [[]], {}, {"mode": "replace"}, [{"prompt": 3}],
                                                                                   [{"prompt": "a dog", "seed": 1}], [{"prompt": "a dog", "mode": 3}])),
    *({"id": v} for v in ([], {}, 1.5, True)), {"nonsense": 1}, {"nonsense" * 99: 1}, {"\x1b[2J": 1},
    {"cfg": 1, "guidance_scale": 2}, {"target": "a dog", "targets": ["a dog"]}, {"cross": 0.1, "cross_replace_steps": 0.1},
    {"picture": "a.png", "image": "a.png"}, {"weight": {"dog": 2}, "equalizer": {"dog": 2}}, {"self": 0.1, "self_replace_steps": 0.1},
    {"targets": [{"prompt": "a dog", "cross": 0.1, "cross_replace_steps": 0.1}]},
]
BASE = {"source": "a cat on grass", "targets": ["a dog on grass"]}


@pytest.mark.slow
def test_what_cannot_be_meant_is_named_before_anything_runs(emoji, tmp_path):
    for wrong in WRONG:
        listed(tmp_path, BASE, BASE | wrong)
        with pytest.raises(UsageError) as error:
            jobs.read(tmp_path / "jobs.jsonl", emoji)
        said = str(error.value).replace("\n", " ")
        assert "line 2: " in said and "line 1: " not in said and len(said) < 2000 and said.isprintable(), (wrong, said)
    listed(tmp_path, *(BASE | wrong for wrong in WRONG))
    with pytest.raises(UsageError) as error:
        jobs.read(tmp_path / "jobs.jsonl", emoji)
    assert all(f"line {i}: " in str(error.value) for i in range(1, 101)) and f"and {len(WRONG) - 100} more" in str(error.value)


def test_every_setting_of_an_edit_has_its_check():
    from p2p.lists.fields import FIELDS
    assert {*jobs.EDITING, *jobs.SAMPLING, *jobs.INVERTING, *jobs.OTHERS, "prompt", "source", "image"} <= set(FIELDS)


def test_what_can_be_meant_is_read(emoji, tmp_path):
    """The counterpart of the refusals: the checks let through what `edit` takes."""
    fine = {"steps": 5.0, "seed": 2**63, "eta": 0.5, "cross": {"default_": [0, 0.5], "dog": 1}, "self": [0.1, 0.4], "scope": ["cat"],
            "self_max_tokens": 256, "weight": {"dog": -2}, "swap": {"cat": "dog"}, "renormalise": False, "mode": "replace",
            "local_blend": {"words": [["cat"], "dog"], "substruct": ["grass", []], "threshold": [0.2, 0.3], "start": 0, "level": 4.0, "mask": mask(),
                            "keep": "sampled", "middle": True}, "windows_over": "schedule", "negative_prompt": "a bird",
            "aligner": "official", "proximal": ["l0", 0.7], "editor": {"name": "masactrl", "start": 0.1}, "id": "mine", "tags": [1, {"a": None}],
            "image": "a.png", "method": "edit-friendly", "skip": 1.0, "inversion_cfg": 1, "final_alpha": 1, "height": 64, "width": 64}
    job = jobs.parse(BASE | fine, 1, tmp_path, emoji)
    for name in ("eta", "seed"):
        with pytest.raises(UsageError, match=f"{name}: ddim inversion does not read it"):
            jobs.parse(BASE | {"image": "a.png", "method": "ddim", name: fine[name]}, 1, tmp_path, emoji)
    assert jobs.parse(BASE | {"image": "a.png", "method": "ddim"}, 1, tmp_path, emoji, {"seed": 3}).inverting["method"] == "ddim"
    assert job.targets[0].local_blend.level == 4 and job.targets[0].cross_replace_steps == {"default_": (0, 0.5), "dog": 1}
    assert job.sampling["steps"] == 5 and job.inverting["skip"] == 1 and job.tags == [1, {"a": None}] and job.user_id == "mine"
    assert job.targets[0].scope == ("cat",) and json.dumps(job.settings())


def test_pictures_of_a_list_are_fitted_as_those_of_the_command_line(emoji, tmp_path):
    """One vocabulary: what `invert` takes, the list's default too, and the published runs' square."""
    Image.radial_gradient("L").convert("RGB").resize((160, 90)).save(tmp_path / "wide.png")
    line = BASE | {"image": "wide.png", "method": "ddim", "steps": 1}
    found = {fit: work._ready(emoji, jobs.parse(line | {"fit": fit}, 1, tmp_path, emoji)) for fit in ("crop", "pad", "own", "square")}
    sizes = {fit: ready.start.size for fit, ready in found.items()}
    assert sizes == {"crop": (64, 64), "pad": (64, 64), "own": (48, 86), "square": (64, 64)}   # as many pixels, in multiples of 2
    first, *others = (ready.start.x[0] for fit, ready in found.items() if fit != "own")
    assert not any(torch.equal(first, x) for x in others)
    assert jobs.parse(line, 1, tmp_path, emoji, {"fit": "pad"}).inverting["fit"] == "pad"
    with pytest.raises(UsageError, match='height, width: fit "own"'):
        jobs.parse(line | {"fit": "own", "height": 64}, 1, tmp_path, emoji)


# ------------------------------------------------------------------------------------------------------- failures of a job

def test_a_job_fails_alone(tmp_path, capsys):
    """What only shows when it runs: the others are done, and the list is not tried again."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("F", (64, 64), 1e30).save(tmp_path / "scale.tiff")
    failing = {"broken.png": {"image": "broken.png"}, "text.png: not a picture": {"image": "text.png", "method": "ddim"},
               "mode F holds": {"image": "scale.tiff", "method": "ddim"}}
    listed(tmp_path, JOB, *(JOB | f for f in failing.values()), JOB | {"seed": 7})
    assert run(tmp_path) == 1
    said = capsys.readouterr().err
    assert f"2 done, {len(failing)} failed, 0 open" in said
    for row, why in zip(rows(tmp_path)[1:], failing):
        assert row["state"] == "failed" and why in row["error"] and row["images"] == []
    assert run(tmp_path) == 1 and "0 to do" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("raised", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), KeyError("x"),
                                    RecursionError("deep"), torch.OutOfMemoryError("CUDA out of memory"), OSError(5, "Input/output error")])
def test_whatever_is_raised_in_a_job_is_its_failure(tmp_path, capsys, monkeypatch, raised):
    real = work.prepared

    def prepared(model, source, *rest, **more):
        if source == "a bad cat":
            raise raised
        return real(model, source, *rest, **more)

    monkeypatch.setattr(work, "prepared", lambda model, **how: prepared(model, how.pop("source"), how.pop("targets"), **how))
    listed(tmp_path, JOB, JOB | {"source": "a bad cat"}, JOB | {"seed": 2})
    assert run(tmp_path, "-q") == 1
    assert [r["state"] for r in rows(tmp_path)] == ["done", "failed", "done"]
    bad = rows(tmp_path)[1]
    assert type(raised).__name__ in bad["error"] and (str(raised) or "MemoryError") in bad["error"]
    assert "prepared" in json.loads((tmp_path / "out" / "failed" / f"{bad['job']}.json").read_text())["traceback"]


def test_one_job_that_breaks_a_batch_does_not_break_the_others(tmp_path, monkeypatch, capsys):
    def together(*_):
        raise MemoryError

    monkeypatch.setattr(work, "run_together", together)
    listed(tmp_path, *(JOB | {"seed": i} for i in range(3)))
    assert run(tmp_path, "-q") == 0 and [r["state"] for r in rows(tmp_path)] == ["done"] * 3


def test_a_lost_device_ends_the_run(tmp_path, monkeypatch, capsys):
    def lost(*_, **__):
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr(work, "sample", lost)
    monkeypatch.setattr(work, "_probe", lost)
    listed(tmp_path, JOB)
    assert run(tmp_path, "-q") == 2 and "no longer answers (CUDA error: unspecified launch failure)" in capsys.readouterr().err
    assert [r["state"] for r in rows(tmp_path)] == ["open"]


@pytest.mark.slow
@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_run_that_is_stopped_says_how_far_it_came(tmp_path, monkeypatch, capsys, attended, stop, code):
    real, count = jobs.save_png, []

    def stopped(path, *rest):
        count.append(path)
        if len(count) == 3:   # within the second job's files
            os.kill(os.getpid(), stop)
        real(path, *rest)

    monkeypatch.setattr(jobs, "save_png", stopped)
    listed(tmp_path, *(JOB | {"seed": i} for i in range(3)))
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)]
    assert run(tmp_path) == code
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)] == before
    said = capsys.readouterr().err
    assert "1 done, 0 failed, 2 open" in said and "the same command goes on" in said and "interrupted" in said
    assert [r["state"] for r in rows(tmp_path)] == ["done", "open", "open"] and not list((tmp_path / "out").rglob(".*"))
    assert run(tmp_path, "-q") == 0


def test_a_folder_without_its_job_does_not_block_it(tmp_path, capsys):
    listed(tmp_path, JOB)
    assert run(tmp_path, "-q") == 0
    folder = tmp_path / "out" / rows(tmp_path)[0]["job"]
    for damage in (lambda: (folder / "job.json").unlink(), lambda: (folder / "job.json").write_bytes(b"")):
        damage()
        assert run(tmp_path, "-q") == 0 and json.loads((folder / "job.json").read_text())["notes"] is not None
    kept = [p for p in (tmp_path / "out").iterdir() if ".incomplete-" in p.name]
    assert len(kept) == 2 and all((p / "edit.png").exists() for p in kept)         # nothing of what stood there is lost


# ----------------------------------------------------------------------------------------------------------- results.jsonl

def test_a_row_says_all_that_a_table_needs(tmp_path, capsys):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "fine.png")
    (tmp_path / "broken.png").write_text("no picture")
    listed(tmp_path, JOB | {"id": "first", "tags": {"split": "a"}}, JOB | {"id": 7.0, "seed": 3.0, "targets": ["a dog", "a bird"]}, JOB,
           JOB | {"image": "broken.png", "tags": ["x"]}, JOB | {"image": "fine.png", "method": "noise"})
    assert run(tmp_path, "-q") == 1
    first, second, third, failed, picture = found = rows(tmp_path)
    assert [r["id"] for r in found] == ["first", 7, third["job"], failed["job"], picture["job"]] and [r["line"] for r in found] == [1, 2, 3, 4, 5]
    assert first["job"] == third["job"] and first["tags"] == {"split": "a"} and third["tags"] is None and failed["tags"] == ["x"]
    assert all(r["source"] == JOB["source"] for r in found) and second["targets"] == ["a dog", "a bird"] and [second["seed"], first["seed"]] == [3, 0]
    assert [Path(p).name for p in second["images"]] == ["source.png", "edit-1.png", "edit-2.png"]
    for r in (first, second, third, picture):
        assert r["state"] == "done" and r["error"] is None and r["seconds"] > 0
        assert all(Image.open(tmp_path / "out" / p).size == (64, 64) for p in r["images"])
    assert any("mode" in note for note in first["notes"]) and "broken.png" in failed["error"] and not failed["images"]
    assert {tuple(r) for r in found} == {tuple(first)}                               # the same columns in every row


def test_lines_that_ask_for_the_same_are_rows_of_one_computation(tmp_path, capsys, monkeypatch):
    done = []
    real = jobs.Store.finish
    monkeypatch.setattr(jobs.Store, "finish", lambda self, job, *rest: (done.append(job), real(self, job, *rest)))
    listed(tmp_path, JOB, JOB | {"id": "again"}, JOB | {"seed": 1}, JOB)
    assert run(tmp_path) == 0 and "4 done, 0 failed, 0 open" in capsys.readouterr().err
    assert len(done) == 2 and [r["id"] for r in rows(tmp_path)][1] == "again"
    assert len({(r["job"], *r["images"]) for r in rows(tmp_path)}) == 2 and len(rows(tmp_path)) == 4


def test_settings_of_the_whole_list_stand_on_the_command_line(emoji, tmp_path, capsys):
    def sampled(*said, defaults):
        return jobs.read(listed(tmp_path, *said), emoji, defaults)

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    first, second, third = sampled(BASE, BASE | {"seed": 4}, BASE | {"image": "a.png", "steps": 9},
                                   defaults={"steps": 3, "seed": 8, "method": "ddim", "cross_replace_steps": 0.5})
    assert [j.sampling.get("seed") for j in (first, second, third)] == [8, 4, None] and [j.sampling["steps"] for j in (first, third)] == [3, 9]
    assert third.inverting["method"] == "ddim" and not first.inverting and first.targets[0].cross_replace_steps == 0.5
    assert first.id == jobs.parse(BASE | {"steps": 3, "seed": 8, "cross": 0.5}, 1, tmp_path, emoji).id
    with pytest.raises(UsageError, match="steps: one number"):
        sampled(BASE, defaults={"steps": 0})
    with pytest.raises(UsageError, match="method: of pictures"):
        sampled(BASE, defaults={"method": "ddim"})
    listed(tmp_path, BASE, BASE | {"seed": 5, "steps": 2})
    assert run(tmp_path, "--steps", "1", "--cfg", "1", "--seed", "3", "--cross", "0.5", "--weight", "dog=2", "--blend", "cat:dog", "-q") == 0
    assert [r["seed"] for r in rows(tmp_path)] == [3, 5]
    said = [json.loads((tmp_path / "out" / r["job"] / "job.json").read_text()) for r in rows(tmp_path)]
    assert [s["steps"] for s in said] == [1, 2] and all(s["targets"][0]["equalizer"] == {"dog": 2} for s in said)
    assert all(s["targets"][0]["local_blend"]["words"] == [["cat"], ["dog"]] for s in said)


def test_jobs_of_any_origin_are_run(emoji, tmp_path):
    """`run_jobs` needs no file: what another list (a benchmark's) makes of its items."""
    made = [jobs.parse(JOB | {"seed": i}, i + 1, tmp_path, emoji) for i in range(2)]
    what = work.Batch(None, tmp_path / "out", {"source": "emoji"}, "cpu", quiet=True)
    assert batch.run_jobs(emoji, made, what) == {"done": 2, "failed": 0, "open": 0} and len(rows(tmp_path)) == 2


def test_defaults_give_way_to_the_line_that_says_something_else(emoji, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    pictured = JOB | {"image": "a.png"}
    first, second = jobs.read(listed(tmp_path, JOB, pictured), emoji, {"sampler": "dpm++"})
    assert first.others["sampler"] == "dpm++" and "sampler" not in second.others   # inverted by DDIM, and so sampled
    assert not first.notes and second.row()["notes"] == ["sampler, given for all lines: of generated sources: a picture is sampled as it was inverted"]
    with pytest.raises(UsageError, match="sampler: no job of this list reads it"):
        jobs.read(listed(tmp_path, pictured), emoji, {"sampler": "dpm++"})
    kept, = jobs.read(listed(tmp_path, pictured), emoji, {"sampler": "ddim"})   # as it is sampled anyway
    assert kept.others["sampler"] == "ddim"
    drawn, = jobs.read(listed(tmp_path, JOB | {"sampler": "dpm++"}), emoji, {"eta": 0.5, "timestep_spacing": "trailing"})
    assert "timestep_spacing" not in drawn.others and drawn.sampling["eta"] == 0
    same, = jobs.read(listed(tmp_path, JOB | {"sampler": "ddim"}), emoji, {"eta": 0.5, "timestep_spacing": "trailing"})
    assert same.others["timestep_spacing"] == "trailing" and same.sampling["eta"] == 0.5   # the model's own sampler
    own_times = {k: v for k, v in JOB.items() if k != "steps"} | {"timesteps": [900, 500, 100]}
    timed, = jobs.read(listed(tmp_path, own_times), emoji, {"steps": 20})
    assert timed.others["timesteps"] == [900, 500, 100] and timed.sampling["steps"] == 3
    counted, = jobs.read(listed(tmp_path, JOB), emoji, {"timesteps": [900, 500]})
    assert counted.sampling["steps"] == 1 and "timesteps" not in counted.others
    own, = jobs.read(listed(tmp_path, pictured | {"fit": "own"}), emoji, {"height": 32, "width": 32})
    assert own.inversion(emoji)["height"] is None
    sized, = jobs.read(listed(tmp_path, pictured | {"height": 32}), emoji, {"fit": "own"})
    assert sized.inversion(emoji)["height"] == 32 and sized.inverting["fit"] == "crop"


def test_a_picture_that_is_exchanged_while_the_list_runs_is_no_result_of_the_first(emoji, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    job, = jobs.read(listed(tmp_path, JOB | {"image": "a.png", "method": "noise"}), emoji)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
    (_, failure, _), = work.compute(emoji, [job])
    assert "not the picture that it was when the list was read" in failure.error


def test_workers_run_the_model_that_the_list_was_read_with(emoji, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(batch, "in_processes", lambda what, todo, workers, gpus: (each for each in seen.append((what, workers)) or ()))
    made = [jobs.parse(JOB | {"seed": i}, i + 1, tmp_path, emoji) for i in range(2)]
    asked = work.Batch(None, tmp_path / "out", {"source": "emoji"}, "cpu", together=1, quiet=True)
    batch.run_jobs(emoji, made, asked, workers=8)
    (what, workers), = seen
    assert workers == 2 and what.loading["dtype"] == emoji.dtype   # on their devices it might be another
    assert work.loaded(what, "cpu").identity() == emoji.identity()
    with pytest.raises(RuntimeError, match="another dtype"):
        work.loaded(replace(what, identity=emoji.identity() | {"dtype": "float16"}), "cpu")


@pytest.mark.parametrize("swap", [{"red cat": "blue dog", "grass": "dog"}, {"grass": "dog", "red cat": "blue dog"}])
def test_two_swaps_into_one_word_are_refused_in_any_order(emoji, tmp_path, swap):
    job = {"source": "a red cat on grass", "targets": {"prompt": "a blue dog on big grass", "swap": swap}}
    with pytest.raises(UsageError, match="name one"):
        jobs.read(listed(tmp_path, job), emoji)

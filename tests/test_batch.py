"""A list of jobs ends in the same files however often it was killed, in whatever engine, and says what failed."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from p2p.cli.parser import main
from p2p.lists import jobs

pytestmark = pytest.mark.usefixtures("once")
WORDS = ["cat", "dog", "house", "car", "boat", "tree", "cake", "lemon"]


def listed(file, n, **extra):
    """n different jobs, every third with two targets."""
    rows = [{"source": f"a {WORDS[i % 8]} on grass", "targets": [f"a {WORDS[(i + k) % 8]} on grass" for k in range(1, 2 + (i % 3 == 0))],
             "seed": i, "steps": 2} | extra for i in range(n)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def found(out):
    """Every file of every result, pictures as pixels, and texts but for the seconds that a job took."""
    return {str(p.relative_to(out)): np.asarray(Image.open(p)).tobytes() if p.suffix == ".png"
            else re.sub(r'"seconds": [\d.]+', '"seconds": ?', p.read_text()) for p in sorted(out.rglob("*")) if p.is_file()}


ENGINES = {
    "local": ["-m", "p2p", "batch"], "two processes": ["-m", "p2p", "batch", "--workers", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "p2p", "batch", "--engine", "torchrun"],
    "ray": ["-m", "p2p", "batch", "--engine", "ray"],
}


N, SMALL = 30, dict(guidance_scale=1, height=32, width=32)   # starting a process takes longer than such a job
ENV = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


def batch(engine, file):
    return [sys.executable, *ENGINES[engine], str(file), "--quiet", "--device", "cpu", "--together", "2", "--out"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What N jobs end in, by one process that is not disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    file = listed(folder / "jobs.jsonl", N, **SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)   # as ENV has it: several share a sum out in another order
    try:
        assert main([*batch("local", file)[3:], str(folder / "out")]) == 0
    finally:
        torch.set_num_threads(threads)
    return found(folder / "out")


KILLS = {"local": 3}   # the other engines share its jobs out otherwise, and go on alike: once each


def killed(folder, engine):
    """Starts, kills, and at last lets finish.  -> the output folder, and its job.json with their times before the last start"""
    rng, out = random.Random(engine), folder / "out"
    command = batch(engine, listed(folder / "jobs.jsonl", N, **SMALL))
    done = lambda: len(list(out.glob("[!.]*/job.json")))  # noqa: E731
    kills = tries = 0
    while kills < KILLS.get(engine, 1):
        limit = done() + rng.randint(1, 4)                # of two workers up to four more are done when it is seen
        run = subprocess.Popen([*command, str(out)], env=ENV, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        while done() < limit and run.poll() is None:
            time.sleep(0.01)
        if run.poll() is not None and tries < 3:   # this process slept, and it had all its time
            tries, kills = tries + 1, 0
            shutil.rmtree(out)
            continue
        kills += 1
        assert run.poll() is None, "it ended before it was killed"
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        for job in out.glob("[!.]*/job.json"):           # what is there is whole
            assert all(Image.open(p).size == (32, 32) for p in job.parent.glob("*.png"))
    before = {p: p.stat().st_mtime_ns for p in out.glob("[!.]*/job.json")}
    assert subprocess.run([*command, str(out)], env=ENV, capture_output=True).returncode == 0
    return out, before


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Three at a time: most of it is one thread that starts processes. The longest first."""
    with ThreadPoolExecutor(3) as pool:
        yield {e: pool.submit(killed, tmp_path_factory.mktemp("killed"), e) for e in reversed(ENGINES)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_it_ends_in_the_same_files(engines, whole, engine):
    out, before = engines[engine].result()
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()) and found(out) == whole   # none done twice
    assert [json.loads(line)["line"] for line in (out / "results.jsonl").read_text().splitlines()] == list(range(1, N + 1))


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_batch(tmp_path, capsys):
    file = listed(tmp_path / "jobs.jsonl", 5)
    for together in (1, 3):
        assert main(["batch", str(file), "--out", str(tmp_path / str(together)), "--together", str(together), "-q"]) == 0
    one, three = found(tmp_path / "1"), found(tmp_path / "3")
    assert one.keys() == three.keys()
    for name in (k for k in one if k.endswith(".png")):
        difference = np.frombuffer(one[name], np.uint8).astype(int) - np.frombuffer(three[name], np.uint8)
        assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_failures_are_rows_and_retried_alone(tmp_path, capsys):
    file = listed(tmp_path / "jobs.jsonl", 3)
    bad = {"source": "a cat on grass", "targets": "a dog on grass", "steps": 2, "method": "ddim"}
    for name in ("broken.png", "photo.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n not")
    with file.open("a") as f:
        f.write(json.dumps(bad | {"image": "broken.png"}) + "\n" + json.dumps(bad | {"image": "photo.png", "seed": None, "steps": 1}) + "\n")
    command = ["batch", str(file), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert re.search("line 4 failed: .*broken.png: not a picture", said) and "photo.png: not a picture" in said and "3 done, 2 failed, 0 open" in said
    assert main(command) == 1 and "5 jobs, 0 to do" in capsys.readouterr().err          # failures are not tried again
    assert main([*command, "--retry-failed"]) == 1 and "5 jobs, 2 to do" in capsys.readouterr().err
    Image.new("RGB", (80, 70), "green").save(tmp_path / "photo.png")                      # another picture is another job
    assert main(command) == 1 and "4 done, 1 failed" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [r["state"] for r in rows] == ["done", "done", "done", "failed", "done"] and "broken.png" in rows[3]["error"]


def test_a_list_that_cannot_be_meant_is_refused_whole(tmp_path, capsys):
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"source": "a cat", "targets": ["a dog"]}\n{"source": "a cat"}\n{"source": "a cat", "targets": "b", "stepz": 3}\nnot\n'
                    '{"source": "a cat", "targets": "b", "steps": [4]}\n')
    assert main(["batch", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "line 2: a job needs source" in said and "line 3: stepz" in said and "line 4" in said and "line 5: steps: one number" in said and not (tmp_path / "out").exists()


def test_identity_is_what_is_asked_for(emoji, tmp_path):
    """Defaults written out, other names for settings and the place in the list do not matter; every value does."""
    def identity(**said):
        return jobs.parse({"source": "a cat", "targets": ["a dog"]} | said, 1, tmp_path, emoji).id

    assert identity() == identity(steps=50, seed=0, guidance_scale=3.0) == identity(cfg=3.0, targets="a dog")
    others = [identity(seed=1), identity(cfg=2.0), identity(cross=0.5), identity(targets=["a bird"]), identity(source="a car"),
              identity(targets=["a dog", "a dog"])]
    (tmp_path / "a.png").write_bytes(b"one")
    others.append(identity(image="a.png"))
    (tmp_path / "a.png").write_bytes(b"two")
    others.append(identity(image="a.png"))
    assert len({identity(), *others}) == 1 + len(others)


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, capsys, monkeypatch):
    file, out = listed(tmp_path / "jobs.jsonl", 6), tmp_path / "out"
    real, count = jobs.save_png, []

    def full(path, *rest):
        count.append(path)
        if len(count) == 5:
            raise OSError(28, "No space left on device")
        real(path, *rest)

    monkeypatch.setattr(jobs, "save_png", full)
    assert main(["batch", str(file), "--out", str(out), "--together", "1"]) == 2
    assert "No space left" in capsys.readouterr().err and not list(out.glob(".p2p-*"))
    monkeypatch.setattr(jobs, "save_png", real)
    assert main(["batch", str(file), "--out", str(out), "--together", "1"]) == 0 and "6 done" in capsys.readouterr().err

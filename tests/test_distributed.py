"""Ranks of torchrun: a job that fails ends no other rank's work, and a rank that dies leaves nothing half done."""
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_batch import ENV, batch, listed
from test_stopped import children, ended

from p2p.cli.parser import main


def rows(out):
    return [json.loads(line)["state"] for line in (out / "results.jsonl").read_text().splitlines()]


def started(folder, n, others=None, **extra):
    file = listed(folder / "jobs.jsonl", n, guidance_scale=1)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(lines[0]) | extra), *(json.dumps(json.loads(line) | (others or {})) for line in lines[1:])]) + "\n")
    return subprocess.Popen([*batch("torchrun", file), str(folder / "out"), "--together", "1"], env=ENV, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_job_that_fails_ends_no_other_ranks_work(tmp_path):
    """Its rank has nothing else to do, and ends long before the other."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not")
    run = started(tmp_path, 2, image="broken.png", seed=None, method="ddim", others={"steps": 60})
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1 and "broken.png: not a picture" in said
    assert rows(tmp_path / "out") == ["failed", "done"] and not list((tmp_path / "out").rglob(".p2p-*"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["a rank is killed", "Ctrl-C"])
def test_ranks_end_together_and_another_run_goes_on(tmp_path, stop):
    out = tmp_path / "out"
    run = started(tmp_path, 200)
    while not list(out.glob("[!.]*/job.json")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    ranks = [pid for pid in children(run.pid) if b"p2p" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    if stop == signal.SIGKILL:
        os.kill(ranks[0], stop)
    else:
        os.killpg(run.pid, stop)   # as a terminal does it: to all of them
    run.communicate(timeout=120)
    assert run.returncode != 0 and ended(ranks)
    done = len(list(out.glob("[!.]*/job.json")))
    assert 0 < done < 200
    if stop == signal.SIGINT:
        assert not list(out.rglob(".p2p-*")) and rows(out).count("done") > 0
    short = tmp_path / "short.jsonl"
    short.write_text("".join((tmp_path / "jobs.jsonl").read_text().splitlines(keepends=True)[:3]))
    assert main(["batch", str(short), "--out", str(out), "--device", "cpu", "-q"]) == 0 and rows(out) == ["done"] * 3
    assert not list(out.rglob(".p2p-*"))   # what the killed one left is swept

"""Stopped, killed, without room or without a reader: nothing half done stays, and nothing that was there is lost."""
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import SafetensorError
from test_batch import ENV, listed

from p2p import UsageError
from p2p.cli.output import Output
from p2p.cli.parser import main
from p2p.lists import dataset
from p2p.lists.lines import write
from p2p.weights import aside

pytestmark = pytest.mark.usefixtures("attended", "once")
FULL = OSError(28, "No space left on device")
PROMPTS = [{"caption": "a cat on grass", "edit": "make it a dog", "output": "a dog on grass"},
           {"caption": "a red car", "edit": "make it blue", "output": "a blue car"}]


# --------------------------------------------------------------------------------------------------------------- made aside

def test_what_is_made_aside_appears_whole_or_not_at_all(tmp_path):
    with aside.replacing(tmp_path / "a.txt") as made:
        made.write_text("one")
    with pytest.raises(KeyError), aside.replacing(tmp_path / "a.txt") as made:
        made.write_text("tw")
        assert (tmp_path / "a.txt").read_text() == "one"
        raise KeyError
    with pytest.raises(KeyboardInterrupt), aside.appearing(tmp_path / "f", "end") as made:
        (made / "half").write_text("x")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "one"


def test_a_finished_folder_is_not_replaced(tmp_path):
    for text in ("first", "second"):
        try:
            with aside.appearing(tmp_path / "f", "end") as made:
                (made / "end").write_text(text)
        except OSError:
            assert text == "second"
    assert (tmp_path / "f" / "end").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_what_dead_owners_left_is_swept_and_nothing_else(tmp_path):
    """Never what a living process, another machine, or another container under this machine's name is writing."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, own, born = aside._host(), os.getpid(), aside._born(os.getpid())
    living = subprocess.Popen(["sleep", "60"])
    zombie = subprocess.Popen(["true"])
    deadline = time.monotonic() + 20
    while aside._born(zombie.pid) != "-" and time.monotonic() < deadline:
        time.sleep(0.01)
    gone = [f".p2p-{host}-{ended.pid}-5-abc", f".p2p-{host}-{own}-{int(born) - 1}-abc", f".p2p-{host}-{zombie.pid}-1-abc"]
    kept = [f".p2p-{host}-{own}-{born}-abc", f".p2p-{host}-{living.pid}-{aside._born(living.pid)}-abc", f".p2p-other-{ended.pid}-5-abc",
            f".p2p-{host}9-{ended.pid}-5-abc", ".p2p-mine", "0001-run", f".p2p-{host}-1-{aside._born(1) or 0}-abc"]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    aside.sweep(tmp_path)
    living.kill(), living.wait(), zombie.wait()
    assert {p.name for p in tmp_path.iterdir()} == set(kept)
    aside.sweep(tmp_path / "absent")


@pytest.mark.slow
def test_a_killed_run_is_cleared_away_by_the_next(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from p2p.cli.output import Output
out = Output(Path({str(tmp_path / 'out')!r}), "run")
out.add("half.txt", lambda path: (path.write_text("half"), os.kill(os.getpid(), signal.SIGKILL)))
out.write()
"""
    assert subprocess.run([sys.executable, "-c", code], env=ENV).returncode == -9 and list((tmp_path / "out").glob(".p2p-*"))
    Output(tmp_path / "out", "next")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("stop, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_in_the_midst_of_writing_leaves_nothing(tmp_path, monkeypatch, capsys, stop, code):
    monkeypatch.setattr("p2p.cli.output.save_png", lambda path, *_: (path.write_text("half"), os.kill(os.getpid(), stop)))
    assert main(["generate", "a cat", "--steps", "1", "--out", str(tmp_path / "out"), "-q"]) == code
    assert not list((tmp_path / "out").iterdir()) and "interrupted" in capsys.readouterr().err


def test_signals_that_are_ignored_stay_so(tmp_path, monkeypatch, capsys):
    """nohup p2p ...: it goes on when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("p2p.cli.output.save_png", lambda path, *_: (path.write_text("x"), os.kill(os.getpid(), signal.SIGHUP)))
        assert main(["generate", "a cat", "--steps", "1", "--out", str(tmp_path / "out"), "-q"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --------------------------------------------------------------------------------------------------------------- full disks

@pytest.mark.parametrize("error", [FULL, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_whatever_a_writer_raises_for_want_of_room_names_out(tmp_path, monkeypatch, capsys, error):
    def full(tensors, file, *_):
        open(file, "w").close()
        raise error

    monkeypatch.setattr("p2p.weights.sealed.save_file", full)
    Image.new("RGB", (64, 64), "green").save(tmp_path / "photo.png")
    assert main(["invert", str(tmp_path / "photo.png"), "a cat", "--method", "noise", "--steps", "1", "--out", str(tmp_path / "out"), "-q"]) == 2
    said = capsys.readouterr().err
    assert f"--out {tmp_path / 'out'}: cannot be written" in said and "No space left on device" in said
    assert not list((tmp_path / "out").iterdir())


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(UsageError, match="No space left"):
        write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old\n" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def pairs(tmp_path):
    """A finished folder of five samples, as `dataset.make` and `finish` leave it."""
    folder = tmp_path / "out" / "0000000"
    folder.mkdir(parents=True)
    (folder / "prompt.json").write_text(json.dumps({"caption": "café", "edit": "b", "output": "c"}))
    (folder / "counts.json").write_text("{}")
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"seed": i}) + "\n" for i in range(5)))
    for i in range(5):
        for k in range(2):
            Image.new("RGB", (8, 8)).save(folder / f"{i}_{k}.jpg")
    dataset.finish(tmp_path / "out")
    return tmp_path / "out"


def test_shards_are_replaced_when_all_are_written(pairs, monkeypatch):
    assert [p.name for p in dataset.webdataset(pairs, size=2)] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    before = {p.name: p.read_bytes() for p in pairs.glob("shard-*")}
    real, count = tarfile.TarFile.addfile, []

    def full(*arguments):
        count.append(1)
        if len(count) > 10:
            raise FULL
        real(*arguments)

    with monkeypatch.context() as m:
        m.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(UsageError, match="No space left.*an earlier export is as it was"):
            dataset.webdataset(pairs, size=2)
    assert {p.name: p.read_bytes() for p in pairs.glob("shard-*")} == before and not list(pairs.glob(".p2p-*"))
    assert [p.name for p in dataset.webdataset(pairs, size=4)] == sorted(p.name for p in pairs.glob("shard-*"))   # one is left over
    with tarfile.open(pairs / "shard-000001.tar") as tar:
        assert json.load(tar.extractfile("0000000_4.json"))["caption"] == "café"
        assert Image.open(io.BytesIO(tar.extractfile("0000000_4.edited.jpg").read())).size == (8, 8)


def test_a_table_is_replaced_when_it_is_written(pairs, monkeypatch):
    assert dataset.parquet(pairs) == [pairs / "pairs.parquet"]
    before = (pairs / "pairs.parquet").read_bytes()

    def full(*_):
        raise FULL

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UsageError, match="No space left"):
        dataset.parquet(pairs)
    assert (pairs / "pairs.parquet").read_bytes() == before and not list(pairs.glob(".p2p-*"))


@pytest.mark.slow
def test_a_dataset_is_not_gone_on_with_by_another_recipe(tmp_path, capsys):
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS[:1]))

    def made(*more, steps="1"):
        return main(["dataset", "--recipe", "ip2p", str(file), "--out", str(out), "--steps", steps, "--samples", "1", "-q", *more])

    assert made() == 0
    recipe = (out / "recipe.json").read_bytes()
    for more, steps, said in ((("--min-text", "0.5"), "1", "text 0.2, not 0.5"), ((), "2", "steps 1, not 2"), (("--seed", "4"), "1", "seed 0, not 4")):
        assert made(*more, steps=steps) == 2 and said in capsys.readouterr().err
    assert (out / "recipe.json").read_bytes() == recipe and made() == 0
    file.write_text("".join(json.dumps(p) + "\n" for p in reversed(PROMPTS)))
    assert made() == 2 and "0000000 from {'caption': 'a cat on grass'" in capsys.readouterr().err   # another list
    file.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    assert made() == 0 and (out / "0000001" / "counts.json").exists()                                 # a longer one goes on
    (out / "0000001" / "counts.json").unlink()                                                        # a copy that was stopped
    assert made() == 0 and (out / "0000001" / "counts.json").exists()


# ------------------------------------------------------------------------------------------------------------------ readers

@pytest.fixture
def unread(monkeypatch):
    """Standard streams whose reader has left, as `2>&1 | head -1` leaves them."""
    found = []
    for name in ("stdout", "stderr"):
        read, end = os.pipe()
        os.close(read)
        stream = os.fdopen(end, "w", buffering=1)
        monkeypatch.setattr(sys, name, stream)
        found.append(stream)
    yield
    for stream in found:
        stream.close()   # raises nothing: what was buffered has gone elsewhere


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_work(tmp_path, unread):
    file = listed(tmp_path / "jobs.jsonl", 3, steps=1)
    assert main(["batch", str(file), "--out", str(tmp_path / "out")]) == 0
    assert [json.loads(line)["state"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()] == ["done"] * 3
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not")
    file.write_text(json.dumps({"source": "a cat", "targets": "a dog", "image": "broken.png"}) + "\n")
    assert main(["batch", str(file), "--out", str(tmp_path / "other")]) == 1
    assert main(["edit", "a cat", "a dog", "--steps", "1", "--out", str(tmp_path / "edit")]) == 0
    assert len(list((tmp_path / "edit").glob("*/edit.png"))) == 1 and main(["tokens"]) == 2 and main(["tokens", "a cat"]) == 0


# ------------------------------------------------------------------------------------------------------------------ workers

def alive(pid):
    return aside._born(pid) not in (None, "-")


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(p) for p in f.read().split()]


def started(folder):
    """A run of 600 jobs by two workers, once the first is done.  -> the process, its workers (and multiprocessing's helper)"""
    file = listed(folder / "jobs.jsonl", 600, guidance_scale=1, steps=2)
    run = subprocess.Popen([sys.executable, "-m", "p2p", "batch", str(file), "--workers", "2", "--device", "cpu", "--out", str(folder / "out")],
                           env=ENV, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list((folder / "out").glob("[!.]*/job.json")):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.05)
    return run, children(run.pid)


def ended(pids, seconds=60):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="processes are looked up in /proc")
def test_workers_end_with_their_run(tmp_path):
    """Ctrl-C, with more jobs than any pipe holds, and then the next run killed: it says how far it came; nobody stays behind."""
    run, workers = started(tmp_path)
    assert len(workers) >= 2
    os.killpg(run.pid, signal.SIGINT)                                   # as a terminal does it: to all of them
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in said and "the same command goes on" in said and ended(workers)
    rows = [json.loads(line)["state"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 600 and 0 < rows.count("done") == 600 - rows.count("open") and not list((tmp_path / "out").rglob(".p2p-*"))
    run, workers = started(tmp_path)
    while len(workers) < 3 and run.poll() is None:                      # this time there is a result from the start
        time.sleep(0.05)
        workers = children(run.pid)
    run.kill()
    run.communicate()
    assert ended(workers)

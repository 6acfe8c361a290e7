"""Every command that writes, stopped at the worst moment or on a full disk: nothing half done stays, nothing earlier is lost, and
the same command goes on."""

import json
import os
import resource
import signal

import pytest
from PIL import Image

from p2p.cli import output
from p2p.cli.parser import main
from p2p.weights import aside
from p2p.weights.errors import CheckpointError

PAIRS = [{"caption": "a cat on grass", "edit": "make it a dog", "output": "a dog on grass"},
         {"caption": "a cat on a road", "edit": "make it a dog", "output": "a dog on a road"}]
LOOSE = ["--steps", "1", "--samples", "1", "--keep", "1", "--min-image", "-1", "--min-direction", "-1", "--min-text", "-1"]
COMMANDS = {
    "generate": ["generate", "a cat", "--steps", "1", "--seed", "1"],
    "edit": ["edit", "a cat", "a dog", "--steps", "1", "--seed", "1", "--report"],
    "maps": ["maps", "a cat", "--steps", "1", "--seed", "1", "--arrays"],
    "sweep": ["sweep", "a cat", "a dog", "--over", "cross=0,1", "--steps", "1", "--seed", "1"],
    "invert": ["invert", "x.png", "a cat", "--method", "noise", "--steps", "2"],
    "batch": ["batch", "jobs.jsonl"],
    "dataset": ["dataset", "--recipe", "p2p", "pairs.jsonl", *LOOSE],
    "webdataset": ["dataset", "--recipe", "p2p", "pairs.jsonl", *LOOSE, "--format", "webdataset"],
    "parquet": ["dataset", "--recipe", "p2p", "pairs.jsonl", *LOOSE, "--format", "parquet"],
    "convert to a file": ["convert", "MODEL", "out.safetensors"],
    "convert to a folder": ["convert", "MODEL", "out"],
}
NUMBERED = ("generate", "edit", "maps", "sweep", "invert")   # every run makes a new folder
LISTS = ("results.jsonl", "seeds.json")   # of what is done so far
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


pytestmark = pytest.mark.usefixtures("attended", "once")


@pytest.fixture
def here(tmp_path, monkeypatch, sd1_file):
    """A folder with what the commands read.  -> runs a command"""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((64, 64), 90).save("x.png")
    jobs = [{"source": "a cat", "targets": "a dog", "seed": i, "steps": 1, "cfg": 1 + i} for i in range(2)]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))

    def run(name):
        said = [str(sd1_file) if word == "MODEL" else word for word in COMMANDS[name]]
        quiet = [] if said[0] == "convert" else ["--out", "out", "-q"]
        return main([*said, *quiet])

    return run


def written(folder):
    """All files and their bytes. Nothing that is hidden may be there, and no empty folder."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]
    assert not [p for p in folder.glob("out/*") if p.is_dir() and p.name != "failed" and not any(p.iterdir())]
    return found


def moves(monkeypatch, when, do):
    """`do` is called before or after the number `when` of the steps that put something into its place."""
    count = []
    for name in ("replace", "rename", "link"):
        real = getattr(os, name)

        def move(*args, real=real):
            count.append(args)
            if len(count) == abs(when) and when > 0:
                do()
            real(*args)
            if len(count) == abs(when) and when < 0:
                do()

        monkeypatch.setattr(os, name, move)


@pytest.mark.slow
@pytest.mark.parametrize("when", [1, -1, 3], ids=["before it moves", "after", "later"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_leaves_nothing_half_done(here, tmp_path, monkeypatch, capsys, name, when):
    stop = list(STOPS)[(when + len(name)) % 3]
    with monkeypatch.context() as m:
        moves(m, when, lambda: os.kill(os.getpid(), stop))
        code = here(name)
    before = written(tmp_path)
    if when != 3 or code:   # some move fewer things
        assert code == STOPS[stop] and "interrupted" in capsys.readouterr().err
    if not (name.startswith("convert") and {"out", "out.safetensors"} & {p.name for p in tmp_path.iterdir()}):   # it is done
        assert here(name) == 0
    after = written(tmp_path)
    assert all(after.get(file) == content for file, content in before.items() if not file.endswith(LISTS)) and len(after) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_said_and_costs_nothing_earlier(here, tmp_path, capsys, name):
    """No file grows beyond 3 kB (of a sample, which is smaller, 300 bytes), as when that is all there is."""
    if name not in NUMBERED and not name.startswith("convert"):
        short = [p for p in ("jobs.jsonl", "pairs.jsonl")]
        whole = {p: (tmp_path / p).read_text() for p in short}
        for p in short:
            (tmp_path / p).write_text(whole[p].splitlines(keepends=True)[0])
        assert here(name) == 0   # an earlier run, of a shorter list
        for p in short:
            (tmp_path / p).write_text(whole[p])
    before = written(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 if name == "dataset" else 3000, limits[1]))
    try:
        code = here(name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == (3 if name.startswith("convert") else 2) and "cannot be written" in said and "File too large" in said
    after = written(tmp_path)
    assert all(after[file] == content for file, content in before.items() if not file.endswith(LISTS))
    assert not {file for file in after if file not in before and file.endswith((".png", ".safetensors", ".tar", ".parquet"))}
    assert here(name) == 0


def test_what_stops_between_the_two_steps_of_a_move_leaves_nothing(tmp_path, monkeypatch):
    """A folder is made empty at its place and then replaced; so is a file where links are not."""
    def stopped(*args):
        raise KeyboardInterrupt

    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("x")
    monkeypatch.setattr(os, "link", refused)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", stopped)
        for made in ("a", "b"):
            with pytest.raises(KeyboardInterrupt):
                aside.settle(tmp_path / made, tmp_path / "there")
            assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    aside.settle(tmp_path / "b", tmp_path / "there")
    with pytest.raises(FileExistsError):
        aside.settle(tmp_path / "a", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "x" and (tmp_path / "a").is_dir()


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_that_a_library_takes_for_damage_is_a_stop(tmp_path, monkeypatch, capsys, sd1_file, stop):
    """safetensors makes an error of its own of whatever is raised while it reads."""
    def damaged(*args, **settings):
        try:
            os.kill(os.getpid(), stop)
        except BaseException as error:
            raise CheckpointError(f"the file is damaged: {error!r}") from None

    monkeypatch.setattr("p2p.load", damaged)
    code = main(["edit", "a cat", "a dog", "--model", str(sd1_file), "--out", str(tmp_path / "out")])
    assert code == STOPS[stop] and capsys.readouterr().err.splitlines()[-1] == "p2p: interrupted" and not any(tmp_path.iterdir())


@pytest.mark.parametrize("earlier", [None, signal.SIGTERM])
@pytest.mark.parametrize("stop", STOPS)
def test_no_stop_interrupts_the_cleaning_up(tmp_path, monkeypatch, capsys, here, stop, earlier):
    """Neither the first nor a second one, as when a terminal closes: SIGHUP, then SIGTERM."""
    real = aside.shutil.rmtree

    def slow(*args, **options):
        os.kill(os.getpid(), stop)
        real(*args, **options)

    monkeypatch.setattr(aside.shutil, "rmtree", slow)
    if earlier:
        monkeypatch.setattr(output, "sweep", lambda parent: os.kill(os.getpid(), earlier))
    assert here("edit") == STOPS[earlier or stop] and "interrupted" in capsys.readouterr().err
    assert written(tmp_path).keys() == {"x.png", "jobs.jsonl", "pairs.jsonl"}

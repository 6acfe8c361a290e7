"""What starts at once: help, mistakes and `import p2p` load no library that takes time, and Ctrl-C ends a start without a traceback."""
import ast
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import p2p

ROOT = Path(__file__).parents[1]

LIGHT = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout

import p2p

assert {"edit", "LocalBlend"} <= set(dir(p2p)) and issubclass(p2p.UsageError, ValueError)
from p2p.cli import main

mistakes = [["paint"], ["edit", "a cat", "a dog", "--nope"], ["edit", "a cat"], ["edit", "a", "b", "--from", "x.png"],
            ["edit", "--from", "x.png", "--cross", "x"], ["edit", "a cat", "a dog", "--cross", "dog=much"],
            ["edit", "a", "b", "--self", "x"], ["edit", "a", "b", "--weight", "red"], ["edit", "a", "b", "--proximal", "l0:x"],
            ["edit", "a", "b", "--blend-level", "4"], ["edit", "a", "b", "--swap", "c=d", "--swap", "c=e"],
            ["edit", "a", "b", "--upscale-steps", "3"], ["edit", "a", "b", "--method", "direct"],
            ["sweep", "a", "b", "--over", "cross=0,x"], ["sweep", "a", "b", "--over", "seed=1", "--seed", "2"],
            ["maps", "a", "--weight", "a=2"], ["maps", "a", "--at", "x"], ["batch", "j", "-o", "o", "--workers", "0"],
            ["eval", "pie", "--data", "d", "-o", "o", "--cross", "dog=0.2"], ["dataset", "p", "--recipe", "p2p", "-o", "o", "--keep", "0"],
            ["invert", "p.png", "a cat", "--negative", "a dog", "--negative", "b"],
            ["edit", "a", "b", "--timesteps", "9,x"], ["edit", "a", "b", "--layers", "x=up"]]
helped = [["--help"], *([command, "--help"] for command in
          "edit invert generate maps sweep batch eval dataset tokens encode inspect convert".split())]
for code, asked in [(0, argv) for argv in helped] + [(2, argv) for argv in mistakes]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        found = main(asked)
    said = err.getvalue()
    assert found == code and bool(said) == bool(code) and "Traceback" not in said, (asked, said)
loaded = {name.split(".")[0] for name in sys.modules}
slow = {"torch", "open_clip", "numpy", "PIL", "einops", "safetensors", "tqdm", "regex", "ftfy", "huggingface_hub"} & loaded
assert not slow, slow

model = p2p.load("emoji", device="cpu")
assert p2p.edit(model, "a cat on grass", "a dog on grass", steps=1).images
unused = {"torchvision", "timm", "transformers", "open_clip", "torch._dynamo", "sympy"} & set(sys.modules)
assert not unused, unused
"""


@pytest.mark.slow
def test_help_mistakes_and_the_import_load_nothing_slow_and_the_bundled_model_nothing_unused():
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_come_from_where_tools_are_told():
    """The list, what type checkers read, and what is found when it is asked for, are the same."""
    tree = ast.parse((ROOT / "p2p" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert {*told, "CheckpointError", "NumericsError", "UsageError"} == set(p2p.__all__) <= set(dir(p2p))
    for name, module in told.items():
        assert getattr(p2p, name) is getattr(importlib.import_module(module), name)
    found = {}
    exec("from p2p import *", found)
    assert found.keys() - {"__builtins__"} == set(p2p.__all__)


def test_submodules_are_found_and_what_is_absent_is_not(monkeypatch):
    monkeypatch.delattr(p2p, "show", raising=False)
    assert p2p.show is importlib.import_module("p2p.show") and p2p.models is importlib.import_module("p2p.models")
    for name in ("crossreplace", "__wrapped__"):
        with pytest.raises(AttributeError, match=name):
            getattr(p2p, name)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", ["numpy", "torch._utils", "p2p.model"])
def test_a_start_that_is_interrupted_says_so_and_no_more(tmp_path, attended, at, number, code):
    """at: a module whose import is over when the signal comes; others are being imported."""
    command = [sys.executable, "-X", "importtime", "-m", "p2p", "edit", "a cat on grass", "a dog on grass", "-o", str(tmp_path / "out")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if line.endswith(f" {at}\n"):
            break
    run.send_signal(number)
    out, err = run.communicate()
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert run.returncode == code and said == ["p2p: interrupted"] and out == "" and not (tmp_path / "out").exists()

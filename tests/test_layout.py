"""models <- weights <- p2p: imports run one way, and the files stay readable."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"models", "weights", "p2p", "tests", "benchmarks"}
MAY_IMPORT = {"models": {"models"}, "weights": {"models", "weights"}, "p2p": {"models", "weights", "p2p"}}
FILES = [f for package in MAY_IMPORT for f in sorted((ROOT / package).rglob("*.py"))]


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file):
    package = file.relative_to(ROOT).parts[0]
    assert {name.split(".")[0] for name in imported(file)} & OURS <= MAY_IMPORT[package]


def test_only_the_facade_and_the_command_line_know_weights():
    """What reads files that strangers wrote stands with the weights, and serves all."""
    shared = {"weights.untrusted", "weights.files", "weights.errors", "weights.aside"}
    users = {f.name for f in (ROOT / "p2p").glob("*.py") for name in imported(f) if name.split(".")[0] == "weights" and name not in shared}
    assert users == {"model.py", "commands.py", "bulk.py", "metrics.py"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_holds_one_idea(file):
    assert len(file.read_text().splitlines()) <= 400

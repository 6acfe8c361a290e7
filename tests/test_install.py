"""One installed name: nothing of a user's own is imported in our place, nor ours in its place."""
import ast
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_users_own_folders_are_left_alone(tmp_path):
    for name in ("models", "weights", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "run.py").write_text(
        "import models, weights, tests, p2p\n"
        "assert models.MINE and weights.MINE and tests.MINE\n"
        "print(*p2p.edit('emoji', 'a cat on grass', 'a dog on grass', steps=1).latents.shape)\n")
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["2", "3", "64", "64"], done.stderr


NAMES = {"PIL": "pillow", "open_clip": "open_clip_torch"}   # of packages whose name is another


@pytest.mark.slow
def test_what_is_imported_is_declared():
    """By name, though another package may bring it."""
    said = ConfigParser()
    said.read(ROOT / "setup.cfg")
    lists = [said["options"]["install_requires"], *said["options.extras_require"].values()]
    declared = {re.split(r"[\[<>=]", line)[0].strip() for each in lists for line in each.split()}
    always = {re.split(r"[\[<>=]", line)[0].strip() for line in lists[0].split()}
    found, needed = set(), set()
    for file in (f for top in ("p2p", "models", "weights") for f in (ROOT / top).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"p2p"}:
                found.add(NAMES.get(name, name))
                if node in tree.body and "web" not in file.parts:
                    needed.add(NAMES.get(name, name))
    assert found <= declared and needed <= always and {"tqdm", "huggingface_hub", "starlette"} <= found


def test_every_folder_with_code_is_installed_below_p2p():
    said = ConfigParser()
    said.read(ROOT / "setup.cfg")
    packages = said["options"]["packages"].split()
    found = {f.parent.relative_to(ROOT) for top in ("p2p", "models", "weights") for f in (ROOT / top).rglob("__init__.py")}
    names = {".".join(p.parts if p.parts[0] == "p2p" else ("p2p", *p.parts)) for p in found}
    assert set(packages) == names and all(name.split(".")[0] == "p2p" for name in packages)

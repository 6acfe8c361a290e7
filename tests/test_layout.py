"""models <- weights <- p2p, and inside p2p: root <- sources, editors, show <- lists, web <- cli. Imports run one way."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {   # what each may import of ours besides itself; the root of p2p is "p2p", and what is asked belongs to it
    "models": set(),
    "weights": {"models"},
    "p2p": {"models", "weights", "request"},
    "request": {"models", "weights", "p2p"},
    "sources": {"models", "weights", "p2p", "request"},
    "editors": {"models", "weights", "p2p", "request"},
    "show": {"models", "weights", "p2p", "request"},
    "lists": {"models", "weights", "p2p", "request", "sources", "editors", "show"},
    "web": {"models", "weights", "p2p", "request", "sources", "editors", "show"},
    "cli": {"models", "weights", "p2p", "request", "sources", "editors", "show", "lists", "web"},
}
FACADE = {"p2p/__init__.py", "p2p/__main__.py"}   # what a user imports, and the program: they reach into every room
# What a run gives shows itself, by a leaf that knows of none.
SHOWN = {("p2p/run.py", "p2p.show.pictures"), ("p2p/maps.py", "p2p.show.pictures")}
FILES = [f for folder in ("models", "weights", "p2p") for f in sorted((ROOT / folder).rglob("*.py"))]


def room(name):
    """Of a module, "p2p.show.report"."""
    first = name.split(".")[1:2]
    return first[0] if first and first[0] in ROOMS else "p2p"


def imported(file):
    """Names of our modules, as they would be written after `import`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in ROOMS)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module.split(".")[0] in ROOMS:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file):
    where = str(file.relative_to(ROOT))
    names = list(imported(file))
    assert all(name.split(".")[0] == "p2p" for name in names), "models and weights are p2p.models and p2p.weights"
    own = room("p2p." + where.removeprefix("p2p/").replace("/", "."))
    names = [name for name in names if (where, name) not in SHOWN]
    assert where in FACADE or {room(name) for name in names} <= ROOMS[own] | {own}


@pytest.mark.slow
def test_no_circles():
    known = {}
    for file in FILES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "p2p" else ("p2p", *parts)
        known[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    wants = {name: {m if m in known else m.rpartition(".")[0] for m in imported(file)} - {name, "p2p"}
             for name, file in known.items()}
    while free := [name for name, needed in wants.items() if not needed & wants.keys()]:
        for name in free:
            del wants[name]
    assert not wants


def test_no_module_is_hidden_by_a_function():
    import p2p

    for file in FILES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "p2p" and len(parts) == 2:
            assert parts[1] not in p2p.__all__


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_holds_one_idea(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400 and max(map(len, lines), default=0) <= 110
    if file.relative_to(ROOT).parts[0] in ("models", "p2p"):
        assert len(lines) <= 300
        if file.parent.name != "cli" or file.stem not in ("arguments", "groups"):   # the parsers
            functions = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
            assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 45} == {}


def test_the_method_is_found_by_ls():
    assert len(list((ROOT / "p2p").glob("*.py"))) <= 13

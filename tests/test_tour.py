"""The tour runs from its first cell to its last, and shows pictures."""
import json
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from p2p.models import attention

TOUR = Path(__file__).parents[1] / "benchmarks" / "tour.ipynb"
CELLS = ["".join(c["source"]) for c in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.slow
def test_the_cells_run_in_order(monkeypatch):
    shown, notebook = [], {}
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    display = types.ModuleType("IPython.display")
    display.display = lambda *what: shown.extend(what)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)   # not there: pictures in place of a slider
    paper, counts = attention.edited_attend, []
    for i, source in enumerate(CELLS):
        before = len(shown)
        source = source.replace("STEPS = 20", "STEPS = 5")   # one cell shows every fifth
        last = source.split("\n")[-1]
        exec(compile(source, f"cell {i}", "exec"), notebook)
        if last and not last.startswith((" ", ")")) and "=" not in last.split("(")[0] and not last.startswith("display"):
            shown.append(eval(last, notebook))   # a notebook shows its last expression
        counts.append(sum(isinstance(what, Image.Image) for what in shown[before:]))
    assert counts[0] == 0 and all(counts[1:]), counts
    assert attention.edited_attend is paper
    pictures = [what for what in shown if isinstance(what, Image.Image)]
    assert all(min(what.size) >= 64 and what.convert("L").getextrema() != (0, 0) for what in pictures)


def test_outputs_are_left_out():
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    assert TOUR.stat().st_size < 1_000_000 and all(not c.get("outputs") for c in cells)

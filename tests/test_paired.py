"""The benchmark of real pictures: which edits it draws, and what it takes for right."""
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

import p2p
from benchmarks import paired
from benchmarks.paired import FIGURES, KINDS, pairs, right, table
from benchmarks.quality import first, psnr_outside
from benchmarks.sprites import sheet
from p2p.weights.emoji import recogniser
from p2p.weights.emoji.world import COLOURS, PLACES, edited, held_out, novel, render

N = 40


def verdicts(kind, a, b, shown):
    seen = recogniser.load().read(render(shown)[0])
    each = [recogniser.Reading(*(field[[i]] for field in seen)) for i in range(len(a))]
    return torch.tensor([right(kind, a[[i]], b[[i]], reading) for i, reading in enumerate(each)]).float().mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_true_edit_is_right_and_another_is_not(kind):
    """Its source's caption was never trained; what the edit leaves, it must leave: the colour, the place."""
    a, b = pairs(kind, N)
    assert len(a) == len(b) == N and held_out(a).all() and not (novel(a) | novel(b)).any() and (held_out(b).all() or kind != "swap")
    assert verdicts(kind, a, b, b).min() >= 0.9
    assert verdicts(kind, a, b, a)[0] <= 0.1                                           # not edited
    coloured = b.colour[:, 0] >= 0
    other = first(b, "colour", (b.colour[:, 0] + 1) % len(COLOURS))
    new, kept = verdicts(kind, a[coloured], b[coloured], other[coloured])
    assert (new if kind == "colour" else kept) <= 0.1
    if kind != "place":
        assert verdicts(kind, a, b, edited(b, place=(b.place + 1) % len(PLACES)))[1] <= 0.1


def test_outside_is_what_neither_object_covers():
    source, edit = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    old, new = torch.zeros(1, 32, 32, dtype=torch.bool), torch.zeros(1, 32, 32, dtype=torch.bool)
    old[:, 4:8, 4:8], new[:, 20:24, 20:24] = True, True
    edit[:, :, 8:16, 8:16], edit[:, :, 40:48, 40:48] = 1.0, 1.0
    assert psnr_outside(edit, source, old | new) == 60 and psnr_outside(edit, source, old) < 30


def test_a_method_without_all_kinds_has_no_mean_over_them():
    figures = dict.fromkeys(("reconstruction", "outside", "SSIM outside", "new", "kept", "truth", "rows", "seconds"), 1.0)
    results = {"one": {"kinds": {"swap": figures}, "peak MB": 1}, "both": {"kinds": {"swap": figures, "place": figures}, "peak MB": 1}}
    rows = table(results, None).splitlines()[2:]
    assert rows[0].startswith("| one | without place |") and rows[1].startswith("| both | 1.00 |")
    assert table(results, "swap").splitlines()[2].startswith("| one | 1.00 |")


def test_a_sheet_shows_every_picture(tmp_path):
    from PIL import Image

    columns = [torch.full((5, 3, 64, 64), value) for value in (-1.0, 0.0)]
    sheet(columns, tmp_path / "sheet.png")
    picture = Image.open(tmp_path / "sheet.png")
    assert picture.size == (2 * 4 * 2 * 64, 2 * 2 * 64)
    assert [picture.getpixel((64 + 128 * k, 192))[0] for k in range(3)] == [0, 128, 255]   # the fifth caption's, then paper


def test_a_run_goes_on_where_it_was_but_not_with_other_weights(tmp_path, monkeypatch):
    measured = []

    def run(command, **_):
        measured.append(command[command.index("--kinds") + 1])
        kinds = {measured[-1]: dict.fromkeys(FIGURES, 1.0)}
        return subprocess.CompletedProcess(command, 0, json.dumps({"kinds": kinds, "peak MB": 1}), "")
    monkeypatch.setattr(subprocess, "run", run)
    for sha256, kinds, new in (("a", "swap", ["swap"]), ("a", "swap,colour", ["colour"]), ("b", "swap,colour", ["swap", "colour"])):
        monkeypatch.setattr(p2p, "load", lambda name, said=sha256: SimpleNamespace(sha256=said))
        measured.clear()
        paired.main([str(tmp_path), "--methods", "direct", "--kinds", kinds])
        assert measured == new
    assert json.loads((tmp_path / "paired.json").read_text())["sha256"] == "b"

"""The command line, as a user meets it."""
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import p2p
from p2p.cli.parser import main, parsers
from p2p.editors import EDITORS
from p2p.edits import MODES
from p2p.request.schedules import SAMPLERS, SPACINGS
from p2p.request.source import METHODS
from p2p.show.pictures import CHUNK, grid, read_settings, save_png
from p2p.weights.detect import FAMILIES, PREDICTIONS

pytestmark = pytest.mark.usefixtures("once")
EDIT = ["edit", "a red cat on grass", "a red dog on grass", "--steps", "3"]


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def pixels(path):
    return np.array(Image.open(path))


def test_edit_writes_source_edit_and_grid(capsys, tmp_path):
    code, out, err = run(capsys, *EDIT, "--seed", 5, "-o", tmp_path / "out")
    folder = tmp_path / "out" / "0001-cat-to-dog"
    assert code == 0 and out.split() == [str(folder / f) for f in ("source.png", "edit.png", "grid.png")]
    assert "mode replace (chosen from the prompts)" in err and "seed" not in err
    assert pixels(folder / "source.png").shape == (64, 64, 3)
    assert (pixels(folder / "source.png") != pixels(folder / "edit.png")).any()
    assert json.loads((folder / "settings.json").read_text()) == read_settings(folder / "edit.png")
    assert not [p for p in (tmp_path / "out").iterdir() if p != folder]   # nothing half-written is left


@pytest.mark.slow
def test_nothing_is_overwritten_and_a_drawn_seed_is_said_and_recorded(capsys, tmp_path):
    seeds = []
    for _ in range(2):
        code, out, err = run(capsys, *EDIT, "-o", tmp_path)
        assert code == 0
        seeds.append(int(err.split("seed ")[1].split()[0]))
        assert read_settings(out.split()[0])["seed"] == seeds[-1]
    assert len(set(seeds)) == 2 and sorted(p.name[:4] for p in tmp_path.iterdir()) == ["0001", "0002"]


@pytest.mark.slow
def test_from_runs_an_edit_again_to_the_same_pixels(capsys, tmp_path):
    options = ["--cross", "0.6", "--cross", "dog=0.2:0.9", "--self", "0:0.5", "--weight", "red=1.5", "--cfg", "2.5", "--eta", "0.3"]
    _, first, _ = run(capsys, *EDIT, *options, "-o", tmp_path)
    for made in first.split():
        code, again, _ = run(capsys, "edit", "--from", made, "-o", tmp_path)
        assert code == 0
        for a, b in zip(first.split(), again.split()):
            assert (pixels(a) == pixels(b)).all()
    s = read_settings(first.split()[0])
    assert s["targets"][0]["cross_replace_steps"] == {"default_": 0.6, "dog": [0.2, 0.9]} and s["eta"] == 0.3


@pytest.mark.slow
def test_several_targets_and_generate(capsys, tmp_path):
    code, out, _ = run(capsys, *EDIT, "a red cat in the snow", "-o", tmp_path, "--seed", 1)
    assert code == 0 and [os.path.basename(p) for p in out.split()] == ["source.png", "edit-1-cat-to-dog.png", "edit-2-on-grass-to-in-the-snow.png", "grid.png"]
    code, out, _ = run(capsys, "generate", "a red cat", "a house", "--steps", 2, "--seed", 1, "-o", tmp_path)
    assert code == 0 and [os.path.basename(p) for p in out.split()] == ["1.png", "2.png", "grid.png"]
    code, _, err = run(capsys, "edit", "--from", out.split()[0], "-o", tmp_path)
    assert code == 2 and "generate" in err


@pytest.mark.slow
def test_an_edit_ends_in_large_pictures_and_can_be_made_again(capsys, tmp_path):
    code, out, _ = run(capsys, *EDIT, "--seed", 5, "--upscale", "--upscale-steps", 2, "-o", tmp_path)
    large = out.split()[:2]
    assert code == 0 and [Image.open(f).size for f in large] == [(256, 256)] * 2
    code, again, _ = run(capsys, "edit", "--from", large[1], "-o", tmp_path)
    assert code == 0 and all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(large, again.split()))


@pytest.fixture
def photo(tmp_path):
    """A picture of another size and mode."""
    image = Image.radial_gradient("L").resize((90, 70)).convert("LA")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.slow
def test_a_picture_is_edited_at_once_or_from_its_inversion(capsys, tmp_path, photo):
    """The same pixels on both ways, and from the settings inside the result; the rows of the network are said."""
    common, out = ["--cross", "0.5", "-o", tmp_path / "out"], tmp_path / "out"
    code, first, err = run(capsys, "edit", "--image", photo, *EDIT[1:], *common)
    assert code == 0 and "edit-friendly inversion, 2 rows of the network; the edit, 8" in err
    assert [os.path.basename(p) for p in first.split()] == ["input.png", "source.png", "edit.png", "grid.png"]
    assert np.abs(pixels(first.split()[0]).astype(int) - pixels(first.split()[1])).max() <= 1
    code, made, _ = run(capsys, "invert", photo, EDIT[1], "--steps", 3, "-o", out)
    assert code == 0
    code, second, _ = run(capsys, "edit", "--inversion", made.split()[0], EDIT[2], *common)
    code, third, _ = run(capsys, "edit", "--from", second.split()[1], "-o", out)
    assert code == 0
    for a, b, c in zip(first.split(), second.split(), third.split()):
        assert (pixels(a) == pixels(b)).all() and (pixels(a) == pixels(c)).all()


ROWS = {"every prompt and its empty one, every step": (12, EDIT), "guidance 1: no empty ones": (6, [*EDIT, "--cfg", "1"]),
        "a sweep: one source": (18, ["sweep", *EDIT[1:], "--over", "cross=0,1"]),
        "... a source for every seed": (24, ["sweep", *EDIT[1:], "--over", "seed=1,2"]),
        "no edit": (6, ["generate", EDIT[1], *EDIT[3:]]), "maps": (12, ["maps", *EDIT[1:]])}
SMALL = ["--height", "32", "--width", "32"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ROWS)
def test_verbose_prints_the_rows_of_the_network_and_nothing_else_does(capsys, tmp_path, what):
    rows, argv = ROWS[what]
    code, _, err = run(capsys, *argv, *SMALL, "--verbose", "-o", tmp_path)
    assert code == 0 and f"note: {rows} rows of the network; text " in err
    assert not ("seed=1,2" in argv and re.search(r"^seed \d", err, re.M))   # none is drawn that nothing reads
    for quieter in ([], ["-q"]):
        assert "rows" not in run(capsys, *argv, *SMALL, *quieter, "-o", tmp_path)[2]


@pytest.mark.slow
@pytest.mark.parametrize("cross, rows", [("0", 6), ("0.25", 7), ("0.5", 8)])   # windows end at int(share * (steps + 1))
def test_verbose_counts_a_known_source_only_while_it_is_read(capsys, tmp_path, photo, cross, rows):
    """Direct inversion: a row at each of 3 steps. Its edit: target and empty prompt, the source's own while a window is open."""
    argv = ["edit", "--image", photo, *EDIT[1:], "--method", "direct", "--self", "0", "--cross", cross]
    _, _, err = run(capsys, *argv, "-v", "-o", tmp_path)
    assert f"direct inversion, 3 rows of the network; the edit, {rows}\nnote: {rows} rows of the network; text" in err


@pytest.mark.slow
def test_an_edit_of_a_picture_of_another_size_is_made_again(capsys, tmp_path, photo):
    _, out, _ = run(capsys, "edit", "--image", photo, *EDIT[1:], "--height", 48, "--width", 80, "-o", tmp_path / "out")
    code, again, _ = run(capsys, "edit", "--from", out.split()[1], "-o", tmp_path / "out")
    assert code == 0 and pixels(again.split()[1]).shape == (48, 80, 3)
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(out.split(), again.split()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["null-text", "edit-friendly", "belm", "noise"])
def test_inversion_methods_from_the_command_line(capsys, tmp_path, photo, method):
    own = {"noise": ["--skip", "1"], "null-text": ["--inner-steps", "2"]}.get(method, [])
    options = ["--method", method, "--proximal", "l1:0.5", *own]
    code, out, _ = run(capsys, "edit", "--image", photo, *EDIT[1:], *options, "-o", tmp_path / "out")
    assert code == 0
    code, again, _ = run(capsys, "edit", "--from", out.split()[1], "-o", tmp_path / "out")
    assert code == 0 and all((pixels(a) == pixels(b)).all() for a, b in zip(out.split(), again.split()))


def test_tokens_shows_pieces_and_partners(capsys):
    """As the edit pairs them: a swapped word takes the maps of the word in whose place it stands, an added one none."""
    code, out, _ = run(capsys, "tokens", "a cat on hill", "a hippopotamus on hill", "a fat cat on hill")
    first, swapped, refined = (part.splitlines() for part in re.split(r"(?=^'.*source$)", out, flags=re.M))
    pieces = [line.split()[0] for line in first if line.endswith(" hippopotamus")]
    assert code == 0 and any("49406" in line for line in first) and len(pieces) > 1 and "(mode replace)" in swapped[0]
    assert [line.split(" <- ")[1] for line in swapped[1:] if line.split()[0] in pieces] == ["2"] * len(pieces) and "new" not in str(swapped)
    assert "(mode refine)" in refined[0] and [line.split()[0] for line in refined if line.endswith("<- new")] == ["2"]


@pytest.mark.parametrize("model", ["emoji", "emoji-flow", "a file"])
def test_tokens_of_a_model_without_t5_are_clips(capsys, sd1_file, model):
    _, plain, _ = run(capsys, "tokens", "a cat on hill")
    code, out, _ = run(capsys, "tokens", "a cat on hill", "--model", sd1_file if model == "a file" else model)
    assert code == 0 and out == plain


USAGE = {
    "--ema, --tile: not with --from": ["edit", "--from", "x.png", "--tile", "7", "--ema"],
    "--weight, --blend: not with a prompt without targets": ["maps", "a cat", "--weight", "cat=2", "--blend", "cat"],
    "--cross: given more than once for all words": ["edit", "a cat", "a dog", "--cross", "0.2", "--cross", "0.8"],
    "--over: given more than once for 'cross'": ["sweep", "a cat", "a dog", "--over", "cross=0", "--over", "cross=1"],
    "whole numbers": ["sweep", "a cat", "a dog", "--over", "seed=1.5"],
    "a sweep over cross names a value twice: 0.5, 0.5": ["sweep", "a cat", "a dog", "--over", "cross=0.5,0.5"],
    "--seed: not with --over seed": ["sweep", "a cat", "a dog", "--over", "seed=1,2", "--seed", "3"],
    "--site nowhere: no layer that attends to text": ["maps", "a cat", "--site", "nowhere"],
    "--at 7: a step": ["maps", "a cat", "--steps", "3", "--at", "7"],
    "--blend-threshold: 'x' is not": [*EDIT, "--blend", "cat:dog", "--blend-threshold", "0.2:x"],
    "--upscale-edited: not with --editor": [*EDIT, "--upscale", "--upscale-edited", "--editor", "masactrl"],
    "--negative: 2 given; p2p maps of a prompt has one row": ["maps", "a cat", "--negative", "a", "--negative", "b"],
    "--upscale-edited: emoji-upscaler reads no text": [*EDIT, "--upscale", "--upscale-edited"],
    "each of heads must be a whole number from 0 to 1, not 99": ["maps", "a cat", "--head", "99", "--steps", "1"],
    "invalid choice: 'paint'": ["paint"], "needs a source prompt": ["edit", "a cat"],
    'no word "bird"': [*EDIT, "--weight", "bird=2"], "expected WORD=NUMBER": [*EDIT, "--weight", "red"],
    "'much' is not a number": [*EDIT, "--weight", "red=much"], 'no word "hat"': [*EDIT, "--cross", "hat=0.5"],
    "between 0 and 1": [*EDIT, "--cross", "1.5"], "--self: 'x' is not a number": [*EDIT, "--self", "x"],
    "as many words": ["edit", "a cat", "a big cat", "--mode", "replace"], "1 to 1000": [*EDIT[:-1], "2000"],
    "whole number": [*EDIT[:-1], "0"], "invalid int value": [*EDIT[:-1], "many"], "no such file": ["edit", "--from", "absent.png"],
    "give either prompts or --from": ["edit", "a", "b", "--from", "x.png"], "eta must lie": [*EDIT, "--eta", "3"],
    "--device warp": [*EDIT, "--device", "warp"], "--method: not with": [*EDIT, "--method", "direct"],
    "absent.png: no such file": [*EDIT, "--image", "absent.png"], "not both": [*EDIT, "--image", "a.png", "--inversion", "b"],
    "absent.safetensors: no such file": ["edit", "--inversion", "absent.safetensors", "a dog"], "proximal": [*EDIT, "--proximal", "l7"],
    "--steps: not with --inversion": ["edit", "--inversion", "x", "a dog", "--steps", "3"],
}


@pytest.mark.parametrize("message", USAGE)
def test_bad_usage_is_one_clear_message(capsys, tmp_path, message):
    code, out, err = run(capsys, *USAGE[message], *(["-o", tmp_path] if USAGE[message] != ["paint"] else []))
    assert code == 2 and message in err and out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, message", [(["--weight", "bird=2"], 'no word "bird"'), (["--blend", "cat:bird"], 'no word "bird"')])
def test_words_are_checked_before_a_picture_is_inverted(capsys, tmp_path, monkeypatch, options, message):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "a.png")
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("the network ran"))
    code, _, err = run(capsys, "edit", "--image", tmp_path / "a.png", "a cat", "a dog", *options, "-o", tmp_path / "out")
    assert code == 2 and message in err


@pytest.mark.parametrize("options, message", [
    (["--head", "9"], "each of heads must be a whole number from 0 to"), (["--side", "7"], "--side 7: maps are recorded at"),
    (["--head", "9", "--components"], "each of heads"), (["--site", "mid", "--side", "16"], "--side 16: maps are recorded at")])
@pytest.mark.parametrize("source", [["a cat"], ["a cat", "--image", "a.png"], ["a cat", "a dog"]])
def test_maps_that_there_will_not_be_are_refused_before_the_network_runs(capsys, tmp_path, monkeypatch, source, options, message):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "a.png")
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("the network ran"))
    source = [tmp_path / word if word == "a.png" else word for word in source]
    code, _, err = run(capsys, "maps", *source, *options, "-o", tmp_path / "out")
    assert code == 2 and message in err


def test_a_stage_shows_no_maps_by_itself(capsys, tmp_path):
    code, _, err = run(capsys, "maps", "a cat", "--model", "emoji-upscaler", "-o", tmp_path / "out")
    assert code == 2 and "is a super-resolution stage" in err


def test_the_seconds_of_an_inversion_are_said_when_asked_for(capsys, tmp_path, photo):
    for more, said in (([], False), (["-v"], True)):
        _, _, err = run(capsys, "invert", photo, "a cat", "--method", "noise", "--steps", "2", *more, "-o", tmp_path / "out")
        assert bool(re.search(r"noise inversion, 0 rows of the network, \d+\.\d\d s", err)) == said


def test_maps_of_a_picture_in_its_own_shape_have_its_sides(capsys, tmp_path):
    Image.effect_noise((128, 64), 90).save(tmp_path / "a.png")
    code, _, err = run(capsys, "maps", "a cat", "--image", tmp_path / "a.png", "--fit", "own", "--side", "7", "--steps", "1",
                       "-o", tmp_path / "out")
    sides = [tuple(map(int, side.split(" x "))) for side in err.split("recorded at ")[1].split(", ")]
    assert code == 2 and all(w > h for h, w in sides)


def test_model_file_errors_have_their_own_code(capsys, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"<html>")
    for path, message in ((bad, "web page"), (tmp_path / "absent.safetensors", "no such file")):
        code, _, err = run(capsys, *EDIT, "--model", path, "-o", tmp_path / "out")
        assert code == 3 and message in err and str(path) in err


@pytest.mark.slow
def test_other_weights_are_not_taken_for_the_recorded_ones(capsys, tmp_path, sd1_file):
    _, out, _ = run(capsys, *EDIT, "-o", tmp_path)
    code, _, err = run(capsys, "edit", "--from", out.split()[0], "--model", sd1_file, "-o", tmp_path)
    assert code == 3 and "not the weights" in err


def test_unwritable_folder_is_said_before_a_model_is_loaded(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(p2p, "load", None)
    code, _, err = run(capsys, *EDIT, "-o", tmp_path / "file" / "out")
    assert code == 2 and "cannot be written" in err


@pytest.mark.parametrize("raised, code, said", [(p2p.NumericsError("not finite"), 4, "p2p: not finite"), (KeyboardInterrupt, 130, "interrupted")])
def test_a_run_that_stops_says_why_and_leaves_nothing(capsys, tmp_path, monkeypatch, raised, code, said):
    def stop(*args, **settings):
        raise raised

    monkeypatch.setattr("p2p.cli.results.run", stop)
    done, out, err = run(capsys, *EDIT, "-o", tmp_path / "new" / "out")
    assert done == code and said in err and out == ""
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_half_way_leaves_nothing(capsys, tmp_path, monkeypatch):
    def full(path, *_):
        if path.name == "grid.png":
            raise OSError(28, "No space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr("p2p.cli.output.save_png", full)
    code, out, err = run(capsys, *EDIT, "-o", tmp_path)
    assert code == 2 and "No space left on device" in err and out == "" and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_that_moved_is_asked_for(capsys, tmp_path, sd1_file):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(sd1_file).read_bytes())
    _, out, _ = run(capsys, *EDIT[:-1], 1, "--model", moved, "--height", 64, "--width", 64, "-o", tmp_path)
    moved.rename(tmp_path / "there.safetensors")
    code, _, err = run(capsys, "edit", "--from", out.split()[0], "-o", tmp_path)
    assert code == 3 and "no such file" in err and "say with --model where it lies" in err
    assert run(capsys, "edit", "--from", out.split()[0], "--model", tmp_path / "there.safetensors", "-o", tmp_path)[0] == 0


def test_files_of_a_sweep_are_named_by_their_values(capsys, tmp_path):
    code, out, _ = run(capsys, "sweep", "a cat/dog", "a cat/dog", "--over", "weight:cat/dog=1.0000001,1.0000002", "--steps", 1, "-o", tmp_path)
    assert code == 0 and [os.path.basename(p) for p in out.split()][1:3] == ["weight-cat-dog1.0000001.png", "weight-cat-dog1.0000002.png"]


def test_foreign_pictures_hold_no_settings(capsys, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    save_png(tmp_path / "half.png", Image.new("RGB", (8, 8)), {"command": "edit"})
    for name, message in (("plain.png", "holds no settings"), ("text.png", "not a picture"), ("half.png", "not complete")):
        code, _, err = run(capsys, "edit", "--from", tmp_path / name, "-o", tmp_path)
        assert code == 2 and message in err


@pytest.mark.slow
def test_module_and_pipe():
    """`python -m p2p` is the same program; without a terminal there is no progress bar."""
    done = subprocess.run([sys.executable, "-m", "p2p", "tokens", "a cat"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("a cat\n")


@pytest.mark.slow
@pytest.mark.parametrize("command, code", [("| head -n 1", 0), ("> /dev/full", 2)])
def test_what_cannot_be_printed_is_no_traceback(command, code):
    shell = f"set -o pipefail; {sys.executable} -m p2p tokens {'word ' * 9000} {command}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert code == 0 or "No space left" in done.stderr


def test_letters_that_a_terminal_lacks_are_escaped(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["tokens", "a \u732b"]) == 0 and shown.getvalue().startswith(b"a \\u732b")


def test_settings_survive_any_text(tmp_path):
    settings = {"source": 'Ünïcode "quotes" \n 😀 <b>', "n": [1, 2.5, None]}
    save_png(tmp_path / "x.png", Image.new("RGB", (8, 8)), settings)
    assert read_settings(tmp_path / "x.png") == settings and CHUNK in Image.open(tmp_path / "x.png").text


def test_grid_grows_with_its_captions():
    pictures = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    short, long = grid(pictures, ["a cat", "a dog"]), grid(pictures, ["a cat", "a dog " * 30])
    assert short.width == long.width and short.height < long.height


def test_choices_on_the_command_line_are_those_of_the_code():
    """They are written out there, so that --help need not import torch."""
    _, commands = parsers()
    choices = {a.dest: set(a.choices) for c in commands.values() for a in c._actions if a.choices}
    assert choices["method"] == set(METHODS) and choices["editor"] == set(EDITORS)
    assert choices["mode"] == set(MODES) and choices["sampler"] == set(SAMPLERS) and choices["timestep_spacing"] == set(SPACINGS)
    assert choices["family"] == set(FAMILIES) and choices["prediction"] == set(PREDICTIONS)

"""Settings inside a picture may be a stranger's: damaged, of the wrong kind or huge, they are refused; whole ones are exact."""
import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import p2p
from p2p.cli import recorded
from p2p.cli.parser import main
from p2p.show.pictures import CHUNK, read_settings, save_png

pytestmark = pytest.mark.usefixtures("once")
SOURCE, TARGET = "a cat on grass", "a dog on grass"
VALUES = [None, True, -1, 10**12, 1e300, "x", [], ["x"], {"x": 1}]


@pytest.fixture(scope="module")
def made(tmp_path_factory, load_once):
    """The settings of an edit of a picture, cropped, with a blend and a mask, and enlarged."""
    folder = tmp_path_factory.mktemp("made")
    Image.effect_noise((160, 90), 100).save(folder / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p2p, "load", load_once)
        assert main(["edit", "--image", str(folder / "photo.png"), SOURCE, TARGET, "--blend", "cat:dog", "--blend-mask", str(folder / "photo.png"),
                     "--weight", "dog=2", "--steps", "2", "--pad", "--upscale", "--upscale-steps", "1", "-q", "-o", str(folder)]) == 0
    (file,) = folder.glob("*/edit.png")
    return read_settings(file), file


def places(value, at=()):
    """All paths into nested settings."""
    if at:
        yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in inside:
        yield from places(v, (*at, k))


@pytest.mark.slow
def test_an_edit_of_a_padded_picture_runs_again_to_the_same_pixels(made, tmp_path, capsys):
    settings, file = made
    assert settings["inversion"]["fit"] == "pad"
    assert main(["edit", "--from", str(file), "-o", str(tmp_path), "-q"]) == 0
    for a in sorted(file.parent.glob("*.png")):
        (b,) = tmp_path.glob(f"*/{a.name}")
        assert a.read_bytes() == b.read_bytes(), a.name


@pytest.mark.slow
def test_no_setting_of_a_stranger_ends_in_anything_but_a_refusal(made, tmp_path, capsys, monkeypatch):
    """Each value replaced by each of many, or left out: the run is refused, or is the network's to do."""
    class Accepted(Exception):
        pass

    def reached(*_, **__):
        raise Accepted

    monkeypatch.setattr(p2p.Model, "predict", reached)
    settings, _ = made
    file, tried = tmp_path / "x.png", 0
    for at in places(settings):
        for value in [*VALUES, "left out"]:
            changed = copy.deepcopy(settings)
            holder = changed
            for k in at[:-1]:
                holder = holder[k]
            if value == "left out":
                del holder[at[-1]]
            else:
                holder[at[-1]] = value
            save_png(file, Image.new("L", (1, 1)), changed)
            try:
                assert main(["edit", "--from", str(file), "-o", str(tmp_path / "out"), "-q"]) in (2, 3), (at, value)
            except Accepted:
                pass
            except Exception as error:
                pytest.fail(f"{at} = {value!r}: {type(error).__name__}: {error}")
            tried += 1
    assert tried > 400


def again(tmp_path, changed, capsys):
    save_png(tmp_path / "x.png", Image.new("L", (1, 1)), changed)
    code = main(["edit", "--from", str(tmp_path / "x.png"), "-o", str(tmp_path / "out"), "-q"])
    return code, capsys.readouterr().err


def without(settings, *path):
    changed = copy.deepcopy(settings)
    holder = changed
    for name in path[:-1]:
        holder = holder[name]
    del holder[path[-1]]
    return changed


@pytest.mark.parametrize("name", ["seed", "steps", "skip", "guidance_scale", "inversion_guidance", "eta"])
@pytest.mark.parametrize("lost", ["left out", "null"])
def test_an_inversion_is_not_made_again_by_guesses(made, tmp_path, capsys, name, lost):
    settings, _ = made   # by edit-friendly, which reads all of them
    changed = without(settings, "inversion", name)
    if lost == "null":
        changed["inversion"][name] = None
    code, said = again(tmp_path, changed, capsys)
    assert code == 2 and f"does not say its {name}, on which the pixels depend" in said


@pytest.mark.parametrize("name", ["mode", "cross_replace_steps", "self_replace_steps", "self_max_tokens", "equalizer", "aligner",
                                  "local_blend.words", "local_blend.substruct", "local_blend.threshold", "local_blend.start",
                                  "local_blend.level", "local_blend.mask"])
def test_nor_is_a_target(made, tmp_path, capsys, name):
    code, said = again(tmp_path, without(made[0], "targets", 0, *name.split(".")), capsys)
    assert code == 2 and f"does not say its {name}, on which the pixels depend" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sha256", "vae", "tile"])
def test_a_model_that_is_not_known_to_be_the_same_is_said_to_be_so(made, tmp_path, capsys, name):
    settings, file = made
    code, said = again(tmp_path, without(settings, name), capsys)
    assert code == 0 and f"does not say the {name} of the model that made it, so nobody can tell" in said
    (picture,) = tmp_path.glob("out/*/edit.png")
    assert Image.open(picture).tobytes() == Image.open(file).tobytes()


@pytest.mark.slow
def test_pictures_of_versions_that_recorded_less_are_not_said_to(made, tmp_path, capsys):
    code, said = again(tmp_path, without(without(made[0], "version"), "tile"), capsys)
    assert code == 0 and "does not say" not in said


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}", '{"command": "edit"}', '{"command": "invert"}', "{" * 9999])
def test_settings_that_are_none_are_refused(text, tmp_path, capsys):
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text(CHUNK, text)
    Image.new("L", (1, 1)).save(tmp_path / "x.png", pnginfo=info)
    assert main(["edit", "--from", str(tmp_path / "x.png"), "-o", str(tmp_path)]) == 2
    assert str(tmp_path / "x.png") in capsys.readouterr().err


def test_settings_are_those_of_json(made):
    settings, file = made
    assert json.loads((file.parent / "settings.json").read_text()) == settings


@pytest.mark.slow
def test_a_negative_prompt_that_a_change_leaves_unread_is_left_out(tmp_path, capsys):
    """--cfg 1 and 0 are no guidance; null-text and negative-prompt inversion have something else in its place."""
    common = ["--steps", "2", "--negative", "night", "-q", "-o", str(tmp_path)]
    assert main(["edit", SOURCE, TARGET, "--seed", "1", *common]) == 0
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    assert main(["edit", "--image", str(tmp_path / "photo.png"), SOURCE, TARGET, "--method", "direct", *common]) == 0
    drawn, real = (next(iter(sorted(tmp_path.glob(f"000{n}-*/edit.png")))) for n in (1, 2))
    capsys.readouterr()
    for file, change, said in ((drawn, ["--cfg", "1"], "without guidance"), (drawn, ["--cfg", "0"], "without guidance"),
                               (real, ["--cfg", "1"], "without guidance"),
                               (real, ["--method", "null-text", "--inner-steps", "1"], "null-text has its own in its place"),
                               (real, ["--method", "negative-prompt"], "negative-prompt has its own in its place")):
        assert main(["edit", "--from", str(file), *change, "-o", str(tmp_path / "again")]) == 0, change
        assert "the negative prompt that is recorded is left out: " in (err := capsys.readouterr().err) and said in err
        made = read_settings(max((tmp_path / "again").glob("*/edit.png")))
        assert made["negative_prompt"] is None
        assert main(["edit", "--from", str(file), *change, "--negative", "fog", "-q", "-o", str(tmp_path / "again")]) == 2
        capsys.readouterr()


def test_emphasis_is_of_brackets_which_a_picture_holds_as_weights(made, tmp_path, capsys):
    for change in (["--emphasis", "embedding"], ["--for", "1", "--emphasis", "attention"]):
        assert main(["edit", "--from", str(made[1]), "-o", str(tmp_path), *change]) == 2
        assert "--emphasis: not with --from, which does as the picture records" in capsys.readouterr().err


@pytest.mark.slow
def test_what_counts_steps_keeps_its_share_when_a_change_makes_them_fewer(tmp_path, capsys):
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    common = ["edit", "--image", str(tmp_path / "photo.png"), SOURCE, TARGET, "--steps", "10", "-q", "-o", str(tmp_path)]
    for method, option, value in (("edit-friendly", "skip", 6), ("flow-edit", "n_min", 3)):
        assert main([*common, "--method", method, f"--{option.replace('_', '-')}", str(value)]) == 0
        file = max(tmp_path.glob("*/edit.png"))
        for more, wanted in ((["--steps", "5"], value * 5 // 10), (["--steps", "5", f"--{option.replace('_', '-')}", "1"], 1), ([], value)):
            assert main(["edit", "--from", str(file), *more, "-q", "-o", str(tmp_path / "again")]) == 0
            assert read_settings(max((tmp_path / "again").glob("*/edit.png")))["inversion"][option] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("command", [["edit", SOURCE, TARGET], ["generate", SOURCE]])
def test_a_sampler_that_is_recorded_changes_nothing_and_another_takes_its_settings_along(tmp_path, capsys, command):
    assert main([*command, "--steps", "2", "--seed", "1", "--eta", "0.5", "--timestep-spacing", "trailing", "-o", str(tmp_path / "a"), "-q"]) == 0
    name = "edit.png" if command[0] == "edit" else "1.png"
    file, = tmp_path.glob(f"a/*/{name}")
    capsys.readouterr()
    for sampler in ("ddim", "dpm++"):
        assert main([command[0], "--from", str(file), "--sampler", sampler, "-o", str(tmp_path / sampler), "-q"]) == 0
        again, = tmp_path.glob(f"{sampler}/*/{name}")
        assert (again.read_bytes() == file.read_bytes()) == (sampler == "ddim")
        lost = "left out, as recorded for another sampler: eta 0.5, timestep_spacing 'trailing'"
        assert (lost in capsys.readouterr().err) == (sampler == "dpm++")


def test_faults_of_a_changed_edit_are_found_before_the_picture_is_inverted(made, tmp_path, capsys, monkeypatch):
    def inverted(*_, **__):
        raise AssertionError("inverted")

    monkeypatch.setattr(p2p, "invert", inverted)
    for change in (["--cross", "zebra=0.3"], ["--weight", "zebra=2"], ["--method", "null-text", "--negative", "fog"]):
        assert main(["edit", "--from", str(made[1]), "-o", str(tmp_path), *change]) == 2, change
    assert "zebra" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_another_method_begins_with_its_own_guidance(tmp_path, narrow, monkeypatch):
    """Which of the former was recorded may be its default: rf-inversion's is 0, the others' 1."""
    picture, seen = Image.effect_noise((64, 64), 100).convert("RGB"), []
    for method, other, wanted in (("rf-inversion", "direct", 1), ("direct", "rf-inversion", 0)):
        p2p.edit(narrow, p2p.invert(narrow, picture, SOURCE, method=method, steps=2), TARGET).save(tmp_path / method)
        with monkeypatch.context() as patch:
            patch.setattr(p2p, "load", lambda *_, **__: narrow)
            patch.setattr(recorded, "_same_model", lambda *_: None)
            patch.setattr(p2p, "invert", lambda *a, real=p2p.invert, **k: seen.append(k) or real(*a, **k))
            assert main(["edit", "--from", str(tmp_path / method / "edit.png"), "--method", other, "-q", "-o", str(tmp_path)]) == 0
        assert seen[-1].get("inversion_guidance", wanted) == wanted and seen[-1]["method"] == other


@pytest.mark.slow
def test_a_rounded_trace_is_replayed_rounded(tmp_path, narrow, monkeypatch):
    inversion = p2p.invert(narrow, Image.effect_noise((64, 64), 100).convert("RGB"), SOURCE, method="direct", steps=2)
    r = p2p.edit(narrow, p2p.trace(narrow, inversion, dtype=torch.bfloat16), TARGET, self_replace_steps=1.0)
    r.save(tmp_path / "made")
    monkeypatch.setattr(p2p, "load", lambda *_, **__: narrow)
    monkeypatch.setattr(recorded, "_same_model", lambda *_: None)
    assert r.settings["inversion"]["queries"] == "bfloat16"
    assert main(["edit", "--from", str(tmp_path / "made" / "edit.png"), "-q", "-o", str(tmp_path)]) == 0
    (again,) = tmp_path.glob("*-*/edit.png")
    assert Image.open(again).tobytes() == r.images[1].tobytes()
    stranger = r.settings | {"inversion": r.settings["inversion"] | {"queries": "load"}}
    save_png(tmp_path / "x.png", r.images[1], stranger)
    assert main(["edit", "--from", str(tmp_path / "x.png"), "-q", "-o", str(tmp_path)]) == 2


@pytest.mark.slow
def test_what_was_enlarged_twice_is_not_replayed_once(emoji, tmp_path, capsys):
    stage, small = p2p.load("emoji-upscaler"), p2p.edit(emoji, SOURCE, TARGET, steps=1, height=16, width=16)
    twice = p2p.upscale(stage, p2p.upscale(stage, small, steps=1), steps=1)
    assert [s["steps"] for s in twice.settings["upscale"]] == [1, 1]
    twice.save(tmp_path / "made")
    assert main(["edit", "--from", str(tmp_path / "made" / "edit.png"), "-o", str(tmp_path)]) == 2
    assert "enlarged 2 times" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_generated_is_generated_again(tmp_path, capsys):
    """Also several at once, with what options change of their sampling alone."""
    argv = ["generate", "a cat", "a red dog", "--steps", "2", "--seed", "3,4", "--negative", "night", "--negative", "fog"]
    assert main([*argv, "-o", str(tmp_path / "a")]) == 0
    first, second, grid = capsys.readouterr().out.split()[:3]
    assert main(["generate", "--from", second, "-o", str(tmp_path / "b")]) == 0
    assert [Path(p).read_bytes() for p in capsys.readouterr().out.split()[:3]] == [Path(p).read_bytes() for p in (first, second, grid)]
    assert main(["generate", "--from", second, "--cfg", "1", "--seed", "5", "-o", str(tmp_path / "c")]) == 0
    told = capsys.readouterr()
    changed = read_settings(told.out.split()[0])
    assert "not as " in told.err and "records: --cfg, --seed" in told.err and "negative prompt that is recorded is left out" in told.err
    asked = read_settings(first) | {"guidance_scale": 1.0, "seed": 5, "negative_prompt": None}
    assert {k: v for k, v in changed.items() if k != "device"} == {k: v for k, v in asked.items() if k != "device"}


@pytest.mark.slow
def test_an_enlarged_one_too(tmp_path, capsys):
    assert main(["generate", "a cat", "--steps", "2", "--seed", "3", "--upscale", "--upscale-steps", "1", "-o", str(tmp_path / "a")]) == 0
    made = capsys.readouterr().out.split()
    assert main(["generate", "--from", made[0], "-o", str(tmp_path / "b")]) == 0
    assert Path(capsys.readouterr().out.split()[0]).read_bytes() == Path(made[0]).read_bytes()


def test_each_command_runs_its_own_again(made, tmp_path, capsys):
    edited = made[1]
    assert main(["generate", "a cat", "--steps", "1", "--seed", "1", "-o", str(tmp_path)]) == 0
    drawn = capsys.readouterr().out.split()[0]
    for argv, said in ((["edit", "--from", drawn], "p2p generate --from runs generate again"), (["generate", "--from", str(edited)], "p2p edit --from runs edits again"),
                       (["generate", "a cat", "--from", drawn], "give either prompts or --from"), (["generate", "--from", drawn, "--tile", "8"], "--tile: not with --from"),
                       (["generate"], "generate needs a prompt"), (["generate", "--from", drawn, "--seed", "1,2"], "seed")):
        assert main([*argv, "-o", str(tmp_path)]) == 2 and said in capsys.readouterr().err, argv


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"prompts": 5}, {"prompts": []}, {"prompts": [5]}, {"prompts": None}, {"seed": None}, {"seed": "x"}, {"steps": {}},
                                    {"negative_prompt": 7}, {"sampler": "x"}, {"upscale": 5}, {"upscale": []},
                                    {"upscale": "enlarged"}])
def test_a_strangers_record_of_generate_is_refused(tmp_path, capsys, change):
    assert main(["generate", "a cat", "--steps", "1", "--seed", "1", "-o", str(tmp_path)]) == 0
    drawn = capsys.readouterr().out.split()[0]
    if change == {"upscale": "enlarged"}:   # by steps that are none
        stage = p2p.load("emoji-upscaler", device="cpu")
        change = {"upscale": {"model": "emoji-upscaler", **stage.identity(), "steps": "abc", "guidance_scale": 1.0, "eta": 0.0, "noise_level": 0,
                              "edited": False}}
    save_png(tmp_path / "strange.png", Image.open(drawn), read_settings(drawn) | change)
    code, said = main(["generate", "--from", str(tmp_path / "strange.png"), "-o", str(tmp_path)]), capsys.readouterr().err
    assert code == 0 if change == {"upscale": []} else code == 2 and "strange.png: " in said

"""Settings of one target, and single settings of a picture's record that are changed."""
import pytest
from PIL import Image

import p2p
from p2p.cli import replay
from p2p.cli.parser import main
from p2p.show.pictures import read_settings

pytestmark = pytest.mark.usefixtures("once")
TARGETS = ["a cat on grass", "a dog on grass", "a red cat on grass"]


def done(capsys, folder, *argv):
    """The settings that a command recorded, and what it said."""
    code = main([*map(str, argv), "-o", str(folder), "-q"] if "--for" not in argv else
                [*map(str, argv[:argv.index("--for")]), "-o", str(folder), "-q", *map(str, argv[argv.index("--for"):])])
    said = capsys.readouterr().err
    assert code == 0, said
    newest = max(folder.iterdir())
    return read_settings(newest / "grid.png"), said, newest


@pytest.mark.slow
def test_options_after_for_are_of_one_target_in_place_of_those_for_all(capsys, tmp_path):
    settings, _, _ = done(capsys, tmp_path, "edit", *TARGETS, "--steps", 1, "--seed", 1, "--cross", 0.6, "--weight", "grass=2",
                          "--for", 2, "--cross", "red=0.3", "--self", "0", "--for=1", "--layers", "up")
    dog, red = settings["targets"]
    assert (dog["cross_replace_steps"], dog["self_replace_steps"], dog["layers"]) == (0.6, 0.4, ["up"])
    assert (red["cross_replace_steps"], red["self_replace_steps"], red["layers"]) == ({"red": 0.3}, 0, None)
    assert dog["equalizer"] == red["equalizer"] == {"grass": 2}


def test_a_blend_for_all_may_have_a_threshold_of_one(capsys, tmp_path):
    settings, _, _ = done(capsys, tmp_path, "edit", *TARGETS, "--steps", 1, "--seed", 1, "--blend", "grass", "--for", 1,
                          "--blend-threshold", 0.5)
    assert [t["local_blend"]["threshold"] for t in settings["targets"]] == [0.5, 0.3]
    assert all(t["local_blend"]["words"] == [["grass"], ["grass"]] for t in settings["targets"])


@pytest.mark.slow
def test_maps_of_several_targets_too(capsys, tmp_path):
    code = main(["maps", *TARGETS, "--steps", "1", "--seed", "1", "-o", str(tmp_path), "-q", "--for", "2", "--cross", "0.1"])
    settings = read_settings(next(tmp_path.glob("*/source.png")))
    assert code == 0 and [t["cross_replace_steps"] for t in settings["targets"]] == [0.8, 0.1]


@pytest.mark.parametrize("after, said", [
    ([], "the number of a target is needed"), (["x", "--cross", "1"], "--for x: the number"), (["2"], "options for it"),
    (["2", "--steps", "5"], "--steps 5: not of one target; give it before"), (["3", "--cross", "1"], "--for 3: there are 2 targets"),
    (["0", "--cross", "1"], "--for 0: there are 2"), (["2", "--cross", "1", "--for", "2", "--self", "1"], "once"),
    (["1", "--blend-threshold", "0.4"], "need --blend"), (["2", "--cross", "x"], "'x' is not a number")])
def test_a_target_that_is_not_there_and_options_that_are_not_its_own_are_refused(capsys, after, said):
    assert main(["edit", *TARGETS, "--for", *after]) == 2 and said in capsys.readouterr().err
    assert main(["edit", *TARGETS, "--fo", *after]) == 2


def test_an_editor_reads_no_window_of_one_target_either(capsys):
    assert main(["edit", *TARGETS, "--editor", "masactrl", "--for", "1", "--cross", "0.3"]) == 2
    assert "--cross: not with --editor" in capsys.readouterr().err
    assert main(["maps", "a cat", "--for", "1", "--cross", "0.3"]) == 2
    assert main(["sweep", "a cat", "a dog", "--over", "cross=0,1", "--for", "1", "--cross", "0.3"]) == 2


# ------------------------------------------------------------------------------------------------- --from

@pytest.fixture(scope="module")
def made(tmp_path_factory, load_once):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p2p, "load", load_once)
        assert main(["edit", *TARGETS, "--steps", "4", "--seed", "3", "--self", "0.5", "--blend", "grass", "-q", "-o", str(folder)]) == 0
    return next(folder.glob("*/grid.png"))


@pytest.fixture(scope="module")
def real(tmp_path_factory, load_once):
    folder = tmp_path_factory.mktemp("real")
    Image.effect_noise((90, 64), 90).save(folder / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p2p, "load", load_once)
        assert main(["edit", "--image", str(folder / "photo.png"), *TARGETS[:2], "--steps", "4", "-q", "-o", str(folder)]) == 0
    return next(folder.glob("*/edit.png"))


def differing(a, b):
    return {k for k in a | b if a.get(k) != b.get(k)}


def of_targets(a, b):
    return [differing(x, y) for x, y in zip(a["targets"], b["targets"])]


@pytest.mark.slow
@pytest.mark.parametrize("changes, at", [
    (["--cross", 0.3], "cross_replace_steps"), (["--self", "0:0.2"], "self_replace_steps"), (["--weight", "grass=2"], "equalizer"),
    (["--layers", "up"], "layers"), (["--blend-threshold", 0.4], "local_blend"), (["--renormalise"], "renormalise")])
def test_one_setting_of_an_edit_is_changed_and_all_else_is_kept(capsys, tmp_path, made, changes, at):
    old = read_settings(made)
    new, said, _ = done(capsys, tmp_path, "edit", "--from", made, *changes)
    assert differing(old, new) == {"targets"} and of_targets(old, new) == [{at}, {at}]
    assert f"not as {made} records: {changes[0]}" in said
    if at == "local_blend":
        assert differing(old["targets"][0][at], new["targets"][0][at]) == {"threshold"}


@pytest.mark.slow
def test_what_is_said_of_words_and_kinds_is_changed_of_these_alone(capsys, tmp_path):
    common = ["edit", "a cat on grass", "a big dog on grass", "--steps", 1, "--seed", 3]
    old, _, folder = done(capsys, tmp_path, *common, "--weight", "grass=2", "--weight", "dog=3", "--swap", "cat=dog", "--cross", "0.5",
                          "--cross", "dog=0.3", "--layers", "cross=up")
    new, _, folder = done(capsys, tmp_path, "edit", "--from", folder / "grid.png", "--weight", "Dog=1.5", "--cross", "grass=0.2", "--layers", "self=down")
    assert of_targets(old, new) == [{"equalizer", "cross_replace_steps", "layers"}]
    (target,) = new["targets"]
    assert target["equalizer"] == {"grass": 2, "Dog": 1.5} and target["layers"] == {"cross": ["up"], "self": ["down"]}
    assert target["cross_replace_steps"] == {"default_": 0.5, "dog": 0.3, "grass": 0.2}
    new, _, _ = done(capsys, tmp_path, "edit", "--from", folder / "grid.png", "--cross", "0.8", "--swap", "grass=dog")
    (target,) = new["targets"]
    assert target["cross_replace_steps"] == {"default_": 0.8, "dog": 0.3, "grass": 0.2} and target["swap"] == {"grass": "dog"}


@pytest.mark.parametrize("recorded, given, merged", [
    ({"cat#1": 1.1, "red": 2}, {"cat": 3}, {"red": 2, "cat": 3}), ({"cat": 1.1}, {"cat#1": 3}, {"cat": 1.1, "cat#1": 3}),
    ({"Cat": 1.1}, {"cat": 3}, {"cat": 3}), (None, {"cat": 3}, {"cat": 3})])
def test_a_weight_takes_the_place_of_all_that_is_recorded_of_its_word(recorded, given, merged):
    assert replay._merged("equalizer", recorded, given) == merged


def test_swaps_of_other_words_stay():
    assert replay._merged("swap", {"cat": "dog", "car": "boat"}, {"Cat": "bird"}) == {"car": "boat", "Cat": "bird"}


@pytest.mark.slow
def test_the_windows_of_a_record_that_names_no_words_stay_those_of_all_others(capsys, tmp_path, made):
    new, _, _ = done(capsys, tmp_path, "edit", "--from", made, "--cross", "grass=0.2", "--layers", "cross=up")
    was = read_settings(made)["targets"][0]["cross_replace_steps"]
    assert [t["cross_replace_steps"] for t in new["targets"]] == [{"default_": was, "grass": 0.2}] * 2
    assert [t["layers"] for t in new["targets"]] == [{"cross": ["up"]}] * 2


def test_one_kind_of_layers_beside_a_record_of_both_is_refused(capsys, tmp_path):
    _, _, folder = done(capsys, tmp_path, "edit", "a cat on grass", "a dog on grass", "--steps", 1, "--seed", 3, "--layers", "up")
    assert main(["edit", "--from", str(folder / "grid.png"), "--layers", "cross=down", "-o", str(tmp_path)]) == 2
    assert "--layers cross=...: the picture records the same layers for both kinds" in capsys.readouterr().err


@pytest.mark.slow
def test_of_one_target_alone(capsys, tmp_path, made):
    new, said, _ = done(capsys, tmp_path, "edit", "--from", made, "--for", 2, "--cross", 0.3)
    assert of_targets(read_settings(made), new) == [set(), {"cross_replace_steps"}] and "--for" in said


@pytest.mark.slow
@pytest.mark.parametrize("changes, names", [
    (["--seed", 9], {"seed"}), (["--steps", 3], {"steps"}), (["--cfg", 2], {"guidance_scale"}), (["--negative", "dog"], {"negative_prompt"}),
    (["--eta", 0.5], {"eta"}), (["--proximal", "l0"], {"proximal"}), (["--height", 128], {"height"}), (["--width", 128], {"width"}),
    (["--sampler", "dpm++"], {"sampler"}), (["--timesteps", "900,500,100"], {"timesteps", "steps"}),
    (["--timestep-spacing", "trailing"], {"timestep_spacing"})])
def test_one_setting_of_the_sampling(capsys, tmp_path, made, changes, names):
    new, _, folder = done(capsys, tmp_path, "edit", "--from", made, *changes)
    assert differing(read_settings(made), new) == names
    again, said, _ = done(capsys, tmp_path, "edit", "--from", folder / "grid.png")   # what was changed is recorded
    assert again == new and "not as" not in said


@pytest.mark.slow
@pytest.mark.parametrize("changes, names", [
    (["--seed", 9], {"seed"}), (["--eta", 0.5], {"eta"}), (["--skip", 1], {"skip", "latents"}), (["--inversion-cfg", 2], {"inversion_guidance", "rows"}),
    (["--method", "ddim"], {"method", "eta", "seed", "rows"})])
def test_one_setting_of_an_inversion(capsys, tmp_path, real, changes, names):
    new, _, _ = done(capsys, tmp_path, "edit", "--from", real, *changes)
    old = read_settings(real)
    assert of_targets(old, new) == [set()]
    assert differing(old["inversion"], new["inversion"]) - {"rows"} == names - {"rows", "latents"}


@pytest.mark.parametrize("argv", [["--steps", "3", "--timesteps", "900,1"], ["--skip", "1"], ["--for", "3", "--cross", "1"],
                                  ["--weight", "bird=2"], ["--mode", "replace"], ["--editor", "masactrl"], ["--image", "x.png"],
                                  ["--prediction", "eps"], ["--dtype", "float16"], ["--fit", "pad"], ["--clip-skip", "1"]])
def test_what_cannot_be_changed_is_refused(capsys, tmp_path, made, argv):
    assert main(["edit", "--from", str(made), "-q", "-o", str(tmp_path / "out"), *argv]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("p2p: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--sampler", "ddim"], ["--height", "128"], ["--blend-threshold", "0.2"]])
def test_what_cannot_be_changed_of_a_real_picture_is_refused(capsys, tmp_path, real, argv):
    assert main(["edit", "--from", str(real), "-q", "-o", str(tmp_path / "out"), *argv]) == 2
    assert argv[0] in capsys.readouterr().err.replace("of --blend need", "--blend-threshold")

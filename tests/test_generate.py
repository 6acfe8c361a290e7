"""p2p generate: a list of seeds, and pictures that are enlarged."""
import pytest
import torch

import p2p
from p2p.cli.parser import main
from p2p.image import from_pil, open_picture
from p2p.show.pictures import read_settings

pytestmark = pytest.mark.usefixtures("once")


def made(capsys, tmp_path, *argv):
    assert main(["generate", *argv, "--steps", "2", "-o", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    return out.split(), err


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "a dog", "a bird"]])
def test_a_picture_for_each_seed(capsys, tmp_path, narrow, prompts):
    files, said = made(capsys, tmp_path, *prompts, "--seed", "3,1,2")
    assert len(files) == 4 and "seed" not in said
    settings = read_settings(files[0])
    assert settings["seed"] == [3, 1, 2] and settings["prompts"] == (prompts * 3)[:3]
    for file, prompt, seed in zip(files, prompts * 3, (3, 1, 2)):
        alone = p2p.generate(narrow, prompt, seed=seed, steps=2).images[0]
        assert (from_pil(open_picture(file)) - from_pil(alone)).abs().max() < 0.02   # up to rounding in a batch


@pytest.mark.parametrize("argv, said", [(["a", "b", "--seed", "1,2,3"], "3 seeds and 2 prompts"), (["a", "--seed", "1,x"], "invalid int value"),
                                        (["a", "--seed", "1,"], "invalid int value"), (["a", "--upscale-steps", "3"], "not without --upscale"),
                                        (["a", "--upscale-edited", "--upscale"], "unrecognized")])
def test_lists_that_do_not_fit_are_refused(capsys, argv, said):
    assert main(["generate", *argv]) == 2 and said in capsys.readouterr().err
    assert main(["edit", "a cat", "a dog", "--seed", "1,2"]) == 2


@pytest.mark.slow
def test_generated_pictures_are_enlarged(capsys, tmp_path, narrow):
    files, _ = made(capsys, tmp_path, "a cat", "--seed", "1,2", "--upscale", "--upscale-steps", "1")
    assert [f.rpartition("/")[2] for f in files] == ["1.png", "2.png", "grid.png", "small.png"]
    small = p2p.generate(narrow, ["a cat"] * 2, seed=[1, 2], steps=2)
    large = p2p.upscale("emoji-upscaler", small, steps=1)
    assert open_picture(files[0]).size == (256, 256) and read_settings(files[0])["upscale"]["steps"] == 1
    assert torch.equal(from_pil(open_picture(files[1])), from_pil(large.images[1]))

"""DeepFloyd IF's super-resolution stage after an edit: what it is told, and what it injects."""
from pathlib import Path

import pytest
import torch
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.request.start import Low
from p2p.show.pictures import read_settings


@pytest.mark.slow
def test_cascade(stages):
    """Four times larger, prompts and noise shared: equal small pictures stay equal, and so do their neighbours' pixels."""
    model, upscaler = p2p.load(stages[0], device="cpu"), p2p.load(stages[1], device="cpu")
    small = p2p.edit(model, "a red cat on grass", ["a red dog on grass", "a red cat on grass"], steps=3, height=8, width=16, seed=2)
    large = p2p.upscale(upscaler, small, steps=3)
    assert [i.size for i in large.images] == [(64, 32)] * 3 and large.rows > small.rows
    assert (large.latents[2] - large.latents[0]).abs().max() < 1e-3 < (large.latents[1] - large.latents[0]).abs().max()
    assert large.settings["targets"] == small.settings["targets"] and large.settings["upscale"]["noise_level"] == 250
    edited = p2p.upscale(upscaler, small, steps=3, edited=True)
    assert (edited.latents[0] - large.latents[0]).abs().max() < 1e-3 < (edited.latents[1] - large.latents[1]).abs().max()
    led = p2p.edit(model, "a red cat on grass", ["a red dog on grass", "a red cat on grass"], steps=3, height=8, width=16, seed=2,
                   negative_prompt="a bird")
    led.images = small.images   # the stage alone
    away = p2p.upscale(upscaler, led, steps=3)
    assert (away.latents - large.latents).abs().max() > 1e-3
    assert torch.equal(p2p.upscale(upscaler, led, steps=3, guidance_scale=1).latents, p2p.upscale(upscaler, small, steps=3, guidance_scale=1).latents)
    with pytest.raises(p2p.UsageError, match="is a super-resolution stage"):
        p2p.generate(upscaler, "a cat")
    with pytest.raises(p2p.UsageError, match="is no super-resolution stage"):
        p2p.upscale(model, small)


def test_low_resolution_picture_is_noised_as_said(stages):
    """At level 0 next to no noise lies on it; its noise is another than x_T, and the same for all rows."""
    upscaler = p2p.load(stages[1], device="cpu")
    low = torch.rand(1, 3, 8, 8).expand(2, -1, -1, -1) * 2 - 1
    seen = {}

    def spy(model, x, text, null, schedule, *rest, **how):
        seen.update(x=x, text=text, null=null)
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2p.run.denoise", spy)
        for level in (0, 500, 999):
            with pytest.raises(StopIteration):
                p2p.generate(upscaler, ["a cat", "a dog"], low=Low(low, level), seed=5)
            told = seen["text"]
            assert torch.equal(told.low[0], told.low[1]) and told.level.tolist() == [level] * 2 and torch.equal(seen["null"].low, told.low)
            large = torch.nn.functional.interpolate(low, scale_factor=4, mode="bilinear", align_corners=True)
            if level == 0:
                assert (told.low - large).std() < 0.02
            elif level == 500:
                a = float(upscaler.alphas_cumprod[500])
                assert (told.low - a**0.5 * large).std().item() == pytest.approx((1 - a) ** 0.5, rel=0.05)
            else:
                assert abs(told.low.std() - 1) < 0.1 and (told.low - seen["x"]).std() > 1


@pytest.mark.slow
def test_cascade_from_the_command_line(stages, tmp_path, capsys):
    one, two = map(str, stages)
    argv = ["edit", "a red cat on grass", "a red dog on grass", "--model", one, "--steps", "2", "--height", "16", "--width", "16",
            "--seed", "4", "-o", str(tmp_path)]
    assert main([*argv, "--upscaler", two, "--upscale-steps", "2"]) == 0
    source, edit, grid, small = capsys.readouterr().out.split()
    assert [Image.open(f).size for f in (source, edit)] == [(64, 64)] * 2 and read_settings(edit)["upscale"]["steps"] == 2
    assert main(["edit", "--from", edit, "-o", str(tmp_path)]) == 0
    again = capsys.readouterr().out.split()
    assert [Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(again, (source, edit, grid, small))] == [True] * 4
    assert main([*argv, "--upscale"]) == 2 and "name one with --upscaler" in capsys.readouterr().err
    assert main([*argv, "--upscale-steps", "2"]) == 2 and "not without --upscale" in capsys.readouterr().err
    assert main([*argv, "--upscaler", one]) == 2 and "is no super-resolution stage" in capsys.readouterr().err


@pytest.mark.slow
def test_an_edit_that_the_stage_does_not_take_is_refused_before_anything_runs(stages, tmp_path, capsys, monkeypatch):
    """Layers at a depth that stage I has, of 7, and the upscaler, of 9, has not."""
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("the network ran"))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for more in ([], ["--image", str(tmp_path / "a.png")]):
        argv = ["edit", "a red cat on grass", "a red (dog:1.5) on grass", "--model", str(stages[0]), "--steps", "2", "-o", str(tmp_path / "out"),
                "--upscaler", str(stages[1]), "--layers", "0.35:0.36", *more]
        assert main([*argv, "--upscale-edited"]) == 2
        assert f"--upscale-edited: of {stages[1]}, layers: none is chosen by" in capsys.readouterr().err
        with pytest.raises(pytest.fail.Exception):
            main(argv)


@pytest.mark.slow
def test_a_stage_computes_in_the_dtype_that_is_asked_for_or_recorded(stages, tmp_path, capsys, monkeypatch):
    """Each network runs once: without hardware for bfloat16 that takes long, and the numbers say nothing here."""
    computed, network = [], p2p.Model.predict

    def predict(self, x, *told, **how):
        computed.append(self.dtype)
        if len(computed) <= 2:
            return network(self, x, *told, **how)
        return torch.zeros_like(x), torch.zeros_like(x), {}

    monkeypatch.setattr(p2p.Model, "predict", predict)
    argv = ["edit", "a red cat on grass", "a red dog on grass", "--model", str(stages[0]), "--steps", "1", "--height", "8", "--width", "8",
            "--seed", "4", "-o", str(tmp_path), "-q"]
    assert main([*argv, "--upscaler", str(stages[1]), "--upscale-steps", "1", "--dtype", "bfloat16"]) == 0
    assert read_settings(max(tmp_path.glob("*/edit.png")))["upscale"]["dtype"] == "bfloat16"
    assert computed == [torch.bfloat16] * 2   # a step of each stage
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    picture = max(tmp_path.glob("*/edit.png"))
    assert main(["edit", "--from", str(picture), "--upscaler", str(stages[1]), "--upscale-steps", "1", "-o", str(tmp_path), "-q"]) == 0
    assert read_settings(max(tmp_path.glob("*/edit.png")))["upscale"]["dtype"] == "bfloat16"
    assert computed == [torch.bfloat16] * 5   # and three more

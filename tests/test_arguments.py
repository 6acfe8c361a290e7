"""Arguments of the wrong kind are refused in words that name them: no other error, whatever the value."""
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import p2p
from p2p.request.start import Low
from p2p.run import Result
from p2p.show.sweep import sweep

SOURCE, TARGET = "a cat on grass", "a dog on grass"
PICTURE = Image.new("RGB", (64, 64), (90, 150, 20))


class Accepted(Exception):
    """The network was reached: all arguments were taken."""


def deep() -> list:
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    return nested


HOSTILE = [None, True, -1, 0, 3, 10**30, 10**400, 1.5, -0.5, 1e300, float("nan"), float("inf"), float("-inf"), 3j, "x", "", "\ud800",
           "dog", b"x", [], [None], ["x"], [1, 2], [["x"], ["y"]], (), ("l0",), ("l0", "x"), ("x", 0.5), {}, {"x": object()}, {1: 2},
           {"dog": None}, {"dog": "x"}, {"dog": 2.0}, {"name": ["x"]}, {"name": "masactrl", "start": "x"}, set(), object(), int, len,
           range(3), deep(), Decimal(1), Fraction(1, 2), np.float32(0.5), np.int64(2), np.array([1, 2]), np.array(["x", "y"]),
           np.zeros((8, 8, 3)), torch.tensor([0.1, 0.2]), torch.tensor(1.0), torch.zeros(0), torch.zeros(1, 3, 64, 64, dtype=torch.cfloat),
           torch.zeros(1, 3, 64, 64), torch.zeros(8, 8), torch.float16, torch.int8, Image.new("RGB", (0, 5)), Image.new("F", (8, 8)),
           Path("absent.png"), Path("absent\0.png"), p2p.Edit(TARGET), p2p.Record(text=64), p2p.LocalBlend(), p2p.MasaCtrl()]


@pytest.fixture
def stopped(monkeypatch):
    """Models whose network says that it was reached."""
    def reached(*args, **kwargs):
        raise Accepted

    monkeypatch.setattr(p2p.Model, "predict", reached)
    monkeypatch.setattr("p2p.weights.load.load", reached)


@pytest.fixture(scope="module")
def small(emoji):
    return Result([PICTURE] * 2, torch.zeros(2, 3, 64, 64), [SOURCE, TARGET], {
        "seed": 1, "command": "edit", "editor": None, "targets": [{"prompt": TARGET, "mode": "replace"}]})


@pytest.fixture(scope="module")
def upscaler():
    return p2p.load("emoji-upscaler", device="cpu")


def edited(model, **given):
    return p2p.edit(model, **{"source": SOURCE, "targets": TARGET, "steps": 2} | given)


def inverted(model, **given):
    return p2p.invert(model, **{"picture": PICTURE, "prompt": SOURCE, "steps": 2} | given)


ENTRANCES = {
    "edit": (edited, ["model", "source", "targets", "steps", "guidance_scale", "seed", "x_T", "eta", "height", "width", "proximal",
                      "editor", "negative_prompt", "low", "record", "progress", "mode", "cross_replace_steps", "self_replace_steps",
                      "self_max_tokens", "windows_over", "equalizer", "renormalise", "swap", "local_blend", "scope", "aligner"]),
    "Edit": (lambda model, **given: edited(model, targets=[TARGET, p2p.Edit(**{"prompt": TARGET} | given)]),
             ["prompt", "mode", "cross_replace_steps", "equalizer", "local_blend"]),
    "LocalBlend": (lambda model, **given: edited(model, local_blend=p2p.LocalBlend(**{"words": ("cat", "dog")} | given)),
                   ["words", "substruct", "rivals", "threshold", "start", "level", "keep", "middle", "mask"]),
    "Record": (lambda model, **given: p2p.generate(model, SOURCE, steps=2, record=p2p.Record(**given)), list(p2p.Record._fields)),
    "MasaCtrl": (lambda model, **given: edited(model, editor=p2p.MasaCtrl(**given)), ["start", "layers"]),
    "PlugAndPlay": (lambda model, **given: edited(model, editor=p2p.PlugAndPlay(**given)), ["features", "attention", "source_prompt"]),
    "generate": (lambda model, **given: p2p.generate(model, **{"prompts": SOURCE, "steps": 2} | given),
                 ["model", "prompts", "steps", "guidance_scale", "seed", "x_T", "eta", "height", "width", "negative_prompt", "low",
                  "record", "progress"]),
    "invert": (inverted, ["model", "picture", "prompt", "method", "steps", "skip", "guidance_scale", "inversion_guidance", "eta", "seed",
                          "final_alpha", "sampler", "timestep_spacing", "timesteps", "height", "width", "fit", "progress"]),
    "invert by a solver": (lambda model, **given: inverted(model, method="fixed-point", **given), ["inner_steps"]),
    "trace": (lambda model, **given: p2p.trace(model, **{"source": SOURCE, "steps": 2} | given),
              ["model", "source", "dtype", "latents_only", "progress", "steps", "timestep_spacing", "timesteps", "guidance_scale", "seed",
               "x_T", "height", "width"]),
    "sweep": (lambda model, **given: sweep(model, **{"source": SOURCE, "target": TARGET, "over": {"cross": [0.5]}, "steps": 2} | given),
              ["model", "source", "target", "over", "seed"]),
    "sweep over": (lambda model, **given: sweep(model, SOURCE, TARGET, given, steps=2), ["cross", "self", "weight:dog", "seed", "x"]),
    "load": (lambda model, **given: p2p.load(**{"source": "emoji", "device": "cpu"} | given),
             ["source", "family", "prediction", "device", "dtype", "vae", "text", "compile", "held", "offload", "tile",
              "ema", "clip_skip", "zero_snr"]),
    "Low": (lambda model, **given: p2p.generate(
        model, SOURCE, steps=2, low=Low(**{"pictures": torch.zeros(1, 3, 16, 16), "noise_level": 0} | given)), ["pictures", "noise_level"]),
    "upscale": (lambda model, **given: p2p.upscale(model, **{"steps": 2} | given),
                ["model", "small", "steps", "guidance_scale", "eta", "noise_level", "edited", "progress"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("entrance, name", [(e, name) for e, (_, names) in ENTRANCES.items() for name in names])
def test_hostile_arguments_are_named_or_taken(emoji, upscaler, small, stopped, tmp_path, monkeypatch, entrance, name):
    monkeypatch.chdir(tmp_path)
    call = ENTRANCES[entrance][0]
    usual = {"model": upscaler if entrance in ("upscale", "Low") else emoji} | ({"small": small} if entrance == "upscale" else {})
    for value in HOSTILE:
        try:
            call(**usual | {name: value})
        except (Accepted, p2p.UsageError, p2p.CheckpointError) as error:
            assert len(str(error)) < 2000
        except Exception as error:
            pytest.fail(f"{entrance}({name}={value!r:.80}): {type(error).__name__}: {error}")


@pytest.mark.parametrize("name, value", [("steps", "x"), ("guidance_scale", float("nan")), ("seed", 1.5), ("eta", 2), ("editor", "x"),
                                         ("local_blend", {"words": ["a", "b"]}), ("mode", ["x"]), ("aligner", 3), ("record", 64)])
def test_the_message_names_the_argument(emoji, name, value):
    with pytest.raises(p2p.UsageError, match=name):
        edited(emoji, **{name: value})


@pytest.mark.slow
def test_names_stand_for_models_pictures_and_inversions(emoji, tmp_path, monkeypatch):
    monkeypatch.setattr("p2p.request.loading.load", lambda source: emoji if source == "emoji" else pytest.fail(source))
    assert p2p.generate("emoji", SOURCE, steps=1).images[0].size == (64, 64)
    assert torch.equal(edited("emoji", steps=1, editor="masactrl").latents, edited(emoji, steps=1, editor=p2p.MasaCtrl()).latents)
    with pytest.raises(p2p.UsageError, match="editor 'masa' is not known"):
        edited("emoji", steps=1, editor="masa")
    PICTURE.save(tmp_path / "x.png")
    found = inverted("emoji", picture=tmp_path / "x.png", steps=1)
    assert torch.equal(found.latents, inverted(emoji, picture=str(tmp_path / "x.png"), steps=1).latents)
    found.save(tmp_path / "x.safetensors")
    r = p2p.edit("emoji", tmp_path / "x.safetensors", TARGET)
    assert torch.equal(r.latents, p2p.edit(emoji, found, TARGET).latents)
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(tmp_path / "half.png")
    named, made = (edited(emoji, steps=1, local_blend=p2p.LocalBlend(mask=m)) for m in (tmp_path / "half.png", half))
    assert torch.equal(named.masks, made.masks) and 0 < named.masks.float().mean() < 1


def test_numbers_of_numpy_are_recorded_as_plain_ones(emoji):
    import json
    r = edited(emoji, steps=np.int64(1), seed=np.int64(3), guidance_scale=np.float32(2), eta=np.float64(0.5),
               equalizer={"dog": np.float32(2)}, cross_replace_steps=(np.float64(0), np.float64(0.5)), self_max_tokens=np.int32(64),
               local_blend=p2p.LocalBlend(words=("cat", "dog"), threshold=np.float64(0.3), start=np.float64(0), level=np.int64(4)))
    assert json.loads(json.dumps(r.settings))["seed"] == 3

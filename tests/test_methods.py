"""Methods of what p2p gives back (models, inversions, maps), called with anything at all: one clear refusal, or an answer."""
import inspect

import pytest
import torch
from PIL import Image
from test_arguments import HOSTILE, SOURCE

import p2p
from p2p.maps import AttentionMaps
from p2p.model import Conditioning

NAN = torch.full((1, 3, 64, 64), float("nan"))
VALUES = [*HOSTILE, torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64), torch.zeros(0, 3, 64, 64), torch.zeros(1, 3, 64, 64).to_sparse(),
          torch.zeros(1, 3, 64, 64, dtype=torch.long), NAN, (16, 16), [0], range(2), slice(2), iter("ab"), "text", "pixels", "dog"]


@pytest.fixture(scope="module")
def things(emoji):
    """One of each, and arguments of its methods that are taken."""
    inverted = p2p.invert(emoji, Image.new("RGB", (64, 64)), SOURCE, method="noise", steps=2)
    maps = p2p.generate(emoji, SOURCE, steps=1, record=p2p.Record(text=64, pixels=64)).maps
    conditioning = emoji.condition([SOURCE])
    x = torch.zeros(1, 3, 64, 64)
    return {"Model": (emoji, {"prompt": SOURCE, "prompts": [SOURCE], "conditioning": conditioning, "timesteps": torch.tensor([500]), "x": x, "t": 500, "n": 1,
                              "steps": 2, "image": x, "latents": x, "height": 64, "width": 64, "edit": None, "watch": ()}),
            "Inversion": (inverted, {"model": emoji, "file": "x.safetensors"}),
            "AttentionMaps": (maps, {"row": 0, "word": "cat", "count": 2, "columns": "text", "path": "x.npz", "ends": True})}


KINDS = {"Model": p2p.Model, "Inversion": p2p.Inversion, "AttentionMaps": AttentionMaps}
INSIDE = ("edit", "watch", "selection")   # of `predict`: what the loop makes
METHODS = [(kind, name, parameter) for kind, cls in KINDS.items() for name, method in inspect.getmembers(cls, inspect.isfunction)
           if not name.startswith("_") for parameter in inspect.signature(method).parameters if parameter not in ("self", *INSIDE)]


def called(things, kind, name, given):
    thing, usual = things[kind]
    method = getattr(thing, name)
    usual = {k: v for k, v in usual.items() if (name, k) != ("schedule", "timesteps")} | {"guidance_scale": 2.0}
    usual = usual | ({"conditioning": thing.read(usual["conditioning"])} if name == "times" else {})
    known = inspect.signature(method).parameters
    return method(**{k: v for k, v in usual.items() if k in known} | given)


@pytest.mark.parametrize("kind, name", sorted({(kind, name) for kind, name, _ in METHODS}))
def test_what_is_taken(things, kind, name, tmp_path, monkeypatch):
    """So that the refusals below are of the one argument that is wrong."""
    monkeypatch.chdir(tmp_path)
    things["Inversion"][0].save("x.safetensors")
    called(things, kind, name, {})


@pytest.mark.slow
@pytest.mark.parametrize("kind, name, parameter", METHODS)
def test_whatever_is_given_is_taken_or_refused(things, kind, name, parameter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in VALUES:
        if parameter == "t" and isinstance(value, dict):   # it is of the kind that `times` gives
            continue
        try:
            called(things, kind, name, {parameter: value})
        except (p2p.UsageError, p2p.NumericsError, OSError) as error:
            assert len(str(error)) < 2000
            assert not isinstance(error, OSError) or name == "save", f"{value!r:.80}"
        except Exception as error:
            pytest.fail(f"{kind}.{name}({parameter}={value!r:.80}): {type(error).__name__}: {error}")


@pytest.mark.parametrize("call, said", [
    (lambda m, i: m.decode(None), "latents must be a tensor of floating-point numbers .B, 3, H, W., not None"),
    (lambda m, i: m.decode(torch.zeros(1, 4, 8, 8)), r"not torch.float32 of .1, 4, 8, 8."),
    (lambda m, i: m.predict(torch.zeros(1, 3, 64, 64), 5, None), "conditioning must be of the type Conditioning, not None"),
    (lambda m, i: m.predict(torch.zeros(1, 3, 64, 64), None, Conditioning(torch.zeros(1, 2, 3))), "t must be of the type int or float or Tensor or dict"),
    (lambda m, i: m.tokens(None), "prompt must be of the type str, not None"), (lambda m, i: m.schedule(None), "steps must be a whole number"),
    (lambda m, i: m.null("x"), "n must be a whole number"), (lambda m, i: m.text([None]), "prompts are a text or a list of texts"),
    (lambda m, i: i.save(None), "file must be a path, not None"), (lambda m, i: i.save("x\0"), "file must be a path"),
    (lambda m, i: i.load(None), "file must be a path, not None"), (lambda m, i: i.check(None), "model must be of the type Model, not None")])
def test_the_message_names_what_is_wrong(things, emoji, call, said):
    with pytest.raises(p2p.UsageError, match=said):
        call(emoji, things["Inversion"][0])

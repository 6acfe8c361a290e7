"""torch.compile: one graph serves every edit of a batch's shape, whatever its windows; a GPU would never be waited for."""
import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

import p2p

SOURCE = "a cat on grass"
EDITS = [
    p2p.Edit("a dog on grass", cross_replace_steps=(0.25, 0.75), self_replace_steps=(0.25, 0.5)),
    p2p.Edit("a big red cat on grass", cross_replace_steps={"default_": 0.5, "cat": 1.0}, self_replace_steps=0.0),
    p2p.Edit(SOURCE, equalizer={"cat": 2.0}),
]


@pytest.fixture
def traced(shallow):
    """A model whose UNet is captured by torch.compile and run as it is: no code is generated, so this takes seconds."""
    torch._dynamo.reset()
    counters.clear()
    unet = copy.deepcopy(shallow.unet)
    unet.compile(backend="eager")
    yield replace(shallow, unet=unet, compiled=True)
    torch._dynamo.reset()


@pytest.mark.slow
def test_one_graph_for_all_edits_and_windows(traced, shallow):
    for edit in EDITS:
        got = p2p.edit(traced, SOURCE, edit, steps=4, seed=1).latents
        assert (got - p2p.edit(shallow, SOURCE, edit, steps=4, seed=1).latents).abs().max() < 1e-4
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
def test_a_blend_adds_no_graph_of_its_own(traced):
    blend = p2p.LocalBlend(words=("cat", "dog"), start=0.5)
    for words in ("a dog on grass", "a cat at night"):
        p2p.edit(traced, SOURCE, p2p.Edit(words, local_blend=blend if "dog" in words else p2p.LocalBlend(words=("cat", "cat"))),
                 steps=3, seed=1)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
def test_an_inversion_is_one_graph(traced):
    p2p.invert(traced, Image.new("RGB", (64, 64), "green"), SOURCE, method="ddim", steps=3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_load_compiles_on_request(monkeypatch):
    asked = []
    monkeypatch.setattr("p2p.models.unet.UNet.compile", lambda self: asked.append(self))
    assert p2p.load("emoji").unet not in asked and asked == []
    model = p2p.load("emoji", compile=True)
    assert model.unet in asked and model.compiled

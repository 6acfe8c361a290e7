"""State belongs to a run: threads that share a model get the pixels of runs alone."""
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

import p2p
from p2p.request.offload import at_work

SOURCE = "a cat on grass"


def runs(model):
    """Different edits, inversions and pictures, each with what of it must be the same again."""
    blend = p2p.LocalBlend(words=("cat", "cat"), level=4 if model.vae is None else 1)
    picture = Image.linear_gradient("L").resize((32, 32))
    size = dict(height=32, width=32)
    return [
        lambda: p2p.edit(model, SOURCE, "a dog on grass", steps=3, seed=1, **size).latents,
        lambda: p2p.edit(model, SOURCE, ["a cat on grass at night", "a red cat on grass"], steps=2, seed=2, **size).latents,
        lambda: p2p.edit(model, SOURCE, SOURCE, steps=2, equalizer={"cat": 2.0}, local_blend=blend, **size).latents,
        lambda: p2p.generate(model, ["a house", "a boat"], steps=3, seed=3, **size).latents,
        lambda: p2p.edit(model, p2p.invert(model, picture, SOURCE, method="direct", steps=2, **size), "a dog on grass").latents,
        lambda: p2p.edit(model, p2p.trace(model, SOURCE, steps=2, seed=4, **size), "a dog on grass").latents,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["narrow", "sd1"])
def test_threads_on_one_model_get_the_pixels_of_runs_alone(request, family):
    model = request.getfixturevalue(family)
    alone = [run() for run in runs(model)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda run: run(), runs(model) * 2))
    for k, found in enumerate(together):
        assert torch.equal(found, alone[k % len(alone)]), f"run {k % len(alone)}"


def test_parts_that_wait_elsewhere_are_moved_by_one_thread_at_a_time(sd1):
    """An offloaded part must not be taken away while another thread works with it."""
    inside, most = 0, 0
    lock = threading.Lock()

    class Part(nn.Module):
        def to(self, device):
            return self

    model, part = replace(sd1, offload=True), Part()

    def work(_):
        nonlocal inside, most
        with at_work(True, model.device, part):
            with lock:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.01)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert most == 1
    with at_work(True, model.device, part), at_work(True, model.device, part):   # one thread may need two at once
        pass

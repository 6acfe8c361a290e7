"""What a run would take is reckoned first, and refused beyond what the machine has; ordinary sizes never are."""
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

import p2p
from p2p.lists import ip2p
from p2p.lists.together import edit_together
from p2p.models.unet import SD1, SDXL, UNet
from p2p.models.vae import SD, AutoencoderKL
from p2p.request import memory
from p2p.request.inverting import expected
from p2p.request.ready import prepared
from p2p.show.sweep import sweep

SOURCE, TARGET = "a cat on grass", "a dog on grass"
PICTURE = Image.new("RGB", (64, 64))


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    monkeypatch.setattr(memory, "machine", lambda device=None: 8 * 2**30)


def like(sd1, config, dtype=torch.float32, **changed):
    """A model of the real sizes, without its weights."""
    with torch.device("meta"):
        return replace(sd1, unet=UNet(config).to(dtype), vae=AutoencoderKL(SD), **changed)


BEYOND = {
    "steps": (lambda m: p2p.generate(m, SOURCE, steps=10**9, eta=1), "1 to 1000"),
    "noise": (lambda m: p2p.generate(m, SOURCE, steps=1000, eta=1, height=2048, width=2048), "noise"),
    "prompts": (lambda m: p2p.generate(m, [SOURCE] * 10**6), "GB"),
    "targets": (lambda m: p2p.edit(m, SOURCE, [TARGET] * 10**6), "tables of the edits"),
    "size": (lambda m: p2p.generate(m, SOURCE, height=8192, width=8192), "the network"),
    "size of an inverted picture": (lambda m: p2p.invert(m, PICTURE, SOURCE, height=8192, width=8192), "GB"),
    "stored latents": (lambda m: p2p.invert(m, PICTURE, SOURCE, height=2048, width=2048, steps=1000), "stored latents"),
    "maps": (lambda m: p2p.generate(m, SOURCE, steps=1000, record=p2p.Record(pixels=2**20), height=256, width=256), "maps"),
    "queries": (lambda m: p2p.trace(m, SOURCE, steps=1000, height=512, width=512), "queries"),
    "a sweep": (lambda m: sweep(m, SOURCE, TARGET, {"weight:dog": range(10**6)}), "GB"),
    "a sample's noises": (lambda m: ip2p.check(m, ip2p.Recipe(together=10**6, samples=10**6)), "noise"),
    "samples of edits": (lambda m: ip2p.check(m, ip2p.Recipe(together=10**6, samples=10**6, sampler="p2p")), "tables of the edits"),
    "a wide sweep": (lambda m: sweep(m, SOURCE, TARGET, {"weight:dog": range(10**5), "weight:a": range(10**5)}), "GB"),
}


@pytest.mark.parametrize("what", BEYOND)
def test_what_the_machine_cannot_hold_is_refused_at_once(emoji, what, monkeypatch):
    monkeypatch.setattr(p2p.Model, "predict", None)
    ask, message = BEYOND[what]
    began = time.process_time()
    with pytest.raises(p2p.UsageError, match=message):
        ask(emoji)
    assert time.process_time() - began < 5


def test_edits_together_are_billed_together(narrow, monkeypatch):
    """Each alone would fit."""
    jobs = [dict(source=SOURCE, targets=TARGET, steps=2, seed=k, eta=1.0) for k in range(3)]
    bills: list[int] = []
    monkeypatch.setattr(memory, "machine", lambda device=None: None)
    monkeypatch.setattr(memory, "afford", lambda bill, *_: bills.append(sum(bill.values())))
    edit_together(narrow, jobs)
    *alone, joined = bills
    assert joined >= sum(alone) and len(alone) == 3
    monkeypatch.undo()
    monkeypatch.setattr(memory, "machine", lambda device=None: joined - 1)
    with pytest.raises(p2p.UsageError, match="fewer pictures at a time"):
        edit_together(narrow, jobs)


@pytest.mark.slow
def test_ordinary_sizes_are_not_refused(sd1):
    model, large = like(sd1, SD1), like(sd1, SDXL, torch.float16)
    for steps, targets in ((50, 3), (1000, 1), (50, 8)):
        memory.check_run(model, 1 + targets, (4, 64, 64), steps, noises=1 + steps, stored=3 * steps, targets=targets, autoencoder="encodes")
    memory.check_run(model, 3, (4, 64, 64), 50, targets=2, record=p2p.Record(text=32 * 32, before=True))
    memory.check_run(model, 1, (4, 128, 128), 50, rows=2)
    memory.check_run(large, 3, (4, 128, 128), 50, rows=6, targets=2)
    with pytest.raises(p2p.UsageError, match="maps"):
        memory.check_run(model, 3, (4, 64, 64), 50, targets=2, record=p2p.Record(pixels=64 * 64))
    with pytest.raises(p2p.UsageError, match="autoencoder"):
        memory.check_run(model, 1, (4, 512, 512), 50, rows=2)
    memory.check_run(replace(model, tile=64), 1, (4, 512, 512), 50)


@pytest.mark.slow
def test_the_bill_of_the_network_is_of_the_rows_and_calls_that_are_run(narrow, monkeypatch):
    picture, bills = Image.effect_noise((64, 64), 90).convert("RGB"), []
    monkeypatch.setattr(memory, "afford", lambda bill, *_: bills.append(dict(bill)))
    row = narrow.unet.numbers_held(64, 64) * narrow.dtype.itemsize
    direct = p2p.invert(narrow, picture, SOURCE, method="direct", steps=4, skip=1)
    for source, rows, calls in ((SOURCE, 4, 4), (direct, 3, 3), (p2p.trace(narrow, direct), 2, 3),
                                (p2p.invert(narrow, picture, SOURCE, method="ddim", steps=4), 4, 4)):
        ready = prepared(narrow, source, TARGET, **({"steps": 4} if source is SOURCE else {}))
        assert ready.batch.rows == rows and bills[-1]["the network"] == rows * row
        assert bills[-1]["tables of the edits"] == 2 * 8 * calls * narrow.length**2
    for method, guidance, rows in (("noise", None, 0), ("ddim", 0, 1), ("ddim", 1, 1), ("ddim", 2, 2)):
        expected(narrow, SOURCE, method=method, inversion_guidance=guidance, steps=4)
        assert bills[-1]["the network"] == rows * row


def test_latents_are_not_encoded(sd1, monkeypatch):
    bills: list[dict[str, int]] = []
    monkeypatch.setattr(memory, "afford", lambda bill, *_: bills.append(dict(bill)))
    for given in (True, False):
        expected(sd1, SOURCE, method="noise", encodes=given)
        assert (bills[-1]["the autoencoder"] > 0) == given


@pytest.mark.slow
def test_the_bill_of_maps_is_what_they_take(emoji, monkeypatch):
    """Half precision, all steps, all rows."""
    for record in (p2p.Record(text=256, before=True), p2p.Record(text=256, pixels=256)):
        r = p2p.edit(emoji, SOURCE, TARGET, steps=1, record=record)
        bills: list[dict[str, int]] = []
        monkeypatch.setattr(memory, "afford", lambda bill, *_, bills=bills: bills.append(dict(bill)))
        memory.check_run(emoji, 2, (3, 64, 64), 1, targets=1, record=record)
        assert bills[0]["maps"] == 2 * sum(m.numel() for m in r.maps.sites.values())


def test_a_container_has_what_it_is_given(tmp_path, monkeypatch):
    monkeypatch.undo()
    whole = memory.machine()
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "few").write_text("123456789\n")
    monkeypatch.setattr(memory, "_limits", lambda: [tmp_path / f for f in ("max", "absent")])
    assert memory.machine() >= whole > 123456789
    monkeypatch.setattr(memory, "_limits", lambda: [tmp_path / f for f in ("max", "few")])
    assert memory.machine() == 123456789
    monkeypatch.delattr(memory.os, "sysconf")
    monkeypatch.setattr(memory, "_limits", lambda: [])
    assert memory.machine() is None
    memory.afford({"everything": 10**30})   # nobody says how much there is: nothing is refused

"""A traced source is computed once: edits of it run two rows a target and give the pictures of the whole batch."""
import pytest
import torch

import p2p
from p2p.show.sweep import sweep
from p2p.sources.trace import size

SOURCE = "a cat on grass"
EDITS = [
    p2p.Edit("a dog on grass", cross_replace_steps={"default_": 0.8, "dog": (0.2, 0.6)}),
    p2p.Edit("a red cat on grass", self_replace_steps=(0.3, 0.7)),
    p2p.Edit(SOURCE, equalizer={"cat": 2.5}, renormalise=True),
    p2p.Edit("a dog in the snow", local_blend=p2p.LocalBlend(words=("cat", "dog"))),
]


@pytest.fixture(params=["narrow", "sd1"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("latents_only", [False, True])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_edits_of_a_traced_source_are_those_of_the_whole_batch(model, undecoded, latents_only, guidance_scale):
    common, recorded = dict(steps=5, seed=2, height=32, width=64), p2p.Record(text=256, pixels=256, before=True)
    r = p2p.edit(model, SOURCE, EDITS, guidance_scale=guidance_scale, record=recorded, **common)
    found = p2p.trace(model, SOURCE, guidance_scale=guidance_scale, latents_only=latents_only, **common)
    again = p2p.edit(model, found, EDITS, record=recorded)
    assert (again.latents - r.latents).abs().max() < 2e-3 * r.latents.std() and torch.equal(again.masks, r.masks)
    assert again.maps.sites.keys() == r.maps.sites.keys() and r.maps.pixel_sites
    assert all((again.maps.sites[k] - m).abs().max() < 5e-3 for k, m in r.maps.sites.items())
    halves = 1 if guidance_scale == 1 else 2
    assert again.rows == 5 * (halves * len(EDITS) + latents_only) and r.rows == 5 * halves * (1 + len(EDITS))


@pytest.mark.slow
def test_an_inverted_picture_is_traced_too(narrow, tmp_path):
    """At 50 steps: 100 rows for each further edit of a direct inversion, where the published code runs 650."""
    inverted = p2p.invert(narrow, torch.rand(1, 3, 64, 64) * 2 - 1, SOURCE, method="direct", steps=5)
    r = p2p.edit(narrow, inverted, EDITS[0])
    p2p.trace(narrow, inverted).save(tmp_path / "traced.safetensors")
    again = p2p.edit(narrow, p2p.Inversion.load(tmp_path / "traced.safetensors"), EDITS[0])
    assert (again.latents - r.latents).abs().max() < 1e-3 and (again.rows, r.rows) == (10, 14)
    with pytest.raises(p2p.UsageError, match="an inversion by ddim is not traced"):
        p2p.trace(narrow, p2p.invert(narrow, inverted.latents[:1], SOURCE, method="ddim", steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_size_is_known_beforehand(model, undecoded, dtype):
    common = dict(steps=3, seed=1, height=32, width=64)
    found = p2p.trace(model, SOURCE, dtype=dtype, **common)
    held = [found.latents, *found.queries.values()]
    assert size(model, 3, dtype, 32, 64) == sum(x.numel() * x.element_size() for x in held)
    if dtype is not None:   # half precision of the queries and keys alone: the picture hardly changes
        exact = p2p.edit(model, p2p.trace(model, SOURCE, **common), EDITS[0]).latents
        assert (p2p.edit(model, found, EDITS[0]).latents - exact).abs().max() < 0.05 * exact.std()


@pytest.mark.slow
def test_another_editor_runs_the_source(narrow):
    """MasaCtrl borrows values as well, in both halves: the cache is left aside, the stored latents are used."""
    found = p2p.trace(narrow, SOURCE, steps=4, seed=1)
    r = p2p.edit(narrow, found, "a dog on grass", editor=p2p.MasaCtrl())
    assert r.rows == 16 and (r.latents[0] - found.latents[0]).abs().max() < 1e-6


@pytest.mark.parametrize("source, settings, message", [
    (SOURCE, dict(eta=1.0), "eta: no setting of a trace"), (SOURCE, dict(dtype="float16"), "floating types"), (5, {}, "not 5"),
    ("traced", dict(steps=3), "it was inverted with its own")])
def test_what_a_trace_cannot_mean_is_said(narrow, source, settings, message):
    source = p2p.trace(narrow, SOURCE, steps=2, latents_only=True) if source == "traced" else source
    with pytest.raises(p2p.UsageError, match=message):
        p2p.trace(narrow, source, **settings)


def test_what_a_run_would_drop_in_silence_is_refused(narrow):
    with pytest.raises(p2p.UsageError, match="a sweep over seeds starts from a prompt"):
        sweep(narrow, p2p.trace(narrow, SOURCE, steps=2), "a dog on grass", {"seed": [1, 2]})

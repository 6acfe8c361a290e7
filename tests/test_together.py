"""Edits of several sources in one batch are the edits that each is alone."""
import pytest
import torch

import p2p
from p2p.lists.together import edit_together

BLEND = p2p.LocalBlend(words=("cat", "dog"), substruct=("grass", "grass"), start=0.3)
JOBS = [
    dict(source="a cat on grass", targets=["a dog on grass", p2p.Edit("a cat at night", self_replace_steps=0.8)], seed=1),
    dict(source="a red car", targets=["a red boat"], seed=2, guidance_scale=5.0, cross_replace_steps=(0.2, 0.6)),
    dict(source="a cat on grass", targets="a dog on grass", seed=3, local_blend=BLEND),
    dict(source="a cat next to a house", targets="a bear next to a house", seed=4, scope="cat", renormalise=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("chosen", [(0, 1), (0, 2, 1, 3)])
def test_each_is_as_it_is_alone(narrow, chosen, eta):
    jobs = [JOBS[i] | dict(steps=4, eta=eta, height=32, width=32) for i in chosen]
    for job, together in zip(jobs, edit_together(narrow, jobs)):
        alone = p2p.edit(narrow, **job)
        assert (together.latents - alone.latents).abs().max() < 1e-4 and together.settings == alone.settings
        assert (together.prompts, together.notes, together.rows) == (alone.prompts, alone.notes, alone.rows)
        assert (together.masks is None) == (alone.masks is None)
        assert alone.masks is None or torch.equal(together.masks, alone.masks)


def test_no_guidance_is_half_the_rows(narrow):
    r = edit_together(narrow, [job | dict(steps=2, guidance_scale=1.0) for job in JOBS[:2]])
    assert [x.rows for x in r] == [6, 4]


@pytest.mark.parametrize("other, what", [(dict(steps=3), "steps"), (dict(height=96), "height"), (dict(eta=1.0), "eta"),
                                         (dict(guidance_scale=1.0), "with and without guidance cannot")])
def test_what_cannot_share_a_batch_is_said(narrow, other, what):
    with pytest.raises(p2p.UsageError, match=what):
        edit_together(narrow, [JOBS[0] | dict(steps=2), JOBS[0] | dict(steps=2) | other])


@pytest.mark.slow
def test_a_mask_alone_and_words_share_a_batch(narrow):
    half = torch.zeros(64, 64)
    half[:, :32] = 1
    masked = dict(source="a cat on grass", targets="a dog on grass", seed=5, local_blend=p2p.LocalBlend(mask=half))
    for pair in ((masked, JOBS[2]), (JOBS[2], masked)):
        jobs = [job | dict(steps=2) for job in pair]
        for job, together in zip(jobs, edit_together(narrow, jobs)):
            alone = p2p.edit(narrow, **job)
            assert (together.latents - alone.latents).abs().max() < 1e-4 and torch.equal(together.masks, alone.masks)


def test_maps_are_not_recorded_together(narrow):
    with pytest.raises(p2p.UsageError, match="record no maps"):
        edit_together(narrow, [JOBS[0] | dict(steps=2, record=p2p.Record(text=256))])

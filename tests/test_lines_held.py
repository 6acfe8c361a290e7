"""Faults that a fresh look at issue L's lines found, with inputs of its own: each with its right value."""
import pytest
import torch

import p2p

SOURCE, SWAPPED = "a red cat on grass", "a red dog on grass"


@pytest.mark.parametrize("settings, acts", [({}, True), ({"cross_replace_steps": 0.0}, False), ({"layers": "down"}, False),
                                            ({"layers": "up"}, True)])
def test_renormalising_hybrid_attention_acts_where_the_source_is_injected(narrow, undecoded, settings, acts):
    """There the text's share of a row is the source's, and that of the pixels the target's own: they do not sum to 1."""
    with_, left = (p2p.edit(narrow, SOURCE, p2p.Edit(SWAPPED, renormalise=r, **settings), steps=2) for r in (True, False))
    assert torch.allclose(with_.latents, left.latents, atol=1e-4) is not acts
    assert any("renormalise changes nothing" in note for note in with_.notes) is not acts

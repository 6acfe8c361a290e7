"""Other editors through the same argument: what they borrow, and from whom."""
import pytest
import torch

import p2p
from models.attention import SelfAttention, attend
from p2p.masactrl import borrowing, halves
from weights.emoji.world import render, sample

SOURCE, TARGET = "a red cat on grass", "a red dog on grass"
EDITORS = [p2p.MasaCtrl(), p2p.PlugAndPlay()]


def test_borrowed_rows_are_attention_written_out():
    g = torch.Generator().manual_seed(0)
    module, x = SelfAttention(16, 16, 2, 8).double(), torch.randn(4, 9, 16, generator=g, dtype=torch.float64)
    rows = torch.tensor([[2, 3], [0, 1], [0, 3]])   # of the last two: queries, keys, values
    edit = borrowing(rows, 5, torch.float64)
    q, k, v = module._split(*(f(x) for f in (module.to_q, module.to_k, module.to_v)))
    wanted = torch.cat([module._out(attend(q[a:a + 1], k[b:b + 1], v[c:c + 1]), x.dtype)
                        for a, b, c in ((0, 0, 0), (1, 1, 1), (2, 0, 0), (3, 1, 3))])
    for e in (edit, edit._replace(self_source=torch.tensor([2, 3]), injected=None)):   # its own rows: known beforehand, and not
        assert (module(x, x, e)[0] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("n, guided, wanted", [(2, 2, [0, 0, 2, 2]), (3, 2, [2, 2, 2, 2, 2]), (2, 0, [0, 0])])
def test_each_half_borrows_from_its_own_source(n, guided, wanted):
    own, source = halves(n, guided, torch.device("cpu"))
    assert own.tolist() == list(range(n + guided)) and source.tolist() == wanted


@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: type(e).__name__)
def test_the_source_is_untouched_and_its_own_prompt_changes_nothing(emoji, editor):
    plain = p2p.generate(emoji, SOURCE, steps=6, seed=1).latents
    r = p2p.edit(emoji, SOURCE, [SOURCE, TARGET], steps=6, seed=1, editor=editor)
    assert (r.latents[:2] - plain).abs().max() < 1e-3 and (r.latents[2] - plain[0]).abs().max() > 0.05
    free = p2p.generate(emoji, TARGET, steps=6, seed=1).latents
    assert (r.latents[2] - free[0]).abs().max() > 0.02


def test_maps_before_the_edit_are_not_an_editors(emoji):
    with pytest.raises(p2p.UsageError, match=r"record\.before"):
        p2p.edit(emoji, SOURCE, TARGET, steps=2, editor=p2p.MasaCtrl(), record=p2p.Record(text=256, before=True))


def test_no_steps_is_no_edit(emoji):
    free = p2p.generate(emoji, TARGET, steps=4, seed=1).latents[0]
    for editor in (p2p.MasaCtrl(start=1.0), p2p.MasaCtrl(layers=1.0), p2p.PlugAndPlay(0.0, 0.0)):
        assert (p2p.edit(emoji, SOURCE, TARGET, steps=4, seed=1, editor=editor).latents[1] - free).abs().max() < 1e-3


def test_layers_are_the_authors_choice(sd1):
    """MasaCtrl: layers 10 to 15 of 16. Plug-and-Play: features of up_blocks.1.resnets.1, attention from there on."""
    common = dict(steps=10, length=77, device=sd1.device, dtype=sd1.dtype)
    late = p2p.MasaCtrl().plan(sd1.unet, 2, 2, **common)
    assert late[0] != {} and set(late[9]) == {f"up_blocks.{i}.attentions.{j}" for i in (2, 3) for j in range(3)}
    assert [bool(p) for p in p2p.MasaCtrl().plan(sd1.unet, 2, 2, **common | dict(steps=50))].index(True) == 4
    steps = p2p.PlugAndPlay().plan(sd1.unet, 2, 2, **common)
    sites = {"up_blocks.1.attentions.1", "up_blocks.1.attentions.2",
             *(f"up_blocks.{i}.attentions.{j}" for i in (2, 3) for j in range(3))}
    own, source = [0, 1, 2, 3], [0, 0, 2, 2]
    for i, borrowed in ((4, source), (5, own), (7, own)):   # by one graph
        assert set(steps[i]) == {"up_blocks.1.resnets.1", *sites} and steps[i].pop("up_blocks.1.resnets.1").tolist() == source
        assert all(e.rows.tolist() == [borrowed, borrowed, own] for e in steps[i].values())
    assert steps[8] == {}
    early = p2p.PlugAndPlay(features=0.1, attention=0.2).plan(sd1.unet, 2, 2, **common)
    assert [early[i]["up_blocks.1.resnets.1"].tolist() for i in (0, 1)] == [source, own] and early[2] == {}


@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("method", ["ddim", "direct", "negative-prompt"])
def test_editors_take_real_pictures_and_blends(emoji, editor, method):
    picture = render(sample(1, 5, "held out"))[0]
    inv = p2p.invert(emoji, picture, SOURCE, method=method, steps=4)
    mask = torch.zeros(64, 64)
    mask[:32] = 1
    r = p2p.edit(emoji, inv, TARGET, editor=editor, local_blend=p2p.LocalBlend(mask=mask))
    assert torch.equal(r.latents[1][:, 32:], picture[0][:, 32:]) and r.settings["editor"]["name"] == type(editor).__name__

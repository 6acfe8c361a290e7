"""Other editors through the same argument: what they borrow, and from whom."""
import copy

import pytest
import torch

import p2p
from p2p.denoise import Batch
from p2p.models.attention import AttentionEdit, SelfAttention, attend
from p2p.weights.emoji.world import render, sample

SOURCE, TARGET = "a red cat on grass", "a red dog on grass"
EDITORS = [p2p.MasaCtrl(), p2p.PlugAndPlay()]


def test_borrowed_rows_are_attention_written_out():
    g = torch.Generator().manual_seed(0)
    module, x = SelfAttention(16, 2, 8).double(), torch.randn(4, 9, 16, generator=g, dtype=torch.float64)
    rows = torch.tensor([[2, 3], [0, 1], [0, 3]])   # of the last two: queries, keys, values
    edit = AttentionEdit(torch.tensor([2, 3]), pixels=rows)
    q, k, v = module.split(*(f(x) for f in (module.to_q, module.to_k, module.to_v)))
    wanted = torch.cat([module.join(attend(q[a:a + 1], k[b:b + 1], v[c:c + 1]), x.dtype)
                        for a, b, c in ((0, 0, 0), (1, 1, 1), (2, 0, 0), (3, 1, 3))])
    assert (module(x, edit) - wanted).abs().max() < 1e-12


def recorded(net, names, *given):
    """A forward pass, and what the modules of these names gave."""
    seen = {}
    hooks = [net.get_submodule(n).register_forward_hook(lambda m, i, out, n=n: seen.__setitem__(n, out)) for n in names]
    out = net(*given)[0]
    for hook in hooks:
        hook.remove()
    return out, seen


def replayed(net, seen, *given):
    """A forward pass in which the modules give what they gave in another one."""
    hooks = [net.get_submodule(n).register_forward_hook(lambda m, i, out, n=n: seen[n].expand_as(out)) for n in seen]
    out = net(*given)[0]
    for hook in hooks:
        hook.remove()
    return out


def layers_of(edits, parts):
    """Linear layers of the self-attention at the sites of an edit by name."""
    return [f"{site}.{part}" for site in edits if ".attentions." in site for part in parts]


@pytest.fixture(scope="module")
def rows_of(sd1):
    """x and context of so many rows for a network in double precision."""
    net = copy.deepcopy(sd1.unet).double()
    g = torch.Generator().manual_seed(3)
    width = net.config.context_dim

    def rows(n):
        return torch.randn(n, 4, 16, 16, generator=g, dtype=torch.float64), torch.randn(n, 77, width, generator=g,
                                                                                         dtype=torch.float64)

    return net, rows


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("guided", [3, 2, 0])
def test_plug_and_play_is_the_authors_injection(rows_of, guided):
    """In both halves the second convolution's output (not the skip connection) and q and k are those of the conditional source:
    register_conv_control_efficient and register_attention_control_efficient of the authors, by modules that repeat their output."""
    net, rows = rows_of
    x, context = rows(guided + 3)
    edit = p2p.PlugAndPlay(1.0, 1.0).plan(net, Batch(1, 2, guided > 0, guided == 2), 1, x.device)[0]
    names = ["up_blocks.1.resnets.1.conv2", *layers_of(edit, ("to_q", "to_k"))]
    source = slice(guided, guided + 1)
    own, seen = recorded(net, names, x[source], 500, context[source])
    out = net(x, 500, context, edit)[0]
    targets = [i for i in range(guided + 3) if i != guided and (i, guided) != (0, 3)]
    assert (out[targets] - replayed(net, seen, x[targets], 500, context[targets])).abs().max() < 1e-9 * out.std()
    assert (out[source] - own).abs().max() < 1e-9 * out.std() and (out - net(x, 500, context)[0])[targets].abs().max() > 0.1 * out.std()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("guided", [3, 0])
def test_masactrl_asks_the_source_of_its_own_half(rows_of, guided):
    """MutualSelfAttentionControl: keys and values of each half's first row."""
    net, rows = rows_of
    x, context = rows(guided + 3)
    edit = p2p.MasaCtrl(0.0, 0.25).plan(net, Batch(1, 2, guided > 0), 1, x.device)[0]
    out = net(x, 500, context, edit)[0]
    for half in ([0, 1, 2], [3, 4, 5])[:1 + guided // 3]:
        own, seen = recorded(net, layers_of(edit, ("to_k", "to_v")), x[half[:1]], 500, context[half[:1]])
        assert (out[half[:1]] - own).abs().max() < 1e-9 * out.std()
        assert (out[half[1:]] - replayed(net, seen, x[half[1:]], 500, context[half[1:]])).abs().max() < 1e-9 * out.std()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["direct", "edit-friendly", "negative-prompt"])
def test_masactrl_of_a_known_source_has_both_its_rows(narrow, method):
    """A source that needs no guidance of its own is run without a prompt all the same: the targets' halves without one ask it."""
    inv = p2p.invert(narrow, render(sample(1, 5, "held out"))[0], SOURCE, method=method, steps=4)
    seen = []
    hook = narrow.unet.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    p2p.edit(narrow, inv, TARGET, editor=p2p.MasaCtrl(start=0.0))
    hook.remove()
    assert set(seen) == {4}


@pytest.mark.slow
def test_a_source_can_be_told_another_prompt_while_it_is_sampled(narrow):
    inv = p2p.invert(narrow, render(sample(1, 5, "held out"))[0], SOURCE, method="direct", steps=4)
    told, own, same = (p2p.edit(narrow, inv, TARGET, editor=p2p.PlugAndPlay(source_prompt=p)) for p in ("", None, SOURCE))
    assert torch.equal(own.latents, same.latents) and (told.latents[1] - own.latents[1]).abs().max() > 1e-3
    assert told.settings["editor"]["source_prompt"] == "" and torch.equal(told.latents[0], own.latents[0])
    assert told.prompts == ["", TARGET] and told.captions() == own.captions() == [SOURCE, TARGET]
    both = p2p.edit(narrow, inv, [TARGET, SOURCE], editor=p2p.PlugAndPlay(source_prompt=""))
    assert both.names() == ["source", "edit-1-cat-to-dog", "edit-2"]


@pytest.mark.slow
@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: type(e).__name__)
def test_the_source_is_untouched_and_its_own_prompt_changes_nothing(narrow, editor):
    """With guidance Plug-and-Play's unconditional half takes the conditional source, so there only the source is untouched."""
    for scale in (3.0, 1.0):
        how = dict(steps=6, seed=1, guidance_scale=scale)
        plain, free = (p2p.generate(narrow, prompt, **how).latents[0] for prompt in (SOURCE, TARGET))
        source, same, edited = p2p.edit(narrow, SOURCE, [SOURCE, TARGET], editor=editor, **how).latents
        assert (source - plain).abs().max() < 1e-3 and (edited - plain).abs().max() > 0.05
        assert (edited - free).abs().max() > 0.02
        if scale == 1 or isinstance(editor, p2p.MasaCtrl):
            assert (same - plain).abs().max() < 1e-3


def test_maps_before_the_edit_are_not_an_editors(narrow):
    with pytest.raises(p2p.UsageError, match=r"record\.before"):
        p2p.edit(narrow, SOURCE, TARGET, steps=2, editor=p2p.MasaCtrl(), record=p2p.Record(text=256, before=True))


@pytest.mark.slow
def test_no_steps_is_no_edit(narrow):
    free = p2p.generate(narrow, TARGET, steps=4, seed=1).latents[0]
    for editor in (p2p.MasaCtrl(start=1.0), p2p.MasaCtrl(layers=1.0), p2p.PlugAndPlay(0.0, 0.0)):
        assert (p2p.edit(narrow, SOURCE, TARGET, steps=4, seed=1, editor=editor).latents[1] - free).abs().max() < 1e-3


def test_layers_are_the_authors_choice(sd1):
    """MasaCtrl: layers 10 to 15 of 16. Plug-and-Play: features of up_blocks.1.resnets.1, attention from there on."""
    common, block = (sd1.unet, Batch(1, 1)), "transformer_blocks.0.attn1"
    late = p2p.MasaCtrl().plan(*common, 10, sd1.device)
    assert late[0] != {} and set(late[9]) == {f"up_blocks.{i}.attentions.{j}.{block}" for i in (2, 3) for j in range(3)}
    assert [bool(p) for p in p2p.MasaCtrl().plan(*common, 50, sd1.device)].index(True) == 4
    steps = p2p.PlugAndPlay().plan(*common, 10, sd1.device)
    sites = {f"up_blocks.{i}.attentions.{j}.{block}" for i in (1, 2, 3) for j in range(3) if (i, j) != (1, 0)}
    own, source = [0, 1, 2, 3], [0, 2, 2, 2]
    for i, borrowed in ((4, source), (5, own), (7, own)):   # by one graph
        assert set(steps[i]) == {"up_blocks.1.resnets.1", *sites} and steps[i].pop("up_blocks.1.resnets.1").tolist() == source
        assert all(e.pixels.tolist() == [borrowed, borrowed, own] for e in steps[i].values())
    assert steps[8] == {}
    early = p2p.PlugAndPlay(features=0.1, attention=0.2).plan(*common, 10, sd1.device)
    assert [early[i]["up_blocks.1.resnets.1"].tolist() for i in (0, 1)] == [source, own] and early[2] == {}


@pytest.mark.slow
@pytest.mark.parametrize("editor", EDITORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("method", ["ddim", "direct", "negative-prompt"])
def test_editors_take_real_pictures_and_blends(narrow, editor, method):
    picture = render(sample(1, 5, "held out"))[0]
    inv = p2p.invert(narrow, picture, SOURCE, method=method, steps=4)
    mask = torch.zeros(64, 64)
    mask[:32] = 1
    r = p2p.edit(narrow, inv, TARGET, editor=editor, local_blend=p2p.LocalBlend(mask=mask))
    assert torch.equal(r.latents[1][:, 32:], picture[0][:, 32:]) and r.settings["editor"]["name"] == type(editor).__name__

"""What is asked for and changes nothing is said to, and it is so: the latents with it and without it are the same."""
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

import p2p
from p2p import UsageError
from p2p.cli.parser import main
from p2p.lists import ip2p
from p2p.models.mmdit import Flux
from p2p.show.sweep import sweep

SOURCE, TARGET = "a cat on grass", "a dog on grass"
WHITE, HALF = torch.ones(4, 4), torch.tensor([[1.0, 0.0]])
NO_TEXT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
BLEND = p2p.LocalBlend(words=("cat", "dog"), start=0.0)


def edited(model, source=SOURCE, target=TARGET, **settings):
    return p2p.edit(model, source, target, **({"steps": 3} if isinstance(source, str) else {}) | settings)


IDLE = {   # (settings, what is the same without them, what is said)
    "white mask": (dict(local_blend=p2p.LocalBlend(mask=WHITE, start=0.0)), {}, "local_blend changes nothing: the mask is bright"),
    "white picture": (dict(local_blend=p2p.LocalBlend(mask=Image.new("L", (9, 9), 255), start=0.0)), {}, "mask is bright everywhere"),
    "white mask beside words": (dict(local_blend=replace(BLEND, mask=WHITE)), dict(local_blend=BLEND), "local_blend: mask changes nothing"),
    "white mask beside a scope": (dict(scope="cat", local_blend=p2p.LocalBlend(mask=WHITE, start=0.0)),
                                  dict(scope="cat", local_blend=p2p.LocalBlend(start=0.0)), "local_blend: mask changes nothing"),
    "threshold 0": (dict(local_blend=replace(BLEND, threshold=0.0)), {}, "at threshold 0 the words limit nothing"),
    "threshold 0 of substruct": (dict(local_blend=replace(BLEND, substruct=("grass", "grass"), threshold=(0.3, 0.0))),
                                 dict(local_blend=p2p.LocalBlend(mask=torch.zeros(2, 2), start=0.0)), "substruct leaves nothing"),
    "a threshold for words": (dict(local_blend=p2p.LocalBlend(mask=HALF, substruct=("grass", "grass"), threshold=(0.9, 0.3), start=0.0)),
                              dict(local_blend=p2p.LocalBlend(mask=HALF, substruct=("grass", "grass"), start=0.0)), "the first threshold"),
    "words without a layer": (dict(target=SOURCE, equalizer={"cat": 3}, layers=NO_TEXT), dict(target=SOURCE, layers=NO_TEXT),
                              "equalizer changes nothing: no layer that is chosen reads text"),
    "windows without a layer": (dict(cross_replace_steps=0.3, layers=NO_TEXT), dict(layers=NO_TEXT),
                                "cross_replace_steps changes nothing: no layer that is chosen reads text"),
    "pixels without a layer": (dict(self_replace_steps=1.0, layers="mid"), dict(layers="mid"),
                               "self_replace_steps changes nothing: no layer that is chosen is self-attention"),
    "weight 1": (dict(equalizer={"dog": 1.0}), {}, "it is 1"),
    "few pixels": (dict(self_max_tokens=3), dict(self_replace_steps=0.0), "self_max_tokens 3 leaves self-attention alone: its smallest maps"),
    "proximal from 0 on": (dict(proximal=("l0", 0)), {}, "proximal l0 changes nothing: from quantile 0"),
    "no negative prompt": (dict(negative_prompt=""), {}, "negative_prompt changes nothing"),
    "MasaCtrl that never begins": (dict(editor=p2p.MasaCtrl(start=1.0)), dict(cross_replace_steps=0.0, self_replace_steps=0.0), "acts in no"),
    "MasaCtrl in no layer": (dict(editor=p2p.MasaCtrl(layers=1.0)), dict(cross_replace_steps=0.0, self_replace_steps=0.0), "acts in no"),
    "Plug-and-Play of no step": (dict(editor=p2p.PlugAndPlay(features=0.0, attention=0.3)),
                                 dict(cross_replace_steps=0.0, self_replace_steps=0.0), "acts in no layer, or in none of the 3 steps"),
    "features of no step": (dict(editor=p2p.PlugAndPlay(features=0.3)), dict(editor=p2p.PlugAndPlay(features=0.0)), "features 0.3 covers none"),
    "mode of an editor": (dict(editor=p2p.MasaCtrl(start=0.0), mode="refine"), dict(editor=p2p.MasaCtrl(start=0.0)), "mode changes nothing"),
    "the same prompt, another editor": (dict(editor=p2p.MasaCtrl(start=0.0), target=SOURCE), None, "the same prompt: this edit changes nothing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", IDLE)
def test_it_is_said_and_so(narrow, what):
    settings, without, wanted = IDLE[what]
    r = edited(narrow, **settings)
    assert sum(wanted in note for note in r.notes) == 1, r.notes
    if without is None:
        assert torch.allclose(r.latents[0], r.latents[1], atol=1e-5)
        return
    plain = edited(narrow, **without)
    assert torch.allclose(r.latents, plain.latents, atol=1e-5) and not any(wanted in note for note in plain.notes)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    dict(local_blend=p2p.LocalBlend(mask=HALF, start=0.0)), dict(local_blend=replace(BLEND, mask=HALF)), dict(self_max_tokens=10**9),
    dict(local_blend=replace(BLEND, threshold=0.01)), dict(equalizer={"dog": 1.01}), dict(proximal=("l1", 0.1)),
    dict(scope="cat", local_blend=p2p.LocalBlend(threshold=0.0)), dict(editor=p2p.MasaCtrl(start=0.0)), dict(editor=p2p.PlugAndPlay()),
    dict(self_max_tokens=256), dict(layers="mid", self_max_tokens=32 * 32)])   # the last: as a picture records what was not said
def test_what_acts_or_only_bounds_is_not(narrow, settings):
    assert not [note for note in edited(narrow, **settings).notes if "nothing" in note or "none" in note or "leaves" in note]


def test_an_editor_records_no_mode_that_it_does_not_read(narrow):
    assert edited(narrow, editor=p2p.MasaCtrl()).settings["targets"][0]["mode"] is None
    assert edited(narrow, editor=p2p.MasaCtrl(), scope="cat").settings["targets"][0]["mode"] == "replace"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["null-text", "negative-prompt"])
def test_what_stands_for_the_empty_prompt_is_read_by_guidance_alone(narrow, method):
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    made = [p2p.invert(narrow, picture, SOURCE, method=m, steps=2, guidance_scale=1.0) for m in (method, "ddim")]
    first, second = (p2p.edit(narrow, m, TARGET) for m in made)
    assert torch.allclose(first.latents, second.latents, atol=1e-5)
    assert sum(f"{method} inversion changes nothing: what it puts" in note for note in first.notes) == 1
    assert not any("inversion changes nothing" in note for note in p2p.edit(narrow, made[0], TARGET, guidance_scale=3.0).notes
                   if method == "negative-prompt")


def test_guidance_of_an_inversion_by_the_empty_prompt(narrow):
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    plain, guided = (p2p.invert(narrow, picture, "", method="ddim", steps=2, inversion_guidance=s) for s in (1, 5))
    assert torch.allclose(plain.latents, guided.latents, atol=1e-5)
    assert any("inversion_guidance changes nothing" in note for note in guided.notes) and not any("guidance" in n for n in plain.notes)


def test_guidance_from_a_prompt_of_other_weights_acts(narrow):
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    plain, guided = (p2p.invert(narrow, picture, "a (red:1.5) cat", method="ddim", steps=2, negative_prompt="a red cat", inversion_guidance=s)
                     for s in (2, 5))
    assert not torch.allclose(plain.latents, guided.latents, atol=1e-2)
    assert not any("inversion_guidance changes nothing" in note for note in guided.notes)


@pytest.mark.slow
def test_a_followed_source_that_its_own_prompt_changes(narrow):
    """It is the same picture only if it was traced, and guided as the edit is."""
    x, traced = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64), p2p.trace(narrow, SOURCE, steps=2, negative_prompt="grey")
    for source, settings in [*((p2p.invert(narrow, x, SOURCE, method=m, steps=2), {}) for m in ("edit-friendly", "flow-edit", "ddcm")),
                             (traced, dict(negative_prompt="red")), (traced, dict(proximal=("l0", 0.7)))]:
        r = p2p.edit(narrow, source, SOURCE, **settings)
        assert (r.latents[0] - r.latents[1]).abs().max() > 1e-2 and not any("changes nothing" in note for note in r.notes)
    r = p2p.edit(narrow, traced, SOURCE)
    assert torch.allclose(*r.latents, atol=1e-4) and any("this edit changes nothing" in note for note in r.notes)


@pytest.mark.slow
def test_a_seed_beside_noise_that_is_given(emoji):
    x_T = torch.zeros(1, 3, 64, 64)
    for settings, said in ((dict(seed=5), True), (dict(seed=5, eta=1.0), False), ({}, False)):
        notes = p2p.generate(emoji, SOURCE, steps=1, x_T=x_T, **settings).notes
        assert any("seed changes nothing" in note for note in notes) == said
    with pytest.raises(UsageError, match="seed: the sweep is over seeds"):
        sweep(emoji, SOURCE, TARGET, {"seed": [1, 2]}, seed=3, steps=1)


def test_tiles_of_a_model_without_an_autoencoder(tmp_path, capsys):
    assert any("tile changes nothing" in note for note in p2p.load("emoji", device="cpu", tile=16).notes)
    assert not any("tile" in note for note in p2p.load("emoji", device="cpu").notes)
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    assert main(["invert", str(tmp_path / "x.png"), SOURCE, "--tile", "64", "-o", str(tmp_path)]) == 2
    assert "--tile: not with p2p invert: it decodes no picture" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["image", "direction", "text"])
def test_filters_that_nothing_passes_are_refused(emoji, name):
    ip2p.check(emoji, ip2p.Recipe(**{name: 1.0}))
    for least in (1.01, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"least similarity .{name}."):
            ip2p.check(emoji, ip2p.Recipe(**{name: least}))


def test_how_a_picture_is_fitted_is_said_once(emoji, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    for options in (["--fit", "crop", "--pad"], ["--pad", "--fit", "own"]):
        assert main(["invert", str(tmp_path / "x.png"), SOURCE, *options, "-o", str(tmp_path)]) == 2
        assert "not allowed with argument" in capsys.readouterr().err


def test_what_own_shapes_cut_off_is_not_cured_by_own_shapes(narrow):
    strip = Image.new("RGB", (3000, 10))
    notes = [p2p.invert(narrow, strip, SOURCE, method="noise", steps=1, fit=fit).notes for fit in ("own", "crop")]
    own, crop = ("".join(note for note in each if "cropped" in note) for each in notes)
    assert "--pad" in own and "--fit own" not in own and "--fit own its shape" in crop


@pytest.fixture(scope="module")
def distilled():
    """A small random flow that reads its guidance as a number, as FLUX.1 dev does."""
    torch.manual_seed(1)
    flow = p2p.load("emoji-flow", device="cpu")
    net = Flux(replace(flow.unet.config, dim=32, heads=2, double=1, single=1, axes=(4, 6, 6), guidance=True))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return replace(flow, unet=net.requires_grad_(False).eval(), name="small dev")


def test_what_stands_for_the_empty_prompt_is_not_read_where_guidance_is_a_number(distilled):
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    negative, plain = (p2p.invert(distilled, picture, SOURCE, method=m, steps=2) for m in ("negative-prompt", "ddim"))
    said = "negative-prompt inversion changes nothing: .*small dev reads guidance as a number, and no empty prompt"
    first, second = (p2p.edit(distilled, m, TARGET, guidance_scale=3.0) for m in (negative, plain))
    assert torch.allclose(first.latents, second.latents, atol=1e-5)
    for made in (negative, first):
        assert sum(bool(re.match(said, note)) for note in made.notes) == 1, made.notes


def test_proximal_guidance_where_guidance_is_a_number(distilled):
    with_it, without = (edited(distilled, guidance_scale=3.0, **more) for more in (dict(proximal=("l0", 0.7)), {}))
    assert torch.equal(with_it.latents, without.latents)
    assert sum("proximal changes nothing: small dev reads guidance as a number" in note for note in with_it.notes) == 1


def test_a_trace_is_read_at_its_own_guidance_where_the_network_reads_it(distilled):
    """Its queries and keys are of that guidance; latents alone serve any."""
    traced = p2p.trace(distilled, SOURCE, steps=2, guidance_scale=3.0)
    with pytest.raises(UsageError, match="guidance_scale 5.0: the trace holds queries and keys of guidance 3.0, which small dev reads"):
        p2p.edit(distilled, traced, TARGET, guidance_scale=5.0)
    direct = p2p.edit(distilled, SOURCE, TARGET, steps=2, guidance_scale=3.0)
    assert (p2p.edit(distilled, traced, TARGET).latents[1] - direct.latents[1]).abs().max() < 1e-4
    assert p2p.edit(distilled, p2p.trace(distilled, SOURCE, steps=2, guidance_scale=3.0, latents_only=True), TARGET, guidance_scale=5.0)
    for asked, given in ((0, 0), (1, 0), (0, 1)):   # 0 is 1
        assert p2p.edit(distilled, p2p.trace(distilled, SOURCE, steps=2, guidance_scale=asked), TARGET, guidance_scale=given)


def test_inversions_where_the_network_reads_guidance(distilled):
    """A negative prompt is refused when the picture is inverted, but for guidance 0, which reads it in place of the prompt."""
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    invert = partial(p2p.invert, distilled, picture, method="ddim", steps=2)
    for scale in (None, 1, 2):
        with pytest.raises(UsageError, match="negative_prompt: small dev reads guidance as a number, and no empty prompt"):
            invert(SOURCE, negative_prompt="night", inversion_guidance=scale)
    plain, led = (invert(SOURCE, inversion_guidance=0, **more) for more in ({}, dict(negative_prompt="night")))
    assert not torch.allclose(plain.latents, led.latents, atol=1e-5) and any("under the negative prompt alone" in note for note in led.notes)
    assert p2p.edit(distilled, led, TARGET).settings["negative_prompt"] is None
    seven = invert("", inversion_guidance=7)
    assert not torch.allclose(seven.latents, invert("").latents, atol=1e-5) and not [n for n in seven.notes if "inversion_guidance" in n]


@pytest.mark.slow
def test_a_stage_that_reads_no_text_is_not_guided(emoji):
    """The bundled upscaler: guidance takes no rows there, and a negative prompt is not read."""
    stage, small = p2p.load("emoji-upscaler", device="cpu"), p2p.generate(emoji, "a cat", steps=1, negative_prompt="a tree")
    plain, guided = (p2p.upscale(stage, small, steps=1, guidance_scale=scale) for scale in (None, 3))
    assert torch.equal(plain.latents, guided.latents) and plain.rows == guided.rows
    assert [note for note in guided.notes if note not in plain.notes] == [f"guidance_scale changes nothing: {stage.name} reads no text"]

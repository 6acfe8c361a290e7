"""DeepFloyd IF, the paper's kind of backbone: both stages against diffusers, sizes, and edits through its hybrid attention."""
from dataclasses import replace

import pytest
import torch
from deepfloyd_models import THEIR_UPSCALER, THEIRS, randomised, scheduler
from oracles import attention_processor, diffusers

import p2p
from p2p.align import word_tokens, words
from p2p.cli.parser import main
from p2p.models.attention import AttentionEdit
from p2p.models.blocks import AddedAttention
from p2p.models.maps import site_maps
from p2p.models.t5 import T5Encoder
from p2p.models.unet import UNet, UNetConfig
from p2p.request.start import draw
from p2p.sampler import ddpm_step, x0_and_eps

TINY = UNetConfig(
    in_channels=3, out_channels=6, channels=(32, 64, 128), layers_per_block=1, down_attention=(None, "added", "added"),
    mid_attention="added", up_attention=(None, "added", "added"), depth=(1, 1, 1), heads=(4, 8, 16), context_dim=64, act="gelu",
    scale_shift=True, resample="residual", text_dim=32, pool_heads=2)
UPSCALER = replace(
    TINY, layers_per_block=(1, 2, 1), low_channels=3, out_scale=2**0.5, mid_scale=1.414, skip_time_act=True, time_act="gelu",
    temb_dim=48)
def deepfloyd(width: int, multiples: tuple[int, ...] = (1, 2, 3, 4)) -> UNetConfig:
    """Stage I of DeepFloyd IF (width 192: M, 320: L, 704: XL), which predicts eps and its variance."""
    channels = tuple(width * m for m in multiples)
    added = (None, *("added",) * (len(channels) - 1))
    return UNetConfig(
        in_channels=3, out_channels=6, channels=channels, layers_per_block=3, down_attention=added,
        mid_attention="added", up_attention=added, depth=(1,) * len(channels),
        heads=tuple(c // 64 for c in channels), context_dim=channels[-1], act="gelu", scale_shift=True,
        resample="residual", text_dim=4096, pool_heads=64,
    )


def close(got, want):
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.std()


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("norm_text", [False, True])
def test_attention_is_theirs(text_only, norm_text):
    """Theirs puts the text's columns first, ours last: the same softmax."""
    theirs = randomised(attention_processor.Attention(
        query_dim=64, cross_attention_dim=64, heads=4, dim_head=16, added_kv_proj_dim=96, norm_num_groups=32, bias=True,
        only_cross_attention=text_only, cross_attention_norm="group_norm" if norm_text else None, cross_attention_norm_num_groups=32,
        processor=attention_processor.AttnAddedKVProcessor()))
    ours = AddedAttention(64, 96, 4, text_only, norm_text)
    ours.load_state_dict(theirs.state_dict())
    x, text = torch.randn(2, 64, 3, 5), torch.randn(2, 7, 96)
    with torch.no_grad():
        seen = {"": None}
        close(ours(x, {"": ours.text(text)}, None, seen), theirs(x, encoder_hidden_states=text))
        maps, _ = site_maps(ours, seen[""], None, torch.arange(2))
    assert maps.shape == (2, 4, 15, 7)
    sums = maps.sum(-1)
    assert (sums - 1).abs().max() < 1e-6 if text_only else sums.max() < 1   # the rest lies on the pixels


@pytest.mark.slow
@pytest.mark.parametrize("ours, theirs", [
    (TINY, THEIRS), (UPSCALER, THEIR_UPSCALER),
    (replace(UPSCALER, down_attention=(None, "added text", "added text"), mid_attention="added text",
             up_attention=(None, "added text", "added text"), norm_text=False),
     THEIR_UPSCALER | dict(only_cross_attention=True, cross_attention_norm=None))],
    ids=["stage one", "upscaler", "upscaler, text alone"])
def test_unet_is_theirs(ours, theirs):
    theirs = randomised(diffusers.UNet2DConditionModel(**theirs)).double()
    unet = UNet(ours).eval().double()
    unet.load_state_dict(theirs.state_dict())
    g = torch.Generator().manual_seed(1)
    x, low, text = (torch.randn(3, *s, generator=g).double() for s in ((3, 16, 24), (3, 16, 24), (7, 32)))
    t, level = torch.tensor([0, 500, 999]), torch.tensor([250, 0, 3])
    with torch.no_grad():
        if ours.low_channels:
            close(unet(x, t, text, low=low, level=level)[0], theirs(torch.cat([x, low], 1), t, text, class_labels=level).sample)
        else:
            close(unet(x, t, text)[0], theirs(x, t, text).sample)


@pytest.mark.slow
@pytest.mark.parametrize("width, parameters", [(192, 371_605_830), (320, 935_365_830), (704, 4_304_695_110)], ids=["M", "L", "XL"])
def test_stage_one_at_full_size(width, parameters):
    with torch.device("meta"):
        state = UNet(deepfloyd(width)).state_dict()
        theirs = diffusers.UNet2DConditionModel(**THEIRS | dict(
            layers_per_block=3, block_out_channels=[width * m for m in (1, 2, 3, 4)], cross_attention_dim=4 * width,
            down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3), encoder_hid_dim=4096,
            up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"), attention_head_dim=64,
            addition_embed_type_num_heads=64))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert len(state) == 775 and sum(v.numel() for v in state.values()) == parameters


# ------------------------------------------------------------------------------------------------------------------- files

def own_names(state, head_dim):
    """diffusers' names of the small UNets as DeepFloyd's: counted by hand, queries, keys and values head by head."""
    middle = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    n_layers = {int(k.split(".")[1]): 0 for k in state if k.startswith("down_blocks")}
    for i in n_layers:
        n_layers[i] = len({k.split(".")[3] for k in state if k.startswith(f"down_blocks.{i}.resnets")})
    blocks, n = dict(middle), 1
    for i, layers in n_layers.items():
        for j in range(layers):
            blocks |= {f"down_blocks.{i}.resnets.{j}": f"input_blocks.{n}.0", f"down_blocks.{i}.attentions.{j}": f"input_blocks.{n}.1"}
            n += 1
        blocks[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{n}.0"
        n += 1
    n = 0
    for i, layers in enumerate(reversed(n_layers.values())):
        for j in range(layers + 1):
            blocks |= {f"up_blocks.{i}.resnets.{j}": f"output_blocks.{n}.0", f"up_blocks.{i}.attentions.{j}": f"output_blocks.{n}.1"}
            n += 1
        blocks[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{n - 1}.2"
    parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
             "conv2": "out_layers.3", "conv_shortcut": "skip_connection", "group_norm": "norm", "norm_cross": "norm_encoder",
             "to_out.0": "proj_out", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "class_embedding.linear_1": "aug_proj.0",
             "class_embedding.linear_2": "aug_proj.2", "encoder_hid_proj": "encoder_proj", "add_embedding.norm1": "encoder_pooling.0",
             "add_embedding.pool": "encoder_pooling.1", "add_embedding.proj": "encoder_pooling.2", "add_embedding.norm2": "encoder_pooling.3"}
    out = {}
    for name, t in state.items():
        block = next((b for b in blocks if name.startswith(b + ".")), "")
        rest = name.removeprefix(block + ".") if block else name
        if block and ".attentions." in block and rest.startswith(("to_q", "to_k", "to_v", "add_")):
            continue
        part = next(p for p in parts if rest.startswith(p + "."))
        new = f"{blocks[block]}.{parts[part]}" if block else parts[part]
        new += rest.removeprefix(part)
        out[new] = t[..., None] if rest == "to_out.0.weight" else t
    for block in {k.rpartition(".to_q.")[0] for k in state if ".to_q." in k}:
        for joined, names in (("qkv", ("to_q", "to_k", "to_v")), ("encoder_kv", ("add_k_proj", "add_v_proj"))):
            for end in ("weight", "bias"):
                each = [state[f"{block}.{n}.{end}"].unflatten(0, (-1, head_dim)) for n in names if f"{block}.{n}.{end}" in state]
                t = torch.stack(each, dim=1).flatten(0, 2)
                out[f"{blocks[block]}.{joined}.{end}"] = t[..., None] if end == "weight" else t
    return {k: v.contiguous() for k, v in out.items()}


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, "text alone"])
def test_own_naming_loads_to_equal_tensors(stages, tmp_path, which):
    if which == "text alone":
        state = randomised(diffusers.UNet2DConditionModel(**THEIR_UPSCALER | dict(only_cross_attention=True))).state_dict()
    else:
        state = p2p.load(stages[which], device="cpu").unet.state_dict()
    settings = "params:\n  num_head_channels: 8\n  att_pool_heads: '2'  # and more\n"
    (tmp_path / "config.yml").write_text(settings)
    torch.save(own_names(state, 8), tmp_path / "pytorch_model.bin")
    model = p2p.load(tmp_path, device="cpu", text=stages[0])
    assert (model.family, model.size) == ("if", (64, 64) if which == 0 else (256, 256))
    got = model.unet.state_dict()
    assert got.keys() == state.keys() and all(torch.equal(got[k], v) for k, v in state.items())


# ----------------------------------------------------------------------------------------------------------------- sampler

@pytest.mark.slow
@pytest.mark.parametrize("most", [1.0, 1.5])
@pytest.mark.parametrize("steps", [7, 50])
def test_steps_are_theirs(stages, most, steps):
    """Learned-range variance and dynamic thresholding, every step of the squared cosine, on the same noise.

    With our alphas: theirs are products in float32, whose 1 - alpha has three digits where there is hardly any noise.
    """
    theirs, model = scheduler(most), p2p.load(stages[0], device="cpu")
    assert (theirs.alphas_cumprod - model.alphas_cumprod).abs().max() < 1e-6
    theirs.alphas_cumprod, theirs.one = model.alphas_cumprod, torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(steps)
    ours = model.schedule(steps)
    assert list(ours.timesteps) == theirs.timesteps.tolist()
    g = torch.Generator().manual_seed(0)
    for t, a_t, a_prev in ours:
        x, out, v = (torch.randn(2, 3, 8, 8, generator=g).double() for _ in range(3))
        state = g.get_state()
        noise = torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64)
        g.set_state(state)
        want = theirs.step(torch.cat([out, v], dim=1), t, x, generator=g).prev_sample
        x_0, _ = x0_and_eps(x, out, a_t, clip=(0.95, most))
        assert (ddpm_step(x, x_0, a_t, a_prev, noise, v) - want).abs().max() <= 1e-6


@pytest.mark.slow
def test_a_run_is_ddpm_with_the_variance_that_is_learned(stages):
    model = p2p.load(stages[0], device="cpu")
    x, *noise = draw(model.latent_shape(16, 16), [3], 4)
    text, schedule = model.condition(["a cat"]), model.schedule(3)
    for (t, level, after), z in zip(schedule, noise):
        out, variance, _ = model.predict(x, t, text)
        x = ddpm_step(x, x0_and_eps(x, out, level, clip=model.clip)[0], level, after, z, variance)
    run = dict(steps=3, seed=3, guidance_scale=1.0, height=16, width=16)
    assert (p2p.generate(model, "a cat", **run).latents - x).abs().max() < 1e-4
    assert (p2p.generate(replace(model, learned_variance=False), "a cat", **run).latents - x).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------------------- edits

def test_t5_tokens_know_their_words(stages):
    model = p2p.load(stages[0], device="cpu")
    t = model.tokens("A big  hippopotamus, on grass!")
    assert words(t) == [("a", [0]), ("big", [1]), ("hippopotamus,", t_range(t, "hippopotamus,")), ("on", t_range(t, "on")),
                        ("grass!", t_range(t, "grass!"))]
    assert word_tokens(t, "hippopotamus", 77) == t_range(t, "hippopotamus,")[:-1]
    assert t.spans[-1] == (0, 0) and t.ids[-1] == 1


def test_prompts_are_read_in_small_letters(stages, capsys):
    """As IFPipeline reads them; T5 tells letters apart."""
    tower = p2p.load(stages[0], device="cpu").text_encoders[0]
    theirs = diffusers.IFPipeline._text_preprocessing(None, "A Cat on Grass")
    want = tower.tokenizer(theirs, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tower.tokenize(["A Cat on Grass"]), want) and tower.tokens("A  Cat on Grass").text == theirs[0]
    shown = []
    for prompt in ("A Cat on Grass", "a cat on grass"):
        assert main(["tokens", prompt, "--model", str(stages[0])]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert not torch.equal(T5Encoder(tower.tower, tower.tokenizer, masked=False).tokenize(["A Cat on Grass"]), want)


def t_range(t, word):
    start = t.text.index(word)
    return [i for i, (s, e) in enumerate(t.spans) if start <= s and e <= start + len(word) and e]


@pytest.mark.slow
@pytest.mark.parametrize("target, settings", [
    ("a red dog on grass", dict(mode="replace")), ("a big red cat on grass", dict(mode="refine")),
    ("a red cat on grass", dict(mode="reweight", equalizer={"red": -1.5})),
    ("a red hippopotamus on grass", dict(local_blend=p2p.LocalBlend(words=("cat", "hippopotamus"), level=2)))])
def test_edits_through_hybrid_attention(stages, target, settings):
    """The stochastic sampler shares its noise: the source is that of a run alone, the same prompt gives the same picture."""
    model = p2p.load(stages[0], device="cpu")
    common = dict(steps=4, seed=3, height=32, width=48)
    source = "a red cat on grass"
    r = p2p.edit(model, source, [p2p.Edit(target, **settings), p2p.Edit(source)], **common)
    alone = p2p.generate(model, source, **common).latents[0]
    assert r.settings["eta"] == 1.0 and r.latents.shape == (3, 3, 32, 48)
    assert (r.latents[0] - alone).abs().max() < 1e-3 and (r.latents[2] - alone).abs().max() < 1e-3
    assert (r.latents[1] - alone).abs().max() > 1e-2


def test_fused_is_explicit(stages):
    """The table of the identity on IF's own attention, text columns last, in float64."""
    layer = AddedAttention(64, 96, 8, text_only=False, norm_text=True).double()
    randomised(layer)
    x, text = torch.randn(3, 64, 4, 4).double(), torch.randn(3, 5, 96).double()
    mix, keep = torch.randn(1, 5, 5).double(), torch.randn(1, 5).double()
    edit, seen = AttentionEdit(torch.tensor([1]), mix, keep), {"": None}
    fused = layer(x, {"": layer.text(text)}, edit, seen)
    _, maps = site_maps(layer, seen[""], edit, torch.arange(3))
    e = layer.norm_cross(text.transpose(1, 2)).transpose(1, 2)
    n = layer.group_norm(x).flatten(2).transpose(1, 2)
    split = lambda y: y.unflatten(-1, (8, 8)).transpose(1, 2)  # noqa: E731
    q, k, v = (split(y) for y in (layer.to_q(n), torch.cat([layer.to_k(n), layer.add_k_proj(e)], 1),
                                  torch.cat([layer.to_v(n), layer.add_v_proj(e)], 1)))
    probs = (q @ k.mT / 8**0.5).softmax(-1)
    edited = torch.cat([probs[2:, ..., :16], probs[1:2, ..., 16:] @ mix[:, None] + probs[2:, ..., 16:] * keep[:, None, None]], -1)
    out = layer.to_out((torch.cat([probs[:2], edited]) @ v).transpose(1, 2).flatten(2))
    assert (fused - (x + out.transpose(1, 2).unflatten(2, (4, 4)))).abs().max() < 1e-12
    assert (maps[2:] - edited[..., 16:]).abs().max() < 1e-12


@pytest.mark.slow
def test_prompts_encoded_beforehand_give_the_same_pictures(stages, tmp_path, capsys):
    prompts = ["a red cat on grass", "a red dog on grass"]
    assert main(["encode", *prompts, "--model", str(stages[0]), "-o", str(tmp_path)]) == 0
    file = capsys.readouterr().out.strip()
    common = dict(steps=2, seed=1, height=16, width=16)
    there = p2p.edit(p2p.load(stages[0], device="cpu"), *prompts, **common)
    model = p2p.load(stages[0], device="cpu", text=file)
    here = p2p.edit(model, *prompts, **common)
    assert (there.latents - here.latents).abs().max() < 1e-4
    with pytest.raises(p2p.UsageError, match='"a bird" is not among the encoded ones'):
        p2p.generate(model, "a bird")
    with pytest.raises(p2p.CheckpointError, match="no T5 there"):
        p2p.load(stages[0], device="cpu", text=tmp_path)
    (tmp_path / "other.safetensors").write_bytes((stages[0] / "text_encoder" / "model.safetensors").read_bytes())
    with pytest.raises(p2p.CheckpointError, match="not a file of encoded prompts"):
        p2p.load(stages[0], device="cpu", text=tmp_path / "other.safetensors")

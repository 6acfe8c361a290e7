"""Every family in every format: equal tensors, and the outputs of diffusers and transformers."""
import json
import shutil
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from oracles import diffusers, transformers
from safetensors.torch import load_file, save_file

import p2p
from p2p import CheckpointError
from p2p.models.text import CLIP_L, OPENCLIP_G, OPENCLIP_H, SDXL_L, TextEncoder
from p2p.models.unet import SD2, SDXL, UNet
from p2p.models.vae import SD, AutoencoderKL
from p2p.weights import keys
from p2p.weights.convert import convert, single_file
from p2p.weights.load import find

PROMPTS = ["a cat on grass, riding a (bicycle)!", "Ünïcode & émojis: 2 cats 😀 日本語", "", "cat " * 100]


def load(path, **kw):
    return p2p.load(path, device="cpu", dtype=torch.float32, **kw)


def parts_of(model):
    return [model.unet, *model.text_encoders, model.vae]


def equal(a, b):
    for x, y in zip(parts_of(a), parts_of(b)):
        assert x.config == y.config
        x, y = x.state_dict(), y.state_dict()
        assert x.keys() == y.keys() and all(torch.equal(t, y[k]) for k, t in x.items())


def close(got, want):
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.abs().max()


# ------------------------------------------------------------------------------------------------------- full sizes

@pytest.mark.slow
@pytest.mark.parametrize("config, tensors, parameters", [(SD2, 686, 865_910_724), (SDXL, 1680, 2_567_463_684)], ids=["sd2", "sdxl"])
def test_unet_at_full_size(config, tensors, parameters):
    with torch.device("meta"):
        state = UNet(config).state_dict()
    assert len(state) == tensors and sum(p.numel() for p in state.values()) == parameters
    prefixes = keys.unet_prefixes(config)
    names = [k for s in keys.ldm_sources(state, prefixes).values() for k in s.keys]
    assert len(set(names)) == len(names) == tensors


def test_text_towers_at_full_size():
    """Widths, layers that are used, and where the pooled text comes from; names a bijection in both namings."""
    for config, parameters in ((CLIP_L, 123_060_480), (SDXL_L, 115_971_072), (OPENCLIP_H, 340_387_840), (OPENCLIP_G, 694_659_840)):
        with torch.device("meta"):
            state = TextEncoder(config).state_dict()
        assert sum(p.numel() for p in state.values()) == parameters
        names = [k for s in keys.hf_sources(state).values() for k in s.keys]
        assert len(set(names)) == len(names) == len(state) + 4 * config.layers


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_ldm_names_are_those_that_diffusers_reads(family, tmp_path):
    """diffusers' own converters take our single file back to the tensors that we began with."""
    from diffusers.loaders import single_file_utils as theirs

    parts = families.build(family)
    folder = families.save(parts, tmp_path / "folder", family)
    state = single_file(find(folder))
    config = dict(parts["unet"].config)
    got = theirs.convert_ldm_unet_checkpoint(dict(state), config)
    want = parts["unet"].state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    got = theirs.convert_ldm_vae_checkpoint(dict(state), dict(parts["vae"].config))
    want = parts["vae"].state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k].reshape(want[k].shape), want[k]) for k in want)
    names = [k for k in state if "text_model" in k or "cond_stage" in k or "conditioner" in k]
    assert len(names) == len(state) - len(parts["unet"].state_dict()) - len(parts["vae"].state_dict())
    if family != "sd2":
        prefix = keys.TEXT_SD1 if family == "sd1" else keys.TEXT_SDXL[0]
        want = {k.removeprefix("text_model."): v for k, v in parts["text_encoder"].state_dict().items()}
        assert all(torch.equal(state[prefix + k], v) for k, v in want.items())


# ------------------------------------------------------------------------------------------------- formats, equal tensors

@pytest.mark.slow
def test_single_file_and_back(made, single, plain, tmp_path):
    family, _, folder = made
    equal(plain, load(folder))
    convert(find(single), tmp_path / "back")
    back = load(tmp_path / "back")
    equal(back, plain)
    assert plain.family == back.family == family


@pytest.mark.slow
def test_diffusers_opens_a_converted_folder(made, single, plain, tmp_path):
    """With tokenizers, since a pipeline cannot do without them."""
    family, parts, _ = made
    convert(find(single), tmp_path / "back")
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(tmp_path / "back")
    want = parts["unet"].state_dict()
    assert all(torch.equal(v, want[k]) for k, v in pipe.unet.state_dict().items())
    ids = pipe.tokenizer(["a photo of a cat", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ids, plain.text_encoders[0].tokenize(["a photo of a cat", ""]))


FOLDERS = {
    "bin": dict(safe_serialization=False), "fp16 variant": dict(variant="fp16"), "bf16 variant": dict(variant="bf16"), "shards": dict(max_shard_size="300KB"),
    "bin shards": dict(max_shard_size="300KB", safe_serialization=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", FOLDERS)
def test_folder_formats(made, plain, tmp_path, how):
    family, parts, _ = made
    other = families.save(parts, tmp_path / "other", family, **FOLDERS[how])
    shards = list((other / "unet").glob("*.index*.json"))
    assert bool(shards) == ("shards" in how)
    equal(load(other), plain)


@pytest.mark.slow
def test_pipelines_of_the_same_parts(made, plain, tmp_path):
    family, _, folder = made
    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    for kind in ("StableDiffusionXLImg2Img",) if family == "sdxl" else ("StableDiffusionImg2Img", "LatentConsistencyModel"):
        (other / "model_index.json").write_text(json.dumps(index | {"_class_name": f"{kind}Pipeline"}))
        equal(load(other), plain)


@pytest.mark.slow
def test_old_and_new_names_in_folders(made, plain, tmp_path):
    """Autoencoders saved before diffusers 0.17, and text towers with and without `text_model.`."""
    _, parts, folder = made
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for k, v in load_file(file).items():
        for new, name in old.items():
            k = k.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        state[k] = v
    assert any("query" in k for k in state)
    save_file(state, file)
    for name in [n for n in parts if n.startswith("text")]:
        file = other / name / "model.safetensors"
        state = load_file(file)
        wrapped = any(k.startswith("text_model.") for k in state)
        ends = ("text_projection",)
        save_file({(k.removeprefix("text_model.") if wrapped or k.startswith(ends) else "text_model." + k): v
                   for k, v in state.items()}, file)
    equal(load(other), plain)


def nested(state, depth):
    for _ in range(depth):
        state = {"state_dict": state, "epoch": 3, "global_step": 7}
    return state


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_pickles(single, plain, tmp_path, depth):
    torch.save(nested(load_file(single), depth), tmp_path / "model.ckpt")
    equal(load(tmp_path / "model.ckpt"), plain)


@pytest.mark.slow
def test_lightning_pickle_with_its_leftovers(single, plain, tmp_path):
    """A callback's class, numpy numbers and optimizer states, in today's and in the oldest file format."""
    import sys
    import types


    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    stub = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = stub
    fake = {module.__name__: module, "pytorch_lightning": types.ModuleType("pytorch_lightning"),
            "pytorch_lightning.callbacks": types.ModuleType("pytorch_lightning.callbacks")}
    sys.modules.update(fake)
    try:
        state = nested(load_file(single), 1) | {"callbacks": {stub: {"best": np.float64(0.5)}}, "lr_schedulers": []}
        for new in (True, False):
            torch.save(state, tmp_path / f"{new}.ckpt", _use_new_zipfile_serialization=new)
    finally:
        for name in fake:
            del sys.modules[name]
    for new in (True, False):
        equal(load(tmp_path / f"{new}.ckpt"), plain)


@pytest.mark.slow
@pytest.mark.parametrize("less", ["model.", "", keys.UNET])
@pytest.mark.parametrize("dots", [False, True])
def test_averaged_weights_are_taken_when_asked_for(single, plain, tmp_path, dots, less):
    """Of a file with both the plain ones are used, as elsewhere: a merge may carry the averages of its base. Which, is said."""
    state = load_file(single)
    unet = [k for k in state if k.startswith(keys.UNET)]
    form = (lambda k: k) if dots else (lambda k: k.replace(".", ""))
    twins = {"model_ema." + form(k.removeprefix(less)): state[k] + 1 for k in unet}
    extra = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    save_file(state | twins | extra, tmp_path / "ema.safetensors")
    own, averaged = (load(tmp_path / "ema.safetensors", ema=ema) for ema in (False, True))
    equal(own, plain)
    assert torch.equal(averaged.unet.conv_in.bias, own.unet.conv_in.bias + 1)
    assert any("plain weights are used, not the averaged ones (EMA)" in n for n in own.notes)
    assert any("averaged weights (EMA) used" in n for n in averaged.notes)
    assert averaged.identity() == own.identity() | {"ema": True}
    convert(find(tmp_path / "ema.safetensors", ema=True), tmp_path / "out.safetensors")
    assert torch.equal(load(tmp_path / "out.safetensors").unet.conv_in.bias, averaged.unet.conv_in.bias)
    twins.pop(next(iter(twins)))
    save_file(state | twins | extra, tmp_path / "part.safetensors")
    equal(load(tmp_path / "part.safetensors"), plain)
    for path, said in (("part.safetensors", "are there for .* of"), (single, "no averaged weights")):
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / path, ema=True)


@pytest.mark.slow
def test_mixed_types_and_ranks(single, plain, tmp_path):
    """fp16 UNet beside fp32 autoencoder; projections stored as 1x1 convolutions or linear layers; old position_ids."""
    state = load_file(single)
    for k in list(state):
        if ".proj_in.weight" in k or ".proj_out.weight" in k:
            state[k] = state[k].reshape(*state[k].shape[:2], 1, 1) if state[k].ndim == 2 else state[k][..., 0, 0]
        if k.startswith(keys.UNET):
            state[k] = state[k].half()
    if any(k.startswith(keys.TEXT_SD1) for k in state):
        state[keys.TEXT_SD1 + "embeddings.position_ids"] = torch.arange(77)[None].half()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "mixed.safetensors")
    mixed = load(tmp_path / "mixed.safetensors")
    for a, b in zip(mixed.unet.state_dict().values(), plain.unet.state_dict().values()):
        assert torch.equal(a.flatten(), b.half().float().flatten())
    assert torch.equal(mixed.vae.quant_conv.weight, plain.vae.quant_conv.weight)


@pytest.mark.slow
def test_separate_autoencoder(made, single, plain, tmp_path):
    """As LDM saves it (with training leftovers), from inside a whole model, and as a diffusers folder."""
    state = {k.removeprefix(keys.VAE): v + 1 for k, v in load_file(single).items() if k.startswith(keys.VAE)}
    save_file(state | {"loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
    torch.save({"state_dict": state}, tmp_path / "vae.ckpt")
    for path in ("vae.safetensors", "vae.ckpt"):
        assert torch.equal(load(single, vae=tmp_path / path).vae.quant_conv.weight, plain.vae.quant_conv.weight + 1)
    equal(load(single, vae=made[2] / "vae"), plain)
    (file,) = (made[2] / "vae").glob("*.safetensors")
    alone = load(single, vae=shutil.copy(file, tmp_path / "alone.safetensors"))   # without its config
    equal(alone, plain)
    assert alone.identity()["vae"] and alone.overrides["vae"] == alone.identity()["vae"]
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "scaling_factor": 0.5}))   # another's
    assert load(single, vae=tmp_path / "alone.safetensors").latent_scale == plain.latent_scale
    with pytest.raises(CheckpointError, match="autoencoder alone.*--vae"):
        load(tmp_path / "vae.safetensors")


@pytest.mark.slow
def test_half_conversion(single, tmp_path):
    convert(find(single), tmp_path / "half.safetensors", half=True)
    assert {v.dtype for v in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        convert(find(single), tmp_path / "half.safetensors")


# ------------------------------------------------------------------------------------------- outputs, against the oracles

def reference_text(parts, model, prompts):
    """context and pooled text as diffusers' pipelines make them, from our token ids."""
    ids = [e.tokenize(prompts) for e in model.text_encoders]
    first = parts["text_encoder"](ids[0], output_hidden_states=True)
    if "text_encoder_2" not in parts:
        return first.last_hidden_state, None
    second = parts["text_encoder_2"](ids[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def test_text_is_theirs(made, plain):
    _, parts, _ = made
    with torch.no_grad():
        context, pooled = reference_text(parts, plain, PROMPTS)
    c = plain.condition(PROMPTS)
    close(c.context, context)
    if pooled is not None:
        close(c.vector[:, : families.POOLED], pooled)


@pytest.mark.slow
def test_tokens_are_those_of_transformers(single, plain, tmp_path):
    """On everything but what is documented: ftfy's repairs, and `!` where it is the padding's name (SD 2, SDXL's second)."""
    convert(find(single), tmp_path / "back")
    alike = ["a cat, on (grass)...", "Ünïcode & émojis: 2 cats 😀 日本語", "", "  double  spaces ", "cat " * 100, "it's 1,234.5%"]
    for i, encoder in enumerate(plain.text_encoders):
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "back" / ("tokenizer_2" if i else "tokenizer"))
        prompts = alike + (["wow!", "!! a cat !"] if encoder.config.pad_id == 49407 else [])
        ids = theirs(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ids, encoder.tokenize(prompts))
        assert torch.equal(encoder.tokenize(["don’t “quote”"]), encoder.tokenize(['don\'t "quote"']))   # ftfy


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_unet_is_theirs(made, plain, size):
    family, parts, _ = made
    model, height, width = plain, size[0] * 2, size[1] * 2
    x, t = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
    c, extra = model.condition(PROMPTS[:2], height, width), {}
    with torch.no_grad():
        context, pooled = reference_text(parts, model, PROMPTS[:2])
        if family == "sdxl":
            ids = torch.tensor([[height, width, 0, 0, height, width]] * 2).float()
            extra = dict(added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids))
        close(model.unet(x, t, c.context, vector=c.vector)[0], parts["unet"](x, t, context, **extra).sample)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_autoencoder_is_theirs(made, plain, size):
    _, parts, _ = made
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        close(plain.encode(x) / plain.latent_scale, parts["vae"].encode(x).latent_dist.mean)
        z = torch.randn(2, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(1))
        close(plain.decode(z * plain.latent_scale), parts["vae"].decode(z).sample)


def test_empty_prompt_of_sdxl(made, plain):
    """Zeros, pooled text too, as released; or the encoded "" if asked."""
    family, _, _ = made
    c = plain.null(2)
    assert (c.context.abs().sum() == 0) == (family == "sdxl") == plain.zero_negative
    if family == "sdxl":
        assert c.vector[:, : families.POOLED].abs().sum() == 0 and c.vector.abs().sum() > 0
        assert replace(plain, zero_negative=False).null(1).context.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------ sizes and precision

def test_sizes_that_do_not_fit(plain):
    with pytest.raises(p2p.UsageError, match="height must be a positive multiple of 8, not 60"):
        p2p.generate(plain, "a cat", steps=1, height=60)


@pytest.mark.slow
def test_half_precision_with_float32_where_it_would_overflow(made, single, plain):
    """SD 2's attention and SDXL's autoencoder run in float32 in a half-precision model."""
    family = made[0]
    model = p2p.load(single, device="cpu", dtype=torch.float16)
    assert model.unet.config.upcast_attention == (family == "sd2")
    assert model.vae.quant_conv.weight.dtype == (torch.float32 if family == "sdxl" else torch.float16)
    latents = p2p.generate(model, "a cat", steps=2, height=32, width=32).latents
    exact = p2p.generate(plain, "a cat", steps=2, height=32, width=32).latents
    assert (latents - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.slow
def test_config_fields_that_change_the_math_are_refused(made, tmp_path):
    _, _, folder = made
    for i, (part, field, value) in enumerate((("unet", "resnet_time_scale_shift", "scale_shift"), ("unet", "dual_cross_attention", True),
                               ("vae", "shift_factor", 0.1), ("scheduler", "beta_schedule", "linear"),
                               ("scheduler", "prediction_type", "flow"))):
        other = shutil.copytree(folder, tmp_path / f"other-{i}")
        where = other / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        where.write_text(json.dumps(json.loads(where.read_text()) | {field: value}))
        with pytest.raises(CheckpointError, match=rf"{field}\W.*{value}"):
            find(other)


def test_vae_sizes_on_the_meta_device():
    with torch.device("meta"):
        state = AutoencoderKL(SD).state_dict()
    names = [k for s in keys.ldm_sources(state, keys.vae_prefixes(SD)).values() for k in s.keys]
    assert len(state) == len(set(names)) == 248
    assert set(keys.old_vae_sources(state)) == set(state)

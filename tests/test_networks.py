"""UNet, autoencoder and text tower against diffusers and transformers, with random weights; sizes on the meta device.

In float64, so that the bound is about formulas: in float32 both sides differ by about 1e-5 from rounding alone.
"""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles import diffusers, transformers

from p2p.models import cpu
from p2p.models.blocks import FeedForward, timestep_embedding
from p2p.models.cpu import ONEDNN
from p2p.models.layers import Conv2d, Linear
from p2p.models.text import CLIP_L, TextConfig, TextEncoder, tokens
from p2p.models.text import EMOJI as EMOJI_TEXT
from p2p.models.unet import EMOJI, SD1, UNet
from p2p.models.vae import SD, AutoencoderKL, VAEConfig
from p2p.weights.keys import hf_sources, ldm_sources, unet_prefixes, vae_prefixes


def randomised(module, seed=0):
    """Weights away from every zero and one that initialisation leaves, so that nothing is hidden."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)
                    + (1 if p.ndim == 1 else 0))
    return module.eval().double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def close(got, want):
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-6 * want.abs().max()   # the timestep's sinusoids are float32


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (1, 24), (0, 24)])
def test_linear_is_the_plain_one(shape, bias):
    layer = Linear(24, 40, bias)
    for x in (torch.randn(shape), torch.randn(24, *shape[:-1]).movedim(0, -1), torch.randn(shape).double()):
        layer = layer.to(x.dtype)
        with torch.no_grad():
            got = layer(x)
        want = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert got.shape == want.shape and got.dtype == x.dtype
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6)
        assert layer(x).requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, pads, stride", [((2, 6, 4, 4), 1, 1), ((1, 6, 5, 3), 1, 1), ((3, 6, 9, 9), 1, 1), ((1, 6, 4, 4), 1, 2),
                                                 ((1, 6, 4, 4), 0, 1)])
def test_convolution_is_the_plain_one_whatever_multiplies(shape, pads, stride, bias, monkeypatch):
    monkeypatch.setattr(cpu, "LARGE", 0)                                        # as if every kernel were large
    layer, products = Conv2d(6, 64, 3, stride, pads, bias=bias), []
    monkeypatch.setattr(cpu, "_neighbourhoods", lambda x, of=cpu._neighbourhoods: products.append(1) or of(x))
    first, last = torch.contiguous_format, torch.channels_last
    for x, kernel in ((torch.randn(shape), first), (torch.randn(shape), last), (torch.randn(shape).contiguous(memory_format=last), first),
                      (torch.randn(shape).double(), first)):
        layer = layer.to(x.dtype, memory_format=kernel)
        with torch.no_grad():
            got = layer(x)
        want = F.conv2d(x, layer.weight, layer.bias, stride, pads).detach()
        assert got.is_contiguous() or got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert layer(x).requires_grad
    few = shape[0] * shape[2] * shape[3] <= 32 and (pads, stride) == (1, 1)
    assert len(products) == (3 if few and ONEDNN else 0)                           # of float32


@torch.no_grad()
def test_seamless_padding_is_kept(monkeypatch):
    """Forks make textures that tile by setting `padding_mode` on the loaded layers."""
    monkeypatch.setattr(cpu, "LARGE", 0)
    layer, x = Conv2d(6, 64, 3, padding=1), torch.randn(1, 6, 4, 4)
    plain, layer.padding_mode = layer(x), "circular"
    want = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert not plain.allclose(want, atol=1e-2)


def test_feed_forward_in_pieces_is_the_whole(monkeypatch):
    ff, x = randomised(FeedForward(16)), randn(5, 12, 16)
    whole, pieces = ff(x), []
    ff.net.register_forward_pre_hook(lambda _, given: pieces.append(len(given[0])))
    monkeypatch.setattr(FeedForward, "LARGE", 2 * 12 * 8 * 16)                     # two rows of x at a time
    close(ff(x), whole)
    assert pieces == [2, 2, 1]


@pytest.mark.slow
def test_sd1_unet_at_full_size():
    with torch.device("meta"):
        unet = UNet(SD1)
    state = unet.state_dict()
    assert len(state) == 686 and sum(p.numel() for p in state.values()) == 859_520_964
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_vae_at_full_size():
    with torch.device("meta"):
        state = AutoencoderKL(SD).state_dict()
    assert len(state) == 248 and sum(p.numel() for p in state.values()) == 83_653_863


def test_clip_at_full_size():
    with torch.device("meta"):
        state = TextEncoder(CLIP_L).state_dict()
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    assert sum(p.numel() for p in state.values()) == sum(p.numel() for p in theirs.parameters()) == 123_060_480


@pytest.mark.parametrize("part", ["unet", "vae", "clip"])
def test_ldm_names_are_a_bijection(part, golden):
    """Every module tensor has its own name in the file, and all of the golden file's names are used."""
    with torch.device("meta"):
        if part == "unet":
            names = UNet(SD1).state_dict()
            sources, prefix = ldm_sources(names, unet_prefixes(SD1)), "model.diffusion_model."
        elif part == "vae":
            names = AutoencoderKL(SD).state_dict()
            sources, prefix = ldm_sources(names, vae_prefixes(SD)), "first_stage_model."
        else:
            names = TextEncoder(replace(CLIP_L, layers=golden[0]["text_layers"])).state_dict()
            sources, prefix = hf_sources(names), "cond_stage_model.transformer.text_model."
    used = [k for s in sources.values() for k in s.keys]
    assert sources.keys() == names.keys() and len(used) == len(set(used))
    assert {prefix + k for k in used} == {k for k in golden[0]["shapes"] if k.startswith(prefix)} - {
        prefix + "embeddings.position_ids"}


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_unet_is_that_of_diffusers(linear, size):
    config = replace(SD1, channels=(32, 64, 64, 96), heads=(4, 4, 4, 4), context_dim=24, linear_projection=linear)
    unet = randomised(UNet(config))
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=config.channels, cross_attention_dim=24, attention_head_dim=4,
        use_linear_projection=linear).eval().double()
    theirs.load_state_dict(unet.state_dict())
    x, context, t = randn(2, 4, *size), randn(2, 5, 24, seed=1), torch.tensor([3, 981])
    with torch.no_grad():
        close(unet(x, t, context)[0], theirs(x, t, context).sample)


@pytest.mark.slow
def test_hybrid_unet_runs_on_pixels_and_names_its_sites():
    """Cross-attention going down, hybrid in the middle and going up; only the queries and keys of sites that are watched come
    back, and the sites' sizes are known beforehand."""
    unet = randomised(UNet(EMOJI))
    x, context = randn(2, 3, 64, 64), randn(2, 7, EMOJI.context_dim)
    with torch.no_grad():
        sizes = unet.site_pixels(64, 64)
        out, seen = unet(x, 10, context, watch=sizes)
        plain, nothing = unet(x, 10, context)
        assert out.shape == x.shape and torch.equal(out, plain) and not nothing
    assert {k: q.shape[1] for k, (q, _) in seen.items()} == sizes
    assert {k: (sizes[k], seen[k][1].shape[1]) for k in unet.text_sites()} == {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2": (256, 7),
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2": (64, 7),
        "mid_block.attentions.0.transformer_blocks.0.attn1": (64, 64 + 7),
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1": (64, 64 + 7),
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1": (64, 64 + 7),
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1": (256, 256 + 7),
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1": (256, 256 + 7)}
    assert sorted({*sizes} - {*unet.text_sites()}) == [f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1" for i in (1, 2)]


def test_timestep_embedding_is_that_of_diffusers():
    t = torch.tensor([0, 1, 500, 999])
    theirs = diffusers.models.embeddings.get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert (timestep_embedding(t, 64) - theirs).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_vae_is_that_of_diffusers(size):
    config = VAEConfig(channels=(32, 64, 64), layers_per_block=1)
    vae = randomised(AutoencoderKL(config))
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=config.channels, layers_per_block=1, latent_channels=4).eval().double()
    theirs.load_state_dict(vae.state_dict())
    x, z = randn(2, 3, *size), randn(2, 4, size[0] // 4, size[1] // 4)
    with torch.no_grad():
        close(vae.encode(x)[0], theirs.encode(x).latent_dist.mean)
        close(vae.encode(x)[1], theirs.encode(x).latent_dist.logvar)
        close(vae.decode(z), theirs.decode(z).sample)


@pytest.mark.slow
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_text_tower_is_that_of_transformers(quick_gelu):
    """Names mapped as in a checkpoint; quick_gelu and gelu give different contexts."""
    config = TextConfig(width=128, heads=2, layers=2, quick_gelu=quick_gelu)
    ours = randomised(TextEncoder(config))
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        hidden_act="quick_gelu" if quick_gelu else "gelu")).eval().double()
    names = {k.removeprefix("text_model."): k for k in theirs.state_dict()}   # older releases nest, newer do not
    state = ours.state_dict()
    filled = {}
    for name, source in hf_sources(state).items():
        for key, part in zip(source.keys, state[name].chunk(len(source.keys))):
            filled[names[key]] = part
    theirs.load_state_dict(filled, strict=True)
    ids = ours.tokenize(["a cat riding a bicycle", ""])
    with torch.no_grad():
        close(ours(ids), theirs(ids).last_hidden_state)
        other = randomised(TextEncoder(replace(config, quick_gelu=not quick_gelu)))
        assert (other(ids) - ours(ids)).abs().max() > 1e-3


def test_padding_is_explicit():
    cat, small = tokens("a cat").ids, replace(CLIP_L, layers=1, width=64, heads=1)
    for config, pad in ((small, 49407), (replace(small, pad_id=0), 0)):
        assert TextEncoder(config).tokenize(["a cat"])[0].tolist() == cat + [pad] * (77 - len(cat))
    long = TextEncoder(small).tokenize(["cat " * 100])[0]
    assert long[-1] == 49407 and (long[1:-1] == cat[2]).all()


def test_compact_vocabulary():
    """Only listed tokens have rows; others embed as nothing and are reported; padding gives a zero context."""
    encoder = randomised(TextEncoder(replace(EMOJI_TEXT, vocab_size=4)))
    encoder.vocab.copy_(torch.tensor(sorted({49406, 49407, *tokens("a cat").ids[1:3]})))
    ids = encoder.tokenize(["a cat", "a dog", "a bird"])
    assert encoder.unknown(ids)[:, 2].tolist() == [False, True, True]
    with torch.no_grad():
        context = encoder(ids)
    assert torch.equal(context[1], context[2]) and not torch.equal(context[0], context[1])
    assert (context[:, 4:] == 0).all() and (context[:, :4].abs().sum(-1) > 0).all()

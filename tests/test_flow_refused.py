"""Relatives of Stable Diffusion 3 and FLUX.1 that are not supported: each is refused by its name, in a short message."""
from types import SimpleNamespace

import flow_models as made
import pytest
import torch
from safetensors.torch import save_file

from p2p import CheckpointError
from p2p.models.mmdit import FLUX_DEV, MMDiTConfig, build
from p2p.models.vae import AutoencoderKL, VAEConfig
from p2p.weights import t5
from p2p.weights.convert import _rename
from p2p.weights.keys import ldm_sources, vae_prefixes
from p2p.weights.load import find

FLUX = MMDiTConfig(in_channels=4, out_channels=4, dim=64, heads=2, double=1, single=1, context_dim=24, vector_dim=20, qk_norm=True,
                   axes=FLUX_DEV.axes, guidance=True)
SD3 = MMDiTConfig(in_channels=4, out_channels=4, dim=64, heads=1, double=2, context_dim=24, vector_dim=20, table=4)
DIFFUSERS = "single_transformer_blocks.0."


def tensors(config, **more):
    """A transformer of zeros, with other tensors (None: without these)."""
    state = {k: torch.zeros(v.shape) for k, v in build(config).state_dict().items()} | more
    return {k: v for k, v in state.items() if v is not None}


def zeros(*names):
    return {name: torch.zeros(2, 2) for name in names}


def inputs(channels):
    return {"img_in.weight": torch.zeros(64, channels)}


FP8 = torch.zeros(2, 2).to(torch.float8_e4m3fn)
REFUSED = {   # tensors, and what the message calls the file
    "Fill": (tensors(FLUX, **inputs(16 * 6)), "FLUX.1 Fill: it takes 24 channels of latents and gives 4"),
    "Canny": (tensors(FLUX, **inputs(16 * 2)), "FLUX.1 Canny or Depth"),
    "a flow of another input": (tensors(FLUX, **inputs(16 * 3)), "no text-to-image model"),
    "SD 3 of another input": (tensors(SD3, **{"x_embedder.proj.weight": torch.zeros(64, 8, 2, 2)}), "no text-to-image model"),
    "Redux": (zeros("redux_up.weight", "redux_up.bias", "redux_down.weight", "redux_down.bias"), "FLUX.1 Redux"),
    "FLUX.2": (tensors(FLUX, **zeros("double_stream_modulation_img.lin.weight")), "FLUX.2"),
    "FLUX.2 with prefix": (zeros("model.diffusion_model.single_stream_modulation.lin.weight", "x.bias", "y.bias"), "FLUX.2"),
    "Chroma": (tensors(FLUX, **zeros("distilled_guidance_layer.in_proj.weight")), "Chroma"),
    "HunyuanVideo": (tensors(FLUX, **zeros("txt_in.individual_token_refiner.blocks.0.norm1.weight")), "a video model"),
    "ControlNet of InstantX": (zeros("controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "transformer_blocks.0.attn.add_q_proj.bias"),
                               "a ControlNet of Stable Diffusion 3 or FLUX"),
    "ControlNet of XLabs": (tensors(FLUX, **zeros("controlnet_blocks.0.weight")), "a ControlNet of Stable Diffusion 3 or FLUX"),
    "ControlNet of SD 3.5": (zeros("controlnet_blocks.0.weight", "transformer_blocks.0.adaLN_modulation.1.weight", "x.bias"), "a ControlNet"),
    "IP-Adapter of XLabs": (zeros("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "ip_adapter_proj_model.proj.weight"),
                            "an IP-Adapter"),
    "scaled fp8": (tensors(FLUX, **zeros("double_blocks.0.img_attn.qkv.scale_weight"), scaled_fp8=torch.zeros(2)), "its weights are fp8"),
    "fp8": (tensors(FLUX, **{"img_in.bias": FP8}), "its weights are fp8"),
    "bnb nf4": (tensors(FLUX, **zeros("img_in.weight.absmax", "img_in.weight.quant_map",
                                      "img_in.weight.quant_state.bitsandbytes__nf4")), "its weights are quantised .bitsandbytes"),
    "bnb int8": (zeros("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.SCB"), "quantised .bitsandbytes"),
    "SVDQuant": (zeros("transformer_blocks.0.qkv_proj.qweight", "transformer_blocks.0.qkv_proj.wscales",
                       "transformer_blocks.0.qkv_proj.lora_down", "single_transformer_blocks.0.norm.linear.qweight"), "quantised .SVDQuant"),
    "diffusers' transformer": (zeros(DIFFUSERS + "attn.to_q.weight", DIFFUSERS + "proj_mlp.weight", "x_embedder.weight"),
                               "the transformer of a diffusers folder alone"),
    "LoRA of kohya": (zeros("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"),
                      "a LoRA: it changes a model and is none"),
    "LoRA of PEFT": (zeros("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "x.lora_B.weight", "y.lora_B.weight"), "a LoRA"),
    "control LoRA": (zeros("double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks.0.img_attn.qkv.lora_B.weight"), "a LoRA"),
    "half of FLUX": (tensors(FLUX, **{"img_in.weight": None}), "img_in.weight is missing; the transformer is not whole"),
    "half of SD 3": (tensors(SD3, pos_embed=None), "pos_embed is missing; the transformer is not whole"),
    "an unknown addition": ({"model.diffusion_model." + k: v for k, v in tensors(FLUX).items()} | zeros("extra.weight"),
                            "1 unexpected: extra.weight"),
    "one CLIP tower": ({"model.diffusion_model." + k: v for k, v in tensors(SD3).items()} | {
        f"text_encoders.clip_l.transformer.text_model.{k}": v for k, v in made.text(64, 1, "quick_gelu").state_dict().items()
        for k in [k.removeprefix("text_model.")]}, "it holds one CLIP tower, where the family sd3 reads two"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, tmp_path):
    state, said = REFUSED[name]
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=said) as error:
        find(tmp_path / "m.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'm.safetensors'}: ") and len(str(error.value)) < 400


@pytest.mark.parametrize("name, metadata", [("flux1-kontext-dev.safetensors", {}), ("m.safetensors", {"modelspec.title": "FLUX.1 Kontext"})])
def test_kontext_is_refused_by_name_alone(name, metadata, tmp_path):
    """Its tensors are those of FLUX.1 dev."""
    save_file(tensors(FLUX), tmp_path / name, metadata)
    with pytest.raises(CheckpointError, match="by its name FLUX.1 Kontext, .*use FLUX.1 dev"):
        find(tmp_path / name)


def test_gguf_is_named(tmp_path):
    (tmp_path / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match="a GGUF file, which other programs run"):
        find(tmp_path / "flux1-dev-Q4_0.gguf")


@pytest.mark.parametrize("metadata", [
    {"p2p.transformer_config": "{"}, {"p2p.transformer_config": '{"axes_dims_rope": [2, 2]}'}, {"p2p.vae_config": '{"scaling_factor": 0}'},
    {"p2p.transformer_config": '{"axes_dims_rope": 7}'}, {"p2p.scheduler_config": '{"shift": "x"}'}, {"p2p.scheduler_config": '{"beta_start": 1}'}])
def test_damaged_metadata_are_refused(metadata, tmp_path):
    save_file(tensors(FLUX), tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError) as error:
        find(tmp_path / "m.safetensors")
    assert "no autoencoder" not in str(error.value)


def test_a_lora_is_refused_beside_a_flow(tmp_path):
    save_file(zeros("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"),
              tmp_path / "lora.safetensors")
    ae = {f"first_stage_model.{k}": v for k, v in vae_state().items()}
    save_file({"model.diffusion_model." + k: v for k, v in tensors(FLUX).items()} | ae, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no LoRA is merged into models of the family flux yet"):
        find(tmp_path / "m.safetensors", lora=[(tmp_path / "lora.safetensors", 1.0)])


def vae_state():
    """The autoencoder's tensors from which its sizes are read."""
    c = VAEConfig(latent_channels=4, channels=(32,), layers_per_block=1, quant_conv=False)
    state = AutoencoderKL(c).state_dict()
    return _rename(iter(state.items()), ldm_sources(state, vae_prefixes(c)))


QUERIES = "encoder.block.0.layer.0.SelfAttention.q.weight"
FEED = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.mark.parametrize("name, shape, said", [
    (BIAS, (33, 2), r"is \[33, 2\]; expected: 32 positions"), (BIAS, (16, 2), "32 positions"), (BIAS, (0, 2), "32 positions"),
    (BIAS, (32, 0), "32 positions"), (BIAS, (1, 32, 2), "32 positions"), ("shared.weight", None, "shared.weight is missing"),
    *((name, shape, f"T5's {name} is {said}") for name in (BIAS, QUERIES, FEED, "shared.weight")
      for shape, said in ((None, "missing"), ((), r"\[\]; "), ((9,), r"\[9\]; "), ((1, 9, 24), r"\[1, 9, 24\]; ")))])
def test_a_t5_in_a_file_whose_sizes_are_no_t5s_is_refused(tmp_path, name, shape, said):
    """Its sizes are read from shapes, so that what is misshapen there would make another network."""
    shapes = {BIAS: (32, 2), QUERIES: (8, 24), "shared.weight": (9, 24), FEED: (16, 24)}
    assert t5.in_file(SimpleNamespace(path=tmp_path, shapes=shapes), "").config["vocab_size"] == 9
    shapes |= {name: shape}
    with pytest.raises(CheckpointError, match=said):
        t5.in_file(SimpleNamespace(path=tmp_path, shapes={k: v for k, v in shapes.items() if v is not None}), "")

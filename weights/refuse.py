"""Recognises files of other kinds, by their names and shapes, to say in the error what they are."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2p.weights import keys, keys_mmdit
from p2p.weights.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

FP8 = "its weights are fp8; use the fp16 or fp32 file of the same model"
EMBEDDING = "a textual-inversion embedding; give it beside a model, with embeddings (--embedding)"
T2I_ADAPTER = "a T2I-Adapter; use the Stable Diffusion model that it steers"
HYPERNETWORK = "a hypernetwork, which changes the keys and values of a model and is none; use a whole model"
PHOTOMAKER = ("a PhotoMaker, which steers a model by pictures of a face; use the Stable Diffusion model that "
              "it steers")
WIDE = "use the file with 16 or 32 bits a weight of the same model"
IP_ADAPTER = "an IP-Adapter, which steers a model by a picture; this project does not"

# Parts of tensors' names ("$": their ends) -> the kind of file. The first row that matches counts.
BESIDE = ": it changes a model and is none; give it beside its base model, with lora (--lora)"
MERGE = ": it changes a model and is none; merge it into its base model first"
NAMED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("scaled_fp8", ".scale_weight$", ".comfy_quant$"), FP8),
    ((".absmax$", ".quant_map$", "bitsandbytes__", ".SCB$"),
     f"its weights are quantised (bitsandbytes); {WIDE}"),
    ((".qweight$", ".wscales$", ".qzeros$", ".wtscale$"),
     f"its weights are quantised (SVDQuant, GPTQ or the like); {WIDE}"),
    (("ln_model_n.", "to_model_dim_n.", "clip_to_seq.", "encoder_hid_proj.image_embeds",
      "add_embedding.image_"),
     "a Kandinsky model, driven by embedded pictures; use a Stable Diffusion model"),
    (("fuse_module.", "visual_projection_2.", "qformer_perceiver."), PHOTOMAKER),
    (("image_proj.", "image_projection_layers.", "ip_adapter.", "ip_adapter_", ".to_k_ip.", ".to_v_ip."),
     IP_ADAPTER),
    (("pulid_ca.", "pulid_encoder.", "id_adapter.", "id_adapter_attn_layers."),
     "a PuLID, which steers a model by a picture of a face; use the model that it steers"),
    (("controlnet_blocks.", "controlnet_x_embedder.", "controlnet_single_blocks."),
     "a ControlNet of Stable Diffusion 3 or FLUX; use the model that it steers"),
    (("redux_up.", "redux_down."),
     "FLUX.1 Redux, which steers FLUX.1 by a picture; use FLUX.1 dev or schnell themselves"),
    (("lora_controlnet",), "a Control-LoRA; use the Stable Diffusion model that it steers"),
    (("control_model.", "controlnet_cond_embedding", "controlnet_down_blocks", "zero_convs",
      "input_hint_block", "lllite_"), "a ControlNet; use the Stable Diffusion model that it steers"),
    (("adapter.body.", "adapter.conv_in"), T2I_ADAPTER),
    (("motion_modules.", "temporal_transformer."),
     "a motion module (AnimateDiff), which makes videos; use the plain model"),
    (("hada_w1",), "a LoHa (a kind of LoRA)" + BESIDE),
    (("lokr_w",), "a LoKr (a kind of LoRA)" + BESIDE),
    (("oft_blocks", "oft_diag", "oft_R", "oft_r", "boft_"), "an OFT (turns of a model's weights)" + MERGE),
    (("ia3_l", "on_input"), "an (IA)3 (scales of a model's activations)" + MERGE),
    (("vera_lambda", "vera_A", "vera_B"), "a VeRA (a kind of LoRA)" + MERGE),
    (("vblora_", "fourierft_", "hra_u"), "an adapter of PEFT" + MERGE),
    ((".a1.weight", ".b1.weight"), "a GLoRA" + MERGE),
    (("lora_up", "lora_down", "lora_mid", "lora_A", "lora_B", "lora.up", "lora.down", "_lora.", ".lora_",
      "lora_linear_layer", "lora_magnitude", "dora_scale"), "a LoRA" + BESIDE),
    ((".diff$", ".diff_b$", ".w_norm$", ".b_norm$"),
     "full differences from a model, as LyCORIS saves them" + BESIDE),
    (("single_stream_modulation.", "double_stream_modulation_", "early_stream_modulations."),
     "FLUX.2 or one of its kind, whose text and latents differ; FLUX.1 is supported"),
    (("distilled_guidance_layer.",), "Chroma, whose modulations differ from FLUX.1's; use FLUX.1 dev or "
     "schnell"),
    (("individual_token_refiner.", "double_blocks.0.img_attn_q."),
     "a video model (HunyuanVideo or the like); use an image model"),
    (("single_transformer_blocks.", "attn.add_q_proj"),
     "the transformer of a diffusers folder alone; give the folder that it lies in"),
    (("adaln_single.", "t_block.1.", "double_layers.", "cap_embedder.", "blocks.0.adaLN_modulation",
      "double_stream_blocks."),
     "a transformer model (PixArt, AuraFlow, Lumina or the like); Stable Diffusion 3 and FLUX.1 are "
     "supported"),
    (("clip_txt_mapper", "clip_txt_pooled_mapper", "effnet_mapper"),
     "a stage of Stable Cascade, whose networks differ"),
    (("time_stack.", "time_mixer."),
     "a video model (Stable Video Diffusion or the like); use an image model"),
    (("emb_params", "string_to_param", "string_to_token", "clip_g$", "clip_l$"), EMBEDDING),
    (("embedder.model.visual", "noise_augmentor."),
     "an unCLIP model, driven by pictures; use the text-to-image model that it was made from"),
    (("edm_mean", "edm_vpred."),
     "an EDM model (Playground 2.5, CosXL or the like), whose noise levels this project does not know"),
    (("concept_embeds", "special_care_embeds"), "a safety checker; give the model that it belongs to"),
    (("RDB1.", "rdb1.conv", "upconv1.", "HRconv."),
     "an image upscaler (ESRGAN or the like); give a text-to-image model"),
)
TINY = "a tiny autoencoder (TAESD), which gives previews; --vae takes those of Stable Diffusion's own kind"
INPUTS = {9: "an inpainting", 8: "an InstructPix2Pix", 5: "a depth-guided", 7: "an upscaling"}   # by channels
DISTILLED = ("a distilled network (SSD-1B, Segmind-Vega, KOALA or the like): its blocks are not those of its "
             "base model, which this project has; use that one")


def by_name(path: Path, s: Shapes, fp8: bool) -> None:
    """Raises CheckpointError for known kinds that are not supported."""
    names = "".join(f"{name}\n" for name in s)

    def has(*parts: str) -> bool:   # "$": at the end of a name
        return any(part.replace("$", "\n") in names for part in parts)

    has_unet = any(k.startswith(keys.UNET) for k in s)
    kind = FP8 if fp8 else None
    kind = kind or next((description for parts, description in NAMED if has(*parts)), None) or _by_shapes(s)
    unet_in = s.get(keys.UNET + "input_blocks.0.0.weight", (0, 4))[1:2]
    if kind is None and unet_in and unet_in[0] in INPUTS:
        kind = (f"{INPUTS[unet_in[0]]} model (its UNet takes {unet_in[0]} channels, not 4); use the "
                "text-to-image model that it was made from")
    elif kind is None and has(keys.TEXT_SGM2) and not has(keys.TEXT_SDXL[1]) and has("label_emb."):
        kind = "an SDXL refiner, made for pictures that are nearly done; use the SDXL base model"
    elif kind is None and not has_unet and keys_mmdit.prefix(s) is None:
        kind = _part_alone(s, has("encoder.down.", "decoder.up.", "encoder.down_blocks."))
    elif kind is None and _distilled(s):
        kind = DISTILLED
    if kind:
        raise CheckpointError(f"{path}: {kind}.")


# widths of CLIP's words, and whose they are
WIDTHS = {768: "sd1, or the first tower of sdxl", 1024: "sd2", 1280: "the second tower of sdxl"}
# of each half in a file of its own, or of both
TAESD = re.compile(r"((taesd_)?(encoder|decoder)\.)?\d+\.(conv\.\d+\.|skip\.)?(weight|bias)"
                   r"|vae_(scale|shift)")


def _by_shapes(s: Shapes) -> str | None:
    """Kinds that only shapes tell."""
    words = bool(s) and not any(k.endswith((".weight", ".bias")) for k in s)
    flat = len(s) <= 2 and all(len(v) == 2 for v in s.values())
    if words and (flat or all(len(v) in (1, 2) and v[-1] in WIDTHS for v in s.values())):
        return EMBEDDING
    body = sum(k.startswith("body.") for k in s)
    if body and body + sum(k.startswith("conv_in.") for k in s) == len(s) > body:
        return T2I_ADAPTER
    tiny = bool(s) and all(TAESD.fullmatch(k) for k in s)
    sides = ("decoder.layers.", "encoder.layers.")
    if tiny or any(k.startswith(sides) and len(v) == 4 for k, v in s.items()):
        return TINY
    return None


def _part_alone(s: Shapes, autoencoder: bool) -> str | None:
    text = any("text_model." in k or "token_embedding" in k for k in s)
    if any(k.startswith(keys.EMA) and "diffusion_model" in k for k in s):
        return ("a model whose UNet is there as averaged weights (EMA) alone, which are read beside the "
                "plain ones; use the file that holds these too")
    if autoencoder:   # with a text tower too, only the UNet is missing
        return None if text else "an autoencoder alone: give it with --vae beside a model"
    if any(k.startswith(("down_blocks.0.resnets.", "mid_block.resnets.")) for k in s):
        return "the UNet of a diffusers folder alone; give the folder that it lies in"
    if any(".SelfAttention." in k for k in s):
        return "a T5 text tower alone; give the whole model"
    if any("vision_model." in k or "visual." in k for k in s):
        return "a CLIP model, which compares pictures and texts; give a text-to-image model"
    if text:
        return "a text tower alone; give the whole model"
    return None


TRANSFORMER = re.compile(r"(input_blocks|output_blocks|middle_block)\.(\d+)\."
                         r"(?:1\.)?transformer_blocks\.(\d+)\.")


def _distilled(s: Shapes) -> bool:
    """LDM naming, but no attention in the middle, or other depths going up than going down."""
    depths: dict[tuple[str, str], int] = {}
    for k in s:
        if m := TRANSFORMER.match(k.removeprefix(keys.UNET)):
            block = m.group(1), m.group(2)
            depths[block] = max(depths.get(block, 0), int(m.group(3)) + 1)
    if not depths:
        return False
    down, middle, up = ({d for (where, _), d in depths.items() if where == side}
                        for side in ("input_blocks", "middle_block", "output_blocks"))
    return not middle or down != up


def by_structure(state: Mapping[object, object]) -> str | None:
    """The kind of a pickle whose tensors are nested: A1111's embeddings and hypernetworks, IP-Adapters."""
    names = set(state)
    if names & {"string_to_param", "string_to_token"}:
        return EMBEDDING
    if names & {"layer_structure", "activation_func"} or any(isinstance(n, int) for n in names):
        return HYPERNETWORK
    if {"id_encoder", "lora_weights"} <= names:
        return PHOTOMAKER
    if {"image_proj", "ip_adapter"} <= names:
        return IP_ADAPTER
    return None


def by_config(config: Mapping[str, Any]) -> str | None:
    """The kind of a diffusers network whose config names it, or blocks that none of its base has."""
    if config.get("_class_name") == "AutoencoderTiny":
        return TINY
    depths = config.get("transformer_layers_per_block")
    nested = isinstance(depths, list) and any(isinstance(each, list) for each in depths)
    middle = config.get("mid_block_type", "")
    reverse = config.get("reverse_transformer_layers_per_block") is not None
    return DISTILLED if nested or reverse or middle in (None, "UNetMidBlock2D") else None


FORMATS = {   # by suffix
    ".onnx": "an ONNX network", ".engine": "a TensorRT engine", ".trt": "a TensorRT engine",
    ".plan": "a TensorRT engine",
    ".msgpack": "weights for Flax", ".h5": "weights for Keras", ".mlmodel": "a Core ML network",
    ".tflite": "a network for TensorFlow Lite", ".gguf": "a GGUF file",
}
MAGIC = {b"GGUF": ".gguf", b"ftrt": ".engine", b"\x89HDF": ".h5"}


def by_format(path: Path, head: bytes) -> str | None:
    """Formats of other programs: by their first bytes, or by their suffix."""
    suffix = next((s for magic, s in MAGIC.items() if head.startswith(magic)), path.suffix.lower())
    if suffix not in FORMATS:
        return None
    return f"{FORMATS[suffix]}, which other programs run; use the .safetensors file of the same model"

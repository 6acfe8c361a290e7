"""Converts a recognised model to a single file under the original names, or to a diffusers folder."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2p.models.mmdit import build
from p2p.models.text import END, START, TextConfig, TextEncoder
from p2p.models.unet import UNet
from p2p.models.vae import AutoencoderKL
from p2p.weights import fields, keys, mmdit, scheduler, sealed, t5
from p2p.weights.aside import aside, settle, sweep
from p2p.weights.detect import (
    ENCODED_EMPTY,
    FLOWS,
    LATENTS,
    OTHER_LATENTS,
    OTHER_SIZE,
    Package,
    Part,
    usual_size,
)
from p2p.weights.errors import CheckpointError
from p2p.weights.fields import short
from p2p.weights.fill import read_tensors, stored
from p2p.weights.keys import Source
from p2p.weights.keys_mmdit import diffusers_sources
from p2p.weights.load import find
from p2p.weights.texts import tokenizer_suffix
from p2p.weights.tokenizer import CONFIGS, VOCABULARIES, merges, vocabulary

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
FORMATS = (".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".sft")   # of files that are not written
State = dict[str, Tensor]


def convert(package: Package, out: Path, half: bool = False, text: Path | None = None) -> None:
    """Writes `out` atomically: a single .safetensors file if it is named so, else a diffusers folder. text:
    the folder of a model whose tokenizer a single file's T5 has. Raises CheckpointError."""
    if text is not None:
        package = replace(package, tokenizer=_with_tokenizer(package, out, text))
    if package.family not in LATENTS:
        raise CheckpointError(f"{package.where}: a model of the family {package.family}; conversion is for "
                              "Stable Diffusion and FLUX.")
    if out.suffix.lower() in FORMATS:
        raise CheckpointError(f"{out}: {out.suffix} is not written; give a .safetensors file, or a folder")
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: is there already; nothing is overwritten")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out.parent)
        with aside(out.parent) as temporary:
            if out.suffix.lower() == ".safetensors":
                _save(single_file(package, half).items(), temporary / out.name, _metadata(package))
            else:
                _folder(package, temporary / out.name, half)
            _check_told(package, temporary / out.name, out)
            try:
                settle(temporary / out.name, out)
            except FileExistsError:
                raise CheckpointError(f"{out}: appeared while it was written; nothing is overwritten"
                                      ) from None
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}); nothing is left of it."
                              ) from None


def _check_told(package: Package, written: Path, out: Path) -> None:
    """Raises CheckpointError where what was written is read as another model: a single file has no place for
    some settings of a folder's configs."""
    back = find(written)
    before, after = _decisive(package), _decisive(back)
    lost = [f"{name} {short(before.get(name))} (read back: {short(after.get(name))})"
            for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    ours, theirs = package.alphas_cumprod, back.alphas_cumprod
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=1e-8):
        lost.append("alphas_cumprod")
    if lost:
        more = f", and {len(lost) - 4} more" if len(lost) > 4 else ""
        raise CheckpointError(f"{out}: it would not tell {', '.join(lost[:4])}{more}: other pictures. "
                              "Convert to a folder of another name.")


def _decisive(package: Package) -> dict[str, Any]:
    """What decides pictures beside the tensors, and the default size."""
    s, parts = package.sampling, {"unet": package.unet, "vae": package.vae}
    parts |= {f"text {i}": part for i, part in enumerate(package.text, 1)}
    out = {"family": package.family, "kind": package.kind, "scale": package.latent_scale,
           "zero_negative": package.zero_negative}
    out |= {f.name: getattr(s, f.name) for f in dataclass_fields(s) if f.name not in
            ("alphas_cumprod", "why", "notes", "learned_variance")}   # the last is of DeepFloyd alone
    for name, part in parts.items():
        out |= {f"{name}: {field}": value for field, value in asdict(part.config).items()} if part else {}
    if package.family == "sd3":   # a tower without a projection is written with that which changes nothing
        out.pop("text 1: projected", None)
    if package.t5 is not None:
        config = t5.empty_network(package.t5).config
        out |= {f"T5: {name}": getattr(config, name) for name in t5.DECISIVE}
    return out


def _metadata(package: Package) -> dict[str, str]:
    """What the tensors of a single file do not tell."""
    out, latents = {}, (package.latent_scale, package.vae.config.shift)
    if latents != LATENTS[package.family]:
        out[OTHER_LATENTS] = json.dumps(dict(zip(("scaling_factor", "shift_factor"), latents)))
    if package.size != usual_size(package):
        out[OTHER_SIZE] = json.dumps(dict(zip(("height", "width"), package.size)))
    if package.family in FLOWS:
        return out | mmdit.metadata(package)
    out |= {"modelspec.prediction_type": PREDICTIONS[package.prediction]}
    out |= scheduler.metadata(package.sampling)
    return out | ({ENCODED_EMPTY: "true"} if package.family == "sdxl" and not package.zero_negative else {})


def _whole(part: Part, family: str, pooled: bool) -> Part:
    """The part with the layers that loading leaves out, where the other format keeps them."""
    if family == "sdxl" and not pooled:
        return replace(part, config=replace(part.config, layers=part.config.layers + 1, final_norm=True))
    if family == "sdxl":
        return replace(part, config=replace(part.config, final_norm=True))
    return part


def _tensors(part: Part, build: Any, half: bool) -> Iterator[tuple[str, Tensor]]:
    kept = stored(part)   # what add-ons changed comes in float32
    for name, tensor in read_tensors(part, build):
        tensor = tensor.to(kept) if name in part.changes else tensor
        yield name, halved(tensor, part, name) if half else tensor


def halved(tensor: Tensor, part: Part, name: str) -> Tensor:
    """In float16. Raises CheckpointError where that has no place for its values."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    if half.is_floating_point() and half.numel() and not torch.stack(half.aminmax()).isfinite().all():
        raise CheckpointError(f"{part.file.path}: {name} holds values beyond float16; convert without "
                              "--half.")
    return half


def _rename(state: Iterator[tuple[str, Tensor]], sources: dict[str, Source], prefix: str = "") -> State:
    """The modules' names -> those of a naming: the inverse of `p2p.weights.keys`."""
    out: State = {}
    for name, tensor in state:
        source = sources[name]
        tensor = tensor.T if source.transposed else tensor
        tensor = torch.cat(tensor.chunk(2)[::-1]) if source.swapped else tensor
        pieces = tensor.split(source.rows) if source.rows else tensor.chunk(len(source.keys))
        for key, piece in zip(source.keys, pieces):
            whole = piece.untyped_storage().nbytes() == piece.nbytes and piece.is_contiguous()
            out[prefix + key] = piece if whole else piece.contiguous().clone()   # no two names share memory
    return out


def single_file(package: Package, half: bool = False) -> State:
    """All tensors of a model under the names of a single file."""
    u, v, family = package.unet, package.vae, package.family
    unet = dict(_tensors(u, build if family in FLOWS else UNet, half))
    out = _rename(iter(unet.items()), keys.same_sources(unet) if family in FLOWS else
                  keys.ldm_sources(unet, keys.unet_prefixes(u.config)), keys.UNET)
    vae = {n: t[..., None, None] if ".attentions." in n and t.ndim == 2 else t
           for n, t in _tensors(v, AutoencoderKL, half)}
    out |= _rename(iter(vae.items()), keys.ldm_sources(vae, keys.vae_prefixes(v.config)), keys.VAE)
    for i, part in enumerate(package.text):
        text = dict(_tensors(_whole(part, family, i == 1), TextEncoder, half))
        if family == "sd2":
            text |= _idle_layer(text, part.config)
        if family in FLOWS:
            out |= dict(_hf(text, f"{mmdit.COMFY}{mmdit.TOWERS[i]}.transformer."))
            continue
        first = family == "sd1" or (family == "sdxl" and i == 0)
        prefix = {"sd1": keys.TEXT_SD1, "sd2": keys.TEXT_SD2, "sdxl": keys.TEXT_SDXL[i]}[family]
        out |= _rename(iter(text.items()), (keys.hf_sources if first else keys.same_sources)(text), prefix)
    if package.t5 is not None:
        out |= {f"{mmdit.COMFY}t5xxl.transformer.{name}": tensor for name, tensor in _t5(package.t5, half)}
    if family == "sdxl" and package.prediction == "v":   # markers, for programs that read no metadata
        zero = not package.alphas_cumprod[-1] > 0
        out |= {marker: torch.zeros(0) for marker in ("v_pred", *(("ztsnr",) if zero else ()))}
    return out


def _idle_layer(text: State, config: TextConfig) -> State:
    """A last layer of zeros: single files of SD 2 have one that nothing uses, diffusers folders do not."""
    last = f"transformer.resblocks.{config.layers - 1}."
    return {f"transformer.resblocks.{config.layers}." + n.removeprefix(last): torch.zeros_like(t)
            for n, t in text.items() if n.startswith(last)}


# ------------------------------------------------------------------------------------------- diffusers folder

def _hf(text: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a CLIP tower under transformers' names."""
    for name, tensor in _rename(iter(text.items()), keys.hf_sources(text)).items():
        yield prefix + (name if name.startswith("text_projection") else f"text_model.{name}"), tensor


def _t5(part: Part, half: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of T5's encoder under transformers' names."""
    for name, tensor in t5.encoder_tensors(part, t5.empty_network(part)):
        yield t5.SHARED if name == t5.EMBEDDING else name, halved(tensor, part, name) if half else tensor


def _folder(package: Package, out: Path, half: bool) -> None:
    family, version = package.family, {"_diffusers_version": "0.30.0"}
    flow = family in FLOWS
    _write(out / "model_index.json", _flow_index(package) if flow else _index(package))
    _write(out / "scheduler" / "scheduler_config.json",
           version | (mmdit.scheduler_config if flow else lambda p: scheduler.config(p.sampling))(package))
    network = out / ("transformer" if flow else "unet")
    tensors = _tensors(package.unet, build if flow else UNet, half)
    if flow:
        state = dict(tensors)
        tensors = iter(_rename(iter(state.items()), diffusers_sources(state, package.unet.config)).items())
    _write(network / "config.json",
           version | (mmdit.to_config(package) if flow else _unet_config(package)))
    _save(tensors, network / "diffusion_pytorch_model.safetensors")
    _write(out / "vae" / "config.json", version | _vae_config(package))
    _save(_tensors(package.vae, AutoencoderKL, half), out / "vae" / "diffusion_pytorch_model.safetensors")
    for i, part in enumerate(package.text):
        name = "text_encoder_2" if i else "text_encoder"
        part = _whole(part, family, i == 1)
        text = dict(_tensors(part, TextEncoder, half))
        if family == "sd3" and not part.config.projected:
            text["text_projection"] = torch.eye(part.config.width).to(text["positional_embedding"])
        _write(out / name / "config.json", _text_config(part.config, "text_projection" in text))
        _save(_hf(text), out / name / "model.safetensors")
        _tokenizer(out / name.replace("text_encoder", "tokenizer"), part.config)
    if package.t5 is not None:
        _t5_folder(package, out, half)


def _index(package: Package) -> dict[str, Any]:
    xl = package.family == "sdxl"
    out = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
           "_diffusers_version": "0.30.0",
           "scheduler": ["diffusers", scheduler.config(package.sampling)["_class_name"]],
           "unet": ["diffusers", "UNet2DConditionModel"],
           "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
           "tokenizer": ["transformers", "CLIPTokenizer"]}
    if xl:
        return out | {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                      "tokenizer_2": ["transformers", "CLIPTokenizer"],
                      "force_zeros_for_empty_prompt": package.zero_negative}
    return out | {"safety_checker": [None, None], "feature_extractor": [None, None],
                  "requires_safety_checker": False}


def _flow_index(package: Package) -> dict[str, Any]:
    """Its parts by their classes; null for those that are not there."""
    kind = next(name for name, family in mmdit.PIPELINES.items() if family == package.family)
    there = {*mmdit.CLIP[package.family][:len(package.text)], "transformer", "vae",
             *([f"text_encoder{mmdit.T5[package.family]}"] if package.t5 else [])}
    there |= {name.replace("text_encoder", "tokenizer") for name in there}
    parts = {name: [library, classes[0]] if name in there else [None, None]
             for name, (library, classes) in fields.FLOW_CLASSES[package.family].items()}
    return {"_class_name": kind, "_diffusers_version": "0.30.0", "scheduler": ["diffusers", scheduler.FLOW],
            **parts}


def _t5_folder(package: Package, out: Path, half: bool) -> None:
    """T5 and its tokenizer, as the model's folder has it. Raises CheckpointError."""
    if package.t5 is None or package.tokenizer is None:
        raise CheckpointError(f"{package.where}: its T5 has no tokenizer, which a folder needs; give the "
                              "folder of a model that has it, as text (--text).")
    suffix = mmdit.T5[package.family]
    _write(out / f"text_encoder{suffix}" / "config.json",
           {"architectures": ["T5EncoderModel"], "model_type": "t5"} | package.t5.config)
    _save(_t5(package.t5, half), out / f"text_encoder{suffix}" / "model.safetensors")
    copy = out / f"tokenizer{suffix}"
    if not isinstance(package.tokenizer, Path):   # of a pipeline in memory
        package.tokenizer.save_pretrained(copy)
        return
    words = package.tokenizer / f"tokenizer{tokenizer_suffix(package.tokenizer, package.family)}"
    copy.mkdir()
    for name in (*CONFIGS, *VOCABULARIES, "spiece.model"):   # and nothing else that a stranger linked to
        if (words / name).is_file():
            shutil.copyfile(words / name, copy / name)


def _with_tokenizer(package: Package, out: Path, text: Path) -> Path:
    """`text`, if its tokenizer is one of the package's T5. Raises CheckpointError."""
    if package.t5 is None or out.suffix.lower() == ".safetensors":
        what = "has no T5" if package.t5 is None else "goes into a single file, which has no tokenizer"
        raise CheckpointError(f"{package.where}: {what}; leave out text (--text).")
    if (suffix := tokenizer_suffix(text, package.family)) is None:
        raise CheckpointError(f"{text}: no T5's tokenizer there (tokenizer_3, _2 or tokenizer).")
    t5.tokenizer_of(package.t5, text, suffix)
    return text


def _vae_config(package: Package) -> dict[str, Any]:
    c = package.vae.config
    out = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": c.channels,
           "in_channels": c.in_channels, "out_channels": c.in_channels, "latent_channels": c.latent_channels,
           "layers_per_block": c.layers_per_block,
           "down_block_types": ["DownEncoderBlock2D"] * len(c.channels),
           "up_block_types": ["UpDecoderBlock2D"] * len(c.channels), "norm_num_groups": 32,
           "sample_size": package.size[0], "scaling_factor": package.latent_scale,
           "force_upcast": package.family in ("sdxl", *FLOWS)}
    if package.family in FLOWS:
        out["shift_factor"] = c.shift
    if not c.quant_conv:
        out |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return out


def _write(path: Path, config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(state: Iterable[tuple[str, Tensor]], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Raises OSError."""
    sealed.write({k: t.contiguous() for k, t in state}, path, {"format": "pt"} | (metadata or {}))


def _unet_config(package: Package) -> dict[str, Any]:
    c = package.unet.config
    kinds, sides = [bool(k) for k in c.down_attention], [s // package.vae.config.shrink for s in package.size]
    out = {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "block_out_channels": c.channels,
        "in_channels": c.in_channels, "out_channels": c.out_channels, "layers_per_block": c.layers_per_block,
        "cross_attention_dim": c.context_dim, "attention_head_dim": c.heads,
        "transformer_layers_per_block": c.depth, "use_linear_projection": c.linear_projection,
        "down_block_types": ["CrossAttnDownBlock2D" if k else "DownBlock2D" for k in kinds],
        "up_block_types": ["CrossAttnUpBlock2D" if k else "UpBlock2D" for k in reversed(kinds)],
        "upcast_attention": c.upcast_attention, "norm_num_groups": 32, "norm_eps": 1e-5,
        "flip_sin_to_cos": True, "freq_shift": 0,
        "sample_size": sides[0] if sides[0] == sides[1] else sides,
    }
    if c.vector_dim:
        pooled = package.text[-1].config.pooled_dim
        out |= {"addition_embed_type": "text_time", "addition_time_embed_dim": (c.vector_dim - pooled) // 6,
                "projection_class_embeddings_input_dim": c.vector_dim}
    if c.guidance_dim:
        out["time_cond_proj_dim"] = c.guidance_dim
    return out


def _text_config(c: TextConfig, projected: bool) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model", "hidden_size": c.width,
        "intermediate_size": c.mlp_width or 4 * c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "max_position_embeddings": c.context_length,
        "vocab_size": c.vocab_size, "hidden_act": "quick_gelu" if c.quick_gelu else "gelu",
        "projection_dim": c.pooled_dim or c.width, "layer_norm_eps": 1e-5, "bos_token_id": START,
        "eos_token_id": END, "pad_token_id": c.pad_id,
    }


def _tokenizer(folder: Path, c: TextConfig) -> None:
    """open_clip's byte-pair encoder in the files that transformers reads."""
    words, start, end = vocabulary(), "<|startoftext|>", "<|endoftext|>"
    pad = end if c.pad_id == END else next(word for word, i in words.items() if i == c.pad_id)
    _write(folder / "vocab.json", words)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges(), ""]), encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    _write(folder / "special_tokens_map.json", special)
    _write(folder / "tokenizer_config.json", special | {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": c.context_length, "do_lower_case": True})

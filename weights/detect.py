"""What is in a single file: its family, its parts with their sizes and names, what it predicts, and why we think so.

Only headers and configs are read here. What is recognised but not supported is refused by name.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.text import CLIP_L, TextConfig
from models.text import EMOJI as EMOJI_TEXT
from models.unet import UNetConfig
from models.vae import VAEConfig
from weights import keys
from weights.errors import CheckpointError
from weights.files import TensorFile
from weights.sizes import check_sizes
from weights.untrusted import parse_object, parse_settings, read_text

FAMILIES = ("sd1", "sd2", "sdxl", "if", "emoji")
PREDICTIONS = ("eps", "v", "x0")
SAID = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}   # diffusers' words for them
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Part:
    """One network in a file: where its tensors start, how they are named, and which of them it does not need."""

    file: TensorFile
    prefix: str
    naming: str                          # "ldm", "hf", "open_clip", "own", "own, old", "deepfloyd"
    config: Any                          # UNetConfig, TextConfig or VAEConfig
    ignored: tuple[str, ...] = ()        # prefixes, behind `prefix`


@dataclass
class Package:
    """A recognised model, nothing of it loaded yet."""

    family: str
    where: Path
    unet: Part
    text: list[Part]
    vae: Part | None
    prediction: str
    why: str                             # how the prediction type was found
    alphas_cumprod: Tensor               # (1000,) float64
    size: tuple[int, int]                # height, width that it was made for
    latent_scale: float = 1.0
    notes: list[str] = field(default_factory=list)
    offset: int = 1                      # of the timesteps, see `p2p.schedule.ddim_schedule`
    threshold: tuple[float, float] | None = None   # dynamic thresholding of x_0: quantile, largest bound


def scaled_linear(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """alphas_cumprod of Stable Diffusion's schedule.  -> (steps,) float64"""
    return torch.cumprod(1 - torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2, dim=0)


def zero_terminal_snr(abar: Tensor) -> Tensor:
    """The schedule stretched so that the last step is pure noise (Lin et al. 2023, Algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbered children a prefix has; one may be missing, and a number far beyond the rest is a stray."""
    found = {k.removeprefix(prefix).split(".")[0] for k in shapes if k.startswith(prefix)}
    return 1 + max((int(n) for n in found if n.isdigit() and int(n) <= len(found)), default=-1)


# -------------------------------------------------------------------------------------------------- single files

# What may stand beside the networks: the schedule's tables, averages, training leftovers.
BESIDE = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "model_ema.", "logvar", "denoiser.sigmas",
          "v_pred", "ztsnr", "first_stage_model.loss.", "cond_stage_model.logit_scale", "conditioner.embedders.1.logit_scale")


def _refuse_by_name(file: TensorFile) -> None:
    """Files of other kinds that people often try."""
    s = file.shapes

    def has(*parts: str) -> bool:
        return any(part in k for k in s for part in parts)

    unet_in = s.get(keys.UNET + "input_blocks.0.0.weight", (0, 4))[1]
    kind = None
    if file.is_fp8() or has("scaled_fp8"):
        kind = "its weights are fp8; use the fp16 or fp32 file of the same model"
    elif has("lora_up", "lora_down", "lora_A", "lora_B", "lora.up", ".lora_", "hada_w1", "lokr_"):
        kind = "a LoRA: it changes a model and is none; merge it into its base model first"
    elif has("control_model.", "controlnet_cond_embedding", "zero_convs", "input_hint_block"):
        kind = "a ControlNet; use the Stable Diffusion model that it steers"
    elif has("joint_blocks.", "double_blocks.", "transformer_blocks.0.attn.add_q_proj"):
        kind = "a transformer model (Stable Diffusion 3, FLUX or the like); this project has UNets only"
    elif "emb_params" in s or "string_to_param" in s or (len(s) <= 2 and all(len(v) == 2 for v in s.values()) and s):
        kind = "a textual-inversion embedding; use a whole model"
    elif unet_in in (9, 8, 5, 7):
        kind = {9: "an inpainting", 8: "an InstructPix2Pix", 5: "a depth-guided", 7: "an upscaling"}[unet_in]
        kind += f" model (its UNet takes {unet_in} channels, not 4); use the text-to-image model that it was made from"
    elif has("embedder.model.visual", "noise_augmentor."):
        kind = "an unCLIP model, driven by pictures; use the text-to-image model that it was made from"
    elif has("edm_mean", "edm_vpred."):
        kind = "an EDM model (Playground 2.5, CosXL or the like), whose noise levels this project does not know"
    elif has(keys.TEXT_SGM2) and not has(keys.TEXT_SDXL[1]) and has("label_emb."):
        kind = "an SDXL refiner, made for pictures that are nearly done; use the SDXL base model"
    elif not has(keys.UNET) and (has("encoder.down.", "decoder.up.", "encoder.down_blocks.")):
        kind = "an autoencoder alone: give it with --vae beside a model"
    elif not has(keys.UNET) and has("down_blocks.0.resnets.", "mid_block.resnets."):
        kind = "the UNet of a diffusers folder alone; give the folder that it lies in"
    elif not has(keys.UNET) and has("text_model.", "token_embedding"):
        kind = "a text tower alone; give the whole model"
    if kind:
        raise CheckpointError(f"{file.path}: {kind}.")


def find_in_file(file: TensorFile) -> Package:
    """A single file in LDM naming, or a trained emoji model."""
    if file.metadata.get("format") == "p2p-emoji":
        return _emoji(file)
    _refuse_by_name(file)
    s = file.shapes
    text_sd1 = next((p for p in (keys.TEXT_SD1, "cond_stage_model.transformer.")
                     if p + "embeddings.token_embedding.weight" in s), None)
    text_sd2 = next((p for p in (keys.TEXT_SD2, keys.TEXT_SGM2) if p + "token_embedding.weight" in s), None)
    sdxl = keys.TEXT_SDXL[1] + "token_embedding.weight" in s
    found = "sdxl" if sdxl else "sd1" if text_sd1 else "sd2" if text_sd2 else None
    vae = next((p for p in (keys.VAE, "vae.") if p + "encoder.conv_in.weight" in s), None)
    absent = [n for n, there in (("UNet", keys.UNET + "input_blocks.0.0.weight" in s), ("autoencoder", vae), ("text tower", found))
              if not there]
    if absent:
        sample = ", ".join(list(s)[:3]) or "no tensors at all"
        raise CheckpointError(f"{file.path}: no {', no '.join(absent)} found under the names of a Stable Diffusion file; it holds "
                              f"{len(s)} tensors ({sample} ...).")
    known = (keys.UNET, vae, "cond_stage_model." if not sdxl and text_sd2 != keys.TEXT_SGM2 else "conditioner.", *BESIDE)
    stray = sorted(k for k in s if not k.startswith(known))
    if stray:
        raise CheckpointError(f"{file.path}: {listed('unexpected', stray)}. Is it a model with additions? Use the plain one.")
    notes: list[str] = []
    unet = Part(_averaged(file, notes), keys.UNET, "ldm", ldm_unet_config(s, found))
    if sdxl:
        text = [_hf_text(file, keys.TEXT_SDXL[0], "sdxl"), _open_clip_text(file, keys.TEXT_SDXL[1], "sdxl")]
    else:
        text = [_hf_text(file, text_sd1, "sd1") if text_sd1 else _open_clip_text(file, text_sd2, "sd2")]
    check_widths(file.path, unet.config.context_dim, text)
    prediction, why = _prediction(file, found)
    abar = scaled_linear()
    if "alphas_cumprod" in s:
        own = _schedule(file)
        if (own - abar).abs().max() > 1e-4:
            notes.append("the file's own noise schedule differs from Stable Diffusion's and is used")
        abar = own
    if "ztsnr" in s:
        abar = zero_terminal_snr(abar)
        notes.append("zero terminal SNR (marker ztsnr)")
    side = {"sd1": 512, "sdxl": 1024}.get(found, 768 if prediction == "v" else 512)
    return Package(found, file.path, unet, text, Part(file, vae, "ldm", ldm_vae_config(s, vae), ("loss.",)), prediction, why,
                   abar, (side, side), 0.13025 if sdxl else 0.18215, notes)


def _schedule(file: TensorFile) -> Tensor:
    """A file's own noise schedule.  -> (1000,) float64"""
    abar = file["alphas_cumprod"].double()
    if abar.shape != (1000,) or not (abar.diff() < 0).all() or not 0 <= abar[-1] <= abar[0] <= 1:   # NaN fails it too
        raise CheckpointError(f"{file.path}: alphas_cumprod, of shape {list(abar.shape)}, is no noise schedule: 1000 numbers that "
                              "fall from at most 1 to at least 0 were expected.")
    return abar


def check_widths(path: Path, wanted: int, text: list[Part]) -> None:
    given = sum(p.config.width for p in text)
    if wanted != given:
        raise CheckpointError(f"{path}: the UNet takes text of width {wanted}, the text tower gives {given}; it mixes two models.")


class _Averaged(TensorFile):
    """A file whose UNet tensors are read from their averaged (EMA) twins."""

    def __init__(self, file: TensorFile, twins: dict[str, str]):
        self._file, self._twins = file, twins
        self.path, self.metadata = file.path, file.metadata
        self.shapes = file.shapes | {k: file.shapes[t] for k, t in twins.items()}
        self.dtypes = file.dtypes | {k: file.dtypes[t] for k, t in twins.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._file[self._twins.get(key, key)]


def _averaged(file: TensorFile, notes: list[str]) -> TensorFile:
    twins = {k: "model_ema." + k.removeprefix("model.").removeprefix("diffusion_model.").replace(".", "") for k in file.shapes
             if k.startswith(keys.UNET)}
    twins = {k: t.replace("model_ema.", "model_ema.diffusion_model") for k, t in twins.items()}
    there = [k for k, t in twins.items() if t in file.shapes]
    if not there:
        return file
    if len(there) < len(twins):
        raise CheckpointError(f"{file.path}: averaged weights (model_ema) are there for {len(there)} of {len(twins)} UNet tensors; "
                              "the file is damaged.")
    notes.append("averaged weights (EMA) used")
    return _Averaged(file, twins)


def _prediction(file: TensorFile, family: str) -> tuple[str, str]:
    """What the UNet was trained to predict, and how we know: no tensor says it for certain."""
    sidecar = file.path.with_suffix(".yaml")
    if sidecar.is_file() and (said := read_settings(sidecar).get("parameterization")):
        return SAID.get(said, said), f"{sidecar.name} beside it"
    if "v_pred" in file.shapes:
        return "v", "marker tensor v_pred"
    said = file.metadata.get("modelspec.prediction_type", "").lower()
    if said:
        return SAID.get(said, said), "the file's metadata"
    if family == "sd2":
        if file.metadata.get("global_step") == "875000":
            return "eps", "its step count, that of 2.0-base"
        last = f"{keys.UNET}output_blocks.{count(file.shapes, keys.UNET + 'output_blocks.') - 1}.1.transformer_blocks.0.norm1.bias"
        if last in file.shapes:
            spread = file[last].float().std(correction=0).item()
            return ("v" if spread > 0.09 else "eps"), f"a guess from one bias (spread {spread:.3f}): give prediction if it is wrong"
    return "eps", "the rule for its family"


def ldm_unet_config(shapes: Shapes, family: str) -> UNetConfig:
    """Sizes from shapes; heads cannot be read off them: 8 in SD 1, as many as give 64 channels each in SD 2 and SDXL."""
    p = keys.UNET + "input_blocks."
    levels: list[list[tuple[int, int]]] = [[]]                                   # (channels, transformer depth)
    context, linear = 0, False
    for n in range(1, count(shapes, p)):
        if f"{p}{n}.0.op.weight" in shapes:
            levels.append([])
            continue
        depth = count(shapes, f"{p}{n}.1.transformer_blocks.")
        if depth:
            context = shapes[f"{p}{n}.1.transformer_blocks.0.attn2.to_k.weight"][1]
            linear = linear or len(shapes[f"{p}{n}.1.proj_in.weight"]) == 2
        levels[-1].append((shapes[f"{p}{n}.0.out_layers.3.weight"][0], depth))
    kinds = tuple("cross" if blocks[0][1] else None for blocks in levels)
    channels = tuple(blocks[0][0] for blocks in levels)
    return UNetConfig(
        in_channels=shapes[p + "0.0.weight"][1], out_channels=shapes[keys.UNET + "out.2.weight"][0],
        channels=channels, layers_per_block=len(levels[0]), down_attention=kinds, mid_attention="cross", up_attention=kinds,
        depth=tuple(max(1, blocks[0][1]) for blocks in levels),
        heads=tuple(8 if family == "sd1" else max(1, c // 64) for c in channels), context_dim=context, linear_projection=linear,
        vector_dim=shapes.get(keys.UNET + "label_emb.0.0.weight", (0, None))[1], upcast_attention=family == "sd2",
    )


def ldm_vae_config(shapes: Shapes, prefix: str) -> VAEConfig:
    p = prefix + "encoder."
    return VAEConfig(
        in_channels=shapes[p + "conv_in.weight"][1], latent_channels=shapes[prefix + "post_quant_conv.weight"][0],
        channels=tuple(shapes[f"{p}down.{i}.block.0.conv2.weight"][0] for i in range(count(shapes, p + "down."))),
        layers_per_block=count(shapes, p + "down.0.block."),
    )


def _hf_text(file: TensorFile, prefix: str, family: str) -> Part:
    """CLIP-L in transformers' names."""
    s = file.shapes
    vocab, width = s[prefix + "embeddings.token_embedding.weight"]
    n = count(s, prefix + "encoder.layers.")
    config = replace(CLIP_L, width=width, heads=max(1, width // 64), vocab_size=vocab,
                     mlp_width=s[prefix + "encoder.layers.0.mlp.fc1.weight"][0],
                     context_length=s[prefix + "embeddings.position_embedding.weight"][0])
    return Part(file, prefix, "hf", for_family(config, n, family, None), ("embeddings.position_ids", *unused_hf(n, family)))


def unused_hf(n: int, family: str) -> tuple[str, ...]:
    return (f"encoder.layers.{n - 1}.", "final_layer_norm.") if family == "sdxl" else ()


def _open_clip_text(file: TensorFile, prefix: str, family: str) -> Part:
    """OpenCLIP H or bigG in their own names; SD 2 leaves the last layer unused."""
    s = file.shapes
    vocab, width = s[prefix + "token_embedding.weight"]
    n = count(s, prefix + "transformer.resblocks.")
    config = TextConfig(width=width, heads=max(1, width // 64), vocab_size=vocab, quick_gelu=False, pad_id=0,
                        mlp_width=s[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0],
                        context_length=s[prefix + "positional_embedding"][0])
    ignored = ("logit_scale", "attn_mask")
    if family == "sdxl":
        return Part(file, prefix, "open_clip", for_family(config, n, family, s[prefix + "text_projection"][1]), ignored)
    used = n - 1
    return Part(file, prefix, "open_clip", for_family(config, used, family, None),
                (*ignored, "text_projection", f"transformer.resblocks.{used}."))


def for_family(config: TextConfig, layers: int, family: str, pooled: int | None) -> TextConfig:
    """Which hidden layer a family uses, and whether it is normalised; `layers` as the file has them."""
    if config.vocab_size != CLIP_L.vocab_size:
        raise CheckpointError(f"the text tower knows {config.vocab_size} tokens, CLIP has {CLIP_L.vocab_size}.")
    if family != "sdxl":
        return replace(config, layers=layers)
    if pooled is None:
        return replace(config, layers=layers - 1, final_norm=False)
    return replace(config, layers=layers, skip=1, final_norm=False, pooled_dim=pooled)


def _emoji(file: TensorFile) -> Package:
    """Our own file: the modules' own names; the UNet's sizes in the metadata."""
    try:
        sizes = parse_object(file.metadata["unet"])
        check_sizes(file.path, sizes)
        unet = UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file.path}: its metadata do not hold the sizes of a UNet ({error!r}); it is damaged, or of "
                              "another version of this project.") from None
    large = bool(unet.low_channels)   # the super-resolution stage, which reads no text
    text = [] if large else [Part(file, "text.", "own", replace(EMOJI_TEXT, vocab_size=file.shapes["text.vocab"][0]))]
    stray = sorted(k for k in file.shapes if not k.startswith(("unet.", "alphas_cumprod", *(p.prefix for p in text))))
    if stray:
        raise CheckpointError(f"{file.path}: {listed('unexpected', stray)}. Is it a model with additions? Use the plain one.")
    if text:
        check_widths(file.path, unet.context_dim, text)
    return Package("emoji", file.path, Part(file, "unet.", "own", unet), text, None, file.metadata.get("prediction", "x0"),
                   "the file's metadata", _schedule(file), (256, 256) if large else (64, 64))


def read_settings(path: Path) -> dict[str, str]:
    """The "key: value" lines of a YAML file. Raises CheckpointError."""
    try:
        return parse_settings(read_text(path, 2**20, errors="replace"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from None


def listed(what: str, names: list[str], most: int = 5) -> str:
    """The first few of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}: {', '.join(names[:most])}{more}"

"""Recognises a single file: its family, its parts with their sizes and names, what it predicts, and why.

Only headers and configs are read here. Files that are recognised but not supported are refused by name.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2p.models.mmdit import MMDiTConfig
from p2p.models.text import CLIP_L, OPENCLIP_H, TextConfig
from p2p.models.text import EMOJI as EMOJI_TEXT
from p2p.models.unet import UNetConfig
from p2p.models.vae import VAEConfig
from p2p.weights import keys, refuse, scheduler
from p2p.weights.averages import averaged
from p2p.weights.errors import CheckpointError
from p2p.weights.fields import listed
from p2p.weights.files import TensorFile
from p2p.weights.scheduler import PREDICTION_NAMES, Flow, Sampling, scaled_linear, zero_terminal_snr
from p2p.weights.sizes import check_blocks, check_sizes, told_prediction
from p2p.weights.untrusted import parse_object

LDM = ("sd1", "sd2", "sdxl")   # the original code's; their files may hold averaged weights
FLOWS = ("sd3", "flux")
FAMILIES = (*LDM, *FLOWS, "if", "emoji", "emoji-flow")
OWN = ("p2p-emoji", "p2p-emoji-flow")   # formats of the bundled models' files
PREDICTIONS = ("eps", "v", "x0", "flow")
# in the metadata of an SDXL file: its empty prompt is encoded, not zeros
ENCODED_EMPTY = "p2p.encoded_empty_prompt"
# scale and shift of a family's latents; and where the metadata of a file hold others
LATENTS = {"sd1": (0.18215, 0.0), "sd2": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd3": (1.5305, 0.0609),
           "flux": (0.3611, 0.1159)}
OTHER_LATENTS = "p2p.vae_config"
OTHER_SIZE = "p2p.size"
FAMILY_RULE = "the rule for its family, which a few models break: give prediction if it is wrong"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Part:
    """One network in a file: the prefix of its tensors, their naming, and which of them are ignored."""

    file: TensorFile
    prefix: str
    # "ldm", "hf", "open_clip", "own", "own, old", "deepfloyd", "diffusers"
    naming: str
    config: Any                          # UNetConfig, MMDiTConfig, TextConfig, VAEConfig; of T5, a dict
    ignored: tuple[str, ...] = ()        # prefixes, after `prefix`
    # functions that change tensors as they are read, in turn, by the tensors' names in the module
    changes: dict[str, list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)


class Added(NamedTuple):
    """An add-on to a model: the path that was given, its files by name, and its weight or its words."""

    path: Path
    files: dict[str, Path]
    value: Any


@dataclass
class Package:
    """A recognised model, not loaded yet."""

    family: str
    where: Path
    unet: Part
    text: list[Part]
    vae: Part | None
    sampling: Sampling
    size: tuple[int, int] | None   # height, width that it was made for, in pixels; None: see `usual_size`
    latent_scale: float = 1.0
    notes: list[str] = field(default_factory=list)
    zero_negative: bool = False          # the empty prompt is all zeros
    # the configs that were read, which decide pixels as the parts' files do
    configs: list[Path] = field(default_factory=list)
    lora: list[Added] = field(default_factory=list)
    embeddings: list[Added] = field(default_factory=list)
    words: dict[str, Any] = field(default_factory=dict)   # of embeddings: each word's vectors, by text tower
    t5: Part | None = None         # of Stable Diffusion 3 and FLUX
    tokenizer: Any = None          # T5's, or the folder of a model that has it
    kind: str = ""                 # of those families, see `p2p.weights.mmdit.kind_of`
    pipeline: str | None = None          # the class of the pipeline in memory that it is, instead of files

    @property
    def prediction(self) -> str:
        return self.sampling.prediction

    @property
    def why(self) -> str:
        """How the prediction type was found."""
        return self.sampling.why

    @property
    def alphas_cumprod(self) -> Tensor:
        return self.sampling.alphas_cumprod


def count(shapes: Shapes, prefix: str) -> int:
    """Number of numbered children of a prefix; one may be missing, and a number far above the others is
    ignored. Raises CheckpointError for thousands."""
    children = {k.removeprefix(prefix).split(".")[0] for k in shapes if k.startswith(prefix)}
    numbers = (int(n) for n in children if n.isdigit() and int(n) <= len(children))
    return check_blocks(1 + max(numbers, default=-1), prefix)


# ----------------------------------------------------------------------------------------------- single files

# Tensors that may be there beside the networks: the schedule's tables, averages, training leftovers.
BESIDE = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "model_ema.", "logvar",
          "denoiser.sigmas", "v_pred", "ztsnr", "first_stage_model.loss.", "cond_stage_model.logit_scale",
          "conditioner.embedders.1.logit_scale")


def find_in_file(file: TensorFile, ema: bool = False) -> Package:
    """Recognises a single file in LDM naming, or a trained emoji model. Its autoencoder may be missing. ema:
    see `averaged`. Raises CheckpointError."""
    if file.metadata.get("format") in OWN:
        return _own(file)
    refuse.by_name(file.path, file.shapes, file.is_fp8())
    s = file.shapes
    text_sd1 = next((p for p in (keys.TEXT_SD1, "cond_stage_model.transformer.")
                     if p + "embeddings.token_embedding.weight" in s), None)
    text_sd2 = next((p for p in (keys.TEXT_SD2, keys.TEXT_SGM2) if p + "token_embedding.weight" in s), None)
    sdxl = keys.TEXT_SDXL[1] + "token_embedding.weight" in s
    family = None
    if sdxl or text_sd1 or text_sd2:
        family = "sdxl" if sdxl else "sd1" if text_sd1 else "sd2"
    vae = next((p for p in (keys.VAE, "vae.") if p + "encoder.conv_in.weight" in s), None)
    parts = {"UNet": keys.UNET + "input_blocks.0.0.weight" in s, "autoencoder": vae, "text tower": family}
    absent = [name for name, present in parts.items() if not present]
    if absent and absent != ["autoencoder"]:
        held = f"{len(s)} tensors ({', '.join(list(s)[:3])} ...)" if s else "no tensors"
        raise CheckpointError(f"{file.path}: no {', no '.join(absent)} found under the names of a Stable "
                              f"Diffusion file; it holds {held}.")
    tower = "cond_stage_model." if not sdxl and text_sd2 != keys.TEXT_SGM2 else "conditioner."
    known = (keys.UNET, vae or keys.VAE, tower, *BESIDE)
    stray = sorted(k for k in s if not k.startswith(known))
    if stray:
        raise CheckpointError(f"{file.path}: {listed('unexpected', stray)}. Is it a model with additions? "
                              "Use the plain one.")
    notes: list[str] = []
    unet = Part(averaged(file, ema, notes), keys.UNET, "ldm", ldm_unet_config(s, family))
    if sdxl:
        text = [hf_text(file, keys.TEXT_SDXL[0], "sdxl"),
                _open_clip_text(file, keys.TEXT_SDXL[1], "sdxl", notes)]
    else:
        text = [hf_text(file, text_sd1, "sd1") if text_sd1
                else _open_clip_text(file, text_sd2, "sd2", notes)]
    check_widths(file.path, unet.config.context_dim, text)
    part = Part(file, vae, "ldm", vae_config(s, vae), ("loss.",)) if vae else None
    scale, _ = latents(file, family)
    return Package(family, file.path, unet, text, part, _sampling(file, family, notes), None, scale, notes,
                   zero_negative=sdxl and ENCODED_EMPTY not in file.metadata)


def usual_size(package: Package) -> tuple[int, int]:
    """Height and width in pixels that a single file was made for, from its family and prediction: the file
    does not say."""
    usual = {"sd1": 512, "sdxl": 1024, "sd3": 1024, "flux": 1024}
    side = usual.get(package.family, 768 if package.prediction == "v" else 512)
    return side, side


def told_size(file: TensorFile) -> tuple[int, int] | None:
    """The same, if `p2p.weights.convert` noted it. Raises CheckpointError."""
    if not (told := parsed(file, OTHER_SIZE)):
        return None
    height, width = told.get("height"), told.get("width")
    if not all(type(side) is int and 0 < side <= 2**16 for side in (height, width)):
        raise CheckpointError(f"{file.path}: {OTHER_SIZE} in its metadata is no height and width in pixels.")
    return height, width


def parsed(file: TensorFile, name: str) -> dict[str, Any]:
    """What `p2p.weights.convert` wrote in a file's metadata under a name; empty if nothing. Raises
    CheckpointError."""
    try:
        config = parse_object(file.metadata.get(name, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{file.path}: its metadata hold no {name} ({error}).") from None
    check_sizes(file.path, config)
    return config


def latents(file: TensorFile, family: str) -> tuple[float, float]:
    """Scale and shift of the latents of a single file. Raises CheckpointError."""
    told = parsed(file, OTHER_LATENTS)
    scale, shift = (told.get(name, usual) for name, usual in
                    zip(("scaling_factor", "shift_factor"), LATENTS[family]))
    if not scale > 0:
        raise CheckpointError(f"{file.path}: scaling_factor = {scale} in its metadata; a number above 0 is "
                              "expected.")
    return scale, shift


def _sampling(file: TensorFile, family: str, notes: list[str]) -> Sampling:
    prediction, why = _prediction(file, family)
    if config := parsed(file, scheduler.METADATA):
        sampling = scheduler.read(file.path, config, family)
        notes += sampling.notes
        return replace(sampling, prediction=prediction, why=why)
    abar = scaled_linear()
    if "alphas_cumprod" in file.shapes:
        stored = scheduler.stored(file)
        if (stored - abar).abs().max() > 1e-4:
            notes.append("the file's own noise schedule differs from Stable Diffusion's and is used")
        abar = stored
    if "ztsnr" in file.shapes:
        abar = zero_terminal_snr(abar)
        notes.append("zero terminal SNR (marker ztsnr)")
    latent_consistency = keys.UNET + "time_embed.cond_proj.weight" in file.shapes
    if latent_consistency:
        notes.append("lcm samples (its guidance is an input, as of latent consistency models)")
    return Sampling(abar, prediction, why, sampler="lcm" if latent_consistency else "ddim")


def check_widths(path: Path, wanted: int, text: list[Part]) -> None:
    width = sum(p.config.width for p in text)
    if wanted != width:
        raise CheckpointError(f"{path}: the UNet takes text of width {wanted}, the text tower gives {width}; "
                              "it mixes two models.")


def _prediction(file: TensorFile, family: str) -> tuple[str, str]:
    """What the UNet was trained to predict, and how that was found: no tensor says it for certain."""
    sidecar = file.path.with_suffix(".yaml")
    if sidecar.is_file() and (name := told_prediction(sidecar)):
        return PREDICTION_NAMES.get(name, name), f"{sidecar.name} beside it"
    if "v_pred" in file.shapes:
        return "v", "marker tensor v_pred"
    said = (file.metadata.get(f"modelspec.{key}") for key in ("prediction_type", "predict_key"))
    if name := next(filter(None, said), "").lower():
        return PREDICTION_NAMES.get(name, name), "the file's metadata"
    if family == "sd2":
        if file.metadata.get("global_step") == "875000":
            return "eps", "its step count, that of 2.0-base"
        n = count(file.shapes, keys.UNET + "output_blocks.")
        last = f"{keys.UNET}output_blocks.{n - 1}.1.transformer_blocks.0.norm1.bias"
        if last in file.shapes:
            spread = file[last].float().std(correction=0).item()
            why = f"a guess from one bias (spread {spread:.3f}): give prediction if it is wrong"
            return "v" if spread > 0.09 else "eps", why
    return "eps", FAMILY_RULE


def ldm_unet_config(shapes: Shapes, family: str) -> UNetConfig:
    """Sizes from shapes; the number of heads is not in them: 8 in SD 1, one for 64 channels in SD 2 and
    SDXL."""
    p = keys.UNET + "input_blocks."
    levels: list[list[tuple[int, int]]] = [[]]   # (channels, transformer depth)
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
        channels=channels, layers_per_block=len(levels[0]), down_attention=kinds, mid_attention="cross",
        up_attention=kinds, depth=tuple(max(1, blocks[0][1]) for blocks in levels),
        heads=tuple(8 if family == "sd1" else max(1, c // 64) for c in channels), context_dim=context,
        linear_projection=linear, vector_dim=shapes.get(keys.UNET + "label_emb.0.0.weight", (0, None))[1],
        guidance_dim=shapes.get(keys.UNET + "time_embed.cond_proj.weight", (0, None))[1],
        upcast_attention=family == "sd2",
    )


def vae_config(shapes: Shapes, prefix: str, blocks: str = "down.", resnets: str = "block.") -> VAEConfig:
    """An autoencoder's sizes from its shapes, under the names of the original; under diffusers', blocks are
    "down_blocks." of "resnets."."""
    p = prefix + "encoder."
    z = shapes[p + "conv_out.weight"][0] // 2
    return VAEConfig(
        in_channels=shapes[p + "conv_in.weight"][1], latent_channels=z,
        channels=tuple(shapes[f"{p}{blocks}{i}.{resnets}0.conv2.weight"][0]
                       for i in range(count(shapes, p + blocks))),
        layers_per_block=count(shapes, f"{p}{blocks}0.{resnets}"),
        quant_conv=z == 4 or prefix + "quant_conv.weight" in shapes,   # Stable Diffusion's own always has it
    )


def hf_text(file: TensorFile, prefix: str, family: str, base: TextConfig = CLIP_L,
            pooled: int | None = None) -> Part:
    """A CLIP tower in transformers' names. base: what shapes do not tell. pooled: see `for_family`."""
    s = file.shapes
    vocab, width = s[prefix + "embeddings.token_embedding.weight"]
    n = count(s, prefix + "encoder.layers.")
    config = replace(base, width=width, heads=max(1, width // 64), vocab_size=vocab,
                     mlp_width=s[prefix + "encoder.layers.0.mlp.fc1.weight"][0],
                     context_length=s[prefix + "embeddings.position_embedding.weight"][0])
    return Part(file, prefix, "hf", for_family(config, n, family, pooled),
                ("embeddings.position_ids", *unused_hf(n, family)))


def unused_hf(n: int, family: str) -> tuple[str, ...]:
    return (f"encoder.layers.{n - 1}.", "final_layer_norm.") if family == "sdxl" else ()


def _open_clip_text(file: TensorFile, prefix: str, family: str, notes: list[str]) -> Part:
    """OpenCLIP H or bigG in their own names.

    Stable Diffusion 2 reads H after 23 of its 24 layers. Its own files hold the 24th, which is idle; those
    that were made from a diffusers folder may not, or (those of `p2p.weights.convert`) hold one of zeros in
    its place. So the 24th layer is left out, and a last one of zeros; all others are used, as in diffusers
    and ComfyUI, which count from the front too. For a file with fewer layers that is a guess, and noted:
    `clip_skip` leaves out more.
    """
    s = file.shapes
    vocab, width = s[prefix + "token_embedding.weight"]
    layers = prefix + "transformer.resblocks."
    n = count(s, layers)
    config = TextConfig(width=width, heads=max(1, width // 64), vocab_size=vocab, quick_gelu=False, pad_id=0,
                        mlp_width=s[layers + "0.mlp.c_fc.weight"][0],
                        context_length=s[prefix + "positional_embedding"][0])
    ignored = ("logit_scale", "attn_mask")
    if family == "sdxl":
        return Part(file, prefix, "open_clip",
                    for_family(config, n, family, s[prefix + "text_projection"][1]), ignored)
    used = min(n, OPENCLIP_H.layers)
    last = f"{layers}{n - 1}.ln_1.weight"
    if n == used > 1 and last in s and not file[last].any():
        used = n - 1
    elif n < OPENCLIP_H.layers:
        notes.append(f"all {n} layers of its text tower are used (a guess: of Stable Diffusion 2's 24, the "
                     "last is idle)")
    return Part(file, prefix, "open_clip", for_family(config, used, family, None),
                (*ignored, "text_projection", f"transformer.resblocks.{used}."))


def for_family(config: TextConfig, layers: int, family: str, pooled: int | None) -> TextConfig:
    """The config with the hidden layer that a family uses, and its normalisation. layers: in the file.
    pooled: the width that the pooled text is projected to; None: it is not, or not read."""
    if config.vocab_size != CLIP_L.vocab_size:
        raise CheckpointError(f"the text tower knows {config.vocab_size} tokens, CLIP has "
                              f"{CLIP_L.vocab_size}.")
    if family in FLOWS:
        config = replace(config, layers=layers, pooled_dim=pooled or config.width, projected=bool(pooled))
        return replace(config, skip=1, final_norm=False) if family == "sd3" else config
    if family != "sdxl":
        return replace(config, layers=layers)
    if pooled is None:
        return replace(config, layers=layers - 1, final_norm=False)
    return replace(config, layers=layers, skip=1, final_norm=False, pooled_dim=pooled)


def _own(file: TensorFile) -> Package:
    """Recognises a file of ours: the modules' own names; the network's sizes in the metadata."""
    flow = file.metadata["format"] == "p2p-emoji-flow"
    try:
        sizes = parse_object(file.metadata["unet"])
        check_sizes(file.path, sizes)
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
        network = MMDiTConfig(**sizes) if flow else UNetConfig(**sizes)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file.path}: its metadata do not hold the sizes of a network ({error!r}); it "
                              "is damaged, or of another version of this project.") from None
    # the super-resolution stage reads no text
    large = isinstance(network, UNetConfig) and network.low_channels > 0
    text = [] if large else [Part(file, "text.", "own",
                                  replace(EMOJI_TEXT, vocab_size=file.shapes["text.vocab"][0]))]
    stray = sorted(k for k in file.shapes
                   if not k.startswith(("unet.", "alphas_cumprod", *(p.prefix for p in text))))
    if stray:
        raise CheckpointError(f"{file.path}: {listed('unexpected', stray)}. Is it a model with additions? "
                              "Use the plain one.")
    if text:
        check_widths(file.path, network.context_dim, text)
    if flow:
        sampling = Sampling(torch.empty(0), "flow", "the file's metadata",
                            flow=Flow(float(file.metadata.get("shift", 1))))
    else:
        sampling = Sampling(scheduler.stored(file), file.metadata.get("prediction", "x0"),
                            "the file's metadata", final_alpha=1.0, clip=1.0)
    return Package("emoji-flow" if flow else "emoji", file.path, Part(file, "unet.", "own", network), text,
                   None, sampling, (256, 256) if large else (64, 64))

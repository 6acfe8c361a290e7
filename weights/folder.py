"""Recognises diffusers folders. Sizes come from the configs; unknown fields that may change pixels are
refused."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2p.models.text import CLIP_L, END
from p2p.models.unet import UNetConfig
from p2p.models.vae import VAEConfig
from p2p.weights import fields, scheduler
from p2p.weights.averages import NOT_USED, USED
from p2p.weights.detect import (
    FLOWS,
    LATENTS,
    Package,
    Part,
    Shapes,
    check_widths,
    count,
    for_family,
    unused_hf,
)
from p2p.weights.errors import CheckpointError
from p2p.weights.files import INDEX, Renamed, TensorFile, open_file
from p2p.weights.refuse import INPUTS, by_config
from p2p.weights.scheduler import Sampling, scaled_linear
from p2p.weights.sizes import check_given, per_level, read_json
from p2p.weights.tokenizer import read_tokenizer

PIPELINES = {   # of the same parts
    "StableDiffusionPipeline": None, "StableDiffusionImg2ImgPipeline": None,
    "LatentConsistencyModelPipeline": None, "LatentConsistencyModelImg2ImgPipeline": None,
    "StableDiffusionXLPipeline": "sdxl", "StableDiffusionXLImg2ImgPipeline": "sdxl"}
VARIANTS = {"": "", ".fp16": "half precision", ".bf16": "half precision", ".non_ema": "not averaged"}
AVERAGED = "unet_ema"
EMA_FIELDS = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
              "use_ema_warmup")


def candidates() -> list[str]:
    """Names that a component's weights may have, the best first: safetensors before bin, full before half
    precision."""
    out = []
    for variant in VARIANTS:
        for stem, suffix in (("diffusion_pytorch_model", "safetensors"), ("model", "safetensors"),
                             ("diffusion_pytorch_model", "bin"), ("pytorch_model", "bin")):
            out += [f"{stem}{variant}.{suffix}", f"{stem}{variant}.{suffix}{INDEX}",
                    f"{stem}.{suffix}.index{variant}.json"]
    return out


def has_config(file: Path) -> bool:
    """Whether a file has the name of a component's weights and lies beside its config."""
    return file.name in candidates() and (file.parent / "config.json").exists()


def weights_file(folder: Path, notes: list[str]) -> TensorFile:
    """Opens a component's weights; shards by their index. Raises CheckpointError."""
    for name in candidates():
        if (folder / name).exists():
            if variant := next((v for v in filter(None, VARIANTS) if v in name), None):
                notes.append(f"{folder.name}: {VARIANTS[variant]} ({variant[1:]} variant), the only one "
                             "there")
            return open_file(folder / name)
    raise CheckpointError(f"{folder}: no weights found (diffusion_pytorch_model or model, .safetensors or "
                          ".bin expected).")


def pipeline(path: Path) -> str:
    """The pipeline that a folder's model_index.json names. Raises CheckpointError."""
    if not (path / "model_index.json").exists():
        raise CheckpointError(f"{path}: a folder without model_index.json; give a diffusers folder, or the "
                              "single file itself.")
    return str(read_json(path / "model_index.json").get("_class_name"))[:60]


def read_index(path: Path, notes: list[str], family: str = "") -> dict[str, Any]:
    """The model_index.json of a folder, its components checked. family: of flows. Raises CheckpointError."""
    where = path / "model_index.json"
    content = read_json(where)
    classes, flow = fields.FLOW_CLASSES.get(family, fields.CLASSES), family in FLOWS
    index = {k: v for k, v in content.items() if v not in (None, [None, None])}
    fields.check(where, index, fields.FLOW_INDEX if flow else fields.INDEX)
    notes += [f"model_index.json names no {name} (null), but there is a folder of that name, which is used"
              for name in (*classes, "scheduler") if name in content and name not in index
              and (path / name).is_dir()]
    for name, (library, known) in classes.items():
        if name in index and index[name] not in [[library, kind] for kind in known]:
            raise CheckpointError(f"{where}: its {name} is {fields.short(index[name])}; supported, of "
                                  f"{library}: {', '.join(known)}.")
    scheduler.check_class(where, scheduler_class(index), flow)
    if "scheduler" in index and index["scheduler"][:-1] != ["diffusers"]:
        raise CheckpointError(f"{where}: its scheduler is {fields.short(index['scheduler'])}; those of "
                              "diffusers are supported.")
    return index


def scheduler_class(index: dict[str, Any]) -> Any:
    """The scheduler's class in a model_index.json, not checked."""
    entry = index.get("scheduler")
    return entry[-1] if isinstance(entry, list) and entry else entry


def find_folder(path: Path, kind: str, replacement: tuple[Part, float | None] | None = None,
                ema: bool = False, opened: Callable[[Path, list[str]], TensorFile] = weights_file) -> Package:
    """Recognises a Stable Diffusion folder by the configs of its parts. replacement: see `find_vae`. ema: the
    averaged weights that diffusers' training scripts save beside the UNet. opened: gives the weights of a
    part's folder. Raises CheckpointError."""
    notes: list[str] = []
    index, unet_folder = read_index(path, notes), _unet_folder(path, ema, notes)
    configs, where = [path / "model_index.json"], unet_folder / "config.json"
    unet_config = {k: v for k, v in read_json(where).items() if not ema or k not in EMA_FIELDS}
    takes = unet_config.get("in_channels", 4)
    if takes != 4:
        kind = INPUTS.get(takes) if isinstance(takes, int) else None
        raise CheckpointError(f"{path}: its UNet takes {fields.short(takes)} channels, not the 4 of Stable "
                              f"Diffusion's latents{f': {kind} model' if kind else ''}; use "
                              f"{'the text-to-image model that it was made from' if kind else 'another'}.")
    widths = [unet_config.get(name)
              for name in ("cross_attention_dim", "projection_class_embeddings_input_dim")]
    if widths == [1280, 2560]:
        raise CheckpointError(f"{path}: an SDXL refiner, made for pictures that are nearly done; use the "
                              "SDXL base model.")
    first = read_json(path / "text_encoder" / "config.json")
    family = PIPELINES[kind] or ("sd1" if first.get("hidden_act", "quick_gelu") == "quick_gelu" else "sd2")
    towers = [folder_text(path, "text_encoder", first, family, False, notes, opened)]
    if family == "sdxl":
        second = read_json(path / "text_encoder_2" / "config.json")
        towers.append(folder_text(path, "text_encoder_2", second, family, True, notes, opened))
    text = [part for part, _ in towers]
    unet = Part(opened(unet_folder, notes), "", "own", unet_from_config(where, unet_config, family))
    check_widths(path, unet.config.context_dim, text)
    check_vector(where, unet_config, family, text[-1].config.pooled_dim)
    configs += [where, *(c for _, files in towers for c in files)]
    vae, scale = None, None
    if replacement is not None:
        vae, scale = replacement
    elif (path / "vae").exists():
        vae, scale = find_folder_vae(path / "vae", notes, opened(path / "vae", notes))
        configs.append(path / "vae" / "config.json")
    sampling = Sampling(scaled_linear(),
                        why="a guess, the folder has no scheduler: give prediction if it is wrong")
    if (config := path / "scheduler" / "scheduler_config.json").exists():
        sampling = scheduler.read(config, read_json(config), family, scheduler_class(index))
        configs.append(config)
    side = _sample_size(unet_config, family, notes)
    sides = side if isinstance(side, (list, tuple)) else (side, side)
    shrink = vae.config.shrink if vae else 8
    return Package(family, path, unet, text, vae, sampling, (sides[0] * shrink, sides[1] * shrink),
                   scale or LATENTS[family][0], [*notes, *sampling.notes],
                   family == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)), configs)


def _unet_folder(path: Path, ema: bool, notes: list[str]) -> Path:
    """The folder of the UNet's weights. Raises CheckpointError."""
    present = (path / AVERAGED / "config.json").exists()
    if ema and not present:
        raise CheckpointError(f"{path}: no averaged weights (EMA) in it, which would be the folder "
                              f"{AVERAGED}; leave out ema.")
    notes += [USED if ema else NOT_USED] if present else []
    return path / (AVERAGED if ema else "unet")


def _sample_size(c: dict[str, Any], family: str, notes: list[str]) -> Any:
    """The latents' size; in StableDiffusionPipeline at least 64 where diffusers before 0.9 saved the UNet."""
    side, version = c.get("sample_size") or 64, re.match(r"0\.(\d+)", str(c.get("_diffusers_version")))
    if family != "sdxl" and isinstance(side, int) and side < 64 and version and int(version[1]) < 9:
        notes.append(f"sample_size 64 taken, as in StableDiffusionPipeline, not the UNet config's {side}")
        return 64
    return side


def check_vector(path: Path, c: dict[str, Any], family: str, pooled: int | None) -> None:
    """Checks SDXL's vector: pooled text and six numbers, each embedded. Raises CheckpointError."""
    has, dim = c.get("addition_embed_type") == "text_time", c.get("addition_time_embed_dim")
    width = c.get("projection_class_embeddings_input_dim")
    if has != (family == "sdxl"):
        raise CheckpointError(f"{path}: addition_embed_type {fields.short(c.get('addition_embed_type'))} in "
                              f"a model of the family {family}, which {'has no' if has else 'has a'} vector "
                              "of text and sizes.")
    if has and (not isinstance(dim, int) or width != (pooled or 0) + 6 * dim):
        raise CheckpointError(f"{path}: projection_class_embeddings_input_dim {fields.short(width)} is not "
                              f"the pooled text's width {pooled} and six times addition_time_embed_dim "
                              f"{fields.short(dim)}.")


def unet_from_config(path: Path, c: dict[str, Any], family: str) -> UNetConfig:
    if kind := by_config(c):
        raise CheckpointError(f"{path}: {kind}.")
    fields.check(path, c, fields.UNET)
    check_given(path, c, "in_channels", "out_channels", "block_out_channels", "layers_per_block",
                "cross_attention_dim", "transformer_layers_per_block",
                *([] if c.get("num_attention_heads") else ["attention_head_dim"]))
    channels = tuple(c.get("block_out_channels", (320, 640, 1280, 1280)))
    n = len(channels)
    kinds = []
    usual = ("CrossAttnDownBlock2D",) * (n - 1) + ("DownBlock2D",)
    for name in per_level(path, "down_block_types", c.get("down_block_types", usual), n):
        if name not in ("CrossAttnDownBlock2D", "DownBlock2D"):
            raise CheckpointError(f"{path}: down_block_types holds {fields.short(name)}; supported: "
                                  "CrossAttnDownBlock2D, DownBlock2D.")
        kinds.append("cross" if name.startswith("Cross") else None)
    ups = [{"CrossAttnUpBlock2D": "cross", "UpBlock2D": None}.get(name, name) for name in
           c.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (n - 1))]
    if ups != kinds[::-1]:
        raise CheckpointError(f"{path}: up_block_types do not mirror down_block_types.")
    layers = per_level(path, "layers_per_block", c.get("layers_per_block", 2), n)
    if len(set(layers)) > 1:
        raise CheckpointError(f"{path}: layers_per_block = {fields.short(c['layers_per_block'])}; one number "
                              "for all levels is supported.")
    channels_in, channels_out = c.get("in_channels", 4), c.get("out_channels", 4)
    if channels_out != channels_in:
        raise CheckpointError(f"{path}: out_channels {fields.short(channels_out)}, in_channels "
                              f"{fields.short(channels_in)}; they must be equal.")
    depth = per_level(path, "transformer_layers_per_block", c.get("transformer_layers_per_block", 1), n)
    # "attention_head_dim" holds the number of heads in these configs, an old slip of diffusers
    heads = per_level(path, "num_attention_heads or attention_head_dim",
                      c.get("num_attention_heads") or c.get("attention_head_dim", 8), n)
    if odd := [f"{n} heads of {width} channels" for n, width in zip(heads, channels) if width % n]:
        raise CheckpointError(f"{path}: num_attention_heads or attention_head_dim = {fields.short(heads)}: "
                              f"{odd[0]}, which they do not divide.")
    vector = None
    if c.get("addition_embed_type") == "text_time":
        vector = c.get("projection_class_embeddings_input_dim")
    return UNetConfig(
        in_channels=channels_in, out_channels=channels_out, channels=channels, layers_per_block=layers[0],
        down_attention=tuple(kinds), mid_attention="cross", up_attention=tuple(kinds),
        depth=depth, heads=heads, context_dim=c.get("cross_attention_dim", 1280),
        linear_projection=bool(c.get("use_linear_projection", False)), vector_dim=vector,
        guidance_dim=c.get("time_cond_proj_dim"),
        upcast_attention=bool(c.get("upcast_attention")) or family == "sd2",
    )


def find_folder_vae(path: Path, notes: list[str], file: TensorFile | None = None) -> tuple[Part, float]:
    """The autoencoder of a diffusers folder, of either generation of names, and its latents' scale (0.18215
    where the config is silent, as in diffusers).

    file: used in place of the one that `weights_file` finds.
    """
    where = path / "config.json"
    c = read_json(where)
    if kind := by_config(c):
        raise CheckpointError(f"{where}: {kind}.")
    fields.check(where, c, fields.VAE)
    check_given(where, c, "in_channels", "out_channels", "latent_channels", "block_out_channels",
                "layers_per_block", "scaling_factor")
    if not c.get("scaling_factor", 1) > 0:
        raise CheckpointError(f"{where}: scaling_factor = {fields.short(c['scaling_factor'])}; a number "
                              "above 0 is expected.")
    channels = tuple(c.get("block_out_channels", (128, 256, 512, 512)))
    quant = [bool(c.get(name, True)) for name in ("use_quant_conv", "use_post_quant_conv")]
    if quant[0] != quant[1]:
        raise CheckpointError(f"{where}: use_quant_conv = {quant[0]}, use_post_quant_conv = {quant[1]}; both "
                              "or neither are supported.")
    config = VAEConfig(c.get("in_channels", 3), c.get("latent_channels", 4), channels,
                       c.get("layers_per_block", 2), quant[0], float(c.get("shift_factor") or 0))
    if c.get("out_channels", config.in_channels) != config.in_channels:
        raise CheckpointError(f"{where}: takes {config.in_channels} channels and gives "
                              f"{fields.short(c['out_channels'])}.")
    for name, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if odd := [kind for kind in c.get(name, []) if kind != known]:
            raise CheckpointError(f"{where}: {name} holds {fields.short(odd[0])}; supported: {known}.")
    file = file or weights_file(path, notes)
    return Part(file, "", own_vae_names(file.shapes), config), c.get("scaling_factor", 0.18215)


def own_vae_names(shapes: Shapes) -> str:
    """Which generation of diffusers' names an autoencoder has."""
    return "own, old" if "encoder.mid_block.attentions.0.query.weight" in shapes else "own"


def folder_text(path: Path, name: str, c: dict[str, Any], family: str, pooled: bool, notes: list[str],
                opened: Callable[[Path, list[str]], TensorFile] = weights_file) -> tuple[Part, list[Path]]:
    """A text tower and its tokenizer's settings, and the configs that were read for it."""
    where = path / name / "config.json"
    fields.check(where, c, fields.TEXT)
    check_given(where, c, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "vocab_size", *(["projection_dim"] if pooled else []))
    act = c.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{where}: hidden_act {fields.short(act)}; supported: quick_gelu, gelu.")
    file = opened(path / name, notes)
    prefix = "text_model." if any(k.startswith("text_model.") for k in file.shapes) else ""
    n = c.get("num_hidden_layers", 12)
    width, heads = c.get("hidden_size", 512), c.get("num_attention_heads", 8)
    if width % heads:
        raise CheckpointError(f"{where}: num_attention_heads = {heads} does not divide hidden_size = "
                              f"{width}.")
    config = replace(CLIP_L, width=width, heads=heads, vocab_size=c.get("vocab_size", 49408),
                     mlp_width=c.get("intermediate_size", 2048),
                     context_length=c.get("max_position_embeddings", 77), quick_gelu=act == "quick_gelu",
                     pad_id=END if act == "quick_gelu" else 0)
    config = for_family(config, n, family, c.get("projection_dim", 512) if pooled else None)
    stored = count(file.shapes, prefix + "encoder.layers.")
    if n < stored:
        notes.append(f"{name}: its config uses {n} of the {stored} layers that its file holds (clip skip)")
    ignored = ("embeddings.position_ids", *(() if pooled else unused_hf(n, family)),
               *(f"encoder.layers.{i}." for i in range(n, stored)))
    pad_id, configs = read_tokenizer(path / name.replace("text_encoder", "tokenizer"), config)
    if pooled:   # its projection stands outside of the prefix: read as if nothing did
        file, prefix = Renamed(file, {k.removeprefix(prefix): k for k in file.shapes}), ""
    part = Part(file, prefix, "hf", replace(config, pad_id=pad_id), ignored)
    return part, [where, *configs]

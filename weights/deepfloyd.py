"""DeepFloyd IF: recognises its diffusers folders, and files in its own naming."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from p2p.models.t5 import EncodedPrompts, T5Encoder
from p2p.models.unet import UNetConfig
from p2p.weights import fields, scheduler
from p2p.weights.detect import Package, Part, Shapes, count
from p2p.weights.errors import CheckpointError
from p2p.weights.files import TensorFile
from p2p.weights.folder import read_index, scheduler_class, weights_file
from p2p.weights.scheduler import Sampling, squared_cosine
from p2p.weights.sizes import check_given, check_sizes, per_level, read_json, read_settings
from p2p.weights.t5 import PADDING_READ, in_folder, load_prompts, load_t5

PIPELINES = ("IFPipeline", "IFSuperResolutionPipeline")
# a tensor that files under IF's own names hold, and no others
OWN = "encoder_pooling.1.positional_embedding"


def find_folder(path: Path) -> Package:
    """Recognises a stage in a diffusers folder. Raises CheckpointError."""
    where = path / "unet" / "config.json"
    notes: list[str] = []
    c, index = read_json(where), read_index(path, notes)
    unet = Part(weights_file(path / "unet", notes), "", "own", unet_from_config(where, c))
    sampling, configs = _released(unet.config), [path / "model_index.json", where]
    config, noising = (path / folder / "scheduler_config.json"
                       for folder in ("scheduler", "image_noising_scheduler"))
    if config.exists():
        sampling = scheduler.read(config, read_json(config), "if", scheduler_class(index))
        configs.append(config)
    if noising.exists():   # of the low-resolution picture
        if not torch.equal(scheduler.read(noising, read_json(noising), "if").alphas_cumprod,
                           sampling.alphas_cumprod):
            raise CheckpointError(f"{noising}: a noise schedule other than the sampler's; both must share "
                                  "one.")
        configs.append(noising)
    side = c.get("sample_size") or 64
    size = (side, side) if isinstance(side, int) else tuple(side)
    return Package("if", path, unet, [], None, sampling, size, notes=[*notes, *sampling.notes],
                   configs=configs)


def _released(unet: UNetConfig) -> Sampling:
    """The sampling of the published stages: dynamic thresholding by a quantile, up to a bound."""
    return Sampling(squared_cosine(), why="as every model of IF", offset=0, final_alpha=1.0,
                    clip=(0.95, 1.0 if unet.low_channels else 1.5))


def unet_from_config(path: Path, c: dict[str, Any]) -> UNetConfig:
    fields.check(path, c, fields.DEEPFLOYD_UNET)
    check_given(path, c, "in_channels", "out_channels", "block_out_channels", "layers_per_block",
                "cross_attention_dim", "attention_head_dim")
    channels = tuple(c.get("block_out_channels", (320, 640, 1280, 1280)))
    n = len(channels)

    def each(name: str, usual: Any) -> tuple[Any, ...]:
        return per_level(path, name, c.get(name, usual), n)

    text_only = each("only_cross_attention", False)

    def kinds(name: str, known: dict[str, bool], text_only: tuple[bool, ...]) -> tuple[str | None, ...]:
        names = per_level(path, name, c[name], n)
        if odd := sorted(set(names) - known.keys()):
            raise CheckpointError(f"{path}: block types {', '.join(odd)}; supported: {', '.join(known)}.")
        return tuple(("added text" if only else "added") if known[name] else None
                     for name, only in zip(names, text_only))

    down = kinds("down_block_types", {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True},
                 text_only)
    up = kinds("up_block_types", {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True},
               text_only[::-1])[::-1]
    only_mid = c.get("mid_block_only_cross_attention")
    if only_mid is None:   # of a list the middle is none
        only_mid = c.get("only_cross_attention") is True
    mid = "added text" if only_mid else "added"
    low = c.get("in_channels", 3) - 3 if c.get("class_embed_type") == "timestep" else 0
    text = c.get("encoder_hid_dim")
    return UNetConfig(
        in_channels=c.get("in_channels", 3) - low, out_channels=c.get("out_channels", 6), channels=channels,
        layers_per_block=each("layers_per_block", 2), down_attention=down, mid_attention=mid, up_attention=up,
        depth=(1,) * n, heads=tuple(ch // d for ch, d in zip(channels, each("attention_head_dim", 64))),
        context_dim=c.get("cross_attention_dim", 1280), act=c.get("act_fn", "silu"),
        scale_shift=c.get("resnet_time_scale_shift") == "scale_shift",
        skip_time_act=bool(c.get("resnet_skip_time_act")), out_scale=c.get("resnet_out_scale_factor") or 1.0,
        mid_scale=c.get("mid_block_scale_factor") or 1.0, resample="residual",
        temb_dim=c.get("time_embedding_dim"), time_act=c.get("time_embedding_act_fn"), text_dim=text,
        pool_heads=c.get("addition_embed_type_num_heads", 64),
        norm_text=c.get("cross_attention_norm") == "group_norm", low_channels=low,
    )


def find_in_file(file: TensorFile) -> Package:
    """Recognises a stage in IF's own naming: sizes from shapes; what they do not tell from config.yml beside
    it, or as released."""
    beside = file.path.with_name("config.yml")
    settings = read_settings(beside) if beside.exists() else {}
    sizes = [int(settings[k]) for k in ("num_head_channels", "att_pool_heads") if k in settings]
    check_sizes(beside, {"heads": sizes or None})
    config = unet_from_shapes(file.shapes, settings)
    stray = () if config.text_dim else ("encoder_proj.",)
    side = 256 if config.low_channels else 64
    return Package("if", file.path, Part(file, "", "deepfloyd", config, stray), [], None, _released(config),
                   (side, side), configs=[beside] if beside.exists() else [])


def unet_from_shapes(s: Shapes, settings: dict[str, str]) -> UNetConfig:
    head_dim, upscaler = int(settings.get("num_head_channels", 64)), "aug_proj.0.weight" in s
    efficient = settings.get("efficient_activation", str(upscaler)).lower() == "true"
    scaled = 1 / 0.7071 if settings.get("scale_skip_connection", str(upscaler)).lower() == "true" else 1.0
    total = count(s, "input_blocks.")
    blocks = [(s[f"input_blocks.{n}.0.out_layers.3.weight"][0], s.get(f"input_blocks.{n}.1.qkv.weight"))
              for n in range(1, total)]
    levels: list[list[tuple[int, tuple[int, ...] | None]]] = [[]]
    for i, (channels, qkv) in enumerate(blocks):
        follows = blocks[i + 1] if i + 1 < len(blocks) else None
        ends = follows is not None and qkv is None and levels[-1] and (
            levels[-1][0][1] is not None or follows[0] != channels or follows[1] is not None)
        if ends:
            levels.append([])       # a residual block that halves the picture closes its level
        else:
            levels[-1].append((channels, qkv))

    def kind(channels: int, qkv: tuple[int, ...] | None) -> str | None:
        return None if qkv is None else "added text" if qkv[0] == channels else "added"

    kinds = tuple(kind(*level[0]) for level in levels)
    channels = tuple(level[0][0] for level in levels)
    temb = s["time_embed.0.weight"][0]
    text, context = s["encoder_pooling.0.weight"][0], s["middle_block.1.encoder_kv.weight"][1]
    low = s["input_blocks.0.0.weight"][1] - 3 if upscaler else 0
    return UNetConfig(
        in_channels=s["input_blocks.0.0.weight"][1] - low, out_channels=s["out.2.weight"][0],
        channels=channels, layers_per_block=tuple(len(level) for level in levels), down_attention=kinds,
        mid_attention=kind(channels[-1], s["middle_block.1.qkv.weight"]), up_attention=kinds,
        depth=(1,) * len(levels), heads=tuple(max(1, c // head_dim) for c in channels), context_dim=context,
        act=settings.get("activation", "gelu"),
        scale_shift=s["middle_block.0.emb_layers.1.weight"][0] == 2 * channels[-1], skip_time_act=efficient,
        out_scale=scaled, mid_scale=scaled, resample="residual", temb_dim=temb,
        time_act=settings.get("activation", "gelu") if efficient else None,
        text_dim=text if "encoder_proj.weight" in s else None,
        pool_heads=int(settings.get("att_pool_heads", 64)), low_channels=low,
    )


def load_text(package: Package, source: str | Path | None, device: torch.device,
              dtype: torch.dtype) -> T5Encoder | EncodedPrompts:
    """Loads T5 from a folder (None: the model's), or a .safetensors of encoded prompts. Raises
    CheckpointError."""
    where = package.where if source is None else Path(source)
    wanted = package.unet.config.text_dim or package.unet.config.context_dim
    if where.is_file() and source is not None:
        text: T5Encoder | EncodedPrompts = load_prompts(where).to(device, dtype)
    elif in_folder(where) is not None:
        text = load_t5(where, device, dtype)
    else:
        raise CheckpointError(f"{where}: no T5 there (text_encoder/config.json and tokenizer/ expected). "
                              "Give its folder, or a file of encoded prompts, as the model's text.")
    if text.config.width != wanted:
        raise CheckpointError(f"{where}: gives text of width {text.config.width}, the UNet takes {wanted}.")
    if not text.config.masked:
        raise CheckpointError(f"{where}: {PADDING_READ}; encode the prompts by IF's folder.")
    return text.eval().requires_grad_(False)

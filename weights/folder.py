"""What is in a diffusers folder. Its configs say the sizes; a field that changes the math and is not known is refused."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from models.text import CLIP_L, TextConfig
from models.unet import UNetConfig
from models.vae import VAEConfig
from weights.detect import SAID, Package, Part, check_widths, for_family, scaled_linear, unused_hf, zero_terminal_snr
from weights.errors import CheckpointError
from weights.files import INDEX, TensorFile, open_file
from weights.sizes import check_sizes
from weights.untrusted import parse_json, read_text

PIPELINES = {"StableDiffusionPipeline": None, "StableDiffusionXLPipeline": "sdxl"}

# Fields of unet/config.json that change the math, with the values that are supported (absent: the first one).
UNET_FIELDS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",), "addition_embed_type": (None, "text_time"), "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",), "center_input_sample": (False,), "class_embed_type": (None,),
    "class_embeddings_concat": (False,), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "cross_attention_norm": (None,),
    "downsample_padding": (1,), "dual_cross_attention": (False,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,), "freq_shift": (0,), "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",), "norm_eps": (1e-5,),
    "norm_num_groups": (32,), "num_class_embeds": (None,), "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0, 1), "resnet_skip_time_act": (False,), "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,), "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,), "time_embedding_type": ("positional",), "timestep_post_act": (None,),
}
VAE_FIELDS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",), "norm_num_groups": (32,), "mid_block_add_attention": (True,), "latents_mean": (None,),
    "latents_std": (None,), "shift_factor": (None,), "use_quant_conv": (True,), "use_post_quant_conv": (True,),
}
SCHEDULER_FIELDS: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000,), "trained_betas": (None,), "beta_schedule": ("scaled_linear",),
}


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a config, whose sizes are those of some network. Raises CheckpointError."""
    try:
        found = parse_json(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the folder is not complete.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not the fields of a config.")
    check_sizes(path, found)
    return found


def check_fields(path: Path, config: dict[str, Any], fields: dict[str, tuple[Any, ...]]) -> None:
    odd = [f"{k} = {config[k]!r} (supported: {', '.join(map(repr, v))})" for k, v in fields.items()
           if k in config and not any(config[k] == x and isinstance(config[k], bool) == isinstance(x, bool) for x in v)]
    if odd:
        raise CheckpointError(f"{path}: settings that this project does not know: {'; '.join(odd[:5])}.")


def candidates() -> list[str]:
    """Names that a component's weights may have, the best first: safetensors before bin, full before half precision."""
    out = []
    for variant in ("", ".fp16"):
        for stem, suffix in (("diffusion_pytorch_model", "safetensors"), ("model", "safetensors"),
                             ("diffusion_pytorch_model", "bin"), ("pytorch_model", "bin")):
            out += [f"{stem}{variant}.{suffix}", f"{stem}{variant}.{suffix}{INDEX}", f"{stem}.{suffix}.index{variant}.json"]
    return out


def weights_file(folder: Path, notes: list[str]) -> TensorFile:
    """A component's weights; shards by their index."""
    for name in candidates():
        if (folder / name).exists():
            if "fp16" in name:
                notes.append(f"{folder.name}: half precision (fp16 variant), the only one there")
            return open_file(folder / name)
    raise CheckpointError(f"{folder}: no weights found (diffusion_pytorch_model or model, .safetensors or .bin expected).")


def pipeline(path: Path) -> str:
    """What a folder's model_index.json says it is. Raises CheckpointError."""
    if not (path / "model_index.json").exists():
        raise CheckpointError(f"{path}: a folder without model_index.json; give a diffusers folder, or the single file itself.")
    return str(read_json(path / "model_index.json").get("_class_name"))


def find_folder(path: Path, kind: str, notes: list[str]) -> Package:
    """A Stable Diffusion folder by the configs of its parts. Raises CheckpointError."""
    unet_config = read_json(path / "unet" / "config.json")
    if unet_config.get("in_channels", 4) != 4:
        raise CheckpointError(f"{path}: its UNet takes {unet_config['in_channels']} channels, not 4 (an inpainting or editing "
                              "model); use the text-to-image model that it was made from.")
    first = read_json(path / "text_encoder" / "config.json")
    family = PIPELINES[kind] or ("sd1" if first.get("hidden_act", "quick_gelu") == "quick_gelu" else "sd2")
    text = [_text(path / "text_encoder", first, family, False, notes)]
    if family == "sdxl":
        text.append(_text(path / "text_encoder_2", read_json(path / "text_encoder_2" / "config.json"), family, True, notes))
    unet = Part(weights_file(path / "unet", notes), "", "own", unet_from_config(path / "unet" / "config.json", unet_config, family))
    check_widths(path, unet.config.context_dim, text)
    vae, scale = find_folder_vae(path / "vae", notes, 0.13025 if family == "sdxl" else 0.18215)
    abar, prediction, why = _scheduler(path, notes)
    side = unet_config.get("sample_size") or 64
    side = side if isinstance(side, int) else side[0]
    side *= 2 ** (len(vae.config.channels) - 1)
    return Package(family, path, unet, text, vae, prediction, why, abar, (side, side), scale, notes)


def _scheduler(path: Path, notes: list[str]) -> tuple[Tensor, str, str]:
    where = path / "scheduler" / "scheduler_config.json"
    if not where.exists():
        return scaled_linear(), "eps", "a guess, the folder has no scheduler: give prediction if it is wrong"
    s = read_json(where)
    check_fields(where, s, SCHEDULER_FIELDS)
    said = s.get("prediction_type", "epsilon")
    if said not in SAID:
        raise CheckpointError(f"{where}: prediction_type {said!r}; supported: {', '.join(SAID)}.")
    abar = scaled_linear(s.get("beta_start", 0.00085), s.get("beta_end", 0.012))
    if s.get("rescale_betas_zero_snr"):
        abar = zero_terminal_snr(abar)
        notes.append("zero terminal SNR (scheduler config)")
    return abar, SAID[said], "scheduler_config.json"


def unet_from_config(path: Path, c: dict[str, Any], family: str) -> UNetConfig:
    check_fields(path, c, UNET_FIELDS)
    channels = tuple(c.get("block_out_channels", (320, 640, 1280, 1280)))
    n = len(channels)

    def per_level(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * n

    kinds = []
    for name in c.get("down_block_types", ("CrossAttnDownBlock2D",) * (n - 1) + ("DownBlock2D",)):
        if name not in ("CrossAttnDownBlock2D", "DownBlock2D"):
            raise CheckpointError(f"{path}: down_block_types holds {name}; supported: CrossAttnDownBlock2D, DownBlock2D.")
        kinds.append("cross" if name.startswith("Cross") else None)
    ups = [{"CrossAttnUpBlock2D": "cross", "UpBlock2D": None}.get(name, name) for name in
           c.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (n - 1))]
    if ups != kinds[::-1]:
        raise CheckpointError(f"{path}: up_block_types do not mirror down_block_types.")
    layers = per_level(c.get("layers_per_block", 2))
    if len(set(layers)) > 1:
        raise CheckpointError(f"{path}: layers_per_block = {c['layers_per_block']}; one number for all levels is supported.")
    # "attention_head_dim" holds the number of heads in these configs, an old slip of diffusers
    heads = per_level(c.get("num_attention_heads") or c.get("attention_head_dim", 8))
    vector = c.get("projection_class_embeddings_input_dim") if c.get("addition_embed_type") == "text_time" else None
    return UNetConfig(
        in_channels=c.get("in_channels", 4), out_channels=c.get("out_channels", 4), channels=channels, layers_per_block=layers[0],
        down_attention=tuple(kinds), mid_attention="cross", up_attention=tuple(kinds),
        depth=per_level(c.get("transformer_layers_per_block", 1)), heads=heads, context_dim=c.get("cross_attention_dim", 1280),
        linear_projection=bool(c.get("use_linear_projection", False)), vector_dim=vector,
        upcast_attention=bool(c.get("upcast_attention")) or family == "sd2",
    )


def find_folder_vae(path: Path, notes: list[str], scale: float = 0.18215) -> tuple[Part, float]:
    """The autoencoder of a diffusers folder, of either generation of names, and its latents' scale."""
    where = path / "config.json"
    c = read_json(where)
    check_fields(where, c, VAE_FIELDS)
    channels = tuple(c.get("block_out_channels", (128, 256, 512, 512)))
    config = VAEConfig(c.get("in_channels", 3), c.get("latent_channels", 4), channels, c.get("layers_per_block", 2))
    file = weights_file(path, notes)
    old = "encoder.mid_block.attentions.0.query.weight" in file.shapes
    return Part(file, "", "own, old" if old else "own", config), c.get("scaling_factor", scale)


def _text(path: Path, c: dict[str, Any], family: str, pooled: bool, notes: list[str]) -> Part:
    act = c.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{path / 'config.json'}: hidden_act {act!r}; supported: quick_gelu, gelu.")
    file = weights_file(path, notes)
    prefix = "text_model." if any(k.startswith("text_model.") for k in file.shapes) else ""
    n = c.get("num_hidden_layers", 12)
    width = c.get("hidden_size", 512)
    config = replace(CLIP_L, width=width, heads=c.get("num_attention_heads", 8), vocab_size=c.get("vocab_size", 49408),
                     mlp_width=c.get("intermediate_size", 4 * width), context_length=c.get("max_position_embeddings", 77),
                     quick_gelu=act == "quick_gelu", pad_id=TextConfig.pad_id if act == "quick_gelu" else 0)
    config = for_family(config, n, family, c.get("projection_dim", 512) if pooled else None)
    ignored = ("embeddings.position_ids", *(() if pooled else unused_hf(n, family)))
    return Part(_Flat(file, prefix) if pooled and prefix else file, "" if pooled else prefix, "hf", config, ignored)


class _Flat(TensorFile):
    """A text tower whose projection stands outside of `text_model.`: read as if nothing did."""

    def __init__(self, file: TensorFile, prefix: str):
        self._file, self._names = file, {k.removeprefix(prefix): k for k in file.shapes}
        self.path, self.metadata = file.path, file.metadata
        self.shapes = {k: file.shapes[v] for k, v in self._names.items()}
        self.dtypes = {k: file.dtypes[v] for k, v in self._names.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._file[self._names[key]]

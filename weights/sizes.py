"""Checks the numbers in untrusted configs, before anything is built from them: types, and sizes that networks
have."""
from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from p2p.models.mmdit import MMDiTConfig
from p2p.models.text import TextConfig
from p2p.models.unet import UNetConfig
from p2p.models.vae import VAEConfig
from p2p.weights import fields
from p2p.weights.errors import CheckpointError
from p2p.weights.untrusted import kind_of, parse_json, parse_settings, read_text

BLOCKS = 256  # that are numbered, at most: many thousands take minutes to look through
LEVELS = 16   # most numbers of a list, one a level of the network
SCALINGS = {"VScaling": "v", "EpsScaling": "eps"}   # of sgm, whose other ones are other parameterizations
_SCALING = re.compile(r"denoiser_scaling\.(\w+)")
# The most that each may be, at least 1 (at least 0 below); a name means the same in every config that has it.
_WIDTHS = ("addition_embed_type_num_heads addition_time_embed_dim attention_head_dim block_out_channels "
           "channels context_dim cross_attention_dim d_ff d_kv d_model encoder_hid_dim heads hidden_size "
           "in_channels intermediate_size latent_channels max_position_embeddings num_attention_heads "
           "num_heads out_channels pool_heads projection_class_embeddings_input_dim projection_dim "
           "guidance_dim sample_size temb_dim text_dim time_embedding_dim vector_dim joint_attention_dim "
           "caption_projection_dim pooled_projection_dim pos_embed_max_size axes_dims_rope "
           "base_image_seq_len max_image_seq_len")
_DEPTHS = "ff_mult layers_per_block num_hidden_layers num_layers num_single_layers patch patch_size"
_MOST = {**dict.fromkeys(_WIDTHS.split(), 2**17), **dict.fromkeys(_DEPTHS.split(), BLOCKS),
         "num_train_timesteps": 2**16, "relative_attention_max_distance": 2**20,
         "relative_attention_num_buckets": 2**10, "vocab_size": 2**20}
_MOST_FROM_0 = {"depth": 256, "low_channels": 2**10, "steps_offset": 2**10,
                "transformer_layers_per_block": 256}
_FLAGS = ("clip_sample", "force_zeros_for_empty_prompt", "linear_projection",
          "mid_block_only_cross_attention", "norm_text", "only_cross_attention", "rescale_betas_zero_snr",
          "resnet_skip_time_act", "scale_shift", "set_alpha_to_one", "skip_time_act", "thresholding",
          "upcast_attention", "use_linear_projection", "guidance_embeds", "use_dynamic_shifting",
          "use_quant_conv", "use_post_quant_conv")
_FINITE = ("beta_end", "beta_start", "dynamic_thresholding_ratio", "layer_norm_epsilon",
           "mid_block_scale_factor", "mid_scale", "out_scale", "resnet_out_scale_factor", "sample_max_value",
           "scaling_factor", "shift_factor", "shift", "base_shift", "max_shift")


# diffusers' DPM-Solvers write this default of theirs, which is no JSON
_UNBOUNDED = re.compile(r'("lambda_min_clipped"\s*:\s*)-Infinity')


def read_json(path: Path) -> dict[str, Any]:
    """Reads a config and checks its sizes. Raises CheckpointError."""
    config = parsed(path)
    check_sizes(path, config)
    return config


def parsed(path: Path) -> dict[str, Any]:
    """Reads a file of one JSON object. Raises CheckpointError."""
    try:
        config = parse_json(_UNBOUNDED.sub(r"\1null", read_text(path)))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the folder is not complete.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds {kind_of(config)}, not the fields of a config.")
    return config


def read_settings(path: Path) -> dict[str, str]:
    """The "key: value" lines of a YAML file. Raises CheckpointError."""
    try:
        return parse_settings(read_text(path, 2**20, errors="replace"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from None


def told_prediction(config: Path) -> str | None:
    """What a YAML file beside a model says that it predicts: by CompVis' ldm, or Stability's sgm. Raises
    CheckpointError."""
    name = read_settings(config).get("parameterization")
    scaling = _SCALING.search(read_text(config, 2**20, errors="replace"))
    if name or scaling is None:
        return name
    if scaling[1] not in SCALINGS:
        raise CheckpointError(f"{config}: {scaling[1]}; models that predict by EpsScaling or VScaling are "
                              "supported.")
    return SCALINGS[scaling[1]]


def check_sizes(path: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError that names the field."""
    for name, value in config.items():
        least, most = (0, _MOST_FROM_0[name]) if name in _MOST_FROM_0 else (1, _MOST.get(name))
        wanted = None
        if most is not None and not _whole(value, least, most):
            wanted = f"a whole number from {least} to {most:,}, or a list of 1 to {LEVELS} of them"
        if name in _FINITE and (type(value) not in (int, float) or not math.isfinite(value)):
            wanted = "a finite number"
        # one for each level
        flags = value if name == "only_cross_attention" and isinstance(value, list) else [value]
        if name in _FLAGS and not all(isinstance(flag, bool) or flag is None for flag in flags):
            raise CheckpointError(f"{path}: {name} = {fields.short(value)}; expected true or false.")
        if wanted and value is not None:
            raise CheckpointError(f"{path}: no network has the sizes that it names: {name} = "
                                  f"{fields.short(value)}; expected {wanted}.")


def check_given(path: Path, config: dict[str, Any], *names: str) -> None:
    """Raises CheckpointError for sizes that are null; absent ones have defaults."""
    if null := [name for name in names if name in config and config[name] is None]:
        raise CheckpointError(f"{path}: {', '.join(null)}: null, where a size is expected.")


def per_level(path: Path, name: str, value: Any, levels: int) -> tuple[Any, ...]:
    """Expands a field with one value for all levels of a network, or a list of one for each. Raises
    CheckpointError."""
    if isinstance(value, (list, tuple)) and len(value) != levels:
        raise CheckpointError(f"{path}: {name} = {fields.short(value)}; one for each of {levels} levels is "
                              "expected.")
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def _whole(value: Any, least: int, most: int) -> bool:
    values = value if isinstance(value, list) else [value]
    # of blocks, in a level
    values = [v for each in values[:LEVELS + 1] for v in (each if isinstance(each, list) else [each])]
    return 0 < len(values) <= LEVELS and all(type(v) is int and least <= v <= most for v in values)


def check_blocks(found: int, name: str) -> int:
    """The number of a network's numbered blocks. Raises CheckpointError where that is no network's."""
    if found > BLOCKS:
        raise CheckpointError(f"{found:,} blocks {name}N: no network has more than a few dozen.")
    return found


def check_bill(path: Path, config: UNetConfig | MMDiTConfig | VAEConfig | TextConfig, tensors: int) -> None:
    """Raises CheckpointError where a network of this config has more blocks than its file has tensors: it
    would be built, layer by layer, before its names could be compared."""
    if isinstance(config, UNetConfig):
        blocks = sum(n * (1 + depth) for n, depth in zip(config.layers, config.depth))
    elif isinstance(config, MMDiTConfig):
        blocks = config.double + config.single
    elif isinstance(config, VAEConfig):
        blocks = config.layers_per_block * len(config.channels)
    else:
        blocks = config.layers
    if blocks > tensors:
        raise CheckpointError(f"{path}: its config asks for {blocks:,} blocks, but the file holds "
                              f"{tensors:,} tensors.")

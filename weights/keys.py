"""Tables of names: from the modules' own (diffusers' for UNet and autoencoder, open_clip's for text) to those
in files.

Each `*_sources` function lists, for every tensor of a module, where it comes from in a file of some naming. A
mapping is complete by construction; the loader checks the rest, and `p2p.weights.convert` runs the same
tables the other way.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from p2p.models.unet import UNetConfig
from p2p.models.vae import VAEConfig

# Prefixes in single files (LDM; SDXL and late SD 2 files by Stability's "sgm" code).
UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
TEXT_SD1, TEXT_SD2 = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
TEXT_SDXL = ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model.")
TEXT_SGM2 = "conditioner.embedders.0.model."

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
           "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_UNET_ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
              "time_embedding.linear_2": "time_embed.2", "time_embedding.cond_proj": "time_embed.cond_proj",
              "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
              "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
              "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# diffusers before 0.17
_VAE_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_CLIP_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
               "attn.out_proj": "self_attn.out_proj"}


class Source(NamedTuple):
    """File keys whose tensors, joined along dimension 0 and perhaps transposed, make one parameter."""

    keys: tuple[str, ...]
    transposed: bool = False
    # (k, n, d): rows come in chunks of d for n parameters in turn; those of the k-th
    share: tuple[int, int, int] = (0, 1, 1)
    rows: tuple[int, ...] = ()   # of each key, where they are not equally many
    swapped: bool = False        # the halves of dimension 0 stand the other way round


def _replace(name: str, prefixes: dict[str, str]) -> str:
    """`name` with the longest prefix found in the table replaced; only whole dotted parts count."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:n])) in prefixes:
            return prefixes[prefix] + name[len(prefix):]
    raise KeyError(name)


def unet_prefixes(config: UNetConfig) -> dict[str, str]:
    """Module -> LDM module, for every leaf module or transformer of the UNet."""
    table = dict(_UNET_ENDS)
    last, n = len(config.channels) - 1, 1
    for i in range(last + 1):
        for j in range(config.layers[i]):
            table[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        if i < last:
            table[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{n}.0"
            table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i in range(last + 1):
        attention = config.up_attention[last - i]
        for j in range(config.layers[last - i] + 1):
            table[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        if i < last:
            table[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{n - 1}.{2 if attention else 1}"
            table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{2 if attention else 1}.conv"
    resnets = [k for k in table if ".resnets." in k or k.endswith("samplers.0")]
    for k in resnets:
        table |= {f"{k}.{part}": f"{table[k]}.{ldm}" for part, ldm in _RESNET.items()}
    return table


_IF_ENDS = {"class_embedding.linear_1": "aug_proj.0", "class_embedding.linear_2": "aug_proj.2",
            "encoder_hid_proj": "encoder_proj", "add_embedding.norm1": "encoder_pooling.0",
            "add_embedding.pool": "encoder_pooling.1", "add_embedding.proj": "encoder_pooling.2",
            "add_embedding.norm2": "encoder_pooling.3"}
_IF_ATTENTION = {"group_norm": "norm", "norm_cross": "norm_encoder", "to_out.0": "proj_out"}
_IF_SHARES = {"to_q": ("qkv", 0, 3), "to_k": ("qkv", 1, 3), "to_v": ("qkv", 2, 3),
              "add_k_proj": ("encoder_kv", 0, 2), "add_v_proj": ("encoder_kv", 1, 2)}


def deepfloyd_sources(names: Iterable[str], config: UNetConfig) -> dict[str, Source]:
    """DeepFloyd IF's own naming: that of LDM, but queries, keys and values lie in one tensor, head by
    head."""
    table, out, names = unet_prefixes(config) | _IF_ENDS, {}, list(names)
    head_dim = config.channels[-1] // config.heads[-1]
    for name in names:
        head, attention, tail = name.partition(".attentions.")
        if not attention:
            out[name] = Source((_replace(name, table),))
            continue
        j, _, tail = tail.partition(".")
        module, _, end = tail.rpartition(".")
        where = table[f"{head}.attentions.{j}"]
        if module in _IF_ATTENTION:
            out[name] = Source((f"{where}.{_IF_ATTENTION[module]}.{end}",))
        else:
            joined, k, n = _IF_SHARES[module]
            # text only: q only
            n = n if f"{head}.attentions.{j}.to_k.weight" in names or joined != "qkv" else 1
            out[name] = Source((f"{where}.{joined}.{end}",), share=(k, n, head_dim))
    return out


def vae_prefixes(config: VAEConfig) -> dict[str, str]:
    """Module -> LDM module for the autoencoder; LDM counts the decoder's levels from full resolution."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    last = len(config.channels) - 1
    for side, level, part in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        table |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_norm_out": f"{side}.norm_out",
                  f"{side}.conv_out": f"{side}.conv_out"}
        for i in range(last + 1):
            ldm = f"{side}.{level}.{i if side == 'encoder' else last - i}"
            for j in range(config.layers_per_block + (side == "decoder")):
                resnet, block = f"{side}.{level}_blocks.{i}.resnets.{j}", f"{ldm}.block.{j}"
                table |= {resnet: block, f"{resnet}.conv_shortcut": f"{block}.nin_shortcut"}
            table[f"{side}.{level}_blocks.{i}.{part}rs.0.conv"] = f"{ldm}.{part}.conv"
        for j in range(2):
            table[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        table |= {f"{side}.mid_block.attentions.0.{ours}": f"{side}.mid.attn_1.{ldm}"
                  for ours, ldm in _VAE_ATTENTION.items()}
    return table


def hf_sources(names: Iterable[str]) -> dict[str, Source]:
    """open_clip's TextTransformer <- transformers' CLIPTextModel, which keeps q, k and v apart. No
    `text_model.` prefix."""
    ends = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    out = {}
    for name in names:
        if name == "positional_embedding":
            out[name] = Source(("embeddings.position_embedding.weight",))
        elif name == "text_projection":
            out[name] = Source(("text_projection.weight",), transposed=True)
        elif not name.startswith("transformer.resblocks."):
            out[name] = Source((_replace(name, ends),))
        else:
            _, _, layer, tail = name.split(".", 3)
            layer = f"encoder.layers.{layer}."
            if tail.startswith("attn.in_proj_"):
                kind = tail.removeprefix("attn.in_proj_")
                out[name] = Source(tuple(f"{layer}self_attn.{p}_proj.{kind}" for p in "qkv"))
            else:
                out[name] = Source((layer + _replace(tail, _CLIP_LAYER),))
    return out


def ldm_sources(names: Iterable[str], prefixes: dict[str, str]) -> dict[str, Source]:
    return {name: Source((_replace(name, prefixes),)) for name in names}


def same_sources(names: Iterable[str]) -> dict[str, Source]:
    return {name: Source((name,)) for name in names}


def old_vae_sources(names: Iterable[str]) -> dict[str, Source]:
    """The autoencoder in folders saved by diffusers before 0.17."""
    out = {}
    for name in names:
        head, attention, tail = name.partition(".attentions.0.")
        if attention and not tail.startswith("group_norm"):
            tail = _replace(tail, _VAE_OLD)
        out[name] = Source((head + attention + tail,))
    return out

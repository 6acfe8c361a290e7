"""Names and sizes of MM-DiT transformers: the original checkpoints' names, which the modules have, and
those of diffusers' folders.

diffusers splits what the originals hold in one tensor (queries, keys and values; in FLUX's single blocks the
feed-forward too), and scales before it shifts where a modulation has no gates.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from p2p.models.mmdit import FLUX_DEV, MMDiTConfig
from p2p.weights.errors import CheckpointError
from p2p.weights.keys import UNET, Source
from p2p.weights.sizes import check_blocks

Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDERS = "time_text_embed.{}_embedder.linear_{}"
_SD3_ENDS = {
    "pos_embed": "pos_embed.pos_embed", "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    **{f"{ours}_embedder.mlp.{2 * i}": _EMBEDDERS.format(theirs, i + 1)
       for ours, theirs in (("t", "timestep"), ("y", "text")) for i in range(2)},
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SD3_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear", "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v", "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v", "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
}
_FLUX_ENDS = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    **{f"{ours}_in.{layer}_layer": _EMBEDDERS.format(theirs, i)
       for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
       for i, layer in enumerate(("in", "out"), 1)},
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v", "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp", "linear2": "proj_out",
    "norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight",
}


def prefix(names: Iterable[str]) -> str | None:
    """What stands before the names of a transformer's tensors in a single file; None where there is none."""
    blocks = ("joint_blocks.", "double_blocks.")
    names = [name for name in names if name.startswith((*blocks, *(UNET + b for b in blocks)))]
    return None if not names else UNET if names[0].startswith(UNET) else ""


def _count(names: Iterable[str], blocks: str) -> int:
    found = {name.split(".")[1] for name in names if name.startswith(f"{blocks}.")}
    return check_blocks(len(found), f"{blocks}.")


def diffusers_names(flux: bool, double: int, single: int = 0) -> dict[str, tuple[str, ...]]:
    """Module or tensor here -> those in a diffusers folder whose rows it holds, for that many blocks."""
    blocks = [("double_blocks", "transformer_blocks", double, _FLUX_DOUBLE),
              ("single_blocks", "single_transformer_blocks", single, _FLUX_SINGLE)]
    if not flux:
        blocks = [("joint_blocks", "transformer_blocks", double, _SD3_BLOCK)]
    table = {ours: (theirs,) for ours, theirs in (_FLUX_ENDS if flux else _SD3_ENDS).items()}
    for ours, theirs, n, names in blocks:
        for i in range(n):
            table |= {f"{ours}.{i}.{name}": tuple(f"{theirs}.{i}.{of}" for of in others.split())
                      for name, others in names.items()}
    return table


def diffusers_sources(names: Iterable[str], config: MMDiTConfig) -> dict[str, Source]:
    """The transformer in a diffusers folder."""
    table, out = diffusers_names(config.axes is not None, config.double, config.single), {}
    no_gates = ("final_layer.", f"joint_blocks.{config.double - 1}.context_block.")
    for name in names:
        module, _, end = name.rpartition(".")
        keys = table[name] if name in table else tuple(f"{theirs}.{end}" for theirs in table[module])
        rows = (config.dim,) * 3 + (config.mlp * config.dim,) if module.endswith(".linear1") else ()
        out[name] = Source(keys, rows=rows, swapped=name.startswith(no_gates) and ".adaLN" in f".{module}")
    return out


# ---------------------------------------------------------------------------------------------------- sizes

def transformer_config(where: object, shapes: Shapes, axes: tuple[int, ...] = ()) -> MMDiTConfig:
    """Sizes from shapes, under the original names. Where no norm tells the width of a head it is 64. axes: of
    FLUX, if they are not the usual ones. Raises CheckpointError, which says where."""
    try:
        return _flux_config(shapes, axes) if _count(shapes, "double_blocks") else _sd3_config(shapes)
    except KeyError as missing:
        raise CheckpointError(f"{where}: {missing.args[0]} is missing; the transformer is not whole."
                              ) from None
    except (ArithmeticError, IndexError, ValueError) as error:
        raise CheckpointError(f"{where}: no transformer has the shapes that it holds ({error}). Is it "
                              "damaged?") from None


def _sd3_config(shapes: Shapes) -> MMDiTConfig:
    dim, channels, patch, _ = shapes["x_embedder.proj.weight"]
    first, n = "joint_blocks.0.x_block.", _count(shapes, "joint_blocks")
    norm = shapes.get(f"{first}attn.ln_q.weight")
    return MMDiTConfig(
        in_channels=channels, out_channels=shapes["final_layer.linear.weight"][0] // patch**2, patch=patch,
        dim=dim, heads=max(1, dim // norm[0]) if norm else usual_heads(dim), double=n,
        mlp=shapes[f"{first}mlp.fc1.weight"][0] // dim, context_dim=shapes["context_embedder.weight"][1],
        vector_dim=shapes["y_embedder.mlp.0.weight"][1],
        qk_norm=norm is not None, table=math.isqrt(shapes["pos_embed"][1]),
        dual=tuple(i for i in range(n) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes))


def usual_heads(dim: int) -> int:
    return max(1, dim // 64)


def usual_axes(head_dim: int) -> tuple[int, int, int] | None:
    """FLUX.1's shares of a head; None where they are not whole."""
    return None if head_dim % 32 else (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)


def _flux_config(shapes: Shapes, axes: tuple[int, ...]) -> MMDiTConfig:
    dim, inputs = shapes["img_in.weight"]
    first, patch = "double_blocks.0.img_", FLUX_DEV.patch
    head_dim = shapes[f"{first}attn.norm.query_norm.scale"][0]
    if len(axes := axes or usual_axes(head_dim) or ()) != 3:
        raise ValueError(f"heads of {head_dim} channels, not a multiple of 32")
    return MMDiTConfig(
        in_channels=inputs // patch**2, out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        patch=patch, dim=dim, heads=dim // head_dim, double=_count(shapes, "double_blocks"),
        single=_count(shapes, "single_blocks"), mlp=shapes[f"{first}mlp.0.weight"][0] // dim,
        context_dim=shapes["txt_in.weight"][1], vector_dim=shapes["vector_in.in_layer.weight"][1],
        qk_norm=True, axes=(axes[0], axes[1], axes[2]),
        guidance="guidance_in.in_layer.weight" in shapes)

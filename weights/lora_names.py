"""Names in LoRA and its kin: which tensor of which layer a key is, and where a model has that layer's
weights.

A key has two halves. Its end says what it holds, as kohya, diffusers, PEFT or LyCORIS write it. What stands
before is the layer: looked up among all names that the model's layers have in the namings known here, since
"_" may stand for "." and cannot be turned back.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from p2p.models.text import TextConfig, TextEncoder
from p2p.models.unet import UNet
from p2p.weights import keys
from p2p.weights.detect import LDM, Package, Part
from p2p.weights.fill import built
from p2p.weights.keys import Source

Shape = tuple[int, ...]

# ----------------------------------------------------------------------------------------------- ends of keys

_ADAPTER = r"(?:\.default(?:_\d+)?)?"   # PEFT's name of the adapter, where it was not taken off
_OTHERS = r"dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff|diff_b|w_norm|b_norm"
_ENDS = tuple((re.compile(rf"(.+){end}"), role) for end, role in (
    (r"(?:[._]lora|\.lora_linear_layer)\.(down|up)\.weight", r"\2"),     # diffusers, before PEFT
    (r"\.lora_(down|up|mid)\.weight", r"\2"),                            # kohya, LyCORIS
    (rf"\.lora_A{_ADAPTER}\.weight", "down"),                            # PEFT
    (rf"\.lora_B{_ADAPTER}\.weight", "up"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    (r"(?:[._]lora|\.lora_linear_layer)?\.alpha", "alpha"),
    (rf"\.({_OTHERS})", r"\2")))                                         # LyCORIS


def parsed(key: str) -> tuple[str, str] | None:
    """A key's layer and its role (see `p2p.weights.deltas.WHOLE`); None for one of another kind of file."""
    for pattern, role in _ENDS:
        if found := pattern.fullmatch(key):
            return found[1], found.expand(role)
    return None


# -------------------------------------------------------------------------------------------- names of layers

class Place(NamedTuple):
    """A layer of a model: where its weight and bias are, or the k-th of n shares of their rows."""

    part: int                        # 0: the UNet, then the text towers
    path: str                        # the layer, as diffusers and transformers name it
    names: dict[str, str]            # "weight", "bias" -> the tensor's name in the module
    share: tuple[int, int] = (0, 1)
    transposed: bool = False


Places = dict[str, Place]
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")   # diffusers' names of the parts
# What stands before the layers' names, in diffusers' naming, in that of single files, and with "_" in either.
_UNET = ("unet.", "", "base_model.model.", "unet.base_model.model.")
_UNET_LDM = ("diffusion_model.", "model.diffusion_model.", "")
_UNET_JOINED = ("lora_unet_", "lycoris_")
_COMFY = {"sd1": ("clip_l",), "sd2": ("clip_h",), "sdxl": ("clip_l", "clip_g")}   # ComfyUI's towers


def layers(package: Package) -> tuple[Places, list[dict[str, Shape]]]:
    """Every name that an add-on may have for a layer of the model; and the shapes of each part's tensors."""
    shapes = [_shapes(part) for part in (package.unet, *package.text)]
    out: Places = {}
    own = _places(0, keys.same_sources(shapes[0]))
    _add(out, own, _UNET, _UNET_JOINED)
    if package.family in LDM:
        ldm = _places(0, keys.ldm_sources(shapes[0], keys.unet_prefixes(package.unet.config)))
        _add(out, _with_paths_of(own, ldm), _UNET_LDM, _UNET_JOINED)
    for i, tower in enumerate(([name for name in s if name != "vocab"] for s in shapes[1:]), 1):
        dotted, joined = _text_prefixes(package, i)
        hf = _places(i, keys.hf_sources(tower)).items()
        _add(out, {start + layer: place._replace(path=f"text_model.{layer}") for layer, place in hf
                   for start in ("text_model.", "")}, dotted, joined)
        fused = {name: Source((name.replace("in_proj_", "in_proj."),)) for name in tower}
        _add(out, _places(i, fused), (), joined)   # open_clip's own names
    return out, shapes


def _text_prefixes(package: Package, i: int) -> tuple[list[str], tuple[str, ...]]:
    """Of the i-th text tower: what stands before its layers' names, and before those with "_"."""
    dotted = [f"{COMPONENTS[i]}."]
    for name in _COMFY.get(package.family, ())[i - 1:i]:
        dotted += [f"{name}.transformer.", f"text_encoders.{name}.transformer."]
    if len(package.text) > 1:
        return dotted, (f"lora_te{i}_",)
    return [*dotted, "base_model.model.", ""], ("lora_te_", "lora_te1_")


def _shapes(part: Part) -> dict[str, Shape]:
    """Of a module's tensors; of a text tower's also those that its file holds and the model does not read."""
    config = part.config
    if isinstance(config, TextConfig):
        layer = ("encoder.layers.", "transformer.resblocks.")
        idle = sum(name.startswith(layer) for name in part.ignored)
        part = replace(part, config=replace(config, layers=config.layers + idle, final_norm=True))
    with torch.device("meta"):
        module = built(part, TextEncoder if isinstance(config, TextConfig) else UNet)
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def _places(part: int, sources: Mapping[str, Source]) -> Places:
    """Layers by their names in the naming of the sources."""
    out: Places = {}
    for name, source in sources.items():
        for k, key in enumerate(source.keys):
            layer, _, end = key.rpartition(".")
            place = out.setdefault(layer, Place(part, layer, {}, (k, len(source.keys)), source.transposed))
            place.names[end] = name
    return out


def _with_paths_of(own: Places, other: Places) -> Places:
    paths = {name: path for path, place in own.items() for name in place.names.values()}
    return {layer: p._replace(path=paths[next(iter(p.names.values()))]) for layer, p in other.items()}


def _add(out: Places, places: Places, dotted: Iterable[str], joined: Iterable[str]) -> None:
    for layer, place in places.items():
        for name in (layer, *_older(layer)):
            out.update({prefix + name: place for prefix in dotted})
        out.update({prefix + layer.replace(".", "_"): place for prefix in joined})


def _older(layer: str) -> Iterator[str]:
    """What diffusers before PEFT calls a layer of an attention: by its processor's names."""
    attention, _, projection = layer.removesuffix(".0").rpartition(".")
    projection = f"to_{projection.removesuffix('_proj')}" if projection.endswith("_proj") else projection
    if projection in ("to_q", "to_k", "to_v", "to_out"):
        yield f"{attention}.{projection}"
        yield f"{attention}.processor.{projection}"


# --------------------------------------------------------------------------------------------------- families

# Parts of names that only some families have: where attention lies, how deep it is, which towers are there.
_ONLY = tuple((re.compile(pattern), set(only)) for pattern, only in (
    (r"lora_te[12]_|text_encoder_2\.|clip_g\.|add_embedding|label_emb", ("sdxl",)),
    (r"transformer_blocks[._][1-9]", ("sdxl",)),
    (r"down_blocks[._]0[._]attentions|input_blocks[._][12][._]1[._]", ("sd1", "sd2")),
    (r"lora_te_", ("sd1", "sd2"))))
CONTEXT = re.compile(r"attn2[._](?:processor[._])?to_[kv]")              # the layers that read the text
_CONTEXT = {768: ("sd1",), 1024: ("sd2",), 2048: ("sdxl",)}              # its width there,
_TOWERS = {768: ("sd1", "sdxl"), 1024: ("sd2",), 1280: ("sdxl",)}        # and in a text tower


def families(names: Iterable[str], widths: Mapping[str, int], projections: Iterable[Shape]) -> list[str]:
    """The families that an add-on may be made for, by its layers' names and by shapes.

    widths: the input widths of layers. projections: the shapes of LoRA's first factors at the ends of a
    transformer.
    """
    found, text = set(LDM), "\n".join(names)
    for pattern, only in _ONLY:
        found &= only if pattern.search(text) else found
    for layer, width in widths.items():
        table = _CONTEXT if CONTEXT.search(layer) else _TOWERS if "self_attn" in layer else {}
        found &= set(table.get(width, LDM))
    for shape in projections:
        found &= {"sd1"} if len(shape) == 4 else {"sd2", "sdxl"}
    return [family for family in LDM if family in found]

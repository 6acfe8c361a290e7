"""diffusers pipelines in memory, recognised by the names of their classes and attributes: diffusers is not
imported.

Their components write their configs to a temporary folder, where `p2p.weights.folder` and
`p2p.weights.mmdit` read them as of any model. The tensors stay where they are; the model's are the same
memory, see `p2p.weights.fill`.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from p2p.weights import mmdit, t5
from p2p.weights.detect import Package, Part
from p2p.weights.errors import CheckpointError
from p2p.weights.fields import listed, short
from p2p.weights.files import TensorFile
from p2p.weights.folder import find_folder
from p2p.weights.sizes import parsed

# Classes of the same parts, by that of the text-to-image pipeline, whose folders are known.
KINDS = {f"{base}{variant}Pipeline": f"{base}Pipeline"
         for base in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
         for variant in ("", "Img2Img", "Inpaint")}
TOWERS = ("", "_2", "_3")   # the ends of the names of text encoders and tokenizers
NETWORKS = ("unet", "transformer", *(f"text_encoder{tower}" for tower in TOWERS), "vae")
# Ways to compute the same attention; others change it.
PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "SlicedAttnProcessor",
              "XFormersAttnProcessor", "XLAFlashAttnProcessor2_0", "JointAttnProcessor2_0",
              "XFormersJointAttnProcessor", "FluxAttnProcessor", "FluxAttnProcessor2_0"}
# diffusers' hooks that change where weights lie, or how they are stored, not what is computed
HOOKS = {"group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "layerwise_casting"}
JOINED = (".to_qkv", ".to_kv", ".to_added_qkv")   # copies, unread where the projections were parted again
KNOWN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MemoryFile(TensorFile):
    """The tensors of a network in memory, themselves: nothing is copied."""

    shared = True

    def __init__(self, path: Path, tensors: dict[str, Tensor]):
        self.path, self.metadata, self._tensors = path, {}, tensors
        self.shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self.dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}

    @property
    def files(self) -> list[Path]:
        return []

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]


def is_pipeline(source: object) -> bool:
    return any(c.__name__ == "DiffusionPipeline" for c in type(source).__mro__)


def place_of(pipe: Any) -> Path:
    """What stands for its path in messages."""
    return Path(f"{type(pipe).__name__} in memory")


def name_of(source: Any) -> str:
    """What a model was loaded from, as far as a pipeline says; else its class."""
    if not is_pipeline(source):
        return str(source)
    name = source.config.get("_name_or_path")
    return str(name) if name and isinstance(name, (str, Path)) else type(source).__name__


def device_of(pipe: Any) -> torch.device:
    """Where its network's weights lie; the CPU where they lie nowhere."""
    networks = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    found = {p.device for network in networks if isinstance(network, nn.Module) for p in network.parameters()
             if not p.is_meta}
    return min(found, key=str, default=torch.device("cpu"))


def find_pipeline(where: Path, pipe: Any, replacement: tuple[Part, float | None] | None = None) -> Package:
    """Recognises a pipeline as if it were the folder that it would be saved to. where: see `place_of`.
    replacement: see `find_vae`. Raises CheckpointError."""
    name = type(pipe).__name__
    if (kind := KINDS.get(name)) is None:
        raise CheckpointError(f"{where}: not supported; supported: {', '.join(KINDS)}. Use the text-to-image "
                              "pipeline of its family.")
    flow = kind in mmdit.PIPELINES
    # the text of flows may come from elsewhere, see `p2p.weights.texts`
    towers = [t for t in TOWERS if getattr(pipe, f"text_encoder{t}", None) is not None] if flow else \
        ["", "_2"] if kind == "StableDiffusionXLPipeline" else [""]
    needed = [part + tower for part in ("text_encoder", "tokenizer") for tower in towers]
    needed += ["transformer" if flow else "unet", "scheduler", *(["vae"] if replacement is None else [])]
    if absent := [part for part in needed if getattr(pipe, part, None) is None]:
        raise CheckpointError(f"{where}: it has no {', no '.join(absent)}; load the whole pipeline, or set "
                              f"pipe.{absent[0]}.")
    networks = {part: _network(where, part, module) for part in NETWORKS
                if (module := getattr(pipe, part, None)) is not None}
    with TemporaryDirectory() as temporary:
        # by its name some are told apart
        folder = Path(temporary) / (re.sub(r"[^\w.-]+", " ", mmdit.named(Path(name_of(pipe))))[:200] or name)
        try:
            _save_configs(pipe, kind, folder)
            find = mmdit.find_folder if flow else find_folder
            package = find(folder, kind, replacement, opened=lambda path, notes: networks[path.name])
            if package.t5 is not None:
                package.tokenizer = t5.tokenizer_of(package.t5, folder, mmdit.T5[package.family])
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), str(where))) from None
    package.where, package.configs, package.pipeline = where, [], name
    package.notes = [note.replace("the folder's", "the pipeline's") for note in package.notes]
    package.notes += _not_taken_over(pipe)
    return package


def _save_configs(pipe: Any, kind: str, folder: Path) -> None:
    """As `save_pretrained` writes them, the weights apart."""
    pipe.save_config(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(parsed(index) | {"_class_name": kind}), encoding="utf-8")
    for part in ("unet", "transformer", "vae", "scheduler"):
        if (component := getattr(pipe, part, None)) is not None:
            component.save_config(folder / part)
    for tower in TOWERS:
        if getattr(pipe, f"text_encoder{tower}", None) is not None:
            getattr(pipe, f"text_encoder{tower}").config.save_pretrained(folder / f"text_encoder{tower}")
            getattr(pipe, f"tokenizer{tower}").save_pretrained(folder / f"tokenizer{tower}")


def _network(where: Path, part: str, module: nn.Module) -> MemoryFile:
    """Raises CheckpointError for a network of which weights and config do not say all that it does."""
    module = getattr(module, "_orig_mod", module)   # by torch.compile
    tensors = dict(_tensors(where / part, module))
    file = MemoryFile(where / part, tensors)
    _check_attention(file.path, part, module)
    if unknown := sorted(_hooks(module) - HOOKS):
        raise CheckpointError(f"{file.path}: a hook, {short(unknown[0])}, which is not known here, may "
                              f"change what it computes; call pipe.{part}.disable_cache() if it is of a "
                              "cache, else load the pipeline anew.")
    if any(getattr(block, "s1", None) is not None for block in getattr(module, "up_blocks", ())):
        raise CheckpointError(f"{file.path}: FreeU is on, which this project does not have; call "
                              "pipe.disable_freeu().")
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{file.path}: {key} is not in memory (sequential offload?). Call "
                                  "pipe.remove_all_hooks(), or load its folder.")
        if tensor.dtype not in KNOWN:
            raise CheckpointError(f"{file.path}: {key} is stored as {file.dtypes[key]}; supported: "
                                  f"{', '.join(str(d).removeprefix('torch.') for d in KNOWN)}.")
    return file


def _check_attention(path: Path, part: str, module: nn.Module) -> None:
    """Raises CheckpointError where it is not computed as the weights and config say."""
    ways = {type(p).__name__ for p in getattr(module, "attn_processors", {}).values()}
    # FLUX's one way reads the projections joined or not; the others leave them behind when they are parted
    if any(way.startswith("Flux") for way in ways) \
            and any(getattr(layer, "fused_projections", False) for layer in module.modules()):
        ways = {"FusedFluxAttnProcessor"}
    for way in sorted(ways - PROCESSORS):
        undo = "load the pipeline anew, without it"
        if "Fused" in way:
            undo = f"call pipe.{'transformer.' if part == 'transformer' else ''}unfuse_qkv_projections()"
        elif "IPAdapter" in way:
            undo = "call pipe.unload_ip_adapter()"
        elif part == "unet":
            undo = "call pipe.unet.set_default_attn_processor()"
        raise CheckpointError(f"{path}: its attention is computed by {short(way)}, which is not known here "
                              f"and may change the pictures; {undo}.")


def _hooks(module: nn.Module) -> set[str]:
    """The names of diffusers' hooks on any layer."""
    registries = (getattr(layer, "_diffusers_hook", None) for layer in module.modules())
    return {name for registry in registries for name in getattr(registry, "hooks", ())}


def _tensors(where: Path, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network by their names without PEFT, whose layers may stand around a weight that they
    are merged into. Raises CheckpointError where they are not."""
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "base_layer")}
    adapted = tuple(f"{name}." for name in layers)
    # of an adapter that is merged, or disabled, the weight holds all that it does
    loose = [name for name, layer in layers.items()
             if getattr(layer, "merged", False) == getattr(layer, "disable_adapters", False)]
    loose += [key for key in module.state_dict() if ".lora_" in key and not key.startswith(adapted)]
    if loose:
        raise CheckpointError(f"{where}: holds a LoRA that is not fused into its weights "
                              f"({listed('layers', loose, 1)}). Call pipe.enable_lora() and "
                              "pipe.fuse_lora(), or pipe.unload_lora_weights() to do without it.")
    for key, tensor in module.state_dict().items():
        own = not key.startswith(adapted) or ".base_layer." in key
        if own and not key.rpartition(".")[0].endswith(JOINED):
            yield key.replace(".base_layer.", "."), tensor


def _not_taken_over(pipe: Any) -> Iterator[str]:
    """Notes on what a pipeline does beside its networks, which is not done here."""
    parts = [module for part in NETWORKS if isinstance(module := getattr(pipe, part, None), nn.Module)]
    if any(hasattr(module, "_hf_hook") or "group_offloading" in _hooks(module) for module in parts):
        yield (f"the pipeline's offload hooks are not used: its weights are read where they lie, on "
               f"{device_of(pipe)}; device and offload say otherwise")
    if getattr(pipe.vae, "use_tiling", False):
        yield "the pipeline's tiling of the autoencoder is not taken over: give tile, in latents"

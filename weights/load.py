"""Files -> modules. Sizes come from the tensors' shapes; names and shapes are checked before a tensor is read."""
from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.text import CLIP_L, TextConfig, TextEncoder
from models.text import EMOJI as EMOJI_TEXT
from models.unet import EMOJI as EMOJI_UNET
from models.unet import UNet, UNetConfig
from models.vae import AutoencoderKL, VAEConfig
from weights import keys
from weights.errors import CheckpointError
from weights.keys import Source

BUNDLED = Path(__file__).with_name("emoji") / "emoji.safetensors"
FAMILIES = ("sd1", "emoji")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What a Stable Diffusion 1 file may hold beside the parameters: the schedule's tables, averaged twins, old buffers.
_IGNORED = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "model_ema.", "logvar",
            keys.CLIP + "embeddings.position_ids", "first_stage_model.loss.")


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a text-to-image model, as loaded."""

    family: str
    file: Path
    unet: UNet
    text: TextEncoder
    vae: AutoencoderKL | None
    alphas_cumprod: Tensor   # (1000,) float64
    prediction: str          # "eps", "v" or "x0"


class TensorFile:
    """A .safetensors file: its header, and its tensors one at a time."""

    def __init__(self, path: Path):
        self.path = path
        _sniff(path)
        try:
            self._file = safe_open(path, framework="pt")
            self.shapes = {k: tuple(self._file.get_slice(k).get_shape()) for k in self._file.keys()}
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or cut short ({error}); {path.stat().st_size:,} bytes were found. "
                                  "Download or copy it again.") from None
        self.metadata = self._file.metadata() or {}

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)


def _sniff(path: Path) -> None:
    """Says what a file is that is no .safetensors file, by its first bytes."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file. Give a .safetensors file, or no --model for the bundled one.")
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder. Give the single .safetensors file of a Stable Diffusion 1 model.")
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    found = None
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        found = "a web page: the download failed, fetch the file itself"
    elif head.startswith(b"version https://git-lfs"):
        found = "a git-lfs pointer: run `git lfs pull` where it lies"
    elif head.startswith(b"PK\x03\x04"):
        found = "a zip archive, probably a PyTorch pickle (.ckpt): convert it to .safetensors first"
    elif head.startswith(b"\x80"):
        found = "a Python pickle (.ckpt): convert it to .safetensors first"
    elif len(head) < 9 or head[8:9] != b"{":
        found = f"not a .safetensors file ({path.stat().st_size:,} bytes, starting {head[:8]!r})"
    if found:
        raise CheckpointError(f"{path}: {found}.")


def load(source: str | Path = "emoji", family: str | None = None, prediction: str | None = None,
         device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Checkpoint:
    """Loads "emoji" (bundled) or a .safetensors file: Stable Diffusion 1 in LDM naming, or a trained emoji model.

    `dtype` None: float32 on a CPU, as stored elsewhere. Raises CheckpointError with what was found and what to do.
    """
    path = BUNDLED if str(source) == "emoji" and not Path(source).exists() else Path(source)
    if family is not None and family not in FAMILIES:
        raise CheckpointError(f"family {family!r} is not known; known: {', '.join(FAMILIES)}")
    if prediction not in (None, "eps", "v", "x0"):
        raise CheckpointError(f"prediction {prediction!r} is not known; known: eps, v, x0")
    file = TensorFile(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else None)
    found = "emoji" if file.metadata.get("format") == "p2p-emoji" else "sd1"
    if family and family != found and "emoji" in (family, found):
        raise CheckpointError(f"{path}: asked to be read as {family}, but it is a {found} file.")
    fill = _Filler(file, device, dtype)
    unet, text, vae = (_emoji if found == "emoji" else _sd1)(file, fill)
    abar = file["alphas_cumprod"].double() if "alphas_cumprod" in file.shapes else stable_diffusion_alphas_cumprod()
    return Checkpoint(found, path, unet, text, vae, abar,
                      prediction or file.metadata.get("prediction") or "eps")


def stable_diffusion_alphas_cumprod() -> Tensor:
    """scaled_linear betas, 0.00085 to 0.012 over 1000 steps.  -> (1000,) float64"""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)


class _Filler:
    """Builds a module without memory, checks it against the file's header, then puts the tensors in one by one."""

    def __init__(self, file: TensorFile, device: torch.device, dtype: torch.dtype | None):
        self.file, self.device, self.dtype = file, device, dtype

    def __call__(self, part: str, build: Callable[[], nn.Module], prefix: str,
                 sources: Callable[[list[str]], dict[str, Source]], ignored: tuple[str, ...] = ()) -> nn.Module:
        with torch.device("meta"):
            module = build()
        want = module.state_dict()
        plan = {name: Source(tuple(prefix + k for k in s.keys)) for name, s in sources(list(want)).items()}
        shapes, read = self.file.shapes, {k for s in plan.values() for k in s.keys}
        missing = sorted(read - shapes.keys())
        extra = sorted(k for k in shapes if k.startswith(prefix) and k not in read and not k.startswith(ignored))
        if missing or extra:
            raise CheckpointError(f"{self.file.path}: its {part} does not fit. "
                                  + "; ".join(_list(n, k) for n, k in (("missing", missing), ("unexpected", extra)) if k)
                                  + ". Is it a complete Stable Diffusion 1 checkpoint in LDM naming?")
        wrong = []
        for name, s in plan.items():
            parts = [shapes[k] for k in s.keys]
            shape = (sum(p[0] for p in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]
            if _squeezed(shape) != _squeezed(tuple(want[name].shape)):
                wrong.append(f"{s.keys[0]} is {list(shape)}, expected {list(want[name].shape)}")
        if wrong:
            raise CheckpointError(f"{self.file.path}: its {part} does not fit: {_list('shape', wrong)}")
        state = {}
        for name, s in plan.items():
            tensors = [self.file[k] for k in s.keys]
            tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            tensor = tensor.reshape(want[name].shape)
            if tensor.is_floating_point():
                if not tensor.isfinite().all():
                    raise CheckpointError(f"{self.file.path}: {s.keys[0]} holds values that are not finite.")
                tensor = tensor.to(self.dtype or tensor.dtype)
            state[name] = tensor.to(self.device)
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval().requires_grad_(False)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """1x1 convolutions and linear layers hold the same numbers; files mix them."""
    return shape[:2] if len(shape) > 2 and math.prod(shape[2:]) == 1 else shape


def _list(what: str, names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}: {', '.join(names[:most])}{more}"


# ---------------------------------------------------------------------------------------------- Stable Diffusion 1

def _sd1(file: TensorFile, fill: _Filler) -> tuple[UNet, TextEncoder, AutoencoderKL]:
    shapes = file.shapes
    anchors = {keys.UNET + "input_blocks.0.0.weight": "UNet", keys.VAE + "encoder.conv_in.weight": "autoencoder",
               keys.CLIP + "embeddings.token_embedding.weight": "CLIP text tower"}
    absent = [part for key, part in anchors.items() if key not in shapes]
    if absent:
        sample = ", ".join(list(shapes)[:3]) or "no tensors at all"
        raise CheckpointError(f"{file.path}: no {', no '.join(absent)} found under the names of a Stable Diffusion 1 "
                              f"file; it holds {len(shapes)} tensors ({sample} ...).")
    stray = [k for k in shapes if not k.startswith((keys.UNET, keys.VAE, keys.CLIP, *_IGNORED))]
    if stray:
        raise CheckpointError(f"{file.path}: {_list('unexpected', sorted(stray))}. "
                              "Only complete Stable Diffusion 1 files in LDM naming are read.")
    channels = shapes[keys.UNET + "input_blocks.0.0.weight"][1]
    if channels != 4:
        kind = {9: "an inpainting", 8: "an InstructPix2Pix", 5: "a depth or upscaling"}.get(channels, "an unknown")
        raise CheckpointError(f"{file.path}: {kind} model (its UNet takes {channels} channels, not 4); "
                              "use the text-to-image model that it was made from.")
    try:
        unet_config, vae_config, text_config = sd_unet_config(shapes), sd_vae_config(shapes), clip_config(shapes)
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{file.path}: 1 missing: {error.args[0]}. The file is not complete.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    if unet_config.context_dim != text_config.width:
        raise CheckpointError(f"{file.path}: the UNet takes text of width {unet_config.context_dim}, "
                              f"the text tower gives {text_config.width}; the file mixes two models.")
    unet = fill("UNet", lambda: UNet(unet_config), keys.UNET,
                lambda names: keys.ldm_sources(names, keys.unet_prefixes(unet_config)))
    vae = fill("autoencoder", lambda: AutoencoderKL(vae_config), keys.VAE,
               lambda names: keys.ldm_sources(names, keys.vae_prefixes(vae_config)), _IGNORED)
    text = fill("text tower", lambda: TextEncoder(text_config), keys.CLIP, keys.clip_sources, _IGNORED)
    return unet, text, vae


def _count(shapes, prefix: str) -> int:
    """How many numbered children a prefix has."""
    return len({k.removeprefix(prefix).split(".")[0] for k in shapes if k.startswith(prefix)})


def sd_unet_config(shapes: dict[str, tuple[int, ...]], heads: int = 8) -> UNetConfig:
    """Sizes of a UNet in LDM naming. Heads cannot be read off the shapes: 8 in Stable Diffusion 1."""
    p = keys.UNET + "input_blocks."
    levels: list[list[tuple[int, int]]] = [[]]                                   # (channels, transformer depth)
    context, linear = 0, False
    for n in range(1, _count(shapes, p)):
        if f"{p}{n}.0.op.weight" in shapes:
            levels.append([])
            continue
        if f"{p}{n}.0.out_layers.3.weight" not in shapes:
            raise CheckpointError(f"the UNet has no input block {n} of a known kind "
                                  f"({p}{n}.0.op or .out_layers.3 expected).")
        depth = _count(shapes, f"{p}{n}.1.transformer_blocks.")
        if depth:
            context = shapes[f"{p}{n}.1.transformer_blocks.0.attn2.to_k.weight"][1]
            linear = len(shapes[f"{p}{n}.1.proj_in.weight"]) == 2
        levels[-1].append((shapes[f"{p}{n}.0.out_layers.3.weight"][0], depth))
    kinds = tuple("cross" if blocks[0][1] else None for blocks in levels)
    return UNetConfig(
        in_channels=shapes[p + "0.0.weight"][1], out_channels=shapes[keys.UNET + "out.2.weight"][0],
        channels=tuple(blocks[0][0] for blocks in levels), layers_per_block=len(levels[0]), down_attention=kinds,
        mid_attention="cross", up_attention=kinds, depth=tuple(max(1, blocks[0][1]) for blocks in levels),
        heads=(heads,) * len(levels), context_dim=context, linear_projection=linear,
    )


def sd_vae_config(shapes: dict[str, tuple[int, ...]]) -> VAEConfig:
    p = keys.VAE + "encoder."
    return VAEConfig(
        in_channels=shapes[p + "conv_in.weight"][1], latent_channels=shapes[keys.VAE + "post_quant_conv.weight"][0],
        channels=tuple(shapes[f"{p}down.{i}.block.0.conv2.weight"][0] for i in range(_count(shapes, p + "down."))),
        layers_per_block=_count(shapes, p + "down.0.block."),
    )


def clip_config(shapes: dict[str, tuple[int, ...]]) -> TextConfig:
    vocab, width = shapes[keys.CLIP + "embeddings.token_embedding.weight"]
    if vocab != CLIP_L.vocab_size:
        raise CheckpointError(f"the text tower knows {vocab} tokens, CLIP has {CLIP_L.vocab_size}.")
    return TextConfig(width=width, heads=max(1, width // 64), layers=_count(shapes, keys.CLIP + "encoder.layers."),
                      context_length=shapes[keys.CLIP + "embeddings.position_embedding.weight"][0])


# ---------------------------------------------------------------------------------------------------- emoji

def _emoji(file: TensorFile, fill: _Filler) -> tuple[UNet, TextEncoder, None]:
    """Our own file: the modules' own names; the UNet's sizes in the metadata."""
    text_config = replace(EMOJI_TEXT, vocab_size=file.shapes.get("text.vocab", (0,))[0])
    unet_config = replace(EMOJI_UNET, **{k: tuple(v) if isinstance(v, list) else v
                                         for k, v in json.loads(file.metadata.get("unet", "{}")).items()})
    same = lambda names: {n: Source((n,)) for n in names}  # noqa: E731
    return (fill("UNet", lambda: UNet(unet_config), "unet.", same),
            fill("text tower", lambda: TextEncoder(text_config), "text.", same), None)

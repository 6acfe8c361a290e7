"""Files -> modules: names and shapes are checked before a tensor is read, then tensors are put in place one by one."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.layers import wide
from models.text import TextEncoder
from models.unet import UNet, UNetConfig
from models.vae import AutoencoderKL
from weights import deepfloyd, hub, keys
from weights.detect import FAMILIES, PREDICTIONS, Package, Part, find_in_file, ldm_vae_config, listed
from weights.errors import CheckpointError
from weights.files import open_file
from weights.folder import PIPELINES, find_folder, find_folder_vae, pipeline, weights_file
from weights.keys import Source
from weights.sizes import check_bill

EMOJI = Path(__file__).with_name("emoji")
T = TypeVar("T")
BUNDLED = {"emoji": EMOJI / "emoji.safetensors", "emoji-upscaler": EMOJI / "upscaler.safetensors"}


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a text-to-image model, as loaded, and what was found out about it."""

    package: Package
    unet: UNet
    text: list[nn.Module]
    vae: AutoencoderKL | None


def find(source: str | Path = "emoji", family: str | None = None, prediction: str | None = None,
         vae: str | Path | None = None) -> Package:
    """Recognises "emoji" and "emoji-upscaler" (bundled), a .safetensors or .ckpt file, a diffusers folder, or an "org/name" of
    the Hub (which is downloaded), without loading it.

    The other arguments overrule what is found. Raises CheckpointError.
    """
    if family is not None and family not in FAMILIES:
        raise CheckpointError(f"family {family!r} is not known; known: {', '.join(FAMILIES)}")
    if prediction is not None and prediction not in PREDICTIONS:
        raise CheckpointError(f"prediction {prediction!r} is not known; known: {', '.join(PREDICTIONS)}")
    path = Path(source)
    if not path.exists() and str(source) in BUNDLED:
        path = BUNDLED[str(source)]
    elif not path.exists() and hub.is_id(str(source)):
        path = hub.download(str(source))
    package = _found(path, _find)
    if family and family != package.family:
        raise CheckpointError(f"{path}: asked to be read as {family}, but it is a model of the family {package.family}.")
    if prediction:
        package.prediction, package.why = prediction, "as asked"
    elif package.prediction not in PREDICTIONS:
        raise CheckpointError(f"{path}: said to predict {package.prediction!r} (by {package.why}), which is not known; give "
                              f"prediction, one of {', '.join(PREDICTIONS)}.")
    if vae is not None and package.vae is None:
        raise CheckpointError(f"{path}: works on pixels and has no autoencoder that {vae} could replace; leave out vae.")
    if vae is not None:
        package.vae = _found(Path(vae), find_vae)
        package.notes.append(f"autoencoder from {vae}")
    return package


def _found(path: Path, find: Callable[[Path], T]) -> T:
    """What `find` recognises in a file or a folder; whatever it stumbles over names that path."""
    try:
        return find(path)
    except KeyError as error:
        raise CheckpointError(f"{path}: 1 missing: {error.args[0]}. It is not complete.") from None
    except (ArithmeticError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its sizes are those of no model known here ({error}). Is it damaged?") from None
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from None


def _find(path: Path) -> Package:
    if not path.is_dir():
        file = open_file(path)
        return deepfloyd.find_in_file(file) if deepfloyd.OWN in file.shapes else find_in_file(file)
    if (path / "config.yml").exists() and (path / "pytorch_model.bin").exists():
        return deepfloyd.find_own_folder(path)
    kind, notes = pipeline(path), []
    if kind in deepfloyd.PIPELINES:
        return deepfloyd.find_folder(path, notes)
    if kind in PIPELINES:
        return find_folder(path, kind, notes)
    known = ", ".join((*PIPELINES, *deepfloyd.PIPELINES))
    raise CheckpointError(f"{path}: a {kind}; supported: {known}. Use the text-to-image model of its family.")


def find_vae(path: Path) -> Part:
    """A separate autoencoder: an LDM file (perhaps with training leftovers), or a diffusers folder."""
    if path.is_dir():
        return find_folder_vae(path, [])[0]
    file = open_file(path)
    for prefix in ("", keys.VAE):
        if prefix + "encoder.down.0.block.0.conv1.weight" in file.shapes:
            beside = tuple(k for k in file.shapes if not k.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")))
            return Part(file, prefix, "ldm", ldm_vae_config(file.shapes, prefix), ("loss.",) if prefix else beside)
    raise CheckpointError(f"{path}: no autoencoder found in it (encoder.down.0.block.0.conv1.weight expected).")


def load(package: Package, device: torch.device, dtype: torch.dtype | None = None,
         vae_dtype: torch.dtype | None = None, text_from: str | Path | None = None,
         held: torch.dtype | None = None) -> Checkpoint:
    """Builds the modules of a package; dtype None: as stored. text_from: see `deepfloyd.load_text`. held, of the UNet: see `fill`.
    """
    unet = fill("UNet", package.unet, UNet, device, dtype, held)
    text: list[nn.Module] = [fill("text tower", part, TextEncoder, device, dtype) for part in package.text]
    if package.family == "if":
        text = [deepfloyd.load_text(package, text_from, device, unet.conv_norm_out.weight.dtype)]
    elif text_from is not None:
        raise CheckpointError(f"{package.where}: a model of the family {package.family} has its own text tower, not {text_from}.")
    vae = fill("autoencoder", package.vae, AutoencoderKL, device, vae_dtype or dtype) if package.vae else None
    return Checkpoint(package, unet, text, vae)


def sources(part: Part, names: list[str]) -> dict[str, Source]:
    """Where every tensor of a module comes from in its file, without the prefix."""
    prefixes = keys.unet_prefixes if isinstance(part.config, UNetConfig) else keys.vae_prefixes
    return {
        "ldm": lambda: keys.ldm_sources(names, prefixes(part.config)),
        "hf": lambda: keys.hf_sources(names), "open_clip": lambda: keys.same_sources(names),
        "own": lambda: keys.same_sources(names), "own, old": lambda: keys.old_vae_sources(names),
        "deepfloyd": lambda: keys.deepfloyd_sources(names, part.config),
    }[part.naming]()


def fill(what: str, part: Part, build: Callable[..., nn.Module], device: torch.device, dtype: torch.dtype | None,
         held: torch.dtype | None = None) -> nn.Module:
    """Builds a module without memory, checks it against the file's header, then puts the tensors in one by one.

    dtype: None as in the file. held: another, for what linear layers and convolutions hold; they widen it as they compute.
    """
    with torch.device("meta"):
        module = _built(part, build)
    large, state = wide(module), {}
    for name, tensor in read_tensors(part, lambda _: module, what):
        wanted = held if held and name in large else dtype
        state[name] = (tensor.to(wanted) if wanted and tensor.is_floating_point() else tensor).to(device)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _built(part: Part, build: Callable[[Any], nn.Module]) -> nn.Module:
    if part.config is not None:
        check_bill(part.file.path, part.config, sum(k.startswith(part.prefix) for k in part.file.shapes))
    try:
        return build(part.config)
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{part.file.path}: no network has the sizes that it names ({error}). Is it damaged?") from None


def read_tensors(part: Part, build: Callable[..., nn.Module], what: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Own name and tensor, one at a time, after names and shapes of all were checked. Raises CheckpointError."""
    path, shapes = part.file.path, part.file.shapes
    with torch.device("meta"):
        want = _built(part, build).state_dict()
    plan = {name: s._replace(keys=tuple(part.prefix + k for k in s.keys)) for name, s in sources(part, list(want)).items()}
    read = {k for s in plan.values() for k in s.keys}
    ignored = tuple(part.prefix + k for k in part.ignored)
    missing = sorted(read - shapes.keys())
    extra = sorted(k for k in shapes if k.startswith(part.prefix) and k not in read and not (ignored and k.startswith(ignored)))
    if missing or extra:
        raise CheckpointError(f"{path}: its {what} does not fit. "
                              + "; ".join(listed(n, k) for n, k in (("missing", missing), ("unexpected", extra)) if k)
                              + ". Is it complete, and of the family that it seems to be?")
    wrong = []
    for name, s in plan.items():
        parts = [shapes[k] for k in s.keys]
        shape = (sum(p[0] for p in parts) // s.share[1], *parts[0][1:]) if parts[0] else parts[0]
        if _squeezed(shape[::-1] if s.transposed else shape) != _squeezed(tuple(want[name].shape)):
            wrong.append(f"{s.keys[0]} is {list(shape)}, expected {list(want[name].shape)}")
    if wrong:
        raise CheckpointError(f"{path}: its {what} does not fit: {listed('shapes', wrong)}")
    for name, s in plan.items():
        yield name, _tensor(part, s, want[name])


def _tensor(part: Part, source: Source, want: Tensor) -> Tensor:
    tensors = [part.file[k] for k in source.keys]
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if source.share[1] > 1:
        k, n, dim = source.share
        tensor = tensor.unflatten(0, (-1, n, dim))[:, k].flatten(0, 1)
    tensor = (tensor.T if source.transposed else tensor).reshape(want.shape)
    if tensor.is_floating_point() != want.is_floating_point():
        raise CheckpointError(f"{part.file.path}: {source.keys[0]} holds {tensor.dtype}.")
    # isfinite() of the whole would allocate as much again, and the allocator keeps what it once held
    if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise CheckpointError(f"{part.file.path}: {source.keys[0]} holds values that are not finite.")
    return tensor.contiguous()


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """1x1 convolutions and linear layers hold the same numbers; files mix them."""
    return shape[:2] if len(shape) > 2 and math.prod(shape[2:]) == 1 else shape


def sha256(where: Path) -> str | None:
    """Of a model's file; of a folder, of its UNet's (an index, where it has shards). None if it is gone."""
    if where.is_dir():
        try:
            where = weights_file(where / "unet", []).path
        except CheckpointError:
            return None
    if not where.exists():
        return None
    digest = hashlib.sha256()
    with where.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

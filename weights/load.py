"""Files -> modules: names and shapes are checked before a tensor is read, then tensors are loaded one by
one."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from p2p.models import mmdit as transformers
from p2p.models.mmdit import MMDiT, MMDiTConfig
from p2p.models.text import TextEncoder
from p2p.models.unet import UNet
from p2p.models.vae import AutoencoderKL
from p2p.weights import (
    averages,
    deepfloyd,
    few_steps,
    hub,
    in_memory,
    keys,
    keys_mmdit,
    mmdit,
    refuse,
    texts,
)
from p2p.weights.detect import (
    FAMILIES,
    FLOWS,
    LDM,
    PREDICTIONS,
    Package,
    Part,
    find_in_file,
    told_size,
    usual_size,
    vae_config,
)
from p2p.weights.embeddings import add_words, attach_words
from p2p.weights.errors import CheckpointError
from p2p.weights.fields import short
from p2p.weights.files import open_file
from p2p.weights.fill import copied, fill, stored
from p2p.weights.folder import PIPELINES, find_folder, find_folder_vae, has_config, own_vae_names, pipeline
from p2p.weights.lora import attach_loras
from p2p.weights.scheduler import zero_terminal_snr
from p2p.weights.untrusted import brief

LATENT = (*LDM, *FLOWS)
EMOJI = Path(__file__).with_name("emoji")
T = TypeVar("T")
BUNDLED = {"emoji": EMOJI / "emoji.safetensors", "emoji-flow": EMOJI / "flow.safetensors",
           "emoji-upscaler": EMOJI / "upscaler.safetensors"}


@dataclass(frozen=True)
class Checkpoint:
    """The loaded parts of a text-to-image model, and what was recognised of it."""

    package: Package
    unet: UNet | MMDiT
    text: list[nn.Module]
    vae: AutoencoderKL | None


def find(source: Any = "emoji", family: str | None = None, prediction: str | None = None,
         vae: str | Path | None = None, ema: bool = False, clip_skip: int = 0,
         zero_snr: bool = False, lora: Sequence[tuple[Path, float]] = (),
         embeddings: Sequence[tuple[Path, str | None]] = ()) -> Package:
    """Recognises a bundled model by its name (BUNDLED), a .safetensors or .ckpt file, a diffusers folder, an
    "org/name" of the Hub (which is downloaded), or a diffusers pipeline in memory, without loading it.

    The other arguments override what is recognised; see `p2p.load`. lora: files with their weights.
    embeddings: files with their words (None: the file's own). Raises CheckpointError.
    """
    if family is not None and family not in FAMILIES:
        raise CheckpointError(f"family {family!r} is not known; known: {', '.join(FAMILIES)}")
    if prediction is not None and prediction not in PREDICTIONS:
        raise CheckpointError(f"prediction {prediction!r} is not known; known: {', '.join(PREDICTIONS)}")
    pipe = None if isinstance(source, (str, Path)) else source
    path = in_memory.place_of(pipe) if pipe is not None else _place(source, ema)
    replacement = None if vae is None else find_vae(vae)
    if pipe is not None:
        _no_averages(path, ema)
        package = _recognised(path, partial(in_memory.find_pipeline, pipe=pipe, replacement=replacement))
    else:
        package = _recognised(path, partial(_find, replacement=replacement, ema=ema))
    if family and family != package.family:
        raise CheckpointError(f"{path}: asked to be read as {family}, but it is a model of the family "
                              f"{package.family}.")
    _sample_as_asked(package, path, prediction, zero_snr)
    if package.family in LATENT:
        _autoencoder(package, vae, replacement)
    elif vae is not None:
        raise CheckpointError(f"{path}: works on pixels and has no autoencoder that {vae} could replace; "
                              "leave out vae.")
    if not isinstance(clip_skip, int) or clip_skip:
        skip_layers(package, clip_skip)
    if package.family in LDM and (package.where.is_file() or package.sampling.sampler == "ddim"):
        few_steps.apply(package, package.unet.file)
    attach_loras(package, lora)
    attach_words(package, embeddings)
    package.size = package.size or told_size(package.unet.file) or usual_size(package)
    return package


def _sample_as_asked(package: Package, path: Path, prediction: str | None, zero_snr: bool) -> None:
    """Changes what was recognised of the sampling. Raises CheckpointError."""
    flow = package.sampling.flow is not None
    if prediction and (prediction == "flow") != flow:
        raise CheckpointError(f"{path}: asked to predict {prediction}, but models of the family "
                              f"{package.family} are {'flows' if flow else 'no flows'}; leave out "
                              "prediction.")
    if prediction:
        package.sampling.prediction, package.sampling.why = prediction, "as asked"
    elif package.prediction not in PREDICTIONS:
        raise CheckpointError(f"{path}: said to predict {short(package.prediction)} (by {package.why}), "
                              f"which is not known; give prediction, one of {', '.join(PREDICTIONS)}.")
    if zero_snr and flow:
        raise CheckpointError(f"{path}: a flow, which begins at pure noise anyway; leave out zero_snr.")
    if zero_snr:
        package.sampling.alphas_cumprod = zero_terminal_snr(package.alphas_cumprod)
        package.notes.append("zero terminal SNR (as asked)")


def _autoencoder(package: Package, vae: str | Path | None,
                 replacement: tuple[Part, float | None] | None) -> None:
    """Replaces the model's autoencoder, which may be missing, if another is given. Raises CheckpointError."""
    if replacement is not None:
        package.vae, scale = replacement
        package.latent_scale = scale or package.latent_scale
        package.notes.append(f"autoencoder from {vae}")
        if averages.held(package.vae.file.shapes):
            package.notes.append(f"{vae}: {averages.NOT_USED}")
    if package.family in FLOWS:
        mmdit.check_vae(package, silent=replacement is not None and replacement[1] is None)
    elif package.vae is not None and package.vae.config.shift:
        raise CheckpointError(f"{package.vae.file.path}: its config shifts latents (shift_factor "
                              f"{package.vae.config.shift:g}), which the "
                              f"family {package.family} does not.")
    if package.family == "sdxl" and package.latent_scale == 0.18215:
        package.notes.append("latents scaled by 0.18215, as its autoencoder's config has it (or diffusers, "
                             "where that is silent); 0.13025 is usual of SDXL")
    if package.vae is None:
        raise CheckpointError(f"{package.where}: no autoencoder found in it; give one with vae (--vae): a "
                              "file, a folder, or an org/name on the Hub.")
    channels, latents = package.unet.config.in_channels, package.vae.config.latent_channels
    if latents != channels:
        network = "transformer" if package.family in FLOWS else "UNet"
        raise CheckpointError(f"{package.vae.file.path}: its latents have {latents} channels, those of the "
                              f"{network} {channels}; it is the autoencoder of another kind of model.")


def skip_layers(package: Package, clip_skip: int) -> None:
    """Reads the text `clip_skip` layers before the one that the family uses, as diffusers counts. Raises
    CheckpointError."""
    read = package.family in LATENT and package.family != "flux"   # FLUX reads the last layer, pooled
    towers = [part.config for part in package.text] if read else []
    most = min((c.layers - c.skip for c in towers), default=0)
    if not isinstance(clip_skip, Integral) or isinstance(clip_skip, bool) or not 0 <= clip_skip <= most:
        raise CheckpointError(f"{package.where}: clip_skip {brief(clip_skip)}; a whole number from 0 to "
                              f"{most} is expected of this model.")
    for part in package.text:
        part.config = replace(part.config, skip=part.config.skip + clip_skip)
    package.notes.append(f"clip skip {clip_skip} (in other programs {clip_skip + 1})")


def _recognised(path: Path, find: Callable[[Path], T]) -> T:
    """Calls `find` for a file or a folder; all its errors become CheckpointErrors that name the path."""
    try:
        return find(path)
    except KeyError as error:
        raise CheckpointError(f"{path}: 1 missing: {error.args[0]}. It is not complete.") from None
    except (ArithmeticError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its sizes are those of no model known here ({error}). Is it "
                              "damaged?") from None
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from None


def _find(path: Path, replacement: tuple[Part, float | None] | None, ema: bool) -> Package:
    if not path.is_dir():
        file = open_file(path)
        if deepfloyd.OWN in file.shapes:
            package = deepfloyd.find_in_file(file)
        elif keys_mmdit.prefix(file.shapes) is not None:
            package = mmdit.find_in_file(file)
        else:
            package = find_in_file(file, ema)
        _no_averages(path, ema and package.family not in LDM)
        return package
    if (path / "config.yml").exists() and (path / "pytorch_model.bin").exists():
        _no_averages(path, ema)
        return deepfloyd.find_in_file(open_file(path / "pytorch_model.bin"))
    kind = pipeline(path)
    if kind in deepfloyd.PIPELINES:
        _no_averages(path, ema)
        return deepfloyd.find_folder(path)
    if kind in mmdit.PIPELINES:
        _no_averages(path, ema)
        return mmdit.find_folder(path, kind, replacement)
    if kind in PIPELINES:
        return find_folder(path, kind, replacement, ema)
    known = ", ".join((*PIPELINES, *mmdit.PIPELINES, *deepfloyd.PIPELINES))
    what = f"{mmdit.OTHERS[kind]}, a {kind}" if kind in mmdit.OTHERS else f"a {kind}"
    raise CheckpointError(f"{path}: {what}; supported: {known}. Use the text-to-image model of its family.")


def _place(source: str | Path, ema: bool) -> Path:
    """Where a model lies, downloaded if need be. Raises CheckpointError."""
    path = _path(source)
    if str(source) in BUNDLED and not path.is_file() and not (path / "model_index.json").exists():
        return BUNDLED[str(source)]   # a folder of pictures may have such a name
    if not path.exists() and hub.is_id(str(source)):
        return hub.download(str(source), ema)
    return path


def _path(source: str | Path) -> Path:
    """The source as a path. Raises CheckpointError where it cannot be one."""
    try:
        Path(source).exists()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{brief(str(source))}: no path ({why}).") from None
    return Path(source)


def _no_averages(path: Path, wanted: bool) -> None:
    if wanted:
        raise CheckpointError(f"{path}: no averaged weights (EMA) in it; leave out ema.")


def find_vae(source: str | Path) -> tuple[Part, float | None]:
    """A separate autoencoder, and its latents' scale if it says one: a file in LDM naming (perhaps with
    training leftovers, or a whole model) or diffusers', a diffusers folder (that of the autoencoder, or of a
    whole model), or an "org/name" of the Hub.

    Raises CheckpointError.
    """
    path = _path(source)
    if not path.exists() and hub.is_id(str(source)):
        path = hub.download_vae(str(source))
    return _recognised(path, _find_vae)


def _find_vae(path: Path) -> tuple[Part, float | None]:
    if path.is_dir():
        nested = not (path / "config.json").exists() and (path / "vae" / "config.json").exists()
        return find_folder_vae(path / "vae" if nested else path, [])
    file = open_file(path)
    for prefix in ("", keys.VAE, "vae."):
        if prefix + "encoder.down.0.block.0.conv1.weight" in file.shapes:
            beside = tuple(k for k in file.shapes
                           if not k.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")))
            return Part(file, prefix, "ldm", vae_config(file.shapes, prefix),
                        ("loss.",) if prefix else beside), None
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in file.shapes:
        if has_config(path):
            return find_folder_vae(path.parent, [], file)
        config = vae_config(file.shapes, "", "down_blocks.", "resnets.")
        return Part(file, "", own_vae_names(file.shapes), config), None
    refuse.by_name(file.path, file.shapes, file.is_fp8())
    raise CheckpointError(f"{path}: no autoencoder found in it (encoder.down.0.block.0.conv1.weight "
                          "expected).")


def load(package: Package, device: torch.device, dtype: torch.dtype | None = None,
         vae_dtype: torch.dtype | None = None, text_from: str | Path | None = None,
         held: torch.dtype | None = None) -> Checkpoint:
    """Builds the modules of a package; dtype None: as stored, see `stored`. text_from: see
    `deepfloyd.load_text` and `texts.load_text`. held, of the network: see `fill`."""
    dtype, vae_dtype = dtype or stored(package.unet), vae_dtype or dtype
    flow = isinstance(package.unet.config, MMDiTConfig)
    what, build = ("transformer", transformers.build) if flow else ("UNet", UNet)
    unet = fill(what, package.unet, build, device, dtype, held)
    if package.family in FLOWS:
        text = texts.load_text(package, text_from, device, dtype)
    else:
        text = [fill("text tower", part, TextEncoder, device, dtype) for part in package.text]
    if package.family == "if":
        text = [deepfloyd.load_text(package, text_from, device, unet.dtype)]
    elif text_from is not None and package.family not in FLOWS:
        raise CheckpointError(f"{package.where}: a model of the family {package.family} has its own text "
                              f"tower, not {text_from}.")
    part = package.vae
    vae = fill("autoencoder", part, AutoencoderKL, device, vae_dtype or stored(part)) if part else None
    if package.pipeline:
        filled = [(package.unet, unet), *zip(package.text, text), *([(part, vae)] if part and vae else [])]
        filled += [(package.t5, text[-1])] if package.t5 and text_from is None else []
        anew = sum(copied(p, module) for p, module in filled if p.file.shared)
        if anew > 0.01 * sum(p.nbytes for _, module in filled for p in module.parameters()):
            package.notes.append(f"{anew / 1e9:.1f} GB of weights are copies of the pipeline's, made for "
                                 "another device, a shorter dtype, or by add-ons")
    add_words(package.words, text)
    return Checkpoint(package, unet, text, vae)

"""`load`: checks the arguments, finds the files, and assembles the model from its parts."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.network import Network
from p2p.request import add_ons
from p2p.request.checks import flag, whole
from p2p.request.schedules import DISTILLED
from p2p.weights import load as loading
from p2p.weights.detect import FAMILY_RULE, FLOWS, Package
from p2p.weights.few_steps import FEW
from p2p.weights.fill import stored
from p2p.weights.identity import files
from p2p.weights.in_memory import device_of, is_pipeline, name_of
from p2p.weights.untrusted import brief

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def find_device(name: str | torch.device | None, what: str = "device") -> torch.device:
    """Returns an available device; None: a GPU, or else the CPU. Raises UsageError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    # not a device, or not available
    except (RuntimeError, AssertionError, TypeError, ValueError, ArithmeticError) as error:
        named = name if isinstance(name, str) else brief(name)
        raise UsageError(f"{what} {named}: {str(error).splitlines()[0]}") from None
    return device


def check_alone(model: Model) -> None:
    """Raises UsageError for a model that draws nothing by itself."""
    if model.unet.enlarges:
        raise UsageError(f"{model.name} is a super-resolution stage: it enlarges the pictures of another "
                         "model, see `upscale`")


def find_model(model: Any) -> Model:
    """Returns the model, loaded for this call alone if what it is loaded from is given. Raises
    CheckpointError, UsageError."""
    if isinstance(model, (str, Path)) or is_pipeline(model):
        return load(model)
    if not isinstance(model, Model):
        raise UsageError("a model is needed, as p2p.load gives it, or what it is loaded from, not "
                         f"{brief(model)}")
    return model


def load(source: Any = "emoji", family: str | None = None, prediction: str | None = None,
         device: str | torch.device | None = None, dtype: torch.dtype | None = None,
         vae: str | Path | None = None, text: str | Path | None = None, compile: bool = False,
         held: torch.dtype | None = None, offload: bool = False, tile: int | None = None, ema: bool = False,
         clip_skip: int | None = None, zero_snr: bool = False, lora: Any = None,
         embeddings: Any = None) -> Model:
    """Loads a model: "emoji", which ships with the package, a Stable Diffusion 1, 2, XL, 3 or 3.5 or FLUX.1
    checkpoint (a .safetensors or .ckpt file under its original names, a diffusers folder, or a diffusers
    pipeline in memory, whose weights stay shared where device and dtype allow it), or a stage of DeepFloyd IF
    (a diffusers folder, or a file in its own naming).

    family ("sd1", "sd2", "sdxl", "sd3", "flux", "if", "emoji", "emoji-flow") and prediction ("eps", "v",
    "x0", "flow") are detected where None; a guess is reported in `Model.notes`. device: None for a pipeline's
    own, or a GPU if there is one. dtype: float32 on a CPU, elsewhere the one that most of the UNet is stored
    in; SDXL's autoencoder always runs in float32, where half precision overflows. vae: another autoencoder
    (see `p2p.weights.load.find_vae`). text: for IF, Stable Diffusion 3 and FLUX, the folder of a model that
    holds T5 (the model's own where None; CLIP too, where the model has none), or a file of encoded prompts
    (see `p2p.models.t5.EncodedPrompts`). compile: run the UNet through torch.compile, with one graph for all
    words, weights and windows of a batch's shape (others where maps are read, or a source no more); the first
    step then takes a minute or more. held: a shorter dtype (torch.float16) in which the UNet's large weights
    are stored: each layer widens its own as it computes, which halves the memory. offload: keep text towers
    and autoencoder on the CPU while idle. tile: side in latents of the squares in which pictures are decoded
    (64 suits SD; None: whole). ema: use the averaged weights, where the file has both. clip_skip: layers of
    text left out before those that the family leaves out (1 is the "clip skip 2" of other programs).
    zero_snr: rescale the noise schedule to zero terminal SNR (Lin et al. 2023). lora: a file of LoRA or its
    kin, a pair (path, weight), or a list of these (see `p2p.weights.lora`). embeddings: files of textual
    inversion (see `p2p.weights.embeddings`): {"<word>": path}, or a path or a list of paths, whose words are
    their own. Raises CheckpointError, and UsageError for wrong arguments and devices that are not available.
    """
    _check_arguments(source=source, vae=vae, text=text, family=family, prediction=prediction, dtype=dtype,
                     held=held, compile=compile, offload=offload, ema=ema, zero_snr=zero_snr)
    tile = None if tile is None else whole("tile, in latents,", tile, least=8)
    clip_skip = 0 if clip_skip is None else clip_skip   # checked where the tower's layers are known
    device = find_device(device_of(source) if is_pipeline(source) and device is None else device)
    package = loading.find(source, family, prediction, vae, ema, clip_skip, zero_snr, add_ons.loras(lora),
                           add_ons.embeddings(embeddings))
    dtype = _compute_dtype(dtype, held, device, package)
    c = loading.load(package, device, dtype, torch.float32 if package.family == "sdxl" else None, text, held)
    _prepare(c, offload, compile)
    return Model(name_of(source), package.where, package.family, c.unet, c.text, c.vae, compiled=compile,
                 offload=offload, tile=tile, files=files(package, vae, text),
                 load_options=_load_options(package, ema, clip_skip, zero_snr, held),
                 places=_places(vae=vae, text=text, pipeline=package.pipeline) | add_ons.places(package),
                 **_detected(package, tile is not None and c.vae is None),
                 **_defaults(package, c.unet))


def _prepare(c: loading.Checkpoint, offload: bool, compile: bool) -> None:
    if offload:
        for part in filter(None, [*c.text, c.vae]):
            part.to("cpu")
    if compile:
        c.unet.compile()


def _places(**files: str | Path | None) -> dict[str, Any]:
    return {name: str(file) for name, file in files.items() if file is not None}


def _load_options(package: Package, ema: bool, clip_skip: int, zero_snr: bool,
                  held: torch.dtype | None) -> dict[str, Any]:
    """The arguments of `load` that decide pixels, for JSON, and what names of files do."""
    named = {"few_steps": package.sampling.few_steps} if package.sampling.few_steps else {}
    return {"ema": ema, "clip_skip": clip_skip or 0, "zero_snr": zero_snr,
            "held": held and str(held).removeprefix("torch."), **named, **add_ons.identity(package)}


def _compute_dtype(dtype: torch.dtype | None, held: torch.dtype | None, device: torch.device,
                   package: Package) -> torch.dtype:
    """The dtype that the network computes in. Raises UsageError unless `held` is shorter."""
    dtype = dtype or (torch.float32 if device.type == "cpu" else stored(package.unet))
    if held is not None and not held.itemsize < dtype.itemsize:
        raise UsageError(f"held must be shorter than the dtype that is computed in: {held} and {dtype}")
    return dtype


def _detected(package: Package, tiled: bool) -> dict[str, Any]:
    """How the model is sampled, as its files say, with notes. tiled: `tile` is set, for a pixel model."""
    s, notes = package.sampling, list(package.notes)
    if "guess" in package.why or package.why == FAMILY_RULE:
        notes.insert(0, f"{package.family}, predicting {package.prediction}: {package.why}")
    if tiled:
        notes.append("tile changes nothing: this model works on pixels, so that there is nothing to decode")
    return dict(alphas_cumprod=s.alphas_cumprod, flow=s.flow, prediction=s.prediction, size=package.size,
                offset=s.offset, final_alpha=s.final_alpha, timestep_spacing=s.timestep_spacing, clip=s.clip,
                learned_variance=s.learned_variance, latent_scale=package.latent_scale,
                zero_negative=package.zero_negative, sampler=s.sampler, notes=tuple(notes))


# steps and guidance scale: of 3.5 as in its authors' sd3_infer.py, of 3 and FLUX as in diffusers' examples
AS_GIVEN = {"3 medium": (28, 7.0), "3.5 medium": (50, 5.0), "3.5 large": (40, 4.5), "turbo": (4, 1.0),
            "dev": (50, 3.5), "schnell": (4, 1.0)}


def _defaults(package: Package, unet: Network) -> dict[str, Any]:
    """Defaults of runs that differ from Stable Diffusion's."""
    if package.family in FLOWS:
        steps, guidance_scale = AS_GIVEN["turbo" if package.kind.endswith("turbo") else package.kind]
        return dict(steps=steps, guidance_scale=guidance_scale)
    family, enlarges, s = package.family, unet.enlarges, package.sampling
    if s.sampler in DISTILLED or s.few_steps:   # with guidance as an input of the network, or into it
        guided = s.guided or unet.reads_guidance
        return dict(steps=s.steps or FEW) | ({} if guided else dict(guidance_scale=1.0))
    if family == "if":
        return dict(guidance_scale=4.0 if enlarges else 7.0, eta=1.0)
    if family == "emoji" and enlarges:
        return dict(guidance_scale=1.0, steps=10, noise_level=0, align_corners=False)
    return dict(guidance_scale=3.0) if family in ("emoji", "emoji-flow") else {}


def _check_arguments(source: object, **arguments: object) -> None:
    if not isinstance(source, (str, Path)) and not is_pipeline(source):
        raise UsageError("a model is named by a string or a path, or is a diffusers pipeline, not "
                         f"{brief(source)}")
    for name, value in arguments.items():
        if name in ("compile", "offload", "ema", "zero_snr"):
            flag(name, value)
        if value is None:
            continue
        if name in ("dtype", "held") and not (isinstance(value, torch.dtype) and value in FLOATING):
            raise UsageError(f"{name} is one of {', '.join(map(str, FLOATING))}, not {brief(value)}")
        if name in ("vae", "text") and not isinstance(value, (str, Path)):
            raise UsageError(f"{name} is named by a string or a path, not {brief(value)}")
        if name in ("family", "prediction") and not isinstance(value, str):
            raise UsageError(f"{name} is a name, not {brief(value)}")

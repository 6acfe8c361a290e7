"""Stable Diffusion 3 and FLUX.1: recognises single files under their original names, and diffusers
folders."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2p.models.mmdit import FLUX_DEV, MMDiTConfig
from p2p.models.text import CLIP_L, OPENCLIP_G
from p2p.models.vae import VAEConfig
from p2p.weights import fields, keys, keys_mmdit, refuse, scheduler, t5
from p2p.weights.detect import LATENTS, Package, Part, Shapes, hf_text, latents, parsed, vae_config
from p2p.weights.errors import CheckpointError
from p2p.weights.fields import listed
from p2p.weights.files import Renamed, TensorFile
from p2p.weights.folder import find_folder_vae, folder_text, read_index, scheduler_class, weights_file
from p2p.weights.hub import cached_name
from p2p.weights.keys_mmdit import transformer_config
from p2p.weights.scheduler import Flow, Sampling
from p2p.weights.sizes import check_given, read_json

PIPELINES = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}
# other pipelines of FLUX -> what they are
OTHERS = {"FluxFillPipeline": "FLUX.1 Fill", "FluxControlPipeline": "FLUX.1 Canny or Depth",
          "FluxKontextPipeline": "FLUX.1 Kontext", "FluxPriorReduxPipeline": "FLUX.1 Redux",
          "Flux2Pipeline": "FLUX.2", "Flux2KleinPipeline": "FLUX.2"}
T5 = {"sd3": "_3", "flux": "_2"}           # the end of the names of its folders
CLIP = {"sd3": ("text_encoder", "text_encoder_2"), "flux": ("text_encoder",)}
# in single files, as ComfyUI and Stability name them
TOWERS = ("clip_l", "clip_g", "t5xxl")
COMFY = "text_encoders."
SIZES = "p2p.transformer_config"   # in the metadata of a file: what shapes do not tell
PROJECTED = "p2p.clip_l_projection"   # ... its CLIP-L's pooled text is projected, which no released file's is


def flux_kind(guided: bool, said: Mapping[str, Any]) -> str:
    """dev or schnell, by its guidance embedding or else its scheduler's config: a dev whose guidance was
    trained out of it shifts its levels as dev does."""
    return "dev" if guided or said.get("use_dynamic_shifting") else "schnell"


def kind_of(family: str, config: MMDiTConfig, name: str, said: Mapping[str, Any], told: bool | None,
            notes: list[str]) -> str:
    """Which of its family it is, by its config and its scheduler's, said; whether turbo as it is told, else
    by its name."""
    if family == "flux":
        kind = flux_kind(config.guidance, said)
        if kind == "schnell" and not said:
            notes.append("without a guidance embedding, so taken for FLUX.1 schnell: 4 steps, no guidance, "
                         "256 tokens of T5; give steps and guidance if that was trained out of a dev")
        return kind
    kind = "3.5 medium" if config.dual else "3.5 large" if config.qk_norm else "3 medium"
    if told is False or (told is None and "turbo" not in name.lower()):
        return kind
    notes.append(f"by its {'scheduler config' if told else 'name'} a turbo model: of few steps, without "
                 "guidance")
    return f"{kind} turbo"


def named(path: Path) -> str:
    """The name of a file or folder; of one in the cache of the Hub, that of its repository."""
    cached = cached_name(path)
    return f"{cached} {path.name}" if cached else path.name


def usual_flow(family: str, kind: str) -> Flow:
    """The levels of the released models."""
    if family == "sd3":
        return Flow(3.0, twice=True)
    return Flow(dynamic=scheduler.DYNAMIC) if kind == "dev" else Flow()


# ----------------------------------------------------------------------------------------------- single files

def find_in_file(file: TensorFile) -> Package:
    """Recognises a single file, with or without text towers and autoencoder. Raises CheckpointError."""
    s = file.shapes
    refuse.by_name(file.path, s, file.is_fp8())
    prefix = keys_mmdit.prefix(s) or ""
    vae = next((p for p in (keys.VAE, "vae.") if p + "encoder.conv_in.weight" in s), None)
    own = {k.removeprefix(prefix): shape for k, shape in s.items() if k.startswith(prefix)}
    if not prefix:
        own = {k: shape for k, shape in own.items() if not k.startswith((keys.VAE, "vae.", COMFY))}
    family, notes = "flux" if any(k.startswith("double_blocks.") for k in own) else "sd3", []
    known = (*([prefix] if prefix else []), vae or keys.VAE, COMFY)
    if stray := sorted(k for k in s if not k.startswith(known) and (prefix or k not in own)):
        raise CheckpointError(f"{file.path}: {listed('unexpected', stray)}. Is it a model with additions? "
                              "Use the plain one.")
    config = _config(file, own)
    check_inputs(file.path, config)
    _check_kontext(file.path, family, config, file.metadata, notes)
    said = parsed(file, scheduler.METADATA)
    told = bool(scheduler.few_steps(file.path, said)) if said else None
    kind = kind_of(family, config, named(file.path), said or {}, told, notes)
    text = _text(file, family)
    tower = t5.in_file(file, f"{COMFY}t5xxl.transformer.")
    scale, shift = latents(file, family)
    part = None
    if vae:
        part = Part(file, vae, "ldm", replace(vae_config(s, vae), shift=shift), ("loss.",))
    unet = Part(file if prefix else Renamed(file, {k: k for k in own}), prefix, "own", config)
    package = Package(family, file.path, unet, text, part, _file_sampling(file, family, kind), None, scale,
                      notes, t5=tower, kind=kind)
    check_text(package)
    return package


def _config(file: TensorFile, shapes: Shapes) -> MMDiTConfig:
    """By shapes, and by what a file's metadata add to them. Raises CheckpointError."""
    told = parsed(file, SIZES)
    turned = tuple(told.get("axes_dims_rope", ()))
    config = transformer_config(file.path, shapes, turned)
    if turned:
        axes(file.path, turned, config.dim // config.heads)
    return replace(config, heads=told.get("num_attention_heads", config.heads))


def _file_sampling(file: TensorFile, family: str, kind: str) -> Sampling:
    if told := parsed(file, scheduler.METADATA):
        return replace(scheduler.read_flow(file.path, told, family), why="its metadata")
    return scheduler.flow(usual_flow(family, kind), f"as every model of the family {family}")


def _text(file: TensorFile, family: str) -> list[Part]:
    """The CLIP towers of a single file: all that the family has, or none. Raises CheckpointError."""
    parts = []
    for name, base in (("clip_l", CLIP_L), ("clip_g", OPENCLIP_G))[:len(CLIP[family])]:
        start = f"{COMFY}{name}.transformer."
        tower = Renamed(file, {k.removeprefix(start).removeprefix("text_model."): k for k in file.shapes
                               if k.startswith(start)})
        if not tower.shapes:
            continue
        pooled = tower.shapes.get("text_projection.weight", (None,))[0]
        if name == "clip_l" and PROJECTED not in file.metadata:
            pooled = None   # as in Stability's, ComfyUI's and diffusers' code, even where the file has one
        part = hf_text(tower, "", family, base, pooled)
        part.ignored = (*part.ignored, *(() if pooled else ("text_projection.",)))
        parts.append(part)
    if 0 < len(parts) < len(CLIP[family]):
        raise CheckpointError(f"{file.path}: it holds one CLIP tower, where the family {family} reads two; "
                              "use the file with all towers, or with none.")
    return parts


# -------------------------------------------------------------------------------------------------- diffusers

def find_folder(path: Path, kind: str, replacement: tuple[Part, float | None] | None = None,
                opened: Callable[[Path, list[str]], TensorFile] = weights_file) -> Package:
    """Recognises a folder by the configs of its parts. opened: gives the weights of a part's folder. Raises
    CheckpointError."""
    notes: list[str] = []
    family = PIPELINES[kind]
    index, where = read_index(path, notes, family), path / "transformer" / "config.json"
    c = read_json(where)
    unet = Part(opened(path / "transformer", notes), "", "diffusers",
                (sd3_from_config if family == "sd3" else flux_from_config)(where, c))
    check_inputs(where, unet.config)
    configs = [path / "model_index.json", where]
    there = [name for name in CLIP[family] if (path / name / "config.json").exists()]
    if there and len(there) < len(CLIP[family]):
        raise CheckpointError(f"{path}: it has the text tower {there[0]} alone, where {family} reads two.")
    towers = [folder_text(path, name, read_json(path / name / "config.json"), family, family == "sd3", notes,
                          opened) for name in there]
    configs += [config for _, read in towers for config in read]
    vae, scale = (None, None) if replacement is None else replacement
    if replacement is None and (path / "vae").exists():
        vae, scale = find_folder_vae(path / "vae", notes, opened(path / "vae", notes))
        configs.append(path / "vae" / "config.json")
    tower = None
    if (path / f"text_encoder{T5[family]}" / "config.json").exists():
        tower = t5.find_t5(path, T5[family], notes, opened)
    config, told, said = path / "scheduler" / "scheduler_config.json", None, {}
    if config.exists():
        said = read_json(config)
        told = bool(scheduler.few_steps(config, said)) or None
    saved = Path(str(c.get("_name_or_path") or ""))
    name = f"{named(path)} {named(saved.parent if saved.name == 'transformer' else saved)}"
    variant = kind_of(family, unet.config, name, said, told, notes)
    sampling = scheduler.flow(usual_flow(family, variant), "a guess, the folder has no scheduler")
    if said:
        sampling = scheduler.read_flow(config, said, family, scheduler_class(index))
        configs.append(config)
    shrink = vae.config.shrink if vae else 8
    side = (c.get("sample_size") or 128) * shrink   # in FLUX's config it is not there
    package = Package(family, path, unet, [part for part, _ in towers], vae, sampling, (side, side),
                      scale or LATENTS[family][0], notes, configs=configs, t5=tower,
                      tokenizer=path if tower else None, kind=variant)
    check_text(package)
    return package


def _numbers(path: Path, c: Mapping[str, Any], **usual: int | None) -> dict[str, Any]:
    """Fields that are one number each, with diffusers' defaults. Raises CheckpointError."""
    check_given(path, dict(c), *(name for name, value in usual.items() if value is not None))
    out = {name: c.get(name, value) for name, value in usual.items()}
    if odd := [name for name, value in out.items() if isinstance(value, list)]:
        raise CheckpointError(f"{path}: {odd[0]} = {fields.short(out[odd[0]])}; one number is expected.")
    return out


def sd3_from_config(path: Path, c: dict[str, Any]) -> MMDiTConfig:
    """Raises CheckpointError."""
    fields.check(path, c, fields.SD3)
    n = _numbers(path, c, patch_size=2, in_channels=16, num_layers=18, attention_head_dim=64,
                 num_attention_heads=18, joint_attention_dim=4096, caption_projection_dim=1152,
                 pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=96, sample_size=128)
    dim, dual = n["num_attention_heads"] * n["attention_head_dim"], c.get("dual_attention_layers") or []
    if n["caption_projection_dim"] != dim:
        raise CheckpointError(f"{path}: caption_projection_dim = {n['caption_projection_dim']}, but its "
                              f"heads have {dim} channels together.")
    if not isinstance(dual, list) or not all(type(i) is int and 0 <= i < n["num_layers"] for i in dual):
        raise CheckpointError(f"{path}: dual_attention_layers = {fields.short(dual)}; numbers of its "
                              f"{n['num_layers']} layers are expected.")
    return MMDiTConfig(
        in_channels=n["in_channels"], out_channels=n["out_channels"], patch=n["patch_size"], dim=dim,
        heads=n["num_attention_heads"], double=n["num_layers"], context_dim=n["joint_attention_dim"],
        vector_dim=n["pooled_projection_dim"], qk_norm=c.get("qk_norm") is not None,
        table=n["pos_embed_max_size"], dual=tuple(sorted(set(dual))))


def flux_from_config(path: Path, c: dict[str, Any]) -> MMDiTConfig:
    """Raises CheckpointError."""
    fields.check(path, c, fields.FLUX)
    n = _numbers(path, c, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                 num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
                 out_channels=None)
    inputs, patch = n["in_channels"], FLUX_DEV.patch
    outputs = n["out_channels"] or inputs
    if inputs % patch**2 or outputs % patch**2:
        raise CheckpointError(f"{path}: in_channels = {inputs}, out_channels = {outputs}; they hold patches "
                              f"of {patch} x {patch} latents.")
    return MMDiTConfig(
        in_channels=inputs // patch**2, out_channels=outputs // patch**2, patch=patch,
        dim=n["num_attention_heads"] * n["attention_head_dim"], heads=n["num_attention_heads"],
        double=n["num_layers"], single=n["num_single_layers"], context_dim=n["joint_attention_dim"],
        vector_dim=n["pooled_projection_dim"], qk_norm=True,
        axes=axes(path, c.get("axes_dims_rope", FLUX_DEV.axes), n["attention_head_dim"]),
        guidance=bool(c.get("guidance_embeds", False)))


def axes(path: Path, given: Any, head_dim: int) -> tuple[int, int, int]:
    """Raises CheckpointError unless they are three even numbers whose sum is a head's width."""
    fits = isinstance(given, (list, tuple)) and len(given) == 3 and all(type(a) is int for a in given)
    if not fits or any(a <= 0 or a % 2 for a in given) or sum(given) != head_dim:
        raise CheckpointError(f"{path}: axes_dims_rope = {fields.short(given)}; three even numbers whose sum "
                              f"is {head_dim}, the width of a head, are expected.")
    return given[0], given[1], given[2]


# ----------------------------------------------------------------------------------------------------- checks

def check_inputs(path: Path, config: MMDiTConfig) -> None:
    """Raises CheckpointError for transformers that read other latents beside the noised ones."""
    ins, outs = config.in_channels, config.out_channels
    if ins != outs:
        times = ins / outs if config.axes is not None else 0
        kind = {2: "FLUX.1 Canny or Depth", 6: "FLUX.1 Fill"}.get(times, "no text-to-image model")
        raise CheckpointError(f"{path}: {kind}: it takes {ins} channels of latents and gives {outs}, so that "
                              "it reads a picture beside the noise; use the text-to-image model that it was "
                              "made from.")


def _check_kontext(path: Path, family: str, config: MMDiTConfig, metadata: Mapping[str, str],
                   notes: list[str]) -> None:
    """FLUX.1 Kontext, which edits a picture that it reads, has the tensors of FLUX.1 dev: names alone tell.
    Raises CheckpointError."""
    said = [metadata.get(f"modelspec.{name}", "") for name in ("architecture", "title")]
    if family == "flux" and any("kontext" in text.lower() for text in (named(path), *said)):
        raise CheckpointError(f"{path}: by its name FLUX.1 Kontext, which reads a picture beside the noise; "
                              "use FLUX.1 dev.")
    if family == "flux" and config.guidance:
        notes.append("taken for FLUX.1 dev or a model made of it; if it is FLUX.1 Kontext, whose tensors "
                     "have the same names, use dev itself")


def check_text(package: Package) -> None:
    """Raises CheckpointError unless the transformer takes what the text towers give."""
    c, clip, tower = package.unet.config, [part.config for part in package.text], package.t5
    width = sum(t.width for t in clip) if package.family == "sd3" else 0
    pooled = sum(t.pooled_dim or 0 for t in clip)
    t5_width = tower.config.get("d_model", 512) if tower else c.context_dim
    if width > c.context_dim or t5_width != c.context_dim or (clip and pooled != c.vector_dim):
        raise CheckpointError(f"{package.where}: its transformer takes text of width {c.context_dim} and "
                              f"pooled text of width {c.vector_dim}; CLIP gives {width or 'no'} and "
                              f"{pooled or 'no'} channels, T5 {t5_width if tower else 'none'}. It mixes two "
                              "models.")


def check_vae(package: Package, silent: bool) -> None:
    """Completes the autoencoder's config where its file does not say the latents' shift (silent)."""
    if silent and package.vae is not None:
        config: VAEConfig = package.vae.config
        package.vae.config = replace(config, shift=LATENTS[package.family][1])


def metadata(package: Package) -> dict[str, str]:
    """What the tensors of a single file do not tell, for its header."""
    c, out = package.unet.config, {}
    if c.axes is not None and c.axes != keys_mmdit.usual_axes(c.dim // c.heads):
        out[SIZES] = json.dumps({"axes_dims_rope": c.axes})
    elif not c.qk_norm and c.heads != keys_mmdit.usual_heads(c.dim):
        out[SIZES] = json.dumps({"num_attention_heads": c.heads})
    out[scheduler.METADATA] = json.dumps(scheduler_config(package))
    if package.family == "sd3" and package.text and package.text[0].config.projected:
        out[PROJECTED] = "true"
    return out


def scheduler_config(package: Package) -> dict[str, Any]:
    """The scheduler_config.json, with what tells a turbo model."""
    turbo = {"few_steps": "turbo", "steps": 4, "guided": False}
    return scheduler.config(package.sampling) | (
        {"_few_steps": turbo} if package.kind.endswith("turbo") else {})


def to_config(package: Package) -> dict[str, Any]:
    """The config of the transformer in a diffusers folder."""
    c, head_dim = package.unet.config, package.unet.config.dim // package.unet.config.heads
    shared = {"num_layers": c.double, "attention_head_dim": head_dim, "num_attention_heads": c.heads,
              "joint_attention_dim": c.context_dim, "pooled_projection_dim": c.vector_dim}
    if package.family == "flux":
        return {"_class_name": "FluxTransformer2DModel", **shared, "num_single_layers": c.single,
                "patch_size": 1, "in_channels": c.patch**2 * c.in_channels, "out_channels": None,
                "guidance_embeds": c.guidance, "axes_dims_rope": c.axes}
    shrink = package.vae.config.shrink if package.vae else 8
    return {"_class_name": "SD3Transformer2DModel", **shared, "sample_size": package.size[0] // shrink,
            "patch_size": c.patch, "in_channels": c.in_channels, "out_channels": c.out_channels,
            "caption_projection_dim": c.dim, "pos_embed_max_size": c.table,
            "dual_attention_layers": c.dual, "qk_norm": "rms_norm" if c.qk_norm else None}

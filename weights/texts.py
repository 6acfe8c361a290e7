"""The text towers of Stable Diffusion 3 and FLUX: the model's own, those of another folder, or prompts that
T5 encoded beforehand."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from p2p.models.t5 import EncodedPrompts, NoT5, T5Encoder
from p2p.models.text import TextEncoder
from p2p.weights import t5
from p2p.weights.detect import Package, Part
from p2p.weights.errors import CheckpointError
from p2p.weights.fill import fill
from p2p.weights.folder import folder_text, pipeline
from p2p.weights.mmdit import CLIP, PIPELINES, T5, check_text, flux_kind
from p2p.weights.sizes import read_json

T5Tower = T5Encoder | EncodedPrompts | NoT5
WANTED = "give the folder of a model that has it, as text (--text)"


def length(family: str, kind: str) -> int:
    """How many tokens T5 encodes: as diffusers has it, of schnell as it was trained."""
    return 256 if family == "sd3" or kind == "schnell" else 512


def tokenizer_suffix(folder: Path, family: str) -> str | None:
    """The end of the name of the folder with T5's tokenizer in that of a model, see `t5.in_folder`; None
    where there is none."""
    return next((s for s in (T5[family], "_3", "_2", "") if t5.has_tokenizer(folder, s)), None)


def flow_family(folder: Path) -> str | None:
    """Which of Stable Diffusion 3 and FLUX a folder holds; None: neither, or T5 alone. Raises
    CheckpointError."""
    return PIPELINES.get(pipeline(folder)) if (folder / "model_index.json").exists() else None


def load_t5(folder: Path, device: torch.device, dtype: torch.dtype) -> T5Encoder:
    """T5 in a folder, to encode prompts as the model in it reads them. Raises CheckpointError."""
    family = flow_family(folder)
    if family is None:
        return t5.load_t5(folder, device, dtype)
    configs = folder / "transformer" / "config.json", folder / "scheduler" / "scheduler_config.json"
    c, said = (read_json(config) if config.exists() else {} for config in configs)
    kind = flux_kind(bool(c.get("guidance_embeds", not c)), said)   # without a transformer: the longer text
    return t5.load_t5(folder, device, dtype, length(family, kind), masked=False)


def load_text(package: Package, source: str | Path | None, device: torch.device,
              dtype: torch.dtype) -> list[nn.Module]:
    """Loads the CLIP towers, then T5. source: a folder of a model, or a file of encoded prompts; None: the
    model's own. Raises CheckpointError."""
    where = None if source is None else Path(source)
    clip = package.text or (_clip_towers(where, package) if where is not None else [])
    if not clip:
        raise CheckpointError(f"{package.where}: no CLIP towers in it ({', '.join(CLIP[package.family])}); "
                              f"{WANTED}.")
    check_text(replace(package, text=clip))
    tower = _t5(package, where, device, dtype)
    if tower.config.width != package.unet.config.context_dim:
        raise CheckpointError(f"{where}: gives text of width {tower.config.width}, the transformer takes "
                              f"{package.unet.config.context_dim}.")
    towers: list[nn.Module] = [fill("text tower", part, TextEncoder, device, dtype) for part in clip]
    return [*towers, tower.to(device).eval().requires_grad_(False)]


def _tokenizer(package: Package, found: Any) -> Any:
    """That of the package's T5: from the folder of a model, if there is one, or as it was found in memory."""
    if not isinstance(found, Path):
        return found
    suffix = tokenizer_suffix(found, package.family)
    return None if suffix is None else t5.tokenizer_of(cast(Part, package.t5), found, suffix)


def _clip_towers(folder: Path, package: Package) -> list[Part]:
    """Those of another model's folder, if it has them."""
    family, names = package.family, CLIP[package.family]
    if not all((folder / name / "config.json").exists() for name in names):
        return []
    return [folder_text(folder, name, read_json(folder / name / "config.json"), family, family == "sd3",
                        package.notes)[0] for name in names]


def _t5(package: Package, where: Path | None, device: torch.device, dtype: torch.dtype) -> T5Tower:
    tokens = length(package.family, package.kind)
    if where is not None and where.is_file():
        prompts = t5.load_prompts(where).to(dtype=dtype)
        if prompts.config.masked:
            raise CheckpointError(f"{where}: {t5.PADDING_MASKED}; encode the prompts by the folder of a "
                                  f"model of the family {package.family}.")
        if (encoded := prompts.config.context_length) != tokens:   # padding is read as text
            package.notes.append(f"prompts encoded to {encoded} tokens, where {package.family} reads "
                                 f"{tokens}: pictures differ from those of its own text")
        return prompts
    if where is not None and (suffix := t5.in_folder(where)) is not None:
        part = t5.find_t5(where, suffix, package.notes)
        return t5.load_part(part, t5.tokenizer_of(part, where, suffix), device, dtype, tokens, masked=False)
    if package.t5 is not None and (words := _tokenizer(package, where or package.tokenizer)) is not None:
        return t5.load_part(package.t5, words, device, dtype, tokens, masked=False)
    if where is not None:
        raise CheckpointError(f"{where}: no T5 there (text_encoder_3, _2 or text_encoder, and its tokenizer, "
                              "expected), nor encoded prompts.")
    lacks = "its T5 has no tokenizer" if package.t5 is not None else "it has no T5"
    if package.family != "sd3":
        raise CheckpointError(f"{package.where}: {lacks}; {WANTED}, or prompts from `p2p encode`.")
    package.notes.append(f"{lacks}, so that T5's text is left out (zeros); {WANTED}")
    return NoT5(package.unet.config.context_dim, tokens).to(dtype=dtype)

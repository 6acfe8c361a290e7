"""How models and LoRAs of few steps are sampled, as far as the name or the metadata of a file tell."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from p2p.weights import scheduler
from p2p.weights.detect import FAMILY_RULE, Package
from p2p.weights.files import TensorFile
from p2p.weights.hub import cached_name
from p2p.weights.scheduler import Sampling

NAMES = ("ss_output_name", "modelspec.title", "modelspec.tags")   # in kohya's and modelspec's metadata
FIXED = ("pytorch_lora_weights", "adapter_model")   # files whose folders have the name
FEW = 4   # steps, where no number is said
_COUNT = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z\d])")
_KINDS = re.compile(rf"(?<![a-z])({'|'.join(scheduler.KINDS)})(?![a-z])")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])")   # dreamshaperXL_v21TurboDPMSDE
_BASE = re.compile("sd|xl")   # what a LoRA of Turbo names beside it, and none of a car does


def apply(package: Package, file: TensorFile) -> None:
    """Sets how a package is sampled by a file of it, or one that is merged into it, and adds a note; nothing
    where the file's name and metadata do not say, or its own header holds a scheduler's config.

    Lightning and Hyper are words of styles too, so they count only beside a number of steps, and Turbo of a
    LoRA beside that or a base model. DMD2's models are sampled as latent consistency models are.
    """
    own = file is package.unet.file
    name = _name(package.where if own else file.path, package.sampling.timestep_spacing == "trailing")
    for text in (name, *(file.metadata.get(key, "") for key in NAMES)):
        text = _CAMEL.sub("_", text).lower().replace("dmd2", "lcm")
        kinds, count = _KINDS.findall(text), _COUNT.search(text)
        steps = int(count[1]) if count and int(count[1]) else None
        kind = next((k for k in kinds if steps or k in ("lcm", "tcd")
                     or (k == "turbo" and (own or _BASE.search(text)))), None)
        if kind is not None and scheduler.METADATA not in file.metadata:
            package.sampling = s = _sampling(package.sampling, kind, steps, text)
            how = s.sampler + (" on trailing timesteps" if s.sampler == "ddim" else "")
            free = "" if s.guided or package.unet.config.guidance_dim else ", without guidance"
            package.notes.append(f"{file.path.name} is of few steps by its name or metadata ({kind}): "
                                 f"sampled by {how}, in {s.steps} steps{free}, unless a run says otherwise")
            return


def _name(path: Path, trailing: bool) -> str:
    """What a model or an add-on is called: by its file, and by its repository in the Hub's cache. Names of
    other folders of models tell nothing, since their scheduler configs do; but of Turbo's, these say no more
    than trailing timesteps."""
    cached = cached_name(path)
    if not path.is_dir() and path.stem not in FIXED:
        return f"{cached or ''} {path.stem}".strip()
    if cached is not None:
        return cached
    if path.is_dir():
        return path.name if trailing else ""
    return path.parent.name


def _sampling(sampling: Sampling, kind: str, steps: int | None, text: str) -> Sampling:
    """On the timesteps that the steps were distilled at."""
    made_for = replace(sampling, few_steps=kind, steps=steps or FEW, guided=False)
    if (kind, steps) == ("lightning", 1) and "x0" in text and sampling.why == FAMILY_RULE:
        made_for = replace(made_for, prediction="x0", why="its name")
    if kind in ("lcm", "tcd") or (kind, steps) == ("hyper", 1):   # Hyper's one step is TCD's
        return replace(made_for, sampler="lcm" if kind == "lcm" else "tcd")
    return replace(made_for, sampler="ddim", timestep_spacing="trailing", final_alpha=1.0,
                   guided=kind == "hyper" and "cfg" in text)

"""Noise schedules, and their configs in diffusers folders (scheduler_config.json)."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2p.weights import fields
from p2p.weights.errors import CheckpointError
from p2p.weights.files import TensorFile

# diffusers' words for predictions
PREDICTION_NAMES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SPACINGS = ("leading", "trailing", "linspace")

# Classes over the same noise schedule: any model of one of them can be sampled by DDIM.
ALIKE = {f"{name}Scheduler" for name in (
    "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
    "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver", "IPNDM")}
DISTILLED = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}   # of models that these steps were distilled into
FLOW = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = ((256, 0.5), (4096, 1.15))   # of FLUX.1 dev, see `Flow`
OTHERS = {
    "EDMEulerScheduler": "of an EDM model, whose noise levels this project does not know",
    "EDMDPMSolverMultistepScheduler": "of an EDM model, whose noise levels this project does not know",
    "FlowMatchEulerDiscreteScheduler": "of a flow model, which predicts velocities between picture and noise",
    "FlowMatchHeunDiscreteScheduler": "of a flow model, which predicts velocities between picture and noise",
}


KINDS = ("lcm", "tcd", "lightning", "hyper", "turbo")   # of models of few steps


@dataclass(frozen=True)
class Flow:
    """How a flow's noise levels are spaced, see `p2p.request.schedules.flow_schedule`."""

    shift: float = 1.0
    twice: bool = False   # the last of the levels is shifted too, before they are spaced (Stable Diffusion 3)
    # FLUX.1 dev: logarithms of the shift at a number of tokens: (tokens, log shift) twice, linear between
    dynamic: tuple[tuple[float, float], tuple[float, float]] | None = None


@dataclass
class Sampling:
    """How a model is sampled, as far as its files say. The defaults are Stable Diffusion's."""

    alphas_cumprod: Tensor                         # (1000,) float64; of a flow, (0,)
    prediction: str = "eps"
    why: str = "scheduler_config.json"
    timestep_spacing: str = "leading"              # see `p2p.request.schedules.ddim_schedule`
    offset: int = 1                                # see `ddim_schedule`
    final_alpha: float | None = None               # see `ddim_schedule`
    clip: float | tuple[float, float] | None = None    # bound of x_0, see `p2p.sampler.bounded`
    learned_variance: bool = True                  # of the channels beyond eps, where there are any
    sampler: str = "ddim"                          # or "lcm", "tcd"
    flow: Flow | None = None                       # of models that predict velocities; no alphas_cumprod
    notes: list[str] = field(default_factory=list)
    few_steps: str | None = None                   # the kind of a model of few steps, see `few_steps`,
    steps: int | None = None                       # ... how many
    guided: bool = False                           # ... and whether with guidance


def scaled_linear(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """alphas_cumprod of Stable Diffusion's schedule.  -> (steps,) float64"""
    return torch.cumprod(1 - torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2, dim=0)


def squared_cosine(steps: int = 1000) -> Tensor:
    """alphas_cumprod of the cosine schedule, its betas at most 0.999 (Nichol and Dhariwal 2021, Eq. 17).

    -> (steps,) float64
    """
    f = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), dim=0)


def zero_terminal_snr(abar: Tensor) -> Tensor:
    """Rescales the schedule so that the last step is pure noise (Lin et al. 2023, Algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def read(where: Path, c: Mapping[str, Any], family: str, kind: str | None = None) -> Sampling:
    """The sampling by the config c of the file `where`. kind: the class that model_index.json names, which
    takes precedence, as in diffusers. Raises CheckpointError for what this project does not support.

    Absent fields have the defaults of diffusers' DDIMScheduler, but for the betas (the family's). In Stable
    Diffusion 1 and 2 the offset is 1 and clip_sample false, whatever the config says, as in
    StableDiffusionPipeline.
    """
    fields.check(where, c, fields.SCHEDULER)
    notes: list[str] = []
    sampler = "DDPM" if family == "if" else "DDIM"
    own_class = check_class(where, c.get("_class_name"))
    used = kind or own_class or sampler
    distilled = DISTILLED.get(used)
    if distilled:
        for name, usual in (("original_inference_steps", 50), ("timestep_scaling", 10.0)):
            if c.get(name, usual) != usual:
                raise CheckpointError(f"{where}: {name} {fields.short(c[name])}; supported: {usual}.")
        notes.append(f"{distilled} samples (the folder's {used})")
    elif not used.startswith(sampler):
        notes.append(f"the folder's sampler is {used}; {sampler} samples here")
    abar = _alphas(where, c, family, notes)
    if c.get("rescale_betas_zero_snr"):
        abar = zero_terminal_snr(abar)
        notes.append("zero terminal SNR (scheduler config)")
    known = ("epsilon",) if family == "if" else tuple(PREDICTION_NAMES)
    prediction = _one_of(where, c, "prediction_type", "epsilon", known)
    spacing = _one_of(where, c, "timestep_spacing", "leading", SPACINGS)
    forced = family not in ("sdxl", "if")
    offset = c.get("steps_offset", 1 if forced else 0)
    if not isinstance(offset, Integral) or isinstance(offset, bool) or not 0 <= offset < len(abar):
        raise CheckpointError(f"{where}: steps_offset {fields.short(offset)}; a whole number from 0 to "
                              f"{len(abar) - 1} is expected.")
    if forced and offset != 1:
        notes.append("steps_offset 1 taken, as in StableDiffusionPipeline, not the scheduler config's "
                     f"{offset}")
        offset = 1
    if forced and c.get("clip_sample"):
        notes.append("clip_sample false taken, as in StableDiffusionPipeline, not the scheduler config's "
                     "true")
    final = 1.0 if family == "if" or c.get("set_alpha_to_one", True) else None
    learned = c.get("variance_type") == "learned_range"
    if family == "if":   # which is sampled by DDPM; DDIM reads none
        _one_of(where, c, "variance_type", "fixed_small", ("learned_range", "fixed_small", None))
    few = few_steps(where, c)
    if few:
        notes.append(f"of few steps ({few['few_steps']}, by its scheduler config): sampled in {few['steps']}"
                     f"{'' if few['guided'] else ', without guidance'}, unless a run says otherwise")
    return Sampling(abar, PREDICTION_NAMES[prediction], "scheduler_config.json", spacing, int(offset), final,
                    _clip(where, c, family), learned, distilled or "ddim", notes=notes,
                    **few)


def few_steps(where: Path, c: Mapping[str, Any]) -> dict[str, Any]:
    """What `config` wrote of a model of few steps, if it is one. Raises CheckpointError."""
    if (told := c.get("_few_steps")) is None:
        return {}
    kinds = {"few_steps": str, "steps": int, "guided": bool}
    if not isinstance(told, dict) or {name: type(value) for name, value in told.items()} != kinds \
            or not 1 <= told["steps"] <= 1000 or told["few_steps"] not in KINDS:
        raise CheckpointError(f"{where}: _few_steps {fields.short(told)}; a kind (few_steps), a number of "
                              "steps and whether they are guided are expected.")
    return told


def read_flow(where: Path, c: Mapping[str, Any], family: str, kind: str | None = None) -> Sampling:
    """The sampling of a flow by the config c of the file `where`; absent fields have the defaults of
    diffusers' class. kind: as in `read`. Raises CheckpointError.

    StableDiffusion3Pipeline spaces the levels between the ends of the scheduler's table, which has been
    shifted already unless the shift is dynamic; FluxPipeline from 1 to 1 / N.
    """
    check_class(where, kind if kind is not None else c.get("_class_name"), flow=True)
    fields.check(where, c, fields.FLOW_SCHEDULER)
    dynamic = bool(c.get("use_dynamic_shifting"))
    (least, low), (most, high) = DYNAMIC
    usual = {"base_image_seq_len": least, "base_shift": low, "max_image_seq_len": most, "max_shift": high}
    given = {name: c.get(name, value) for name, value in (usual if dynamic else {"shift": 1.0}).items()}
    first, *others = given.values()
    if not all(map(_number, (first, *others))) or (first >= others[1] if dynamic else first <= 0):
        said = ", ".join(f"{name} = {fields.short(value)}" for name, value in given.items())
        raise CheckpointError(f"{where}: {said}; a shift above 0 is expected, of a dynamic one more tokens "
                              "at the maximum than at the base.")
    if not dynamic:
        return flow(Flow(float(first), twice=family == "sd3"), "scheduler_config.json")
    low, most, high = map(float, others)
    return flow(Flow(twice=family == "sd3", dynamic=((float(first), low), (most, high))),
                "scheduler_config.json")


def flow(levels: Flow, why: str) -> Sampling:
    """The sampling of a model that predicts velocities: it has no table of alphas."""
    return Sampling(torch.empty(0, dtype=torch.float64), "flow", why, flow=levels)


def stored(file: TensorFile) -> Tensor:
    """A single file's own noise schedule, or the usual one that it has in less than double precision.
    -> (1000,) float64. Raises CheckpointError."""
    table = file["alphas_cumprod"]
    abar = table.double()
    if table.dtype in (torch.float32, torch.float16, torch.bfloat16) and abar.shape == (1000,):
        eps = torch.finfo(table.dtype).eps
        for known in (scaled_linear(), zero_terminal_snr(scaled_linear())):
            if torch.allclose(abar, known, rtol=eps, atol=eps / 64):
                return known
    # NaN fails it too
    if abar.shape != (1000,) or not (abar.diff() < 0).all() or not 0 <= abar[-1] <= abar[0] < 1:
        raise CheckpointError(f"{file.path}: alphas_cumprod, of shape {list(abar.shape)}, is no noise "
                              "schedule: 1000 numbers that fall from below 1 to at least 0 were expected.")
    return abar


def _one_of(where: Path, c: Mapping[str, Any], name: str, usual: str,
            known: tuple[str | None, ...]) -> str:
    if (value := c.get(name, usual)) not in known:
        names = ", ".join(filter(None, known))
        raise CheckpointError(f"{where}: {name} {fields.short(value)}; supported: {names}.")
    return value


def check_class(where: Path, kind: Any, flow: bool = False) -> str | None:
    """A scheduler's class, as the file `where` names it. Raises CheckpointError for those not in ALIKE, of a
    flow model for those but `FLOW`."""
    named = isinstance(kind, str)
    if flow and kind not in (None, FLOW):
        raise CheckpointError(f"{where}: {fields.short(kind)}; of a flow model {FLOW} is supported.")
    if not flow and kind is not None and not (named and kind in (*ALIKE, *DISTILLED)):
        why = OTHERS.get(kind, "which this project does not know") if named else "which is no name"
        raise CheckpointError(f"{where}: {fields.short(kind)}, {why}. DDIM (of IF: DDPM) samples here: if "
                              "that is what you want, put that file of the base model in its place.")
    return kind


def _alphas(where: Path, c: Mapping[str, Any], family: str, notes: list[str]) -> Tensor:
    if (betas := c.get("trained_betas")) is not None:
        many = isinstance(betas, list) and len(betas) == 1000
        if not many or not all(_number(b) and 0 < b <= 1 for b in betas):
            raise CheckpointError(f"{where}: trained_betas {fields.short(betas)}; 1000 numbers above 0 and "
                                  "at most 1 are expected.")
        return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)
    usual = "squaredcos_cap_v2" if family == "if" else "scaled_linear"
    if (schedule := c.get("beta_schedule", usual)) != usual:
        raise CheckpointError(f"{where}: beta_schedule {fields.short(schedule)}; supported for this family: "
                              f"{usual}, or trained_betas.")
    if family == "if":
        return squared_cosine()
    wanted = {"beta_start": 0.00085, "beta_end": 0.012}
    if absent := [name for name in ("beta_schedule", *wanted) if name not in c]:
        notes.append(f"the scheduler config lacks {', '.join(absent)}: Stable Diffusion's taken")
    start, end = (c.get(name, value) for name, value in wanted.items())
    if not _number(start) or not _number(end) or not 0 < start < end < 1:
        raise CheckpointError(f"{where}: betas from {fields.short(start)} to {fields.short(end)} are no "
                              "noise schedule.")
    return scaled_linear(start, end)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _clip(where: Path, c: Mapping[str, Any], family: str) -> float | tuple[float, float] | None:
    """The bound of x_0: as the config says for pixels, none for latents. Raises CheckpointError."""
    if family != "if":
        for name in ("thresholding", *(["clip_sample"] if family == "sdxl" else [])):
            if c.get(name):
                raise CheckpointError(f"{where}: {name} = {fields.short(c[name])}, a bound of x_0, which "
                                      "latents do not have.")
        return None
    if c.get("thresholding"):
        bound: Any = (c.get("dynamic_thresholding_ratio", 0.995), c.get("sample_max_value", 1.0))
    else:
        bound = c.get("clip_sample_range", 1.0) if c.get("clip_sample", True) else None
    numbers = bound if isinstance(bound, tuple) else (0, 1.0 if bound is None else bound)
    if not all(map(_number, numbers)) or not 0 <= numbers[0] <= 1 or not numbers[1] > 0:
        raise CheckpointError(f"{where}: x_0 is bounded by {fields.short(bound)}; a share and a positive "
                              "number are expected.")
    return bound


def config(s: Sampling) -> dict[str, Any]:
    """The scheduler_config.json of a sampling without a bound of x_0."""
    if s.flow is not None:
        (least, low), (most, high) = s.flow.dynamic or DYNAMIC
        return {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": s.flow.shift,
                "use_dynamic_shifting": s.flow.dynamic is not None, "base_shift": low, "max_shift": high,
                "base_image_seq_len": int(least), "max_image_seq_len": int(most)}
    names = {v: k for k, v in PREDICTION_NAMES.items()}
    classes = {sampler: name for name, sampler in DISTILLED.items()}
    out = {"_class_name": classes.get(s.sampler, "DDIMScheduler"), "beta_start": 0.00085, "beta_end": 0.012,
           "beta_schedule": "scaled_linear", "clip_sample": False, "num_train_timesteps": 1000,
           "prediction_type": names[s.prediction], "set_alpha_to_one": s.final_alpha is not None,
           "steps_offset": s.offset}
    if s.few_steps:
        out["_few_steps"] = {"few_steps": s.few_steps, "steps": s.steps, "guided": s.guided}
    if s.timestep_spacing != "leading":
        out["timestep_spacing"] = s.timestep_spacing
    abar, usual = s.alphas_cumprod, scaled_linear()
    if torch.allclose(abar, zero_terminal_snr(usual), rtol=0, atol=1e-9):
        out["rescale_betas_zero_snr"] = True
    elif not torch.allclose(abar, usual, rtol=0, atol=1e-9):
        out["trained_betas"] = (1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).tolist()
    return out


METADATA = "p2p.scheduler_config"


def metadata(s: Sampling) -> dict[str, str]:
    """The scheduler's config for the header of a single file: it counts before the file's name."""
    return {METADATA: json.dumps(config(s))}

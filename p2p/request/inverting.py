"""The request for an inversion: all of it that can be checked, or decided, before the network runs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from p2p.errors import UsageError
from p2p.model import Model
from p2p.request.checks import choice, finite, share, whole
from p2p.request.emphasis import notes as weight_notes
from p2p.request.emphasis import parsed, prompt_tokens
from p2p.request.loading import check_alone
from p2p.request.memory import check_run
from p2p.request.negative import negatives, refuse_replaced
from p2p.request.prompts import check as check_prompt
from p2p.request.schedules import Schedule, check_schedule, timestep_tuple
from p2p.request.source import AVERAGED, METHODS, OFFSET, OWN, REPLACE_EMPTY, WITH_ETA, Inversion
from p2p.request.start import Sampling, check_seed, guidance, late_start, not_distilled, own_sampler, solver
from p2p.sampler import BELM_FROM_NOISE
from p2p.weights.untrusted import brief

READ_BY = {   # settings that only some methods read; the others refuse them
    "inversion_guidance": tuple(m for m in METHODS if m != "noise"),
    "inner_steps": ("fixed-point", "null-text"),
    "eta": WITH_ETA,
    "seed": ("noise", *OFFSET, "rf-inversion"),
    **{name: (method,) for name, method in OWN.items()},
}
# `benchmarks.paired`: of eight the nearest to the true edits, with the fewest rows but noise's
DEFAULT = "edit-friendly"
# default share of the steps left out: 12 of 50, as in PIE-Bench runs; 17 of 50, as for Stable Diffusion 3
SKIPPED = {"edit-friendly": 0.24, "flow-edit": 0.34}
# the authors' defaults: of rf-inversion, which inverts without the prompt, and of flow-edit
DEFAULTS = {"rf-inversion": {"gamma": 0.5, "control": 0.9, "control_steps": 0.25},
            "flow-edit": {"n_avg": 1, "n_min": 0}}
GUIDANCE = {"rf-inversion": 0.0}    # while inverting, 1 for the other methods
KARRAS = "karras is of the sampler dpm++, by which no picture is sampled"
UP_BY_DDIM = ("ddim", "fixed-point", "negative-prompt", "null-text", "direct")   # inverted by its formula
INNER_STEPS = {"fixed-point": 5, "null-text": 10}


def settings_read(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `invert` among these that the method reads."""
    return {name: value for name, value in settings.items() if method in READ_BY.get(name, METHODS)}


def settings_recorded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `invert` in an inversion's record, to make it again. Raises KeyError, and UsageError
    where one is missing on which its tensors depend: no default is assumed for it."""
    needed = ("steps", "skip", "guidance_scale", "inversion_guidance", "eta", "seed")
    # older versions did not record these
    later = ("inner_steps", "final_alpha", "negative_prompt", "timestep_spacing", "timesteps", *OWN)
    settings = settings_read(record["method"], {name: record.get(name) for name in (*needed, *later)})
    if lost := [name for name in needed if settings.get(name, 0) is None]:
        raise UsageError(f"its inversion's record does not say its {', '.join(lost)}, on which the pixels "
                         "depend: they cannot be made again; edit the picture again, with --image")
    return settings


def expected(model: Model, prompt: str, *, method: str = DEFAULT, steps: int | None = None,
             skip: int | None = None, guidance_scale: float | None = None,
             inversion_guidance: float | None = None, inner_steps: int | None = None,
             eta: float | None = None, seed: int | None = None, final_alpha: float | None = None,
             negative_prompt: str | None = None, sampler: str | None = None,
             timestep_spacing: str | None = None, timesteps: Sequence[int] | None = None,
             height: int | None = None, width: int | None = None, fit: str = "crop", encodes: bool = True,
             **own: float | None) -> Inversion:
    """The inversion that `invert` makes with these settings, its latents without values (on torch's "meta"
    device). height, width: of the picture as fitted. encodes: it is not given as latents. own: `source.OWN`.
    Raises UsageError."""
    choice("inversion method", method, METHODS)
    _check_read(method, inversion_guidance=inversion_guidance, inner_steps=inner_steps, eta=eta, seed=seed,
                **own)
    _check_model(model, method)
    notes = _check_prompts(model, prompt, negative_prompt)
    shape = model.latent_shape(height, width)
    steps = _steps(model, method, steps, sampler, timestep_spacing, timesteps)
    guidance_scale = guidance(model, guidance_scale)
    inversion_guidance = finite("inversion_guidance", _guidance(method, inversion_guidance))
    notes += _leads_nowhere(model, method, inversion_guidance, prompt, negative_prompt)
    _check_negative(model, method, negative_prompt, inversion_guidance)
    inner_steps = INNER_STEPS.get(method, 1) if inner_steps is None else inner_steps
    inner_steps = whole("inner_steps", inner_steps, most=10**6)
    seed, eta = check_seed(0 if seed is None else seed), _above_0("eta", 1 if eta is None else eta)
    skip = int(SKIPPED.get(method, 0) * steps) if skip is None else skip
    skip = whole("skip, which leaves steps to run,", skip, 0, steps - 1)
    ddpm, fresh = method in WITH_ETA, method in OFFSET   # noise, and what is stored besides the latents
    planned = Inversion(prompt, method, torch.empty(0), steps, skip, guidance_scale, inversion_guidance,
                        inner_steps if method in INNER_STEPS else None, eta if ddpm else 0.0,
                        seed if method in READ_BY["seed"] else None, model.family, model.prediction,
                        model.sha256, fit=fit, final_alpha=_final(model, final_alpha),
                        timestep_spacing=timestep_spacing, timesteps=timestep_tuple(timesteps),
                        overrides=model.overrides, negative_prompt=negative_prompt,
                        **_own(method, steps - skip, own))
    schedule = schedule_of(model, planned, shape[1:])
    if method == "belm" and not schedule.levels[skip].alpha > 0:
        raise UsageError(BELM_FROM_NOISE)
    rows = 0 if method == "noise" else 1 + guided(model, inversion_guidance)
    check_run(model, 1, shape, planned.calls, rows=rows, autoencoder="encodes" if encodes else None,
              noises=1 + planned.calls * fresh, stored=(2 + fresh) * (planned.calls + 1))
    notes += _remarks(model, planned, schedule)
    if method == "null-text" or model.unet.reads_guidance:   # else an edit's scale may be another
        notes += unguided(model, method, guidance_scale)
    return replace(planned, latents=torch.empty(planned.calls + 1, *shape, device="meta"), notes=tuple(notes))


def negative_read(model: Model, method: str, inversion_guidance: float | None,
                  negative_prompt: str | Sequence[str] | None) -> str | None:
    """Of a run's negative prompts the source's, where an inversion with these settings reads it."""
    if not reads_negative(model, method, inversion_guidance):
        return None
    each = negatives(negative_prompt, 1)
    return (each[0] or None) if each else None


def reads_negative(model: Model, method: str, inversion_guidance: float | None) -> bool:
    """Whether an inversion with these settings leads away from, or is made under, a negative prompt."""
    alone = _guidance(method, inversion_guidance) == 0
    return leads_away(method, inversion_guidance) and (alone or not model.unet.reads_guidance)


def leads_away(method: str, inversion_guidance: float | None) -> bool:
    """Whether an inversion is guided, or made without its prompt, on models that read an empty one."""
    return _guidance(method, inversion_guidance) != 1 and method not in (*REPLACE_EMPTY, "noise")


def _guidance(method: str, given: float | None) -> float:
    return GUIDANCE.get(method, 1.0) if given is None else given


def guided(model: Model, guidance_scale: float) -> bool:
    """Whether the network runs two rows a step: at 0 the empty or negative prompt stands alone."""
    return guidance_scale != 0 and model.guided(guidance_scale)


def _check_model(model: Model, method: str) -> None:
    """Raises UsageError for a model that the method does not invert."""
    check_alone(model)
    if method != "ddcm":
        not_distilled(model, f"{method} inverts", "ddcm, or ")
    if method == "null-text" and model.unet.reads_guidance:
        raise UsageError(f"null-text: {model.name} was distilled with its guidance and reads no empty prompt "
                         "that could be optimised; invert by another method")


def _final(model: Model, final_alpha: float | None) -> float | None:
    """Raises UsageError unless a picture can be at that level."""
    if final_alpha is not None and model.flow is not None:
        raise UsageError("final_alpha: a flow ends at the clean picture; leave it out")
    return None if final_alpha is None else _above_0("final_alpha", final_alpha)


def _above_0(name: str, value: float) -> float:
    if (value := share(name, value)) == 0:
        raise UsageError(f"{name} must lie above 0 and be at most 1, not 0")
    return value


def _steps(model: Model, method: str, steps: int | None, sampler: str | None, timestep_spacing: str | None,
           timesteps: Sequence[int] | None) -> int:
    """How many. Raises UsageError for a sampler that is not the inversion's, and for timesteps that are not
    known."""
    own = own_sampler(model)
    check_schedule(own if sampler is None else sampler, timestep_spacing, timesteps)
    if sampler not in (None, own):
        raise UsageError(f"sampler {brief(sampler)}: a picture is inverted by its method, {method}, "
                         f"and its edits are sampled by {own}; leave it out")
    if timestep_spacing == "karras":
        raise UsageError(f"timestep_spacing: {KARRAS}; leave it out")
    _, steps, _ = solver(model, Sampling(steps, sampler=own, timestep_spacing=timestep_spacing,
                                         timesteps=timesteps))
    return model.schedule(steps, own, timestep_spacing, timesteps).steps   # raises for too many


def schedule_of(model: Model, inversion: Inversion, size: Sequence[int]) -> Schedule:
    """Of an inversion and its edits. size: height and width of the latents. Of a sampler of few steps the
    timesteps alone count here."""
    schedule = model.schedule(inversion.steps, own_sampler(model), inversion.timestep_spacing,
                              inversion.timesteps, size=size)
    return replace(schedule, lower=()).ending(inversion.final_alpha)


def _own(method: str, run_steps: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of this method alone. Raises UsageError."""
    own = DEFAULTS.get(method, {}) | {name: value for name, value in given.items() if value is not None}
    for name in ("gamma", "control", "control_steps"):
        if name in own:
            own[name] = share(name, own[name])
    if "n_avg" in own:
        own |= {"n_avg": whole("n_avg", own["n_avg"], most=AVERAGED),
                "n_min": whole("n_min", own["n_min"], 0, run_steps)}
    return own


def _remarks(model: Model, planned: Inversion, schedule: Schedule) -> list[str]:
    """Notes on a control of edits that covers none of their steps, a bound that is not kept, a negative
    prompt that stands alone, a step that leads nowhere, and a late start that nobody asked for."""
    notes = late_start(model, schedule) if planned.timesteps is None else []
    if planned.method in UP_BY_DDIM and model.flow is None and not schedule.levels[planned.skip].alpha > 0:
        # the network reads its input as the noise that it looks for
        notes.append(f"{planned.method} inversion: its last step leads to nothing but noise (zero terminal "
                     "SNR), where DDIM's formula stands still; skip 1 leaves that step out")
    if planned.control and planned.control_calls == 0:
        notes.append(f"control changes nothing: control_steps {planned.control_steps:g} covers none of the "
                     f"{planned.calls} steps")
    if planned.method == "belm" and model.clip:
        notes.append("belm leaves out the bound that this model sets to its pictures (clip)")
    if planned.negative_prompt and planned.inversion_guidance == 0:
        notes.append("inversion_guidance 0: the picture is inverted under the negative prompt alone")
    return notes


def _check_prompts(model: Model, prompt: str, negative_prompt: str | None) -> list[str]:
    """Notes. Raises UsageError for what is not a prompt, and for weights on parts of words."""
    notes = check_prompt(prompt)
    for each in filter(None, (prompt, negative_prompt)):
        weight_notes(model, each)
    return notes


def _check_negative(model: Model, method: str, negative_prompt: str | None,
                    inversion_guidance: float) -> None:
    """Raises UsageError for a negative prompt that the method does not read."""
    if negative_prompt is None:
        return
    check_prompt(negative_prompt)
    refuse_replaced(method)
    if reads_negative(model, method, inversion_guidance):
        return
    if model.unet.reads_guidance:
        raise UsageError(f"negative_prompt: {why_unguided(model)}; leave it out")
    raise UsageError("negative_prompt: nothing leads away from it while a picture is inverted without "
                     "guidance; give inversion_guidance too, or give it to the edits")


def _check_read(method: str, **settings: object) -> None:
    """Raises UsageError for settings that this method does not read."""
    for name, value in settings.items():
        if name not in READ_BY:
            raise UsageError(f"{name}: no setting of an inversion")
        if value is not None and method not in READ_BY[name]:
            raise UsageError(f"{name}: {method} inversion does not read it (read by "
                             f"{', '.join(READ_BY[name])}); leave it out")


def _leads_nowhere(model: Model, method: str, inversion_guidance: float, prompt: str,
                   negative_prompt: str | None) -> list[str]:
    """A note where the network reads the prompt as it reads the one that guidance leads away from."""
    if inversion_guidance == _guidance(method, None) or not model.guided(inversion_guidance):
        return []
    zeros = model.zero_negative and not negative_prompt   # in place of the empty prompt
    both = prompt, negative_prompt or ""
    ids, other_ids = (prompt_tokens(model, each).ids for each in both)
    if zeros or ids != other_ids or not all(parsed(model, each).plain for each in both):
        return []
    return ["inversion_guidance changes nothing: the prompt is what it leads away from"]


def why_unguided(model: Model) -> str:
    """Why a run reads no empty prompt, where it is not guided."""
    if model.unet.reads_guidance:
        return f"{model.name} reads guidance as a number, and no empty prompt"
    if not model.text_encoders:
        return f"{model.name} reads no text"
    return "at guidance_scale 1 there is no guidance"


def unguided(model: Model, method: str, guidance_scale: float) -> list[str]:
    """A note where an inversion replaces the empty prompt, and nothing reads it."""
    if method not in REPLACE_EMPTY or model.guided(guidance_scale):
        return []
    return [f"{method} inversion changes nothing: what it puts in place of the empty prompt is not read; "
            f"{why_unguided(model)}"]

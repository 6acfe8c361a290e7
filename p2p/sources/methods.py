"""Inversion: from a real picture and its prompt to the latents from which it is edited.

Every method returns an `Inversion`: the latents of the picture at each noise level, and what keeps sampling
near them.

    noise            forward diffusion (DDPM Eq. 4), to a chosen step; sampling finds its own way back (paper,
                     figure 12)
    ddim             DDIM run backwards without guidance (paper, figures 10 and 11)
    fixed-point      ddim, with each step solved for instead of guessed (as in ReNoise and AIDI)
    belm             a two-step sampler that runs backwards exactly (Wang et al. 2024, O-BELM), without the
                     bound that a model of pixels sets to the picture, as in its authors' code
    negative-prompt  ddim; the source prompt in place of the empty one (Miyake et al. 2023)
    null-text        ddim; the empty prompt's embedding optimised step by step (Mokady et al. 2022)
    direct           ddim; the source is reset to its latents after every step (Ju et al. 2023)
    edit-friendly    independent noise at every level; what the network misses is added to all rows, and the
                     source is reset to its latents as in direct (Huberman et al. 2023)
    turbo-edit       edit-friendly for few steps: the latents of a step have the noise of the next one
                     (Deutch et al. 2024; their runs: steps 5, skip 1, and edits with guidance_scale 1.5 away
                     from a negative_prompt, the source's; none of these is the default here)

In a flow's coordinates, which every model has (see `sampler.velocity` and `solvers`):

    uni-inv          Euler's rule, at the velocity of where it leads, guessed by that of the step before (Jiao
                     et al. 2025); edits sample by DDIM
    rf-solver        the midpoint rule, up and down (Wang et al. 2024)
    fireflow         the same, reusing the last midpoint's velocity: one call a step (Deng et al. 2024)
    rf-inversion     drawn to noise on the way up, by `gamma`, and to the picture on the way down, by
                     `control` in the first `control_steps` (Rout et al. 2024)
    flow-edit        no inversion: fresh noise at every step, and the difference of the velocities of source
                     and target (Kulikov et al. 2024, FlowEdit), here on top of Prompt-to-Prompt's injection:
                     as published with windows of 0. inversion_guidance and guidance_scale are the source's
                     and the target's; n_max is what skip leaves
    ddcm             fresh noise at every step, and the difference of the predicted pictures (Xu et al. 2023,
                     InfEdit): for few steps too
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from p2p.denoise import too_large
from p2p.errors import NumericsError, UsageError
from p2p.image import fit as fit_picture
from p2p.model import Model
from p2p.models.conditioning import Conditioning
from p2p.request.checks import flag
from p2p.request.emphasis import condition
from p2p.request.inverting import DEFAULT, expected, schedule_of
from p2p.request.loading import find_model
from p2p.request.ready import empty_prompts
from p2p.request.schedules import Level
from p2p.request.solvers import asked, descent
from p2p.request.source import OFFSET, WITH_ETA, Inversion
from p2p.request.start import check_latents, check_values, draw, fitting
from p2p.sampler import belm_step_up, ddim_step, guide, stepper, x0_and_eps
from p2p.sources import flows
from p2p.sources.given import Run


def invert(model: Model | str | Path, picture: Image.Image | str | Path | Tensor, prompt: str, *,
           method: str = DEFAULT, steps: int | None = None, skip: int | None = None,
           guidance_scale: float | None = None, inversion_guidance: float | None = None,
           inner_steps: int | None = None, eta: float | None = None, seed: int | None = None,
           final_alpha: float | None = None, negative_prompt: str | None = None, sampler: str | None = None,
           timestep_spacing: str | None = None, timesteps: Sequence[int] | None = None,
           gamma: float | None = None, control: float | None = None, control_steps: float | None = None,
           n_avg: int | None = None, n_min: int | None = None, height: int | None = None,
           width: int | None = None, fit: str | None = None, progress: bool = False) -> Inversion:
    """Inverts a picture that the prompt describes.

    picture: also its file, or latents (1, C, H, W). fit: how it comes to height x width: "crop" (None) or
    "pad", see `image.fit`, or "own": to the nearest size of its own shape that the model takes. method: see
    above. steps: None for the model's. skip: those left out at the noisy end (0; of edit-friendly 0.24 of
    them, of flow-edit 0.34). guidance_scale: of the edits to come (null-text is optimised for it); None for
    the model's own; 0 is taken as 1. inversion_guidance: while inverting, 1 where None (not noise, which
    predicts nothing); 0 (rf-inversion's default): under negative_prompt, or the empty one, instead of the
    prompt. inner_steps: of null-text's optimiser (10) or fixed-point's solver (5). eta: of edit-friendly and
    turbo-edit, 1 for DDPM. seed: of the noise that is drawn, 0 where None. final_alpha: alphas_cumprod at
    which the picture is taken to be; None for the model's (Stable Diffusion: that of its first timestep,
    where it was trained to end), 1 for a picture without noise, as in O-BELM's code. negative_prompt: what
    inversion_guidance leads away from; also of the edits to come, unless they have their own.
    timestep_spacing, timesteps: of the inversion and its edits, as in `Sampling`; sampler: the one that both
    have anyway, "ddim" ("lcm" or "tcd" of a model distilled for it). gamma, control, control_steps: shares,
    of rf-inversion (0.5, 0.9, 0.25). Of flow-edit: n_avg noises a step (1); the last n_min steps (0) sample
    without the source. What is not read is refused. Raises as `edit` does.
    """
    model, fit_mode, fitted = find_model(model), "crop" if fit is None else fit, None
    flag("progress", progress)
    picture, (height, width), cropped = _sized(model, picture, height, width, fit)
    planned = expected(model, prompt, method=method, steps=steps, skip=skip, guidance_scale=guidance_scale,
                       inversion_guidance=inversion_guidance, inner_steps=inner_steps, eta=eta, seed=seed,
                       final_alpha=final_alpha, negative_prompt=negative_prompt, sampler=sampler,
                       timestep_spacing=timestep_spacing, timesteps=timesteps, height=height, width=width,
                       fit=fit_mode, encodes=not isinstance(picture, Tensor), gamma=gamma, control=control,
                       control_steps=control_steps, n_avg=n_avg, n_min=n_min)
    if isinstance(picture, Tensor):
        x_0 = picture.to(model.device, torch.float64 if picture.dtype == torch.float64 else torch.float32)
    else:
        x_0 = model.encode(fitted := fit_picture(picture, (height, width), fit_mode))
    inversion = _inverted(_begun(model, x_0, planned, progress), planned)
    return replace(inversion, picture=fitted, notes=(*planned.notes, *cropped))


def _sized(model: Model, picture: Image.Image | str | Path | Tensor, height: int | None, width: int | None,
           fit: str | None) -> tuple[Image.Image | Tensor, tuple[int, int], list[str]]:
    """Latents, and the size of their picture; or see `fitting`. Raises UsageError."""
    if not isinstance(picture, Tensor):
        return fitting(model, picture, "crop" if fit is None else fit, height, width)
    if any(given is not None for given in (height, width, fit)):
        raise UsageError("height, width, fit: latents have their size; leave these out")
    check_latents("latents", check_values("latents", picture), (1,), model)
    return picture, (picture.shape[2] * model.shrink, picture.shape[3] * model.shrink), []


def _begun(model: Model, x_0: Tensor, planned: Inversion, progress: bool) -> Run:
    schedule = asked(model, schedule_of(model, planned, x_0.shape[2:]).after(planned.skip), planned)
    pixels = (x_0.shape[2] * model.shrink, x_0.shape[3] * model.shrink)
    text = condition(model, [planned.prompt], *pixels)
    null = empty_prompts(model, None, 1, pixels, planned.negative_prompt)
    with torch.no_grad():
        read = [model.read(each) for each in (null, text, Conditioning.cat([null, text]))]
    return Run(model, x_0, null, *read, schedule, progress)


def _inverted(run: Run, planned: Inversion) -> Inversion:
    """The planned inversion with its tensors. Raises NumericsError."""
    method, scale, null_context, offsets = planned.method, planned.inversion_guidance, None, None
    rows = 2 if run.guided(scale) else 1
    exactly = _explicit_where_small(run) if method == "null-text" else nullcontext()
    with torch.no_grad(), exactly:
        if method == "noise":
            latents, rows = _noised(run, planned.seed, independent=False), 0
        elif method in OFFSET:
            latents = _noised(run, planned.seed, independent=True, ahead=method == "turbo-edit",
                              shared=planned.n_min or 0)
            offsets = _offsets(run, latents, planned).cpu()
            rows *= run.schedule.steps - _unpredicted(planned)
        elif method == "belm":
            latents = _belm(run, scale)
            rows *= run.schedule.steps
        elif method in flows.METHODS:
            latents = flows.METHODS[method](run, planned)
            rows *= run.schedule.steps + (method == "uni-inv")
        else:
            solver = planned.inner_steps if method == "fixed-point" else 1
            latents = _ddim(run, scale, solver)
            rows *= run.schedule.steps * solver
    if not latents.isfinite().all():
        raise NumericsError(f"{method} inversion gave values that are not finite: {too_large(run.model)}")
    if method == "null-text":
        with _explicit_where_small(run):
            null_context, more = _null_text(run, latents, planned.guidance_scale, planned.inner_steps)
        rows += more
    return replace(planned, latents=latents.cpu(), rows=rows, null_context=null_context, offsets=offsets)


def _explicit_where_small(run: Run) -> AbstractContextManager:
    """Null-text inversion amplifies rounding: its loss is a small difference of latents, whose gradient Adam
    divides by its own size. Where the maps are small they are formed, which repeats the official code's
    numbers more closely."""
    small = run.x_0.shape[2] * run.x_0.shape[3] <= 32 * 32
    return sdpa_kernel(SDPBackend.MATH) if small else nullcontext()


def _ddim(run: Run, guidance_scale: float, iterations: int) -> Tensor:
    """DDIM Eq. 12 towards noise.  -> (T + 1, C, H, W)

    The noise of a step is predicted for the level it leads to, from the latents it comes from (as in the
    official code); with more iterations, from the latents it led to the last time: the fixed point
    undoes the step exactly.
    """
    x, latents = run.x_0, [run.x_0]
    for t, after, before in run.upwards():
        guess = x
        for _ in range(iterations):
            guess = run.lifted(x, run.predict(guess, t, guidance_scale), after, before, guess)
        x = guess
        latents.append(x)
    return torch.cat(latents)


def _belm(run: Run, guidance_scale: float) -> Tensor:
    """O-BELM backwards: the first step is DDIM's, and so is one that follows a step of no length (to a
    picture at the level of the first timestep); all others are exact inverses of `belm_step`.
    -> (T + 1, C, H, W)"""
    levels = run.schedule.levels[::-1]                                           # the picture's first
    latents = [run.x_0]
    for i, (t, after, before) in enumerate(run.upwards()):
        x = latents[-1]
        if i == 0 or levels[i] == levels[i - 1]:
            latents.append(run.lifted(x, run.predict(x, t, guidance_scale), after, before, x))
        else:
            out = run.predict(x, run.schedule.timesteps[::-1][i - 1], guidance_scale)   # of x's own level
            _, eps = x0_and_eps(x, out, before, run.model.prediction)
            latents.append(belm_step_up(latents[-2], x, eps, levels[i - 1], before, after))
    return torch.cat(latents)


def _noised(run: Run, seed: int, independent: bool, ahead: bool = False, shared: int = 0) -> Tensor:
    """Adds noise of every level to x_0 (DDPM Eq. 4); independent: a new sample at each level, but for the
    last `shared`, which have one. ahead: each has the level of the next cleaner one, and the last but one is
    x_0 too.  -> (T + 1, C, H, W)"""
    count = 1 + run.schedule.steps if independent else 1
    noise = [z.to(run.x_0) for z in draw(run.x_0.shape[1:], [seed], count)]
    latents = [run.x_0]
    for i, (_, level, after) in enumerate(list(run.schedule)[::-1], 1):
        z = noise[max(i, shared)] if independent else noise[0]
        alpha, sigma = after if ahead else level
        latents.append(alpha * run.x_0 + sigma * z)
    if ahead:
        latents[1] = run.x_0
    return torch.cat(latents)


NORM = 15.5 / 128   # of TurboEdit's last offset, per number: 15.5 for latents of 4 x 64 x 64


def _unpredicted(planned: Inversion) -> int:
    """How many of the last steps have no offset.

    Edit-friendly: one, as in the official code: there it would not be noise but the picture's detail, a ghost
    in every edit. FlowEdit: those that sample without the source.
    """
    return 1 if planned.method == "edit-friendly" else planned.n_min or 0


def _offsets(run: Run, latents: Tensor, planned: Inversion) -> Tensor:
    """The difference of what each step leads to and the next latents: of DDPM's steps, the edit-friendly
    noise times its scale.  -> (T, C, H, W)"""
    none, schedule, model = torch.zeros_like(run.x_0), run.schedule, run.model
    if planned.method in WITH_ETA:
        step = stepper(schedule, model.prediction, model.clip, planned.eta, [none] * schedule.steps)
    else:
        step = descent(model, planned, schedule)
    out = [none] * schedule.steps
    for i in range(schedule.steps - _unpredicted(planned)):
        x, wanted = latents[-1 - i][None], latents[-2 - i][None]
        predicted = run.predict(x, schedule.timesteps[i], planned.inversion_guidance)
        out[i] = wanted - step(i, x, predicted, None)[0]
    if planned.method == "turbo-edit":
        out[-1] = out[-1] * min(1.0, NORM * out[-1].numel()**0.5 / (out[-1].norm().item() or 1.0))
    return torch.cat(out)


def _null_text(run: Run, latents: Tensor, guidance_scale: float, inner_steps: int) -> tuple[Tensor, int]:
    """Optimises the empty prompt's embedding at every step so that sampling leads to the stored latents
    (Mokady et al. 2022, algorithm 1).

    Constants of the official code: Adam, rate 0.01 (1 - i / 100), at most `inner_steps` updates, stop at a
    squared error of 1e-5 + 2e-5 i.  -> (T, L, C), rows that the UNet computed
    """
    model, null = run.model, run.null
    context = null.context.to(torch.promote_types(null.context.dtype, torch.float32))
    contexts, rows = [], 0
    x = latents[-1:].to(run.x_0)
    scale = 2.0**16 if model.dtype == torch.float16 else 1.0   # the gradient of a mean is below its range

    def stepped(x: Tensor, uncond: Tensor, cond: Tensor, level: Level, after: Level) -> Tensor:
        x_0, eps = x0_and_eps(x, guide(uncond, cond, guidance_scale), level, model.prediction, model.clip)
        return ddim_step(x_0, eps, level, after)

    def unconditional(x: Tensor, t: int | float, context: Tensor) -> Tensor:
        return model.predict(x, t, null._replace(context=context.to(model.dtype)))[0]

    bar = tqdm(list(run.schedule), disable=not run.progress, leave=False, unit="step")
    for i, (t, level, after) in enumerate(bar):
        wanted = latents[-2 - i][None]
        with torch.no_grad():
            cond = run.predict(x, t)
        rows += 1
        context = context.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([context], lr=1e-2 * max(0.0, 1 - i / 100))
        with torch.enable_grad():
            for _ in range(inner_steps):
                loss = (stepped(x, unconditional(x, t, context), cond, level, after) - wanted).square().mean()
                optimizer.zero_grad()
                (loss * scale).backward()
                context.grad /= scale
                optimizer.step()
                rows += 1
                if loss.item() < 1e-5 + 2e-5 * i:
                    break
        with torch.no_grad():
            context = context.detach()
            x = stepped(x, unconditional(x, t, context), cond, level, after)
        rows += 1
        contexts.append(context.cpu())
        bar.set_postfix(loss=f"{loss.item():.1e}")
    return torch.cat(contexts), rows

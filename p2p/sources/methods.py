"""Real pictures: from a picture and its prompt to the latents (and what else it takes) from which it is edited.

Every method ends in an `Inversion`: the latents of the picture at each noise level, and what keeps sampling near them.

    noise            forward diffusion (DDPM Eq. 4), to a chosen step; sampling finds its own way back (paper, figure 12)
    ddim             DDIM run backwards without guidance (paper, figures 10 and 11)
    fixed-point      the same, each step solved for instead of guessed (as in ReNoise and AIDI)
    belm             a two-step sampler that runs backwards exactly (Wang et al. 2024, O-BELM)
    negative-prompt  ddim; the source prompt in place of the empty one (Miyake et al. 2023)
    null-text        ddim; the empty prompt's embedding optimised step by step (Mokady et al. 2022)
    direct           ddim; the source is put back on its latents after every step (Ju et al. 2023, PnP Inversion)
    edit-friendly    independent noise at every level; what the network misses is added to all rows, and the source is put
                     back on its latents as in direct (Huberman et al. 2023)
"""
from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from p2p.denoise import too_large
from p2p.errors import NumericsError, UsageError
from p2p.image import fit as fit_picture
from p2p.model import STEPS, Conditioning, Model
from p2p.request import checks
from p2p.request.loading import find_model
from p2p.request.memory import check_run
from p2p.request.prompts import check as check_prompt
from p2p.request.schedules import Schedule
from p2p.request.source import METHODS, Inversion
from p2p.request.start import check_latents, check_seed, draw, fitting, guidance, late
from p2p.sampler import BELM_FROM_NOISE, belm_step_up, ddim_step, guide, x0_and_eps

READ_BY = {   # settings that some methods alone read; the others refuse them
    "inversion_guidance": tuple(m for m in METHODS if m != "noise"),
    "inner_steps": ("fixed-point", "null-text"),
    "eta": ("edit-friendly",),
    "seed": ("noise", "edit-friendly"),
}
DEFAULT = "edit-friendly"                      # of `benchmarks.paired`: nearest to the true edits, with the fewest rows but noise's
SKIPPED = {"edit-friendly": 0.24}              # share of the steps left out, unless told: 12 of 50, as in its PIE-Bench runs


class _Run(NamedTuple):
    """What all methods share. Schedules run from noise to picture."""

    model: Model
    x_0: Tensor              # (1, C, H, W)
    null: Conditioning       # one row
    told: Conditioning       # the prompt, read once for all steps
    both: Conditioning       # the empty prompt before it, for guidance
    schedule: Schedule
    progress: bool

    def predict(self, x: Tensor, t: int, guidance_scale: float = 1.0) -> Tensor:
        """The network's output for one picture: one row, or two with guidance."""
        if guidance_scale == 1:
            return self.model.predict(x, t, self.told)[0]
        return guide(*self.model.predict(x.expand(2, -1, -1, -1), t, self.both)[0].chunk(2), guidance_scale)

    def upwards(self) -> Iterable[tuple[int, float, float]]:
        """(t, alphas_cumprod to go to, ... to come from), from the picture to the noise."""
        steps = list(self.schedule)[::-1]
        return tqdm(steps, disable=not (self.progress and sys.stderr.isatty()), leave=False, unit="step")


def settings_read(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these settings of `invert` that the method reads."""
    return {name: value for name, value in settings.items() if method in READ_BY.get(name, METHODS)}


def invert(model: Model | str | Path, picture: Image.Image | str | Path | Tensor, prompt: str, *, method: str = DEFAULT,
           steps: int = STEPS, skip: int | None = None, guidance_scale: float | None = None,
           inversion_guidance: float | None = None, inner_steps: int | None = None, eta: float | None = None,
           seed: int | None = None, final_alpha: float | None = None,
           height: int | None = None, width: int | None = None, fit: str | None = None, progress: bool = False) -> Inversion:
    """Inverts a picture that the prompt describes.

    picture: or its file; or latents (1, C, H, W). fit: how it comes to height x width: "crop" (where None) or "pad", see
    `image.fit`, or "own": to the size of its own shape that the model takes. method: see above. skip: steps left
    out at the noisy end (noise: 0, edit-friendly: 0.24 of them). guidance_scale: of the edits to come (null-text is
    made for it); None for the model's own, 0 for 1. inversion_guidance: while inverting, 1 where None (not noise, which predicts
    nothing); 0 is without the prompt here, as in PnPInversion's ablation.
    inner_steps: of the optimiser (null-text, 10) or the solver (fixed-point, 5). eta: edit-friendly, 1 for DDPM. seed: of the
    noise that noise and edit-friendly draw, 0 where None. final_alpha: alphas_cumprod at which the picture is taken to be; None
    for the model's own (Stable Diffusion: that of its first timestep, in which it was trained to end), 1 for none of the noise, as
    in O-BELM's code. A setting that a method does not read is refused. Raises UsageError, NumericsError.
    """
    model = find_model(model)
    checks.choice("inversion method", method, METHODS)
    given = {"inversion_guidance": inversion_guidance, "inner_steps": inner_steps, "eta": eta, "seed": seed}
    for name, value in given.items():
        if value is not None and method not in READ_BY[name]:
            raise UsageError(f"{name}: {method} inversion does not read it (read by {', '.join(READ_BY[name])}); leave it out")
    whole = model.schedule(checks.whole("steps", steps))
    if final_alpha is not None and checks.share("final_alpha", final_alpha) == 0:
        raise UsageError("final_alpha must lie above 0 and be at most 1, not 0")
    whole = whole.ending(final_alpha)
    guidance_scale = guidance(model, guidance_scale)
    inversion_guidance = checks.finite("inversion_guidance", 1 if inversion_guidance is None else inversion_guidance)
    inner_steps = None if inner_steps is None else checks.whole("inner_steps", inner_steps, most=10**6)
    seed, eta = check_seed(0 if seed is None else seed), checks.share("eta", 1 if eta is None else eta)
    checks.flag("progress", progress)
    if model.unet.config.low_channels:
        raise UsageError(f"{model.name} is a super-resolution stage: it enlarges the pictures of another model, see `upscale`")
    if isinstance(picture, Tensor) and any(given is not None for given in (height, width, fit)):
        raise UsageError("height, width, fit: latents have their size; leave these out")
    check_prompt(prompt)
    skip = checks.whole("skip, which leaves steps to run,", int(SKIPPED.get(method, 0) * steps) if skip is None else skip, 0,
                        steps - 1)
    if eta == 0:
        raise UsageError("eta must lie within 0 and 1, above 0, not 0")
    notes = late(model, whole)
    if not isinstance(picture, Tensor):
        fit = "crop" if fit is None else fit
        picture, size, cropped = fitting(model, picture, fit, height, width)
        notes += cropped
        _afford(model, size, steps - skip, method, inversion_guidance)
        kept = fit_picture(picture, size, fit)
        x_0 = model.encode(kept)
    else:
        check_latents("latents", picture, (1,), model)
        x_0, kept = picture.to(model.device), None
        x_0 = x_0 if x_0.dtype == torch.float64 else x_0.float()
        _afford(model, [side * model.shrink for side in x_0.shape[2:]], steps - skip, method, inversion_guidance)
    schedule = Schedule(whole.timesteps[skip:], whole.alphas[skip:])
    if method == "belm" and not schedule.alphas[0] > 0:
        raise UsageError(BELM_FROM_NOISE)
    pixels = (x_0.shape[2] * model.shrink, x_0.shape[3] * model.shrink)
    text, null = model.condition([prompt], *pixels), model.null(1, *pixels)
    with torch.no_grad():
        told, both = model.read(text), model.read(Conditioning.cat([null, text]))
    run = _Run(model, x_0, null, told, both, schedule, progress)
    null_context = offsets = None
    rows = 1 if inversion_guidance == 1 else 2
    exactly = _explicit_where_small(run) if method == "null-text" else nullcontext()
    with torch.no_grad(), exactly:
        if method == "noise":
            latents, rows = _noised(run, seed, independent=False), 0
        elif method == "edit-friendly":
            latents = _noised(run, seed, independent=True)
            offsets = _offsets(run, latents, inversion_guidance, eta)
        elif method == "belm":
            latents = _belm(run, inversion_guidance)
        else:
            solver = (inner_steps or 5) if method == "fixed-point" else 1
            latents = _ddim(run, inversion_guidance, solver)
            rows *= solver
    rows *= schedule.steps - (method == "edit-friendly")   # which needs no prediction at its last step
    if not latents.isfinite().all():
        raise NumericsError(f"{method} inversion gave values that are not finite: {too_large(model)}")
    if method == "null-text":
        with _explicit_where_small(run):
            null_context, more = _null_text(run, latents, guidance_scale, inner_steps or 10)
        rows += more
    return Inversion(prompt, method, latents.cpu(), steps, skip, guidance_scale, inversion_guidance, inner_steps,
                     eta if method == "edit-friendly" else 0.0, seed if method in READ_BY["seed"] else None, model.family,
                     model.prediction, model.sha256, rows, null_context, None if offsets is None else offsets.cpu(), kept,
                     fit=fit or "crop", final_alpha=final_alpha, overrides=model.overrides, notes=tuple(notes))


def _afford(model: Model, size: Sequence[int], steps: int, method: str, inversion_guidance: float) -> None:
    """Raises UsageError for an inversion that the machine has no memory for."""
    independent = method == "edit-friendly"   # its noise, and what it stores besides the latents
    check_run(model, 1, model.latent_shape(*size), steps, guided=inversion_guidance != 1, noises=1 + steps * independent,
              kept=(2 + independent) * (steps + 1), encodes=True)


def _explicit_where_small(run: _Run) -> AbstractContextManager:
    """Null-text inversion amplifies rounding: its loss is a small difference of latents, whose gradient Adam divides by its own
    size. Where the maps are small they are formed, which repeats the official code's numbers more closely."""
    small = run.x_0.shape[2] * run.x_0.shape[3] <= 32 * 32
    return sdpa_kernel(SDPBackend.MATH) if small else nullcontext()


def _ddim(run: _Run, guidance_scale: float, iterations: int) -> Tensor:
    """DDIM Eq. 12 towards noise.  -> (T + 1, C, H, W)

    The noise of a step is predicted for the level it leads to, from the latents it comes from (as in the official
    code); with more iterations, from the latents it led to the last time: the fixed point undoes the step exactly.
    """
    x, latents = run.x_0, [run.x_0]
    for t, a_to, a_from in run.upwards():
        guess = x
        for _ in range(iterations):
            out = run.predict(guess, t, guidance_scale)
            _, eps = x0_and_eps(guess, out, a_to, run.model.prediction, run.model.clip)
            guess = ddim_step((x - (1 - a_from) ** 0.5 * eps) / a_from**0.5, eps, a_from, a_to)
        x = guess
        latents.append(x)
    return torch.cat(latents)


def _belm(run: _Run, guidance_scale: float) -> Tensor:
    """O-BELM backwards: the first step is DDIM's, and so is one that follows a step of no length (to a picture at the level of the
    first timestep); each further one is the exact inverse of `belm_step`."""
    a = run.schedule.alphas[::-1]                                                # a[0] of the picture
    latents = [run.x_0]
    for i, (t, a_to, a_from) in enumerate(run.upwards()):
        x = latents[-1]
        if i == 0 or a[i] == a[i - 1]:
            out = run.predict(x, t, guidance_scale)
            _, eps = x0_and_eps(x, out, a_to, run.model.prediction)
            latents.append(ddim_step((x - (1 - a_from) ** 0.5 * eps) / a_from**0.5, eps, a_from, a_to))
        else:
            level = run.schedule.timesteps[::-1][i - 1]                          # the level that x is at
            out = run.predict(x, level, guidance_scale)
            _, eps = x0_and_eps(x, out, a[i], run.model.prediction)
            latents.append(belm_step_up(latents[-2], x, eps, a[i - 1], a[i], a_to))
    return torch.cat(latents)


def _noised(run: _Run, seed: int, independent: bool) -> Tensor:
    """x_0 with noise of every level (DDPM Eq. 4), the same noise or a new one at each.  -> (T + 1, C, H, W)"""
    noise = [z.to(run.x_0) for z in draw(run.x_0.shape[1:], [seed], 1 + run.schedule.steps * independent)]
    latents = [run.x_0]
    for i, (_, a_t, _) in enumerate(list(run.schedule)[::-1], 1):
        latents.append(a_t**0.5 * run.x_0 + (1 - a_t) ** 0.5 * noise[i * independent])
    return torch.cat(latents)


def _offsets(run: _Run, latents: Tensor, guidance_scale: float, eta: float) -> Tensor:
    """What each step's mean lacks to reach the next latents: the edit-friendly noise times its scale.  -> (T, C, H, W)

    The last one is 0, as in the official code: there it would be no noise, but the picture's detail, a ghost in every edit.
    """
    out = []
    for i, (t, a_t, a_prev) in enumerate(list(run.schedule)[:-1]):
        x, wanted = latents[-1 - i][None], latents[-2 - i][None]
        x_0, eps = x0_and_eps(x, run.predict(x, t, guidance_scale), a_t, run.model.prediction, run.model.clip)
        out.append(wanted - ddim_step(x_0, eps, a_t, a_prev, eta, torch.zeros_like(x)))
    return torch.cat([*out, torch.zeros_like(run.x_0)])


def _null_text(run: _Run, latents: Tensor, guidance_scale: float, inner_steps: int) -> tuple[Tensor, int]:
    """Mokady et al. 2022, algorithm 1: per step the empty prompt's embedding that leads to the stored latents.

    Constants of the official code: Adam, rate 0.01 (1 - i / 100), at most `inner_steps` updates, stop at a squared error
    of 1e-5 + 2e-5 i.  -> (T, L, C), rows of the UNet that it took
    """
    model, null = run.model, run.null
    context, found, rows = null.context.float(), [], 0
    x = latents[-1:].to(run.x_0)

    def stepped(x: Tensor, uncond: Tensor, cond: Tensor, a_t: float, a_prev: float) -> Tensor:
        x_0, eps = x0_and_eps(x, guide(uncond, cond, guidance_scale), a_t, model.prediction, model.clip)
        return ddim_step(x_0, eps, a_t, a_prev)

    def unconditional(x: Tensor, t: int, context: Tensor) -> Tensor:
        return model.predict(x, t, null._replace(context=context.to(model.dtype)))[0]

    bar = tqdm(list(run.schedule), disable=not (run.progress and sys.stderr.isatty()), leave=False, unit="step")
    for i, (t, a_t, a_prev) in enumerate(bar):
        wanted = latents[-2 - i][None]
        with torch.no_grad():
            cond = run.predict(x, t)
        rows += 1
        context = context.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([context], lr=1e-2 * max(0.0, 1 - i / 100))
        with torch.enable_grad():
            for _ in range(inner_steps):
                loss = (stepped(x, unconditional(x, t, context), cond, a_t, a_prev) - wanted).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rows += 1
                if loss.item() < 1e-5 + 2e-5 * i:
                    break
        with torch.no_grad():
            context = context.detach()
            x = stepped(x, unconditional(x, t, context), cond, a_t, a_prev)
        rows += 1
        found.append(context.cpu())
        bar.set_postfix(loss=f"{loss.item():.1e}")
    return torch.cat(found), rows

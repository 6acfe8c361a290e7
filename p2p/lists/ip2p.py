"""InstructPix2Pix's samples (Brooks et al. 2023, section 3.1): two captions become many pairs of pictures,
the best of which are kept.

Two ways to sample a pair, each pair with a seed, a share of injected steps and a guidance of its own:

    ip2p   as the authors' `generate_img_dataset.py`: Euler ancestral with the same noise for both pictures,
           the second with the first one's self-attention (queries and keys) in both halves, at every size,
           while i / (steps - 1) < share; cross-attention is not injected. All samples are drawn, and the best
           by direction are kept
    p2p    Prompt-to-Prompt itself: DDIM, cross- and self-attention injected; no more samples once enough
           have passed

Random numbers depend on the prompt, not on the order of the list: they have the authors' distribution, not
their values.
"""
from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from p2p.denoise import Batch, denoise, too_large
from p2p.errors import NumericsError, UsageError
from p2p.image import from_pil
from p2p.lists.metrics import Embedder
from p2p.lists.together import edit_together
from p2p.model import Model
from p2p.models.attention import AttentionEdit
from p2p.request.checks import finite
from p2p.request.emphasis import as_text
from p2p.request.memory import check_run
from p2p.request.schedules import sigma_schedule
from p2p.request.start import draw
from p2p.sampler import stepper

Kept = tuple[dict[str, Any], Sequence[Image.Image]]   # metadata of a sample, and its two pictures
Judged = tuple[dict[str, Any], Sequence[Image.Image], str | None]   # and the filter that it does not pass
# both (B, 3, H, W) in 0..1, and with 8 bits
Sampled = tuple[Tensor, Tensor, list[tuple[Image.Image, Image.Image]]]


class Prompts(NamedTuple):
    caption: str
    output: str      # the edited caption


@dataclass(frozen=True)
class Recipe:
    """The authors' settings (for Stable Diffusion, whose guidance is 7.5; other models scale theirs)."""

    steps: int = 100
    samples: int = 100                  # a prompt; with sampler "p2p" at most
    keep: int = 4                       # of these
    threshold: tuple[float, float] = (0.1, 0.9)     # share of the steps injected
    guidance: tuple[float, float] = (1.0, 2.0)      # times the model's own
    image: float = 0.7                  # least cosine between the two pictures
    direction: float = 0.2              # ... between their difference and that of the captions
    text: float = 0.2                   # ... between each picture and its caption
    together: int = 4                   # samples in a batch
    seed: int = 0
    sampler: Literal["ip2p", "p2p"] = "ip2p"


def check(model: Model, recipe: Recipe) -> None:
    """Raises UsageError for more steps than the model has, for filters that nothing would pass, and for more
    samples at a time than fit into memory."""
    for name in ("image", "direction", "text"):
        least = finite(f"least similarity ({name})", getattr(recipe, name))
        if least > 1:
            raise UsageError(f"least similarity ({name}): no cosine is above 1, so nothing would pass "
                             f"{least:g}")
    if model.flow is not None and recipe.sampler == "ip2p":
        raise UsageError("recipe ip2p: Euler ancestral's steps are of models with alphas_cumprod, and this "
                         "one is a flow; take the recipe p2p")
    model.schedule(recipe.steps)
    n, noises = min(recipe.together, recipe.samples), 1
    if recipe.sampler == "ip2p":
        sigma_schedule(model.alphas_cumprod, recipe.steps)
        noises = 2 * (1 + recipe.steps)   # both pictures', see `ancestral`
    check_run(model, 2 * n, model.latent_shape(), recipe.steps, rows=4 * n, noises=n * noises, targets=n)


def drawn(prompts: Prompts, j: int, recipe: Recipe, model: Model) -> dict[str, float | int]:
    """Seed, injected share and guidance of a prompt's sample j, independent of the rest of the list."""
    digest = hashlib.sha256(json.dumps([*prompts, recipe.seed, j]).encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    u, v = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    (a, b), (c, d) = recipe.threshold, recipe.guidance
    return {"seed": seed, "p2p_threshold": a + (b - a) * u,
            "cfg_scale": (c + (d - c) * v) * model.guidance_scale}


def similarities(before: Tensor, after: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """The four cosines of the authors' `ClipSimilarity`.

    before, after (B, D): embedded pictures; texts (2, D): embedded captions  ->  (B,) each

    All embeddings have length 1 before differences are taken: a direction is that of unit vectors.
    """
    before, after, texts = (F.normalize(x, dim=-1) for x in (before, after, texts))
    return {"clip_sim_0": F.cosine_similarity(before, texts[:1]),
            "clip_sim_1": F.cosine_similarity(after, texts[1:]),
            "clip_sim_dir": F.cosine_similarity(after - before, texts[1:] - texts[:1]),
            "clip_sim_image": F.cosine_similarity(before, after)}


def dropped(cosines: dict[str, float], recipe: Recipe) -> str | None:
    """The first filter that a sample does not pass, or None."""
    least = {"clip_sim_image": recipe.image, "clip_sim_dir": recipe.direction, "clip_sim_0": recipe.text,
             "clip_sim_1": recipe.text}
    return next((name for name, value in least.items() if not cosines[name] >= value), None)


def judged(model: Model, prompts: Prompts, draws: Sequence[dict[str, Any]], texts: Tensor, embedder: Embedder,
           recipe: Recipe) -> list[Judged]:
    """Samples in one batch: metadata, pictures, and the filter that each does not pass. texts: the embedded
    prompts. Raises NumericsError, UsageError."""
    before, after, images = SAMPLERS[recipe.sampler](model, prompts, draws, recipe.steps)
    cosines = similarities(embedder.pictures(before), embedder.pictures(after), texts)
    if not all(values.isfinite().all() for values in cosines.values()):
        raise NumericsError("the judge finds similarities that are not finite")
    each = [{name: values[i].item() for name, values in cosines.items()} for i in range(len(draws))]
    return [(d | found, pair, dropped(found, recipe)) for d, found, pair in zip(draws, each, images)]


def _judged_alone(model: Model, prompts: Prompts, draws: Sequence[dict[str, Any]], texts: Tensor,
                  embedder: Embedder, recipe: Recipe, counts: Counter[str]) -> list[Judged]:
    """As `judged`, but of a batch that fails each sample by itself, without those that fail alone, which are
    counted. Raises UsageError."""
    try:
        return judged(model, prompts, draws, texts, embedder, recipe)
    except (NumericsError, torch.OutOfMemoryError) as error:
        if len(draws) == 1:
            counts[f"failed: {str(error).splitlines()[0]}"] += 1
            return []
    return [one for draw in draws
            for one in _judged_alone(model, prompts, [draw], texts, embedder, recipe, counts)]


def samples(model: Model, prompts: Prompts, embedder: Embedder,
            recipe: Recipe) -> tuple[list[Kept], Counter[str]]:
    """The best of a prompt's samples, and how many were drawn, dropped by each filter and kept."""
    texts, counts = embedder.texts(list(prompts)), Counter(samples=0)
    passed: list[Kept] = []
    for first in range(0, recipe.samples, recipe.together):
        last = min(first + recipe.together, recipe.samples)
        draws = [drawn(prompts, j, recipe, model) for j in range(first, last)]
        try:
            batch = _judged_alone(model, prompts, draws, texts, embedder, recipe, counts)
        except UsageError as error:   # so would be all others
            counts[f"failed: {error}"] += len(draws)
            break
        counts.update(name for *_, why in batch for name in ("samples", why or "passed"))
        passed += [(info, pair) for info, pair, why in batch if why is None]
        if recipe.sampler == "p2p" and len(passed) >= recipe.keep:
            break
    passed.sort(key=lambda p: (p[0]["clip_sim_dir"], p[0]["seed"]), reverse=True)
    counts["kept"] = len(passed[:recipe.keep])
    return passed[:recipe.keep], counts


def ancestral(model: Model, prompts: Prompts, draws: Sequence[dict[str, Any]], steps: int) -> Sampled:
    """Pairs as InstructPix2Pix draws them, in one batch: all first pictures, then all second ones.

    k-diffusion's Euler ancestral is DDIM with eta 1 in other coordinates (x_t = x / sqrt(1 + sigma^2)), so
    `denoise` does it. Raises NumericsError.
    """
    n, device = len(draws), model.device
    schedule = sigma_schedule(model.alphas_cumprod, steps)
    seeds, shares, scales = ([d[name] for d in draws] for name in ("seed", "p2p_threshold", "cfg_scale"))
    x_T, *noise = (z.repeat(2, 1, 1, 1).to(device) for z in draw(model.latent_shape(), seeds, 1 + steps))
    scale = torch.tensor(scales, device=device).repeat(2).view(-1, 1, 1, 1)
    plan = first_pictures_attention(shares, steps, device)
    x = schedule.levels[0].sigma * x_T            # sigma x_T in those coordinates
    conditioning = model.condition([prompts.caption] * n + [prompts.output] * n), model.null(2 * n)
    for step in denoise(model, x, *conditioning, schedule,
                        stepper(schedule, model.prediction, model.clip, 1.0, noise), Batch(n, n),
                        guidance_scale=scale, plan=plan):
        x = step.x
    pictures = (model.decode(x).cpu() / 2 + 0.5).clamp(0, 1)
    if not pictures.isfinite().all():
        raise NumericsError(f"a decoded picture holds values that are not finite: {too_large(model)}")
    # truncated, as there
    images = [Image.fromarray(p) for p in (255 * pictures).byte().permute(0, 2, 3, 1).numpy()]
    return pictures[:n], pictures[n:], list(zip(images, images[n:]))


def first_pictures_attention(thresholds: Sequence[float], steps: int,
                             device: torch.device) -> list[AttentionEdit]:
    """The edits that give second pictures the self-attention of the first ones, one a step.

    The batch: n first and n second pictures without prompts, then the same with prompts. A second picture
    uses the first one's of its half while i / (steps - 1) < threshold.
    """
    n = len(thresholds)
    own_rows = torch.arange(4 * n, device=device)
    first = own_rows - n * (own_rows // n % 2)
    out = []
    for i in range(steps):
        injected = torch.tensor([share > i / max(1, steps - 1) for share in thresholds],
                                device=device).repeat(4)
        rows = torch.where(injected, first, own_rows)
        out.append(AttentionEdit(own_rows, pixels=torch.stack([rows, rows, own_rows])))
    return out


def prompt_to_prompt(model: Model, prompts: Prompts, draws: Sequence[dict[str, Any]], steps: int) -> Sampled:
    """Pairs by Prompt-to-Prompt: cross- and self-attention are injected for a sample's share of the steps."""
    results = edit_together(model, [dict(
        source=as_text(model, prompts.caption), targets=as_text(model, prompts.output), seed=d["seed"],
        guidance_scale=d["cfg_scale"], steps=steps, cross_replace_steps=d["p2p_threshold"],
        self_replace_steps=d["p2p_threshold"])
                                    for d in draws])
    before, after = (torch.cat([from_pil(r.images[k]) for r in results]) / 2 + 0.5 for k in range(2))
    return before, after, [(r.images[0], r.images[1]) for r in results]


SAMPLERS = {"ip2p": ancestral, "p2p": prompt_to_prompt}

"""InstructPix2Pix's samples, held against its `generate_img_dataset.py` written out: sampler, injection, similarities, filters."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from p2p.lists import ip2p
from p2p.request.schedules import Level, sigma_schedule
from p2p.request.start import draw
from p2p.sampler import ddim_step, x0_and_eps

PROMPTS = ip2p.Prompts("a cat on grass", "a dog on grass")


def sigmas_of(model, steps):
    """k-diffusion's DiscreteSchedule.get_sigmas and sigma_to_t, in double precision."""
    log_sigmas = (((1 - model.alphas_cumprod.double()) / model.alphas_cumprod.double()) ** 0.5).log()
    t = torch.linspace(len(log_sigmas) - 1, 0, steps, dtype=torch.float64)
    low, high, w = t.floor().long(), t.ceil().long(), t.frac()
    return torch.cat([((1 - w) * log_sigmas[low] + w * log_sigmas[high]).exp(), torch.zeros(1)]), t


def test_the_schedule_is_k_diffusions(sd1):
    for steps in (2, 7, 100):
        sigmas, t = sigmas_of(sd1, steps)
        schedule = sigma_schedule(sd1.alphas_cumprod, steps)
        assert schedule.timesteps == pytest.approx(t.tolist())
        assert [sigma / alpha for alpha, sigma in schedule.levels] == pytest.approx(sigmas.tolist(), rel=1e-9)


def test_euler_ancestral_is_ddim_with_eta_1():
    """sample_euler_ancestral's step in its own coordinates, x = x_t sqrt(1 + sigma^2)."""
    g = torch.Generator().manual_seed(0)
    x, out, z = torch.randn(3, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    for before, after in ((14.6, 9.0), (3.0, 2.9), (0.3, 0.03), (0.03, 0.0)):
        denoised = x - before * out
        up = min(after, (after**2 * (before**2 - after**2) / before**2) ** 0.5)
        down = (after**2 - up**2) ** 0.5
        wanted = x + (x - denoised) / before * (down - before) + (z * up if after > 0 else 0)
        a, b = Level.of(1 / (1 + before**2)), Level.of(1 / (1 + after**2))
        found = ddim_step(*x0_and_eps(x * a.alpha, out, a), a, b, 1.0, z) / b.alpha
        assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()


@torch.no_grad()
def written_out(model, prompts, seed, threshold, scale, steps):
    """One pair by the authors' script: a batch of four, scores of self-attention copied before the softmax."""
    sigmas, timesteps = sigmas_of(model, steps)
    uncond, cond = model.text(["", ""]), model.text(list(prompts))
    x, *noise = draw(model.latent_shape(), [seed], 1 + steps)
    x = (x * sigmas[0]).float().repeat(2, 1, 1, 1)
    layers = [m for n, m in model.unet.named_modules() if n.endswith("attn1")]
    copying = []

    def copied(module, given, out):       # sims[0], sims[0], sims[2], sims[2]: queries and keys of the first of each half
        return out[[0, 0, 2, 2]] if copying[-1] else out

    hooks = [f.register_forward_hook(copied) for m in layers for f in (m.to_q, m.to_k)]
    for i in range(len(sigmas) - 1):
        copying.append(threshold > i / (len(sigmas) - 2))
        c_in = 1 / (sigmas[i] ** 2 + 1) ** 0.5
        eps = model.unet((x * c_in).float().repeat(2, 1, 1, 1), timesteps[i].float(), torch.cat([uncond, cond]))[0]
        u, c = ((x - sigmas[i] * e) for e in eps.chunk(2))
        denoised = u + (c - u) * scale
        up = min(sigmas[i + 1], (sigmas[i + 1] ** 2 * (sigmas[i] ** 2 - sigmas[i + 1] ** 2) / sigmas[i] ** 2) ** 0.5)
        down = (sigmas[i + 1] ** 2 - up**2) ** 0.5
        x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        if sigmas[i + 1] > 0:
            x = x + noise[i] * up
    for hook in hooks:
        hook.remove()
    return (model.decode(x.float()) / 2 + 0.5).clamp(0, 1), sum(copying)


@pytest.mark.slow
def test_pairs_are_the_authors(sd1):
    """Each sample of a batch has a seed, a share and a guidance of its own; self-attention at every size, in both halves."""
    sd1 = replace(sd1, size=(128, 128))
    some = [{"seed": 5, "p2p_threshold": 0.55, "cfg_scale": 7.5}, {"seed": 2**32 - 1, "p2p_threshold": 0.2, "cfg_scale": 15.0}]
    before, after, images = ip2p.ancestral(sd1, PROMPTS, some, 6)
    for k, (d, injected) in enumerate(zip(some, (3, 1))):
        wanted, steps = written_out(sd1, PROMPTS, d["seed"], d["p2p_threshold"], d["cfg_scale"], 6)
        assert steps == injected
        assert (torch.stack([before[k], after[k]]) - wanted).abs().max() < 2e-4
        assert (before[k] - after[k]).abs().max() > 0.05
        assert torch.equal(torch.from_numpy(np.array(images[k][1])), (255 * after[k]).byte().permute(1, 2, 0))


def test_directions_are_those_of_unit_vectors():
    """ClipSimilarity normalises pictures and texts before it takes differences: their lengths do not count."""
    g = torch.Generator().manual_seed(1)
    before, after, texts = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (3, 3, 2))
    found = ip2p.similarities(before, after, texts)
    scaled = ip2p.similarities(5 * before, 0.2 * after, texts * torch.tensor([[3.0], [0.1]]))
    a, b, (s, t) = before / before.norm(dim=1, keepdim=True), after / after.norm(dim=1, keepdim=True), F.normalize(texts)
    wanted = {"clip_sim_0": a @ s, "clip_sim_1": b @ t, "clip_sim_image": (a * b).sum(1),
              "clip_sim_dir": (b - a) @ (t - s) / (b - a).norm(dim=1) / (t - s).norm()}
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() < 1e-12 and (scaled[name] - value).abs().max() < 1e-12
    assert (F.cosine_similarity(after - before, texts[1:] - texts[:1]) - found["clip_sim_dir"]).abs().max() > 0.02


def test_all_samples_are_drawn_and_the_best_kept(monkeypatch, emoji):
    """`n-samples` are drawn whatever passes; what passes all filters (>=) is sorted by direction, then seed, falling."""
    recipe = ip2p.Recipe(samples=10, keep=3, together=4)
    seeds = [ip2p.drawn(PROMPTS, j, recipe, emoji)["seed"] for j in range(10)]
    image = [0.9, 0.7, 0.69, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
    direction = [0.3, 0.2, 0.9, 0.5, 0.19, 0.5, 0.4, 0.2, 0.2, 0.25]
    sampled = []

    def similarities(before, *_):
        rows = before.flatten().long()
        return {"clip_sim_0": torch.full((len(rows),), 0.2), "clip_sim_1": torch.full((len(rows),), 0.3),
                "clip_sim_dir": torch.tensor(direction, dtype=torch.float64)[rows],
                "clip_sim_image": torch.tensor(image, dtype=torch.float64)[rows]}

    def sampler(model, prompts, some, steps):
        at = torch.arange(len(sampled), len(sampled) + len(some))
        sampled.extend(d["seed"] for d in some)
        return at, at, [(None, None)] * len(some)

    monkeypatch.setattr(ip2p, "similarities", similarities)
    monkeypatch.setattr(ip2p, "SAMPLERS", {"ip2p": sampler, "p2p": sampler})
    embedder = ip2p.Embedder(lambda x: x, lambda texts: torch.zeros(2, 3))
    kept, counts = ip2p.samples(emoji, PROMPTS, embedder, recipe)
    assert sampled == seeds and counts["samples"] == 10 and counts["passed"] == 8 and counts["kept"] == 3
    best = sorted([(0.5, seeds[3]), (0.5, seeds[5]), (0.4, seeds[6])], reverse=True)
    assert [(k["clip_sim_dir"], k["seed"]) for k, _ in kept] == best
    sampled.clear()
    assert len(ip2p.samples(emoji, PROMPTS, embedder, ip2p.Recipe(samples=10, keep=3, sampler="p2p"))[0]) == 3
    assert sampled == seeds[:4]                      # three of them passed

"""The numbers of the original code, on the same weights and noise."""
import pytest
import torch
from plans import planned

import p2p
from p2p.denoise import denoise
from p2p.sampler import stepper

CASES = ["plain", "replace", "replace_multitoken", "refine", "reweight", "blend"]


def close(got, want, tol):
    """Largest difference, in standard deviations of what is wanted."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tol * want.std()


def as_edit(prompt, case):
    pair = lambda v: tuple(v) if isinstance(v, list) else v  # noqa: E731
    cross = case["cross"]
    cross = {k: pair(v) for k, v in cross.items()} if isinstance(cross, dict) else pair(cross)
    blend = p2p.LocalBlend(words=case["blend"]) if "blend" in case else None
    return p2p.Edit(prompt, mode=case["kind"], local_blend=blend, cross_replace_steps=cross, self_replace_steps=pair(case["self"]),
                    self_max_tokens=32 * 32, equalizer=case.get("weights"), aligner="official")


def test_text_tower(sd1, golden):
    ids = sd1.text_encoders[0].tokenize(["a photo of a cat riding a bicycle", "", "Ünïcode & émojis: 2 cats!"])
    assert torch.equal(ids, golden[1]["parts.token_ids"].long())
    close(sd1.text_encoders[0](ids), golden[1]["parts.text"], 1e-4)


@pytest.mark.slow
def test_unet(sd1, golden):
    g = golden[1]
    with torch.no_grad():
        close(sd1.unet(g["parts.unet_x"], g["parts.unet_t"], g["parts.text"][:2])[0], g["parts.unet_out"], 1e-4)


def test_autoencoder(sd1, golden):
    g = golden[1]
    close(sd1.encode(g["parts.image"]), g["parts.vae_mean"], 1e-4)
    close(sd1.decode(g["parts.vae_mean"]), g["parts.vae_decoded"], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_edit(sd1, golden, undecoded, name):
    meta, g = golden
    case = meta["cases"][name]
    settings = dict(steps=case["steps"], guidance_scale=meta["cfg"], x_T=g[f"{name}.z_T"])
    if case["kind"] == "none":
        r = p2p.generate(sd1, case["prompts"], **settings)
    else:
        r = p2p.edit(sd1, case["prompts"][0], [as_edit(p, case) for p in case["prompts"][1:]], **settings)
    close(r.latents, g[f"{name}.final"], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES[1:-1])   # of the last, the end alone was kept
def test_first_step(sd1, golden, name):
    """Before rounding is amplified by guidance over the steps."""
    meta, g = golden
    case = meta["cases"][name]
    prompts, n = case["prompts"], len(case["prompts"])
    edits = [as_edit(p, case) for p in prompts[1:]]
    edit_plan, batch = planned(sd1, prompts, edits, case["steps"])
    x = g[f"{name}.z_T"].expand(n, -1, -1, -1)
    schedule = sd1.schedule(case["steps"])
    steps = denoise(sd1, x, sd1.condition(prompts), sd1.null(n), schedule, stepper(schedule, sd1.prediction, sd1.clip), batch,
                    guidance_scale=meta["cfg"], plan=edit_plan)
    close(next(steps).x, g[f"{name}.trajectory"][1], 1e-4)

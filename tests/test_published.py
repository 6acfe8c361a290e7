"""The published rows of PIE-Bench, end to end: jobs of `p2p.lists.protocol` against the loops of PnPInversion's scripts
(`published_loops`), on a small random model."""
import copy
import math
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from published_loops import SIDE, SOURCE, STEPS, PromptToPrompt, Published

from p2p.lists import protocol, work
from p2p.lists.jobs import parse
from p2p.model import Model
from p2p.models import unet

pytestmark = pytest.mark.slow

TARGET, LONGER = "a dog on red grass", "a big dog on red grass"


class Double(Model):
    """In float64: the random network multiplies rounding, of 6e-8 in single precision to 5e-2 of a deviation. Nobody looks at
    its pictures."""

    def encode(self, x):
        return super().encode(x).to(self.dtype)

    def decode(self, latents):
        return torch.zeros(len(latents), 3, 8, 8)


@pytest.fixture(scope="module")
def model(sd1):
    said = {f.name: getattr(sd1, f.name) for f in fields(sd1)}
    return Double(**said | {"size": (96, 96), "unet": copy.deepcopy(sd1.unet).double(),
                            "text_encoders": [copy.deepcopy(t).double() for t in sd1.text_encoders]})


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "k.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((256, 256), Image.BICUBIC).save(file)
    return file


@pytest.fixture(scope="module", autouse=True)
def sinusoids_in_double():
    """In single precision they differ in the last bit by how many are computed at once, on CPUs of some kinds."""
    def embedding(t, dim):
        angles = t[..., None].double() * torch.exp(-math.log(10_000) * torch.arange(dim // 2).double() / (dim // 2))
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet, "timestep_embedding", embedding)
        yield


@pytest.fixture(scope="module", autouse=True)
def inverts_once():
    """Our rows of one inversion share it."""
    real, known = work.invert, {}

    def invert(model, picture, prompt, **settings):
        key = id(model.unet), prompt, picture.tobytes(), repr(sorted(settings.items()))
        if key not in known:
            known[key] = real(model, picture, prompt, **settings), model   # which keeps its id
        return known[key][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "invert", invert)
        yield


@pytest.fixture(scope="module")
def inverted(model, picture):
    """The scripts' inversion of the picture, once for every prompt."""
    return cache(torch.no_grad()(lambda prompt: Published(model, picture, prompt)))


@pytest.fixture(scope="module")
def run(inverted):
    return inverted(SOURCE)


@pytest.fixture(scope="module")
def optimised(run):
    with torch.no_grad():
        return run.null_text()


@pytest.fixture(scope="module")
def pnp(run):
    return cache(torch.no_grad()(run.pnp))


def ours(model, picture, name, target, blended):
    """Latents of the target, by the published row cut down to few steps."""
    method = replace(protocol.find(name), steps=STEPS)
    item = protocol.Item("k", picture, SOURCE, target, blended, [], "", "k.png")
    job = parse(protocol.job(method, item, model), 1, picture.parent, model)
    (_, result, _), = work.compute(model, [job])
    assert not isinstance(result, work.Failure), result
    return result.latents[1:]


def agree(found, wanted, *others):
    """But for noise, which is drawn in single precision; and what the row is not differs from it."""
    deviation = wanted.std()
    assert (found - wanted).abs().max() < 1e-4 * deviation
    for other in others:
        assert (found - other).abs().max() > 0.1 * deviation


@torch.no_grad()
@pytest.mark.parametrize("name, told", [
    ("ddim+p2p", dict(scale=7.5)), ("directinversion+p2p", dict(scale=7.5, direct=True)),
    ("negative-prompt-inversion+p2p", dict(scale=7.5, null=SOURCE)),
    ("negative-prompt-inversion+proximal-guidance", dict(scale=7.5, null=SOURCE, proximal=0.75))])
@pytest.mark.parametrize("target, blended", [(TARGET, ""), (LONGER, "cat dog big")])
def test_rows_of_run_editing_p2p(model, picture, run, name, told, target, blended):
    null = {"null": run.text(SOURCE, SOURCE)} if "null" in told else {}
    words = blended.split(" ")[:2] if blended else None
    control = PromptToPrompt(model, target, words, "refine", 32**2, SIDE)
    wanted = run.p2p(control, target, **told | null)
    plain = run.p2p(PromptToPrompt(model, target, None, "refine", 0, SIDE), target, **told | null)
    agree(ours(model, picture, name, target, blended), wanted, plain)


@torch.no_grad()
@pytest.mark.parametrize("name, told", [("null-text-inversion+p2p", {}), ("null-text-inversion+proximal-guidance", dict(proximal=0.75))])
def test_rows_of_null_text(model, picture, run, optimised, name, told):
    assert (optimised[0] - run.text("", "")).abs().max() > 1e-3
    wanted, plain = (run.p2p(PromptToPrompt(model, LONGER, ["cat", "dog"], "refine", 32**2, SIDE), LONGER, 7.5, **told, **null)
                     for null in ({"null": optimised}, {}))
    agree(ours(model, picture, name, LONGER, "cat dog big"), wanted)
    assert (wanted - plain).abs().max() > 1e-2 * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("name, told", [("ddim+p2p", {}), ("directinversion+p2p", {"direct": True})])
def test_rounding_strays_no_further_than_in_the_loop_with_maps(model, picture, run, name, told):
    """Both in single precision, from the loop in double; fused attention and two sums in place of a map's edit cost nothing."""
    single = replace(model, unet=copy.deepcopy(model.unet).float(), text_encoders=[copy.deepcopy(t).float() for t in model.text_encoders])
    truth, loop = (at.p2p(PromptToPrompt(at.model, LONGER, None, "refine", 32**2, SIDE), LONGER, 7.5, **told)
                   for at in (run, Published(single, picture)))
    found = ours(single, picture, name, LONGER, "")
    strayed = [((x - truth).square().mean().sqrt() / truth.std()).item() for x in (found, loop)]
    assert found.dtype == loop.dtype == torch.float32 and 0 < strayed[0] < 3 * strayed[1], strayed


@torch.no_grad()
def test_words_of_neither_prompt_make_the_source_of_it(model, picture, run):
    """0 / 0 > 0.3 nowhere: after int(0.2 N) steps the target is the source's row."""
    control = PromptToPrompt(model, TARGET, ("sky", "lion"), "refine", 32**2, SIDE)
    found = ours(model, picture, "directinversion+p2p", TARGET, "sky lion")
    agree(found, run.p2p(control, TARGET, 7.5, direct=True))
    assert (found - run.path[0]).abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("target, mode, side", [(TARGET, "replace", 160), (LONGER, "refine", 128)])
def test_the_row_of_run_editing_edit_friendly_p2p(model, picture, target, mode, side):
    model = replace(model, size=(side, side))                     # self-attention with 20 x 20 pixels is left alone
    run = Published(model, picture)
    control = PromptToPrompt(model, target, None, mode, 16**2, 0)
    agree(ours(model, picture, "edit-friendly-inversion+p2p", target, "cat dog"), run.edit_friendly(control, target))


@torch.no_grad()
@pytest.mark.parametrize("direct", [False, True])
def test_rows_of_run_editing_masactrl(model, picture, inverted, direct):
    wanted = inverted("").masactrl(TARGET, direct)
    agree(ours(model, picture, f"{'directinversion' if direct else 'ddim'}+masactrl", TARGET, "cat dog"), wanted)


@torch.no_grad()
@pytest.mark.parametrize("direct", [False, True])
def test_rows_of_run_editing_pnp(model, picture, pnp, direct):
    wanted, other = (pnp(TARGET, d) for d in (direct, not direct))
    agree(ours(model, picture, f"{'directinversion' if direct else 'ddim'}+pnp", TARGET, "cat dog"), wanted, other)


@torch.no_grad()
def test_the_guidance_grid_inverts_with_guidance(model, picture, run):
    run = copy.copy(run)
    run.path = list(run.path)
    for x, (t, a_t, a_prev) in zip(range(STEPS), run.schedule[::-1]):   # ddim_with_guidance_scale_loop
        eps = run.both(run.path[x], t, run.text(""), run.text(SOURCE), 2.5)
        run.path[x + 1] = run.ddim(run.path[x], eps, a_prev, a_t)
    control = PromptToPrompt(model, TARGET, None, "refine", 32**2, SIDE)
    wanted = run.p2p(control, TARGET, 5.0, direct=True)
    agree(ours(model, picture, "directinversion+p2p_guidance_25_5", TARGET, ""), wanted)

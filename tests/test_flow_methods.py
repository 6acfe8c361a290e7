"""Inversions and editors of flows, on every model: each against its equations, written out, and what it promises."""
import copy
import math
from dataclasses import fields, replace

import pytest
import torch

import p2p
from p2p.request.inverting import expected, schedule_of
from p2p.request.schedules import Level, timesteps_at
from p2p.request.start import draw
from p2p.weights.emoji.world import render, sample
from p2p.weights.scheduler import Flow

pytestmark = pytest.mark.slow

SOURCE, TARGET = "a red cat on grass", "a blue dog on grass"
FREE = dict(cross_replace_steps=0.0, self_replace_steps=0.0)


# --------------------------------------------------------------------------------------------- the papers' equations, written out

SIDE, STEPS = 16, 3


def steps_of(model):
    return schedule_of(model, expected(model, "a cat", method="ddim", steps=STEPS), (SIDE, SIDE))


class Field:
    """A model as a flow: y = x / (alpha + sigma) at the time share = sigma / (alpha + sigma), from the picture up."""

    def __init__(self, model):
        self.model = model
        schedule = steps_of(model)
        self.grid = [(level.share, t) for t, level in zip(schedule.timesteps[::-1], schedule.levels[-2::-1])]
        self.grid.insert(0, (0.0, 0))

    def __call__(self, y, share, prompt, t=None, guidance=1.0):
        """The velocity at a share of noise, at timestep t, or the one that has it."""
        flow = self.model.prediction == "flow"
        size = 1.0 if flow else math.hypot(1 - share, share)
        a, s = (1 - share) / size, share / size
        t = timesteps_at(self.model.alphas_cumprod, [Level(a, s)])[0] if t is None else t
        x = y * (a + s)
        if share == 0 and not flow:   # a picture is read as one of timestep 0
            a, s = Level.of(self.model.alphas_cumprod[0].item())

        def told(text):
            out = self.model.predict(x, torch.tensor(t), self.model.condition([text], SIDE, SIDE))[0]
            return out if flow else out - (x - s * out) / a

        return told(prompt) if guidance == 1 else told("") + guidance * (told(prompt) - told(""))

    def x(self, y, share):
        return y * (1.0 if self.model.prediction == "flow" else 1 / math.hypot(1 - share, share))


def agrees(found, wanted, tol=2e-4):
    assert (found - wanted).abs().max() < tol * (1 + wanted.abs().max())


def edited(model, inversion, **settings):
    return p2p.edit(model, inversion, TARGET, **FREE | settings).latents


KINDS = pytest.mark.parametrize("kind", ["eps", "flow"])


@KINDS
@torch.no_grad()
def test_rf_solver_is_its_taylor_formula(models, picture, kind):
    v = Field(models[kind])

    def solved(y, grid, prompt):
        for (a, t), (b, _) in zip(grid, grid[1:]):
            v_a = v(y, a, prompt, t)
            v_mid = v(y + (b - a) / 2 * v_a, (a + b) / 2, prompt)
            slope = (v_mid - v_a) / ((b - a) / 2)
            y = y + (b - a) * v_a + (b - a) ** 2 / 2 * slope
        return y

    inv = p2p.invert(models[kind], picture, SOURCE, method="rf-solver", steps=STEPS)
    top = solved(picture, v.grid, SOURCE)
    agrees(inv.latents[-1:], v.x(top, v.grid[-1][0]))
    r = edited(models[kind], inv, guidance_scale=1.0)
    agrees(r[:1], solved(top, v.grid[::-1], SOURCE))
    agrees(r[1:], solved(top, v.grid[::-1], TARGET))


@KINDS
@torch.no_grad()
def test_fireflow_reuses_the_velocity_of_the_last_midpoint(models, picture, kind):
    v = Field(models[kind])

    def solved(y, grid, prompt):
        before = v(y, grid[0][0], prompt, grid[0][1])
        for (a, _), (b, _) in zip(grid, grid[1:]):
            before = v(y + (b - a) / 2 * before, (a + b) / 2, prompt)
            y = y + (b - a) * before
        return y

    inv = p2p.invert(models[kind], picture, SOURCE, method="fireflow", steps=STEPS)
    top = solved(picture, v.grid, SOURCE)
    agrees(inv.latents[-1:], v.x(top, v.grid[-1][0]))
    agrees(edited(models[kind], inv, guidance_scale=1.0)[1:], solved(top, v.grid[::-1], TARGET))
    assert inv.rows == STEPS + 1


@KINDS
@torch.no_grad()
def test_uni_inv_guesses_by_the_velocity_before(models, picture, kind):
    v, y = Field(models[kind]), picture
    before = v(y, 0.0, SOURCE, 0)
    for (a, _), (b, t) in zip(v.grid, v.grid[1:]):
        before = v(y + (b - a) * before, b, SOURCE, t)
        y = y + (b - a) * before
    inv = p2p.invert(models[kind], picture, SOURCE, method="uni-inv", steps=STEPS)
    agrees(inv.latents[-1:], v.x(y, v.grid[-1][0]))
    for (a, t), (b, _) in zip(v.grid[::-1], v.grid[-2::-1]):
        y = y + (b - a) * v(y, a, SOURCE, t)
    agrees(edited(models[kind], inv)[:1], y)   # the source is not guided


@KINDS
@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, dict(gamma=0.0, control=0.0), dict(gamma=1.0, control=0.7, control_steps=0.7)])
def test_rf_inversion_is_the_controlled_ode(models, picture, kind, settings):
    """gamma and control 0: the plain ODE, up and down; gamma 1: straight to the noise that was drawn."""
    gamma, control, share = ({"gamma": 0.5, "control": 0.9, "control_steps": 0.25} | settings).values()
    v, y, (noise,) = Field(models[kind]), picture, draw((3, SIDE, SIDE), [4], 1)
    for (a, t), (b, _) in zip(v.grid, v.grid[1:]):
        u = v(y, a, "", t)
        y = y + (b - a) * (u + gamma * ((noise - y) / (1 - a) - u))
    inv = p2p.invert(models[kind], picture, SOURCE, method="rf-inversion", steps=STEPS, seed=4, **settings)
    top = v.grid[-1][0]
    agrees(inv.latents[-1:], v.x(y, top))
    if gamma == 1:
        agrees(y, (1 - top) * picture + top * noise)
    for i, ((a, t), (b, _)) in enumerate(zip(v.grid[::-1], v.grid[-2::-1])):
        u = v(y, a, TARGET, t, 2.0)
        y = y + (b - a) * (u + (control if i < int(share * STEPS) else 0) * ((y - picture) / a - u))
    agrees(edited(models[kind], inv, guidance_scale=2.0)[1:], y)


@KINDS
@torch.no_grad()
@pytest.mark.parametrize("n_avg, n_min", [(1, 0), (2, 1)])
def test_flow_edit_adds_the_difference_of_velocities(models, picture, kind, n_avg, n_min):
    v, skip = Field(models[kind]), 1
    calls = n_avg * (STEPS - skip - n_min) + n_min
    noise = iter(draw((3, SIDE, SIDE), [7], 1 + calls)[::-1])
    z_edit, grid = picture, v.grid[::-1][skip:]
    for i, ((a, t), (b, _)) in enumerate(zip(grid, grid[1:])):
        if i >= STEPS - skip - n_min:
            if i == STEPS - skip - n_min:
                z_edit = z_edit + a * (next(noise) - picture)
            z_edit = z_edit + (b - a) * v(z_edit, a, TARGET, t, 2.0)
            continue
        delta = []
        for _ in range(n_avg):
            z_src = (1 - a) * picture + a * next(noise)
            z_tar = z_edit + z_src - picture
            delta.append(v(z_tar, a, TARGET, t, 2.0) - v(z_src, a, SOURCE, t, 1.5))
        z_edit = z_edit + (b - a) * sum(delta) / n_avg
    inv = p2p.invert(models[kind], picture, SOURCE, method="flow-edit", steps=STEPS, skip=skip, seed=7, n_avg=n_avg, n_min=n_min,
                     inversion_guidance=1.5)
    r = edited(models[kind], inv, guidance_scale=2.0)
    agrees(r[1:], z_edit)
    assert torch.equal(r[0], picture[0]) and len(inv.latents) == calls + 1


@KINDS
@torch.no_grad()
def test_ddcm_adds_the_difference_of_pictures(models, picture, kind):
    """InfEdit with new noise at every step: z' = alpha' (z_0 + x_0(target) - x_0(source)) + sigma' noise."""
    model, v = models[kind], Field(models[kind])
    schedule = steps_of(model)
    noise = draw((3, SIDE, SIDE), [2], 1 + STEPS)
    z = schedule.levels[0].alpha * picture + schedule.levels[0].sigma * noise[STEPS]
    for i, (t, level, after) in enumerate(schedule):
        z_src = level.alpha * picture + level.sigma * noise[STEPS - i]
        x_0 = [each / level.scale - level.share * v(each / level.scale, level.share, prompt, t, guidance)
               for each, prompt, guidance in ((z, TARGET, 2.0), (z_src, SOURCE, 1.0))]
        z = after.alpha * (picture + x_0[0] - x_0[1]) + after.sigma * noise[STEPS - i - 1]
    inv = p2p.invert(model, picture, SOURCE, method="ddcm", steps=STEPS, seed=2)
    r = edited(model, inv, guidance_scale=2.0)
    agrees(r[1:], z)
    assert torch.equal(r[0], picture[0])


@KINDS
@torch.no_grad()
def test_turbo_edit_draws_less_noise_than_it_says(models, picture, kind):
    """x_i has the noise of step i + 1, and the mean is DDPM's of step i; pseudo-guidance of 1.5 is guidance away from the
    source's prompt; the last offset's norm is bounded."""
    model = models[kind]
    schedule, noise = steps_of(model), draw((3, SIDE, SIDE), [2], 1 + STEPS)
    xs = [level.alpha * picture + level.sigma * z for level, z in zip(schedule.levels[1:-1], noise[:1:-1])] + [picture] * 2

    def mean(x, level, after, prompt, t):
        out = model.predict(x, t, model.condition([prompt], SIDE, SIDE))[0]
        x_0 = x - level.sigma * out if kind == "flow" else (x - level.sigma * out) / level.alpha
        if level.alpha == 0:
            return after.alpha * x_0
        kept, beta = level.alpha / after.alpha, 1 - (level.alpha / level.sigma * after.sigma / after.alpha) ** 2
        return after.alpha * beta * x_0 + kept * after.sigma**2 / level.sigma**2 * x

    x = xs[0]
    for i, (t, level, after) in enumerate(schedule):
        z = xs[i + 1] - mean(xs[i], level, after, SOURCE, t)
        if i == STEPS - 1:
            limit = 15.5 / 128 * z.numel() ** 0.5
            assert kind == "eps" or z.norm() > limit   # of the flow, whose last step is longer
            z = z * min(1.0, limit / z.norm())
        ours, theirs = mean(x, level, after, SOURCE, t), mean(x, level, after, TARGET, t)
        x = z + ours + 1.5 * (theirs - ours)
    inv = p2p.invert(model, picture, SOURCE, method="turbo-edit", steps=STEPS, seed=2)
    r = edited(model, inv, guidance_scale=1.5, negative_prompt=["", SOURCE])
    agrees(r[1:], x)
    assert torch.equal(r[0], picture[0])


@KINDS
@torch.no_grad()
def test_uni_edit_fuses_and_corrects(models, picture, kind):
    """On the target's own latents: m v_T + (1 - m) v_S, and omega (1 + m) (v_T - v_S), m the size of the difference."""
    model, v, omega = models[kind], Field(models[kind]), 3.0
    inv = p2p.invert(model, picture, SOURCE, method="uni-inv", steps=STEPS, skip=1)
    grid = v.grid[::-1][1:]
    y = inv.latents[-1:] / v.x(torch.ones(1), grid[0][0])
    for (a, t), (b, _) in zip(grid, grid[1:]):
        v_s, v_t = v(y, a, SOURCE, t), v(y, a, TARGET, t)
        m = (v_t - v_s).abs().mean(1, keepdim=True)
        m = (m - m.min()) / (m.max() - m.min())
        y = y + (b - a) * (m * v_t + (1 - m) * v_s) + omega * (b - a) * (1 + m) * (v_t - v_s)
    r = p2p.edit(model, inv, [TARGET, SOURCE], editor=p2p.UniEdit(omega))
    agrees(r.latents[1:2], y)
    agrees(r.latents[2], r.latents[0])   # no difference, no edit
    assert r.rows == (STEPS - 1) * 5


# ------------------------------------------------------------------------------------------------------------- what is promised

@KINDS
@pytest.mark.parametrize("method", ["direct", "edit-friendly", "flow-edit", "ddcm", "turbo-edit"])
def test_the_source_is_the_picture(models, picture, kind, method):
    inv = p2p.invert(models[kind], picture, SOURCE, method=method, steps=STEPS)
    r = p2p.edit(models[kind], inv, TARGET)
    assert torch.equal(r.latents[0], picture[0]) and (r.latents[1] - picture[0]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emoji", "emoji-flow"])
def test_exact_inversions_of_trained_models(name):
    """An unguided target under the source's own prompt: what is added to it leads it back."""
    model, (image, _) = p2p.load(name, device="cpu"), render(sample(1, 5, "held out"), 32)
    for method in ("flow-edit", "ddcm"):
        inv = p2p.invert(model, image, SOURCE, method=method, steps=4)
        assert (edited(model, inv, guidance_scale=1.0) - image).abs().max() > 1e-3   # TARGET
        assert (p2p.edit(model, inv, SOURCE, guidance_scale=1.0, **FREE).latents - image).abs().max() < 1e-4
    for method in ("direct", "edit-friendly"):
        inv = p2p.invert(model, image, SOURCE, method=method, steps=4)
        assert (p2p.edit(model, inv, TARGET).latents[0] - image[0]).abs().max() < 1e-4


@KINDS
@pytest.mark.parametrize("method", ["flow-edit", "ddcm"])
def test_equal_prompts_give_the_picture(models, picture, kind, method):
    """With the source's guidance for the target too; DDCM's source has none."""
    inv = p2p.invert(models[kind], picture, SOURCE, method=method, steps=STEPS, inversion_guidance=2.0, seed=1)
    assert (p2p.edit(models[kind], inv, SOURCE, guidance_scale=2.0, **FREE).latents - picture).abs().max() < 1e-4


class Twin(torch.nn.Module):
    """A network of noise as a network of velocities: every level is asked with its own x / (alpha + sigma)."""

    def __init__(self, model):
        super().__init__()
        self.inner = model.unet
        self.levels = [Level.of(a) for a in model.alphas_cumprod.tolist()]

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("inner", "levels") else getattr(self.inner, name)

    def times(self, timesteps, *given, **more):
        return list(timesteps)

    def forward(self, x, t, context, edit=None, watch=(), **given):
        level = self.levels[round(float(t))]
        x = x * level.scale
        eps, seen = self.inner(x, t.long(), context, edit=edit, watch=watch, **given)
        return eps - (x - level.sigma * eps) / level.alpha, seen


class Scheduled(p2p.Model):
    def schedule(self, steps, *how, **more):
        ours = super(Scheduled, replace(self, flow=None)).schedule(steps, size=more.get("size"))
        return replace(ours, levels=tuple(Level(1 - level.share, level.share) for level in ours.levels))


@pytest.mark.parametrize("settings", [FREE, {}], ids=["alone", "with injection"])
def test_flow_edit_of_a_model_of_noise_is_that_of_its_flow(models, picture, settings):
    """In double precision: what single precision rounds is several times what is asked for here."""
    model = models["eps"]
    text = [copy.deepcopy(encoder).double() for encoder in model.text_encoders]
    model = replace(model, unet=copy.deepcopy(model.unet).double(), text_encoders=text)
    made = {f.name: getattr(model, f.name) for f in fields(model)}
    twin = Scheduled(**made | {"unet": Twin(model), "prediction": "flow", "flow": Flow()})
    both = [p2p.invert(each, picture.double(), SOURCE, method="flow-edit", steps=STEPS, skip=1) for each in (model, twin)]
    found = [p2p.edit(each, inv, TARGET, **settings).latents for each, inv in zip((model, twin), both)]
    assert (found[0] - found[1]).abs().max() < 1e-6 and (found[0][1] - picture[0]).abs().max() > 1e-2


def test_flow_edit_begins_where_its_authors_do(models):
    """FlowEdit's run_script for Stable Diffusion 3: T_steps 50, n_max 33, n_avg 1, n_min 0."""
    planned = expected(models["flow"], SOURCE, method="flow-edit", steps=50)
    assert (planned.steps - planned.skip, planned.n_avg, planned.n_min, planned.calls) == (33, 1, 0, 33)


def test_averaged_noises_meet_windows_that_begin_among_them(models, picture):
    """A source that is run at some of the calls of a step only."""
    inv = p2p.invert(models["flow"], picture, SOURCE, method="flow-edit", steps=STEPS, skip=1, n_avg=3)
    for window in ((0.2, 0.5), (0.0, 0.2), (0.5, 1.0)):
        short, whole = (p2p.edit(models["flow"], inv, TARGET, cross_replace_steps=window, self_replace_steps=0.0, **more)
                        for more in ({}, {"record": p2p.Record(text=256)}))
        assert short.rows < whole.rows and (short.latents - whole.latents).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_few_step_models_are_inverted_by_ddcm_alone(models, picture, sampler):
    """In their own steps, where no number is given."""
    model = replace(models["eps"], sampler=sampler, steps=4)
    inv = p2p.invert(model, picture, SOURCE, method="ddcm")
    assert inv.steps == 4
    r = p2p.edit(model, inv, TARGET)
    assert torch.equal(r.latents[0], picture[0]) and (r.latents[1] - picture[0]).abs().max() > 1e-3
    assert r.settings["sampler"] == sampler and torch.equal(p2p.edit(model, inv, TARGET, sampler=sampler).latents, r.latents)
    with pytest.raises(p2p.UsageError, match=f"sampler: an inverted or traced source is sampled by {sampler}"):
        p2p.edit(model, inv, TARGET, sampler="ddim")
    with pytest.raises(p2p.UsageError, match=f"flow-edit inverts in small steps, and .* {sampler}: use ddcm, or the model"):
        p2p.invert(model, picture, SOURCE, method="flow-edit", steps=4)

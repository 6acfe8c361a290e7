"""The loops of PnPInversion's scripts written out with explicit maps: models/p2p, models/edit_friendly_ddm, models/masactrl and
run_editing_pnp.py, cut down to a few steps.

Token mappers are `align.official_*`, which other tests hold against the original.
"""
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from p2p import align
from p2p.image import from_pil
from p2p.models.attention import CrossAttention, SelfAttention
from p2p.request.start import draw

STEPS, SIDE = 5, 3   # of the latents' 12 pixels a side a blend's maps have a quarter
SOURCE = "a cat on red grass"


@contextmanager
def controlled(control):
    """All attention by explicit maps: `control` gets q, k, v (B, h, N, d) and gives what is attended to."""
    def forward(self, x, *given):
        cross = isinstance(self, CrossAttention)
        k, v = given[0][self.site] if cross else (self.to_k(x), self.to_v(x))
        q, k, v = self.split(self.to_q(x), k, v)
        return self.join(control(q, k, v, cross), x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for kind in (SelfAttention, CrossAttention):
            patch.setattr(kind, "forward", forward)
        yield


@contextmanager
def injected(convolution):
    """All rows take what the first row's convolution gives (not its skip connection)."""
    hook = convolution and convolution.register_forward_hook(lambda m, given, out: out[[0, 0, 0]])
    yield
    if hook:
        hook.remove()


def probs(q, k):
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


class PromptToPrompt:
    """AttentionRefine or AttentionReplace, AttentionReweight and LocalBlend for rows [uncond, uncond, source, target]."""

    def __init__(self, model, target, words, mode, limit, side):
        source, edited = model.tokens(SOURCE), model.tokens(target)
        if mode == "refine":
            mapper, a = align.official_refinement(source, edited, 77)
            self.edit = lambda p, q: p[:, :, mapper] * a + q * (1 - a)
        else:
            m = align.official_replacement(source, edited, 77)
            self.edit = lambda p, q: p @ m
        self.limit, self.side, self.step, self.seen = limit, side, 0, 0.0
        self.words = [[i + 1 for i, w in enumerate(t.split(" ")) if w == word]     # every word here is one token
                      for t, word in zip((SOURCE, target), words)] if words else None
        self.weights = torch.ones(77, dtype=torch.float64)
        if words:
            self.weights[self.words[1]] = 2

    def __call__(self, q, k, v, cross):
        p = probs(q, k)
        if cross:
            if self.step < int(0.4 * (STEPS + 1)):
                p[3] = self.edit(p[2], p[3]) * self.weights
            if p.shape[2] == self.side**2:
                self.maps.append(p[2:])                                           # stored, and edited in place
        elif p.shape[2] <= self.limit and self.step < int(0.6 * STEPS):
            p[3] = p[2]
        return p @ v

    def blend(self, x):
        """After each step, x (2, C, H, W): the maps of the decoder and encoder at a quarter of the latents' side."""
        if self.words is None:
            return x
        maps = self.maps[:2] + self.maps[2:][-3:]                                  # the middle block has another size
        self.seen = self.seen + torch.stack(maps).mean((0, 2))                     # (2, pixels, 77)
        if self.step + 1 <= int(0.2 * STEPS):
            return x
        m = torch.stack([s[:, w].sum(-1) for s, w in zip(self.seen, self.words)]).view(2, 1, self.side, self.side)
        m = F.interpolate(F.max_pool2d(m, 3, 1, 1), size=x.shape[2:])
        m = (m / m.amax((2, 3), keepdim=True)).gt(0.3)
        m = (m[:1] + m).double()
        return x[:1] + m * (x - x[:1])


class Published:
    """The scripts' loops on one picture."""

    def __init__(self, model, picture, inverted_with=SOURCE):
        self.model, self.schedule = model, list(model.schedule(STEPS))
        self.text = lambda *prompts: model.text(list(prompts))
        x = model.encode(from_pil(Image.open(picture).resize(model.size, Image.BICUBIC)))
        self.path, c = [x], self.text(inverted_with)
        for t, a_t, a_prev in self.schedule[::-1]:
            self.path.append(self.ddim(self.path[-1], self.eps(self.path[-1], t, c), a_prev, a_t))

    def eps(self, x, t, context):
        return self.model.unet(x, t, context)[0]

    @staticmethod
    def ddim(x, eps, a, b):
        return b.alpha * (x - a.sigma * eps) / a.alpha + b.sigma * eps

    def both(self, x, t, null, text, scale):
        u, c = self.eps(torch.cat([x, x]), t, torch.cat([null, text])).chunk(2)
        return u + scale * (c - u)

    def p2p(self, control, target, scale, null=None, direct=False, proximal=None, scale_up=1.0):
        """p2p_guidance_forward, direct_inversion_p2p_guidance_forward, proximal_guidance_forward ("l0"). null: one for all
        steps, or for each."""
        null = [self.text("", "")] * STEPS if null is None else null if isinstance(null, list) else [null] * STEPS
        text, x, path = self.text(SOURCE, target), self.path[-1].repeat(2, 1, 1, 1), self.path[::-1]
        for i, (t, a, b) in enumerate(self.schedule):
            control.step, control.maps = i, []
            with controlled(control):
                u, c = self.eps(torch.cat([x, x]), t, torch.cat([null[i], text])).chunk(2)
            delta = c - u
            if proximal:
                limit = delta.abs().quantile(proximal)
                delta = delta - delta.clamp(-limit, limit)
            x = self.ddim(x, u + scale * delta, a, b)
            if direct:                                     # noise_loss: what leads back to the inverted latents
                x = torch.cat([path[i + 1], x[1:]])
            x = control.blend(x)
        return x[1:]

    def null_text(self, scale=7.5):
        """null_optimization: what stands for the empty prompt at each step."""
        text, null, x, out = self.text(SOURCE), self.text(""), self.path[-1], []
        for i, (t, a, b) in enumerate(self.schedule):
            null = null.detach().clone().requires_grad_()
            optimiser, c = torch.optim.Adam([null], lr=1e-2 * (1 - i / 100)), self.eps(x, t, text)
            for _ in range(10):
                with torch.enable_grad():
                    u = self.eps(x, t, null)
                    loss = F.mse_loss(self.ddim(x, u + scale * (c - u), a, b), self.path[-2 - i])
                    null.grad, = torch.autograd.grad(loss, null)
                optimiser.step()
                if loss < 1e-5 + i * 2e-5:
                    break
            out.append(null.detach().expand(2, -1, -1))
            x = self.ddim(x, self.both(x, t, null, text, scale), a, b).detach()
        return out

    def edit_friendly(self, control, target, scale=7.5):
        noise = draw(self.path[0].shape[1:], [1234], 1 + STEPS)
        levels = [self.path[0]] + [a.alpha * self.path[0] + a.sigma * z
                                   for (_, a, _), z in zip(self.schedule[::-1], noise[1:])]
        text, zs = self.text(SOURCE), {}

        def mean(x, eps, a, b):
            variance = (b.sigma / a.sigma) ** 2 * (1 - (a.alpha / b.alpha) ** 2)
            x_0 = (x - a.sigma * eps) / a.alpha
            return b.alpha * x_0 + (b.sigma**2 - variance) ** 0.5 * eps, variance**0.5

        for i, (t, a, b) in enumerate(self.schedule):
            x = levels[STEPS - i]
            mu, sigma = mean(x, self.eps(x, t, text), a, b)
            zs[i] = (levels[STEPS - i - 1] - mu) / sigma if i < STEPS - 1 else torch.zeros_like(x)
        skip, null, text = int(0.24 * STEPS), self.text("", ""), self.text(SOURCE, target)
        x = levels[STEPS - skip].repeat(2, 1, 1, 1)
        scales = torch.tensor([1.0, scale]).view(-1, 1, 1, 1)
        for i in range(skip, STEPS):
            t, a, b = self.schedule[i]
            control.step, control.maps = i - skip, []              # the windows' table is that of all steps
            with controlled(control):
                mu, sigma = mean(x, self.both(x, t, null, text, scales), a, b)
            x = mu + (sigma * zs[i] if i < STEPS - 1 else 0)
        return x[1:]

    def masactrl(self, target, direct):
        text, null, path = self.text("", target), self.text("", ""), self.path[::-1]
        x, seen = path[0].repeat(2, 1, 1, 1), []

        def control(q, k, v, cross):
            seen.append(cross)
            if not cross and seen.count(False) > 10:
                k, v = k[[0, 0, 2, 2]], v[[0, 0, 2, 2]]
            return probs(q, k) @ v

        for i, (t, a, b) in enumerate(self.schedule):
            seen.clear()
            with controlled(control):
                x = self.ddim(x, self.both(x, t, null, text, 7.5), a, b)
            if direct:
                x = torch.cat([path[i + 1], x[1:]])
        return x[1:]

    def pnp(self, target, direct):
        path, c = self.path, self.text(SOURCE)
        if not direct:                                             # ddim_sample: a list without the noise itself
            x, path = self.path[-1], []
            for t, a, b in self.schedule:
                x = self.ddim(x, self.eps(x, t, c), a, b)
                path.append(x)
            path.reverse()
        text = self.text("", "ugly, blurry, black, low res, unrealistic", target)
        x, seen = path[-1], []
        block = self.model.unet.up_blocks[1].resnets[1].conv2

        def control(q, k, v, cross):
            seen.append(cross)
            if not cross and seen.count(False) > 8 and i < int(0.5 * STEPS):   # 6 + 1, and the first of the decoder
                q, k = q[[0, 0, 0]], k[[0, 0, 0]]
            return probs(q, k) @ v

        for i, (t, a, b) in enumerate(self.schedule):
            seen.clear()
            with controlled(control), injected(block if i < int(0.8 * STEPS) else None):
                _, u, c = self.eps(torch.cat([path[-1 - i], x, x]), t, text).chunk(3)
            x = self.ddim(x, u + 7.5 * (c - u), a, b)
        return x

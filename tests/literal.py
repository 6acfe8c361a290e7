"""Algorithm 1 of Prompt-to-Prompt (Hertz et al. 2022) as the paper has it, with every attention map written out.

Read this first. `python -m tests.literal` edits a picture of the bundled model; the tests hold the package against it. Lines 7
to 9 take one pass: a layer's map is edited before the next layer runs, as in the authors' code. For UNets with transformer blocks.
"""
from contextlib import ExitStack
from unittest.mock import patch

import torch
from einops import rearrange

import p2p
from p2p import align
from p2p.image import to_pil
from p2p.models.attention import Attention, HybridAttention
from p2p.sampler import ddim_step, x0_and_eps


def attention(layer, change):
    """A layer's forward with its map M (1, h, N, K) formed. change(site, M, pixels) -> the map to use; pixels: how many
    columns of pixels stand before those of the text, None in self-attention."""
    def forward(x, *given):
        k, v = given[0][layer.site] if hasattr(layer, "text") else (layer.to_k(x), layer.to_v(x))
        pixels = 0 if hasattr(layer, "text") else None
        if isinstance(layer, HybridAttention):
            pixels = x.shape[1]
            k, v = torch.cat([layer.to_k(x), k], dim=1), torch.cat([layer.to_v(x), v], dim=1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=layer.heads) for y in (layer.to_q(x), k, v))
        M = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)                     # Eq. 1
        return layer.to_out(rearrange(change(layer.site, M, pixels) @ v, "b h n d -> b n (h d)"))
    return forward


def DM(model, z, t, context, change=lambda site, M, pixels: M):
    """The network's prediction for z at t, with its maps changed on the way."""
    with ExitStack() as patched:
        for layer in model.unet.layers(Attention):
            patched.enter_context(patch.object(layer, "forward", attention(layer, change)))
        return model.unet(z, t, context)[0]


def edited(M_src, M, pixels, edit):
    """Edit(M_t, M*_t, t) of section 3.2, column by column. edit: {column: (columns of the source or None, weight)} of the
    tokens that are injected at this step."""
    M_hat = M.clone()
    for j, (sources, c) in edit.items():
        own = M[..., pixels + j] if sources is None else sum(M_src[..., pixels + i] for i in sources) / len(sources)
        M_hat[..., pixels + j] = c * own
    return M_hat


def algorithm_1(model, source, target, edits, self_steps, steps, *, seed=0, size=None, local_blend=None):
    """z and z* (2, C, H, W) after every step. edits: for each step what `edited` takes; self_steps: in so many self-attention
    maps of at most 32 x 32 pixels are the source's. local_blend(step, maps of the source, the target's) -> where z* may differ."""
    P, P_star, empty = (model.text([prompt]) for prompt in (source, target, ""))
    shape = (1, *model.latent_shape(*(size or model.size)))
    z = z_star = torch.randn(shape, generator=torch.Generator().manual_seed(seed))               # lines 3 and 4
    for i, (t, level, after) in enumerate(model.schedule(steps)):                               # line 5
        maps, maps_star = {}, {}

        def look(site, M, pixels, maps=maps):
            return maps.setdefault(site, M)

        def inject(site, M, pixels, i=i, maps=maps, maps_star=maps_star):
            if pixels is None:                                                                 # self-attention
                return maps[site] if i < self_steps and M.shape[2] <= 32 * 32 else M
            return maps_star.setdefault(site, edited(maps[site], M, pixels, edits[i]))

        def step(z, context, change, t=t, level=level, after=after):
            uncond, cond = DM(model, z, t, empty), DM(model, z, t, context, change)
            out = uncond + model.guidance_scale * (cond - uncond)
            return ddim_step(*x0_and_eps(z, out, level, model.prediction, model.clip), level, after)

        z, z_star = step(z, P, look), step(z_star, P_star, inject)                             # lines 6 to 9
        if local_blend is not None:                                                            # section 4
            z_star = torch.where(local_blend(i, maps, maps_star), z_star, z)
        yield torch.cat([z, z_star])


def word_swap(model, source, target, steps, tau):
    """Each token takes the map of the source's token in its place: for as many words in both, of one token each."""
    columns = {j: ([j], 1.0) for j in range(model.length)}
    return [columns if i < int(tau * (steps + 1)) else {} for i in range(steps)]   # rounded as in the authors' code


def refinement(model, source, target, steps, tau):
    """Tokens that both prompts have take the source's map; new ones keep their own."""
    mapper, aligned = align.refinement(model.tokens(source), model.tokens(target), model.length)
    columns = {j: ([int(mapper[j])], 1.0) for j in range(model.length) if aligned[j]}
    return [columns if i < int(tau * (steps + 1)) else {} for i in range(steps)]


if __name__ == "__main__":
    model, pair, n = p2p.load("emoji"), ("a red cat on grass", "a red dog on grass"), 20
    with torch.no_grad():
        *_, latents = algorithm_1(model, *pair, word_swap(model, *pair, n, 0.8), int(0.4 * n), n)
    for name, picture in zip(("source.png", "edit.png"), to_pil(model.decode(latents))):
        picture.save(name)
        print(name)

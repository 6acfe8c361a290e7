"""Trains the bundled super-resolution stage, 64 to 256 pixels, on renders of the emoji world.

Continues from its last checkpoint.

    python -m p2p.weights.emoji.upscale RUN_FOLDER --pictures 100000

A diffusion model like the first stage (predicts x_0, error weighted as for v), conditioned on the small
picture with noise of a level up to `LEVEL`, as in `p2p.upscale`. It has no attention: it learns edges and
texture. It is trained on whole pictures, since group norm takes its means over all pixels.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2p.models.unet import EMOJI_UPSCALER, UNet
from p2p.weights.emoji.train import metadata, shifted_cosine_alphas_cumprod
from p2p.weights.emoji.training import export, fit, initialised, optimizers, parser
from p2p.weights.emoji.world import render, sample

LEVEL, SIDE = 250, 256


class Upscaler(nn.Module):
    """The trained part under the names of the shipped file."""

    def __init__(self):
        super().__init__()
        self.unet = UNet(EMOJI_UPSCALER)
        for name, module in self.unet.named_modules():
            if name.endswith(("conv2", "conv_out")):
                nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)

    def forward(self, x_t: Tensor, t: Tensor, low: Tensor, level: Tensor) -> Tensor:
        return self.unet(x_t, t, x_t.new_zeros(len(x_t), 0, 1), low=low, level=level)[0]


def pairs(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Large renders, and small ones enlarged.  -> two of (n, 3, SIDE, SIDE)"""
    scene = sample(n, g)
    return render(scene, SIDE)[0], F.interpolate(render(scene)[0], SIDE, mode="bilinear")


def main(argv: list[str] | None = None) -> None:
    a = parser(__doc__, "upscale", captioned=False, pictures=100_000, batch=4, lr=1e-3).parse_args(argv)
    a.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model, ema = Upscaler().to(a.device, memory_format=torch.channels_last), Upscaler().to(a.device)
    initialised(model, a.init)
    ema.load_state_dict(model.state_dict())
    table = shifted_cosine_alphas_cumprod(shift=1.0)
    abar = table.float().to(a.device)

    def draw(seen: int) -> Iterator[tuple[Tensor, ...]]:
        while True:
            x_0, low = pairs(a.batch, torch.Generator().manual_seed(2_000_003 + seen))
            yield x_0.to(a.device), low.to(a.device)
            seen += a.batch

    def noised(x: Tensor, t: Tensor) -> Tensor:
        a_t = abar[t].view(-1, 1, 1, 1)
        x = a_t.sqrt() * x + (1 - a_t).sqrt() * torch.randn_like(x)
        return x.contiguous(memory_format=torch.channels_last)

    def loss(run, x_0: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        t, level = (torch.randint(n, (len(x_0),), device=x_0.device) for n in (len(abar), LEVEL + 1))
        predicted = run(noised(x_0, t), t, noised(low, level), level)
        return (predicted.float() - x_0).square().mean((1, 2, 3)), 1 - abar[t]

    fit(a, model, ema, optimizers(model, a.lr), draw, loss,
        lambda seen: export(ema, a.folder / "upscaler.safetensors", metadata(ema.unet, seen),
                            alphas_cumprod=table))


if __name__ == "__main__":
    main()

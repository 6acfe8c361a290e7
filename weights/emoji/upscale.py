"""Trains the bundled super-resolution stage, 64 to 256 pixels, on renders of the emoji world. Continues from
its last checkpoint.

    python -m p2p.weights.emoji.upscale RUN_FOLDER --pictures 100000

A diffusion model like the first stage (predicts x_0, error weighted as for v), conditioned on the small
picture with noise of a level up to `LEVEL`, as in `p2p.upscale`. It has no attention: it learns edges and
texture. It is trained on whole pictures, since group norm takes its means over all pixels.
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2p.models.unet import EMOJI_UPSCALER, UNet
from p2p.weights.emoji.train import (
    descend,
    export,
    load_state,
    mixed,
    optimizers,
    save_state,
    set_rate,
    shifted_cosine_alphas_cumprod,
)
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
    ap = argparse.ArgumentParser(prog="python -m p2p.weights.emoji.upscale",
                                 description=__doc__.splitlines()[0])
    ap.add_argument("folder", type=Path)
    ap.add_argument("--pictures", type=int, default=100_000,
                    help="in all; the last fifth cools the learning rate down")
    ap.add_argument("--stop", type=int, help="stop after this many, to go on later")
    ap.add_argument("--batch", type=int, default=4)
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--ema", type=float, default=0.999)
    ap.add_argument("--bf16", action="store_true", help="products in bfloat16, faster where the CPU has it")
    ap.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    a = ap.parse_args(argv)

    a.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model = Upscaler().to(memory_format=torch.channels_last)
    ema = Upscaler()
    ema.load_state_dict(model.state_dict())
    steppers = optimizers(model, a.lr)
    seen = load_state(a.folder / "state.pt", model, ema, steppers)
    schedule = shifted_cosine_alphas_cumprod(shift=1.0)
    abar = schedule.float()
    started, first, losses, stop = time.time(), seen, [], min(a.pictures, a.stop or a.pictures)
    while seen < stop:
        step = seen // a.batch
        rate = set_rate(steppers, a.lr, step, seen, a.pictures)
        g = torch.Generator().manual_seed(2_000_003 + step)
        x_0, low = pairs(a.batch, g)
        t = torch.randint(len(abar), (a.batch,), generator=g)
        level = torch.randint(LEVEL + 1, (a.batch,), generator=g)
        noised = []
        for x, a_t in ((x_0, abar[t].view(-1, 1, 1, 1)), (low, abar[level].view(-1, 1, 1, 1))):
            noise = torch.randn(x.shape, generator=g)
            x_t = a_t.sqrt() * x + (1 - a_t).sqrt() * noise
            noised.append(x_t.contiguous(memory_format=torch.channels_last))
        with mixed("cpu", a.bf16):
            predicted = model(noised[0], t, noised[1], level)
        error = (predicted.float() - x_0).square().mean((1, 2, 3))
        losses.append(descend(model, ema, steppers, error, abar[t], a.ema, step))
        seen += a.batch
        if (step + 1) % a.every == 0 or seen >= stop:
            print(json.dumps({"pictures": seen, "loss": round(sum(losses) / len(losses), 5),
                              "lr": round(rate, 7),
                              "pictures_per_s": round((seen - first) / (time.time() - started), 2)}),
                  flush=True)
            losses = []
            save_state(a.folder / "state.pt", model, ema, steppers, seen)
            export(ema, a.folder / "upscaler.safetensors", seen, schedule)


if __name__ == "__main__":
    main()

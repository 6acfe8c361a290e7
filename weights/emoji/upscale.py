"""Trains the bundled super-resolution stage, 64 to 256 pixels, on crops of the emoji world. Resumes where it stopped.

    python -m weights.emoji.upscale RUN_FOLDER --crops 400000 --stop 200000
    python -m weights.emoji.upscale RUN_FOLDER --crops 400000 --crop 256 --scenes 4 --each 1

A diffusion model like the first stage (predicts x_0, error weighted as for v), told the small picture with noise of a level
up to `LEVEL` on it, as in `p2p.upscale`. It has no attention: what it learns is edges and texture, first from crops. Group
norm takes its means over all that it is shown, so the end of the training must see whole pictures (--crop 256).
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.unet import EMOJI_UPSCALER, UNet
from weights.emoji.train import descend, export, load_state, mixed, optimizers, save_state, set_rate, shifted_cosine_alphas_cumprod
from weights.emoji.world import render, sample

LEVEL, SIDE, UNIT = 250, 256, 64


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


def crops(scenes: int, each: int, side: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """`each` crops of every one of so many scenes: true pixels, and the small picture enlarged.  -> two of (B, 3, side, side)"""
    scene = sample(scenes, g)
    pair = torch.cat([render(scene, SIDE)[0], F.interpolate(render(scene)[0], SIDE, mode="bilinear", align_corners=True)], dim=1)
    corners = torch.randint((SIDE - side) // 4 + 1, (scenes, each, 2), generator=g) * 4     # the network's positions are 4 wide
    cut = torch.stack([p[:, y:y + side, x:x + side] for p, at in zip(pair, corners.tolist()) for y, x in at])
    return cut[:, :3], cut[:, 3:]


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m weights.emoji.upscale", description=__doc__.splitlines()[0])
    ap.add_argument("folder", type=Path)
    ap.add_argument("--crops", type=int, default=400_000, help="in all, of 64 x 64; the last fifth cools the rate down")
    ap.add_argument("--stop", type=int, help="stop after this many, to go on later")
    ap.add_argument("--crop", type=int, default=UNIT, help="their side; larger ones count as so many of 64 x 64")
    ap.add_argument("--scenes", type=int, default=8, help="a batch, with --each crops of every one")
    ap.add_argument("--each", type=int, default=8)
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
    schedule, batch, areas = shifted_cosine_alphas_cumprod(shift=1.0), a.scenes * a.each, a.scenes * a.each * (a.crop // UNIT) ** 2
    abar = schedule.float()
    started, first, losses, stop = time.time(), seen, [], min(a.crops, a.stop or a.crops)
    while seen < stop:
        step = seen // areas
        rate = set_rate(steppers, a.lr, step, seen, a.crops)
        g = torch.Generator().manual_seed(2_000_003 + step)
        x_0, low = crops(a.scenes, a.each, a.crop, g)
        t, level = torch.randint(len(abar), (batch,), generator=g), torch.randint(LEVEL + 1, (batch,), generator=g)
        noised = []
        for x, at in ((x_0, abar[t].view(-1, 1, 1, 1)), (low, abar[level].view(-1, 1, 1, 1))):
            noise = torch.randn(x.shape, generator=g)
            noised.append((at.sqrt() * x + (1 - at).sqrt() * noise).contiguous(memory_format=torch.channels_last))
        with mixed("cpu", a.bf16):
            predicted = model(noised[0], t, noised[1], level)
        error = (predicted.float() - x_0).square().mean((1, 2, 3))
        losses.append(descend(model, ema, steppers, error, abar[t], a.ema, step))
        seen += areas
        if (step + 1) % a.every == 0 or seen >= stop:
            print(json.dumps({"crops": seen, "loss": round(sum(losses) / len(losses), 5), "lr": round(rate, 7),
                              "crops_per_s": round((seen - first) / (time.time() - started), 1)}), flush=True)
            losses = []
            save_state(a.folder / "state.pt", model, ema, steppers, seen)
            export(ema, a.folder / "upscaler.safetensors", seen, schedule)


if __name__ == "__main__":
    main()

"""Trains the bundled text-to-image model on renders of the emoji world. Continues from its last checkpoint.

    python -m p2p.weights.emoji.train RUN_FOLDER --pictures 600000

The folder holds state.pt (to resume), emoji.safetensors (the averaged weights, as shipped), log.jsonl and,
from time to time, sample grids (drawn by `p2p generate` in a process of its own: nothing here imports the
method). A shifted cosine schedule; the rest as `training` has it.
"""
from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from p2p.models.unet import EMOJI, UNet
from p2p.weights.emoji.training import export, fit, initialised, optimizers, parser, pictures, text_tower

SHARPNESS = 6.0      # of the queries and keys of text at the start
SAMPLES = ["a cat on grass", "a red car on the beach", "a purple house in the desert", "a castle at night",
           "a watercolor of a flower in the snow", "a sketch of a blue bicycle on grass",
           "a yellow bird next to a tree on grass", "a huge pumpkin on snowy grass"]


def shifted_cosine_alphas_cumprod(steps: int = 1000, shift: float = 4.0) -> Tensor:
    """Cosine schedule with its noise times `shift` (Hoogeboom et al. 2023, section 2.1).  -> (steps,) float64

    A flat region of n pixels shows its colour at a signal-to-noise ratio of 1 / n: unshifted, what words
    decide would be settled within the first two or three of fifty steps, and there would be next to nothing
    to learn from them.
    """
    angle = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * math.pi / 2
    snr = (angle.cos() / (shift * angle.sin())) ** 2
    return snr / (1 + snr)


class Model(nn.Module):
    """The trained parts under the names of the shipped file."""

    def __init__(self):
        super().__init__()
        self.unet, self.text = UNet(EMOJI), text_tower()
        for name, module in self.unet.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):   # residual branches start at zero
                nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
            if name.endswith(("attn2.to_q", "attn2.to_k", "add_k_proj")):
                module.weight.data *= SHARPNESS

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, t, self.text(ids))[0]


def metadata(unet: nn.Module, seen: int) -> dict[str, str]:
    usual = type(unet.config)()   # fields that are None, and by default, are later than files that lack them
    sizes = {name: size for name, size in asdict(unet.config).items()
             if size is not None or getattr(usual, name) is not None}
    return {"format": "p2p-emoji", "prediction": "x0", "pictures": str(seen), "unet": json.dumps(sizes)}


def draw_samples(file: Path) -> None:
    subprocess.run([sys.executable, "-m", "p2p", "generate", *SAMPLES, "--model", str(file), "--seed", "0",
                    "--steps", "25", "--out", str(file.with_name("samples")), "--quiet"], check=True)


def main(argv: list[str] | None = None) -> None:
    a = parser(__doc__, "train", pictures=600_000, batch=32, lr=8e-4).parse_args(argv)
    a.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model, ema = Model().to(a.device, memory_format=torch.channels_last), Model().to(a.device)
    initialised(model, a.init)
    ema.load_state_dict(model.state_dict())
    table = shifted_cosine_alphas_cumprod()
    abar, file = table.float().to(a.device), a.folder / "emoji.safetensors"

    def loss(run, x_0: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.randint(len(abar), (len(x_0),), device=x_0.device)
        a_t = abar[t].view(-1, 1, 1, 1)
        x_t = a_t.sqrt() * x_0 + (1 - a_t).sqrt() * torch.randn_like(x_0)                # DDPM Eq. 4
        predicted = run(x_t.contiguous(memory_format=torch.channels_last), t, ids)
        return (predicted.float() - x_0).square().mean((1, 2, 3)), 1 - abar[t]

    def checkpoint(seen: int) -> None:
        export(ema, file, metadata(ema.unet, seen), alphas_cumprod=table)
        if a.samples and seen // a.batch % (a.every * a.samples) == 0:
            draw_samples(file)

    fit(a, model, ema, optimizers(model, a.lr), lambda seen: pictures(a, ema.text, seen), loss, checkpoint)


if __name__ == "__main__":
    main()

"""Trains the bundled joint-attention flow model on renders of the emoji world.

Continues from its last checkpoint.

    python -m p2p.weights.emoji.train_flow RUN_FOLDER --pictures 1240000

A rectified flow, x_t = (1 - sigma) x_0 + sigma eps, whose network gives x_0; sigma is drawn evenly, one of
each share of the range a batch, and shifted (Esser et al. 2024, Eq. 23). The rest as `training` has it.
"""
from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from p2p.models.mmdit import EMOJI_FLOW, build
from p2p.weights.emoji.train import draw_samples
from p2p.weights.emoji.training import export, fit, initialised, optimizers, parser, pictures, text_tower

SHIFT = 3.0   # also of the model's levels when it is sampled
ENDS = ("embedding", "img_in", "txt_in", "time_in", "mod", "final_layer")   # and modulations, by AdamW


class Model(nn.Module):
    """The trained parts under the names of the shipped file, where the transformer is "unet"."""

    def __init__(self):
        super().__init__()
        # here the picture itself, whose error is trained; what is shipped gives the velocity that follows
        self.unet, self.text = build(replace(EMOJI_FLOW, says="velocity")), text_tower()
        for name, module in self.unet.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight), nn.init.zeros_(module.bias)
                if "mod" in name or name == "final_layer.linear":   # gates are shut at the start
                    nn.init.zeros_(module.weight)

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, 1000 * sigma, self.text(ids))[0]


def main(argv: list[str] | None = None) -> None:
    a = parser(__doc__, "train_flow", pictures=1_240_000, batch=256, lr=1.5e-3, ramp=400_000,
               cool=0.35).parse_args(argv)
    a.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model, ema = Model().to(a.device), Model().to(a.device)
    initialised(model, a.init)
    ema.load_state_dict(model.state_dict())
    file = a.folder / "flow.safetensors"

    def loss(run, x_0: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        n = len(x_0)
        share = (torch.arange(n, device=x_0.device) + torch.rand(n, device=x_0.device)) / n
        sigma = SHIFT * share / (1 + (SHIFT - 1) * share)
        s = sigma.view(-1, 1, 1, 1)
        predicted = run((1 - s) * x_0 + s * torch.randn_like(x_0), sigma, ids)
        return (predicted.float() - x_0).square().mean((1, 2, 3)), sigma.square()

    def checkpoint(seen: int) -> None:
        export(ema, file, {"format": "p2p-emoji-flow", "shift": str(SHIFT), "pictures": str(seen),
                           "unet": json.dumps(asdict(EMOJI_FLOW))})
        if a.samples and seen // a.batch % (a.every * a.samples) == 0:
            draw_samples(file)

    fit(a, model, ema, optimizers(model, a.lr, ENDS), lambda seen: pictures(a, ema.text, seen), loss,
        checkpoint)


if __name__ == "__main__":
    main()

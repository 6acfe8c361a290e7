"""Memory and work of an edit by family, computed without any memory: parameters, activations, operations.

    python -m benchmarks.families

One target with guidance, four rows. Activations are the bill of `p2p.request.memory`, a lower bound.
"""
from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from p2p.models.text import CLIP_L, OPENCLIP_G, OPENCLIP_H, SDXL_L, TextEncoder
from p2p.models.unet import SD1, SD2, SDXL, UNet
from p2p.models.vae import SD, AutoencoderKL
from p2p.request import memory

FAMILIES = {"SD 1": (SD1, [CLIP_L], 64), "SD 2, 512": (SD2, [OPENCLIP_H], 64), "SD 2, 768": (SD2, [OPENCLIP_H], 96),
            "SD XL": (SDXL, [SDXL_L, OPENCLIP_G], 128)}   # and a side of the latents
ROWS = 4


@torch.no_grad()
def row(name: str) -> str:
    config, towers, side = FAMILIES[name]
    model = SimpleNamespace(shrink=8, tile=None, vae=SimpleNamespace(config=SD, dtype=torch.float32))
    with torch.device("meta"):
        unet, others = UNet(config), [*map(TextEncoder, towers), AutoencoderKL(SD)]
        activations = ROWS * unet.numbers_held(side, side)
        vector = torch.zeros(1, config.vector_dim) if config.vector_dim else None
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, 4, side, side), torch.zeros(1).long(), torch.zeros(1, 77, config.context_dim), vector=vector)
    count = [sum(p.numel() for m in modules for p in m.parameters()) / 1e9 for modules in ([unet], others)]
    vae = sum(p.numel() for p in others[-1].parameters()) / 1e9
    wide = vae if config is SDXL else 0   # which stays in float32
    weights = [4 * sum(count), 2 * count[0] + 4 * count[1], 2 * sum(count) + 2 * wide]
    cells = [f"{count[0]:.2f} + {count[1]:.2f}", *(f"{w:.1f}" for w in weights), f"{4 * activations / 1e9:.2f}",
             f"{memory._autoencoder(model, (4, side, side), False) / 1e9:.2f}", f"{counter.get_total_flops() / 1e12:.1f}"]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("| family | parameters, 10⁹: UNet + the rest | GB in float32 | with `--half-weights` | in float16 | activations, float32 "
          "| of decoding | 10¹² operations a row and step |\n|---|---|---|---|---|---|---|---|")
    print("\n".join(map(row, FAMILIES)))

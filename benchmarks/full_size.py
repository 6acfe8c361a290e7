"""A full-size Stable Diffusion 1 in random weights: memory while loading, and one UNet call against diffusers.

    python -m benchmarks.full_size [--folder FOLDER]        # 4.3 GB on disk, about 10 GB of memory, a few minutes

Each side runs in a process of its own, one after the other; memory is the peak of the process.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import resident
from p2p.models.text import CLIP_L, TextEncoder  # before diffusers: it defines operators that a CPU build of torch lacks
from p2p.models.unet import SD1, UNet
from p2p.models.vae import SD, AutoencoderKL
from p2p.weights import keys

X_SEED, T, LATENT = 5, 500, 64


def make(folder: Path) -> None:
    """A complete single file in LDM naming, float32, random weights."""
    state = {}
    g = torch.Generator().manual_seed(0)
    for build, config, prefix, sources in (
            (UNet, SD1, keys.UNET, lambda n: keys.ldm_sources(n, keys.unet_prefixes(SD1))),
            (AutoencoderKL, SD, keys.VAE, lambda n: keys.ldm_sources(n, keys.vae_prefixes(SD))),
            (TextEncoder, CLIP_L, keys.TEXT_SD1, keys.hf_sources)):
        with torch.device("meta"):
            want = build(config).state_dict()
        for name, source in sources(want).items():
            shape = want[name].shape
            t = torch.randn(shape, generator=g) * (0.5 / max(1, shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.05)
            if len(shape) == 1 and name.endswith("weight"):
                t += 1
            for key, piece in zip(source.keys, t.chunk(len(source.keys))):
                state[prefix + key] = piece.contiguous()
    save_file(state, folder / "sd1.safetensors")


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(X_SEED)
    return torch.randn(1, 4, LATENT, LATENT, generator=g), torch.randn(1, 77, 768, generator=g)


def ours(folder: Path) -> None:
    import p2p

    before = resident()
    model = p2p.load(folder / "sd1.safetensors", device="cpu", dtype=torch.float32)
    parts = [model.unet, *model.text_encoders, model.vae]
    size = sum(t.numel() * t.element_size() for p in parts for t in p.state_dict().values())
    after = resident()
    x, context = inputs()
    with torch.no_grad():
        out = model.unet(x, T, context)[0]
    torch.save(out, folder / "ours.pt")
    print(json.dumps({"interpreter": before, "model": size, "peak": after}))


def theirs(folder: Path) -> None:
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint


    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8,
                                          block_out_channels=(320, 640, 1280, 1280)).eval()
    unet.load_state_dict(convert_ldm_unet_checkpoint(load_file(folder / "sd1.safetensors"), dict(unet.config)))
    x, context = inputs()
    with torch.no_grad():
        torch.save(unet(x, T, context).sample, folder / "theirs.pt")


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__.splitlines()[0])
    ap.add_argument("--folder", type=Path)
    ap.add_argument("--only", choices=["make", "ours", "theirs"], help=argparse.SUPPRESS)
    a = ap.parse_args(argv)
    if a.only:
        return {"make": make, "ours": ours, "theirs": theirs}[a.only](a.folder)
    with tempfile.TemporaryDirectory(dir=a.folder) as name:
        out = {}
        for step in ("make", "ours", "theirs"):
            out[step] = subprocess.run([sys.executable, "-m", "benchmarks.full_size", "--folder", name, "--only", step],
                                       check=True, capture_output=True, text=True).stdout
        m = json.loads(out["ours"])
        got, want = torch.load(Path(name) / "ours.pt"), torch.load(Path(name) / "theirs.pt")
        print(f"model {m['model'] / 1e9:.2f} GB; interpreter {m['interpreter'] / 1e9:.2f} GB; peak while loading "
              f"{m['peak'] / 1e9:.2f} GB; (peak - interpreter) / model = {(m['peak'] - m['interpreter']) / m['model']:.3f}")
        print(f"UNet call at {LATENT} x {LATENT}: largest difference to diffusers "
              f"{(got - want).abs().max() / want.std():.2e} of the standard deviation")


if __name__ == "__main__":
    main()

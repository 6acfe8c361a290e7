"""Trains the bundled text-to-image model on renders of the emoji world. Continues from its last checkpoint.

    python -m p2p.weights.emoji.train RUN_FOLDER --pictures 600000

The folder holds state.pt (to resume), emoji.safetensors (the averaged weights, as shipped), log.jsonl and,
from time to time, sample grids (drawn by `p2p generate` in a process of its own: nothing here imports the
method). Predicts x_0, the squared error weighted as for v (1 / sigma^2, bounded), on a shifted cosine
schedule.
"""
from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from p2p.models.text import EMOJI as TEXT
from p2p.models.text import END, START, TextEncoder, tokenizer
from p2p.models.unet import EMOJI, UNet
from p2p.weights.aside import replacing
from p2p.weights.emoji.world import (
    COLOURS,
    OBJECTS,
    PLACES,
    SIZES,
    STYLES,
    WEATHERS,
    caption,
    curriculum,
    render,
    sample,
)

SHARPNESS = 6.0      # of the queries and keys of text at the start
WEIGHT_LIMIT = 16.0   # bound of the loss weight 1 / sigma^2: below sigma = 1/4 the error counts as it is


def shifted_cosine_alphas_cumprod(steps: int = 1000, shift: float = 4.0) -> Tensor:
    """Cosine schedule with its noise times `shift` (Hoogeboom et al. 2023, section 2.1).  -> (steps,) float64

    A flat region of n pixels shows its colour at a signal-to-noise ratio of 1 / n: unshifted, what words
    decide would be settled within the first two or three of fifty steps, and there would be next to nothing
    to learn from them.
    """
    angle = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * math.pi / 2
    snr = (angle.cos() / (shift * angle.sin())) ** 2
    return snr / (1 + snr)


def vocabulary() -> Tensor:
    """Sorted token ids of every word that a caption can hold.  -> (V,) long"""
    phrases = [*OBJECTS, *COLOURS, *SIZES, *WEATHERS, *STYLES.values(),
               *(p[0].format("") for p in PLACES.values()), "a an next to"]
    return torch.tensor(sorted({START, END, *tokenizer().encode(" ".join(phrases))}))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024), updates as large as AdamW's (Liu et
    al. 2025, Eq. 4).

    From one checkpoint, on the same 8,000 pictures, cooled down at the end, the loss came out 3.7 % lower
    than AdamW's. torch.optim.Muon works in bfloat16, which older CPUs emulate, and takes no convolutions.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(mean, group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """U V^T of the matrix U S V^T, nearly: five Newton-Schulz steps x <- (a + b x x^T + c (x x^T)^2) x, kept
    as a polynomial of the small x x^T, to be multiplied by x once."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    total = eye = torch.eye(len(x), device=x.device, dtype=x.dtype)
    for _ in range(5):
        factor = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
        total, gram = factor @ total, factor @ factor @ gram
    return total @ x


class Mixed(TorchFunctionMode):
    """Within autocast, group norm and attention in float32: in bfloat16, CPUs take several times as long for
    either."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.group_norm, F.scaled_dot_product_attention):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            return func(*args, **(kwargs or {})).bfloat16()


@contextmanager
def mixed(device: str, on: bool) -> Iterator[None]:
    """Runs products in bfloat16, if on."""
    with torch.autocast(device, torch.bfloat16, on), Mixed() if on else nullcontext():
        yield


class Model(nn.Module):
    """The trained parts under the names of the shipped file."""

    def __init__(self):
        super().__init__()
        vocab = vocabulary()
        self.unet = UNet(EMOJI)
        self.text = TextEncoder(replace(TEXT, vocab_size=len(vocab)))
        self.text.vocab.copy_(vocab)
        # Words must differ, and attention must choose among them, from the start: with open_clip's and
        # torch's own initialisation all contexts are alike, all maps flat, and no colour is learned in 50,000
        # pictures.
        nn.init.normal_(self.text.token_embedding.weight, std=1.0)
        nn.init.normal_(self.text.positional_embedding, std=0.3)
        for name, module in self.unet.named_modules():
            if name.endswith(("conv2", "proj_out", "conv_out")):   # residual branches start at zero
                nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
            if name.endswith(("attn2.to_q", "attn2.to_k", "add_k_proj")):
                module.weight.data *= SHARPNESS

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        length = int((ids == END).int().argmax(dim=1).max()) + 1
        # padding is zero context
        context = F.pad(self.text(ids[:, :length]), (0, 0, 0, ids.shape[1] - length))
        return self.unet(x_t, t, context)[0]


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices and convolutions, AdamW for embeddings, both ends, norms and biases."""
    inner = {n: p.ndim > 1 and not any(part in n for part in ("embedding", "conv_in", "conv_out"))
             for n, p in model.named_parameters()}
    return [Muon([p for n, p in model.named_parameters() if inner[n]], lr),
            torch.optim.AdamW([p for n, p in model.named_parameters() if not inner[n]], lr, (0.9, 0.99),
                              fused=True)]


def set_rate(steppers: list[torch.optim.Optimizer], lr: float, step: int, seen: int, total: int) -> float:
    """Sets the learning rate: up over 200 steps, constant, down over the last fifth of the pictures."""
    rate = lr * min(1, (step + 1) / 200) * min(1, max(0.02, (total - seen) / (0.2 * total)))
    for stepper in steppers:
        stepper.param_groups[0]["lr"] = rate
    return rate


def descend(model: nn.Module, ema: nn.Module, steppers: list[torch.optim.Optimizer], error: Tensor,
            a_t: Tensor, decay: float, step: int) -> float:
    """One update by the squared errors of x_0 (B,), weighted as for v (1 / sigma^2, bounded).  -> the loss"""
    loss = (error * (1 / (1 - a_t)).clamp(max=WEIGHT_LIMIT)).mean()
    model.zero_grad()
    loss.backward()
    if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
        raise FloatingPointError("the gradient is not finite: go on from the last checkpoint at a lower --lr")
    for stepper in steppers:
        stepper.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                             1 - min(decay, (step + 1) / (step + 10)))
    return loss.item()


def load_state(file: Path, model: nn.Module, ema: nn.Module, steppers: list[torch.optim.Optimizer]) -> int:
    """Loads a checkpoint, if there is one.  -> number of pictures seen"""
    if not file.exists():
        return 0
    saved = torch.load(file, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(saved["model"]), ema.load_state_dict(saved["ema"])
    for stepper, values in zip(steppers, saved["optimizers"]):
        stepper.load_state_dict(values)
    return saved["pictures"]


def save_state(file: Path, model: nn.Module, ema: nn.Module, steppers: list[torch.optim.Optimizer],
               seen: int) -> None:
    with replacing(file) as temporary:
        torch.save({"model": model.state_dict(), "ema": ema.state_dict(),
                    "optimizers": [o.state_dict() for o in steppers], "pictures": seen}, temporary)


def export(model: nn.Module, file: Path, pictures: int, alphas_cumprod: Tensor) -> None:
    """Writes the weights in half precision, the schedule, and metadata."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    tensors = {k: v.contiguous() for k, v in tensors.items()} | {"alphas_cumprod": alphas_cumprod}
    about = {"format": "p2p-emoji", "prediction": "x0", "pictures": str(pictures),
             "unet": json.dumps(asdict(model.unet.config))}
    with replacing(file) as temporary:
        save_file(tensors, temporary, about)


SAMPLES = ["a cat on grass", "a red car on the beach", "a purple house in the desert", "a castle at night",
           "a watercolor of a flower in the snow", "a sketch of a blue bicycle on grass",
           "a yellow bird next to a tree on grass", "a huge pumpkin on snowy grass"]


def draw_samples(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "p2p", "generate", *SAMPLES, "--model",
                    str(folder / "emoji.safetensors"), "--seed", "0", "--steps", "25", "--out",
                    str(folder / "samples"), "--quiet"], check=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(prog="python -m p2p.weights.emoji.train",
                                 description=__doc__.splitlines()[0])
    ap.add_argument("folder", type=Path)
    ap.add_argument("--pictures", type=int, default=600_000,
                    help="in all; the last fifth cools the learning rate down")
    ap.add_argument("--stop", type=int, help="stop after this many, to go on later")
    ap.add_argument("--batch", type=int, default=32)
    ap.add_argument("--lr", type=float, default=8e-4)
    ap.add_argument("--ramp", type=int, default=160_000,
                    help="pictures over which the world grows to its full variety")
    ap.add_argument("--dropout", type=float, default=0.1, help="share of captions left empty, for guidance")
    ap.add_argument("--ema", type=float, default=0.999)
    ap.add_argument("--init", type=Path, help="start from the weights of this emoji.safetensors")
    ap.add_argument("--bf16", action="store_true",
                    help="products in bfloat16, near twice as fast where the CPU has it")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    ap.add_argument("--samples", type=int, default=10, help="checkpoints between sample grids; 0 for none")
    return ap.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    a = arguments(argv)
    a.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model = Model().to(a.device, memory_format=torch.channels_last)
    if a.init:
        model.load_state_dict({k: v for k, v in load_file(a.init).items() if k != "alphas_cumprod"})
    ema = Model().to(a.device)
    ema.load_state_dict(model.state_dict())
    steppers = optimizers(model, a.lr)
    state = a.folder / "state.pt"
    seen = load_state(state, model, ema, steppers)
    abar = shifted_cosine_alphas_cumprod().float().to(a.device)
    started, first, losses = time.time(), seen, []

    stop = min(a.pictures, a.stop or a.pictures)
    while seen < stop:
        step = seen // a.batch
        rate = set_rate(steppers, a.lr, step, seen, a.pictures)
        g = torch.Generator().manual_seed(1_000_003 + step)
        scene = sample(a.batch, g, mix=curriculum(seen / a.ramp))
        ids = model.text.tokenize([c if torch.rand((), generator=g) > a.dropout else ""
                                   for c in caption(scene)])
        x_0 = render(scene.to(a.device))[0]                                              # (B, 3, 64, 64)
        t = torch.randint(len(abar), (a.batch,), generator=g)
        noise = torch.randn(x_0.shape, generator=g).to(a.device)
        ids, t = ids.to(a.device), t.to(a.device)
        a_t = abar[t].view(-1, 1, 1, 1)
        x_t = a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise                                  # DDPM Eq. 4
        with mixed(x_0.device.type, a.bf16):
            predicted = model(x_t.contiguous(memory_format=torch.channels_last), t, ids)
        error = (predicted.float() - x_0).square().mean((1, 2, 3))
        losses.append(descend(model, ema, steppers, error, a_t.flatten(), a.ema, step))
        seen += a.batch
        if (step + 1) % a.every == 0 or seen >= stop:
            row = {"pictures": seen, "loss": round(sum(losses) / len(losses), 5), "lr": round(rate, 7),
                   "pictures_per_s": round((seen - first) / (time.time() - started), 1)}
            losses = []
            with (a.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            save_state(state, model, ema, steppers, seen)
            export(ema, a.folder / "emoji.safetensors", seen, shifted_cosine_alphas_cumprod())
            if a.samples and (step + 1) % (a.every * a.samples) == 0:
                draw_samples(a.folder)


if __name__ == "__main__":
    main()

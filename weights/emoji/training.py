"""What the trainers of the bundled models share: captioned pictures, optimisers, checkpoints, the loop.

All predict x_0; the squared error is weighted as for v (1 / sigma^2, bounded). A run goes on from its last
checkpoint. On a GPU: --batch 256 --chunk 8 --workers 4 --compile --bf16.
"""
from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from p2p.models.text import EMOJI as TEXT
from p2p.models.text import END, START, TextEncoder, tokenizer
from p2p.weights import sealed
from p2p.weights.aside import replacing
from p2p.weights.emoji.world import (
    COLOURS,
    OBJECTS,
    PLACES,
    SIZES,
    STYLES,
    WEATHERS,
    Scene,
    caption,
    curriculum,
    render,
    sample,
)

WEIGHT_LIMIT = 16.0   # bound of the loss weight 1 / sigma^2: below sigma = 1/4 the error counts as it is
# matrices that hold several, d rows each
FUSED = {"qkv.weight": 3, "in_proj_weight": 3, "linear1.weight": 4}
Loss = Callable[..., tuple[Tensor, Tensor]]   # (B,) squared errors of x_0, and sigma^2


# ------------------------------------------------------------------------------------------------ pictures

def vocabulary() -> Tensor:
    """Sorted token ids of every word that a caption can hold.  -> (V,) long"""
    phrases = [*OBJECTS, *COLOURS, *SIZES, *WEATHERS, *STYLES.values(),
               *(p[0].format("") for p in PLACES.values()), "a an next to"]
    return torch.tensor(sorted({START, END, *tokenizer().encode(" ".join(phrases))}))


def text_tower() -> TextEncoder:
    """Words must differ, and attention must choose among them, from the start: with open_clip's and torch's
    own initialisation all contexts are alike, all maps flat, and no colour is learned in 50,000 pictures."""
    vocab = vocabulary()
    tower = TextEncoder(replace(TEXT, vocab_size=len(vocab)))
    tower.vocab.copy_(vocab)
    nn.init.normal_(tower.token_embedding.weight, std=1.0)
    nn.init.normal_(tower.positional_embedding, std=0.3)
    return tower


class Scenes(IterableDataset):
    """Scenes and their captions' ids, n at a time, from the n-th picture `seen` on; `dropout` of the captions
    are empty, for guidance, the world grows over the first `ramp` pictures, and styles, sizes and weathers
    are named `often` times as often."""

    def __init__(self, tower: TextEncoder, n: int, seen: int, ramp: int, dropout: float, often: float = 1.0):
        self.tower, self.n, self.seen, self.ramp, self.dropout = tower, n, seen, ramp, dropout
        self.often = often

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        worker = get_worker_info()
        for chunk in count(worker.id if worker else 0, worker.num_workers if worker else 1):
            seen = self.seen + chunk * self.n
            g = torch.Generator().manual_seed(1_000_003 + seen)
            mix = curriculum(seen / self.ramp) if self.ramp else curriculum(1)
            mix = mix._replace(**{k: self.often * getattr(mix, k) for k in ("style", "size", "weather")})
            scene = sample(self.n, g, mix=mix)
            dropped = torch.rand(self.n, generator=g) < self.dropout
            words = ["" if empty else c for c, empty in zip(caption(scene), dropped)]
            yield [getattr(scene, f.name) for f in fields(Scene)], self.tower.tokenize(words)


def pictures(a: argparse.Namespace, tower: TextEncoder, seen: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures (B, 3, 64, 64) and ids (B, L) on the device. Workers draw the scenes; `chunk` batches are
    rendered at once, since rendering makes a GPU wait."""
    loader = DataLoader(Scenes(tower, a.batch * a.chunk, seen, a.ramp, a.dropout, a.often), batch_size=None,
                        num_workers=a.workers, pin_memory=a.device == "cuda")
    for scene, ids in loader:
        drawn = render(Scene(*(field.to(a.device) for field in scene)))[0]
        yield from zip(drawn.split(a.batch), ids.to(a.device).split(a.batch))


# ---------------------------------------------------------------------------------------------- optimisers

class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024), updates as large as AdamW's (Liu et
    al. 2025, Eq. 4).

    From one checkpoint, on the same 8,000 pictures, cooled down at the end, the loss came out 3.7 % lower
    than AdamW's. torch.optim.Muon works in bfloat16, which older CPUs emulate, and takes no convolutions.
    parts: how many matrices of d rows, d their width, each parameter holds; the last takes the rows left.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.01, parts: Iterable[int] | None = None):
        params = list(params)
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.parts = [1] * len(params) if parts is None else list(parts)

    @torch.no_grad()
    def step(self) -> None:   # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            means = [self.state[p].setdefault("mean", torch.zeros_like(p)) for p in params]
            for p, mean in zip(params, means):
                mean.lerp_(p.grad, 1 - group["momentum"])
            wanted = [p.grad.lerp(mean, group["momentum"]).flatten(1) for p, mean in zip(params, means)]
            pieces = [_pieces(x, n) for x, n in zip(wanted, self.parts)]
            updates = iter(_orthogonal([piece for each in pieces for piece in each]))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [torch.cat([next(updates) for _ in each]).view(p.shape)
                                         for p, each in zip(params, pieces)], alpha=-group["lr"])


def _pieces(x: Tensor, n: int) -> tuple[Tensor, ...]:
    d = x.shape[1]
    return (x,) if n == 1 else x.split([d] * (n - 1) + [len(x) - d * (n - 1)])


def _orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """U V^T of each U S V^T, nearly, with a mean square of entries as in AdamW; those of one shape
    together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(matrices):
        by_shape.setdefault(x.shape, []).append(i)
    out = list(matrices)
    for (rows, columns), members in by_shape.items():
        x = torch.stack([matrices[i] for i in members])
        x = orthogonal(x.mT).mT if rows > columns else orthogonal(x)
        for i, y in zip(members, x * 0.2 * max(rows, columns) ** 0.5):
            out[i] = y
    return out


def orthogonal(x: Tensor) -> Tensor:
    """U V^T of the matrices U S V^T (..., r, c), r <= c, nearly: five Newton-Schulz steps
    x <- (a + b x x^T + c (x x^T)^2) x, kept as a polynomial of the small x x^T, by which x is multiplied
    once."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    total = eye = torch.eye(x.shape[-2], device=x.device, dtype=x.dtype).expand_as(gram)
    for _ in range(5):
        factor = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
        total, gram = factor @ total, factor @ factor @ gram
    return total @ x


def optimizers(model: nn.Module, lr: float,
               ends: tuple[str, ...] = ("embedding", "conv_in", "conv_out")) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices and convolutions, AdamW for both ends, norms and biases."""
    inner = {n: p for n, p in model.named_parameters()
             if p.ndim > 1 and not any(part in n for part in ends)}
    parts = [next((k for end, k in FUSED.items() if n.endswith(end)), 1) for n in inner]
    return [Muon(inner.values(), lr, parts=parts),
            torch.optim.AdamW([p for n, p in model.named_parameters() if n not in inner], lr, (0.9, 0.99),
                              fused=True)]


def set_rate(steppers: list[torch.optim.Optimizer], lr: float, step: int, left: float, cool: float) -> float:
    """Sets the learning rate: up over 200 steps, constant, down over the last share `cool` of the pictures,
    of which the share `left` is to come."""
    rate = lr * min(1, (step + 1) / 200) * min(1, max(0.02, left / cool))
    for stepper in steppers:
        stepper.param_groups[0]["lr"] = rate
    return rate


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
    with torch.autocast(device, torch.bfloat16, on), Mixed() if on and device == "cpu" else nullcontext():
        yield


# -------------------------------------------------------------------------------------------- files, loop

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


def export(model: nn.Module, file: Path, metadata: dict[str, str], **tables: Tensor) -> None:
    """Writes the weights in half precision, tables of the schedule, and what they are."""
    tensors = {k: (v.half() if v.is_floating_point() else v).cpu() for k, v in model.state_dict().items()}
    with replacing(file) as temporary:
        sealed.write({k: v.contiguous() for k, v in tensors.items()} | tables, temporary, metadata)


def initialised(model: nn.Module, file: Path | None) -> None:
    """Starts from the weights of a shipped file, if one is given."""
    if file is not None:
        model.load_state_dict({k: v for k, v in load_file(file).items() if k != "alphas_cumprod"})


def parser(doc: str, prog: str, captioned: bool = True, **defaults: float) -> argparse.ArgumentParser:
    """captioned: of a model that is trained on `pictures`."""
    ap = argparse.ArgumentParser(prog=f"python -m p2p.weights.emoji.{prog}", description=doc.splitlines()[0])
    ap.add_argument("folder", type=Path)
    ap.add_argument("--pictures", type=int, help="in all")
    ap.add_argument("--stop", type=int, help="stop after this many, to go on later")
    ap.add_argument("--batch", type=int)
    ap.add_argument("--lr", type=float)
    ap.add_argument("--cool", type=float, default=0.2, help="share of the pictures, the last ones, over "
                    "which the learning rate falls")
    ap.add_argument("--ema", type=float, default=0.999)
    ap.add_argument("--init", type=Path, help="start from the weights of this file")
    ap.add_argument("--bf16", action="store_true", help="products in bfloat16, faster where there are such")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--compile", action="store_true", help="run through torch.compile")
    ap.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    if captioned:
        ap.add_argument("--ramp", type=int, default=160_000,
                        help="pictures over which the world grows to its full variety; 0: full at once")
        ap.add_argument("--often", type=float, default=1.0, metavar="TIMES",
                        help="styles, sizes and weathers this many times as often: what is hard to draw")
        ap.add_argument("--dropout", type=float, default=0.1,
                        help="share of captions left empty, for guidance")
        ap.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
        ap.add_argument("--chunk", type=int, default=1, help="batches that are rendered at once")
        ap.add_argument("--samples", type=int, default=10, help="checkpoints between sample grids; 0: none")
    ap.set_defaults(**defaults)
    return ap


def fit(a: argparse.Namespace, model: nn.Module, ema: nn.Module, steppers: list[torch.optim.Optimizer],
        draw: Callable[[int], Iterable[tuple[Tensor, ...]]], loss: Loss,
        checkpoint: Callable[[int], None]) -> None:
    """Trains on what `draw` gives from the n-th picture on, by `loss(run, *batch)`, until a.pictures or
    a.stop; a line of log.jsonl and a checkpoint every a.every steps."""
    state = a.folder / "state.pt"
    seen = first = load_state(state, model, ema, steppers)
    run = torch.compile(model, dynamic=False) if a.compile else model
    started, losses, stop = time.time(), [], min(a.pictures, a.stop or a.pictures)
    for batch in draw(seen) if seen < stop else ():
        step = seen // a.batch
        torch.manual_seed(1_000_003 + step)   # of noise and timesteps, wherever the run began
        rate = set_rate(steppers, a.lr, step, 1 - seen / a.pictures, a.cool)
        with mixed(a.device, a.bf16):
            error, variance = loss(run, *batch)
        weighted = (error * (1 / variance).clamp(max=WEIGHT_LIMIT)).mean()
        model.zero_grad()
        weighted.backward()
        if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            raise FloatingPointError("the gradient is not finite: go on from the last checkpoint at a lower "
                                     "--lr")
        for stepper in steppers:
            stepper.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                                 1 - min(a.ema, (step + 1) / (step + 10)))
        losses.append(weighted.item())
        seen += a.batch
        if (step + 1) % a.every == 0 or seen >= stop:
            row = {"pictures": seen, "loss": round(math.fsum(losses) / len(losses), 5), "lr": round(rate, 7),
                   "pictures_per_s": round((seen - first) / (time.time() - started), 2)}
            losses = []
            with (a.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            save_state(state, model, ema, steppers, seen)
            checkpoint(seen)
        if seen >= stop:
            break

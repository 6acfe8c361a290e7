"""Recognises the objects in a picture of the emoji world: the judge of the bundled model.

Trained on renders only.

    python -m p2p.weights.emoji.recogniser OUTPUT.safetensors   # trains it, then tests it on held-out renders
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from p2p.weights import sealed
from p2p.weights.aside import replacing
from p2p.weights.emoji.world import COLOURS, OBJECTS, PLACES, STYLES, Mix, Scene, render, sample

FILE = Path(__file__).with_name("recogniser.safetensors")
SIDE = 32          # of the map of objects
MIN_AREA = 10      # cells of that map that make an object


class Reading(NamedTuple):
    """The content of B pictures; K objects of the world."""

    area: Tensor      # (B, K) cells of the 32 x 32 map that show each object
    # (B,) expected number of cells that show an object at all: finer than whole cells, and not less where an
    # object that an edit has deformed is taken for another
    extent: Tensor
    box: Tensor       # (B, K, 4) left, top, right, bottom in 0..1; zero where the object is not there
    colour: Tensor    # (B, K) index into COLOURS, by the vote of the object's cells
    place: Tensor     # (B,)
    style: Tensor     # (B,)
    snow: Tensor      # (B,) amount, about 0..1
    fog: Tensor       # (B,)
    cells: Tensor     # (B, 32, 32) object index, -1 where none

    @property
    def found(self) -> Tensor:
        """(B, K) bool"""
        return self.area >= MIN_AREA


class _Residual(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Recogniser(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, stride=2, padding=2)
        self.down1 = nn.Conv2d(24, 64, 3, stride=2, padding=1)
        self.body1 = nn.Sequential(_Residual(64), _Residual(64))
        self.down2 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.body2 = nn.Sequential(_Residual(128), _Residual(128))
        self.up1, self.mix1 = nn.Conv2d(128 + 64, 64, 1), _Residual(64)
        self.up2 = nn.Conv2d(64 + 24, 48, 3, padding=1)
        self.cells = nn.Conv2d(48, len(OBJECTS) + 1 + len(COLOURS), 1)
        self.whole = nn.Sequential(nn.Linear(128, 128), nn.SiLU(),
                                   nn.Linear(128, len(PLACES) + len(STYLES) + 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, 64, 64) -> objects (B, K+1, 32, 32), last: none; colours (B, 6, 32, 32); place; style;
        amounts (B, 2)"""
        a = F.silu(self.stem(x))                                                 # (B, 24, 32, 32)
        b = self.body1(self.down1(a))                                            # (B, 64, 16, 16)
        c = self.body2(self.down2(F.silu(b)))                                    # (B, 128, 8, 8)
        d = self.mix1(self.up1(torch.cat([F.interpolate(c, scale_factor=2.0), b], dim=1)))
        e = F.silu(self.up2(torch.cat([F.interpolate(d, scale_factor=2.0), a], dim=1)))
        objects, colours = self.cells(e).split([len(OBJECTS) + 1, len(COLOURS)], dim=1)
        place, style, amounts = self.whole(F.silu(c).mean((2, 3))).split([len(PLACES), len(STYLES), 2], dim=1)
        return objects, colours, place, style, amounts

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Reading:
        """(B, 3, 64, 64) in [-1, 1] -> Reading"""
        objects, colours, place, style, amounts = self(pictures.to(self.stem.weight))
        cells = objects.argmax(1)                                                # (B, 32, 32)
        each = F.one_hot(cells, len(OBJECTS) + 1)[..., :-1].permute(0, 3, 1, 2).float()   # (B, K, 32, 32)
        votes = torch.einsum("bkyx,bcyx->bkc", each,
                             F.one_hot(colours.argmax(1), len(COLOURS)).permute(0, 3, 1, 2).float())
        return Reading(each.sum((2, 3)), objects.softmax(1)[:, :-1].sum((1, 2, 3)), boxes(each),
                       votes.argmax(-1), place.argmax(1), style.argmax(1), amounts[:, 0], amounts[:, 1],
                       torch.where(cells == len(OBJECTS), -1, cells))


def boxes(masks: Tensor) -> Tensor:
    """Bounding boxes.  (..., H, W), more than 1/2 is inside -> (..., 4) left, top, right, bottom in 0..1"""
    covered = masks > 0.5
    out = []
    for line in (covered.any(-2), covered.any(-1)):                                # along x, along y
        n = line.shape[-1]
        index = torch.arange(n, device=masks.device)
        first = torch.where(line, index, n).amin(-1)
        last = torch.where(line, index + 1, 0).amax(-1)
        out += [torch.where(last > 0, first, 0) / n, last / n]
    return torch.stack([out[0], out[2], out[1], out[3]], dim=-1)


def load(file: Path = FILE) -> Recogniser:
    """The trained network, float32."""
    model = Recogniser()
    model.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def embed(eye: Recogniser, pictures: Tensor) -> Tensor:
    """Embeds pictures (B, 3, 64, 64) in [-1, 1] in the space of `embed_captions`: objects, their colours
    (with half the weight, as captions need not name them), place, style.  -> (B, D)"""
    seen = eye.read(pictures)
    colours = (F.one_hot(seen.colour, len(COLOURS)) * seen.found[..., None]).amax(1)
    place, style = F.one_hot(seen.place, len(PLACES)), F.one_hot(seen.style, len(STYLES))
    return torch.cat([seen.found.float(), 0.5 * colours, place, style], dim=1)


def embed_captions(captions: Sequence[str]) -> Tensor:
    """Embeds captions in the space of `embed`, by the words that they contain.  -> (B, D)"""
    places = [phrase.split()[-1].replace("{}", "") for phrase, _ in PLACES.values()]
    rows = []
    for text in captions:
        words = text.split()
        style = [float(name in words) for name in STYLES]
        style[0] = float(not any(style[1:]))
        rows.append([*(float(w in words) for w in OBJECTS), *(0.5 * (w in words) for w in COLOURS),
                     *(float(w in words) for w in places), *style])
    return torch.tensor(rows)


# --------------------------------------------------------------------------------------- training and judging

def solid(masks: Tensor) -> Tensor:
    """Dilates masks by a pixel, so that thin objects (a bicycle) are connected.  (B, n, H, W) -> same"""
    return F.max_pool2d(masks, 3, 1, 1)


def _targets(scene: Scene, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The labels of each cell: object (B, 32, 32), K for none; colour (B, 32, 32), -100 where none is
    named."""
    m = F.interpolate(solid(masks), size=(SIDE, SIDE), mode="area")              # (B, 2, 32, 32)
    best, slot = m.max(1)
    thing = scene.thing[:, :, None, None].expand_as(m).gather(1, slot[:, None])[:, 0]
    colour = scene.colour[:, :, None, None].expand_as(m).gather(1, slot[:, None])[:, 0]
    shown = best > 0.5
    return torch.where(shown, thing, len(OBJECTS)), torch.where(shown & (colour >= 0), colour, -100)


def _worn(x: Tensor, g: torch.Generator) -> Tensor:
    """Augments renders with the noise, blur and contrast of generated pictures, so that these are read as
    well."""
    noise = torch.randn(x.shape, generator=g) * (0.12 * torch.rand(len(x), 1, 1, 1, generator=g))
    blur = F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, 1)
    amount = torch.rand(len(x), 1, 1, 1, generator=g)
    x = torch.lerp(x, blur, amount * (torch.rand(len(x), 1, 1, 1, generator=g) < 0.5))
    return x * (0.85 + 0.3 * torch.rand(len(x), 1, 1, 1, generator=g)) + noise


def judge(model: Recogniser, n: int = 2000, seed: int = 10**6, split: str = "held out") -> dict[str, float]:
    """Share of correct readings of renders: objects at their places, named colours, place, style; and of
    renders in which no other object is seen."""
    right = {"object": [], "colour": [], "place": [], "style": [], "no other": []}
    for k in range(0, n, 250):
        scene = sample(min(250, n - k), seed + k, split)
        pictures, masks = render(scene)
        seen = model.read(pictures)
        truth = boxes(solid(masks))                                              # (B, 2, 4)
        for j in range(2):
            present = scene.thing[:, j] >= 0
            rows, thing = present.nonzero()[:, 0], scene.thing[present, j]
            box = seen.box[rows, thing]
            overlap = iou(box, truth[rows, j])
            twins = scene.thing[rows, 0] == scene.thing[rows, 1]                 # two of a kind share one box
            right["object"] += (seen.found[rows, thing] & ((overlap > 0.5) | twins)).tolist()
            named = (scene.colour[rows, j] >= 0) & ~twins
            right["colour"] += (seen.colour[rows, thing] == scene.colour[rows, j])[named].tolist()
        there = F.one_hot(scene.thing.clamp(min=0), len(OBJECTS)) * (scene.thing >= 0)[..., None]
        right["no other"] += (~seen.found | there.any(1)).all(1).tolist()
        right["place"] += (seen.place == scene.place).tolist()
        right["style"] += (seen.style == scene.style).tolist()
    return {k: sum(v) / len(v) for k, v in right.items()}


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes.  (..., 4), (..., 4) -> (...)"""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    both = size.prod(-1)
    area = lambda x: (x[..., 2:] - x[..., :2]).prod(-1)  # noqa: E731
    return both / (area(a) + area(b) - both).clamp(min=1e-9)


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m p2p.weights.emoji.recogniser",
                                 description=__doc__.splitlines()[0])
    ap.add_argument("output", type=Path)
    ap.add_argument("--pictures", type=int, default=200_000)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--init", type=Path, help="start from these weights")
    a = ap.parse_args(argv)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model = Recogniser().to(memory_format=torch.channels_last)
    if a.init:
        model.load_state_dict(load_file(a.init))
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=0.01)
    steps, started = a.pictures // a.batch, time.time()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, a.lr, total_steps=steps, pct_start=0.05)
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        # of all captions, also those that models are kept from: it reads these too; and objects anywhere, so
        # that it does not guess from their places
        scene = sample(a.batch, g, split=None, mix=Mix(roam=0.6))
        x, masks = render(scene)
        x = _worn(x, g).contiguous(memory_format=torch.channels_last)
        objects, colours, place, style, amounts = model(x)
        thing, colour = _targets(scene, masks)
        wanted = torch.stack([scene.amount * (scene.weather == 1), scene.amount * (scene.weather == 2)],
                             dim=1)
        loss = (F.cross_entropy(objects, thing) + 0.3 * F.cross_entropy(colours, colour)
                + 0.1 * F.cross_entropy(place, scene.place)
                + 0.1 * F.cross_entropy(style, scene.style) + F.mse_loss(amounts, wanted))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            rate = (step + 1) * a.batch / (time.time() - started)
            print(f"{(step + 1) * a.batch} pictures, loss {loss.item():.4f}, {rate:.0f} a second", flush=True)
            with replacing(a.output) as temporary:
                sealed.write({k: v.half().contiguous() for k, v in model.state_dict().items()}, temporary)
    for split in ("held out", "novel"):
        print(split, {k: round(v, 4) for k, v in judge(load(a.output), split=split).items()})


if __name__ == "__main__":
    main()

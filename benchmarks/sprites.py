"""How well a model draws: each picture's distance to the true sprite, placed, scaled and turned to fit.

    python -m benchmarks.sprites MODEL [MODEL ...] [--n 500] [--steps 20] [--sheet FILE.png]

A recogniser says yes to a cat that is half a dog. Here the world's own renderer draws the object that the caption
names, in its colour, over the picture's own background (the median of each row), and the pose that comes nearest to the picture is
searched for: the root mean square of what is left, around the object, is the distance (0 is a perfect drawing; pixels
range from 0 to 1). Captions are held out, with one object, no style and no weather. MODEL: emoji, emoji-flow or a file.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import p2p
from benchmarks.quality import ONE, mean_ci, shown
from p2p.weights.emoji import recogniser
from p2p.weights.emoji.world import Scene, _shadow, _stand, caption, render, sample

STARTS, STEPS, MARGIN = (0.8, 1.0, 1.25), 60, 0.12   # sizes to begin from, steps of Adam, around the object's box


def drawn(scene: Scene, background: Tensor) -> Tensor:
    """The objects and their shadows over a background (B, 3, 64, 64) in 0..1."""
    side = background.shape[-1]
    sprite = F.avg_pool2d(_stand(scene, 0, 2 * side), 2)
    return background * (1 - _shadow(scene, 0, side)) * (1 - sprite[:, 3:]) + sprite[:, :3]


def posed(scene: Scene, pose: Tensor) -> Scene:
    """The scene with its first object at (B, 4): centre, bottom, logarithm of its size, degrees of tilt / 10."""
    x, bottom, size, tilt = (torch.stack([v, v], dim=1) for v in pose.unbind(1))
    return Scene(**{**vars(scene), "x": x, "bottom": bottom, "size": size.exp(), "tilt": 10 * tilt})


def distance(pictures: Tensor, scene: Scene, eye: recogniser.Recogniser) -> Tensor:
    """Distance of what pictures (B, 3, 64, 64) in [-1, 1] show to the sprites that the scenes name.  -> (B,)"""
    x = (pictures + 1) / 2
    background = x.median(dim=3, keepdim=True).values.expand_as(x)
    cells = (eye.read(pictures).cells >= 0).float()                     # whatever object they are taken for
    box = recogniser.boxes(cells)
    box = torch.where((box[:, 2:] > box[:, :2]).all(1, keepdim=True), box, torch.tensor([0.25, 0.25, 0.75, 0.75]))
    axis = (torch.arange(64) + 0.5) / 64
    inside = [((axis >= box[:, [i]] - MARGIN) & (axis <= box[:, [i + 2]] + MARGIN)).float() for i in (0, 1)]
    near = inside[1][:, None, :, None] * inside[0][:, None, None, :]     # (B, 1, 64, 64)

    def left(pose: Tensor) -> Tensor:
        off = (drawn(posed(scene, pose), background) - x).square().mean(1, keepdim=True)
        return (off * near).sum((1, 2, 3)) / near.sum((1, 2, 3))

    best = torch.full((len(x),), torch.inf)
    for start in STARTS:
        size = (box[:, 2:] - box[:, :2]).amax(1) * start
        pose = torch.stack([(box[:, 0] + box[:, 2]) / 2, box[:, 3], size.clamp(0.15, 0.9).log(), torch.zeros_like(size)], dim=1)
        pose.requires_grad_()
        adam = torch.optim.Adam([pose], lr=0.02)
        for _ in range(STEPS):
            error = left(pose)
            best = torch.minimum(best, error.detach())
            adam.zero_grad()
            error.sum().backward()
            adam.step()
    return best.sqrt()


def measured(model: p2p.Model, scene: Scene, steps: int) -> tuple[Tensor, Tensor]:
    """Pictures of the scenes' captions, and their distances."""
    eye, pictures = recogniser.load(), []
    for k in range(0, len(scene), 25):
        part = scene[slice(k, k + 25)]
        pictures.append(shown(p2p.generate(model, caption(part), steps=steps, seed=list(range(k, k + len(part))))))
    made = torch.cat(pictures)
    return made, torch.cat([distance(m, s, eye) for m, s in
                            zip(made.split(100), (scene[slice(k, k + 100)] for k in range(0, len(scene), 100)))])


def sheet(columns: list[Tensor], file: Path) -> None:
    """Four captions a row; of each a picture a model."""
    every = torch.stack(columns, dim=1)                                                     # (n, models, 3, 64, 64)
    every = torch.cat([every, torch.ones(-len(every) % 4, *every.shape[1:])]).unflatten(0, (-1, 4))
    grid = every.permute(3, 0, 4, 1, 2, 5).flatten(3, 5).flatten(1, 2)                       # (3, rows 64, 4 models 64)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((pixels.shape[1] * 2, pixels.shape[0] * 2), Image.NEAREST).save(file)


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.sprites", description=__doc__.splitlines()[0])
    ap.add_argument("models", nargs="+")
    ap.add_argument("--n", type=int, default=500, help="captions")
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--sheet", type=Path, help="draw the pictures side by side")
    ap.add_argument("--save", type=Path, help="write the pictures and distances, by torch.save")
    a = ap.parse_args(argv)
    scene = sample(a.n, 2_000_000, "held out", ONE)
    truth = distance(render(scene)[0], scene, recogniser.load())
    print(f"{'true renders':20} {'{:.4f} ± {:.4f}'.format(*mean_ci(truth))}", flush=True)
    found, pictures = [], []
    for name in a.models:
        made, far = measured(p2p.load(name), scene, a.steps)
        found.append(far), pictures.append(made)
        print(f"{Path(name).name:20} {'{:.4f} ± {:.4f}'.format(*mean_ci(far))}", flush=True)
    for name, far in zip(a.models[1:], found[1:]):
        print(f"{Path(name).name} less {Path(a.models[0]).name}: {'{:+.4f} ± {:.4f}'.format(*mean_ci(far - found[0]))}")
    if a.sheet:
        sheet(pictures, a.sheet)
    if a.save:
        torch.save({"pictures": pictures, "distances": found}, a.save)


if __name__ == "__main__":
    main()

"""How good the bundled model and its edits are, as read by the recogniser. Run from the repository's root:

    python -m benchmarks.quality [--n 500] [--pairs 200] [--seeds 50] [--only recogniser,captions,...] [--json FILE]

Everything is drawn from fixed seeds. Kept out of training are the captions of `captions` and `novel`, both of a word swap, and
of an added word the source's where it names a place; faders, and what is added, take words as they come.
"""
from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import p2p
from p2p.request.start import Low
from p2p.weights.emoji import recogniser
from p2p.weights.emoji.recogniser import Reading, iou
from p2p.weights.emoji.world import COLOURS, OBJECTS, PLACES, STYLES, Mix, Scene, caption, edited, held_out, novel, render, sample

INJECTED = 2 / 3   # share of the steps with cross-attention injected in the word swaps
ONE = Mix(two=0, style=0, weather=0, size=0, named=1)   # one object, its place named
TWO = ONE._replace(two=1)


def mean_ci(values: Tensor) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval; of a share (0 and 1 alone) the wider side of Wilson's interval."""
    v, z, n = values.double(), 1.96, len(values)
    mean = v.mean().item()
    if not ((v == 0) | (v == 1)).all():
        return mean, z * v.std().item() / n**0.5
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (mean * (1 - mean) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z * z / n)
    return mean, half + abs(middle - mean)


def shown(result: p2p.Result) -> Tensor:
    """The run's pictures as the recogniser takes them: what a PNG file would hold.  -> (B, 3, 64, 64)"""
    return torch.cat([p2p.image.from_pil(i) for i in result.images])


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Of pictures (B, 3, H, W) in [-1, 1], where a mask (B or 1, H, W) is true; at most 60.  -> (B,) dB"""
    error = ((a - b) / 2).square().mean(1)                                                  # (B, H, W)
    where = torch.ones_like(error) if where is None else where.expand_as(error).float()
    mean = (error * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)
    return -10 * mean.clamp(min=1e-6).log10()


def psnr_outside(edits: Tensor, source: Tensor, cells: Tensor) -> Tensor:
    """PSNR of edits (B, 3, 64, 64) to their source (1, 3, 64, 64) where the map of cells (B, 32, 32), grown by two, is empty:
    what neither the old nor the new object covers.  -> (B,) dB"""
    grown = F.max_pool2d(cells[:, None].float(), 5, 1, 2)
    return psnr(edits, source.expand_as(edits), F.interpolate(grown, size=edits.shape[-2:])[:, 0] == 0)


def other(values: Tensor, n: int, g: torch.Generator) -> Tensor:
    """To each of 0 .. n-1 another."""
    return (values + torch.randint(1, n, values.shape, generator=g)) % n


def first(scene: Scene, name: str, values: Tensor) -> Scene:
    """The scene with this field of its first object replaced."""
    return edited(scene, **{name: torch.stack([values, getattr(scene, name)[:, 1]], dim=1)})


def other_thing(scene: Scene, g: torch.Generator) -> Scene:
    return first(scene, "thing", other(scene.thing[:, 0], len(OBJECTS), g))


def other_place(scene: Scene, g: torch.Generator) -> Scene:
    return edited(scene, place=other(scene.place, len(PLACES), g))


def asked(scene: Scene, seen: Reading) -> dict[str, list[bool]]:
    """Per picture: every asked object found; every named colour right; the named place right; the style right."""
    out: dict[str, list[bool]] = {"object": [], "colour": [], "place": [], "style": []}
    for i in range(len(scene)):
        things = [(int(t), int(c)) for t, c in zip(scene.thing[i], scene.colour[i]) if t >= 0]
        out["object"].append(all(bool(seen.found[i, t]) for t, _ in things))
        coloured = [(t, c) for t, c in things if c >= 0 and [x for x, _ in things].count(t) == 1]
        if coloured:
            out["colour"].append(all(bool(seen.found[i, t]) and int(seen.colour[i, t]) == c for t, c in coloured))
        if scene.named[i]:
            out["place"].append(bool(seen.place[i] == scene.place[i]))
        out["style"].append(bool(seen.style[i] == scene.style[i]))
    return out


class Bench:
    def __init__(self, model: p2p.Model, steps: int):
        self.model, self.steps, self.eye = model, steps, recogniser.load()

    def recogniser(self) -> dict:
        """On true renders: what its figures of pictures that a model made can be at most."""
        return {f"{name}, {split}": value for split in ("held out", "novel")
                for name, value in recogniser.judge(self.eye, 2000, split=split).items()}

    def captions(self, split: str, n: int) -> dict:
        """Shares of n pictures whose caption the recogniser can confirm."""
        scene, sums = sample(n, 2_000_000, split), {"object": [], "colour": [], "place": [], "style": []}
        for k in range(0, n, 25):
            part = scene[slice(k, k + 25)]
            r = p2p.generate(self.model, caption(part), steps=self.steps, seed=list(range(k, k + len(part))))
            for name, values in asked(part, self.eye.read(shown(r))).items():
                sums[name] += values
        return {name: sum(v) / len(v) for name, v in sums.items()}

    def _pairs(self, n: int, seed: int, change, mix: Mix, both: bool = False) -> tuple[Scene, Scene]:
        """n scenes and changed twins; no source's caption that names a place was ever trained. both: no twin's either, which
        the split (a hash that is linear) allows for other objects alone."""
        found: list[tuple[Scene, Scene]] = []
        g = torch.Generator().manual_seed(seed)
        while sum(len(a) for a, _ in found) < n:
            scene = sample(400, g, None, mix)
            other = change(scene, g)
            ok = ~novel(scene) & ~novel(other) & (held_out(scene) | ~scene.named) & (held_out(other) | (not both))
            found.append((scene[ok], other[ok]))
        return Scene.cat([a for a, _ in found])[:n], Scene.cat([b for _, b in found])[:n]

    def _edit(self, source: Scene, target: Scene, i: int, **settings) -> tuple[Tensor, Reading]:
        """Source, edit with injection, the edited prompt alone (same noise); one batch."""
        a, b = caption(source[[i]])[0], caption(target[[i]])[0]
        r = p2p.edit(self.model, a, [p2p.Edit(b, **settings), p2p.Edit(b, cross_replace_steps=0.0, self_replace_steps=0.0)],
                     steps=self.steps, seed=i)
        pictures = shown(r)
        return pictures, self.eye.read(pictures)

    def swap(self, n: int) -> dict:
        """Word swaps: is the new object there, did the rest stay, is it where the old one was?"""
        source, target = self._pairs(n, 1, other_thing, ONE, both=True)
        rows = []
        for i in range(n):
            old, new = int(source.thing[i, 0]), int(target.thing[i, 0])
            pictures, seen = self._edit(source, target, i, cross_replace_steps=INJECTED)
            psnr = psnr_outside(pictures[1:], pictures[:1], (seen.cells[:1] == old) | (seen.cells[1:] == new))
            overlap = iou(seen.box[1:, new], seen.box[:1, old].expand(2, -1))
            rows.append(torch.cat([seen.found[1:, new].float(), psnr, overlap, seen.found[:1, old].float()]))
        t = torch.stack(rows)
        return {
            "new object, injected": mean_ci(t[:, 0]), "new object, plain": mean_ci(t[:, 1]),
            "PSNR outside, injected": mean_ci(t[:, 2]), "PSNR outside, plain": mean_ci(t[:, 3]),
            "PSNR gain": mean_ci(t[:, 2] - t[:, 3]), "overlap, injected": mean_ci(t[:, 4]),
            "overlap, plain": mean_ci(t[:, 5]), "overlap gain": mean_ci(t[:, 4] - t[:, 5]), "source object": mean_ci(t[:, 6]),
        }

    def refine(self, n: int, what: str) -> dict:
        """An added place, colour or style: is it there, and did the object stay where it was?"""
        def added(s: Scene, g: torch.Generator) -> Scene:
            if what == "place":
                return edited(s, named=torch.ones_like(s.named), place=torch.randint(len(PLACES), (len(s),), generator=g))
            if what == "colour":
                return first(s, "colour", torch.randint(len(COLOURS), (len(s),), generator=g))
            return edited(s, style=1 + torch.randint(len(STYLES) - 1, (len(s),), generator=g))

        base = ONE._replace(named=0.0 if what == "place" else 1.0, colour=0.0 if what == "colour" else 0.6)
        source, target = self._pairs(n, 2, added, base)
        rows = []
        for i in range(n):
            thing = int(source.thing[i, 0])
            pictures, seen = self._edit(source, target, i)
            there = {"place": seen.place == target.place[i], "colour": seen.colour[:, thing] == target.colour[i, 0],
                     "style": seen.style == target.style[i]}[what]
            overlap = iou(seen.box[1:, thing], seen.box[:1, thing].expand(2, -1))
            psnr = psnr_outside(pictures[1:], pictures[:1], (seen.cells[:1] == thing) | (seen.cells[1:] == thing))
            rows.append(torch.cat([there[1:].float(), seen.found[1:, thing].float(), overlap, psnr]))
        t = torch.stack(rows)
        out = {}
        for k, name in enumerate(("added", "object kept", "overlap", "PSNR outside")):
            if name != "PSNR outside" or what == "colour":
                out |= {f"{name}, injected": mean_ci(t[:, 2 * k]), f"{name}, plain": mean_ci(t[:, 2 * k + 1])}
        return out

    def reweight(self, n: int, word: str, start: int = 0) -> dict:
        """A graded word at -2 .. 2: for how many seeds does the measured amount rise at every step? Of a size also as the cells
        of the named object alone."""
        values = (-2.0, -1.0, 0.0, 1.0, 2.0)
        things = list(OBJECTS)
        rows, named = [], []
        for i in range(start, start + n):
            thing = things[i % len(things)]
            prompt = f"a {word} {thing} on grass" if word in ("tiny", "huge") else f"a {thing} on {word} grass"
            edits = [p2p.Edit(prompt, mode="reweight", equalizer={word: c}, **REWEIGHT[word]) for c in values]
            pictures = shown(p2p.edit(self.model, prompt, edits, steps=self.steps, seed=i, guidance_scale=GUIDANCE.get(word)))[1:]
            seen = self.eye.read(pictures)
            amount = {"snowy": seen.snow, "foggy": seen.fog, "tiny": -seen.extent, "huge": seen.extent}[word]
            rows.append(amount.float())
            named.append((seen.cells == i % len(things)).sum((1, 2)).float() * (-1 if word == "tiny" else 1))
        t, of_named = torch.stack(rows), torch.stack(named)
        rises = {"rises": t} | ({"rises, the named object": of_named} if word in ("tiny", "huge") else {})
        return {name: mean_ci((each.diff(dim=1) > 0).all(1).float()) for name, each in rises.items()} | {
            f"amount at {c:+g}": mean_ci(t[:, k]) for k, c in enumerate(values)}

    def feather(self, n: int) -> dict:
        """Local blends of real pictures with feathered edges, against hard ones."""
        from benchmarks import feather  # it takes its figures from here
        return feather.measure(self.model, n, self.steps)

    def samplers(self, n: int) -> dict:
        """n pictures in fewer steps: PSNR to those that DDIM makes of the same noise in 250."""
        every, rows = sample(n, 4_000_000, "held out"), []
        for k in range(0, n, 10):
            texts, seeds = caption(every[slice(k, k + 10)]), list(range(k, min(k + 10, n)))
            truth, *few = (shown(p2p.generate(self.model, texts, seed=seeds, **how)) for how in (dict(steps=250), *FEW.values()))
            rows.append(torch.stack([psnr(pictures, truth) for pictures in few], dim=1))
        found = dict(zip(FEW, torch.cat(rows).unbind(1)))
        (first, base), *others = found.items()
        return {name: mean_ci(v) for name, v in found.items()} | {f"{name}, over {first}": mean_ci(v - base) for name, v in others}

    def upscale(self, n: int) -> dict:
        """The super-resolution stage on true small pictures: PSNR to the true large ones, against bicubic; is the content kept?"""
        stage, rows = p2p.load("emoji-upscaler"), []
        found: dict[str, dict[str, list[bool]]] = {"small": {}, "large": {}}
        every = sample(n, 3_000_000, "held out")
        for k in range(0, n, 10):
            scene = every[slice(k, k + 10)]
            (small, _), (truth, _) = render(scene), render(scene, 256)
            seeds = list(range(k, k + len(scene)))
            made = shown(p2p.generate(stage, caption(scene), steps=stage.steps, seed=seeds, low=Low(small, stage.noise_level)))
            bicubic = F.interpolate(small, 256, mode="bicubic", align_corners=False).clamp(-1, 1)
            rows.append(torch.stack([psnr(made, truth), psnr(bicubic, truth)], dim=1))
            for name, pictures in (("small", small), ("large", F.avg_pool2d(made, 4))):
                for what, values in asked(scene, self.eye.read(pictures)).items():
                    found[name].setdefault(what, []).extend(values)
        t = torch.cat(rows)
        return {"PSNR": mean_ci(t[:, 0]), "PSNR of bicubic": mean_ci(t[:, 1]), "PSNR gain": mean_ci(t[:, 0] - t[:, 1]),
                **{f"{what}, {name}": sum(v) / len(v) for name, each in found.items() for what, v in each.items()}}


# A source is snowy itself: injected for long, its maps times nought already leave nothing, and less cannot be told from nothing.
# Fog lies on everything, and a size moves all that the object covers: the other words' maps must be free to follow, only the word
# itself is injected.
REWEIGHT = {
    "snowy": dict(cross_replace_steps=0.4, self_replace_steps=0.2),
    "foggy": dict(cross_replace_steps={"default_": 0.0, "foggy": 0.8}, self_replace_steps=0.2, renormalise=True),
    "tiny": dict(cross_replace_steps={"default_": 0.0, "tiny": 1.0}, self_replace_steps=0.0, renormalise=True),
    "huge": dict(cross_replace_steps={"default_": 0.2, "huge": 1.0}, self_replace_steps=0.2),
}
FEW = {"DDIM, 50": dict(steps=50), "DPM++, 10": dict(steps=10, sampler="dpm++"),
       "DPM++ Karras, 10": dict(steps=10, sampler="dpm++", timestep_spacing="karras")}   # samplers, steps
GUIDANCE = {"tiny": 5.0}   # where it is not the model's own


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    ap.add_argument("--model", default="emoji")
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument("--n", type=int, default=500, help="captions")
    ap.add_argument("--pairs", type=int, default=200, help="word swaps")
    ap.add_argument("--seeds", type=int, default=50, help="of every refinement and graded word")
    ap.add_argument("--first", type=int, default=0, help="seed of the graded words")
    ap.add_argument("--only", default="recogniser,captions,novel,swap,place,colour,style,snowy,foggy,tiny,huge,upscale")
    ap.add_argument("--json")
    a = ap.parse_args(argv)
    bench = Bench(p2p.load(a.model), a.steps)
    jobs = {
        "recogniser": lambda: bench.recogniser(), "captions": lambda: bench.captions("held out", a.n),
        "novel": lambda: bench.captions("novel", a.n), "swap": lambda: bench.swap(a.pairs),
        "upscale": lambda: bench.upscale(a.n), "feather": lambda: bench.feather(a.pairs),
        "samplers": lambda: bench.samplers(a.seeds),
        **{w: lambda w=w: bench.refine(a.seeds, w) for w in ("place", "colour", "style")},
        **{w: lambda w=w: bench.reweight(a.seeds, w, a.first) for w in REWEIGHT},
    }
    report = {}
    for name in a.only.split(","):
        started = time.time()
        report[name] = jobs[name]()
        print(f"{name} ({time.time() - started:.0f} s)")
        for key, value in report[name].items():
            text = f"{value:8.3f}" if isinstance(value, float) else f"{value[0]:8.3f} +- {value[1]:.3f}"
            print(f"    {key:28} {text}", flush=True)
    if a.json:
        with open(a.json, "w", encoding="utf-8") as f:
            json.dump(report, f, indent=1)


if __name__ == "__main__":
    main()

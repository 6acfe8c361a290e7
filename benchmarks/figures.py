"""The paper's figures in miniature, made by the bundled model, each with the numbers behind it.

    python -m benchmarks.figures [FOLDER] [--only 2,4,...,12,blend,scope,samples] [--steps 50] [--n 200] [--seeds 100] [--draw]

Every figure is a picture, and a JSON file beside it where there is something to count. --draw makes the pictures alone,
without the statistics.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

import p2p
from benchmarks import paired
from benchmarks.quality import GUIDANCE, ONE, REWEIGHT, TWO, Bench, mean_ci, other_place, other_thing, psnr, psnr_outside, shown
from p2p.image import to_pil
from p2p.request.inverting import DEFAULT
from p2p.show.leakage import NOTICED
from p2p.show.pictures import grid, heat, save_png, table
from p2p.show.preview import stacked
from p2p.weights.emoji.recogniser import iou
from p2p.weights.emoji.world import OBJECTS, PLACES, caption, render, sample

PLAIN = dict(cross_replace_steps=0.0, self_replace_steps=0.0)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
Numbers = dict[str, Any]


class Figures(Bench):
    """`draw_N` makes a picture, `count_N` the numbers behind it."""

    def _row(self, source: str, edits: Sequence[p2p.Edit], seed: int, **settings) -> p2p.Result:
        return p2p.edit(self.model, source, list(edits), steps=self.steps, seed=seed, **settings)

    # README's picture: swaps with and without the source's attention, added words, a fader; at 256 x 256
    def draw_overview(self) -> Image.Image:
        source, prompt, values = "a house on grass", "a tree on foggy grass", (0, 0.5, 1.5, 2)
        swaps = [p2p.Edit(f"a {o} on grass", cross_replace_steps=0.5) for o in ("castle", "tree", "mushroom", "bear")]
        added = ("a blue house on grass", "a house on snowy grass", "a house at night", "a sketch of a house on grass")
        faded = [p2p.Edit(prompt, equalizer={"foggy": float(c)}, **REWEIGHT["foggy"]) for c in values]
        rows = [self._row(source, swaps, 1), self._row(source, [replace(e, **PLAIN) for e in swaps], 1),
                self._row(source, [p2p.Edit(t) for t in added], 1), self._row(prompt, faded, 3)]
        captions = [r.prompts for r in rows]
        captions[1] = [source, *(f"{p} (same seed alone)" for p in captions[1][1:])]
        captions[3] = [prompt, *(prompt.replace("foggy", f"foggy({c:g})") for c in values)]
        upscaler = p2p.load("emoji-upscaler")
        return stacked([grid(p2p.upscale(upscaler, r).images, c, 200) for r, c in zip(rows, captions)])

    # Held-out captions as they come
    def draw_samples(self) -> Image.Image:
        texts, rows = caption(sample(40, 5_000_000, "held out")), []
        for k in range(0, 40, 8):
            r = p2p.generate(self.model, texts[k:k + 8], steps=self.steps, seed=list(range(k, k + 8)))
            rows.append(table([r.images], texts[k:k + 8], side=112))
        return stacked(rows)

    # Figure 2: a swapped word with the source's attention, and the same seed alone
    def draw_2(self) -> Image.Image:
        source, others = "a lemon on grass", ("pumpkin", "cake", "mushroom", "flower", "tree")
        injected = self._row(source, [p2p.Edit(source.replace("lemon", o), cross_replace_steps=0.6) for o in others], 7)
        plain = self._row(source, [p2p.Edit(source.replace("lemon", o), **PLAIN) for o in others], 7)
        return table([injected.images, plain.images], [source, *others], ["attention injected", "same seed alone"])

    def count_2(self, n: int) -> Numbers:
        return self.swap(n)

    # Figure 4: which pixels attend to which words, on average and step by step
    def draw_4(self) -> Image.Image:
        prompt = "a red bear next to a blue bird on grass"
        r = p2p.generate(self.model, prompt, steps=self.steps, seed=4, record=p2p.Record(text=256))
        picture = r.images[0]
        each = [(w, m) for w, m in r.maps.each_word(0) if w in ("red", "bear", "blue", "bird", "on", "grass")]
        steps = [int(k * (self.steps - 1) / 5) for k in range(6)]
        rows = [[picture, *(heat(m, picture.size) for _, m in each)]]
        for word in ("bear", "bird"):
            rows.append([picture, *(heat(r.maps.word(word, steps=[i]), picture.size) for i in steps)])
        labels = ["mean of all steps", f"bear, step 1 to {self.steps}", f"bird, step 1 to {self.steps}"]
        return table(rows, ["picture", *(w for w, _ in each)], labels)

    def count_4(self, n: int) -> Numbers:
        """How far the attention of an object's word points at that object."""
        scene, _ = self._pairs(n, 4, lambda s, g: s, ONE)
        shares, chance = [], []
        for i in range(n):
            thing = int(scene.thing[i, 0])
            r = p2p.generate(self.model, caption(scene[[i]])[0], steps=self.steps, seed=i, record=p2p.Record(text=256))
            seen = self.eye.read(shown(r))
            at = torch.nn.functional.avg_pool2d((seen.cells == thing).float(), 2)[0]           # (16, 16)
            word = r.maps.word(list(OBJECTS)[thing])
            shares.append((word * at).sum() / word.sum())
            chance.append(at.mean())
        return {"attention of the object's word that lies on the object": mean_ci(torch.stack(shares)),
                "area of the object": mean_ci(torch.stack(chance))}

    # Figure 5: the attention of one word alone keeps its object, whatever surrounds it
    def draw_5(self) -> Image.Image:
        source = "a butterfly on grass"
        places = [phrase.format("") for name, (phrase, _) in PLACES.items() if name != "grass"]
        targets = [f"a butterfly {p}" for p in places]
        kept = self._row(source, [p2p.Edit(t, **self._only("butterfly")) for t in targets], 5)
        plain = self._row(source, [p2p.Edit(t, **PLAIN) for t in targets], 5)
        return table([kept.images, plain.images], [source, *places], ['"butterfly" injected', "same seed alone"])

    @staticmethod
    def _only(word: str) -> Numbers:
        return dict(cross_replace_steps={"default_": 0.0, word: 1.0}, self_replace_steps=0.0)

    def count_5(self, n: int) -> Numbers:
        source, target = self._pairs(n, 5, other_place, ONE)
        rows = []
        for i in range(n):
            thing = int(source.thing[i, 0])
            a, b = caption(source[[i]])[0], caption(target[[i]])[0]
            r = self._row(a, [p2p.Edit(b, **self._only(list(OBJECTS)[thing])), p2p.Edit(b, **PLAIN)], i)
            seen = self.eye.read(shown(r))
            overlap = iou(seen.box[1:, thing], seen.box[:1, thing].expand(2, -1))
            kept, new = (overlap >= 0.6) & seen.found[1:, thing], seen.place[1:] == target.place[i]
            rows.append(torch.cat([kept, overlap, new, kept & new]))
        t = torch.stack(rows)
        names = "object kept (overlap >= 0.6)", "overlap", "new place", "object kept in the new place"
        return {f"{name}, {how}": mean_ci(t[:, 2 * k + j]) for k, name in enumerate(names)
                for j, how in enumerate(("its word injected", "plain"))}

    # Figure 6: more and more steps injected, cross- and self-attention
    @staticmethod
    def _shares(target: str) -> list[p2p.Edit]:
        return [p2p.Edit(target, cross_replace_steps=s, self_replace_steps=s) for s in SHARES]

    def draw_6(self) -> Image.Image:
        rows, labels = [], []
        for old, new, place, seed in (("cat", "dog", "on grass", 2), ("bicycle", "car", "on the beach", 3),
                                      ("house", "castle", "in the snow", 1)):
            r = self._row(f"a {old} {place}", self._shares(f"a {new} {place}"), seed)
            rows.append(r.images)
            labels.append(f"{old} to {new}")
        return table(rows, ["source", *(f"{s:.0%} injected" for s in SHARES)], labels)

    def count_6(self, n: int) -> Numbers:
        """Per share of injected steps: is the new object there, is it where the old one was, did the rest stay?"""
        source, target = self._pairs(n, 6, other_thing, ONE, both=True)
        rows = []
        for i in range(n):
            old, new = int(source.thing[i, 0]), int(target.thing[i, 0])
            b = caption(target[[i]])[0]
            r = self._row(caption(source[[i]])[0], self._shares(b), i)
            pictures = shown(r)
            seen, k = self.eye.read(pictures), len(SHARES)
            cells = (seen.cells[:1] == old) | (seen.cells[1:] == new)
            rows.append(torch.stack([
                seen.found[1:, new].float(), iou(seen.box[1:, new], seen.box[:1, old].expand(k, -1)),
                psnr_outside(pictures[1:], pictures[:1], cells)]))
        t = torch.stack(rows)                                                                  # (n, 3, shares)
        out = {name: [mean_ci(t[:, j, s]) for s in range(len(SHARES))]
               for j, name in enumerate(("new object", "overlap", "PSNR outside"))}
        success = torch.tensor([v for v, _ in out["new object"]])
        good = [s for s in range(len(SHARES)) if success[s] >= 0.95 * success.max()]           # the most kept of the word's best
        return {"shares": list(SHARES), **out, "best share": SHARES[max(good, key=lambda s: out["PSNR outside"][s][0])]}

    # Figure 7: words added, about the object or about everything
    def draw_7(self) -> Image.Image:
        rows = []
        for source, targets, seed in (
                ("a car on grass",
                 ("a red car on grass", "a blue car on grass", "a purple car on grass", "a car on snowy grass"), 3),
                ("a house", ("a house in the snow", "a house at night", "a house in the desert", "a house on foggy grass"), 6)):
            rows.append(self._row(source, [p2p.Edit(t) for t in targets], seed))
        return stacked([grid(r.images, r.prompts, 160) for r in rows])

    def count_7(self, n: int) -> Numbers:
        return {what: self.refine(n, what) for what in ("place", "colour")}

    # Figure 8: styles
    def draw_8(self) -> Image.Image:
        rows = [self._row(f"a {what}", [p2p.Edit(f"a {style} of a {what}") for style in ("sketch", "watercolor")], seed)
                for what, seed in (("castle on the beach", 2), ("bird at night", 5), ("tree on grass", 8))]
        return table([r.images for r in rows], ["source", "a sketch of ...", "a watercolor of ..."], [r.prompts[0] for r in rows])

    def count_8(self, n: int) -> Numbers:
        return self.refine(n, "style")

    # Figure 9: a word's weight as a fader
    def draw_9(self) -> Image.Image:
        values, rows, labels = (-2, -1, 0, 1, 2), [], []
        for word, prompt, seed in (("snowy", "a house on snowy grass", 3), ("foggy", "a castle on foggy grass", 2),
                                   ("huge", "a huge lemon on grass", 4), ("tiny", "a tiny mushroom on grass", 1)):
            edits = [p2p.Edit(prompt, mode="reweight", equalizer={word: float(c)}, **REWEIGHT[word]) for c in values]
            rows.append(self._row(prompt, edits, seed, guidance_scale=GUIDANCE.get(word)).images[1:])
            labels.append(prompt)
        return table(rows, [f"{c:+d}" if c else "0" for c in values], labels)

    def count_9(self, n: int) -> Numbers:
        return {word: self.reweight(n, word) for word in REWEIGHT}

    # Figures 10 to 12: real pictures, here renders that no network made
    def _renders(self, n: int, seed: int) -> list[tuple[Image.Image, str, str]]:
        """(picture, its caption, the caption with another object)"""
        source, target = self._pairs(n, seed, other_thing, ONE)
        return list(zip(to_pil(render(source)[0]), caption(source), caption(target)))

    def draw_10(self) -> Image.Image:
        rows = []
        for picture, a, b in self._renders(3, 10):
            inverted = p2p.invert(self.model, picture, a, steps=self.steps)
            edits = [p2p.Edit(b, cross_replace_steps=0.6), p2p.Edit(f"a watercolor of {a}")]
            captions = [a, f"{a}, inverted", *(e.prompt for e in edits)]
            rows.append(grid([picture, *p2p.edit(self.model, inverted, edits).images], captions, 160))
        return stacked(rows)

    def count_10(self, n: int) -> Numbers:
        """The swaps of `benchmarks.paired` by the default method."""
        return paired.measure(DEFAULT, ["swap"], n, self.steps, self.model)["kinds"]["swap"]

    GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.5)

    def draw_11(self) -> Image.Image:
        rows, labels = [], []
        for picture, a, _ in self._renders(3, 11):
            inverted = p2p.invert(self.model, picture, a, method="ddim", steps=self.steps)
            again = [p2p.edit(self.model, inverted, a, guidance_scale=g).images[0] for g in self.GUIDANCE]
            rows.append([picture, *again])
            labels.append(a)
        return table(rows, ["picture", *(f"guidance {g:g}" for g in self.GUIDANCE)], labels)

    def count_11(self, n: int) -> Numbers:
        """PSNR of the reconstruction by DDIM inversion, by the guidance of the sampling."""
        rows = []
        for picture, a, _ in self._renders(n, 11):
            inverted = p2p.invert(self.model, picture, a, method="ddim", steps=self.steps)
            again = torch.cat([p2p.edit(self.model, inverted, a, guidance_scale=g).latents[:1] for g in self.GUIDANCE])
            rows.append(psnr(again, inverted.latents[:1]))
        t = torch.stack(rows)
        return {"guidance": list(self.GUIDANCE), "PSNR": [mean_ci(t[:, k]) for k in range(len(self.GUIDANCE))]}

    def _noised(self, n: int) -> Iterator[tuple[Image.Image, p2p.Inversion, p2p.Result]]:
        """A picture, its inversion by noising, and its edit without and with a mask made of the words' attention."""
        for picture, a, b in self._renders(n, 12):
            noised = p2p.invert(self.model, picture, a, method="noise", steps=self.steps, skip=int(0.3 * self.steps))
            old, new = next((x, y) for x, y in zip(a.split(), b.split()) if x != y and x not in ("a", "an"))
            yield picture, noised, p2p.edit(self.model, noised, free_and_blended(b, old, new))

    def draw_12(self) -> Image.Image:
        rows = [[picture, *r.images, mask(r)] for picture, _, r in self._noised(3)]
        return table(rows, ["picture", "noised and denoised", "edited", "with a mask", "mask"], [""] * 3)

    def count_12(self, n: int) -> Numbers:
        """PSNR to the picture outside the mask made of the words' attention, without and with it."""
        t = torch.stack([psnr(r.latents[1:], inverted.latents[:1], ~r.masks[1]) for _, inverted, r in self._noised(n)
                         if not r.masks[1].all()])
        return {"PSNR outside the mask, without": mean_ci(t[:, 0]), "..., blended": mean_ci(t[:, 1])}

    # LocalBlend: only where the words attend
    def draw_blend(self) -> Image.Image:
        rows = []
        for old, new, seed in (("cat", "dog", 2), ("pumpkin", "cake", 3)):
            r = self._row(f"a {old} on grass", free_and_blended(f"a {new} on the beach", old, new), seed)
            rows.append([*r.images, mask(r)])
        return table(rows, ["source", "edit", "blended", "mask"], ["", ""])

    def count_blend(self, n: int) -> Numbers:
        """Word swaps with and without LocalBlend: the new object, and what is left of the source outside of the mask."""
        source, target = self._pairs(n, 7, other_thing, ONE, both=True)
        rows = []
        for i in range(n):
            words = list(OBJECTS)
            old, new = int(source.thing[i, 0]), int(target.thing[i, 0])
            edits = free_and_blended(caption(target[[i]])[0], words[old], words[new])
            r = self._row(caption(source[[i]])[0], edits, i)
            pictures, seen = shown(r), self.eye.read(shown(r))
            outside = ~r.masks[1, 0]
            change = ((pictures[1:] - pictures[:1]).abs().amax(1)[:, outside] * 127.5)         # (2, pixels) in 1 / 255
            largest = change.amax(1) if outside.any() else torch.zeros(2)
            rows.append(torch.cat([seen.found[1:, new].float(), largest, outside.float().mean()[None], ~outside.any()[None]]))
        t = torch.stack(rows)
        return {"new object, without": mean_ci(t[:, 0]), "new object, blended": mean_ci(t[:, 1]),
                "largest change outside the mask in 1/255, without": mean_ci(t[:, 2]),
                "..., blended, at most": t[:, 3].max().item(), "share of the picture outside the mask": mean_ci(t[:, 4]),
                "masks that cover everything": mean_ci(t[:, 5])}

    # Scope: one of two objects
    def draw_scope(self) -> Image.Image:
        rows = []
        for a, b, scope, seed in (
                ("a cat next to a house on grass", "a bear next to a house on grass", "cat", 3),
                ("a red car next to a tree on the beach", "a blue car next to a tree on the beach", ("red", "car"), 5)):
            free = p2p.Edit(b, cross_replace_steps=0.4)
            r = self._row(a, [free, replace(free, scope=scope)], seed)
            rows.append([*r.images, mask(r)])
        return table(rows, ["source", "edit", "scoped", "mask"], ["", ""])

    def count_scope(self, n: int) -> Numbers:
        """Two objects, the first swapped: how often did the second one change (lost, moved, of another colour, or more than
        one in ten of its pixels visibly), and by how many of its pixels?"""
        source, target = self._pairs(8 * n, 8, other_thing, TWO, both=True)
        rows, words = [], list(OBJECTS)
        for i in range(len(source)):
            old, kept, new = int(source.thing[i, 0]), int(source.thing[i, 1]), int(target.thing[i, 0])
            if len({old, kept, new}) < 3 or len(rows) == n:
                continue
            free = p2p.Edit(caption(target[[i]])[0], cross_replace_steps=0.6)
            r = self._row(caption(source[[i]])[0], [free, replace(free, scope=words[old])], i)
            pictures, seen = shown(r), self.eye.read(shown(r))
            if not (seen.found[0, kept] and seen.found[0, old]):
                continue   # the source itself does not show both
            moved = iou(seen.box[1:, kept], seen.box[:1, kept].expand(2, -1)) < 0.5
            at = torch.nn.functional.interpolate((seen.cells[:1, None] == kept).float(), size=pictures.shape[-2:])[0, 0] > 0
            pixels = ((pictures[1:] - pictures[:1]).abs().amax(1)[:, at] / 2 > NOTICED).float().mean(1)          # (2,)
            changed = ~seen.found[1:, kept] | moved | (seen.colour[1:, kept] != seen.colour[0, kept]) | (pixels > 0.1)
            rows.append(torch.cat([changed.float(), pixels, seen.found[1:, new].float()]))
        t = torch.stack(rows)
        names = "other object changed", "share of its pixels changed", "new object"
        return {"pairs": len(t), **{f"{name}, {how}": mean_ci(t[:, 2 * k + j]) for k, name in enumerate(names)
                                    for j, how in enumerate(("free", "scoped"))}}

    # The super-resolution stage after an edit
    def draw_upscale(self) -> Image.Image:
        targets = "a castle on grass", "a blue house on grass", "a house at night"
        r = self._row("a house on grass", [p2p.Edit(t) for t in targets], 1)
        large = p2p.upscale(p2p.load("emoji-upscaler"), r)
        return table([r.images, large.images], r.prompts, ["64 x 64", "256 x 256"], 256)

    def count_upscale(self, n: int) -> Numbers:
        return self.upscale(n)


def free_and_blended(prompt: str, old: str, new: str) -> list[p2p.Edit]:
    """A word swap, and the same where these two words attend alone."""
    free = p2p.Edit(prompt, cross_replace_steps=0.6)
    return [free, replace(free, local_blend=p2p.LocalBlend(words=(old, new)))]


def mask(r: p2p.Result) -> Image.Image:
    """Of the second target."""
    return Image.fromarray(r.masks[1, 0].numpy()).convert("RGB")


def curves(x: Sequence[float], lines: dict[str, Sequence[float]], label: str, size: tuple[int, int] = (520, 300)) -> Image.Image:
    """Lines over x, each scaled to its own range, which stands beside its name."""
    font, inks = ImageFont.load_default(14), [(204, 62, 22), (40, 90, 200), (30, 140, 60)]
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    left, top, right, bottom = 24, 16 + 20 * len(lines), size[0] - 24, size[1] - 46
    draw.rectangle((left, top, right, bottom), outline=(200, 200, 205))
    for value in x:
        at = left + (right - left) * (value - x[0]) / (x[-1] - x[0])
        draw.text((at - 10, bottom + 6), f"{value:g}", fill=(40, 40, 46), font=font)
    draw.text((left, bottom + 24), label, fill=(40, 40, 46), font=font)
    for k, (name, values) in enumerate(lines.items()):
        low, high = min(values), max(values)
        across = [left + (right - left) * (a - x[0]) / (x[-1] - x[0]) for a in x]
        points = [(px, bottom - 8 - (bottom - top - 16) * (v - low) / max(high - low, 1e-9)) for px, v in zip(across, values)]
        draw.line(points, fill=inks[k], width=2)
        for px, py in points:
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=inks[k])
        draw.text((left, 8 + 20 * k), f"{name}: {low:.3g} to {high:.3g}", fill=inks[k], font=font)
    return sheet


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.splitlines()[0])
    ap.add_argument("folder", nargs="?", type=Path, default=Path("figures"))
    ap.add_argument("--only", default="overview,2,4,5,6,7,8,9,10,11,12,blend,scope,upscale")
    ap.add_argument("--model", default="emoji")
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument("--n", type=int, default=200, help="word swaps")
    ap.add_argument("--seeds", type=int, default=100, help="of everything else")
    ap.add_argument("--draw", action="store_true", help="pictures alone")
    a = ap.parse_args(argv)
    figures = Figures(p2p.load(a.model), a.steps)
    unknown = [name for name in a.only.split(",") if not hasattr(figures, f"draw_{name}")]
    if unknown:
        ap.error(f"no figure {', '.join(unknown)}")
    a.folder.mkdir(parents=True, exist_ok=True)
    for name in a.only.split(","):
        started, file = time.time(), a.folder / f"figure-{name}.png"
        draw: Callable[[], Image.Image] = getattr(figures, f"draw_{name}")
        save_png(file, draw())
        count: Callable[[int], Numbers] | None = getattr(figures, f"count_{name}", None)
        if count and not a.draw:
            numbers = count(a.n if name in ("2", "6", "blend") else a.seeds)
            if name == "6":
                lines = {k: [v for v, _ in numbers[k]] for k in ("new object", "overlap", "PSNR outside")}
                plot = curves(numbers["shares"], lines, "share of the steps with injected attention")
                save_png(a.folder / "figure-6-curve.png", plot)
            if name == "11":
                lines = {"PSNR of the reconstruction, dB": [v for v, _ in numbers["PSNR"]]}
                save_png(a.folder / "figure-11-curve.png", curves(numbers["guidance"], lines, "guidance of the sampling"))
            text = json.dumps({"figure": name, "steps": a.steps, "numbers": numbers}, indent=1)
            file.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
            print(text)
        print(f"{file} ({time.time() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

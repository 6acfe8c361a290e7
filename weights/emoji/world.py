"""The emoji world: scenes, their captions, and a batched renderer. Every edit of a scene has a true picture.

A `Scene` is tensors (what stands where, in which colour); `sample` draws scenes, `caption` says what they
show, `render` paints them at any size on any device. Placement hangs on the words: each object has its own
range of size, height and side, each place its own horizon and light, so a swapped word moves the picture
unless attention is injected.
"""
from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ATLAS = Path(__file__).with_name("sprites.png")
SPRITE = 128   # pixels a side of a sprite in the atlas


class Thing(NamedTuple):
    """A sprite and its usual place, in fractions of the picture: side, bottom edge, centre; degrees of
    tilt."""

    glyph: str
    size: float
    bottom: float
    x: float
    tilt: float = 0.0
    flies: bool = False


OBJECTS = {
    "cat": Thing("🐱", 0.46, 0.88, 0.36),
    "dog": Thing("🐕", 0.50, 0.84, 0.60),
    "bear": Thing("🐻", 0.56, 0.92, 0.48),
    "bird": Thing("🐦", 0.36, 0.50, 0.66, tilt=8, flies=True),
    "butterfly": Thing("🦋", 0.36, 0.48, 0.34, tilt=12, flies=True),
    "bicycle": Thing("🚲", 0.56, 0.88, 0.44),
    "car": Thing("🚗", 0.54, 0.92, 0.58),
    "boat": Thing("⛵", 0.56, 0.78, 0.64, tilt=5),
    "house": Thing("🏠", 0.60, 0.78, 0.38),
    "castle": Thing("🏰", 0.70, 0.80, 0.50),
    "tree": Thing("🌳", 0.66, 0.82, 0.64),
    "flower": Thing("🌷", 0.44, 0.94, 0.34),
    "mushroom": Thing("🍄", 0.38, 0.92, 0.64),
    "lemon": Thing("🍋", 0.36, 0.84, 0.42, tilt=8),
    "cake": Thing("🎂", 0.44, 0.88, 0.56),
    "pumpkin": Thing("🎃", 0.48, 0.92, 0.40),
}
COLOURS = {   # RGB in 0..1
    "red": (0.90, 0.12, 0.14), "orange": (1.00, 0.52, 0.05), "yellow": (0.98, 0.86, 0.10),
    "green": (0.16, 0.66, 0.22), "blue": (0.14, 0.34, 0.92), "purple": (0.58, 0.18, 0.78),
}
PLACES = {    # phrase and where its horizon lies; {} takes the weather
    "grass": ("on {}grass", 0.60), "snow": ("in the {}snow", 0.54), "beach": ("on the {}beach", 0.46),
    "night": ("at night", 0.66), "desert": ("in the {}desert", 0.50),
}
STYLES = {"picture": "", "sketch": "a sketch of ", "watercolor": "a watercolor of "}
WEATHERS = ("", "snowy", "foggy")          # graded: the amount of each is in the scene
SIZES = ("", "tiny", "huge")               # graded: factors of an object's own size
SIZE_FACTORS = (1.0, 0.55, 1.5)
# least and greatest size of each, alone and beside another object: a huge cat fills the picture
SIZE_BOUNDS = (((0.42, 0.72), (0.32, 0.36), (0.74, 0.90)), ((0.38, 0.46), (0.30, 0.33), (0.54, 0.60)))
FLAKES = (   # of falling snow, which each scene shifts: a network of convolutions does not know where it is
    (0.06, 0.10), (0.20, 0.31), (0.34, 0.07), (0.47, 0.24), (0.61, 0.12), (0.76, 0.33), (0.91, 0.08),
    (0.95, 0.45), (0.10, 0.52), (0.30, 0.60), (0.52, 0.47), (0.69, 0.57), (0.86, 0.70), (0.17, 0.78),
    (0.43, 0.83), (0.63, 0.92),
)


@dataclass
class Scene:
    """B scenes; two slots an object, the second may be empty. Lengths are fractions of the picture's side."""

    thing: Tensor        # (B, 2) long, -1: none
    colour: Tensor       # (B, 2) long, -1: its own
    size_word: Tensor    # (B, 2) long, index into SIZES
    x: Tensor            # (B, 2) centre
    bottom: Tensor       # (B, 2)
    size: Tensor         # (B, 2) side of the sprite's square
    tilt: Tensor         # (B, 2) degrees
    place: Tensor        # (B,) long
    named: Tensor        # (B,) bool: the caption names the place
    horizon: Tensor      # (B,)
    light: Tensor        # (B,) brightness, about 1
    landmark: Tensor     # (B,) where sun, moon, cloud or hill stands
    weather: Tensor      # (B,) long, index into WEATHERS
    amount: Tensor       # (B,) 0..1, of that weather
    style: Tensor        # (B,) long

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, index) -> Scene:
        return Scene(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device) -> Scene:
        return Scene(*(getattr(self, f.name).to(device) for f in fields(self)))

    @staticmethod
    def cat(scenes: list[Scene]) -> Scene:
        return Scene(*(torch.cat([getattr(s, f.name) for s in scenes]) for f in fields(Scene)))


class Mix(NamedTuple):
    """Probabilities of a scene's parts."""

    two: float = 0.4
    colour: float = 0.6
    style: float = 0.25
    weather: float = 0.2
    size: float = 0.2
    named: float = 0.92
    roam: float = 0.45     # objects away from their own size and place: any object may stand anywhere
    spread: float = 1.0    # 0: everything large and in the middle, an easy start for training


def curriculum(progress: float) -> Mix:
    """From one large object in the middle (progress 0) to the whole world (progress 1)."""
    p = min(1.0, max(0.0, 1.25 * progress - 0.25))
    late = max(0.0, 2 * p - 1)
    return Mix(two=0.4 * p, style=0.25 * late, weather=0.2 * late, size=0.2 * p, spread=0.15 + 0.85 * p)


def _draw(n: int, g: torch.Generator, mix: Mix) -> Scene:
    def u(*shape):
        return torch.rand(*shape, generator=g)

    def pick(k, *shape):
        return torch.randint(k, shape, generator=g)

    table = torch.tensor([[t.size, t.bottom, t.x, t.tilt] for t in OBJECTS.values()])
    thing = pick(len(OBJECTS), n, 2)
    two = u(n) < mix.two
    usual = table[thing]                                                                     # (n, 2, 4)
    jitter = torch.randn(n, 2, 3, generator=g).clamp(-2, 2) * torch.tensor([0.03, 0.025, 0.04])
    spot = usual[..., :3] + jitter
    anywhere = torch.stack([0.32 + 0.34 * u(n, 2), 0.52 + 0.42 * u(n, 2), 0.28 + 0.44 * u(n, 2)], dim=-1)
    spot = torch.where((u(n, 2) < mix.roam)[..., None], anywhere, spot)
    spot = torch.lerp(torch.tensor([0.60, 0.84, 0.50]).expand_as(spot), spot, mix.spread)
    size_word = torch.where(u(n, 2) < mix.size, 1 + pick(2, n, 2), torch.zeros(n, 2, dtype=torch.long))
    size = spot[..., 0] * torch.tensor(SIZE_FACTORS)[size_word]
    pair = torch.stack([0.27 + 0.03 * jitter[:, 0, 2] / 0.04, 0.73 + 0.03 * jitter[:, 1, 2] / 0.04], dim=1)
    x = torch.where(two[:, None], pair, spot[..., 2])
    low, high = torch.tensor(SIZE_BOUNDS)[two.long()[:, None], size_word].unbind(-1)
    size = torch.where(two[:, None], 0.8 * size, size).maximum(low).minimum(high)
    bottom = spot[..., 1].maximum(size + 0.02).clamp(max=0.98)
    x = x.maximum(size / 2).minimum(1 - size / 2)
    second = torch.tensor([False, True]) & ~two[:, None]
    place = pick(len(PLACES), n)
    weather = torch.where(u(n) < mix.weather, 1 + pick(2, n), torch.zeros(n, dtype=torch.long))
    named = (u(n) < mix.named) | (weather > 0)
    names = list(PLACES)
    bare = (place == names.index("night")) | ((place == names.index("snow")) & (weather == 1))
    weather = torch.where(bare, torch.zeros_like(weather), weather)
    return Scene(
        thing=thing.masked_fill(second, -1),
        colour=torch.where((u(n, 2) < mix.colour) & ~second, pick(len(COLOURS), n, 2),
                           torch.full((n, 2), -1)),
        size_word=size_word.masked_fill(second, 0), x=x, bottom=bottom, size=size,
        tilt=usual[..., 3] * (2 * u(n, 2) - 1), place=place, named=named,
        horizon=torch.tensor([p[1] for p in PLACES.values()])[place] + 0.05 * (u(n) - 0.5),
        light=0.94 + 0.12 * u(n), landmark=0.15 + 0.7 * u(n), weather=weather,
        amount=torch.where(weather > 0, 0.3 + 0.7 * u(n), torch.zeros(n)),
        style=torch.where(u(n) < mix.style, 1 + pick(len(STYLES) - 1, n), torch.zeros(n, dtype=torch.long)),
    )


def novel(scene: Scene) -> Tensor:
    """Scenes that join two words never joined in training (9 of the 96 coloured objects, 18 pairs).  (B,)
    bool"""
    thing, colour = scene.thing, scene.colour
    tinted = (thing >= 0) & (colour >= 0) & ((thing + 3 * colour) % 11 == 5)
    pair = (thing[:, 1] >= 0) & ((thing[:, 0] + 5 * thing[:, 1]) % 14 == 3)
    return tinted.any(dim=1) | pair


def held_out(scene: Scene) -> Tensor:
    """Scenes whose caption is kept out of training: one in ten of those that name their place, by a hash of
    what the caption says.  (B,) bool"""
    h = torch.zeros_like(scene.place)
    for part in (scene.thing[:, 0], scene.thing[:, 1], scene.colour[:, 0], scene.colour[:, 1],
                 scene.size_word[:, 0], scene.size_word[:, 1], scene.place, scene.named.long(), scene.weather,
                 scene.style):
        h = (h * 31 + part + 7) % 1_000_003
    return ((h * 7919 % 1_000_003) % 10 == 0) & scene.named


def sample(n: int, seed: int | torch.Generator, split: str | None = "train", mix: Mix = Mix()) -> Scene:
    """n scenes. split: "train", "held out" (captions never trained), "novel" (word pairs never trained) or
    None (all)."""
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    keep = {
        "train": lambda s: ~novel(s) & ~held_out(s), "held out": lambda s: ~novel(s) & held_out(s),
        "novel": novel, None: lambda s: torch.ones(len(s), dtype=torch.bool),
    }[split]
    scenes: list[Scene] = []
    while sum(map(len, scenes)) < n:
        drawn = _draw(max(64, 2 * n), g, mix)
        scenes.append(drawn[keep(drawn)])
    return Scene.cat(scenes)[:n]


def caption(scene: Scene) -> list[str]:
    """What the scenes show, in words: "a watercolor of a tiny red cat next to a house on snowy grass"."""
    things, colours = list(OBJECTS), list(COLOURS)
    places, styles = list(PLACES.values()), list(STYLES.values())
    out = []
    for i in range(len(scene)):
        nouns = []
        for j in range(2):
            if (t := int(scene.thing[i, j])) >= 0:
                c = int(scene.colour[i, j])
                words = [SIZES[int(scene.size_word[i, j])], colours[c] if c >= 0 else "", things[t]]
                words = " ".join(w for w in words if w)
                nouns.append(("an " if words[0] in "aeiou" else "a ") + words)
        weather = WEATHERS[int(scene.weather[i])]
        where = ""
        if scene.named[i]:
            where = " " + places[int(scene.place[i])][0].format(weather + " " if weather else "")
        out.append(styles[int(scene.style[i])] + " next to ".join(nouns) + where)
    return out


# -------------------------------------------------------------------------------------------------- rendering

@lru_cache(maxsize=8)
def _sprites(side: int, device: str) -> Tensor:
    """Every sprite in every tint, premultiplied RGBA.  -> (objects, 1 + colours, 4, side, side)"""
    sheet = torch.from_numpy(np.array(Image.open(ATLAS).convert("RGBA"))).permute(2, 0, 1).float() / 255
    rgba = sheet.unflatten(2, (len(OBJECTS), SPRITE)).permute(2, 0, 1, 3)                 # (K, 4, S, S)
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    grey = (rgb * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    mean = (grey * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True)
    shade = (grey - mean) * 1.1   # what a tint keeps: light and shade
    tints = [rgb]
    for colour in torch.tensor(list(COLOURS.values())):
        colour = colour[:, None, None]
        tints.append(torch.where(shade > 0,
                                 torch.lerp(colour.expand_as(rgb), torch.ones(()), shade.clamp(0, 1)),
                                 colour * (1 + shade * 1.6).clamp(0.1, 1)))
    every = torch.stack([torch.cat([t * alpha, alpha], dim=1) for t in tints], dim=1)     # (K, 1+C, 4, S, S)
    return F.interpolate(every.flatten(0, 1), size=side, mode="area").unflatten(0, every.shape[:2]).to(device)


def _mix(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t


def _background(s: Scene, side: int) -> tuple[Tensor, Tensor]:
    """-> picture (B, 3, side, side), ground mask (B, 1, side, side)"""
    device = s.place.device
    axis = (torch.arange(side, device=device) + 0.5) / side
    y, x = axis[None, None, :, None], axis[None, None, None, :]
    soft = side

    def col(*rgb):
        return torch.tensor(rgb, device=device).view(1, 3, 1, 1) / 255

    def per(v):
        return v.view(-1, 1, 1, 1)

    def disc(cx, cy, rx, ry, blur=1.0):
        return ((1 - ((x - cx) ** 2 / rx**2 + (y - cy) ** 2 / ry**2).sqrt()) * min(rx, ry) * soft / blur
                + 0.5).clamp(0, 1)

    h, u, place = per(s.horizon), per(s.landmark), per(s.place)
    names = list(PLACES)
    is_ = {n: (place == i).float() for i, n in enumerate(names)}
    wave = 0.035 * torch.sin(6.3 * (x + u)) * (is_["desert"] + 0.7 * is_["snow"])         # dunes and drifts
    ground = ((y - h - wave) * soft + 0.5).clamp(0, 1)                                    # (B, 1, S, S)
    up, down = (y / h).clamp(0, 1), ((y - h) / (1 - h)).clamp(0, 1)
    skies = {"grass": ((110, 185, 250), (205, 232, 255)), "snow": ((170, 195, 222), (222, 230, 240)),
             "beach": ((90, 190, 245), (190, 230, 250)), "night": ((14, 18, 62), (52, 50, 110)),
             "desert": ((250, 170, 105), (255, 226, 170))}
    grounds = {"grass": ((122, 200, 88), (66, 150, 52)), "snow": ((252, 253, 255), (222, 232, 246)),
               "beach": ((244, 222, 160), (230, 198, 122)), "night": ((30, 56, 62), (14, 30, 40)),
               "desert": ((232, 172, 92), (196, 126, 60))}
    sky = sum(is_[n] * _mix(col(*skies[n][0]), col(*skies[n][1]), up) for n in names)
    floor = sum(is_[n] * _mix(col(*grounds[n][0]), col(*grounds[n][1]), down) for n in names)
    cloud = torch.maximum(disc(u, 0.16, 0.17, 0.055, 3),
                          disc(u + 0.08, 0.13, 0.10, 0.06, 3)) * (is_["grass"] + is_["snow"])
    sky = _mix(sky, col(255, 255, 255), 0.85 * cloud)
    sky = _mix(sky, col(255, 236, 120), disc(u, 0.15, 0.085, 0.085) * is_["beach"])
    sky = _mix(sky, col(255, 246, 214), disc(u, 0.17, 0.11, 0.11) * is_["desert"])
    moon = (disc(u, 0.16, 0.09, 0.09) - disc(u + 0.045, 0.14, 0.08, 0.08)).clamp(0, 1)
    stars = sum(disc(sx, sy, 0.012, 0.012)
                for sx, sy in ((0.08, 0.3), (0.22, 0.12), (0.4, 0.34), (0.55, 0.08),
                                                          (0.7, 0.28), (0.86, 0.16), (0.94, 0.4)))
    sky = _mix(sky, col(255, 250, 200), (moon + 0.8 * stars).clamp(0, 1) * is_["night"])
    sea = ((y - h) * soft + 0.5).clamp(0, 1) * ((h + 0.12 - y) * soft + 0.5).clamp(0, 1) * is_["beach"]
    floor = _mix(floor, col(30, 125, 205), sea)
    return _mix(sky, floor, ground) * per(s.light), ground


def _stand(s: Scene, j: int, side: int) -> Tensor:
    """Object j of every scene on an empty canvas, premultiplied RGBA.  -> (B, 4, side, side)"""
    thing, colour = s.thing[:, j], s.colour[:, j]
    sprites = _sprites(SPRITE if side > 128 else SPRITE // 2, str(s.place.device))
    sprites = sprites[thing.clamp(min=0), colour + 1]
    half = s.size[:, j] / 2
    a = torch.deg2rad(s.tilt[:, j])
    cx, cy = 2 * s.x[:, j] - 1, 2 * (s.bottom[:, j] - half) - 1
    cos, sin = a.cos() / s.size[:, j], a.sin() / s.size[:, j]
    theta = torch.stack([torch.stack([cos, sin, -(cos * cx + sin * cy)], -1),
                         torch.stack([-sin, cos, sin * cx - cos * cy], -1)], 1)            # canvas -> sprite
    grid = F.affine_grid(theta, [len(s), 4, side, side], align_corners=False)
    drawn = F.grid_sample(sprites, grid, padding_mode="zeros", align_corners=False)
    return drawn * (thing >= 0).view(-1, 1, 1, 1)


def _shadow(s: Scene, j: int, side: int) -> Tensor:
    device = s.place.device
    axis = (torch.arange(side, device=device) + 0.5) / side
    y, x = axis[None, :, None], axis[None, None, :]
    stands = torch.tensor([not t.flies for t in OBJECTS.values()], device=device)[s.thing[:, j].clamp(min=0)]
    size = s.size[:, j].view(-1, 1, 1)
    dx, dy = x - s.x[:, j].view(-1, 1, 1), y - s.bottom[:, j].view(-1, 1, 1)
    d = (dx / (0.5 * size)) ** 2 + (dy / (0.09 * size)) ** 2
    return (0.32 * (1.25 - d).clamp(0, 1) * (stands & (s.thing[:, j] >= 0)).view(-1, 1, 1))[:, None]


def _styled(picture: Tensor, covered: Tensor, style: Tensor) -> Tensor:
    """Sketch: pale colours and dark outlines. Watercolor: a pale wash whose edges run darker. covered: by
    objects, (B, 1, side, side)."""
    unit = max(1, picture.shape[-1] // 64)
    blur = F.avg_pool2d(F.pad(picture, [unit] * 4, mode="replicate"), 2 * unit + 1, 1)
    grey = picture.mean(1, keepdim=True)
    brightest = F.max_pool2d(grey, 2 * unit + 1, 1, unit)
    edge = (brightest + F.max_pool2d(-grey, 2 * unit + 1, 1, unit)).clamp(0, 1)
    outline = (F.max_pool2d(covered, 2 * unit + 1, 1, unit) - covered).clamp(0, 1)
    paper = torch.tensor([0.99, 0.97, 0.92], device=picture.device).view(1, 3, 1, 1)
    sketch = _mix(paper, picture, torch.tensor(0.5)) * (1 - 0.3 * edge) * (1 - 0.8 * outline)
    wash = _mix(picture, blur, 0.5 * (1 - covered))
    wash = _mix(wash.mean(1, keepdim=True), wash, torch.tensor(1.25)).clamp(0, 1)
    wash = _mix(wash, paper, torch.tensor(0.35)) * (1 - 0.3 * outline)
    s = style.view(-1, 1, 1, 1)
    return torch.where(s == 1, sketch, torch.where(s == 2, wash, picture))


def _flakes(s: Scene, side: int, device) -> Tensor:
    """Falling snow, in front of everything.  -> (B, 1, side, side) in 0..1"""
    axis, at = (torch.arange(side, device=device) + 0.5) / side, torch.tensor(FLAKES, device=device)
    shift = torch.stack([17 * s.landmark, 97 * s.light], dim=1)[:, None]           # of the scene
    x, y = ((at + shift) % 1)[..., None].unbind(2)                                 # (B, F, 1)
    dx, dy = (axis - x)[:, :, None], (axis - y)[..., None]
    return (1.9 - (dx**2 + dy**2).sqrt() / 0.023).amax(1, keepdim=True).clamp(0, 1)


def render(scene: Scene, side: int = 64) -> tuple[Tensor, Tensor]:
    """-> pictures (B, 3, side, side) in [-1, 1], object masks (B, 2, side, side) in 0..1 (the visible part of
    each)."""
    picture, ground = _background(scene, side)
    weather, amount = scene.weather.view(-1, 1, 1, 1), scene.amount.view(-1, 1, 1, 1)
    snow, fog = amount * (weather == 1), amount * (weather == 2)
    settled = snow.sqrt() * (0.97 * ground + 0.35 * (1 - ground))
    picture = _mix(picture, torch.full_like(picture, 0.96), settled)
    picture = _mix(picture, torch.full_like(picture, 0.83), fog)
    for j in range(2):
        picture = picture * (1 - _shadow(scene, j, side))
    masks: list[Tensor] = []
    for j in range(2):
        drawn = F.avg_pool2d(_stand(scene, j, 2 * side), 2)
        rgb, alpha = drawn[:, :3], drawn[:, 3:]
        masks = [m * (1 - alpha) for m in masks] + [alpha]
        picture = picture * (1 - alpha) + _mix(rgb, 0.83 * alpha, 0.45 * fog)
    covered = torch.cat(masks, dim=1).sum(1, keepdim=True).clamp(0, 1)
    picture = _styled(picture.clamp(0, 1), covered, scene.style)
    picture = _mix(picture, torch.ones_like(picture), snow.sqrt() * _flakes(scene, side, picture.device))
    return 2 * picture.clamp(0, 1) - 1, torch.cat(masks, dim=1)


def edited(scene: Scene, **changes) -> Scene:
    """The scene with some fields replaced (same placement, other content): what a perfect edit would show."""
    return replace(scene, **changes)

"""Attention maps of a run: by word, step, layer, head and resolution (the paper's figure 4), as
arrays and overlays."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from p2p.align import ends as text_ends
from p2p.align import named_words, word_tokens
from p2p.denoise import Step
from p2p.errors import UsageError
from p2p.image import as_picture
from p2p.models.attention import SelfAttention
from p2p.models.maps import site_maps
from p2p.models.network import Network
from p2p.models.text import Tokens
from p2p.request.checks import choice, flag, kind, place, whole
from p2p.request.record import Record
from p2p.show import pictures
from p2p.weights.untrusted import brief


@dataclass(repr=False)
class AttentionMaps:
    """The maps that `record` selects, in half precision, on the CPU.

    sites: module name -> (steps, rows, heads, pixels, columns); with `Record.mean` one step and one head.
    Rows: the prompts, source first, as used (after the edit), then, with `Record.before`, the targets again
    as they were before the edit. Columns: tokens, or for self-attention pixels.
    """

    prompts: list[Tokens]
    timesteps: list[float]
    size: tuple[int, int]            # height, width of the latents
    length: int                      # text columns
    sites: dict[str, Tensor]
    pixel_sites: frozenset[str] = frozenset()   # those of self-attention

    def __repr__(self) -> str:
        layers = [f"{name} {tuple(m.shape)}" for name, m in self.sites.items()]
        more = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
        return f"<AttentionMaps of {[p.text for p in self.prompts]}: {', '.join(layers[:1])}{more}>"

    def show(self, word: str, row: int = 0, picture: Image.Image | None = None,
             **selection: Any) -> Image.Image:
        """The map of a word or phrase in colours, 256 pixels high, or laid over its picture. selection: see
        `mean`. Raises UsageError."""
        found = self.word(word, row, **selection)
        size = round(256 * found.shape[1] / found.shape[0]), 256
        return pictures.heat(found, size) if picture is None else pictures.overlay(as_picture(picture), found)

    def _row(self, row: int, before: bool) -> int:
        n = len(self.prompts)
        whole("row", row, 0, n - 1)
        if not flag("before", before):
            return row
        rows = next(iter(self.sites.values())).shape[1]
        if row == 0 or rows == n:
            raise UsageError("maps before the edit exist for targets, of runs recorded with before=True")
        return n + row - 1

    def _side(self, pixels: int) -> tuple[int, int]:
        """(h, w) with h w = pixels that comes nearest to the latents' shape."""
        ideal = (pixels * self.size[0] / self.size[1]) ** 0.5
        h = min((h for h in range(1, pixels + 1) if pixels % h == 0), key=lambda h: abs(h - ideal))
        return h, pixels // h

    def _of(self, columns: str) -> dict[str, Tensor]:
        return {name: m for name, m in self.sites.items()
                if (name in self.pixel_sites) == (columns == "pixels")}

    def sides(self, columns: str = "text") -> list[tuple[int, int]]:
        """(height, width) of the recorded maps, largest first; columns "text" or "pixels"."""
        choice("columns", columns, ("text", "pixels"))
        pixels = {m.shape[3] for m in self._of(columns).values()}
        return [self._side(p) for p in sorted(pixels, reverse=True)]

    def mean(self, row: int = 0, *, before: bool = False, steps: Iterable[int] | None = None,
             heads: Iterable[int] | None = None, sites: str | None = None,
             side: tuple[int, int] | None = None, columns: str = "text") -> Tensor:
        """Mean map of a row over steps, sites and heads.  -> (h, w, columns) float32

        steps, heads: their indices, None for all; sites: a part of the module names that count
        ("down", "up", "mid"); side: of the maps, None for a quarter of the latents' (16 x 16 in
        Stable Diffusion at 512 x 512, as in the official code's figures) or, where that was not
        recorded, for the largest. Raises UsageError.
        """
        sides = self.sides(columns)
        if not sides:
            raise UsageError(f"no maps of {columns} were recorded")
        usual = tuple(-(-s // 4) for s in self.size)
        side = (usual if usual in sides else sides[0]) if side is None else kind("side", side, tuple)
        kind("sites", sites, str, type(None))
        chosen = [m for name, m in self._of(columns).items() if self._side(m.shape[3]) == side
                  and (sites or "") in name]
        if not chosen:
            raise UsageError(f"no maps of {columns} of the side {brief(side)}"
                             f"{f' at sites named {sites}' if sites else ''}; recorded: {sides}")
        row = self._row(row, before)
        steps = _indices("steps", steps, chosen[0].shape[0])
        heads = _indices("heads", heads, min(m.shape[2] for m in chosen))
        picked = []
        for m in chosen:
            m = m[:, row] if steps is None else m[steps, row]   # (steps, heads, pixels, columns)
            picked.append((m if heads is None else m[:, heads]).float().mean((0, 1)))
        return torch.stack(picked).mean(0).unflatten(0, side)

    def _mean(self, row: int, columns: str, selection: dict[str, Any]) -> Tensor:
        if "columns" in selection:
            raise UsageError(f"columns: those of {columns} are taken here; leave it out, or ask `mean`")
        return self.mean(row, columns=columns, **selection)

    def word(self, word: str, row: int = 0, **selection: Any) -> Tensor:
        """The share of attention that a word or phrase gets, summed over its tokens.  -> (h, w)

        selection: the arguments of `mean` but columns.
        """
        kind("word", word, str)
        mean = self._mean(row, "text", selection)
        return mean[..., word_tokens(self.prompts[row], word, self.length)].sum(-1)

    def each_word(self, row: int = 0, ends: bool = False, **selection: Any) -> list[tuple[str, Tensor]]:
        """(word, its map) for every word of a prompt in order, repeated ones as "cat#2". ends: also the start
        and the end token."""
        flag("ends", ends)
        mean, words = self._mean(row, "text", selection), [word[1:] for word in self.read_words(row)]
        if ends:
            starts, stops = text_ends(self.prompts[row], self.length)
            words = [("<start>", starts), *words, ("<end>", stops)]
        return [(w, mean[..., columns].sum(-1)) for w, columns in words]

    def read_words(self, row: int = 0) -> list[tuple[int, str, list[int]]]:
        """(place, word, columns) of the words of a prompt that the text tower reads: not those that it cuts
        off or has no token for."""
        every = enumerate(named_words(self.prompts[whole("row", row, 0, len(self.prompts) - 1)]))
        read = [(k, word, [i for i in columns if i < self.length - 1]) for k, (word, columns) in every]
        return [each for each in read if each[2]]

    def components(self, row: int = 0, count: int = 3, **selection: Any) -> Tensor:
        """Leading principal components of the self-attention, each scaled to 0..1.  -> (h, w, count)"""
        whole("count", count)
        p = self._mean(row, "pixels", selection)                                     # (h, w, pixels)
        flat = p.flatten(0, 1).double()
        u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        u = u[:, :count] * s[:count]
        u *= torch.where((u**3).sum(0) < 0, -1, 1)   # the sign is arbitrary: the longer tail is bright
        low, high = u.amin(0), u.amax(0)
        return ((u - low) / (high - low).clamp(min=1e-12)).float().unflatten(0, p.shape[:2])

    def save(self, path: str | Path) -> None:
        """Writes all maps as a numpy archive: one array a site, and the tokens of each prompt. Raises
        UsageError, OSError."""
        arrays: dict[str, Any] = {name: m.numpy() for name, m in self.sites.items()}
        tokens: dict[str, Any] = {f"tokens_{i}": np.array(p.ids) for i, p in enumerate(self.prompts)}
        with place("path", path).open("wb") as f:
            np.savez_compressed(f, timesteps=np.array(self.timesteps), **tokens, **arrays)


def _indices(name: str, indices: Iterable[int] | None, n: int) -> list[int] | None:
    if indices is None:
        return None
    try:
        values = list(indices)
    except TypeError:
        raise UsageError(f"{name} are several whole numbers, not {brief(indices)}") from None
    return [whole(f"each of {name}", i, 0, n - 1) for i in values]


class Collector:
    """Gathers the maps of a run, step by step."""

    def __init__(self, unet: Network, record: Record) -> None:
        self.unet, self.record = unet, record
        self.timesteps: list[float] = []
        self.steps: list[dict[str, Tensor]] = []

    def add(self, step: Step) -> None:
        mean, maps_by_site, rows = self.record.mean, {}, step.batch.shown(step.x.device)
        for site, qk in step.seen.items():
            layer: Any = self.unet.get_submodule(site)
            before, after = site_maps(layer, qk, step.edit, rows, mean)
            maps = torch.cat([after, before[-step.batch.targets:]]) if self.record.before else after
            if mean:
                maps = maps.mean(1, keepdim=True)
            maps_by_site[site] = maps.to("cpu", torch.float32 if mean else torch.float16)
        self.timesteps.append(step.t)
        if mean and self.steps:
            maps_by_site = {site: self.steps[0][site] + maps for site, maps in maps_by_site.items()}
            self.steps.clear()
        self.steps.append(maps_by_site)

    def result(self, prompts: Sequence[Tokens], size: tuple[int, int], length: int) -> AttentionMaps:
        sites = {site: torch.stack([s[site] for s in self.steps]) for site in self.steps[0]}
        if self.record.mean:
            sites = {site: (total / len(self.timesteps)).half() for site, total in sites.items()}
        pixel_sites = frozenset(m.site for m in self.unet.layers(SelfAttention)) & sites.keys()
        return AttentionMaps(list(prompts), self.timesteps, size, length, sites, pixel_sites)

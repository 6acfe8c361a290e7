"""Sources that exist before the edit, computed once: the latest, within a budget of memory."""
from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any

import torch
from PIL import Image

from p2p.denoise import Batch, Step
from p2p.image import to_pil
from p2p.maps import AttentionMaps, Collector
from p2p.model import Model
from p2p.request.emphasis import prompt_tokens
from p2p.request.inverting import negative_read, settings_read
from p2p.request.memory import CPU, machine
from p2p.request.record import Record
from p2p.request.schedules import DISTILLED
from p2p.request.source import FOLLOW, Inversion, Queries
from p2p.sources.methods import invert
from p2p.sources.trace import size, trace
from p2p.web.asked import Asked

MAPS = Record(text=None, mean=True)
BUDGET = 0.25   # of the machine's memory, for sources
MOST = 64       # sources


@dataclass(frozen=True)
class Source:
    """What edits start from: a trace or an inversion, or a prompt where the model's sampler is not traced."""

    given: Inversion | str
    picture: Image.Image | None      # None: the edit's first row shows it
    maps: AttentionMaps | None       # None: those of an edit

    @property
    def bytes(self) -> int:
        if isinstance(self.given, str):
            return 0
        given = self.given
        tensors = (given.latents, given.null_context, given.offsets, *(given.queries or {}).values())
        return sum(x.nbytes for x in tensors if x is not None)


class Stopped(Exception):
    """Nobody waits for this source any more."""


@dataclass(frozen=True, repr=False)
class _Awaited(Model):
    """A model that stops, with `Stopped`, at the next call of its network when nobody waits for it."""

    awaited: Callable[[], bool] = lambda: True

    def predict(self, *given: Any, **named: Any) -> tuple[Any, ...]:
        if not self.awaited():
            raise Stopped
        return super().predict(*given, **named)


class Sources:
    """The latest sources of all visits, by what decides their pixels; at least one is kept."""

    def __init__(self, model: Model):
        self.model, self.budget = model, BUDGET * (machine(CPU) or 2**33)
        self.kept: OrderedDict[Any, Source] = OrderedDict()
        self.lock = Lock()

    def of(self, asked: Asked, picture: Image.Image | None, awaited: Callable[[], bool] = lambda: True
           ) -> Source:
        """awaited: asked before each call of the network. Raises UsageError, NumericsError, Stopped."""
        key = self.key(asked, picture)
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
            need = size(self.model, asked.steps)
            self._make_room(need if need <= self.budget else 0)   # see `_held`
        model = _Awaited(**{f.name: getattr(self.model, f.name) for f in fields(Model)}, awaited=awaited)
        vars(model)["digests"] = self.model.digests   # of the files as they were loaded
        found = self._generated(model, asked) if picture is None else self._inverted(model, asked, picture)
        with self.lock:
            self._make_room(found.bytes)
            self.kept[key] = found
        return found

    def _make_room(self, more: int) -> None:
        """Forgets the oldest until so many bytes have room, and one more source."""
        kept = self.kept
        while kept and (len(kept) >= MOST or more + sum(s.bytes for s in kept.values()) > self.budget):
            kept.popitem(last=False)

    def key(self, asked: Asked, picture: Image.Image | None) -> tuple[Any, ...]:
        """What decides a source's pixels."""
        if picture is None:
            return asked.source, asked.steps, asked.seed, asked.guidance, asked.negative
        digest = hashlib.sha256(picture.tobytes()).digest()   # all are fitted to one size
        held = asked.guidance if asked.method == "null-text" or self.model.unet.reads_guidance else None
        seed = settings_read(asked.method, {"seed": asked.seed}).get("seed")
        negative = negative_read(self.model, asked.method, None, asked.negative)
        return asked.source, asked.steps, seed, held, negative, asked.method, digest

    def _generated(self, model: Model, asked: Asked) -> Source:
        if model.sampler in DISTILLED or model.eta:   # as below, of eta 0
            return Source(asked.source, None, None)
        traced = trace(model, asked.source, steps=asked.steps, seed=asked.seed,
                       guidance_scale=asked.guidance, negative_prompt=asked.negative or None,
                       **self._held(asked.steps))
        return Source(traced, _decoded(model, traced), _maps(model, traced))

    def _inverted(self, model: Model, asked: Asked, picture: Image.Image) -> Source:
        own = settings_read(asked.method, {"seed": asked.seed})
        negative = negative_read(model, asked.method, None, asked.negative)
        inversion = invert(model, picture, asked.source, method=asked.method, steps=asked.steps,
                           guidance_scale=asked.guidance, negative_prompt=negative, **own)
        if asked.method not in FOLLOW or model.sampler in DISTILLED:   # a trace is sampled by DDIM
            return Source(inversion, None, None)
        inversion = trace(model, inversion, **self._held(inversion.calls))
        return Source(inversion, _decoded(model, inversion), _maps(model, inversion))

    def _held(self, steps: int) -> dict[str, bool]:
        """Queries and keys are stored where they fit the budget; else edits run the source's row again."""
        return {"latents_only": size(self.model, steps) > self.budget}


def _decoded(model: Model, inversion: Inversion) -> Image.Image:
    return to_pil(model.decode(inversion.latents[:1].float().to(model.device)))[0]


@torch.no_grad()
def _maps(model: Model, inversion: Inversion) -> AttentionMaps | None:
    """Of the source's words, from its stored queries and keys."""
    if inversion.queries is None:
        return None
    collector, stored = Collector(model.unet, MAPS), Queries(inversion.queries, model)
    x = inversion.latents[:1].to(model.device)
    sites = set(MAPS.sites(model.unet, *x.shape[2:]))
    for i in range(len(stored)):
        seen = {site: qk for site, qk in stored[i].items() if site in sites}
        collector.add(Step(i, i, x, x, seen, None, Batch(1, 0, guided=False), None))
    return collector.result([prompt_tokens(model, inversion.prompt)], tuple(x.shape[2:]), model.length)



"""One visit of the page: what is computed for it, and what it has seen."""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from p2p.denoise import Step
from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.image import fit, to_pil
from p2p.model import Model
from p2p.request.checks import whole
from p2p.request.editing import edit_request
from p2p.request.inverting import expected, settings_read
from p2p.request.ready import Ready, generation, prepared
from p2p.request.source import Inversion
from p2p.request.start import fitting
from p2p.request.words import read_words
from p2p.run import stepped
from p2p.show.pictures import difference, heat
from p2p.web.asked import Asked
from p2p.web.asked import picture as uploaded
from p2p.web.edit_asked import dropped_words, edit_of, tokens_of
from p2p.web.sources import MAPS, Source, Sources, Stopped
from p2p.web.views import Item, View, Word

LOOK = 0.4      # share of the steps after which a preview is shown
KEPT = 24       # pictures of a visit
Sums = dict[str, Tensor]   # maps of words, over steps
MADE_ROOM = "visits that do nothing for long make room for others"


class Session:
    """Of one visit. `wanted` is the latest request: an edit for another one stops at its next step, and so
    does a source that it has not; one that was announced before the latest does not begin."""

    def __init__(self, model: Model, sources: Sources, returned: bool = False):
        self.model, self.sources = model, sources
        self.returned = returned                      # a visit of this name gave way: to be said
        self.picture: Image.Image | None = None       # uploaded, in the model's size
        self.photo = ""                               # its name
        self.forgotten = ""                           # the name of one that was put away
        self.wanted: Asked | None = None
        self.announced: deque[Asked] = deque(maxlen=KEPT)
        self.lock = Lock()                            # of these two
        self.gallery: deque[Item] = deque(maxlen=KEPT)
        self.numbers = count(1)
        self.chosen: Item | None = None               # of the gallery
        self.busy = False
        self.files: TemporaryDirectory[str] | None = None

    def upload(self, url: Any, name: str = "picture") -> View:
        """Takes a picture, to be edited in the place of a generated one. Raises UsageError."""
        picture, size, notes = fitting(self.model, uploaded(url), "crop", instead="crop it as you want it")
        self.picture, self.photo = fit(picture, size), name
        return View(self.picture, notes=(*notes, "say in the prompt what it shows, then edit that"))

    def forget(self) -> View:
        self.forgotten, self.picture, self.photo = self.photo, None, ""
        return View(None)

    def close(self) -> None:
        """Gives way to another visit."""
        self.wanted, self.chosen, self.picture, self.photo = None, None, None, ""
        self.gallery.clear()
        if self.files is not None:
            self.files.cleanup()

    def want(self, asked: Asked) -> None:
        """Announces a request, which becomes the latest. Raises UsageError."""
        settled = self._settled(asked)[0]
        with self.lock:
            self.announced.append(settled)
            self.wanted = settled

    def _begins(self, asked: Asked) -> bool:
        """Makes this the latest request, unless it was announced before the latest.  -> whether it was not"""
        with self.lock:
            if asked in self.announced:
                latest = self.announced[-1] == asked
                self.announced.remove(asked)
                if not latest:
                    return False
            self.wanted = asked
            return True

    def _settled(self, asked: Asked) -> tuple[Asked, list[str]]:
        """The request, of the picture that the visit has, without faders of words that are gone, nor an
        inversion where there is no picture.  -> it, notes on those. Raises UsageError for another picture."""
        if asked.photo not in ("", self.photo):
            why = f"{self.photo} took its place" if self.photo else \
                "it was put away" if asked.photo == self.forgotten else MADE_ROOM
            raise UsageError(f"{asked.photo} is here no more: {why}; choose it again")
        dropped = dropped_words(self.model, asked)
        notes = [f'the fader of "{word}" is left out: the prompt has no such word' for word in dropped]
        if self.picture is None and asked.method != Asked.method:
            notes.append(f"{asked.method} changes nothing: it inverts a picture of your own")
            asked = replace(asked, method=Asked.method)
        weights = tuple(w for w in asked.weights if w[0] not in dropped)
        return replace(asked, photo=self.photo, weights=weights), notes

    def run(self, asked: Asked) -> Iterator[View]:
        """The source, a preview of its edit, and the edit; ends early where another request replaces this
        one. Raises UsageError, NumericsError."""
        self.busy = True
        try:
            yield from self._run(asked)
        finally:
            self.busy = False

    def _run(self, asked: Asked) -> Iterator[View]:
        began, picture = time.perf_counter(), self.picture
        asked, said = self._settled(asked)
        edit = edit_of(self.model, asked) if asked.edits else None
        if not self._begins(asked):
            return
        if self.returned:
            said.append(f"the pictures of this visit are here no more: {MADE_ROOM}")
            self.returned = False
        plain = None if edit is None else self._checked(asked, edit, picture)
        try:
            source = self.sources.of(asked, picture, lambda: self._awaited(asked, picture))
        except Stopped:
            return
        if self.wanted != asked:   # another edit of the same source
            return
        notes = tuple(said)
        if picture is not None and asked.seed and not settings_read(asked.method, {"seed": asked.seed}):
            notes += (f"the seed changes nothing: {asked.method} draws no noise",)
        if edit is None:
            for view in self._source_alone(asked, source, picture):
                yield replace(view, notes=(*notes, *view.notes), seconds=time.perf_counter() - began)
            return
        if source.picture is not None:
            yield View(source.picture, words=self._words(asked, source), notes=notes, done=False)
        for view in self._edited(asked, source, edit, picture, plain):
            yield replace(view, notes=(*notes, *view.notes), seconds=time.perf_counter() - began)

    def _awaited(self, asked: Asked, picture: Image.Image | None) -> bool:
        """Whether the latest request is this one, or has the same source."""
        key, wanted = self.sources.key, self.wanted
        if wanted is asked and self.picture is picture:   # the usual case, at every call of the network
            return True
        return wanted is not None and key(wanted, self.picture) == key(asked, picture)

    def choose(self, place: Any) -> Item:
        """A picture of the gallery, by its place there. Raises UsageError."""
        if not self.gallery:
            raise UsageError(f"these pictures are here no more: {MADE_ROOM}")
        self.chosen = list(self.gallery)[whole("a picture of this visit", place, 0, len(self.gallery) - 1)]
        return self.chosen

    def download(self, item: Item) -> Path:
        """The file of a picture, in a folder that lasts as long as the visit."""
        return item.save(self._folder())

    def pictures(self) -> list[tuple[Path, str]]:
        """The gallery, as files of pixels alone: each is written once, not all with every move."""
        return [(item.shown(self._folder()), item.caption) for item in list(self.gallery)]

    def _folder(self) -> Path:
        self.files = self.files or TemporaryDirectory(prefix="p2p-visit-")
        folder = Path(self.files.name)
        folder.mkdir(mode=0o700, exist_ok=True)   # what cleans temporary files may have taken it
        return folder

    def announce(self, item: Item) -> None:
        """A picture is to be replayed: what is computed for the visit ends at its next step."""
        with self.lock:
            self.announced.append(item.asked)
            self.wanted = None

    def replay(self, item: Item) -> Iterator[View]:
        """Makes a picture of the visit again."""
        self.forgotten, self.picture, self.photo = self.photo, item.picture, item.asked.photo
        self.announce(item)
        return self.run(item.asked)

    def _source_alone(self, asked: Asked, source: Source, picture: Image.Image | None) -> Iterator[View]:
        idle = [name for name in ("mask", "blend", "layers") if getattr(asked, name)]
        idle += [] if asked.usual else ["windows"]
        if picture is not None:
            idle += ["negative prompt"] if asked.negative else []
            idle += ["guidance"] if asked.guidance not in (None, self.model.guidance_scale) else []
        notes = [f"{', '.join(idle)}: of an edit; change a word or a fader"] if idle else []
        sums: Sums | None = None
        if picture is None:
            ready = generation(self.model, [asked.source], **self._sampling(asked))
            notes += ready.notes
            image = source.picture
            if image is None:   # of models that are not traced
                sums, last = {}, None
                for step in self._steps(asked, ready, sums, 0):
                    last = step
                if last is None or last.index + 1 < ready.start.schedule.steps:
                    return
                image = self._decoded(last.x)
            notes += self._keep(image, asked.source, ready.settings, asked, None)
        else:
            image = picture
        words = self._words(asked, source, sums)
        notes += [] if any(word.map for word in words) else ["the words' maps come with an edit"]
        yield View(image, None, words, tuple(dict.fromkeys(notes)))

    def _edited(self, asked: Asked, source: Source, edit: Edit, picture: Image.Image | None,
                plain: dict[str, Any] | None) -> Iterator[View]:
        sampling = self._guidance(asked) if isinstance(source.given, Inversion) else self._sampling(asked)
        ready = prepared(self.model, source.given, [edit], record=MAPS, **sampling)
        total, sums, step = ready.start.schedule.steps, Sums(), None
        for step in self._steps(asked, ready, sums, 1):
            if step.index == int(LOOK * total):
                before = source.picture or picture or self._decoded(step.x_0[:1])
                soon = self._decoded(_masked(step, source))
                yield View(before, soon, self._words(asked, source), done=False)
        if step is None or step.index + 1 < total:
            return
        image = self._decoded(step.x[-1:])
        before = self._decoded(step.x[:1]) if source.picture is None else source.picture
        caption = difference(asked.source, edit.prompt, edit.equalizer) or edit.prompt
        settings = ready.settings if plain is None else plain
        notes = [*ready.notes, *self._keep(image, caption, settings, asked, picture)]
        yield View(before, image, self._words(asked, source, sums), tuple(dict.fromkeys(notes)))

    def _steps(self, asked: Asked, ready: Ready, sums: Sums, row: int) -> Iterator[Step]:
        """The steps of a run, whose maps of a row's words are added to `sums`, until there is another
        request."""
        for step in stepped(self.model, ready, MAPS):
            for word, values in step.maps.each_word(row):
                sums[word] = sums[word] + values if word in sums else values
            if self.wanted != asked:
                return
            yield step

    def _decoded(self, x: Tensor) -> Image.Image:
        return to_pil(self.model.decode(x))[0]

    def _sampling(self, asked: Asked) -> dict[str, Any]:
        return dict(steps=asked.steps, seed=asked.seed) | self._guidance(asked)

    def _guidance(self, asked: Asked) -> dict[str, Any]:
        return dict(guidance_scale=asked.guidance, negative_prompt=asked.negative or None)

    def _checked(self, asked: Asked, edit: Edit, picture: Image.Image | None) -> dict[str, Any] | None:
        """Raises UsageError for an edit that is refused, before its source takes its time.  -> the settings
        of the same edit from its prompt alone, which `p2p edit --from` runs again; None of a picture's."""
        if picture is None:
            return prepared(self.model, asked.source, [edit], **self._sampling(asked)).settings
        planned = expected(self.model, asked.source, method=asked.method, steps=asked.steps)
        edit_request(self.model, planned, [edit], **self._guidance(asked))
        return None

    def _keep(self, image: Image.Image, caption: str, settings: dict[str, Any], asked: Asked,
              picture: Image.Image | None) -> list[str]:
        """A note where an older picture makes room."""
        if any(item.asked == asked and item.picture is picture for item in self.gallery):
            return []
        if full := len(self.gallery) == KEPT:
            self.gallery[0].put_away(self._folder())
        self.gallery.append(Item(next(self.numbers), image, caption, settings, asked, picture))
        return [f"this visit keeps {KEPT} pictures, and its oldest made room: download what should last"
                ] if full else []

    def _words(self, asked: Asked, source: Source,
               sums: Mapping[str, Tensor] | None = None) -> tuple[Word, ...]:
        """The faders: every word of the edited prompt, its map from the edit, or before that the source's."""
        own, prompt = tokens_of(self.model, asked)
        if sums is None and source.maps is not None and prompt.ids == own.ids:
            sums = dict(source.maps.each_word())
        weights, maps = dict(asked.weights), sums or {}
        return tuple(Word(name, weights.get(name, 1.0), _map(maps[name]) if name in maps else None)
                     for name in read_words(prompt, self.model.length))


def _masked(step: Step, source: Source) -> Tensor:
    """The edited picture as a step predicts it, inside of its mask; outside is the source's."""
    predicted = step.x_0[-1:]
    if step.mask is None:
        return predicted
    known = isinstance(source.given, Inversion)
    outside = source.given.latents[:1].to(predicted) if known else step.x_0[:1]
    return torch.where(step.mask[-1:], predicted, outside)


def _map(values: Tensor) -> Image.Image:
    return heat(values, (8 * values.shape[1], 8 * values.shape[0]))

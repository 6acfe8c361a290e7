"""`generate`, `edit` and `upscale`: from prompts to pictures, with a record of all that is needed to run
them again."""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from p2p.denoise import Step, denoise
from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.image import data_url, from_pil, to_pil
from p2p.maps import AttentionMaps, Collector
from p2p.model import Model
from p2p.models.conditioning import Conditioning
from p2p.request.checks import flag, place, whole
from p2p.request.editor import Editor
from p2p.request.emphasis import condition, prompt_tokens
from p2p.request.loading import find_model
from p2p.request.masks import fixed
from p2p.request.ready import Ready, generation, prepared
from p2p.request.record import Record
from p2p.request.source import Inversion
from p2p.request.start import Low, guidance
from p2p.show import pictures
from p2p.weights.untrusted import brief


@dataclass(repr=False)
class Result:
    """The output of a run; in an edit the source comes first."""

    images: list[Image.Image]
    latents: Tensor                  # (B, C, H, W), CPU, float32; float64 where the latents given were
    prompts: list[str]
    settings: dict[str, Any]         # all that is needed to run it again, unless x_T was given
    notes: list[str] = field(default_factory=list)   # what was decided, or looks like a mistake
    maps: AttentionMaps | None = None                # what `record` asked for
    # (N, 1, H, W) bool, CPU: where local edits could act at the last step, at their edges' feather in part
    masks: Tensor | None = None
    rows: int = 0                                    # that the UNet computed
    timings: dict[str, float] = field(default_factory=dict)   # seconds spent on text, steps and pictures
    edits: list[Edit] = field(default_factory=list)  # one a target, with the modes that were chosen

    def __repr__(self) -> str:
        b, *shape = self.latents.shape
        size = f"{self.images[0].width} x {self.images[0].height}" if self.images else "no pictures"
        what = self.settings.get("command")
        return f"<Result of {what}: {b} x {size}, {self.prompts}, latents {tuple(shape)}>"

    def grid(self, side: int = 256) -> Image.Image:
        """The pictures in a row, `side` pixels high, captioned by their prompts, and by weights and other
        settings that tell edits apart; words that the source's lacks are in colour."""
        return pictures.grid(self.images, self.captions(), whole("side", side, 8, 4096))

    def captions(self) -> list[str]:
        """One a picture, see `grid`; with a list of seeds, its prompt and its seed."""
        seeds = self.settings.get("seed")
        if isinstance(seeds, list):
            return [f"{prompt} (seed {seed})" for prompt, seed in zip(self.prompts, seeds)]
        return pictures.captions([self._source, *self.prompts[1:]], self.edits)

    def names(self) -> list[str]:
        """Of the pictures' files: source, edit; of several edits what each does, "edit-1-cat-to-dog"; 1, 2,
        ... of `generate`."""
        if self.settings.get("command") != "edit":
            return [str(k) for k in range(1, len(self.images) + 1)]
        return pictures.names(len(self.images), [pictures.difference(self._source, e.prompt, e.equalizer)
                                                 for e in self.edits])

    @property
    def _source(self) -> str:
        """The source's own prompt: an editor may tell it another one, which `prompts` has."""
        return self.settings.get("source", self.prompts[0])

    def _repr_html_(self) -> str:
        """The grid, in a notebook."""
        return f'<img alt="{escape(" | ".join(self.prompts))}" src="{data_url(self.grid())}">'

    def save(self, folder: str | Path) -> list[Path]:
        """Writes the pictures (see `names`), grid.png and settings.json into a folder.  -> their paths.
        Raises UsageError where one exists: nothing is overwritten."""
        folder = place("folder", folder)
        found = {folder / f"{stem}.png": image
                 for stem, image in zip([*self.names(), "grid"], [*self.images, self.grid()])}
        files = [*found, folder / "settings.json"]
        if there := [file.name for file in files if file.exists()]:
            raise UsageError(f"{folder}: holds {', '.join(there)} already; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for file, image in found.items():
            pictures.save_png(file, image, self.settings)
        files[-1].write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
        return files


def edit(model: Model | str | Path, source: str | Inversion | Path,
         targets: str | Edit | Sequence[str | Edit], *, editor: Editor | str | None = None,
         record: Record = Record(), progress: bool = False,
         on_step: Callable[[Step], object] | None = None, **settings: Any) -> Result:
    """Edits the picture of `source` into one per target, all in one batch (Algorithm 1 of the paper).

    model: or what `load` loads it from, for this call alone. source: a prompt, or a real picture as `invert`
    gives it, or the `Path` where it is saved (then steps, eta and size are those of the inversion). targets:
    `Edit`s, or prompts. settings: the fields of `Sampling`, and for targets that are plain prompts those of
    `Edit`. editor: another way to inject than Prompt-to-Prompt's, which takes no windows or weights: an
    object, or its name (see `p2p.editors`). record: which attention maps to keep in `maps`. on_step: a
    function that is called with every step, see `steps`: a preview, say. Raises UsageError for words,
    windows or sizes that do not fit, NumericsError for values that are not finite, CheckpointError where the
    model is to be loaded.
    """
    model = find_model(model)
    return run(model, prepared(model, source, targets, editor=editor, record=record, **settings), record,
               progress, on_step)


def generate(model: Model | str | Path, prompts: str | Sequence[str], *, record: Record = Record(),
             progress: bool = False, **settings: Any) -> Result:
    """Generates one picture per prompt. settings: the fields of `Sampling`, but for proximal; seed: one for
    all prompts, or a list of one for each. record: as in `edit`. Raises as `edit` does."""
    model = find_model(model)
    return run(model, generation(model, prompts, record, **settings), record, progress)


def steps(model: Model | str | Path, source: str | Inversion | Path,
          targets: str | Edit | Sequence[str | Edit], *, editor: Editor | str | None = None,
          record: Record = Record(), **settings: Any) -> Iterator[Step]:
    """The steps of an edit, one by one; the arguments are those of `edit`, whose result is the last one's x,
    decoded. Between two steps `step.x` may be changed, or replaced by another tensor of its shape (not the
    row of a source whose latents are stored). record: the step's own maps come in `step.maps`. Raises as
    `edit` does, NumericsError at its step."""
    model = find_model(model)
    ready = prepared(model, source, targets, editor=editor, record=record, **settings)
    return stepped(model, ready, record)


def stepped(model: Model, ready: Ready, record: Record = Record()) -> Iterator[Step]:
    """The steps of a run, each with its own maps that `record` selects. Raises NumericsError."""
    for step in _loop(model, ready, record, _conditioning(model, ready)):
        collector = Collector(model.unet, record)
        collector.add(step)
        step.maps = _maps(model, ready, collector) if step.seen else None
        yield step


def _conditioning(model: Model, ready: Ready) -> Conditioning:
    return _completed(model, ready, condition(model, ready.prompts, *ready.start.size))


def _completed(model: Model, ready: Ready, conditioning: Conditioning) -> Conditioning:
    """With the guidance scale of a network that reads it, and the pictures that a super-resolution stage
    enlarges."""
    start, conditioning = ready.start, model.unet.with_guidance(conditioning, ready.guidance_scale)
    if start.low is None:
        return conditioning
    return conditioning._replace(low=start.low.to(model.dtype), level=start.level)


def _loop(model: Model, ready: Ready, record: Record, conditioning: Conditioning) -> Iterator[Step]:
    start, empty = ready.start, ready.empty
    if isinstance(empty, Conditioning):   # one for each step are of null-text, on models without such inputs
        empty = _completed(model, ready, empty)
    return denoise(model, start.x, conditioning, empty, start.schedule, ready.step, ready.batch,
                   guidance_scale=ready.guidance_scale, guide=ready.guide, plan=ready.plan,
                   watch=record.sites(model.unet, *start.x.shape[2:]), blend=ready.blend, known=ready.known)


def _maps(model: Model, ready: Ready, collector: Collector) -> AttentionMaps:
    tokens = [prompt_tokens(model, p) for p in ready.prompts]
    height, width = ready.start.x.shape[2:]
    return collector.result(tokens, (height, width), model.length)


def run(model: Model, ready: Ready, record: Record = Record(), progress: bool = False,
        on_step: Callable[[Step], object] | None = None) -> Result:
    """Samples, and collects the maps that `record` selects. on_step: called with every step. Raises
    UsageError, NumericsError."""
    flag("progress", progress)
    if on_step is not None and not callable(on_step):
        raise UsageError(f"on_step is a function that takes a step, not {brief(on_step)}")
    started = time.perf_counter()
    conditioning = _conditioning(model, ready)
    encoded = time.perf_counter()
    x, mask, rows, collector = ready.start.x, None, 0, Collector(model.unet, record)
    bar = tqdm(_loop(model, ready, record, conditioning), total=ready.start.schedule.steps,
               disable=not progress, leave=False, unit="step")
    for step in bar:
        collector.add(step)
        x, mask, rows = step.x, step.mask, rows + step.batch.rows
        if on_step is not None:
            before = x.clone()
            on_step(step)
            if not torch.equal(x, before) or getattr(step, "x", None) is not x:
                ready.settings["changed_between_steps"] = True   # cannot be replayed
            x = step.changed(x)
    latents, sampled = x.cpu(), time.perf_counter()
    images = to_pil(model.decode(x))
    timings = {"text": encoded - started, "steps": sampled - encoded,
               "pictures": time.perf_counter() - sampled}
    maps = _maps(model, ready, collector) if record.anything else None
    return Result(images, latents, ready.prompts, ready.settings, list(dict.fromkeys(ready.notes)), maps,
                  None if mask is None else mask.cpu(), rows, timings, list(ready.edits))


def upscale(model: Model | str | Path, small: Result, *, steps: int | None = None,
            guidance_scale: float | None = None, eta: float | None = None, noise_level: int | None = None,
            edited: bool = False, progress: bool = False) -> Result:
    """Enlarges the pictures of a run four times, by a super-resolution stage conditioned on the same prompts.

    The rows of an edit share one noise, so what source and targets have in common stays common; pictures of
    a list of seeds have one each (of a run without a recorded seed, as of an inversion, it is 0). The
    stage's attention is not edited, as in the paper; edited: it is injected as the run's was. noise_level:
    timestep of the noise put on the small pictures, None for the model's own (250 of 1000 for IF). Where the
    stage is guided, it is led away from the run's negative prompt too (the bundled one reads no text). The
    settings are the run's, with those of this stage under "upscale", of several a list. Raises UsageError,
    NumericsError, and CheckpointError where the model is to be loaded.
    """
    model = find_model(model)
    if not isinstance(small, Result):
        raise UsageError(f"what is enlarged is a Result, as edit and generate give it, not {brief(small)}")
    low = torch.cat([from_pil(i) for i in small.images])
    noise_level = whole("noise_level", model.noise_level if noise_level is None else noise_level, 0,
                        len(model.alphas_cumprod) - 1)
    seed, negative = small.settings["seed"], small.settings.get("negative_prompt")
    common: dict[str, Any] = dict(steps=model.steps if steps is None else steps,
                                  guidance_scale=guidance_scale, eta=eta, low=Low(low, noise_level),
                                  progress=progress)
    if model.guided(guidance(model, guidance_scale)):
        common["negative_prompt"] = negative
    if not flag("edited", edited):
        large = generate(model, small.prompts, seed=0 if seed is None else seed, **common)
    elif small.settings["command"] != "edit":
        raise UsageError("only an edit can be injected into the super-resolution stage")
    elif small.settings["editor"] is not None:
        raise UsageError("edited: the run was injected by another editor, which is made for its own model; "
                         "leave it out")
    else:
        large = edit(model, small.prompts[0], _with_masks_as_fitted(small),
                     seed=0 if seed is None else seed, **common)
    names = ("model", "places", *model.identity(), "steps", "guidance_scale", "eta")
    stage = {name: large.settings[name] for name in names}
    large.edits = small.edits
    stage |= {"noise_level": noise_level, "edited": edited}
    before = small.settings.get("upscale", [])
    stages = [*(before if isinstance(before, list) else [before]), stage]
    large.settings = small.settings | {"upscale": stages if before else stage}
    large.notes, large.rows = [*small.notes, *large.notes], small.rows + large.rows
    large.timings = {k: small.timings[k] + v for k, v in large.timings.items()}
    return large


def _with_masks_as_fitted(small: Result) -> list[Edit]:
    """A run's edits, whose masks are fitted as its picture was: a stage would crop them."""
    fit = (small.settings.get("inversion") or {}).get("fit", "crop")
    size = (small.latents.shape[2], small.latents.shape[3])
    return [e if e.local_blend is None or e.local_blend.mask is None else
            replace(e, local_blend=replace(e.local_blend, mask=fixed(e.local_blend.mask, size, fit)[0]))
            for e in small.edits]

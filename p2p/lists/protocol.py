"""The methods of PIE-Bench's tables as data: what the published scripts do with each picture, and the
corrected methods.

Published rows are named, and every field is set, as in PnPInversion (Ju et al. 2023):
`run_editing_p2p.py`, `run_editing_edit_friendly_p2p.py`, `run_editing_masactrl.py`, `run_editing_pnp.py`
and the code under `models/` that they call, faults included. Corrected rows are named by our inversion and
editor ("direct", "ddim, masactrl").

Differences from the scripts: pictures are rounded to 8 bits (there truncated), everything runs in the model's
precision (there autoencoders in half precision for edit-friendly, networks too for Plug-and-Play), and noise
is drawn on the CPU. Pictures are fitted as `load_512` fits them in all rows; those of PIE-Bench are 512
pixels a side, which no script's own fit changes. Timesteps start at 1: the scripts' schedulers say 0, but
StableDiffusionPipeline of their diffusers (0.10, 0.15) sets 1.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image

from p2p import align
from p2p.editors import EDITORS
from p2p.edits import Window
from p2p.errors import UsageError
from p2p.image import to_base64
from p2p.model import Model
from p2p.request.emphasis import as_text
from p2p.request.inverting import settings_read
from p2p.request.source import METHODS, Inversion
from p2p.sources.trace import trace
from p2p.weights.untrusted import brief


class Item(NamedTuple):
    """A picture of PIE-Bench and its edit."""

    key: str
    picture: Path
    source: str              # prompts without the brackets that mark their words
    target: str
    blended: str             # blended_word: words of both prompts that the edit's mask is made of
    runs: list[int]          # mask of edited pixels: start, length, ... in the flattened picture
    kind: str = ""           # editing_type_id
    path: str = ""           # of the picture, in annotation_images/


@dataclass(frozen=True)
class Method:
    """One row. Settings that a method does not read (windows, with an editor) are left out of its jobs."""

    inversion: str                                     # as `invert` names it
    editor: str | Mapping[str, Any] | None = None      # as `find_editor` takes it; None: Prompt-to-Prompt
    steps: int = 50
    seed: int = 1234                                   # of inversions that draw noise
    guidance_scale: float | None = 7.5                 # None: the model's own
    inversion_guidance: float | None = None
    skip: float | None = None                          # share of the steps
    proximal: tuple[str, float] | None = None
    negative_prompt: str | None = None
    source_conditioning: Literal["prompt", "empty"] = "prompt"   # while it is inverted and sampled
    path: Literal["inverted", "resampled"] = "inverted"   # whose latents the source follows, see `resampled`
    # by word count: replace where both prompts have the same number of words
    mode: Literal["refine", "by word count"] | None = "refine"
    cross: Window = 0.4
    self_: Window = 0.6
    self_max_tokens: int = 32 * 32
    windows_over: Literal["run", "schedule"] = "run"
    aligner: Literal["exact", "official"] = "official"
    # how blended_word is read, see `published_blend`, `blend`
    blend: Literal["first two", "phrases"] | None = "first two"
    keep: Literal["stored", "sampled"] = "sampled"     # what is outside of a blend's mask
    fit: Literal["crop", "square"] = "square"   # how the picture is brought to the model's size, see `square`
    # results have their pictures' names: for a .jpg, a JPEG of Pillow's quality (75) is judged
    jpeg: bool = True


_MASACTRL = Method("ddim", "masactrl", source_conditioning="empty")
_PNP = Method("ddim", {"name": "plug-and-play", "source_prompt": ""},
              negative_prompt="ugly, blurry, black, low res, unrealistic", path="resampled")
_SCALES = {"0": 0.0, "1": 1.0, "25": 2.5, "5": 5.0, "75": 7.5}

PUBLISHED: dict[str, Method] = {
    "ddim+p2p": Method("ddim"),
    "null-text-inversion+p2p": Method("null-text"),
    "negative-prompt-inversion+p2p": Method("negative-prompt"),
    "directinversion+p2p": Method("direct"),
    # use_inversion_guidance is set, but reaches no function: the published rows have no such guidance
    "null-text-inversion+proximal-guidance": Method("null-text", proximal=("published", 0.75)),
    "negative-prompt-inversion+proximal-guidance": Method("negative-prompt", proximal=("published", 0.75)),
    "edit-friendly-inversion+p2p": Method("edit-friendly", skip=0.24, mode="by word count", blend=None,
                                          self_max_tokens=16 * 16, windows_over="schedule"),
    "ddim+masactrl": _MASACTRL,
    "directinversion+masactrl": replace(_MASACTRL, inversion="direct"),
    "ddim+pnp": _PNP,
    "directinversion+pnp": replace(_PNP, inversion="direct", path="inverted"),
    **{f"directinversion+p2p_guidance_{a}_{b}": Method("direct", inversion_guidance=_SCALES[a],
                                                       guidance_scale=_SCALES[b])
       for a in _SCALES for b in _SCALES if b != "0"},
    **{f"ablation_directinversion_step_{n}+p2p": Method("direct", steps=n) for n in (20, 100, 500)},
}
CORRECTED: dict[str, Method] = {
    name if editor is None else f"{name}, {editor}": Method(
        name, editor, seed=0, guidance_scale=None, mode=None, aligner="exact", blend="phrases", keep="stored",
        fit="crop", jpeg=False)
    for name in METHODS for editor in (None, *EDITORS)}
# names that stand for several: the tables' main rows, and the corrected rows of the same
# inversions and editors
GROUPS = {
    "published": [name for name in PUBLISHED if "_" not in name],
    "corrected": list(dict.fromkeys(
        m.inversion if m.editor is None else f"{m.inversion}, "
        f"{m.editor if isinstance(m.editor, str) else m.editor['name']}"
        for name, m in PUBLISHED.items() if "_" not in name))}
LACKING = {   # other rows of the published tables, by a part of their names
    "stylediffusion": "StyleDiffusion's network, which is trained for each picture",
    "edict": "EDICT's coupled sampler",
    "pix2pix-zero": "pix2pix-zero's editor",
    "instruct-pix2pix": "a network trained to follow instructions",
    "instruct-diffusion": "a network trained to follow instructions",
    "blended-latent-diffusion": "an inpainting method that is given the mask",
    "ablation_null-latent-inversion": "null-text's optimisation ending in offsets of the latents",
    "ablation_null-text-inversion_single_branch": "null-text embeddings for the source's row alone",
    "ablation_directinversion_04": "a share of the offsets",
    "ablation_directinversion_08": "a share of the offsets",
    "ablation_directinversion_interval": "offsets at some of the steps",
    "ablation_directinversion_add": "offsets added to the target",
}


def recorded(method: Method) -> dict[str, Any]:
    """A row's fields as settings.json holds them: with the keys and values of its first version, so that rows
    made with any version can be continued."""
    fields = asdict(method)
    conditioning = fields.pop("source_conditioning")
    return fields | {"told": "nothing" if conditioning == "empty" else conditioning}


def find(name: str) -> Method:
    """A row by its name. Raises UsageError, which says what a published method that is not offered lacks."""
    if not isinstance(name, str):
        raise UsageError(f"{brief(name)}: a row's name is a text")
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name in CORRECTED:
        return CORRECTED[name]
    if why := next((why for part, why in LACKING.items() if part in name), None):
        raise UsageError(f"{name}: not offered, for want of {why}; compare its pictures (--pictures "
                         f"{name}=FOLDER) or its figures (--compare published)")
    row, _, gpu = name.rpartition("_")
    if gpu in ("a800", "3090") and row in PUBLISHED:
        raise UsageError(f"{name}: {row} as it ran on one kind of GPU; ask for {row}, whose published "
                         "figures are the means of both runs")
    if other := re.fullmatch(r"ablation_directinversion_step_(\d+)\+p2p", name):
        raise UsageError(f"{name}: published with 20, 100 and 500 steps; for others ask for "
                         f"directinversion+p2p with --steps {other[1]}")
    raise UsageError(f"{name}: no method; published: {', '.join(n for n in PUBLISHED if '_' not in n)}, "
                     "directinversion+p2p_guidance_A_B, ablation_directinversion_step_N+p2p; corrected: "
                     f"{', '.join(METHODS)}")


def job(method: Method, item: Item, model: Model) -> dict[str, Any]:
    """An item's job, as a line of a list. Raises UsageError for items that the method cannot be run on."""
    entry: dict[str, Any] = {
        "source": as_text(model, item.source) if method.source_conditioning == "prompt" else "",
        "targets": [as_text(model, item.target)],   # brackets are text there
        "image": str(item.picture.absolute()), "method": method.inversion, "steps": method.steps,
        "seed": method.seed, "guidance_scale": method.guidance_scale,
        "inversion_guidance": method.inversion_guidance,
        "skip": None if method.skip is None else int(method.skip * method.steps), "fit": method.fit,
        "proximal": method.proximal and list(method.proximal), "negative_prompt": method.negative_prompt,
        "editor": method.editor}
    if method.path != "inverted":
        entry["path"] = method.path
    if method.editor is None:
        entry |= {"mode": method.mode, "cross_replace_steps": method.cross,
                  "self_replace_steps": method.self_, "self_max_tokens": method.self_max_tokens,
                  "windows_over": method.windows_over, "aligner": method.aligner}
        if method.mode == "by word count":
            alike = len(item.source.split(" ")) == len(item.target.split(" "))
            entry["mode"] = "replace" if alike else "refine"
        if method.blend == "first two":
            entry |= published_blend(item, model, method.keep)
        elif method.blend == "phrases":
            entry |= blend(item, model, method.keep)
    return settings_read(method.inversion, {k: v for k, v in entry.items() if v is not None})


def published_blend(item: Item, model: Model, keep: str) -> dict[str, Any]:
    """The blend and weights of the published scripts. Raises UsageError where these fail.

    They read the first two of the blended words only, and compare them with what stands between spaces: "cat"
    is not found in "a cat, asleep". A word that one prompt lacks is ignored; if both lack theirs the mask is
    empty, and the target becomes the source. The second word has weight 2, where it is found.
    """
    if not item.blended:
        return {}
    two = item.blended.split(" ")[:2]
    if len(two) < 2:
        raise UsageError(f'blended_word "{item.blended}": one word, at which the published scripts stop')
    source, target = (_equal(model, prompt, word) for prompt, word in zip((item.source, item.target), two))
    words = {"words": [source, target]} if source or target else {"mask": to_base64(Image.new("L", (1, 1)))}
    weights = {"equalizer": dict.fromkeys(target, 2.0)} if target else {}
    return {"local_blend": {**words, "keep": keep}} | weights


def _equal(model: Model, prompt: str, word: str) -> list[str]:
    """The occurrences of a word between the spaces of a prompt, under names for `word_tokens`."""
    named = align.named_words(model.tokens(prompt))
    return [name for text, (name, _) in zip(prompt.split(), named) if text == word]


def blend(item: Item, model: Model, keep: str) -> dict[str, Any]:
    """The corrected blend and weights: the mask of the blended words, the target's with weight 2. Raises
    UsageError unless they are a phrase of the source prompt and one of the target prompt."""
    words = item.blended.split()
    if not words:
        return {}
    for n in range(1, len(words)):
        ours, theirs = " ".join(words[:n]), " ".join(words[n:])
        if _holds(model, item.source, ours) and _holds(model, item.target, theirs):
            return {"local_blend": {"words": [ours, theirs], "keep": keep}, "equalizer": {theirs: 2.0}}
    raise UsageError(f'blended_word "{item.blended}": not words of "{item.source}" and then words of '
                     f'"{item.target}"')


def _holds(model: Model, prompt: str, phrase: str) -> bool:
    try:
        return bool(align.word_tokens(model.tokens(prompt), phrase, model.length))
    except UsageError:
        return False


def square(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """PnPInversion's `load_512`, for any (height, width): crops the largest centred rectangle of that shape,
    and resizes it (bicubic)."""
    image = image.convert("RGB")
    scale = min(image.width / size[1], image.height / size[0])
    w, h = round(scale * size[1]), round(scale * size[0])
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize(size[::-1], Image.BICUBIC)


def resampled(model: Model, inversion: Inversion) -> Inversion:
    """The source's latents as in the published ddim+pnp: sampled again from the inverted noise, without
    guidance. As its list of latents lacks the first, each step (and the target's start) uses those of the
    next one."""
    again = trace(model, inversion.prompt, x_T=inversion.latents[-1:], steps=inversion.steps,
                  timestep_spacing=inversion.timestep_spacing, timesteps=inversion.timesteps,
                  guidance_scale=1.0, latents_only=True)
    return replace(again, latents=torch.cat([again.latents[:1], again.latents[:-1]]))

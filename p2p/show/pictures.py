"""Pictures side by side, maps in colours, and settings kept inside PNG files."""
from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from p2p.errors import UsageError
from p2p.image import TEXT, open_picture, shown
from p2p.weights.aside import replacing
from p2p.weights.untrusted import parse_object

CHUNK = "prompt_to_prompt"   # PNG text chunk that holds all settings of a run, as JSON
COMPARED = 200               # words of two prompts that captions compare, in time that grows with their cube
_INK, ACCENT, _PAPER = (40, 40, 46), (204, 62, 22), (255, 255, 255)


def names(pictures: int, what: Sequence[str] = ()) -> list[str]:
    """Names for the pictures of an edit, the source first. what: each target's `difference`."""
    if pictures == 2:
        return ["source", "edit"]
    tails = [f"-{tail}" if (tail := slug(text, 40)) else "" for text in what] or [""] * (pictures - 1)
    return ["source", *(f"edit-{k}{tail}" for k, tail in enumerate(tails, 1))]


def slug(text: str, longest: int = 48) -> str:
    """A text as a part of a file's name: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("×", "x")).strip("-")[:longest].strip("-")


def difference(source: str, prompt: str, equalizer: Mapping[str, float] | None = None) -> str:
    """What an edit does to a prompt: "cat to dog", "with snowy", "without red", "foggy × 2"."""
    a, b, parts = source.split()[:COMPARED], prompt.split()[:COMPARED], []
    for kind, i, k, j, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = " ".join(a[i:k]), " ".join(b[j:m])
        parts += {"equal": [], "replace": [f"{old} to {new}"], "insert": [f"with {new}"],
                  "delete": [f"without {old}"]}[kind]
    return ", ".join([*parts, *_weights(equalizer)])


def _weights(equalizer: Mapping[str, float] | None) -> list[str]:
    return [f"{word} × {_brief(weight)}" for word, weight in (equalizer or {}).items()]


def captions(prompts: Sequence[str], edits: Sequence[Any]) -> list[str]:
    """The prompts of a run, the source's first, each with what tells its `Edit` from others: its weights, and
    of edits of one prompt the settings that it has and in which they differ."""
    out = list(prompts)
    for k, edit in enumerate(edits, 1):
        twins = [e for e in edits if e.prompt == edit.prompt]
        apart = _apart(edit, twins, ("prompt", "equalizer", "local_blend"))
        blend = _apart(edit.local_blend, [e.local_blend for e in twins], ("mask",))
        mask, *others = (e.local_blend and e.local_blend.mask for e in (edit, *twins))
        if mask is not None and any(other is not mask for other in others):
            blend.append("mask")
        said = [*_weights(edit.equalizer), *apart, *(f"blend {setting}" for setting in blend)]
        out[k] += f" ({', '.join(said)})" if said else ""
    return out


def _apart(own: Any, all_: Sequence[Any], but: Sequence[str]) -> list[str]:
    """The settings of a dataclass that not all have alike, as a caption has them. None has the defaults."""
    of = [] if own is None else [(f, getattr(own, f.name)) for f in fields(own) if f.name not in but]
    return [f"{f.name.removesuffix('_replace_steps')} {_brief(value)}" for f, value in of
            if value is not None and any(getattr(e, f.name, f.default) != value for e in all_)]


def _brief(value: Any) -> str:
    """A setting in a caption: 0.3:0.8 is a window, dog=0.4 that of a word."""
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_brief(v)}" if k != "default_" else _brief(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ":".join(map(_brief, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def grid(pictures: Sequence[Image.Image], captions: Sequence[str], side: int = 256) -> Image.Image:
    """Pictures in a row, captions below; words that the first caption does not have are set in colour."""
    font = ImageFont.load_default(15)
    gap, line = 12, 20
    pictures = [_at_height(p, side) for p in pictures]
    captions = [_drawable(c, font) for c in captions]
    lines = [_wrap(marked(captions[0], c), font, p.width) for c, p in zip(captions, pictures)]
    height = side + 3 * gap + line * max(map(len, lines))
    sheet = Image.new("RGB", (sum(p.width + gap for p in pictures) + gap, height), _PAPER)
    draw, x = ImageDraw.Draw(sheet), gap
    for picture, rows in zip(pictures, lines):
        sheet.paste(picture, (x, gap))
        for k, row in enumerate(rows):
            left = float(x)
            for word, new in row:
                draw.text((left, gap + side + gap // 2 + k * line), word, fill=ACCENT if new else _INK,
                          font=font)
                left += font.getlength(word + " ")
        x += picture.width + gap
    return sheet


def table(pictures: Sequence[Sequence[Image.Image]], columns: Sequence[str], rows: Sequence[str] = ("",),
          side: int = 160, corner: str = "") -> Image.Image:
    """Rows of pictures under column labels, row labels at the left; `corner` names the axes."""
    font = ImageFont.load_default(14)
    gap, line = 6, 18
    width = max(round(side * p.width / p.height) for row in pictures for p in row)
    columns, rows = ([_drawable(text, font) for text in each] for each in (columns, rows))
    corner = _drawable(corner, font)
    heads = [_wrap([(w, False) for w in c.split()], font, width) for c in columns]
    top = gap + line * max(1, *map(len, heads))
    labels = [*rows, corner]
    left = gap + round(max(font.getlength(label) for label in labels)) + gap * any(labels)
    sheet = Image.new("RGB", (left + (width + gap) * len(columns), top + (side + gap) * len(pictures)),
                      _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), corner, fill=ACCENT, font=font)
    for j, head in enumerate(heads):
        for k, words in enumerate(head):
            text = " ".join(w for w, _ in words)
            draw.text((left + j * (width + gap) + (width - font.getlength(text)) / 2, gap + k * line), text,
                      fill=_INK, font=font)
    for i, (label, row) in enumerate(zip(rows, pictures)):
        y = top + gap // 2 + i * (side + gap)
        draw.text((gap, y + side / 2 - line / 2), label, fill=_INK, font=font)
        for j, picture in enumerate(row):
            sheet.paste(_at_height(picture, side), (left + j * (width + gap), y))
    return sheet


_ALIKE = str.maketrans("×⁄’‘“”–—", """x/''""--""")


def _drawable(text: str, font: Any) -> str:
    """A text in what the font has: letters without accents that it lacks, other characters by their names,
    "a [cat face] on grass", or numbers."""
    box = bytes(font.getmask("\U0010ffff"))

    def has(c: str) -> bool:
        return c.isascii() or bytes(font.getmask(c)) != box

    def drawn(c: str) -> str:
        if has(c):
            return c
        if plain := "".join(filter(has, unicodedata.normalize("NFKD", c).translate(_ALIKE))):
            return plain
        if (kind := unicodedata.category(c)) in ("Mn", "Me", "Cf"):   # accents, joiners, styles of emoji
            return ""
        return f"[{unicodedata.name(c).lower()}]" if kind[0] in "SP" else f"[u+{ord(c):x}]"

    return "".join(map(drawn, text.translate(_ALIKE)))


# Anchors of a dark-to-bright colour scale, evenly spaced.
_HEAT = torch.tensor([[0.0, 0.0, 0.02], [0.25, 0.04, 0.41], [0.58, 0.15, 0.40], [0.87, 0.32, 0.23],
                      [0.99, 0.65, 0.04], [0.99, 1.0, 0.64]])


def heat(values: Tensor, size: tuple[int, int] | None = None, top: float | None = None) -> Image.Image:
    """A map (h, w) in colours, black 0 and below, bright `top` (None: its maximum); enlarged smoothly to
    size (width, height)."""
    v = values.float().cpu().clamp(min=0)
    v = (v / (v.max() if top is None else top)).nan_to_num().clamp(0, 1)
    position = v * (len(_HEAT) - 1)
    low = position.floor().long().clamp(max=len(_HEAT) - 2)
    colours = torch.lerp(_HEAT[low], _HEAT[low + 1], (position - low)[..., None])
    picture = Image.fromarray((colours * 255).round().byte().numpy())
    return picture.resize(size, Image.BICUBIC) if size else picture


def overlay(picture: Image.Image, values: Tensor, strength: float = 0.65) -> Image.Image:
    """A map (h, w) laid over the picture it belongs to."""
    return Image.blend(shown(picture), heat(values, picture.size), strength)


def _at_height(picture: Image.Image, side: int) -> Image.Image:
    size = (round(picture.width * side / picture.height), side)
    return picture.resize(size, Image.BICUBIC if picture.height < side else Image.LANCZOS)


def marked(source: str, caption: str) -> list[tuple[str, bool]]:
    """The words of a caption, and whether each is new against the source's, whatever signs stand at it."""
    words = caption.split()
    a, b = ([word.strip(",.;:!?\"'()") or word for word in text.split()[:COMPARED]]
            for text in (source, caption))
    matches = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    unchanged = {j for m in matches for j in range(m.b, m.b + m.size)}
    return [(word, j < COMPARED and j not in unchanged) for j, word in enumerate(words)]


def _wrap(words: list[tuple[str, bool]], font, width: int) -> list[list[tuple[str, bool]]]:
    rows: list[list[tuple[str, bool]]] = [[]]
    for word in ((piece, new) for text, new in words for piece in _pieces(text, font, width)):
        if rows[-1] and font.getlength(" ".join(w for w, _ in [*rows[-1], word])) > width:
            rows.append([])
        rows[-1].append(word)
    return rows


def _pieces(word: str, font, width: int) -> Iterator[str]:
    """A word, or as many letters a line as fit of one that is longer (of a script without spaces)."""
    start = 0
    for end in range(2, len(word) + 1):
        if end - start > 1 and font.getlength(word[start:end]) > width:
            yield word[start:end - 1]
            start = end - 1
    yield word[start:]


def save_png(path: Path, image: Image.Image, settings: dict[str, Any] | None = None) -> None:
    """Writes a PNG atomically, with the settings in a text chunk. Settings that are longer than Pillow reads
    back (TEXT) are left out: it would refuse the picture."""
    info = PngImagePlugin.PngInfo()
    if settings is not None and len(text := json.dumps(settings)) < TEXT:
        info.add_text(CHUNK, text)   # ASCII: json escapes the rest
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info, compress_level=4)   # 3 % larger in half the time


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_png` left in a picture. Raises UsageError."""
    text = open_picture(path).info.get(CHUNK)
    if text is None:
        raise UsageError(f"{path}: holds no settings of a run; only PNG files written by p2p do (and other "
                         "programs drop them when they save a picture again)")
    try:
        return parse_object(text)
    except (ValueError, TypeError):
        raise UsageError(f"{path}: its settings are damaged") from None

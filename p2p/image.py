"""Tensors to pictures and back, captioned grids, and settings kept inside PNG files."""
from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from p2p.errors import NumericsError, UsageError
from weights.aside import replacing
from weights.untrusted import brief, parse_object

CHUNK = "prompt_to_prompt"   # PNG text chunk that holds all settings of a run, as JSON
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")   # decoders that start no other program (EPS starts Ghostscript)
TEXT = PngImagePlugin.MAX_TEXT_MEMORY   # characters of a chunk, or of a picture in base64: more Pillow does not read again
FITS = ("crop", "pad", "own")
_INK, _ACCENT, _PAPER = (40, 40, 46), (204, 62, 22), (255, 255, 255)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> pictures; values outside are clipped, non-finite ones an error."""
    if not pictures.isfinite().all():
        raise NumericsError("the decoded picture holds values that are not finite; try float32")
    array = ((pictures.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


def from_pil(image: Image.Image) -> Tensor:
    """A picture of any mode, as `shown`  ->  (1, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(shown(image))).permute(2, 0, 1)[None].float() / 127.5 - 1


def shown(image: Image.Image, paper: str = "white") -> Image.Image:
    """A picture of any mode as a viewer shows it: RGB of 8 bits, upright by its EXIF tag, on `paper` where it is transparent.

    Values of 16 bits (Pillow's modes I;16 and I) are divided by 257, never stretched; those of mode F count from 0 to 255, as
    in Pillow, and are clipped. In mode I nothing above 255, in mode F nothing above 1 is likely to mean 8 bits and 0 to 1: it is
    refused. Colour profiles are left aside. Raises UsageError.
    """
    image = upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "La":   # premultiplied, which Pillow converts to its like alone
        image = image.convert("LA")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:   # of a PNG of 16 bits a colour, of which Pillow reads the upper half
        image.info["transparency"] = tuple(v >> 8 for v in key)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, or floating-point ones, as L; with its alpha, LA, where one of them stands for transparency."""
    values = np.asarray(image, dtype=np.float64)
    low, high = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (0, 65535))
    if not np.isfinite(values).all() or 0 < values.max() <= low:
        raise UsageError(f"a picture of mode {image.mode} holds finite values from 0 to {high}, and this one none above "
                         f"{values.max():g}; scale it, or convert it to mode L")
    grey = Image.fromarray((values * 255 / high).clip(0, 255).round().astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def brightness(mask: Image.Image) -> Image.Image:
    """A mask of any mode, as `shown`, as 8-bit grey; black where it is transparent."""
    return shown(mask, "black").convert("L")


def open_picture(path: str | Path) -> Image.Image:
    """A picture from a file in one of FORMATS, upright; of an animation the first frame. Raises UsageError."""
    try:
        return _decoded(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Exception as error:   # decoders raise anything over damaged bytes
        raise UsageError(f"{path}: not a picture that can be read ({_why(error)}); the formats are {', '.join(FORMATS)}") from None


def _decoded(file: str | Path | BinaryIO) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:   # before it decodes, Pillow refuses more than 179 million pixels
        found = upright(image)
        found.format = image.format   # which a copy does not keep
        return found


def upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF tag says."""
    return ImageOps.exif_transpose(image)


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


def as_picture(given: Image.Image | str | Path, what: str = "picture") -> Image.Image:
    """A picture as such, or from the file that is named. Raises UsageError."""
    if isinstance(given, (str, Path)):
        return open_picture(given)
    if not isinstance(given, Image.Image) or not all(given.size):
        raise UsageError(f"{what}: a PIL image of at least a pixel, or the path of one, is needed, not {brief(given)}")
    return given


def fit(image: Image.Image, size: tuple[int, int], how: str = "crop", by: Image.Resampling = Image.LANCZOS) -> Image.Image:
    """A picture of any size and mode, as `shown`, in (height, width), scaled by a filter: "crop" to cover it, cropped
    around the centre; "pad" to lie inside it whole, its outermost pixels repeated to the edges (a white margin is a thing that a
    model would draw again; more of the same is not)."""
    image, (height, width) = shown(image), size
    if how != "pad":
        return ImageOps.fit(image, (width, height), by)
    scale = min(width / image.width, height / image.height)
    inner = image.resize([max(1, round(side * scale)) for side in image.size], by)
    top, left = (height - inner.height) // 2, (width - inner.width) // 2
    margins = (top, height - inner.height - top), (left, width - inner.width - left), (0, 0)
    return Image.fromarray(np.pad(np.asarray(inner), margins, mode="edge"))


def own_size(image: Image.Image, size: tuple[int, int], unit: int, most: int) -> tuple[int, int]:
    """(height, width) with the upright picture's aspect and about as many pixels as `size`, in multiples of `unit` up to `most`."""
    scale = (size[0] * size[1] / (image.height * image.width)) ** 0.5
    return tuple(min(max(round(side * scale / unit), 1) * unit, most // unit * unit) for side in image.size[::-1])


def to_base64(image: Image.Image) -> str:
    """A picture as a PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def from_base64(text: str) -> Image.Image:
    """What `to_base64` wrote. Raises UsageError."""
    if not isinstance(text, str) or len(text) > TEXT:
        raise UsageError(f"a picture inside of settings is text in base64 of at most {TEXT >> 20} MiB, not {brief(text)}")
    try:
        return _decoded(io.BytesIO(base64.b64decode(text, validate=True)))
    except Exception as error:   # decoders raise anything over damaged bytes
        raise UsageError(f"a picture inside of settings cannot be read ({_why(error)})") from None


def grid(pictures: Sequence[Image.Image], captions: Sequence[str], side: int = 256) -> Image.Image:
    """Pictures in a row, captions below; words that the first caption does not have are set in colour."""
    font = ImageFont.load_default(15)
    gap, line = 12, 20
    shown = [_at_height(p, side) for p in pictures]
    lines = [_wrap(_marked(captions[0], c), font, p.width) for c, p in zip(captions, shown)]
    height = side + 3 * gap + line * max(map(len, lines))
    sheet = Image.new("RGB", (sum(p.width + gap for p in shown) + gap, height), _PAPER)
    draw, x = ImageDraw.Draw(sheet), gap
    for picture, rows in zip(shown, lines):
        sheet.paste(picture, (x, gap))
        for k, row in enumerate(rows):
            at = float(x)
            for word, new in row:
                draw.text((at, gap + side + gap // 2 + k * line), word, fill=_ACCENT if new else _INK, font=font)
                at += font.getlength(word + " ")
        x += picture.width + gap
    return sheet


def table(pictures: Sequence[Sequence[Image.Image]], columns: Sequence[str], rows: Sequence[str] = ("",), side: int = 160,
          corner: str = "") -> Image.Image:
    """Rows of pictures under column labels, row labels at the left; `corner` names the axes."""
    font = ImageFont.load_default(14)
    gap, line = 6, 18
    width = max(round(side * p.width / p.height) for row in pictures for p in row)
    heads = [_wrap([(w, False) for w in c.split()], font, width) for c in columns]
    top = gap + line * max(1, *map(len, heads))
    left = gap + round(max((font.getlength(r) for r in [*rows, corner]), default=0)) + (gap if any(rows) or corner else 0)
    sheet = Image.new("RGB", (left + (width + gap) * len(columns), top + (side + gap) * len(pictures)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), corner, fill=_ACCENT, font=font)
    for j, head in enumerate(heads):
        for k, words in enumerate(head):
            text = " ".join(w for w, _ in words)
            draw.text((left + j * (width + gap) + (width - font.getlength(text)) / 2, gap + k * line), text, fill=_INK, font=font)
    for i, (label, row) in enumerate(zip(rows, pictures)):
        y = top + gap // 2 + i * (side + gap)
        draw.text((gap, y + side / 2 - line / 2), label, fill=_INK, font=font)
        for j, picture in enumerate(row):
            sheet.paste(_at_height(picture, side), (left + j * (width + gap), y))
    return sheet


# Anchors of a dark-to-bright colour scale, evenly spaced.
_HEAT = torch.tensor([[0.0, 0.0, 0.02], [0.25, 0.04, 0.41], [0.58, 0.15, 0.40], [0.87, 0.32, 0.23], [0.99, 0.65, 0.04],
                      [0.99, 1.0, 0.64]])


def heat(values: Tensor, size: tuple[int, int] | None = None, top: float | None = None) -> Image.Image:
    """A map (h, w) in colours, black 0 and below, bright `top` (None: its maximum); enlarged smoothly to size (width, height)."""
    v = values.float().cpu().clamp(min=0)
    v = (v / (v.max() if top is None else top)).nan_to_num().clamp(0, 1)
    at = v * (len(_HEAT) - 1)
    low = at.floor().long().clamp(max=len(_HEAT) - 2)
    colours = torch.lerp(_HEAT[low], _HEAT[low + 1], (at - low)[..., None])
    picture = Image.fromarray((colours * 255).round().byte().numpy())
    return picture.resize(size, Image.BICUBIC) if size else picture


def overlay(picture: Image.Image, values: Tensor, strength: float = 0.65) -> Image.Image:
    """A map (h, w) laid over the picture it belongs to."""
    return Image.blend(picture.convert("RGB"), heat(values, picture.size), strength)


def _at_height(picture: Image.Image, side: int) -> Image.Image:
    size = (round(picture.width * side / picture.height), side)
    return picture.resize(size, Image.BICUBIC if picture.height < side else Image.LANCZOS)


def _marked(source: str, caption: str) -> list[tuple[str, bool]]:
    """The words of a caption, each with whether it is new."""
    a, b = source.split(), caption.split()
    kept = {j for m in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks() for j in range(m.b, m.b + m.size)}
    return [(word, j not in kept) for j, word in enumerate(b)]


def _wrap(words: list[tuple[str, bool]], font, width: int) -> list[list[tuple[str, bool]]]:
    rows: list[list[tuple[str, bool]]] = [[]]
    for word in words:
        if rows[-1] and font.getlength(" ".join(w for w, _ in [*rows[-1], word])) > width:
            rows.append([])
        rows[-1].append(word)
    return rows


def save_png(path: Path, image: Image.Image, settings: dict[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with the settings in a text chunk; without it where these are longer (TEXT) than Pillow
    reads back, as it would then refuse the whole picture."""
    info = PngImagePlugin.PngInfo()
    if settings is not None and len(text := json.dumps(settings)) < TEXT:
        info.add_text(CHUNK, text)   # ASCII: json escapes the rest
    with replacing(path) as made:
        image.save(made, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_png` left in a picture. Raises UsageError."""
    text = open_picture(path).info.get(CHUNK)
    if text is None:
        raise UsageError(f"{path}: holds no settings of a run; only PNG files written by p2p do (and other programs "
                         "drop them when they save a picture again)")
    try:
        return parse_object(text)
    except (ValueError, TypeError):
        raise UsageError(f"{path}: its settings are damaged") from None

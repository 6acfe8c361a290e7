"""Tensors to pictures and back, captioned grids, and settings kept inside PNG files."""
from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from p2p.errors import NumericsError, UsageError

CHUNK = "prompt_to_prompt"   # PNG text chunk that holds all settings of a run, as JSON
_INK, _ACCENT, _PAPER = (40, 40, 46), (204, 62, 22), (255, 255, 255)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> pictures; values outside are clipped, non-finite ones an error."""
    if not pictures.isfinite().all():
        raise NumericsError("the decoded picture holds values that are not finite; try float32")
    array = ((pictures.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


def from_pil(image: Image.Image) -> Tensor:
    """A picture of any mode -> (1, 3, H, W) in [-1, 1], turned upright by its EXIF tag."""
    array = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_base64(image: Image.Image | Tensor) -> str:
    """A picture, or a (H, W) mask, as a PNG in base64."""
    if isinstance(image, Tensor):
        image = Image.fromarray((image > 0.5).cpu().numpy().astype(np.uint8) * 255)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def from_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def grid(pictures: Sequence[Image.Image], captions: Sequence[str], side: int = 256) -> Image.Image:
    """Pictures in a row, captions below; words that the first caption does not have are set in colour."""
    font = ImageFont.load_default(15)
    gap, line = 12, 20
    shown = [p.resize((round(p.width * side / p.height), side), Image.BICUBIC if p.height < side else Image.LANCZOS)
             for p in pictures]
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
    """Writes a PNG, whole or not at all, with the settings in a text chunk."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_text(CHUNK, json.dumps(settings))   # ASCII: json escapes the rest
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        image.save(tmp, format="PNG", pnginfo=info)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_png` left in a picture. Raises UsageError."""
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(CHUNK)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path}: not a picture that can be read ({error})") from None
    if text is None:
        raise UsageError(f"{path}: holds no settings of a run; only PNG files written by p2p do (and other programs "
                         "drop them when they save a picture again)")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise UsageError(f"{path}: its settings are damaged") from None

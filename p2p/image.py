"""Tensors to pictures and back, and whatever a picture may come as: files, base64, any mode, any shape."""
from __future__ import annotations

import base64
import io
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from p2p.errors import NumericsError, UsageError
from p2p.weights.untrusted import brief, check_regular

# decoders that start no other program (EPS starts Ghostscript)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# characters of a chunk, or of a picture in base64: more Pillow does not read again
TEXT = PngImagePlugin.MAX_TEXT_MEMORY
FITS = ("crop", "pad", "own")
PIXELS = 2**26   # of a picture: a file of some kilobytes may ask for gigabytes
GREYS = {"L;2": 3, "L;4": 15, "L": 255}   # largest value of a grey PNG, by Pillow's name for how it is stored


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
    """A picture of any mode as a viewer shows it: RGB of 8 bits, upright by its EXIF tag, on `paper`
    where it is transparent.

    Values of 16 bits (Pillow's modes I;16 and I) are divided by 257, never stretched (of colours of 16 bits
    Pillow keeps the upper half); those of mode F count from 0 to 255, as in Pillow, and are clipped. In mode
    I nothing above 255, in mode F nothing above 1 is likely to mean 8 bits and 0 to 1, and values far outside
    of these ranges mean another scale: they are refused. Colour profiles are left aside, and dropped: what is
    made of the picture has none. Raises UsageError.
    """
    image = upright(image)
    image.info.pop("icc_profile", None)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "La":   # premultiplied, which Pillow converts to its like alone
        image = image.convert("LA")
    key = image.info.get("transparency", 0)
    # of no palette: not valid, so not there
    if image.mode == "P" and (key if isinstance(key, int) else len(key) - 1) > 255:
        del image.info["transparency"]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, or floating-point ones, as L; with its alpha, LA, where one of them stands
    for transparency."""
    values = np.asarray(image, dtype=np.float32)
    low, high = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (0, 65535))
    least, most = values.min(), values.max()
    # resampling overshoots
    if not np.isfinite(values).all() or 0 < most <= low or most > 1.01 * high or least < -0.01 * high:
        raise UsageError(f"a picture of mode {image.mode} holds finite values from 0 to {high}, and this one "
                         f"holds {least:g} to {most:g}; scale it, or convert it to mode L")
    grey = Image.fromarray((values * 255 / high).clip(0, 255).round().astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0,
                                               255).astype(np.uint8)))
    return grey


def brightness(mask: Image.Image) -> Image.Image:
    """A mask of any mode, as `shown`, as 8-bit grey; black where it is transparent."""
    return shown(mask, "black").convert("L")


def open_picture(path: str | Path) -> Image.Image:
    """A picture from a file in one of FORMATS, upright; of an animation the first frame.
    Raises UsageError."""
    check_file(path)
    try:
        return _decoded(path)
    except Exception as error:   # decoders raise anything over damaged bytes
        raise UsageError(f"{path}: not a picture that can be read ({_why(error)}); the formats are "
                         f"{', '.join(FORMATS)}") from None


def check_file(path: str | Path) -> None:
    """Raises UsageError unless it is a file that is there."""
    try:
        check_regular(Path(path))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {_why(error)}") from None


def _decoded(file: str | Path | BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # Pillow's, of a limit above PIXELS and of tags that we do not read
        with Image.open(file, formats=FORMATS) as image:
            check_pixels(image.width, image.height)   # before it is decoded
            picture = upright(image)
            picture.format = image.format   # which a copy does not keep
            return picture


def check_pixels(width: int, height: int) -> None:
    """Raises UsageError, a ValueError."""
    if width * height > PIXELS:
        raise UsageError(f"{width} x {height} are more than {PIXELS:,} pixels; make it smaller")


def upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF tag says."""
    return ImageOps.exif_transpose(_keyed(image))


def _keyed(image: Image.Image) -> Image.Image:
    """A PNG in which one value stands for transparency (its chunk tRNS), decoded with that value as the
    pixels have it.

    Pillow compares the stored value to pixels that it has scaled (grey of 2 and 4 bits) or cut to their
    upper half (colours of 16 bits). How they are stored is known until they are decoded, so `image` itself
    is left undecoded, to be given here again.
    """
    key, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    stored = tiles[0].args if image.format == "PNG" and tiles and not image.tell() else None
    if stored in GREYS and isinstance(key, int):
        picture, most = _reopened(image, stored), GREYS[stored]
        picture.info["transparency"] = (key & most) * 255 // most
    elif stored == "RGB" and isinstance(key, tuple):
        picture = _reopened(image, stored)
        picture.info["transparency"] = tuple(value & 255 for value in key)
    elif stored == "RGB;16B" and isinstance(key, tuple):
        picture, lower = _reopened(image, stored), _reopened(image, "RGB;16L")
        values = np.asarray(picture, np.uint16) * 256 + np.asarray(lower)
        del picture.info["transparency"]
        picture.putalpha(Image.fromarray((values != key).any(axis=-1).astype(np.uint8) * 255))
    else:
        picture = image
    return picture


def _reopened(image: Image.Image, stored: str) -> Image.Image:
    """The first frame of an undecoded picture's file, its values read as Pillow's raw mode says."""
    undecoded: Any = image   # an ImageFile, which has its file
    place = undecoded.fp.tell()
    undecoded.fp.seek(0)
    picture = Image.open(undecoded.fp, formats=[undecoded.format])
    picture.tile = [tile._replace(args=stored) for tile in picture.tile]
    picture.load()
    undecoded.fp.seek(place)
    return picture


def _why(error: Exception) -> str:
    return re.sub(r" <_io\.\w+ object at \w+>", "", str(error)) or type(error).__name__


def as_picture(image: Image.Image | str | Path, name: str = "picture") -> Image.Image:
    """A picture, or the one in the file that is named, decoded and upright. Raises UsageError."""
    if isinstance(image, (str, Path)):
        return open_picture(image)
    if not isinstance(image, Image.Image) or not all(image.size):
        raise UsageError(f"{name}: a PIL image of at least a pixel, or the path of one, is needed, not "
                         f"{brief(image)}")
    try:
        return upright(image)
    except Exception as error:   # of bytes that are damaged, or of a file that was closed
        raise UsageError(f"{name}: cannot be read ({_why(error)})") from None


def fit(image: Image.Image, size: tuple[int, int], mode: str = "crop",
        resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """A picture of any size and mode, as `shown`, in (height, width), scaled by a filter: "crop" to cover it,
    cropped around the centre; "pad" to lie inside it whole, its outermost pixels repeated to the edges (a
    white margin is a thing that a model would draw again; more of the same is not)."""
    image, (height, width) = shown(image), size
    if mode != "pad":
        return ImageOps.fit(image, (width, height), resampling)
    scale = min(width / image.width, height / image.height)
    inner = image.resize([max(1, round(side * scale)) for side in image.size], resampling)
    top, left = (height - inner.height) // 2, (width - inner.width) // 2
    margins = (top, height - inner.height - top), (left, width - inner.width - left), (0, 0)
    return Image.fromarray(np.pad(np.asarray(inner), margins, mode="edge"))


def own_size(image: Image.Image, size: tuple[int, int], unit: int, most: int) -> tuple[int, int]:
    """(height, width) with the upright picture's aspect and about as many pixels as `size`, in multiples of
    `unit` up to `most`."""
    scale = (size[0] * size[1] / (image.height * image.width)) ** 0.5
    return tuple(min(max(round(side * scale / unit), 1) * unit, most // unit * unit)
                 for side in image.size[::-1])


def to_base64(image: Image.Image, compress_level: int = 6) -> str:
    """A picture as a PNG in base64. compress_level: of zlib, 0 to 9."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=compress_level)
    return base64.b64encode(buffer.getvalue()).decode()


def data_url(image: Image.Image, compress_level: int = 6) -> str:
    """A picture as a PNG inside of the URL that a browser shows it by. compress_level: of zlib, 0 to 9."""
    return f"data:image/png;base64,{to_base64(image, compress_level)}"


def from_base64(text: str, name: str = "a picture inside of settings") -> Image.Image:
    """What `to_base64` wrote, or another file in base64. Raises UsageError."""
    if not isinstance(text, str) or len(text) > TEXT:
        raise UsageError(f"{name} is text in base64 of at most {TEXT >> 20} MiB, not {brief(text)}")
    try:
        return _decoded(io.BytesIO(base64.b64decode(text, validate=True)))
    except Exception as error:   # decoders raise anything over damaged bytes
        raise UsageError(f"{name} cannot be read ({_why(error)})") from None

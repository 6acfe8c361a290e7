"""Every kind of PNG that the standard has is what a viewer shows, and nothing is said that was not asked."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

import p2p
from p2p.image import as_picture, brightness, from_pil, open_picture, shown

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), COLOUR: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), COLOUR_ALPHA: (8, 16)}
KINDS = [(kind, depth, keyed) for kind, depths in DEPTHS.items() for depth in depths
         for keyed in ((False,) if kind in (GREY_ALPHA, COLOUR_ALPHA) else (False, True))]
ADAM7 = [(0, 8), (4, 8), (2, 4), (1, 2)]   # passes of one row: the first column, the distance of columns


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def packed(values, depth):
    """A row (W, channels) in bits, the first pixel in the highest ones."""
    bits = (values.reshape(-1, 1) >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def encoded(values, kind, depth, key=None, palette=None, alphas=None, interlaced=False):
    """One row (W, channels) as the standard's chapters 7 to 11 lay it out; no filter."""
    passes = [values[first::step] for first, step in ADAM7] if interlaced else [values]
    data = b"".join(b"\0" + packed(part, depth) for part in passes if len(part))
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", len(values), 1, depth, kind, 0, 0, interlaced))]
    if palette is not None:
        chunks.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
    if alphas is not None:
        chunks.append(chunk(b"tRNS", alphas.astype(np.uint8).tobytes()))
    elif key is not None:
        chunks.append(chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
    chunks += [chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def drawn(kind, depth, keyed, width=40, seed=0):
    """A PNG's bytes, and what is seen of it: colours and opacity (W, 3), (W, 1) from 0 to 1. Keys are those of single
    pixels; others have the same upper half, or the same value in two of three channels."""
    g = np.random.default_rng(1000 * seed + 100 * kind + 10 * depth + keyed)
    values = g.integers(0, 2**depth, (width, CHANNELS[kind]))
    opaque, more = np.ones((width, 1)), {}
    if kind == PALETTE:
        palette, alphas = g.integers(0, 256, (2**depth, 3)), g.integers(0, 256, 2**depth)
        more = {"palette": palette} | ({"alphas": alphas} if keyed else {})
        opaque = alphas[values] / 255 if keyed else opaque
        colours = palette[values[:, 0]] / 255
    else:
        if keyed:
            values[1::4] = values[0]
            values[2::4, -1] = values[0, -1] ^ 1   # of 16 bits, the lowest one
            more = {"key": values[0]}
            opaque = (values != values[0]).any(axis=1, keepdims=True)
        colours = np.broadcast_to(values[:, :3] if kind in (COLOUR, COLOUR_ALPHA) else values[:, :1], (width, 3))
        colours = colours / (2**depth - 1)
        opaque = values[:, -1:] / (2**depth - 1) if kind in (GREY_ALPHA, COLOUR_ALPHA) else opaque
    return (values, kind, depth, more), colours, opaque


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize("kind, depth, keyed", KINDS)
def test_every_png_is_what_a_viewer_shows(kind, depth, keyed, interlaced, tmp_path):
    """On white paper, or black of a mask. Pillow keeps the upper half of 16 bits: one step of 255 off, two where it is mixed."""
    (values, *how, more), colours, opaque = drawn(kind, depth, keyed)
    (tmp_path / "x.png").write_bytes(encoded(values, *how, **more, interlaced=interlaced))
    seen, dark = 255 * (colours * opaque + 1 - opaque), 255 * colours * opaque
    off = 0.51 if depth < 16 and (opaque == opaque.astype(bool)).all() else 2
    given = Image.open(tmp_path / "x.png")
    for image in (open_picture(tmp_path / "x.png"), given, given, as_picture(given)):   # and once more: nothing is changed
        assert np.abs(np.asarray(shown(image))[0] - seen).max() < off
        assert np.abs((from_pil(image)[0, :, 0].T.numpy() + 1) * 127.5 - seen).max() < off
        grey = np.asarray(brightness(image))[0]
        assert np.abs(grey - dark @ [0.299, 0.587, 0.114]).max() < off + 0.51


@pytest.mark.parametrize("kind, depth, key", [(GREY, 8, 261), (COLOUR, 8, 261), (GREY, 2, 6), (GREY, 4, 21)])
def test_bits_of_a_key_beyond_the_depth_do_not_count(kind, depth, key):
    """As the standard has it (11.3.1.1): the lower ones are used."""
    channels = CHANNELS[kind]
    values = np.array([[key % 2**depth] * channels, [(key + 1) % 2**depth] * channels])
    image = Image.open(io.BytesIO(encoded(values, kind, depth, key=[key] * channels)))
    assert (np.asarray(brightness(image))[0] > 0).tolist() == [False, (key + 1) % 2**depth > 0]
    assert (np.asarray(shown(image))[0, 0] == 255).all()


@pytest.mark.parametrize("alphas", [np.zeros(300), np.where(np.arange(300) == 270, 0, 255)])
def test_more_opacities_than_a_palette_can_have_are_none(alphas):
    """As libpng has it: the chunk is not valid, and the picture is opaque."""
    palette = np.array([[0, 0, 0], [90, 90, 90]])
    image = Image.open(io.BytesIO(encoded(np.array([[0], [1]]), PALETTE, 8, palette=palette, alphas=alphas)))
    assert np.asarray(shown(image))[0, :, 0].tolist() == [0, 90]


def test_a_key_of_sixteen_bits_is_compared_whole():
    """Both pixels have the same upper halves; and neither upper half alone is the key."""
    values = np.array([[0x0100, 0x0203, 0x0004], [0x0101, 0x0203, 0x0004], [0, 1, 2]])
    for key, clear in ((values[0], 0), (values[2], 2)):
        image = Image.open(io.BytesIO(encoded(values, COLOUR, 16, key=key)))
        assert (np.asarray(shown(image))[0] == 255).all(axis=1).tolist() == [i == clear for i in range(3)]


def test_pictures_given_in_python_are_decoded_or_refused_in_words(emoji):
    data = encoded(*drawn(COLOUR, 8, False)[0][:3])
    cut, closed = Image.open(io.BytesIO(data[:-40])), Image.open(io.BytesIO(data))
    closed.close()
    for image in (cut, closed):
        for take in (as_picture, emoji.encode, lambda i: p2p.invert(emoji, i, "a cat", steps=2)):
            with pytest.raises(p2p.UsageError, match="cannot be read"):
                take(image)


@pytest.mark.slow
@pytest.mark.parametrize("side", [8193, 9500, 12000])
def test_large_pictures_are_refused_in_one_message(side, tmp_path):
    """Pillow warns from 89 million pixels on; our limit is below that and says so itself."""
    Image.new("1", (side, side)).save(tmp_path / "x.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(p2p.UsageError, match=f"{side} x {side} are more than 67,108,864 pixels"):
            open_picture(tmp_path / "x.png")
    assert not said


def test_an_animations_later_frame_is_the_one_that_was_chosen(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (0, 200)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:], transparency=0)
    image = Image.open(tmp_path / "x.png")
    image.seek(1)
    assert shown(image).getpixel((0, 0)) == (200, 200, 200)

"""A picture of any mode and format is what a viewer shows; hostile ones are refused; what does not fit is said."""
import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from test_png import chunk

import p2p
from p2p.cli.parser import main
from p2p.errors import UsageError
from p2p.image import TEXT, as_picture, brightness, fit, from_base64, from_pil, open_picture, own_size, shown
from p2p.show.pictures import CHUNK, read_settings, save_png

GREYS = np.array([[0, 90, 150, 255]])
COLOURS = Image.fromarray(np.array([[[255, 0, 0], [10, 200, 30], [0, 0, 255], [90, 90, 90]]], np.uint8))


def png(depth: int, kind: int, samples: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """One row of a PNG, written out: Pillow writes few of the kinds that it reads."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(b"\0" + samples)) + \
        chunk(b"IEND", b"")


def greys(image: Image.Image) -> list[int]:
    """The values of a row, which must be grey."""
    row = np.asarray(shown(image))[0]
    assert row.shape[-1] == 3 and (row == row[:, :1]).all()
    return row[:, 0].tolist()


@pytest.mark.parametrize("image", [
    Image.fromarray(GREYS.astype(np.uint8)), Image.fromarray((GREYS * 257).astype(np.uint16)),
    Image.frombytes("I;16B", (4, 1), (GREYS * 257).astype(">u2").tobytes()),
    Image.frombytes("I;16L", (4, 1), (GREYS * 257).astype("<u2").tobytes()), Image.fromarray((GREYS * 257).astype(np.int32)),
    Image.fromarray(GREYS.astype(np.float32)), Image.fromarray(GREYS.astype(np.uint8)).convert("LA"),
    Image.fromarray(GREYS.astype(np.uint8)).convert("RGBA").convert("RGBa"),
    Image.fromarray(GREYS.astype(np.uint8)).convert("LA").convert("La")], ids=lambda i: i.mode)
def test_grey_values_are_never_stretched(image, tmp_path):
    assert greys(image) == [0, 90, 150, 255]
    assert greys(image.crop((1, 0, 3, 1))) == [90, 150]   # its darkest is not black, its brightest not white
    assert np.asarray(brightness(image)).tolist() == GREYS.tolist()
    if image.mode in ("L", "I;16", "LA"):
        image.save(tmp_path / "x.png")
        assert greys(open_picture(tmp_path / "x.png")) == [0, 90, 150, 255]
    assert (((from_pil(image) + 1) * 127.5).round()[0, 0] == torch.tensor(GREYS)).all()


def test_sixteen_bits_are_rounded_and_floats_clipped():
    """A little beyond the range, as resampling overshoots, is clipped; what lies far outside is another scale, and is refused."""
    assert greys(Image.fromarray(np.array([[128, 129, 385, 65535]], np.uint16))) == [0, 1, 1, 255]
    assert greys(Image.fromarray(np.array([[-5, 65540, 90 * 257]], np.int32))) == [0, 255, 90]
    assert greys(Image.fromarray(np.array([[-2, 0.6, 254.4, 257]], np.float32))) == [0, 1, 254, 255]
    for bad in ([[0.0, 1.0]], [[-5, 90.0]], [[0.0, 1e9]], [[float("nan"), 90.0]], [[float("inf"), 0.0]]):
        with pytest.raises(UsageError, match="0 to 255"):
            shown(Image.fromarray(np.array(bad, np.float32)))
    with pytest.raises(UsageError, match="holds 0 to 255"):   # a mask of 8 bits in wide integers
        shown(Image.fromarray(np.array([[0, 255]], np.int32)))


@pytest.mark.parametrize("mode, off", [("RGB", 0), ("RGBA", 0), ("RGBX", 0), ("P", 0), ("PA", 0), ("CMYK", 0), ("YCbCr", 3), ("HSV", 4),
                                       ("LAB", 24)])   # 8 bits of each, not bent: coarse where colours are strong
def test_colours_are_those_of_the_mode(mode, off):
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(COLOURS, to_lab)
    elif mode == "PA":
        image = COLOURS.convert("P", palette=Image.ADAPTIVE)
        image.putalpha(255)
        assert image.mode == "PA"
    else:
        image = COLOURS.convert(mode, palette=Image.ADAPTIVE) if mode == "P" else COLOURS.convert(mode)
    found = np.asarray(shown(image)).astype(int)
    assert image.mode == mode and np.abs(found - np.asarray(COLOURS)).max() <= off


SEEN_THROUGH = {   # black values where they are opaque, the second pixel transparent
    "8-bit grey and tRNS": (png(8, 0, bytes([0, 90]), 2, (b"tRNS", struct.pack(">H", 90)))),
    "16-bit grey and tRNS": (png(16, 0, struct.pack(">2H", 0, 90 * 257), 2, (b"tRNS", struct.pack(">H", 90 * 257)))),
    "1-bit grey and tRNS": (png(1, 0, b"\x40", 2, (b"tRNS", struct.pack(">H", 1)))),
    "8-bit colour and tRNS": (png(8, 2, bytes([0, 0, 0, 1, 2, 3]), 2, (b"tRNS", struct.pack(">3H", 1, 2, 3)))),
    "16-bit colour and tRNS": (png(16, 2, struct.pack(">6H", 0, 0, 0, 9000, 1, 2), 2, (b"tRNS", struct.pack(">3H", 9000, 1, 2)))),
    "8-bit grey and alpha": (png(8, 4, bytes([0, 255, 90, 0]), 2)),
    "16-bit grey and alpha": (png(16, 4, struct.pack(">4H", 0, 65535, 900, 0), 2)),
    "16-bit colour and alpha": (png(16, 6, struct.pack(">8H", 0, 0, 0, 65535, 900, 900, 900, 0), 2)),
    "palette and tRNS": (png(8, 3, bytes([0, 1]), 2, (b"PLTE", bytes([0, 0, 0, 90, 90, 90])), (b"tRNS", bytes([255, 0])))),
}


@pytest.mark.parametrize("kind", SEEN_THROUGH)
def test_what_is_transparent_is_paper_of_a_picture_and_dark_of_a_mask(kind):
    image = Image.open(io.BytesIO(SEEN_THROUGH[kind]))
    assert greys(image) == [0, 255]
    assert np.asarray(brightness(image)).tolist() == [[0, 0]]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert greys(half) == [127] and np.asarray(brightness(Image.new("LA", (1, 1), (255, 128)))).tolist() == [[128]]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(format, tmp_path):
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "x", format=format, save_all=True, append_images=frames[1:], **{"lossless": True} if format == "WEBP" else {})
    assert shown(open_picture(tmp_path / "x")).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "P"])
def test_pictures_and_masks_are_turned_upright(mode, tmp_path):
    values = np.array([[0, 0, 200]]) * (257 if mode == "I;16" else 1)
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    image = image.convert(mode) if mode != "I;16" else image
    exif = Image.Exif()
    exif[0x0112] = 6   # its right side is the bottom
    image.save(tmp_path / "x.png", exif=exif)
    for opened in (open_picture(tmp_path / "x.png"), Image.open(tmp_path / "x.png")):
        assert shown(opened).size == (1, 3) and shown(opened).getpixel((0, 2)) == (200,) * 3
        assert np.asarray(brightness(opened)).tolist() == [[0], [0], [200]]


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_a_profile_is_left_aside_wherever_the_picture_goes(mode):
    """A viewer that reads one would show the picture and its reconstruction in different colours."""
    picture = Image.new("RGB", (40, 30), "teal")
    picture.info["icc_profile"] = b"a profile"
    assert "icc_profile" not in fit(picture, (16, 16), mode).info and "icc_profile" in picture.info


def test_padding_keeps_the_whole_picture():
    wide = Image.fromarray(np.arange(0, 200, 20, dtype=np.uint8)[None].repeat(2, 0))   # 10 x 2
    found = np.asarray(fit(wide, (10, 10), "pad"))[..., 0]
    assert (found == np.arange(0, 200, 20)).all()   # all columns, and the edges repeated upwards and downwards
    assert (np.asarray(fit(wide, (10, 10)))[:, 0, 0] > 70).all()   # cropped: the left ones are gone
    assert fit(Image.new("RGB", (5000, 1)), (8, 8), "pad").size == (8, 8)
    same = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 16, 3), np.uint8))
    assert all(np.array_equal(fit(same, (8, 16), how), same) for how in ("crop", "pad"))   # as fitted once, so for ever


# --------------------------------------------------------------------------------------------------------------- hostile

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""
    return png(8, 0, b"", 1).replace(struct.pack(">II", 1, 1), struct.pack(">II", 60000, 60000))


def hostile() -> dict[str, bytes]:
    good = io.BytesIO()
    Image.new("RGB", (64, 64)).save(good, format="PNG")
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)))
    return {"EPS": EPS, "empty": b"", "text": b"hello", "cut": good.getvalue()[:60], "no data": png(8, 0, b"", 9),
            "bomb": bomb()[:29] + crc + bomb()[33:], "PSD": b"8BPS\0\1" + bytes(60), "FITS": b"SIMPLE  =" + bytes(80),
            "text bomb": png(8, 0, b"\0", 1, (b"zTXt", CHUNK.encode() + b"\0\0" + zlib.compress(bytes(2**27))))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", hostile())
def test_hostile_pictures_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", None)   # whatever starts Ghostscript fails differently
    data, file = hostile()[kind], tmp_path / "x.png"
    file.write_bytes(data)
    for read, given in ((open_picture, file), (read_settings, file), (from_base64, base64.b64encode(data).decode())):
        with pytest.raises(UsageError, match="can(not)? be read") as error:
            read(given)
        assert " object at 0x" not in str(error.value)


@pytest.mark.parametrize("text", [None, 3, "no base64!", "A" * (TEXT + 4), "é", ""])
def test_damaged_base64_is_refused(text):
    with pytest.raises(UsageError, match="inside of settings"):
        from_base64(text)


@pytest.mark.parametrize("text", ["[1]", "{", "nul", "[" * 100_000, "1" * 10_000])
def test_damaged_settings_are_refused(text, tmp_path):
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text(CHUNK, text)
    Image.new("L", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UsageError, match="its settings are damaged"):
        read_settings(tmp_path / "x.png")


def test_settings_that_no_reader_takes_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("p2p.show.pictures.TEXT", 100)
    for length, kept in ((50, True), (200, False)):
        save_png(tmp_path / "x.png", Image.new("L", (8, 8)), {"x": "y" * length})
        assert (CHUNK in Image.open(tmp_path / "x.png").text) == kept


@pytest.mark.parametrize("given", [None, 3, b"x", ["x.png"], np.zeros((8, 8, 3), np.uint8), Image.new("RGB", (0, 8))])
def test_what_is_no_picture_is_said(given, emoji):
    for take in (as_picture, emoji.encode):
        with pytest.raises(UsageError, match="PIL image"):
            take(given)


def test_a_model_encodes_what_is_shown(emoji, sd1):
    sixteen = Image.fromarray(np.full((64, 64), 150 * 257, np.uint16))
    assert torch.equal(emoji.encode(sixteen), torch.full((1, 3, 64, 64), 150.0) / 127.5 - 1)
    assert torch.equal(sd1.encode(sixteen), sd1.encode(Image.new("RGB", (64, 64), (150,) * 3)))
    for bad in (Image.new("RGB", (65, 64)), torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 64, 64).long()):
        with pytest.raises(UsageError):
            sd1.encode(bad)


# -------------------------------------------------------------------------------------------------- what does not fit is said

@pytest.mark.slow
@pytest.mark.parametrize("size, fit_, said, made", [
    ((1600, 900), None, "1600 x 900 is cropped to the 900 x 900", (64, 64)), ((900, 1600), "crop", "cropped to the 900 x 900", (64, 64)),
    ((1600, 900), "pad", None, (64, 64)), ((1600, 900), "own", None, (86, 48)), ((64, 64), None, None, (64, 64)),
    ((640, 642), None, None, (64, 64)), ((900, 1600), "own", None, (48, 86))])
def test_a_picture_that_is_cropped_says_so(emoji, size, fit_, said, made):
    found = p2p.invert(emoji, Image.new("RGB", size), "a cat", method="noise", steps=10, fit=fit_)
    notes = [n for n in found.notes if "cropped" in n]
    assert found.picture.size == made and found.settings()["fit"] == (fit_ or "crop")
    assert notes == [] if said is None else said in notes[0] and "--pad" in notes[0] and 'fit="pad"' in notes[0]
    assert all(n in p2p.edit(emoji, found, "a dog").notes for n in notes)


def test_own_sizes_are_those_that_models_take():
    for size in ((1600, 900), (1, 5000), (5000, 1), (513, 512), (3, 2)):
        for unit in (2, 8, 64):
            height, width = own_size(Image.new("L", size), (512, 512), unit, 8192)
            assert height % unit == width % unit == 0 and 0 < height <= 8192 and 0 < width <= 8192
    assert own_size(Image.new("L", (1600, 900)), (512, 512), 8, 8192) == (384, 680)


@pytest.mark.slow
@pytest.mark.parametrize("options, wanted", [([], "is cropped to the 90 x 90"), (["--pad"], None), (["--fit", "own"], None), (["--fit", "pad"], None)])
def test_the_command_line_offers_to_keep_all_of_a_picture(capsys, tmp_path, options, wanted):
    Image.effect_noise((160, 90), 100).save(tmp_path / "x.png")
    assert main(["invert", str(tmp_path / "x.png"), "a cat", "--method", "noise", "--steps", "10", "-o", str(tmp_path), *options]) == 0
    err = capsys.readouterr().err
    assert "cropped" not in err if wanted is None else wanted in err
    assert main(["edit", "a cat", "a dog", "--pad", "-o", str(tmp_path)]) == 2
    assert "--fit: not with a source prompt alone" in capsys.readouterr().err
    with pytest.raises(UsageError, match="leave these out"):
        p2p.invert(p2p.load("emoji", device="cpu"), Image.new("RGB", (64, 64)), "a cat", fit="own", height=64)

"""What tests of the page share: what it sends, and pictures as it sends them."""
import base64
import io
import struct
import zlib

import numpy as np
from test_png import chunk

from p2p.web.asked import read

CAT, DOG = "a red cat on grass", "a red dog on grass"
PAGE = dict(source=CAT, target="", hand={}, usual=True, cross=0.8, self_=0.4, guidance=3.0, steps=4, seed="1", negative="",
            layers=[], blend="", method="edit-friendly")


def values(moved):
    """Of all controls, as the page sends them, in its order."""
    return list((PAGE | moved).values())


def asked(session, **moved):
    return read(session.model.unet, **PAGE | moved)


def last(session, **moved):
    return list(session.run(asked(session, **moved)))[-1]


def url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def blank(side):
    """A black square as a PNG, packed at once: Pillow would hold a byte a pixel."""
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)),
                     chunk(b"IDAT", zlib.compress(bytes((side // 8 + 1) * side), 1)), chunk(b"IEND", b"")))


def apart(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()

"""Pickles and PyTorch's archives written byte by byte, so that they may say what no honest program writes."""

import io
import pickle
import struct
import zipfile

STOP, REDUCE, BUILD, NEWOBJ, MARK = pickle.STOP, pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.MARK


def text(s):
    data = s.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(n):
    data = pickle.encode_long(n)
    return b"\x8a" + bytes([len(data)]) + data if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data)) + data


def tupled(*parts):
    return b"(" + b"".join(parts) + b"t"


def dictionary(**entries):
    return b"}(" + b"".join(text(k) + v for k, v in entries.items()) + b"u"


def name(path):
    """A global, as protocols 0 to 3 write it."""
    module, _, attribute = path.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode()


def name4(path):
    module, _, attribute = path.rpartition(".")
    return text(module) + text(attribute) + b"\x93"


def call(function, *args):
    return function + tupled(*args) + REDUCE


def put(n):
    return b"r" + struct.pack("<I", n)


def get(n):
    return b"j" + struct.pack("<I", n)


def doubled(depth):
    """A tuple of a tuple twice, of a tuple twice ...: few bytes that stand for 2^depth."""
    return b")" + b"".join(put(n) + get(n) + b"\x86" for n in range(depth))


ZERO, ONE, FOUR, KEY = integer(0), integer(1), integer(4), text("0")


def storage(kind="Float", key=KEY, count=FOUR):
    return tupled(text("storage"), name(f"torch.{kind}Storage"), key, text("cpu"), count) + b"Q"


LINE, NEXT = tupled(FOUR), tupled(ONE)  # the shape of four numbers in a row, and its stride


def tensor(shape=LINE, stride=NEXT, offset=ZERO, of=None):
    of = storage() if of is None else of
    return call(
        name("torch._utils._rebuild_tensor_v2"),
        of,
        offset,
        shape,
        stride,
        b"\x89",
        call(name("collections.OrderedDict")),
    )


def archive(value, data=bytes(16), root="archive", method=zipfile.ZIP_STORED, byteorder=b"little", more=()):
    """The format of torch.save: one pickle and one storage in a zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for entry, content, how in (
            (f"{root}/data.pkl", b"\x80\x02" + value + STOP, method),
            (f"{root}/byteorder", byteorder, 0),
            (f"{root}/data/0", data, 0),
            (f"{root}/version", b"3\n", 0),
            *more,
        ):
            z.writestr(entry, content, how)
    return out.getvalue()


def legacy(value, keys=KEY, size=4, data=bytes(16), little=True, magic=0x1950A86A20F9469CFC6C):
    """The format before torch 1.6: five pickles, then each storage's size and bytes."""
    parts = [
        pickle.dumps(magic, 2),
        pickle.dumps(1001, 2),
        pickle.dumps({"little_endian": little, "protocol_version": 1001}, 2),
        b"\x80\x02" + value + STOP,
        b"\x80\x02](" + keys + b"e" + STOP,
    ]
    return b"".join(parts) + struct.pack("<q", size) + data

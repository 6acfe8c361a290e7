"""Pickles made to crash, to stall, to fill the memory or to run code: each refused in one sentence, and soon.

They are read in a process of their own with a limit on its memory. What they do to readers that unpickle them:
`numpy.dtype.__setstate__` reads an address of the file's choice, a tuple of tuples is hashed for 2^60 steps ....
"""

import io
import json
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import pytest
from pickle_bytes import (
    BUILD,
    MARK,
    NEWOBJ,
    ONE,
    REDUCE,
    STOP,
    archive,
    call,
    dictionary,
    doubled,
    get,
    integer,
    legacy,
    name,
    name4,
    put,
    storage,
    tensor,
    text,
    tupled,
)

SECONDS, MEMORY = 30, 2**28  # the most that one may take; memory beyond what the process has before the first

READER = """
import json, resource, sys, time
from pathlib import Path
import torch
from p2p.weights.errors import CheckpointError
from p2p.weights.load import find

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
for path in sorted(Path(sys.argv[1]).iterdir()):
    began = time.process_time()
    try:
        find(path)
        said = "accepted"
    except CheckpointError as error:
        said = str(error)
    except BaseException as error:
        said = f"{type(error).__name__} reached the user: {error}"
    print(json.dumps([path.name, said, time.process_time() - began]), flush=True)
"""

SHELL = text("touch mark")
SYSTEM = "may be malicious"
NOTHING = "no UNet, no autoencoder, no text tower found"  # the attack came to nothing


def beside(value):
    """Next to an ordinary tensor."""
    return archive(dictionary(state_dict=dictionary(weight=tensor()), extra=value))


def weight(**how):
    return archive(dictionary(weight=tensor(**how)))


def deep(what, times=400_000):
    return what * times


# numpy believes the state that a dtype is given, here that numbers are pointers; a scalar of it is read from anywhere.
DTYPE = call(name("numpy.dtype"), text("f8"), b"\x89", b"\x88")
LYING = DTYPE + tupled(integer(3), text("<"), b"N", b"N", b"N", integer(8), integer(8), integer(0x3F)) + BUILD
POINTERS = call(name("numpy.dtype"), b"](" + tupled(text("a"), text("O")) + b"e")
ADDRESS = call(name("_codecs.encode"), text("A" * 8), text("latin1"))
BIG = integer(2**31)
BUILT = {  # would make a reader build something: ours builds nothing
    "a dtype that lies": (beside(LYING), NOTHING),
    "a scalar at an address": (beside(call(name("numpy.core.multiarray.scalar"), LYING)), NOTHING),
    "a scalar at an address, new name": (beside(call(name("numpy._core.multiarray.scalar"), LYING)), NOTHING),
    "a scalar of pointers": (beside(call(name("numpy.core.multiarray.scalar"), POINTERS, ADDRESS)), NOTHING),
    "an array of pointers": (
        beside(call(name("numpy._core.numeric._frombuffer"), ADDRESS, POINTERS, tupled(ONE), text("C"))),
        NOTHING,
    ),
    "a scalar of 2 GB": (
        beside(call(name("numpy.core.multiarray.scalar"), call(name("numpy.dtype"), text("V2147483647")))),
        NOTHING,
    ),
    "Float64DType with a state": (
        beside(name("numpy.dtypes.Float64DType") + b")" + NEWOBJ + tupled(integer(1)) + BUILD),
        NOTHING,
    ),
    "a bytearray of 2 GB": (beside(call(name("builtins.bytearray"), BIG)), NOTHING),
    "a codec that unpacks": (beside(call(name("_codecs.encode"), text("a"), text("bz2"))), NOTHING),
    "a tensor of 16 TB": (beside(call(name("torch.Tensor"), BIG, integer(2**11))), NOTHING),
    "a device of no kind": (beside(call(name("torch.device"), text("x" * 99))), NOTHING),
    "a parameter of nothing": (
        beside(call(name("torch._utils._rebuild_parameter"), b"N", b"\x88", b"}")),
        NOTHING,
    ),
    "a meta tensor of 2^60": (
        beside(
            call(
                name("torch._utils._rebuild_meta_tensor_no_storage"),
                name("torch.float32"),
                tupled(integer(2**60)),
                tupled(integer(1)),
                b"\x89",
            )
        ),
        NOTHING,
    ),
    "a sparse tensor": (beside(call(name("torch._utils._rebuild_sparse_tensor"), b"N", b"N")), NOTHING),
    "a wrapper's wrapper": (
        beside(
            call(
                name("torch._tensor._rebuild_from_type_v2"),
                name("torch._tensor._rebuild_from_type_v2"),
                name("torch.Tensor"),
                tupled(b"N"),
                b"}",
            )
        ),
        NOTHING,
    ),
}
STALLING = {  # small, and endless to hash, to print, to copy or to walk through
    "a key of 2^60 tuples": (archive(b"}" + doubled(60) + b"N" + b"s"), NOTHING),
    "a set of 2^60 tuples": (beside(b"\x8f(" + doubled(60) + b"\x90"), NOTHING),
    "a frozenset of 2^60 tuples": (beside(MARK + doubled(60) + b"\x91"), NOTHING),
    "2^60 tuples": (beside(doubled(60)), NOTHING),
    "a shape of 2^60 tuples": (weight(shape=doubled(60)), "no shape and strides"),
    "an offset of 2^60 tuples": (weight(offset=doubled(60)), "no shape and strides"),
    "a storage's key of 2^60 tuples": (weight(of=storage(key=doubled(60))), "without a key or a size"),
    "a storage's size of 2^60 tuples": (weight(of=storage(count=doubled(60))), "without a key or a size"),
    "a name of 2^60 tuples": (archive(doubled(60) + text("x") + b"\x93"), "damaged.*a name that is no text"),
    "a key of 10^4 digits": (archive(b"}" + integer(10**10_000) + b"N" + b"s"), NOTHING),
    "keys of a storage list": (legacy(tensor(), keys=doubled(60)), "damaged"),
    "tuples 400,000 deep": (beside(b")" + deep(b"\x85")), NOTHING),
    "lists 200,000 deep": (beside(deep(b"](", 200_000) + deep(b"e", 200_000)), NOTHING),
    "dictionaries 100,000 deep": (
        archive(deep(b"}(X\1\0\0\0a", 100_000) + b"N" + deep(b"u", 100_000)),
        NOTHING,
    ),
    "state dicts that hold themselves": (
        archive(b"}" + put(0) + text("state_dict") + get(0) + b"s"),
        NOTHING,
    ),
    "two million opcodes": (archive(deep(b"N0", 10**6) + b"N"), "damaged.*more than 1,048,576 opcodes"),
    "a long stack under many marks": (
        archive(deep(b"N", 400_000) + deep(b"(t0", 200_000)),
        "damaged|holds (a|null)",
    ),
    "the same pairs again and again": (
        archive(
            b"]("
            + (b"](" + text("a") + b"Ne") * 50_000
            + b"e"
            + put(1)
            + deep(name("collections.OrderedDict") + get(1) + b"\x85R0", 100_000)
        ),
        "holds a list",
    ),
    "a long name, used often": (
        archive(name("a." + "b" * 10**6) + put(1) + deep(get(1) + b")R0", 10**5) + b"N"),
        SYSTEM,
    ),
}
LONG = {  # lengths and places that are not there
    "a text of 2^62 bytes": (archive(b"\x8d" + struct.pack("<Q", 2**62)), "damaged"),
    "bytes of 2^62": (archive(b"\x8e" + struct.pack("<Q", 2**62)), "damaged"),
    "a bytearray of 2^62": (archive(b"\x96" + struct.pack("<Q", 2**62)), "damaged"),
    "a frame of 2^62": (archive(b"\x95" + struct.pack("<Q", 2**62)), "damaged"),
    "a text of 4 GB": (archive(b"X" + struct.pack("<I", 2**32 - 1)), "damaged"),
    "a number of 2 GB": (archive(b"\x8b" + struct.pack("<i", 2**31 - 1)), "damaged"),
    "a number of -1 bytes": (archive(b"\x8b" + struct.pack("<i", -1)), "damaged"),
    "a number of 10,000 digits": (archive(b"L" + b"9" * 10_000 + b"L\n"), "damaged"),
    "memo number 2^32": (archive(b"}" + put(2**32 - 1)), NOTHING),
    "a memo that is empty": (archive(get(7)), "damaged"),
    "no mark": (archive(b"t"), "damaged"),
    "an empty stack": (archive(b""), "damaged"),
    "nothing to pop": (archive(b"0"), "damaged"),
    "nothing to call": (archive(REDUCE), "damaged"),
    "nothing to set": (archive(b"NNs"), "damaged"),
    "a name that is cut": (archive(b"cposix\nsys"), "damaged"),
    "an unknown opcode": (archive(b"\xff"), "damaged"),
    "a number of the registry": (archive(b"\x82\x01"), "damaged.*EXT1"),
    "a persistent text": (archive(b"P12\n"), "damaged.*PERSID"),
    "another persistent id": (archive(tupled(text("module"), b"N") + b"Q"), "damaged.*no storage"),
    "a storage of no kind": (weight(of=storage(kind="Magic")), SYSTEM),
    "a buffer out of band": (archive(b"\x97"), "damaged.*NEXT_BUFFER"),
}
PLACES = {  # tensors that are not where they say
    "a stride beyond the storage": (weight(stride=tupled(integer(2**20))), "its storage has 16 bytes"),
    "an offset beyond the storage": (weight(offset=integer(1)), "its storage has 16 bytes"),
    "a shape beyond the storage": (weight(shape=tupled(integer(5))), "its storage has 16 bytes"),
    "a negative stride": (weight(stride=tupled(integer(-1))), "no shape and strides"),
    "a negative offset": (weight(offset=integer(-4)), "no shape and strides"),
    "a shape of 2^62": (weight(shape=tupled(integer(2**62))), "no shape and strides"),
    "a shape of 2^47 each way": (
        weight(shape=tupled(integer(2**47), integer(2**47)), stride=tupled(b"K\0", b"K\0")),
        "no weights repeat",
    ),
    "a shape of floats": (weight(shape=tupled(b"G" + struct.pack(">d", 4.0))), "no shape and strides"),
    "a shape of booleans": (weight(shape=tupled(b"\x88")), "no shape and strides"),
    "a shape that is no tuple": (weight(shape=integer(4)), "damaged"),
    "a shape of 100,000 sides": (
        weight(shape=tupled(*[b"K\1"] * 10**5), stride=tupled(*[b"K\1"] * 10**5)),
        "no shape and strides",
    ),
    "strides of another length": (weight(stride=tupled(integer(1), integer(1))), "no shape and strides"),
    "a storage larger than its record": (
        weight(of=storage(count=integer(10**9))),
        "its storage has 16 bytes",
    ),
    "a storage of -1": (weight(of=storage(count=integer(-1))), "without a key or a size"),
    "a storage of doubles": (weight(of=storage("Double")), "its storage has 16 bytes"),
    "a storage that is not there": (weight(of=storage(key=text("7"))), "damaged"),
    "a storage outside": (weight(of=storage(key=text("../../../etc/passwd"))), "damaged"),
    "a tensor of no storage": (weight(of=b"N"), "damaged"),
    "a number a terabyte wide": (
        weight(shape=tupled(integer(2**20), integer(2**20)), stride=tupled(b"K\0", b"K\0")),
        "no weights repeat",
    ),
}


def zipped(*entries, **how):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for entry, content in entries:
            z.writestr(entry, content, **how)
    return out.getvalue()


def far(data):
    """The directory's first entry said to lie far behind the file's end."""
    at = data.index(b"PK\1\2")
    return data[: at + 42] + struct.pack("<I", 2**31) + data[at + 46 :]


def large_directory(data):
    at = data.rindex(b"PK\5\6")
    return data[: at + 12] + struct.pack("<II", 2**31, 0) + data[at + 20 :]


PLAIN = dictionary(weight=tensor())
ARCHIVES = {
    "a pickle that is compressed": (
        archive(text("a" * 2**22), method=zipfile.ZIP_DEFLATED),
        "damaged.*compressed",
    ),
    "a storage that is compressed": (
        zipped(
            ("a/data.pkl", b"\x80\2" + PLAIN + STOP),
            ("a/data/0", bytes(2**24)),
            compress_type=zipfile.ZIP_DEFLATED,
        ),
        "damaged.*compressed",
    ),
    "a pickle of 20 MB": (archive(text("a" * 20 * 2**20)), "damaged.*should be small"),
    "no pickle": (zipped(("archive/data/0", bytes(16))), "damaged.*0 data.pkl"),
    "two pickles": (archive(PLAIN, more=[("other/data.pkl", STOP, 0)]), "damaged.*2 data.pkl"),
    "a big machine's": (archive(PLAIN, byteorder=b"big"), "damaged.*big-endian"),
    "a directory that lies": (far(archive(PLAIN)), "damaged"),
    "a directory of 2 GB": (large_directory(archive(PLAIN)), "damaged"),
    "cut in its directory": (archive(PLAIN)[:-40], "damaged"),
    "cut in its data": (archive(PLAIN)[:90], "damaged"),
    "a program's archive": (zipped(("code/x.py", b"import os"), ("data.pkl", STOP)), "damaged.*0 data.pkl"),
    "100,000 entries": (lambda: zipped(*((f"a/{n}", b"") for n in range(100_000))), "damaged"),  # takes a second
    "legacy, another magic": (legacy(PLAIN, magic=7), "damaged.*not one by PyTorch"),
    "legacy, a big machine's": (legacy(PLAIN, little=False), "damaged.*big-endian"),
    "legacy, a storage of 2^60": (legacy(PLAIN, size=2**60), "damaged.*outside"),
    "legacy, a storage of -1": (legacy(PLAIN, size=-1), "damaged.*outside"),
    "legacy, cut": (legacy(PLAIN)[:-5], "damaged.*outside"),
    "legacy, no storage listed": (legacy(PLAIN, keys=b""), "damaged"),
    "legacy, another storage listed": (legacy(PLAIN, keys=text("9")), "damaged"),
    "legacy, keys that are numbers": (legacy(PLAIN, keys=integer(0)), "damaged"),
    "one number alone": (pickle.dumps(3, 2), "damaged"),
    "a list": (archive(b"](NNe"), "holds a list"),
    "a tensor alone": (archive(tensor()), "holds a tensor"),
    "a name alone": (archive(name("torch.Size")), "holds a name"),
    "something built": (archive(call(name("builtins.set"))), "holds an object"),
}


def commands():
    """Every way to name a function and to call it, in both formats and bare."""
    for how, made in (("GLOBAL", name), ("STACK_GLOBAL", name4)):
        for path in (
            "posix.system",
            "builtins.eval",
            "subprocess.Popen",
            "builtins.getattr",
            "torch.load",
            "torch.hub.load",
            "numpy.load",
            "importlib.import_module",
            "runpy.run_path",
            "operator.attrgetter",
            "torch.storage._load_from_bytes",
        ):
            yield f"{how} {path}", archive(dictionary(weight=tensor(), x=call(made(path), SHELL))), path
    called = {
        "NEWOBJ": name("posix.system") + tupled(SHELL) + NEWOBJ,
        "INST": b"(" + SHELL + b"iposix\nsystem\n",
        "OBJ": b"(" + name("posix.system") + SHELL + b"o",
        "BUILD": name("posix.system") + b")" + NEWOBJ + SHELL + BUILD,
        "NEWOBJ_EX": name4("posix.system") + tupled(SHELL) + b"}\x92",
        "named alone": name("posix.system"),
    }
    for how, value in called.items():
        yield how, archive(dictionary(x=value)), "posix.system"
    for protocol in (2, 3, 4, 5):
        bare = call((name4 if protocol > 3 else name)("posix.system"), SHELL)
        yield f"bare, protocol {protocol}", b"\x80" + bytes([protocol]) + bare + STOP, "posix.system"
    yield "legacy", legacy(dictionary(weight=tensor(), x=call(name("posix.system"), SHELL))), "posix.system"
    yield "then damaged", archive(call(name4("posix.system"), SHELL) + b"\xff"), "posix.system"
    yield "Python 2's eval", archive(call(name("__builtin__.eval"), SHELL)), "builtins.eval"


CASES = {
    **BUILT,
    **STALLING,
    **LONG,
    **PLACES,
    **ARCHIVES,
    **{
        how: (data, f"wants to use {path}, which no weights need; it may be malicious")
        for how, data, path in commands()
    },
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What the reader said of each, and its seconds."""
    folder = tmp_path_factory.mktemp("hostile")
    names = {}
    for i, case in enumerate(CASES):
        names[f"{i:03}.ckpt"] = case
        data = CASES[case][0]
        (folder / f"{i:03}.ckpt").write_bytes(data() if callable(data) else data)
    done = subprocess.run(
        [sys.executable, "-c", READER, folder, str(MEMORY)],
        capture_output=True,
        text=True,
        timeout=600,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(folder)},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (
        f"{CASES and list(CASES)[len(lines)]} ended the process: {done.returncode}, {done.stderr[-500:]}"
    )
    return {names[file]: (said, seconds) for file, said, seconds in lines}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_refused_in_words_and_in_time(outcomes, case):
    said, seconds = outcomes[case]
    assert re.search(CASES[case][1], said), said
    assert seconds < SECONDS and len(said) < 1200 and "weights_only" not in said and said.isprintable()


def test_there_are_more_than_a_hundred():
    assert len(CASES) > 100

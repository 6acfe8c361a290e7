"""PyTorch's pickled checkpoints, read without unpickling them: their opcodes are followed with stand-ins.

Nothing that a file names is imported, built or called; a tensor is a place in the file, checked against the bytes
that are there. Of dictionaries the entries whose keys are strings or numbers are kept: nothing else is ever hashed.
Formats: the zip archive of torch 1.6 and later, and the older one of several pickles in a row.
"""
from __future__ import annotations

import io
import math
import pickletools
import struct
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, ZipFile

import torch

from p2p.weights import refuse
from p2p.weights.errors import CheckpointError
from p2p.weights.untrusted import kind_of

BYTES, OPCODES = 2**24, 2**20   # most of a pickle: Stable Diffusion XL with averages takes a tenth
REPEATED = 2**20                # most numbers of a tensor that repeats its own by a stride of 0, as positions may
NAME = 200                      # most characters of a name
_LEGACY = 0x1950a86a20f9469cfc6c
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_KINDS = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
          "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
          "ComplexFloat": "complex64", "ComplexDouble": "complex128"}
_STORAGES = {"torch.storage.UntypedStorage": torch.uint8,
             **{f"torch.{k}Storage": _DTYPES[f"torch.{d}"] for k, d in _KINDS.items()}}

# What checkpoints name beside weights, all of it unneeded: numbers by numpy, old and new, and what Lightning keeps.
_HARMLESS = {"collections.Counter", "collections.OrderedDict", "collections.defaultdict", "_codecs.encode",
             *(f"builtins.{n}" for n in ("bytearray", "bytes", "complex", "dict", "frozenset", "list", "set")),
             "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter",
             "torch.nn.modules.container.ParameterDict", "numpy.dtype", "numpy.ndarray",
             "torch._tensor._rebuild_from_type_v2", "torch.serialization._get_layout",
             *(f"numpy.{core}.{n}" for core in ("core", "_core")
               for n in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")),
             *_DTYPES, *_STORAGES, *(f"torch.{k}Tensor" for k in _KINDS)}
_HARMLESS_BELOW = ("torch._utils._rebuild_", "numpy.dtypes.", "pytorch_lightning.", "lightning.pytorch.")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Stored(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    start: int                  # of its first number, in bytes
    nbytes: int                 # from there to the end of its last one
    shape: tuple[int, ...]
    stride: tuple[int, ...]     # in numbers


class _Name(NamedTuple):
    """What a file names."""

    path: str


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    count: int                  # of numbers


class _Tensor(NamedTuple):
    """As the file describes it: not checked yet."""

    storage: Any
    dtype: Any
    offset: Any
    shape: Any
    stride: Any


class _Object:
    """Whatever else a file would build."""


Starts = dict[str, tuple[int, int]]   # of storages, by their keys: first byte and number of bytes


def read(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a checkpoint, and its count of training steps if it says one. Raises CheckpointError."""
    names: set[str] = set()
    try:
        with _Bounded(io.FileIO(path)) as f:
            state, starts = (_archive if f.peek(2)[:2] == b"PK" else _in_a_row)(f, names)
        _refuse(path, names)
        tensors, metadata = _state_dict(path, state)
        return {k: _placed(path, k, t, starts) for k, t in tensors.items()}, metadata
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except Exception as error:   # whatever damage makes of zip archives, opcodes and their arguments
        _refuse(path, names)
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or cut short, or no checkpoint ({said}); {path.stat().st_size:,} bytes "
                              "were found. Download or copy it again.") from None


def _refuse(path: Path, names: set[str]) -> None:
    refused = sorted(n for n in names if n not in _HARMLESS and (not n.startswith(_HARMLESS_BELOW) or "__" in n))
    if refused:
        raise CheckpointError(f"{path}: wants to use {', '.join(refused[:5])}, which no weights need; it may be "
                              "malicious and was not loaded. Ask its author for a .safetensors file.")


def _state_dict(path: Path, state: Any) -> tuple[dict[str, _Tensor], dict[str, str]]:
    metadata = {}
    for _ in range(3):
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            if type(step := state.get("global_step")) is int and 0 <= step < 2**63:
                metadata["global_step"] = str(step)
            state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds {kind_of(state)}, not a dictionary of tensors.")
    if kind := refuse.by_structure(state):
        raise CheckpointError(f"{path}: {kind}.")
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, _Tensor)}, metadata


def _placed(path: Path, key: str, t: _Tensor, starts: Starts) -> Stored:
    """Raises CheckpointError for a tensor that lies outside of its storage, or is larger than it."""
    if not (len(t.shape) == len(t.stride) <= 16
            and all(type(n) is int and 0 <= n < 2**48 for n in (t.offset, *t.shape, *t.stride))):
        raise CheckpointError(f"{path}: {key} has no shape and strides that a tensor has. The file is damaged.")
    start, held = starts[t.storage.key]
    width, count = t.dtype.itemsize, math.prod(t.shape)
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride)) if count else 0
    if t.storage.count * t.storage.dtype.itemsize > held or (t.offset + span) * width > held:
        raise CheckpointError(f"{path}: {key} is {list(t.shape)}, with strides {list(t.stride)} from {t.offset}, but "
                              f"its storage has {held:,} bytes. The file is damaged.")
    if count * width > max(held, REPEATED * width):
        raise CheckpointError(f"{path}: {key} is {list(t.shape)}, but its storage has {held:,} bytes; no weights "
                              "repeat so.")
    return Stored(t.dtype, start + t.offset * width, span * width, tuple(t.shape), tuple(t.stride))


# -------------------------------------------------------------------------------------------------- formats

class _Bounded(io.BufferedReader):
    """A file of which nothing large is read at once: `zipfile` believes what an archive says of its directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > BYTES:
            raise ValueError(f"a part of {size:,} bytes that should be small")
        return super().read(size)


def _archive(f: io.BufferedReader, names: set[str]) -> tuple[Any, Starts]:
    with ZipFile(f) as z:
        entries = {i.filename: i for i in z.infolist()}
        if len(entries) < len(z.infolist()):
            raise ValueError("an entry is there twice")
    roots = [n.removesuffix("data.pkl") for n in entries if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(roots) != 1:
        raise ValueError(f"a zip archive with {len(roots)} data.pkl; PyTorch writes one")
    end = f.seek(0, io.SEEK_END)

    def found(name: str) -> tuple[int, int]:
        entry = entries[roots[0] + name]
        f.seek(entry.header_offset)
        head = f.read(30)
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        if entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{name} is compressed, which PyTorch does not do")
        if head[:4] != b"PK\3\4" or start + entry.file_size > end:
            raise ValueError(f"{name} lies outside of the file")
        return start, entry.file_size

    def content(name: str) -> bytes:
        start, size = found(name)
        f.seek(start)
        return f.read(size)

    if roots[0] + "byteorder" in entries and content("byteorder") != b"little":
        raise ValueError("written on a big-endian machine; write it again on another")
    storages: dict[str, _Storage] = {}
    state = _followed(io.BytesIO(content("data.pkl")), names, storages)
    return state, {key: found(f"data/{key}") for key in storages}


def _in_a_row(f: io.BufferedReader, names: set[str]) -> tuple[Any, Starts]:
    end, storages = f.seek(0, io.SEEK_END), {}
    f.seek(0)
    stream = io.BytesIO(f.read(BYTES))
    first = _followed(stream, names, storages)
    if type(first) is not int or first != _LEGACY:
        raise ValueError("a pickle, but not one by PyTorch")
    _, system, state, keys = (_followed(stream, names, storages) for _ in range(4))
    if type(system) is not dict or type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError("not the parts of a checkpoint")
    if system.get("little_endian") is not True:
        raise ValueError("written on a big-endian machine; write it again on another")
    starts, at = {}, stream.tell()
    for key in keys:
        f.seek(at)
        size = struct.unpack("<q", f.read(8))[0] * storages[key].dtype.itemsize
        if not 0 <= size <= end - at - 8:
            raise ValueError(f"the storage {key} lies outside of the file")
        starts[key] = at + 8, size
        at += 8 + size
    return state, starts


# -------------------------------------------------------------------------------------------------- opcodes

_CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
              "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": _Object}
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
           "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
           "BINBYTES8", "BYTEARRAY8"}
# How many values an opcode takes off the stack, or that it takes all above the last mark.
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "REDUCE": 2,
          "NEWOBJ": 2, "NEWOBJ_EX": 3, "BINPERSID": 1, "POP": 1, "BUILD": 1}
_MARKED = {"TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS", "ADDITEMS", "FROZENSET", "POP_MARK", "INST", "OBJ"}


def _followed(stream: io.BytesIO, names: set[str], storages: dict[str, _Storage]) -> Any:
    """What a pickle would build, of stand-ins; what it names is added to `names`, its storages to `storages`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for n, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        op = opcode.name
        if n > OPCODES:
            raise ValueError(f"a pickle of more than {OPCODES:,} opcodes")
        at = marks.pop() if op in _MARKED else len(stack) - _TAKEN.get(op, 0)
        if at < 0:
            raise ValueError(f"nothing for {op} to take")
        taken = stack[at:]
        del stack[at:]
        if op == "STOP":
            return stack.pop()
        if op == "MARK":
            marks.append(len(stack))
        elif op in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op == "MEMOIZE" else arg] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET", "DUP"):
            stack.append(stack[-1] if op == "DUP" else memo[arg])
        elif op in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            if type(stack[-1]) is list:
                stack[-1].extend(taken)
            elif type(stack[-1]) is dict:
                stack[-1].update(_entries(taken))
        elif op not in ("PROTO", "FRAME", "POP", "POP_MARK", "BUILD", "ADDITEMS"):
            stack.append(_pushed(op, arg, taken, names, storages))
    raise ValueError("it does not end")


def _pushed(op: str, arg: Any, taken: list[Any], names: set[str], storages: dict[str, _Storage]) -> Any:
    """What an opcode puts on the stack."""
    if op in _VALUES:
        return _Object() if type(arg) is int and arg.bit_length() > 128 else arg   # megabytes, to be read as a key
    if op in _CONSTANTS:
        return _CONSTANTS[op]()
    if op.startswith("TUPLE") or op == "LIST":
        return taken if op == "LIST" else tuple(taken)
    if op == "DICT":
        return _entries(taken)
    if op in ("GLOBAL", "STACK_GLOBAL", "INST"):
        module, name = taken if op == "STACK_GLOBAL" else arg.split(" ", 1)
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        names.add(path := f"{_PYTHON_2.get(module, module)[:NAME]}.{name[:NAME]}"[:NAME])
        return _Object() if op == "INST" else _Name(path)
    if op in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
        return _built(*taken[:2])
    if op == "BINPERSID":
        storage = _storage(taken[0])
        return storages.setdefault(storage.key, storage)
    if op in ("OBJ", "FROZENSET"):
        return _Object()
    raise ValueError(f"the opcode {op}, which no checkpoint has")


def _entries(items: list[Any]) -> dict[str | int, Any]:
    """What of a dictionary is kept: hashing another key may take for ever."""
    return {k: v for k, v in zip(items[::2], items[1::2])
            if type(k) is str or (type(k) is int and abs(k) < 2**63)}


def _storage(said: Any) -> _Storage:
    """What a persistent id stands for: ("storage", type, key, device, count of numbers, ...)."""
    if type(said) is not tuple or len(said) < 5 or said[0] != "storage" or said[5:] not in ((), (None,)):
        raise ValueError("a persistent id that is no storage")
    _, kind, key, _, count = said[:5]
    if type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a storage without a key or a size")
    return _Storage(_STORAGES[kind.path.replace("torch.cuda.", "torch.")], key, count)


def _built(what: Any, args: Any) -> Any:
    """What a call would build, where it is needed: dictionaries, tensors, parameters."""
    path = what.path if isinstance(what, _Name) else ""
    if path == "torch._tensor._rebuild_from_type_v2" and len(args) > 2 and isinstance(args[0], _Name):
        path, args = args[0].path, args[2]
    if path in ("collections.OrderedDict", "builtins.dict"):
        pairs = args[0] if args and type(args[0]) is list else []
        found = _entries([x for pair in pairs for x in pair[:2]])
        pairs.clear()   # a file may ask for the same ones a million times
        return found
    if path == "torch.Size" and len(args) == 1:
        return args[0]
    if path.startswith("torch._utils._rebuild_parameter") and args:
        return args[0]
    if path in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2") and not any(args[6:7]):
        return _Tensor(args[0], args[0].dtype, *args[1:4])
    if path == "torch._utils._rebuild_tensor_v3":
        return _Tensor(args[0], _DTYPES[args[6].path], *args[1:4])
    return _Object()

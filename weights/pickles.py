"""Reads PyTorch's pickled checkpoints without unpickling them: their opcodes are interpreted with
placeholders.

Nothing that a file names is imported, built or called; a tensor is a range of bytes, checked against the size
of the file (see `p2p.weights.opcodes`). Formats: the zip archive of torch 1.6 and later, and the older one of
several pickles in a row.
"""
from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

from p2p.weights import refuse
from p2p.weights.errors import CheckpointError
from p2p.weights.opcodes import DTYPES, KINDS, STORAGES, Object, Storage, Tensor, followed
from p2p.weights.untrusted import kind_of

BYTES = 2**24      # most of a pickle: Stable Diffusion XL with averages takes a tenth
REPEATED = 2**20   # most numbers of a tensor that repeats its own by a stride of 0, as positions may
_LEGACY = 0x1950a86a20f9469cfc6c

# Names in checkpoints that are not needed: numbers by numpy, old and new, and the state of Lightning.
_HARMLESS = {"collections.Counter", "collections.OrderedDict", "collections.defaultdict", "_codecs.encode",
             *(f"builtins.{n}"
               for n in ("bytearray", "bytes", "complex", "dict", "frozenset", "list", "set")),
             "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter",
             "torch.nn.modules.container.ParameterDict", "numpy.dtype", "numpy.ndarray",
             "torch._tensor._rebuild_from_type_v2", "torch.serialization._get_layout",
             *(f"numpy.{core}.{n}" for core in ("core", "_core")
               for n in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")),
             *DTYPES, *STORAGES, *(f"torch.{k}Tensor" for k in KINDS)}
_HARMLESS_BELOW = ("torch._utils._rebuild_", "numpy.dtypes.", "pytorch_lightning.", "lightning.pytorch.")


class Stored(NamedTuple):
    """The range of a tensor in its file."""

    dtype: torch.dtype
    start: int                  # of its first number, in bytes
    nbytes: int                 # from there to the end of its last one
    shape: tuple[int, ...]
    stride: tuple[int, ...]     # in numbers


Starts = dict[str, tuple[int, int]]   # of storages, by their keys: first byte and number of bytes


def read(path: Path, inside: str | None = None) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a checkpoint, and what it says in plain numbers: its count of training steps, a LoRA's
    alphas.

    inside: the name of a dictionary (or ParameterDict) in it: if there is one, its tensors alone are read,
    named "inside.key". Raises CheckpointError.
    """
    names: set[str] = set()
    try:
        with _Bounded(io.FileIO(path)) as f:
            state, starts = (_archive if f.peek(2)[:2] == b"PK" else _in_a_row)(f, names)
        _refuse(path, names)
        inner = _inside(state, inside)
        tensors, metadata = _state_dict(path, state if inner is None else inner)
        return {k: _placed(path, k, t, starts) for k, t in tensors.items()}, metadata
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except Exception as error:   # damaged zip archives, opcodes and arguments raise anything
        _refuse(path, names)
        said = isinstance(error, (ValueError, BadZipFile))   # the others name no fault of the file
        reason = f" ({error})" if said else ""
        raise CheckpointError(f"{path}: damaged or cut short, or no checkpoint{reason}; "
                              f"{path.stat().st_size:,} bytes were found. Download or copy it "
                              "again.") from None


def _refuse(path: Path, names: set[str]) -> None:
    refused = sorted(n for n in names if n not in _HARMLESS
                     and (not n.startswith(_HARMLESS_BELOW) or "__" in n))
    if any(name.startswith("__torch__.") for name in refused):
        raise CheckpointError(f"{path}: a TorchScript archive, which holds code beside its weights; give the "
                              "same weights as .safetensors, or as a state dict.")
    if refused:
        raise CheckpointError(f"{path}: wants to use {', '.join(refused[:5])}, which no weights need; it may "
                              "be malicious and was not loaded. Ask its author for a .safetensors file.")


def _inside(state: Any, name: str | None) -> dict[str, Any] | None:
    inner = state.get(name) if isinstance(state, dict) and name is not None else None
    if isinstance(inner, Object) and isinstance(inner.state, dict):   # a module, as ParameterDict
        inner = inner.state.get("_parameters")
    return {f"{name}.{k}": v for k, v in inner.items()} if isinstance(inner, dict) else None


def _state_dict(path: Path, state: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
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
    numbers = ((k, v) for k, v in state.items() if type(k) is str and type(v) in (int, float))
    metadata |= {k: str(v) for k, v in numbers if k.endswith(".alpha")}   # of a LoRA, which saves tensors
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}, metadata


def _placed(path: Path, key: str, t: Tensor, starts: Starts) -> Stored:
    """The range of a tensor. Raises CheckpointError where it is outside of its storage, or larger."""
    if not (len(t.shape) == len(t.stride) <= 16
            and all(type(n) is int and 0 <= n < 2**48 for n in (t.offset, *t.shape, *t.stride))):
        raise CheckpointError(f"{path}: {key} has no shape and strides that a tensor has. The file is "
                              "damaged.")
    start, held = starts[t.storage.key]
    width, count = t.dtype.itemsize, math.prod(t.shape)
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride)) if count else 0
    if t.storage.count * t.storage.dtype.itemsize > held or (t.offset + span) * width > held:
        raise CheckpointError(f"{path}: {key} is {list(t.shape)}, with strides {list(t.stride)} from "
                              f"{t.offset}, but its storage has {held:,} bytes. The file is damaged.")
    if count * width > max(held, REPEATED * width):
        raise CheckpointError(f"{path}: {key} is {list(t.shape)}, but its storage has {held:,} bytes; no "
                              "weights repeat so.")
    return Stored(t.dtype, start + t.offset * width, span * width, tuple(t.shape), tuple(t.stride))


# -------------------------------------------------------------------------------------------------- formats

class _Bounded(io.BufferedReader):
    """A file that refuses large reads: `zipfile` trusts the size of the directory that an archive states."""

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

    def entry_span(name: str) -> tuple[int, int]:
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
        start, size = entry_span(name)
        f.seek(start)
        return f.read(size)

    if roots[0] + "byteorder" in entries and content("byteorder") != b"little":
        raise ValueError("written on a big-endian machine; write it again on another")
    storages: dict[str, Storage] = {}
    state = followed(io.BytesIO(content("data.pkl")), names, storages)
    return state, {key: entry_span(f"data/{key}") for key in storages}


def _in_a_row(f: io.BufferedReader, names: set[str]) -> tuple[Any, Starts]:
    end, storages = f.seek(0, io.SEEK_END), {}
    f.seek(0)
    stream = io.BytesIO(f.read(BYTES))
    first = followed(stream, names, storages)
    if type(first) is not int or first != _LEGACY:
        raise ValueError("a pickle, but not one by PyTorch")
    _, system, state, keys = (followed(stream, names, storages) for _ in range(4))
    if type(system) is not dict or type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError("not the parts of a checkpoint")
    if system.get("little_endian") is not True:
        raise ValueError("written on a big-endian machine; write it again on another")
    starts, position = {}, stream.tell()
    for key in keys:
        f.seek(position)
        size = struct.unpack("<q", f.read(8))[0] * storages[key].dtype.itemsize
        if not 0 <= size <= end - position - 8:
            raise ValueError(f"the storage {key} lies outside of the file")
        starts[key] = position + 8, size
        position += 8 + size
    return state, starts

"""Tensors in files: .safetensors, shards, and pickles read without running anything in them.

Each reader knows names, shapes and types before a tensor is read, and hands out one tensor at a time.
"""
from __future__ import annotations

import mmap
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p2p.weights import pickles, refuse
from p2p.weights.errors import CheckpointError
from p2p.weights.untrusted import parse_object, read_text

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
INDEX = ".index.json"
_FP8 = ("F8_E4M3", "F8_E5M2", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


class TensorFile:
    """Names, shapes and types of the tensors of one or more files, and the tensors one at a time."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    shared = False   # its tensors are in use elsewhere: a model takes them as they are, and copies none

    def __getitem__(self, key: str) -> Tensor:
        raise KeyError(key)

    @property
    def files(self) -> list[Path]:
        """All files that it reads."""
        return [self.path]

    def is_fp8(self) -> bool:
        return any(d in _FP8 for d in self.dtypes.values())


class _MappedFile(TensorFile, ABC):
    """Returns copies. Pages read from a mapping count as the process's memory until it is closed: it is
    reopened regularly."""

    RESIDENT = 2**27   # bytes to read before it is reopened
    _read = 0

    @abstractmethod
    def _open(self) -> None:
        """Maps the file, perhaps again. Raises CheckpointError."""

    def _tensor(self, key: str) -> Tensor:
        """A view of the mapping."""
        raise KeyError(key)

    def __getitem__(self, key: str) -> Tensor:
        if self._read > self.RESIDENT:
            self._open()
            self._read = 0
        tensor = self._tensor(key).clone()
        self._read += tensor.nbytes
        return tensor


class SafetensorsFile(_MappedFile):
    # most bytes of names, shapes and metadata: of Stable Diffusion XL, a quarter of a million
    HEADER = 2**24
    TENSORS = 2**16   # most of a file: Stable Diffusion XL with averages has a tenth

    def __init__(self, path: Path):
        self.path = path
        self._open()
        if (count := len(self._file.keys())) > self.TENSORS:
            raise CheckpointError(f"{self.path}: {count:,} tensors, more than any model has.")
        slices = {k: self._file.get_slice(k) for k in self._file.keys()}
        self.shapes = {k: tuple(s.get_shape()) for k, s in slices.items()}
        self.dtypes = {k: s.get_dtype() for k, s in slices.items()}
        self.metadata = self._file.metadata() or {}

    def _open(self) -> None:
        try:
            with self.path.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
            if size > self.HEADER:
                raise CheckpointError(f"{self.path}: damaged: its header is said to have {size:,} bytes.")
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: damaged or cut short ({error}); "
                                  f"{self.path.stat().st_size:,} bytes were found. Download or copy it "
                                  "again.") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}).") from None

    def _tensor(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        return self._file.get_tensor(key)


def weight_map(index: Path) -> dict[str, list[str]]:
    """The tensors of each shard that an index names: plain files beside it. Raises CheckpointError."""
    shards: dict[str, list[str]] = defaultdict(list)
    try:
        for key, name in parse_object(read_text(index))["weight_map"].items():
            shards[name].append(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({error}).") from None
    for name in shards:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or _is_index(name):
            raise CheckpointError(f"{index}: names the shard {name!r}; only plain file names beside the "
                                  "index are read.")
    return shards


class ShardedFile(TensorFile):
    """The shards that an index names; every tensor must be in the shard that the index gives, and in no
    other."""

    def __init__(self, index: Path):
        self.path = index
        where = weight_map(index)
        self._shards = {name: open_file(index.with_name(name)) for name in sorted(where)}
        for name, shard in self._shards.items():
            if odd := sorted(set(where[name]) ^ shard.shapes.keys()):
                raise CheckpointError(f"{index}: {name} does not hold what the index says ({len(odd)} "
                                      f"tensors differ, first {odd[0]}).")
        self._where = {key: name for name, keys in where.items() for key in keys}
        self.shapes = {k: s for f in self._shards.values() for k, s in f.shapes.items()}
        self.dtypes = {k: s for f in self._shards.values() for k, s in f.dtypes.items()}
        self.metadata = {}

    def __getitem__(self, key: str) -> Tensor:
        return self._shards[self._where[key]][key]

    @property
    def files(self) -> list[Path]:
        return [self.path, *(f for shard in self._shards.values() for f in shard.files)]


class PickledFile(_MappedFile):
    """A PyTorch pickle; see `p2p.weights.pickles`."""

    def __init__(self, path: Path, inside: str | None = None):
        self.path = path
        self._stored, self.metadata = pickles.read(path, inside)
        self._open()
        self.shapes = {k: s.shape for k, s in self._stored.items()}
        self.dtypes = {k: str(s.dtype).removeprefix("torch.") for k, s in self._stored.items()}

    def _open(self) -> None:
        try:
            with self.path.open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}).") from None

    def _tensor(self, key: str) -> Tensor:
        s = self._stored[key]
        if not s.nbytes:
            return torch.empty(s.shape, dtype=s.dtype)
        if s.start + s.nbytes > len(self._map):
            raise CheckpointError(f"{self.path}: was cut short while it was read.")
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=s.nbytes, offset=s.start)
        raw = raw.clone() if s.start % s.dtype.itemsize else raw   # the oldest format aligns nothing
        return raw.view(s.dtype).as_strided(s.shape, s.stride)


class Renamed(TensorFile):
    """A file with its tensors renamed. names: new to old; other tensors are left out."""

    def __init__(self, file: TensorFile, names: dict[str, str]):
        self._file, self._names = file, names
        self.path, self.metadata, self.shared = file.path, file.metadata, file.shared
        self.shapes = {new: file.shapes[old] for new, old in names.items()}
        self.dtypes = {new: file.dtypes[old] for new, old in names.items()}

    @property
    def files(self) -> list[Path]:
        return self._file.files

    def __getitem__(self, key: str) -> Tensor:
        return self._file[self._names[key]]


def open_file(path: Path, inside: str | None = None) -> TensorFile:
    """The reader for a file, chosen by its first bytes; its name must agree. inside: see `pickles.read`.
    Raises CheckpointError."""
    if _is_index(path.name):
        return ShardedFile(path)
    kind = _sniff(path)
    if kind == "safetensors":
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path}: this is a safetensors file under the name of a pickle: rename it "
                                  f"to {path.with_suffix('.safetensors').name}.")
        return SafetensorsFile(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: not a safetensors file but a PyTorch pickle; if it comes from a "
                              f"source you trust, rename it to {path.with_suffix('.ckpt').name}.")
    return PickledFile(path, inside)


def _is_index(name: str) -> bool:
    return name.endswith(INDEX) or re.search(r"\.index\.\w+\.json$", name) is not None


def _sniff(path: Path) -> str:
    """"safetensors" or "pickle"; anything else is named in the error."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file.")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file.")
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:   # the header's length, then JSON
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "pickle"
    kind = (f"neither a safetensors file nor a PyTorch pickle ({path.stat().st_size:,} bytes, starting "
            f"{head[:8]!r})")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        kind = "a web page: the download failed, fetch the file itself"
    elif head.startswith(b"version https://git-lfs"):
        kind = "a git-lfs pointer: run `git lfs pull` where it lies"
    kind = refuse.by_format(path, head) or kind
    raise CheckpointError(f"{path}: {kind}.")

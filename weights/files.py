"""Tensors in files: .safetensors, shards, and pickles read without running anything in them.

Each reader knows names, shapes and types before a tensor is read, and hands out one tensor at a time.
"""
from __future__ import annotations

import json
import re
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights import refuse
from weights.errors import CheckpointError

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
INDEX = ".index.json"
_FP8 = ("F8_E4M3", "F8_E5M2", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


class TensorFile:
    """Names, shapes and types of the tensors of one or more files, and the tensors one at a time."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    def __getitem__(self, key: str) -> Tensor:
        raise KeyError(key)

    @property
    def files(self) -> list[Path]:
        """All that it reads."""
        return [self.path]

    def is_fp8(self) -> bool:
        return any(d in _FP8 for d in self.dtypes.values())


class _MappedFile(TensorFile, ABC):
    """Hands out copies. What was read of a mapping counts as the process's memory until it is closed, so it is now and then."""

    RESIDENT = 2**27   # bytes to read before that
    _read, _mapped = 0, True

    @abstractmethod
    def _open(self) -> None:
        """Maps the file, perhaps again. Raises CheckpointError."""

    def _tensor(self, key: str) -> Tensor:
        """As it lies in the mapping."""
        raise KeyError(key)

    def __getitem__(self, key: str) -> Tensor:
        if not self._mapped:
            return self._tensor(key)
        if self._read > self.RESIDENT:
            self._open()
            self._read = 0
        tensor = self._tensor(key).clone()
        self._read += tensor.nbytes
        return tensor


class SafetensorsFile(_MappedFile):
    def __init__(self, path: Path):
        self.path = path
        self._open()
        slices = {k: self._file.get_slice(k) for k in self._file.keys()}
        self.shapes = {k: tuple(s.get_shape()) for k, s in slices.items()}
        self.dtypes = {k: s.get_dtype() for k, s in slices.items()}
        self.metadata = self._file.metadata() or {}

    def _open(self) -> None:
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: damaged or cut short ({error}); {self.path.stat().st_size:,} bytes were found. "
                                  "Download or copy it again.") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}).") from None

    def _tensor(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        return self._file.get_tensor(key)


class ShardedFile(TensorFile):
    """The shards that an index names; every tensor must be in the shard it is said to be in, and in no other."""

    def __init__(self, index: Path):
        self.path = index
        try:
            where = json.loads(index.read_text())["weight_map"]
            names = sorted(set(where.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of shards ({error}).") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise CheckpointError(f"{index}: names the shard {name!r}; only plain file names beside the index are read.")
        self._shards = {name: open_file(index.with_name(name)) for name in names}
        for name, shard in self._shards.items():
            listed = {k for k, v in where.items() if v == name}
            if listed != shard.shapes.keys():
                odd = sorted(listed ^ shard.shapes.keys())
                raise CheckpointError(f"{index}: {name} does not hold what the index says ({len(odd)} tensors differ, "
                                      f"first {odd[0]}).")
        self._where = where
        self.shapes = {k: s for f in self._shards.values() for k, s in f.shapes.items()}
        self.dtypes = {k: s for f in self._shards.values() for k, s in f.dtypes.items()}
        self.metadata = {}

    def __getitem__(self, key: str) -> Tensor:
        return self._shards[self._where[key]][key]

    @property
    def files(self) -> list[Path]:
        return [self.path, *(f for shard in self._shards.values() for f in shard.files)]


class PickledFile(_MappedFile):
    """A PyTorch pickle, read with `weights_only=True` and a short list of harmless names."""

    def __init__(self, path: Path):
        self.path, self.metadata = path, {}
        self._mapped = is_zipfile(path)   # the oldest format is not: it is all in memory
        self._open()
        self.shapes = {k: tuple(v.shape) for k, v in self._tensors.items()}
        self.dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in self._tensors.items()}

    def _open(self) -> None:
        self._tensors = {}   # closes the mapping
        state = _unpickle(self.path)
        for _ in range(3):
            if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
                if isinstance(state.get("global_step"), int):
                    self.metadata["global_step"] = str(state["global_step"])
                state = state["state_dict"]
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path}: holds a {type(state).__name__}, not a dictionary of tensors.")
        if kind := refuse.by_structure(state):
            raise CheckpointError(f"{self.path}: {kind}.")
        self._tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}

    def _tensor(self, key: str) -> Tensor:
        return self._tensors[key]


def open_file(path: Path) -> TensorFile:
    """The reader for a file, chosen by its first bytes; its name must agree. Raises CheckpointError."""
    if path.name.endswith(INDEX) or re.search(r"\.index\.\w+\.json$", path.name):
        return ShardedFile(path)
    kind = _sniff(path)
    if kind == "safetensors":
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path}: this is a safetensors file under the name of a pickle: rename it to "
                                  f"{path.with_suffix('.safetensors').name}.")
        return SafetensorsFile(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: not a safetensors file but a PyTorch pickle; if it comes from a source you trust, "
                              f"rename it to {path.with_suffix('.ckpt').name}.")
    return PickledFile(path)


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
    found = f"neither a safetensors file nor a PyTorch pickle ({path.stat().st_size:,} bytes, starting {head[:8]!r})"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        found = "a web page: the download failed, fetch the file itself"
    elif head.startswith(b"version https://git-lfs"):
        found = "a git-lfs pointer: run `git lfs pull` where it lies"
    found = refuse.by_format(path, head) or found
    raise CheckpointError(f"{path}: {found}.")


# ------------------------------------------------------------------------------------------------------- pickles

def _stub(module: str, name: str) -> type:
    """An empty class under a foreign name: Lightning checkpoints mention theirs, and nothing of it is needed."""
    return type(name, (), {"__module__": module, "__qualname__": name})


def _allowed() -> list[Any]:
    """What a checkpoint may name beside tensors: numbers by numpy, old and new, and Lightning's callback."""
    from _codecs import encode

    core = getattr(np, "_core", None) or np.core
    scalar = core.multiarray.scalar
    stub = _stub("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    return [stub, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, encode,
            *(getattr(np.dtypes, n) for n in ("Float64DType", "Float32DType", "Int64DType", "Int32DType"))]


def _unpickle(path: Path) -> Any:
    """torch.load with weights_only=True, and every way it fails said in words; there is no other way to load."""
    version = tuple(int(x) for x in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise CheckpointError(f"{path}: pickles are only read by torch 2.10 or newer (this is {torch.__version__}): older ones "
                              "can be made to run code even so (CVE-2025-32434, CVE-2026-24747). Use a .safetensors file.")
    try:
        with torch.serialization.safe_globals(_allowed()):
            try:
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            except ValueError:      # not a zip archive: the oldest format; loading itself will name the globals
                unsafe = []
            if unsafe:
                raise CheckpointError(_malicious(path, unsafe))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")   # of pickle protocols, about files that are about to be refused
                try:
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap" not in str(error):
                        raise
                    return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:   # the reader of pickles fails in many ways on damaged files
        named = re.findall(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
        if named:
            raise CheckpointError(_malicious(path, [a or b for a, b in named])) from None
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or cut short, or no checkpoint ({text}); {path.stat().st_size:,} bytes were "
                              "found. Download or copy it again.") from None


def _malicious(path: Path, names: list[str]) -> str:
    return (f"{path}: wants to use {', '.join(sorted(set(names))[:5])}, which no weights need; it may be malicious and was not "
            "loaded. Ask its author for a .safetensors file.")


"""Files of tensors as they are written, and the package's own, inversions and encoded prompts, whose damage
is noticed by a digest in the header. It is no protection from forgery: whoever changes a file can write its
digest."""
from __future__ import annotations

import errno
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

SEAL = "seal"   # its name among the metadata


def save(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file and, in its header, the digest of all that it holds. Raises OSError."""
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write(tensors, file, {**metadata, SEAL: _digest(tensors, metadata)})


def write(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file, which whoever may read other new files may read: `save_file` makes its own
    the owner's alone. Raises OSError."""
    new = not file.exists()
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata and dict(metadata))
    except (SafetensorError, RuntimeError) as error:   # of a full disk, say
        if new:
            file.unlink(missing_ok=True)
        raise OSError(errno.EIO, str(error)) from None
    file.chmod(mode)


def check(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: Collection[str]) -> None:
    """Raises ValueError for metadata under other names than these, and where a sealed file is not what was
    saved; older files, and files of other programs, have no seal."""
    said = {name: text for name, text in metadata.items() if name != SEAL}
    if unknown := said.keys() - set(names):   # the seal's own name may be what is damaged
        raise ValueError(f"its metadata hold {min(unknown)!r}, which no such file has")
    if SEAL in metadata and metadata[SEAL] != _digest(tensors, said):
        raise ValueError("it was changed or damaged after it was saved")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, t in sorted(tensors.items()):
        digest.update(repr((name, str(t.dtype), tuple(t.shape))).encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

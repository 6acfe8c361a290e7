"""What a run takes, reckoned before anything is allocated, and refused beyond what the machine has.

A lower bound: noise, stored latents, tables, recorded maps and the network's skip connections, not the weights, which are loaded
by then. What is refused would have failed; what is not may fail still.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.attention import Record
from p2p.models.blocks import Maps
from p2p.models.unet import UNet, UNetConfig

CPU = torch.device("cpu")
Bill = dict[str, int]   # bytes by what takes them


def machine(device: torch.device = CPU) -> int | None:
    """Bytes that the device has; of a CPU, those that its container is given. None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    found = []
    with suppress(AttributeError, OSError, ValueError):   # Windows has no sysconf
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _limits():
        with suppress(OSError, ValueError):               # no such file, or "max": no limit
            found.append(int(file.read_text(encoding="utf-8")))
    return min(found, default=None)


def _limits() -> Iterator[Path]:
    """Where Linux says how much a control group may take (cgroups, version 2 or 1), and those that it lies in."""
    root = Path("/sys/fs/cgroup")
    yield root / "memory" / "memory.limit_in_bytes"
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            own = root / line.rpartition(":")[2].lstrip("/")
            if line.startswith("0::"):
                yield from (folder / "memory.max" for folder in (own, *own.parents) if folder.is_relative_to(root))


def afford(bill: Mapping[str, int], device: torch.device = CPU) -> None:
    """Raises UsageError for more than the device has."""
    wanted, has = sum(bill.values()), machine(device)
    if has is not None and wanted > has:
        parts = ", ".join(f"{what} {amount / 1e9:.1f}" for what, amount in bill.items() if amount > 0.01 * wanted)
        raise UsageError(f"this takes at least {wanted / 1e9:.1f} GB of memory ({parts}), and the {device.type} has "
                         f"{has / 1e9:.1f}: ask for fewer pictures at a time, fewer steps, or smaller pictures")


def check_run(model: Model, n: int, shape: tuple[int, ...], steps: int, *, guided: bool = True, noises: int = 1, kept: int = 0,
              targets: int = 0, encodes: bool = False, record: Record = Record()) -> None:
    """Raises UsageError unless n rows of latents of that shape (C, H, W) can be sampled. noises: tensors that are drawn; kept:
    latents that are stored; targets: of an edit; encodes: a picture is encoded first."""
    one = 4 * shape[0] * shape[1] * shape[2]
    pixels = shape[1] * shape[2] * model.shrink**2
    length = model.length if model.text_encoders else 0
    wide = model.unet.config.text_dim or model.unet.config.context_dim
    rows = n * (1 + guided)
    host = {"noise": noises * one, "stored latents": kept * one, "pictures": n * pixels * 3 * 5,
            "tables of the edits": 2 * 8 * targets * steps * length**2}
    there = {"latents": 3 * n * one, "text": rows * length * wide * model.dtype.itemsize,
             "the network": rows * _network(model, shape) * model.dtype.itemsize,
             "the autoencoder": _autoencoder(model, shape, encodes)}
    if record.text or record.pixels:
        numbers = (n + targets * record.before) * sum(m.numel() for m in seen(model, shape, record._replace(before=False)).values())
        host["maps"] = 2 * steps * numbers
        there["maps of a step"] = model.dtype.itemsize * numbers
    if model.device.type == "cuda":
        afford(host)
        return afford(there, model.device)
    afford(host | there)


def _network(model: Model, shape: tuple[int, ...]) -> int:
    """Numbers that one row holds at once, at least: the skip connections, and at the widest place what comes in and goes out."""
    c = model.unet.config
    h, w = (-(-side // c.patch) for side in shape[1:])
    skips = widest = 0
    for width, layers in zip(c.channels, c.layers):
        skips += (layers + 1) * width * h * w
        widest = max(widest, 3 * width * h * w)
        h, w = -(-h // 2), -(-w // 2)
    return skips + widest


def _autoencoder(model: Model, shape: tuple[int, ...], encodes: bool) -> int:
    """Bytes at full resolution, where it is largest, of the one picture that it works on at a time."""
    if model.vae is None:
        return 0
    sides = [side if model.tile is None or encodes else min(side, model.tile) for side in shape[1:]]
    channels = model.vae.config.channels[:2]
    return 2 * max(channels) * sides[0] * sides[1] * model.shrink**2 * model.vae.quant_conv.weight.dtype.itemsize


def seen(model: Model, shape: tuple[int, ...], record: Record) -> Maps:
    """What the network would record of one row of latents (C, H, W): tensors that have a shape and no memory."""
    return _seen(model.unet.config, model.length if model.text_encoders else 0, shape, record)


@lru_cache(maxsize=8)   # every edit of a traced source asks, and a large network takes a second to lay out
def _seen(c: UNetConfig, length: int, shape: tuple[int, ...], record: Record) -> Maps:
    with torch.device("meta"):
        told = dict(context=torch.zeros(1, length, c.text_dim or c.context_dim))
        if c.vector_dim:
            told["vector"] = torch.zeros(1, c.vector_dim)
        if c.low_channels:
            told |= dict(low=torch.zeros(1, c.low_channels, *shape[1:]), level=torch.zeros(1))
        return UNet(c)(torch.zeros(1, *shape), torch.zeros(1), record=record, **told)[1]

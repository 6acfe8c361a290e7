"""The memory of a run, estimated before anything is allocated, and refused beyond what the machine has.

A lower bound: noise, stored latents, tables, recorded maps and the network's skip connections, not the
weights, which are loaded by then. A run that is refused would have failed (but for a stored source's row at
steps that do not read it); one that is not may still fail.
"""
from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.attention import Attention, SelfAttention
from p2p.models.mmdit import MMDiTConfig
from p2p.request.record import Record

CPU = torch.device("cpu")


def machine(device: torch.device = CPU) -> int | None:
    """Bytes of memory of the device; of a CPU, as limited by its container. None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = []
    with suppress(AttributeError, OSError, ValueError):   # Windows has no sysconf
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _limits():
        with suppress(OSError, ValueError):               # no such file, or "max": no limit
            limits.append(int(file.read_text(encoding="utf-8")))
    return min(limits, default=None)


@cache
def _limits() -> list[Path]:
    """The files in which Linux limits the memory of this process's control groups (cgroups, version 2
    or 1)."""
    root = Path("/sys/fs/cgroup")
    files = [root / "memory" / "memory.limit_in_bytes"]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            group = root / line.rpartition(":")[2].lstrip("/")
            if line.startswith("0::"):
                folders = (folder for folder in (group, *group.parents) if folder.is_relative_to(root))
                files += [folder / "memory.max" for folder in folders]
    return files


def afford(bill: Mapping[str, int], device: torch.device = CPU) -> None:
    """Raises UsageError for more than the device has."""
    wanted, available = sum(bill.values()), machine(device)
    if available is not None and wanted > available:
        parts = ", ".join(f"{part} {amount / 1e9:.1f}" for part, amount in bill.items()
                          if amount > 0.01 * wanted)
        raise UsageError(f"this takes at least {wanted / 1e9:.1f} GB of memory ({parts}), and the "
                         f"{device.type} has {available / 1e9:.1f}: ask for fewer pictures at a time, fewer "
                         "steps, or smaller pictures")


def check_run(model: Model, n: int, shape: tuple[int, ...], steps: int, *, rows: int | None = None,
              noises: int = 1, stored: int = 0, targets: int = 0, autoencoder: str | None = "decodes",
              record: Record = Record()) -> None:
    """Raises UsageError unless n pictures of latents of that shape (C, H, W) can be sampled. rows: of the
    network, None for one a picture; noises: tensors that are drawn; stored: latents that are stored; targets:
    of an edit; autoencoder: what it does, "decodes", "encodes" or None."""
    one = 4 * shape[0] * shape[1] * shape[2]
    pixels = shape[1] * shape[2] * model.shrink**2
    length = model.length if model.text_encoders else 0
    rows = n if rows is None else rows
    host = {"noise": noises * one, "stored latents": stored * one, "pictures": n * pixels * 3 * 5,
            "tables of the edits": 2 * 8 * targets * steps * length**2}
    on_device = {"latents": 3 * n * one, "text": rows * length * model.unet.text_width * model.dtype.itemsize,
                 "the network": rows * model.unet.numbers_held(*shape[1:]) * model.dtype.itemsize,
                 "the autoencoder": _autoencoder(model, shape, autoencoder)}
    if record.anything:
        numbers = (n + targets * record.before) * map_numbers(model, record, *shape[1:])
        host["maps"] = 4 * numbers if record.mean else 2 * steps * numbers
        on_device["maps of a step"] = max(4, model.dtype.itemsize) * numbers
    if model.device.type == "cuda":
        afford(host)
        return afford(on_device, model.device)
    afford(host | on_device)


def _autoencoder(model: Model, shape: tuple[int, ...], what: str | None) -> int:
    """Bytes of the activations at full resolution, where they are largest, for one picture at a time."""
    if model.vae is None or what is None:
        return 0
    sides = [side if model.tile is None or what == "encodes" else min(side, model.tile) for side in shape[1:]]
    channels = model.vae.config.channels[:2]
    itemsize = model.vae.dtype.itemsize
    return 2 * max(channels) * sides[0] * sides[1] * model.shrink**2 * itemsize


def map_numbers(model: Model, record: Record, height: int, width: int) -> int:
    """Numbers in one row's recorded maps of one step, for latents of that size."""
    pixels, length = model.unet.site_pixels(height, width), model.length if model.text_encoders else 0
    layers = {m.site: m for m in model.unet.layers(Attention)}
    total = 0
    for site in record.sites(model.unet, height, width):
        columns = pixels[site] if isinstance(layers[site], SelfAttention) else length
        total += (1 if record.mean else layers[site].heads) * pixels[site] * columns
    return total


def qk_shapes(model: Model, height: int, width: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """The shapes (N, h d) and (K, h d) of one row's queries and keys by site, for latents of that size."""
    pixels, shapes = model.unet.site_pixels(height, width), {}
    between = set(model.unet.pixel_sites())
    for m in model.unet.layers(Attention):
        columns = pixels[m.site] * (m.site in between) + (0 if isinstance(m, SelfAttention) else model.length)
        c = model.unet.config
        width = c.dim if isinstance(c, MMDiTConfig) else m.to_q.out_features
        shapes[m.site] = (pixels[m.site], width), (columns, width)
    return shapes

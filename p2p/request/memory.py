"""What a run takes, reckoned before anything is allocated, and refused beyond what the machine has.

A lower bound: noise, stored latents, tables, recorded maps and the network's skip connections, not the
weights, which are loaded by then. What is refused would have failed; what is not may fail still.
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
from p2p.models.attention import Attention, HybridAttention, SelfAttention
from p2p.request.record import Record

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


@cache
def _limits() -> list[Path]:
    """Where Linux says how much a control group may take (cgroups, version 2 or 1), and
    those that it lies in."""
    root = Path("/sys/fs/cgroup")
    found = [root / "memory" / "memory.limit_in_bytes"]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            own = root / line.rpartition(":")[2].lstrip("/")
            if line.startswith("0::"):
                inside = (folder for folder in (own, *own.parents) if folder.is_relative_to(root))
                found += [folder / "memory.max" for folder in inside]
    return found


def afford(bill: Mapping[str, int], device: torch.device = CPU) -> None:
    """Raises UsageError for more than the device has."""
    wanted, has = sum(bill.values()), machine(device)
    if has is not None and wanted > has:
        parts = ", ".join(f"{what} {amount / 1e9:.1f}" for what, amount in bill.items()
                          if amount > 0.01 * wanted)
        raise UsageError(f"this takes at least {wanted / 1e9:.1f} GB of memory ({parts}), and the "
                         f"{device.type} has {has / 1e9:.1f}: ask for fewer pictures at a time, fewer steps, "
                         "or smaller pictures")


def check_run(model: Model, n: int, shape: tuple[int, ...], steps: int, *, guided: bool = True,
              noises: int = 1, kept: int = 0, targets: int = 0, encodes: bool = False,
              record: Record = Record()) -> None:
    """Raises UsageError unless n rows of latents of that shape (C, H, W) can be sampled. noises: tensors that
    are drawn; kept: latents that are stored; targets: of an edit; encodes: a picture is encoded first."""
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
        numbers = (n + targets * record.before) * map_numbers(model, record, *shape[1:])
        host["maps"] = 2 * steps * numbers
        there["maps of a step"] = model.dtype.itemsize * numbers
    if model.device.type == "cuda":
        afford(host)
        return afford(there, model.device)
    afford(host | there)


def _network(model: Model, shape: tuple[int, ...]) -> int:
    """Numbers that one row holds at once, at least: the skip connections, and at the widest place what
    comes in and goes out."""
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
    itemsize = model.vae.quant_conv.weight.dtype.itemsize
    return 2 * max(channels) * sides[0] * sides[1] * model.shrink**2 * itemsize


def map_numbers(model: Model, record: Record, height: int, width: int) -> int:
    """Numbers that one row's maps of one step hold, of latents of that size."""
    pixels, length = model.unet.site_pixels(height, width), model.length if model.text_encoders else 0
    layers = {m.site: m for m in model.unet.layers(Attention)}
    return sum(layers[site].heads * pixels[site] * (pixels[site] if isinstance(layers[site], SelfAttention)
                                                    else length)
               for site in record.sites(model.unet, height, width))


def qk_shapes(model: Model, height: int, width: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """By site, the shapes (N, h d) and (K, h d) of one row's queries and keys, of latents of that size."""
    pixels, found = model.unet.site_pixels(height, width), {}
    for m in model.unet.layers(Attention):
        between = isinstance(m, SelfAttention) or (isinstance(m, HybridAttention) and not m.text_only)
        columns = pixels[m.site] * between + (0 if isinstance(m, SelfAttention) else model.length)
        found[m.site] = (pixels[m.site], m.to_q.out_features), (columns, m.to_q.out_features)
    return found

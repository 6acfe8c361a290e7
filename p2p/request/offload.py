"""Parts of a model that stay on the CPU except while they run."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

MOVING = threading.RLock()   # held by whoever moves parts and uses them: one thread at a time


@contextmanager
def at_work(offloaded: bool, device: torch.device, *parts: nn.Module) -> Iterator[None]:
    """Moves offloaded parts to the device for as long as they are used."""
    if not offloaded:
        yield
        return
    with MOVING:
        try:
            for part in parts:
                part.to(device)
            yield
        finally:
            for part in parts:
                part.to("cpu")

"""The linear and convolution layers of every network here. Their weights may be stored in a lower precision
than they compute in: each layer widens them to that of its input.

Kernels and activations lie contiguous, with their channels first. With channels last both oneDNN's
convolution and ATen's group norm on CPUs round 4 to 10 times as coarsely (a 3 x 3 convolution of 1280
channels: 1.3e-6 against 2.6e-7, relative).
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch.nn.functional as F
from torch import Tensor, nn

from p2p.models import cpu

if TYPE_CHECKING:
    M = TypeVar("M", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[M]):
        """nn.ModuleList of modules of one kind."""

        @overload
        def __getitem__(self, idx: slice) -> ModuleList[M]: ...
        @overload
        def __getitem__(self, idx: int) -> M: ...
        def __getitem__(self, idx: Any) -> Any: ...
        def __iter__(self) -> Iterator[M]: ...
else:
    ModuleList = nn.ModuleList


class _Undrawn:
    """Draws no first weights where there is no memory for them, as when they come from a file."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:   # type: ignore[attr-defined]
            super().reset_parameters()   # type: ignore[misc]


class Linear(_Undrawn, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _widened(self, x)
        return cpu.linear(x, weight, bias) if cpu.applies(x, weight) else F.linear(x, weight, bias)


class Conv2d(_Undrawn, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _widened(self, x)
        if cpu.one_product(self, x) and cpu.applies(x, weight):
            return cpu.conv3x3(x, weight, bias)
        return self._conv_forward(x, weight, bias)


def widened_names(module: nn.Module) -> set[str]:
    """Names of the tensors that these layers widen."""
    layers = ((name, m) for name, m in module.named_modules() if isinstance(m, (Linear, Conv2d)))
    return {f"{name}.{p}" for name, _ in layers for p in ("weight", "bias")}


def _widened(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The layer's weight and bias, in the precision of its input if that is wider."""
    weight, bias = layer.weight, layer.bias
    if weight.dtype.itemsize >= x.dtype.itemsize:
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

"""The linear and convolution layers of every network here. Their weights may be stored in less precision than they compute in:
they are widened to that of the input, a layer at a time."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear. On CPUs, in float32 and where no gradient is asked for, oneDNN multiplies instead of the BLAS behind ATen: the
    same sums, up to twice as fast where that is MKL and the processor AMD's."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _as(x, self)
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()   # the operator has no derivative and is not compiled
        if ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32 and not plain:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *_as(x, self))


def wide(module: nn.Module) -> set[str]:
    """Names of the tensors that these layers hold, and widen."""
    return {f"{name}.{p}" for name, m in module.named_modules() if isinstance(m, (Linear, Conv2d)) for p in ("weight", "bias")}


def _as(x: Tensor, layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for this input."""
    weight, bias = layer.weight, layer.bias
    if weight.dtype.itemsize >= x.dtype.itemsize:
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

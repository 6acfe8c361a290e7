"""The linear layer of every network here."""
from __future__ import annotations

import torch
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear. On CPUs, in float32 and where no gradient is asked for, oneDNN multiplies instead of the BLAS behind ATen: the
    same sums, up to twice as fast where that is MKL and the processor AMD's."""

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()   # the operator has no derivative and is not compiled
        if ONEDNN and x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and not plain:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)

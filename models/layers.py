"""The linear and convolution layers of every network here. Their weights may be stored in less precision than they compute in:
they are widened to that of the input, a layer at a time."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in (
    "_linear_pointwise", "_convolution_pointwise", "_reorder_convolution_weight"))


class Linear(nn.Linear):
    """nn.Linear. On CPUs, in float32 and where no gradient is asked for, oneDNN multiplies instead of the BLAS behind ATen: the
    same sums, up to twice as fast where that is MKL and the processor AMD's."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _as(x, self)
        if _by_onednn(x, weight):
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d. Under the same conditions, a large 3 x 3 kernel on few positions is one matrix product with their neighbourhoods:
    oneDNN's convolution rearranges the whole kernel at every call, which there takes longer than the sums."""

    LARGE = 2**22   # elements of a kernel
    arranged: list[Tensor] | None = None   # the kernel as `arranged` keeps it, once there is one

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _as(x, self)
        if x.ndim != 4 or self.padding_mode != "zeros" or not _by_onednn(x, weight):
            return self._conv_forward(x, weight, bias)
        if self.arranged is not None:
            how = self.padding, self.stride, self.dilation, self.groups
            if not self.arranged:
                self.arranged.append(torch.ops.mkldnn._reorder_convolution_weight(weight, *how, x.shape))
            x = x.contiguous(memory_format=torch.channels_last)
            return torch.ops.mkldnn._convolution_pointwise(x, self.arranged[0], bias, *how, "none", [], "")
        few = 2 * len(x) * x.shape[2] * x.shape[3] <= self.out_channels
        same = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups) == ((3, 3), *[(1, 1)] * 3, 1)
        last = weight.is_contiguous(memory_format=torch.channels_last)
        if few and same and last and weight.numel() >= self.LARGE:
            kernel = weight.permute(0, 2, 3, 1).flatten(1)                       # (out, 9 C)
            out = torch.ops.mkldnn._linear_pointwise(_neighbourhoods(x), kernel, bias, "none", [], "")
            return out.transpose(1, 2).unflatten(2, x.shape[2:])                 # (B, out, H, W)
        return self._conv_forward(x, weight, bias)


ARRANGED = 2**29   # bytes of kernels
KEPT = 31 * 2**20  # bytes: of a block of 32 MiB or more glibc takes no notice


@contextmanager
def arranged(net: nn.Module) -> Iterator[None]:
    """For the steps of a run, over which no weight changes: each convolution's kernel is rearranged for oneDNN at its first call
    alone, not at every one, and memory that one step frees stays for the next. Networks whose kernels are more than ARRANGED
    bytes, a copy of which this holds, are left as they are. (Linear layers gain less than their rearrangement takes.)"""
    layers = [m for m in net.modules() if isinstance(m, Conv2d) and m.weight.is_cpu and m.weight.dtype == torch.float32]
    if not ONEDNN or sum(4 * m.weight.numel() for m in layers) > ARRANGED:
        layers = []
    if layers:
        torch.empty(KEPT, dtype=torch.uint8, device="cpu")   # and freed: from then on glibc keeps up to twice as much
    for m in layers:
        m.arranged = []
    try:
        yield
    finally:
        for m in layers:
            m.arranged = None


def channels_last(kernel: Tensor) -> Tensor:
    """A tensor as networks on a CPU hold it: kernels of convolutions with their channels last. The activations follow, and neither
    is rearranged at every call (on GPUs that has not been measured)."""
    return kernel.contiguous(memory_format=torch.channels_last) if kernel.ndim == 4 and kernel.is_cpu else kernel


def _neighbourhoods(x: Tensor) -> Tensor:
    """The 3 x 3 positions around each one, channels last.  (B, C, H, W) -> (B, H W, 9 C)"""
    b, c, h, w = x.shape
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()            # (B, H + 2, W + 2, C)
    row, line, place, channel = x.stride()
    return x.as_strided((b, h, w, 3, 3 * c), (row, line, place, line, channel)).reshape(b, h * w, 9 * c)


def wide(module: nn.Module) -> set[str]:
    """Names of the tensors that these layers hold, and widen."""
    return {f"{name}.{p}" for name, m in module.named_modules() if isinstance(m, (Linear, Conv2d)) for p in ("weight", "bias")}


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """May oneDNN's own operator be called? It has no derivative, and is not compiled."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32 and not plain


def _as(x: Tensor, layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for this input."""
    weight, bias = layer.weight, layer.bias
    if weight.dtype.itemsize >= x.dtype.itemsize:
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

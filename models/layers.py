"""The linear and convolution layers of every network here. Their weights may be stored in less precision than they compute in:
they are widened to that of the input, a layer at a time.

Kernels and activations lie contiguous, with their channels first. With channels last both oneDNN's convolution and ATen's group
norm on CPUs round 4 to 10 times as coarsely (a 3 x 3 convolution of 1280 channels: 1.3e-6 against 2.6e-7, relative).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear. On CPUs, in float32 and where no gradient is asked for, oneDNN multiplies instead of the BLAS behind ATen: the
    same sums, up to twice as fast where that is MKL and the processor AMD's."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, *_as(x, self))


class Conv2d(nn.Conv2d):
    """nn.Conv2d. Under the same conditions, a large 3 x 3 kernel on few positions is one matrix product with their neighbourhoods:
    oneDNN's convolution rearranges the whole kernel at every call, which there takes longer than the sums (a step of Stable
    Diffusion 1 on latents of 32 x 32 takes a fifth less)."""

    LARGE = 2**22   # elements of a kernel

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _as(x, self)
        plain = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups) == ((3, 3), *[(1, 1)] * 3, 1)
        if (plain and self.padding_mode == "zeros" and weight.numel() >= self.LARGE and x.ndim == 4
                and 2 * len(x) * x.shape[2] * x.shape[3] <= self.out_channels and _by_onednn(x, weight)):
            out = _linear(_neighbourhoods(x), weight.flatten(1), bias)           # (B, H W, out)
            return out.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()    # (B, out, H, W)
        return self._conv_forward(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _neighbourhoods(x: Tensor) -> Tensor:
    """The 3 x 3 positions around each one, with zeros beyond the edges.  (B, C, H, W) -> (B, H W, C 9)"""
    b, c, h, w = x.shape
    x = F.pad(x, (1, 1, 1, 1))                                                   # (B, C, H + 2, W + 2)
    picture, channel, line, place = x.stride()
    return x.as_strided((b, h, w, c, 3, 3), (picture, line, place, channel, line, place)).reshape(b, h * w, 9 * c)


def keep_freed_memory(device: torch.device) -> None:
    """From now on the C library keeps memory that one step frees for the next: glibc keeps up to twice what it last freed of its
    own mappings, and takes no notice of a block of 32 MiB or more. Elsewhere this does nothing."""
    if device.type == "cpu":
        torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")   # and freed


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

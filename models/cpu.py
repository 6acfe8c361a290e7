"""Optimisations for CPUs. Nothing here changes what is computed: readers of the method may skip it.

Measured: a UNet call without it, over one with it, in turn in one process; two Intel cores
(AVX512), torch 2.14, float32, four rows. mid is Stable Diffusion 1's own width on latents of 32 x
32, full the same on 64 x 64.

    conv3x3, the large ones as one product     mid 1.14   full 1.03
    linear by oneDNN                           mid 1.06   full 1.03, on AMD twice as fast a layer

Tried and dropped, with less than 5 % at either size: feed-forwards in pieces that fit the cache; glibc kept
from giving freed memory back.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LARGE = 2**22   # elements of a kernel


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's own operator may be called: it has no derivative, and is not compiled."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32 and not plain


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN, where ATen would call MKL, which is slow on AMD's processors."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def one_product(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution has a large 3 x 3 kernel and few positions: oneDNN's convolution rearranges the
    kernel at every call, which then takes longer than the sums."""
    like = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    few = x.ndim == 4 and 2 * len(x) * x.shape[2] * x.shape[3] <= conv.out_channels
    return like == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and few and conv.weight.numel() >= LARGE


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution as the product of its kernel and every position's neighbourhood.  (B, C, H, W)
    -> (B, out, H, W)"""
    out = linear(_neighbourhoods(x), weight.flatten(1), bias)                # (B, H W, out)
    return out.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()


def _neighbourhoods(x: Tensor) -> Tensor:
    """The 3 x 3 positions around each one, with zeros beyond the edges.  (B, C, H, W) -> (B, H W, C 9)"""
    x = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)               # (B, C, H, W, 3, 3)
    return x.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)

"""float32 3x3 convolutions of frozen models by the extension's Winograd kernels: see csrc/cpu/winograd.h."""

import torch
from torch import Tensor

from . import native


def why_not() -> str | None:
    """Why these kernels cannot run on this CPU; None where they can."""
    reason = native.available()
    if reason is None and not native.load().winograd_usable():
        return "Winograd's kernels need AVX2 or AVX-512, and PyTorch to use them (ATEN_CPU_CAPABILITY)"
    return reason


def pack(weight: Tensor) -> Tensor:
    """The weight (K, C, 3, 3) transformed, 36 values for every 9. In float64, rounded once."""
    return torch.ops.resnet_fast_native.winograd_pack(weight)


def conv(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_channels: int, residual: Tensor | None, relu: bool
) -> Tensor | None:
    """act(conv2d(x, padding=1) + residual), float32 and channels_last; None where a NaN or Inf arose.

    A tile would hand it on to outputs that PyTorch has no NaN in, so then another kernel has to compute all of it.
    """
    y, finite = torch.ops.resnet_fast_native.winograd_conv(x, packed, bias, out_channels, residual, relu)
    return y if finite else None

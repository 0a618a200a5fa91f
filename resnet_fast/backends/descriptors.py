"""Tensors as the tensor memory accelerator sees them: images, split images, matrices of weights, windows of a stem.

Activations are (N, C, H, W) tensors dense in channels_last. Every stride but the last is a multiple of 16 bytes, which
`kernels.configs.why_not` sees to. Importing this module needs Triton.
"""

import math

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..problems import STEM_WINDOW, StemProblem
from ..shapes import Conv


def split_by_stride(x: Tensor, geometry: Conv, box: tuple[int, ...]) -> TensorDescriptor:
    """Descriptor (N, H / s, s, W / s, s * C) of x for a convolution of stride s; of a 1x1, the pixels it reads."""
    if geometry.pointwise:
        return strided(x, geometry, box, split=True)
    x = aligned(x)
    batch, channels, height, width = x.shape
    step = geometry.stride[0]
    shape = [batch, height // step, step, width // step, step * channels]
    row = width * channels
    return TensorDescriptor(x, shape, [height * row, step * row, row, step * channels, 1], [*box[:2], 1, *box[2:]])


def strided(x: Tensor, geometry: Conv, box: tuple[int, ...], split: bool = False) -> TensorDescriptor:
    """Descriptor (N, P, Q, C) of the pixels that a 1x1 reads, with `split` as (N, P, 1, Q, C)."""
    x = aligned(x)
    batch, channels, height, width = x.shape
    down, right = geometry.stride
    row = width * channels
    shape, strides = [batch, geometry.out_height], [height * row, down * row]
    if split:
        shape, strides, box = [*shape, 1], [*strides, row], (*box[:2], 1, *box[2:])
    shape, strides = [*shape, geometry.out_width, channels], [*strides, right * channels, 1]
    return TensorDescriptor(x, shape, strides, list(box))


def image(tensor: Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    """Descriptor (N, H, W, C) of an image."""
    batch, channels, height, width = tensor.shape
    row = width * channels
    return TensorDescriptor(tensor, [batch, height, width, channels], [height * row, row, channels, 1], list(box))


def matrix(weight: Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor (K, everything else) of packed weights."""
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    return TensorDescriptor(aligned(weight), [rows, columns], [columns, 1], block)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where it starts at an address that no descriptor can have."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def windows(packed: Tensor, problem: StemProblem, box: tuple[int, ...]) -> TensorDescriptor:
    """Descriptor (N, H / 2, 2, Q, 32) of a stem's packed image: pixels are windows, which begin a stride apart and
    overlap."""
    batch, channels, height, width = packed.shape
    row = width * channels
    shape = [batch, height // 2, 2, problem.conv.out_width, STEM_WINDOW * channels]
    return TensorDescriptor(packed, shape, [height * row, 2 * row, row, 2 * channels, 1], [*box[:2], 1, *box[2:]])

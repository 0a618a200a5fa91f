"""A stem's max-pool behind batch norm and ReLU among the primitives of training, in Triton kernels.

`primitives.reference` is the contract. Kernels read channels_last; another layout, float64 and empty tensors are the
reference's.
"""

import torch
from torch import Tensor

from ..kernels.pool_train import pool as pool_kernel
from ..kernels.pool_train import pool_backward_apply as backward_apply_kernel
from ..kernels.pool_train import pool_backward_reduce as backward_reduce_kernel
from . import triton_batch_norm, triton_launch
from .primitives import Norm, reference
from .triton_batch_norm import dense, kernel_norm

_VALUES = 1024  # of y, or of dy, that a program has in registers at once: more spend them on predicates
_SLABS = 1024  # at most this many programs share a channel: a few for each multiprocessor


def pool(conv_out: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """`reference.pool`."""
    if triton_batch_norm.is_foreign(conv_out):
        return reference.pool(conv_out, norm)
    conv_out = dense(conv_out)
    (batch, channels, height, width), y = conv_out.shape, triton_launch.pooled_like(conv_out)
    index = torch.empty_like(y, dtype=torch.uint8)
    rows, columns = y.shape[2:]
    tile, count = triton_launch.pool_tile(channels, batch, rows, columns, _VALUES)
    args = (conv_out, kernel_norm(norm), y, index, height, width, rows, columns)
    triton_launch.launch(pool_kernel, conv_out, count, args, {"CHANNELS": channels, **tile}, None)
    return y, index


def backward_reduce(
    dy: Tensor, conv_out: Tensor, norm: Norm, relu: bool, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.backward_reduce`."""
    if index is None:
        return triton_batch_norm.backward_reduce(dy, conv_out, norm, relu)
    if triton_batch_norm.is_foreign(conv_out):
        return reference.backward_reduce(dy, conv_out, norm, relu, index)
    conv_out = dense(conv_out)
    dy, index, sizes, constants, tiles, blocks = _pooled(dy, index, conv_out)
    steps = -(-tiles // _SLABS)
    slabs, channels = -(-tiles // steps), conv_out.shape[1]
    sums = torch.empty(slabs, 2, channels, dtype=torch.float32, device=conv_out.device)
    args = (dy, index, conv_out, kernel_norm(norm), sums, *sizes, tiles, steps)
    triton_launch.launch(backward_reduce_kernel, conv_out, slabs * blocks, args, constants, None)
    sum_dz, sum_dzx = sums.sum(0)
    return sum_dz, sum_dzx


def backward_apply(
    dy: Tensor,
    conv_out: Tensor | None,
    norm: Norm,
    relu: bool,
    mean_dz: Tensor | None,
    mean_dzx: Tensor | None,
    index: Tensor | None = None,
) -> Tensor:
    """`reference.backward_apply`."""
    if index is None:
        return triton_batch_norm.backward_apply(dy, conv_out, norm, relu, mean_dz, mean_dzx)
    if triton_batch_norm.is_foreign(conv_out):
        return reference.backward_apply(dy, conv_out, norm, relu, mean_dz, mean_dzx, index)
    conv_out = dense(conv_out)
    dx = torch.empty_like(conv_out)
    dy, index, sizes, constants, tiles, blocks = _pooled(dy, index, conv_out)
    args = (dy, index, conv_out, kernel_norm(norm), mean_dz, mean_dzx, dx, *sizes)
    triton_launch.launch(backward_apply_kernel, conv_out, tiles * blocks, args, constants, None)
    return dx


def _pooled(dy: Tensor, index: Tensor, conv_out: Tensor):
    """dy and index as the kernels read them, the sizes and constants that they take, tiles, and blocks of channels."""
    (batch, channels, height, width), (rows, columns) = conv_out.shape, dy.shape[2:]
    tile, count = triton_launch.pool_tile(channels, batch, rows, columns, _VALUES)
    blocks = -(-channels // tile["BLOCK_CHANNELS"])
    sizes, constants = (height, width, rows, columns), {"CHANNELS": channels, **tile}
    return dense(dy.to(conv_out.dtype)), dense(index), sizes, constants, count // blocks, blocks

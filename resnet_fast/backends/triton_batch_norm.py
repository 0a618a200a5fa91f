"""Batch norm, ReLU and sums of outer products among the primitives of training, in Triton kernels.

`primitives.reference` is the contract. Kernels read channels_last; another layout, float64 and empty tensors are the
reference's. Tile sizes are constants: these kernels wait for memory, whatever their tiles.
"""

import torch
import triton as triton_package
from torch import Tensor

from ..kernels import batch_norm as kernels
from ..kernels import selection
from ..kernels.outer import outer as outer_kernel
from ..layout import memory_format
from ..problems import KERNEL_DTYPES, dtype_name
from . import triton_launch
from .primitives import Geometry, Norm, reference

_TILE = 4096  # values a program has in registers at once
_SLABS = 1024  # at most this many programs share a channel: a few for each multiprocessor
_BLOCK = 64  # rows, channels and pixels of a product
_SHIFT_PIXELS = 64  # of the first image; their mean is near enough to the mean for sums of squares not to cancel


def batch_statistics(conv_out: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.batch_statistics`."""
    if is_foreign(conv_out):
        return reference.batch_statistics(conv_out)
    conv_out = dense(conv_out)
    pixels, channels = _size(conv_out)
    tile, slab, slabs = _slabs(pixels, channels)
    means, m2s = torch.empty(2, slabs, channels, dtype=torch.float32, device=conv_out.device)
    counts = torch.empty(slabs, dtype=torch.float32, device=conv_out.device)
    constants = {"CHANNELS": channels, "SLAB": slab, **tile}
    args = (conv_out, (means, m2s, counts), pixels)
    triton_launch.launch(kernels.bn_statistics, conv_out, slabs * _tiles(channels, tile), args, constants, None)
    return merge_statistics(means, m2s, counts)


def merge_statistics(means: Tensor, m2s: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of partials: means and sums of squared deviations (P, C), counts (P,); float32."""
    partials, channels = means.shape
    mean, var = torch.empty(2, channels, dtype=torch.float32, device=means.device)
    constants = {"CHANNELS": channels, "BLOCK_PARTIALS": 256, "BLOCK_CHANNELS": 8}
    args = ((means, m2s, counts), mean, var, partials)
    triton_launch.launch(kernels.merge_statistics, means, -(-channels // 8), args, constants, None)
    return mean, var


def apply(
    conv_out: Tensor, norm: Norm, residual: Tensor | None = None, residual_norm: Norm | None = None, relu: bool = True
) -> Tensor:
    """`reference.apply`."""
    if is_foreign(conv_out):
        return reference.apply(conv_out, norm, residual, residual_norm, relu)
    conv_out = dense(conv_out)
    pixels, channels = _size(conv_out)
    y, tile = torch.empty_like(conv_out), _tile(channels)
    residual = None if residual is None else dense(residual.to(conv_out.dtype))
    args = (conv_out, kernel_norm(norm), residual, kernel_norm(residual_norm), y, pixels)
    constants = {"CHANNELS": channels, "RELU": relu, **tile}
    programs = -(-pixels // tile["BLOCK_PIXELS"]) * _tiles(channels, tile)
    triton_launch.launch(kernels.bn_apply, conv_out, programs, args, constants, None)
    return y


mask = reference.mask


def backward_reduce(dy: Tensor, conv_out: Tensor, norm: Norm, relu: bool) -> tuple[Tensor, Tensor]:
    """`reference.backward_reduce`."""
    if is_foreign(conv_out):
        return reference.backward_reduce(dy, conv_out, norm, relu)
    conv_out = dense(conv_out)
    pixels, channels = _size(conv_out)
    tile, slab, slabs = _slabs(pixels, channels)
    sums = torch.empty(slabs, 2, channels, dtype=torch.float32, device=conv_out.device)
    args = (dense(dy.to(conv_out.dtype)), conv_out, kernel_norm(norm), sums, pixels)
    constants = {"CHANNELS": channels, "RELU": relu, "SLAB": slab, **tile}
    triton_launch.launch(kernels.bn_backward_reduce, conv_out, slabs * _tiles(channels, tile), args, constants, None)
    sum_dz, sum_dzx = sums.sum(0)
    return sum_dz, sum_dzx


def backward_apply(
    dy: Tensor, conv_out: Tensor | None, norm: Norm, relu: bool, mean_dz: Tensor | None, mean_dzx: Tensor | None
) -> Tensor:
    """`reference.backward_apply`."""
    like = dy if conv_out is None else conv_out
    if is_foreign(like):
        return reference.backward_apply(dy, conv_out, norm, relu, mean_dz, mean_dzx)
    dy = dense(dy.to(like.dtype))
    pixels, channels = _size(dy)
    dx, tile = torch.empty_like(dy), _tile(channels)
    if not relu and mean_dz is None:
        conv_out = None
    conv_out = None if conv_out is None else dense(conv_out)
    args = (dy, conv_out, kernel_norm(norm), mean_dz, mean_dzx, dx, pixels)
    constants = {"CHANNELS": channels, "RELU": relu, **tile}
    programs = -(-pixels // tile["BLOCK_PIXELS"]) * _tiles(channels, tile)
    triton_launch.launch(kernels.bn_backward_apply, dy, programs, args, constants, None)
    return dx


def gram(x: Tensor, x_norm: Norm | None, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """`reference.gram`."""
    if _has_no_product(x):
        return reference.gram(x, x_norm, geometry)
    down, right = geometry.stride
    few = x[:1, :, ::down, ::right]
    few = few[:, :, : max(1, _SHIFT_PIXELS // few.shape[3]), :_SHIFT_PIXELS].contiguous(
        memory_format=torch.channels_last
    )
    few = few if x_norm is None else apply(few, x_norm)
    # Rounded, so that its difference from the many zeros behind a ReLU is exact.
    shift = few.mean((0, 2, 3), dtype=torch.float32).to(x.dtype).float()
    product, total, pixels = _outer(None, x, x_norm, geometry, shift)
    mean = total / pixels
    return mean + shift, product / pixels - torch.outer(mean, mean)


def outer(dz: Tensor, x: Tensor, x_norm: Norm | None, geometry: Geometry, mean: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.outer`."""
    if _has_no_product(x):
        return reference.outer(dz, x, x_norm, geometry, mean)
    rounded = mean.to(x.dtype).float()
    product, total, _ = _outer(dense(dz.to(x.dtype)), x, x_norm, geometry, rounded)
    return product - torch.outer(total, mean - rounded), total


def _outer(dz: Tensor | None, x: Tensor, x_norm, geometry: Geometry, mean: Tensor) -> tuple[Tensor, Tensor, int]:
    """The sums over pixels of the products and of the first operand, and how many pixels there are."""
    x = dense(x)
    (batch, channels, x_height, x_width), (down, right) = x.shape, geometry.stride
    height, width = -(-x_height // down), -(-x_width // right)
    pixels, rows = batch * height * width, channels if dz is None else dz.shape[1]
    # wgmma would take the first operand, which has just been computed, from registers, where Triton 3.6 overwrites what
    # is still being read; mma.sync, for fewer rows than wgmma's 64, is made for that.
    block_rows = _BLOCK // 2 if dz is None else _BLOCK
    tiles = -(-rows // block_rows) * -(-channels // _BLOCK)
    blocks = -(-pixels // _BLOCK)
    splits = min(blocks, max(1, _SLABS // tiles))
    steps = -(-blocks // splits)
    splits = -(-blocks // steps)
    product = torch.empty(splits, rows, channels, dtype=torch.float32, device=x.device)
    sums = torch.empty(splits, rows, dtype=torch.float32, device=x.device)
    args = (dz, x, kernel_norm(x_norm), mean, product, sums, pixels, height, width, x_height, x_width)
    constants = {
        "ROWS": rows,
        "CHANNELS": channels,
        "STRIDE_H": down,
        "STRIDE_W": right,
        "STEPS": steps,
        "BLOCK_PIXELS": _BLOCK,
        "BLOCK_ROWS": block_rows,
        "BLOCK_CHANNELS": _BLOCK,
    }
    triton_launch.launch(outer_kernel, x, splits * tiles, args, constants, None)
    return product.sum(0), sums.sum(0), pixels


def is_foreign(x: Tensor) -> bool:
    """Whether no kernel reads x: its layout or dtype is another, or it is empty."""
    layout = memory_format(x)
    return layout != torch.channels_last or dtype_name(x.dtype) not in KERNEL_DTYPES or x.numel() == 0


def _has_no_product(x: Tensor) -> bool:
    """Whether products of x are the reference's: float32's would be without tensor cores, and spill."""
    return is_foreign(x) or (x.dtype == torch.float32 and selection.why_not_float32() is not None)


def _tile(channels: int) -> dict[str, int]:
    block_channels = min(128, triton_package.next_power_of_2(channels))
    return {"BLOCK_PIXELS": _TILE // block_channels, "BLOCK_CHANNELS": block_channels}


def _slabs(pixels: int, channels: int) -> tuple[dict[str, int], int, int]:
    """The tile, the pixels of a slab, which is a power of two of tiles so that few kernels are compiled, and slabs."""
    tile = _tile(channels)
    slab = tile["BLOCK_PIXELS"]
    while -(-pixels // slab) > _SLABS:
        slab *= 2
    return tile, slab, -(-pixels // slab)


def _tiles(channels: int, tile: dict[str, int]) -> int:
    return -(-channels // tile["BLOCK_CHANNELS"])


def _size(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[1], x.shape[1]


def kernel_norm(norm: Norm | None) -> tuple:
    """A pending norm, or none, as kernels take it."""
    return tuple(triton_launch.Norm() if norm is None else triton_launch.Norm(None, *norm))


def dense(x: Tensor) -> Tensor:
    """x in channels_last, which is what kernels read; x itself where it is that already."""
    return x.contiguous(memory_format=torch.channels_last)

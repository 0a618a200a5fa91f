"""The primitives in plain PyTorch: the contract of the others, and what runs where a backend has no kernel of its own.

The arithmetic is done in the accumulation dtype (float64 for float64, else float32) and rounded once, where a tensor of
activations is made; convolutions are PyTorch's. `act(x)` below is x, or relu(norm(x)) rounded to x's dtype where a norm
is pending.
"""

import torch
from torch import Tensor

from ...layout import memory_format
from . import Geometry, Norm, Shortcut

_WINDOW = [3, 3], [2, 2], [1, 1]  # kernel, stride and padding of a stem's max-pool
_SLABS = 16  # of pixels in a sum of products
_SHIFT_PIXELS = 64  # of the first image; their mean is near enough to the mean for sums of squares not to cancel


def conv(
    x: Tensor, x_norm: Norm | None, conv_weight: Tensor, geometry: Geometry, stage: int, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """conv2d(act(x)), and its mean and biased variance over (N, H, W) as it is stored, (K,), if they are wanted.

    stage: up to which the layer may fuse (see `resnet_fast.training`); what a backend fuses less is computed in passes.
    """
    conv_out = _conv(_activated(x, x_norm), conv_weight, geometry)
    return conv_out, *(batch_statistics(conv_out) if statistics else (None, None))


def batch_statistics(conv_out: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over (N, H, W), each (C,)."""
    wide = _wide(conv_out)
    var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    # where values are infinite, so is batch_norm's mean
    return torch.where(mean.isnan(), wide.mean(dim=(0, 2, 3)), mean), var


def apply(
    conv_out: Tensor, norm: Norm, residual: Tensor | None = None, residual_norm: Norm | None = None, relu: bool = True
) -> Tensor:
    """act(norm(conv_out) + residual), or + residual_norm(residual): one pass over each."""
    total = _normalised(conv_out, norm)
    if residual is not None:
        total = total + (_wide(residual) if residual_norm is None else _normalised(residual, residual_norm))
    return (total.relu() if relu else total).to(conv_out.dtype, memory_format=memory_format(conv_out))


def pool(conv_out: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """max_pool of act(conv_out), 3x3 with stride 2 and padding 1, and where in its window each maximum is.

    The second is uint8, in y's shape: 3 times the row plus the column, of the first maximum, or of the last NaN.
    """
    return pooled(apply(conv_out, norm))


def pooled(activated: Tensor) -> tuple[Tensor, Tensor]:
    """`pool` of what is activated already."""
    y, flat = torch.ops.aten.max_pool2d_with_indices(activated, *_WINDOW)
    width, (top, left) = activated.shape[3], _corners(y)
    index = (flat // width - top) * 3 + flat % width - left
    return y, index.to(torch.uint8, memory_format=memory_format(y))


def unpool(dy: Tensor, index: Tensor, conv_out: Tensor) -> Tensor:
    """The gradient of `pool`'s activated input, as conv_out: of each pixel the sum of dy where it is the maximum.

    Rounded as PyTorch's; what spreads dy where it uses it need not round.
    """
    dy = dy.to(conv_out.dtype)
    local, (top, left) = index.long(), _corners(dy)
    flat = (local // 3 + top) * conv_out.shape[3] + local % 3 + left
    return torch.ops.aten.max_pool2d_with_indices_backward(dy, conv_out, *_WINDOW, [1, 1], False, flat)


def gram(x: Tensor, x_norm: Norm | None, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of act(x) over the pixels that a 1x1 convolution of this geometry reads."""
    rows = _rows(_activated(x, x_norm), geometry)
    shift = rows[:_SHIFT_PIXELS].mean(0)
    rows = rows - shift
    mean = rows.mean(0)
    return mean + shift, _product(rows, rows) / rows.shape[0] - torch.outer(mean, mean)


def conv_join(
    x: Tensor,
    x_norm: Norm | None,
    conv_weight: Tensor,
    geometry: Geometry,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """relu(norm(conv2d(act(x))) + residual, or residual_norm(residual), or the shortcut); a 1x1 whose raw output is
    never stored."""
    total = _normalised(_conv(_wide(_activated(x, x_norm)), _wide(conv_weight), geometry), norm)
    if residual is not None:
        total = total + (_wide(residual) if residual_norm is None else _normalised(residual, residual_norm))
    if shortcut is not None:
        branch = _conv(_wide(shortcut.x), _wide(shortcut.conv_weight), shortcut.geometry)
        total = total + _normalised(branch, shortcut.norm)
    return total.relu().to(x.dtype, memory_format=memory_format(x))


def mask(dy: Tensor, y: Tensor, layout_like: Tensor) -> Tensor:
    """dz: dy where relu's output y lets it pass (where y is not <= 0, so that NaN does), in `layout_like`'s format."""
    dz = torch.ops.aten.threshold_backward(dy.to(y.dtype), y, 0)
    return dz.contiguous(memory_format=memory_format(layout_like))


def backward_reduce(
    dy: Tensor, conv_out: Tensor, norm: Norm, relu: bool, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum(dz) and sum(dz * (conv_out - mean)) over (N, H, W), each (C,); dz is dy behind the ReLU of norm(conv_out),
    which is computed again, if there is one. index: of a `pool` behind the ReLU, whose output's gradient dy then is."""
    dz = _masked(dy, conv_out, norm, relu, index)
    return dz.sum((0, 2, 3)), (dz * (_wide(conv_out) - _vector(norm.mean, conv_out))).sum((0, 2, 3))


def backward_apply(
    dy: Tensor,
    conv_out: Tensor | None,
    norm: Norm,
    relu: bool,
    mean_dz: Tensor | None,
    mean_dzx: Tensor | None,
    index: Tensor | None = None,
) -> Tensor:
    """The gradient of conv_out: weight * rstd * (dz - mean_dz - (conv_out - mean) * rstd^2 * mean_dzx).

    mean_dz, mean_dzx: `backward_reduce`'s sums over all values of a channel, divided by their number; None where the
    statistics are not the batch's own, and then conv_out may be None too if there is no ReLU. index: of a `pool`, as in
    `backward_reduce`.
    """
    dz = _masked(dy, conv_out, norm, relu, index)
    if mean_dz is not None:
        rstd = torch.rsqrt(norm.var.to(dz.dtype) + norm.eps)
        centered = _wide(conv_out) - _vector(norm.mean, conv_out)
        dz = dz - _vector(mean_dz, dy) - centered * _vector(rstd * rstd * mean_dzx, dy)
    return (dz * _vector(norm.scale(dz.dtype), dy)).to(
        dy.dtype, memory_format=memory_format(dy if index is None else conv_out)
    )


def conv_backward(
    dconv_out: Tensor,
    x: Tensor,
    x_norm: Norm | None,
    conv_weight: Tensor,
    geometry: Geometry,
    stage: int,
    wants_dx: bool,
    wants_dweight: bool,
    add: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of act(x), plus `add`, and of conv_weight; None for what is not wanted."""
    activated = _activated(x, x_norm) if wants_dweight else x
    dx, dweight = None, None
    if wants_dx or wants_dweight:
        arguments = (*geometry[:3], False, [0, 0], geometry.groups, [wants_dx, wants_dweight, False])
        dx, dweight, _ = torch.ops.aten.convolution_backward(dconv_out, activated, conv_weight, None, *arguments)
    if add is not None and wants_dx:
        dx = dx.add_(add)
    return dx, dweight


def outer(dz: Tensor, x: Tensor, x_norm: Norm | None, geometry: Geometry, mean: Tensor) -> tuple[Tensor, Tensor]:
    """sum of dz (outer) (act(x) - mean) over the pixels of a 1x1, (K, C), and sum(dz), (K,)."""
    dz_rows = _rows(dz)
    return _product(dz_rows, _rows(_activated(x, x_norm), geometry) - mean), dz_rows.sum(0)


def gram_dgrad(
    dz: Tensor,
    x: Tensor,
    x_norm: Norm | None,
    geometry: Geometry,
    dz_matrix: Tensor,
    x_matrix: Tensor,
    mean: Tensor,
    constant: Tensor,
    add: Tensor | None = None,
) -> Tensor:
    """dz @ dz_matrix + (act(x) - mean) @ x_matrix + constant by pixel: (K, C), (C, C), (C,), (C,); plus `add`, as x.

    The gradient of act(x), in x's dtype and format; zero (or `add`) where a stride skips a pixel.
    """
    rows = _rows(dz) @ dz_matrix + (_rows(_activated(x, x_norm), geometry) - mean) @ x_matrix + constant
    batch, _, height, width = dz.shape
    image = rows.view(batch, height, width, -1).permute(0, 3, 1, 2)
    if geometry.stride != [1, 1]:
        whole = _wide(torch.zeros_like(x))
        whole[:, :, :: geometry.stride[0], :: geometry.stride[1]] = image
        image = whole
    if add is not None:
        image = image + add
    return image.to(x.dtype).contiguous(memory_format=memory_format(x))


def _activated(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else apply(x, norm)


def _normalised(conv_out: Tensor, norm: Norm) -> Tensor:
    """norm(conv_out), not rounded."""
    wide = _wide(conv_out)
    total = (wide - _vector(norm.mean, wide)) * _vector(norm.scale(wide.dtype), wide)
    return total if norm.bias is None else total + _vector(norm.bias, wide)


def _masked(dy: Tensor, conv_out: Tensor | None, norm: Norm, relu: bool, index: Tensor | None) -> Tensor:
    dz = _wide(dy if index is None else unpool(dy, index, conv_out))
    return dz.masked_fill(_normalised(conv_out, norm) <= 0, 0.0) if relu else dz


def _corners(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column at which each window begins, over `pooled`'s pixels."""
    rows, columns = (torch.arange(size, device=pooled.device) * 2 - 1 for size in pooled.shape[2:])
    return rows[:, None], columns


def _rows(image: Tensor, geometry: Geometry | None = None) -> Tensor:
    """The pixels, of a strided 1x1 those that it reads, as the rows of a matrix (N * H * W, C)."""
    if geometry is not None:
        image = image[:, :, :: geometry.stride[0], :: geometry.stride[1]]
    return _wide(image).permute(0, 2, 3, 1).flatten(0, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left.t() @ right, slab by slab: in one run over all pixels a float32 sum loses more than batch_norm's own."""
    slabs = zip(left.chunk(_SLABS), right.chunk(_SLABS), strict=True)
    return torch.stack([some.t() @ others for some, others in slabs]).sum(0)


def _conv(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution(x, conv_weight, None, stride, padding, dilation, False, [0, 0], groups)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _vector(vector: Tensor, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return vector.to(dtype).view(1, -1, 1, 1)

"""The primitives: the C++ extension's passes and convolutions, or PyTorch's convolutions (oneDNN's, cuDNN's).

Where a CPU has AMX, convolutions in channels_last, of bfloat16 or float32, without groups and of 32 channels or a
multiple are the extension's tile products, forward and backward, with the norm before them and their statistics inside,
unless another way was measured to be faster (`backends.programs`).

Elsewhere a dense 3x3 in channels_last, of float32, is Winograd's, and so are its gradients, where that is faster
(`backends.winograd`), with the norm before it and its statistics inside. In the Gram form a 1x1 in channels_last, of
float32, float64 or bfloat16, is a product of matrices that does not leave the cache between its prologue and its
epilogue. What none of that fits (NCHW, groups, float16, whose products few CPUs have in hardware) takes PyTorch's
convolution and passes, or `reference`.
"""

import torch
from torch import Tensor

from ...extension import op
from ...layout import memory_format
from ...memory import pooled
from ...training import EPILOGUE
from .. import programs, units, winograd
from . import Geometry, Norm, Shortcut, arguments, reference

_PRODUCT_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

_bn_statistics = op("bn_statistics")
_bn_apply = op("bn_apply")
_bn_backward_reduce = op("bn_backward_reduce")
_bn_backward_apply = op("bn_backward_apply")
_relu_mask = op("relu_mask")
_bn_max_pool = op("bn_max_pool")
_bn_max_pool_backward_reduce = op("bn_max_pool_backward_reduce")
_bn_max_pool_backward_apply = op("bn_max_pool_backward_apply")
_conv1x1_join = op("conv1x1_join")
_gram = op("gram")
_outer = op("outer")
_gram_dgrad = op("gram_dgrad")
_conv_train = op("conv_train")
_conv_train_backward = op("conv_train_backward")


def conv(
    x: Tensor, x_norm: Norm | None, conv_weight: Tensor, geometry: Geometry, stage: int, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`reference.conv`."""
    if stage >= EPILOGUE and _is_tiled(x, conv_weight, geometry, "output"):
        conv_out, mean, var = _conv_train(x, *arguments(x_norm), conv_weight, *geometry[:3], statistics)
        return conv_out, *((mean, var) if statistics else (None, None))
    conv_out, mean, var = _convolved(x, x_norm, conv_weight, geometry, statistics and stage >= EPILOGUE)
    return conv_out, *(batch_statistics(conv_out) if statistics and mean is None else (mean, var))


def batch_statistics(conv_out: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.batch_statistics`."""
    if conv_out.numel() == 0:
        return reference.batch_statistics(conv_out)
    return _bn_statistics(conv_out)


def apply(
    conv_out: Tensor, norm: Norm, residual: Tensor | None = None, residual_norm: Norm | None = None, relu: bool = True
) -> Tensor:
    """`reference.apply`."""
    if conv_out.numel() == 0:
        return reference.apply(conv_out, norm, residual, residual_norm, relu)
    return _bn_apply(conv_out, *arguments(norm), residual, *arguments(residual_norm), relu)


def pool(conv_out: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """`reference.pool`."""
    return (
        _bn_max_pool(conv_out, *arguments(norm), True)
        if _is_rows(conv_out)
        else reference.pooled(apply(conv_out, norm))
    )


def gram(x: Tensor, x_norm: Norm | None, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """`reference.gram`."""
    if not _is_rows(x):
        return reference.gram(_activated(x, x_norm), None, geometry)
    return _gram(x, *arguments(x_norm), geometry.stride)


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
    """`reference.conv_join`; a shortcut is computed first, and stored."""
    if shortcut is not None:
        residual, residual_norm = _joined(shortcut.x, None, *shortcut[1:], None, None, relu=False), None
    return _joined(x, x_norm, conv_weight, geometry, norm, residual, residual_norm, relu=True)


def mask(dy: Tensor, y: Tensor, layout_like: Tensor) -> Tensor:
    """`reference.mask`."""
    return reference.mask(dy, y, layout_like) if y.numel() == 0 else _relu_mask(dy, y, layout_like)


def backward_reduce(
    dy: Tensor, conv_out: Tensor, norm: Norm, relu: bool, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.backward_reduce`."""
    if index is not None and _is_rows(conv_out):
        return _bn_max_pool_backward_reduce(dy, index, conv_out, *arguments(norm))
    dy = dy if index is None else reference.unpool(dy, index, conv_out)
    if dy.numel() == 0:
        return reference.backward_reduce(dy, conv_out, norm, relu)
    return _bn_backward_reduce(dy, conv_out, *arguments(norm), relu)


def backward_apply(
    dy: Tensor,
    conv_out: Tensor | None,
    norm: Norm,
    relu: bool,
    mean_dz: Tensor | None,
    mean_dzx: Tensor | None,
    index: Tensor | None = None,
) -> Tensor:
    """`reference.backward_apply`, in the memory format of conv_out where that is given."""
    if index is not None and _is_rows(conv_out):
        return _bn_max_pool_backward_apply(dy, index, conv_out, *arguments(norm), mean_dz, mean_dzx)
    dy = dy if index is None else reference.unpool(dy, index, conv_out)
    if dy.numel() == 0:
        return reference.backward_apply(dy, conv_out, norm, relu, mean_dz, mean_dzx)
    return _bn_backward_apply(dy, conv_out, *arguments(norm), relu, mean_dz, mean_dzx)


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
    """`reference.conv_backward`."""
    tiled = [
        wanted and stage >= EPILOGUE and _is_tiled(x, conv_weight, geometry, of)
        for of, wanted in (("data_gradient", wants_dx), ("weight_gradient", wants_dweight))
    ]
    dx = dweight = None
    if any(tiled):
        operands = (dconv_out, x, *arguments(x_norm), conv_weight, *geometry[:3])
        grads = _conv_train_backward(*operands, add if tiled[0] else None, tiled)
        dx, dweight = (grad if tiles else None for grad, tiles in zip(grads, tiled, strict=True))
    rest = wants_dx and dx is None, wants_dweight and dweight is None
    if any(rest):
        by_winograd = _by_winograd(dconv_out, x, x_norm, conv_weight, geometry, *rest, add)
        dx, dweight = (own if other is None else other for own, other in zip((dx, dweight), by_winograd, strict=True))
    rest = wants_dx and dx is None, wants_dweight and dweight is None
    if any(rest):
        activated = _activated(x, x_norm) if rest[1] else x
        with pooled():
            by_library = reference.conv_backward(dconv_out, activated, None, conv_weight, geometry, stage, *rest, add)
        dx, dweight = (own if other is None else other for own, other in zip((dx, dweight), by_library, strict=True))
    return dx, dweight


def outer(dz: Tensor, x: Tensor, x_norm: Norm | None, geometry: Geometry, mean: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.outer`."""
    if not _is_rows(x):
        return reference.outer(dz, _activated(x, x_norm), None, geometry, mean)
    return _outer(dz, x, *arguments(x_norm), geometry.stride, mean)


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
    """`reference.gram_dgrad`."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    matrices = (dz_matrix, x_matrix, mean, constant, add)
    if not _is_rows(x):
        return reference.gram_dgrad(dz, _activated(x, x_norm), None, geometry, *matrices)
    return _gram_dgrad(dz, x, *arguments(x_norm), geometry.stride, *matrices)


def _activated(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else apply(x, norm)


def _convolved(
    x: Tensor, x_norm: Norm | None, conv_weight: Tensor, geometry: Geometry, statistics: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """conv2d(act(x)); where they are wanted and Winograd computes it, its mean and variance."""
    stride, padding, dilation, groups = geometry
    if _is_rows(x) and winograd.takes(x, conv_weight, geometry):
        if x.dtype != winograd.DTYPE:
            x, x_norm = _activated(x, x_norm), None
        found = winograd.conv(x, x_norm, conv_weight, statistics)
        if found is not None:
            return found
    activated = _activated(x, x_norm)
    with pooled():
        return torch.conv2d(activated, conv_weight, None, stride, padding, dilation, groups), None, None


def _by_winograd(
    dconv_out: Tensor,
    x: Tensor,
    x_norm: Norm | None,
    conv_weight: Tensor,
    geometry: Geometry,
    wants_dx: bool,
    wants_dweight: bool,
    add: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of act(x), plus `add`, and of conv_weight, as far as they are wanted and Winograd takes them."""
    dx = dweight = None
    if _is_rows(x) and _is_rows(dconv_out):
        if wants_dx and winograd.takes_data_gradient(x, conv_weight, geometry):
            dx = winograd.data_gradient(dconv_out, conv_weight, add)
        if wants_dweight and winograd.takes_weight_gradient(x, conv_weight, geometry):
            if x.dtype != winograd.DTYPE:
                x, x_norm = _activated(x, x_norm), None
            dweight = winograd.weight_gradient(dconv_out, x, x_norm, conv_weight)
    return dx, dweight


def _joined(x, x_norm, conv_weight, geometry, norm, residual, residual_norm, relu: bool) -> Tensor:
    if not _is_product(x, conv_weight, geometry):
        return apply(_convolved(x, x_norm, conv_weight, geometry)[0], norm, residual, residual_norm, relu)
    stride, joined = geometry.stride, (residual, *arguments(residual_norm))
    return _conv1x1_join(x, *arguments(x_norm), conv_weight, stride, *arguments(norm), *joined, relu)


def _is_rows(x: Tensor) -> bool:
    """Whether CPU memory holds x pixel by pixel and its strides say so, which those of one pixel or channel may not."""
    wanted = torch.channels_last
    if not x.is_cpu or not x.is_contiguous(memory_format=wanted):
        return False
    return min(x.shape) > 1 or (x.numel() > 0 and memory_format(x) == wanted)


def _is_tiled(x: Tensor, conv_weight: Tensor, geometry: Geometry, of: str) -> bool:
    can = x.dtype in units.TILE_DTYPES and _is_rows(x) and units.has_tiles()
    return can and programs.takes_training(x, conv_weight, geometry, of)


def _is_product(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> bool:
    pointwise = conv_weight.shape[2:] == (1, 1) and geometry.groups == 1 and not any(geometry.padding)
    return pointwise and x.dtype in _PRODUCT_DTYPES and _is_rows(x)

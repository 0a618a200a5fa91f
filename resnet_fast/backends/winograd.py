"""3x3 convolutions by the extension's Winograd kernels, of float32: see csrc/cpu/winograd.h.

Of frozen models, whose weights are transformed once, and of models whose weights may change, where they are in every
call: those of optimized blocks, and in training both gradients. There is a choice by shape, `takes` and its like, which
is as `kernels.selection` says. In bfloat16, where the CPU multiplies it in AVX-512 (F(2x2, 3x3) in dot products), the
same but for norms and statistics, which are passes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cpus
from ..extension import op
from ..kernels import selection
from ..kernels.configs import WinogradConfig
from ..problems import ConvProblem, Problem, WeightGradientProblem, dtype_name
from ..shapes import BlockShapes, Conv
from . import units
from .primitives import Geometry, Norm, arguments

DTYPE = torch.float32
"""Of what has transforms of its own; in bfloat16 only dot products (`by_dots`) are worth any."""

_winograd_pack = op("winograd_pack")
_winograd_conv_packed = op("winograd_conv_packed")
_winograd_dots_conv = op("winograd_dots_conv")
_winograd_conv_train = op("winograd_conv_train")
_winograd_conv = op("winograd_conv")
_winograd_dots_weight_gradient = op("winograd_dots_weight_gradient")
_winograd_weight_gradient = op("winograd_weight_gradient")


def why_not() -> str | None:
    """Why these kernels cannot run on this CPU; None where they can."""
    return units.why_no_vectors()


def takes(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> bool:
    """Whether Winograd is to compute the convolution of x, on a CPU in channels_last."""
    return computes(x.dtype) and _takes(_live, *_shapes(x, conv_weight, geometry), x.dtype)


def takes_data_gradient(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> bool:
    """The same of the gradient of x."""
    return computes(x.dtype) and _takes(_data_gradient, *_shapes(x, conv_weight, geometry), x.dtype)


def takes_weight_gradient(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> bool:
    """The same of the gradient of conv_weight."""
    return computes(x.dtype) and _takes(_weight_gradient, *_shapes(x, conv_weight, geometry), x.dtype)


def layers(x: Tensor, conv_weights: Sequence[Tensor], geometry: Sequence[int], downsample: bool) -> tuple[int, ...]:
    """Which of a block's layers, as `ops.residual_block` takes them, Winograd is to compute."""
    if not computes(x.dtype):
        return ()
    return _layers(x.shape, tuple(weight.shape for weight in conv_weights), tuple(geometry), downsample, x.dtype)


def computes(dtype: torch.dtype) -> bool:
    """Whether convolutions of this dtype have Winograd's products to choose, where the kernels can run."""
    return dtype == DTYPE or by_dots(dtype)


def by_dots(dtype: torch.dtype) -> bool:
    """Whether those are F(2x2, 3x3) in dot products."""
    return dtype == torch.bfloat16 and units.unit(dtype) == "dots"


def takes_folded(conv: Conv) -> bool:
    """Whether Winograd is to compute this convolution of a program, whose weights do not change."""
    return by_dots(torch.bfloat16) and _chosen(ConvProblem(conv, "bfloat16"))


def pack(weight: Tensor) -> Tensor:
    """The weight (K, C, 3, 3) transformed, 36 values for every 9, for `conv_packed`."""
    return _winograd_pack(weight)


def conv_packed(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_channels: int, residual: Tensor | None, relu: bool
) -> Tensor | None:
    """act(conv2d(x, padding=1) + residual), float32 and channels_last; None where a NaN or Inf arose.

    A tile would hand it on to outputs that PyTorch has no NaN in, so then another kernel has to compute all of it.
    """
    y, finite = _winograd_conv_packed(x, packed, bias, out_channels, residual, relu)
    return y if finite else None


def conv(
    x: Tensor, x_norm: Norm | None, conv_weight: Tensor, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """conv2d(act(x), padding=1), where a norm may be pending on x, and its mean and variance if wanted; as above.

    In bfloat16 neither norm nor statistics.
    """
    if x.dtype != DTYPE:
        y, finite = _winograd_dots_conv(x, conv_weight, None, False)
        return (y, None, None) if finite else None
    y, mean, var, finite = _winograd_conv_train(x, *arguments(x_norm), conv_weight, statistics)
    return (y, *((mean, var) if statistics else (None, None))) if finite else None


def data_gradient(dy: Tensor, conv_weight: Tensor, add: Tensor | None) -> Tensor | None:
    """The gradient of x, plus `add`, from that of `conv`; None as `conv_packed`."""
    if dy.dtype != DTYPE:
        dx, finite = _winograd_dots_conv(dy, conv_weight, add, True)
    else:
        dx, finite = _winograd_conv(dy, conv_weight, None, None, add, False, True)
    return dx if finite else None


def weight_gradient(dy: Tensor, x: Tensor, x_norm: Norm | None, conv_weight: Tensor) -> Tensor | None:
    """The gradient of conv_weight (K, C, 3, 3), in its memory format, for act(x); None as `conv_packed`.

    In bfloat16 no norm may be pending.
    """
    if x.dtype != DTYPE:
        dweight, finite = _winograd_dots_weight_gradient(dy, x, conv_weight)
        return dweight if finite else None
    dweight, finite = _winograd_weight_gradient(dy, x, *arguments(x_norm), conv_weight)
    return dweight if finite else None


def _shapes(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> tuple:
    stride, padding, dilation, groups = geometry
    return x.shape, conv_weight.shape, tuple(stride), tuple(padding), tuple(dilation), groups


@selection.remember
def _takes(kind, x_shape, weight_shape, stride, padding, dilation, groups, dtype) -> bool:
    return _chosen(kind(Conv.of(x_shape, weight_shape, stride, padding, dilation, groups), dtype))


@selection.remember
def _layers(x_shape, weight_shapes, geometry, downsample, dtype) -> tuple[int, ...]:
    convs = BlockShapes.of(x_shape, weight_shapes, geometry, downsample).all_convs
    return tuple(number for number, conv in enumerate(convs) if _chosen(_live(conv, dtype)))


def _chosen(problem: Problem | None) -> bool:
    if problem is None or why_not() is not None:
        return False
    return isinstance(selection.choose(problem, cpus.here()).config, WinogradConfig)


def _live(conv: Conv, dtype: torch.dtype = DTYPE) -> ConvProblem:
    return ConvProblem(conv, dtype_name(dtype), relu=False, folded=False)


def _data_gradient(conv: Conv, dtype: torch.dtype) -> ConvProblem | None:
    return None if conv.data_gradient is None else _live(conv.data_gradient, dtype)


def _weight_gradient(conv: Conv, dtype: torch.dtype) -> WeightGradientProblem:
    return WeightGradientProblem(conv, dtype_name(dtype))

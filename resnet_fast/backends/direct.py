"""Convolutions by the extension's direct kernel, of float32: csrc/cpu/direct_conv.h.

Those of optimized blocks in eval mode, by weights that may change, and those of frozen models, where that is faster
than oneDNN and Winograd (`kernels.selection`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cpus
from ..extension import op
from ..kernels import selection
from ..kernels.configs import DirectConfig
from ..problems import ConvProblem
from ..shapes import BlockShapes
from . import units
from .primitives import Geometry

DTYPE = torch.float32

_direct_conv = op("direct_conv")
_direct_pack = op("direct_pack")
_direct_conv_packed = op("direct_conv_packed")


def layers(x: Tensor, conv_weights: Sequence[Tensor], geometry: Sequence[int], downsample: bool) -> tuple[int, ...]:
    """Which of a block's layers, as `ops.residual_block` takes them, it is to compute; none where it cannot run."""
    if x.dtype != DTYPE:
        return ()
    return _layers(x.shape, tuple(weight.shape for weight in conv_weights), tuple(geometry), downsample)


def computes_stem(x: Tensor, conv_weight: Tensor, geometry: Sequence[int]) -> bool:
    """Whether it is to compute a stem's convolution, with which the max-pool behind it is one pass.

    x (N, C, H, W), conv_weight (K, C, R, S), geometry: seven numbers, as `ops.stem`'s.
    """
    if x.dtype != DTYPE or conv_weight.dtype != DTYPE:
        return False
    return _layers(x.shape, (conv_weight.shape,), tuple(geometry), False) == (0,)


def conv(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> Tensor:
    """conv2d(x (N, C, H, W), conv_weight (K, C, R, S)) -> (N, K, P, Q), float32, in channels_last; without groups.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or more than 64 taps.
    """
    stride, padding, dilation, _ = geometry
    return _direct_conv(x, conv_weight, None, None, None, stride, padding, dilation, False)


def pack(weight: Tensor) -> Tensor:
    """A weight (K, C, R, S), float32, -> (panels of 64 outputs, R, S, C, 64), ordered for this CPU's `conv_packed`.

    Raises:
        RuntimeError: no such weight, or more than 64 taps.
    """
    return _direct_pack(weight)


def conv_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_channels: int,
    residual: Tensor | None,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    relu: bool,
) -> Tensor:
    """act(conv2d(x (N, C, H, W)) + bias (K,) + residual (N, K, P, Q)) -> (N, K, P, Q), float32, in channels_last.

    packed: by `pack`. out_channels: K. geometry: stride, padding and dilation in pairs.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    return _direct_conv_packed(x, packed, out_channels, bias, residual, *geometry, relu)


@selection.remember
def _layers(x_shape, weight_shapes, geometry, downsample) -> tuple[int, ...]:
    if units.why_no_vectors() is not None:
        return ()
    convs = BlockShapes.of(x_shape, weight_shapes, geometry, downsample).all_convs
    return tuple(number for number, conv in enumerate(convs) if _is_chosen(ConvProblem(conv, "float32", folded=False)))


def _is_chosen(problem: ConvProblem) -> bool:
    return isinstance(selection.choose(problem, cpus.here()).config, DirectConfig)

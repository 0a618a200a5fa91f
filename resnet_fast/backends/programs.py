"""Where the extension's own products, `units.unit`, are taken: for blocks and frozen networks, then programs, and
for the convolutions of a training step.

Wherever they can be, unless the other way was measured to be faster (`kernels.selection`, `resnet-fast tune --device
cpu`): oneDNN's convolutions, or Winograd's, one by one.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cpus
from ..kernels import selection
from ..problems import SectionProblem, TrainingConvProblem, dtype_name
from ..shapes import BlockShapes, Conv
from .primitives import Geometry


def takes_block(x: Tensor, conv_weights: Sequence[Tensor], geometry: Sequence[int], downsample: bool) -> bool:
    """Whether a residual block in eval mode, as `ops.residual_block` takes it, is to be a program."""
    return _takes_block(x.shape, tuple(w.shape for w in conv_weights), tuple(geometry), downsample, x.dtype)


def why_not_section(problem: SectionProblem) -> str | None:
    """Why this section is not to be a program; None where it is."""
    choice = selection.choose(problem, cpus.here())
    return choice.reason if choice.config is None else None


def takes_training(x: Tensor, conv_weight: Tensor, geometry: Geometry, of: str) -> bool:
    """Whether a training step's convolution, or a gradient (TrainingConvProblem's `of`), is to be tile products."""
    stride, padding, dilation, groups = geometry
    shapes = x.shape, conv_weight.shape, tuple(stride), tuple(padding), tuple(dilation), groups
    return selection.choose(_training_problem(*shapes, x.dtype, of), cpus.here()).config is not None


@functools.lru_cache(selection.REMEMBERED)
def _training_problem(x_shape, weight_shape, stride, padding, dilation, groups, dtype, of: str) -> TrainingConvProblem:
    conv = Conv.of(x_shape, weight_shape, stride, padding, dilation, groups)
    return TrainingConvProblem(conv, dtype_name(dtype), of)


@selection.remember
def _takes_block(x_shape, weight_shapes, geometry, downsample, dtype: torch.dtype) -> bool:
    block = BlockShapes.of(x_shape, weight_shapes, geometry, downsample)
    name = dtype_name(dtype)
    return why_not_section(SectionProblem((block,), name, folded=False)) is None

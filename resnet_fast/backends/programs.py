"""Blocks and frozen networks on CPUs: one program of the extension's own products, or convolution by convolution.

What multiplies is `native.unit`; where there is one, a program is taken unless the other way was measured to be faster
(`kernels.selection`, `resnet-fast tune --device cpu`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cpus
from ..kernels import selection
from ..problems import BlockShapes, SectionProblem


def takes_block(x: Tensor, conv_weights: Sequence[Tensor], geometry: Sequence[int], downsample: bool) -> bool:
    """Whether a residual block in eval mode, as `ops.residual_block` takes it, is to be a program."""
    return _takes_block(x.shape, tuple(w.shape for w in conv_weights), tuple(geometry), downsample, x.dtype)


def why_not_section(problem: SectionProblem) -> str | None:
    """Why this section is not to be a program; None where it is."""
    choice = selection.choose(problem, cpus.here())
    return choice.reason if choice.config is None else None


@selection.remember
def _takes_block(x_shape, weight_shapes, geometry, downsample, dtype: torch.dtype) -> bool:
    block = BlockShapes.of(x_shape, weight_shapes, geometry, downsample)
    name = str(dtype).removeprefix("torch.")
    return why_not_section(SectionProblem((block,), name, folded=False)) is None

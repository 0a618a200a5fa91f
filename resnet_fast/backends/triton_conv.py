"""The convolutions among the primitives of training (`primitives.reference` is the contract), in Triton kernels.

Each takes the kernel that `kernels.selection` names for its problem; where that is none, the library's convolution and
passes of `triton_batch_norm` around it, with the reason logged once. Kernels read channels_last; anything else, and
float64, is the reference's.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .. import _log, gpus
from ..kernels import selection
from ..kernels.configs import Config, pixel_tiles, why_only_frozen
from ..problems import ConvProblem, GramDgradProblem, Problem, PrologueProblem, dtype_name
from ..shapes import Conv
from ..training import EPILOGUE, PROLOGUE
from . import triton_batch_norm, triton_launch
from .primitives import Geometry, Norm, Shortcut, reference
from .triton_batch_norm import dense

Result = TypeVar("Result")
Output = tuple[Tensor, Tensor | None, Tensor | None]


def conv(
    x: Tensor, x_norm: Norm | None, conv_weight: Tensor, geometry: Geometry, stage: int, statistics: bool
) -> Output:
    """`reference.conv`: stage 2 sums up the statistics in the convolution's epilogue, 3 transforms in its prologue."""
    if triton_batch_norm.is_foreign(x):
        return reference.conv(x, x_norm, conv_weight, geometry, stage, statistics)
    found = None
    if x_norm is not None and stage >= PROLOGUE:
        found = _conv_prologue(x, x_norm, conv_weight, geometry, statistics)
    if found is None:
        x = _activated(x, x_norm)
        if stage >= EPILOGUE:
            found = _conv_epilogue(x, conv_weight, geometry, statistics)
    if found is None:
        conv_out = _library(x, conv_weight, geometry)
        found = conv_out, *(triton_batch_norm.batch_statistics(conv_out) if statistics else (None, None))
    return found


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
    """`reference.conv_join` in one kernel; behind a prologue, the shortcut's convolution is a kernel of its own."""
    if triton_batch_norm.is_foreign(x):
        return reference.conv_join(x, x_norm, conv_weight, geometry, norm, residual, residual_norm, shortcut)
    y = None
    if x_norm is not None:
        y = _join_prologue(x, x_norm, conv_weight, geometry, norm, residual, residual_norm, shortcut)
    if y is None:
        y = _join(_activated(x, x_norm), conv_weight, geometry, norm, residual, residual_norm, shortcut)
    return y


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
    """`reference.conv_backward`: from stage 2 on dx is the forward kernel's, on the weights turned round."""
    if triton_batch_norm.is_foreign(x):
        return reference.conv_backward(dconv_out, x, x_norm, conv_weight, geometry, stage, wants_dx, wants_dweight, add)
    dx = None
    if wants_dx and stage >= EPILOGUE:
        dx = _dgrad(dconv_out, x, conv_weight, geometry, add)
    from_library = wants_dx and dx is None, wants_dweight
    if not any(from_library):
        return dx, None
    activated = _activated(x, x_norm) if wants_dweight else x
    arguments = (*geometry[:3], False, [0, 0], geometry.groups, [*from_library, False])
    more, dweight, _ = torch.ops.aten.convolution_backward(dconv_out, activated, conv_weight, None, *arguments)
    if from_library[0]:
        dx = more if add is None else more.add_(add)
    return dx, dweight


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
    """`reference.gram_dgrad` in one kernel; the pixels that a stride skips are filled around it."""
    arguments = (dz, x, x_norm, geometry, dz_matrix, x_matrix, mean, constant, add)
    if triton_batch_norm.is_foreign(x):
        return reference.gram_dgrad(*arguments)
    down, right = geometry.stride
    read, added = (image if image is None else dense(image[:, :, ::down, ::right]) for image in (x, add))
    batch, channels, height, width = read.shape
    layer = Conv(batch, channels, height, width, dz.shape[1])
    problem = GramDgradProblem(layer, dtype_name(x.dtype), x_norm is not None, add is not None)

    def run(config):
        dx = _blank(layer.x_shape, x)
        matrices = (matrix.t().to(x.dtype).contiguous() for matrix in (dz_matrix, x_matrix))
        triton_launch.gram_dgrad(dense(dz), read, _norm(x_norm), *matrices, mean, constant, added, dx, problem, config)
        return dx

    dx = _in_own_kernel(problem, x, run, "products in float32")
    if dx is None:
        return reference.gram_dgrad(*arguments)
    if (down, right) == (1, 1):
        return dx
    whole = torch.zeros_like(x, memory_format=torch.channels_last) if add is None else dense(add.clone())
    whole[:, :, ::down, ::right] = dx
    return whole


def _conv_prologue(x, x_norm, conv_weight, geometry: Geometry, statistics: bool) -> Output | None:
    layer = _layer(x, conv_weight, geometry)
    problem = PrologueProblem(layer, dtype_name(x.dtype), statistics)

    def run(config):
        y, partial = _blank(layer.y_shape, x), _partial(config, problem, x)
        triton_launch.conv_prologue(
            dense(x), _norm(x_norm), _packed(conv_weight, layer, x), y, problem, config, statistics=partial
        )
        return y, *_merged(partial)

    return _in_own_kernel(problem, x, run, "a pass before its convolution")


def _conv_epilogue(x, conv_weight, geometry: Geometry, statistics: bool) -> Output | None:
    layer = _layer(x, conv_weight, geometry)
    problem = ConvProblem(layer, dtype_name(x.dtype), relu=False, statistics=statistics)

    def run(config):
        y, partial = _blank(layer.y_shape, x), _partial(config, problem, x)
        weight = _packed(conv_weight, layer, x)
        triton_launch.conv(dense(x), weight, y, problem, config, triton_launch.Norm(), statistics=partial)
        return y, *_merged(partial)

    return _in_own_kernel(problem, x, run, "cuDNN and a pass for its statistics")


def _join_prologue(x, x_norm, conv_weight, geometry, norm, residual, residual_norm, shortcut) -> Tensor | None:
    layer = _layer(x, conv_weight, geometry)
    has_residual = residual is not None or shortcut is not None
    problem = PrologueProblem(
        layer, dtype_name(x.dtype), False, True, has_residual, has_residual and residual_norm is not None
    )

    def run(config):
        y = _blank(layer.y_shape, x)
        added = _branch(shortcut) if shortcut is not None else None if residual is None else dense(residual)
        weight = _packed(conv_weight, layer, x)
        norms = _norm(norm), added, _norm(residual_norm)
        triton_launch.conv_prologue(dense(x), _norm(x_norm), weight, y, problem, config, *norms)
        return y

    return _in_own_kernel(problem, x, run, "a pass before its convolution")


def _join(x, conv_weight, geometry, norm, residual, residual_norm, shortcut, relu: bool = True) -> Tensor:
    layer = _layer(x, conv_weight, geometry)
    branch = None if shortcut is None else _layer(shortcut.x, shortcut.conv_weight, shortcut.geometry)
    has_residual = residual is not None
    problem = ConvProblem(
        layer,
        dtype_name(x.dtype),
        has_residual,
        branch,
        folded=False,
        relu=relu,
        residual_norm=has_residual and residual_norm is not None,
    )

    def run(config):
        y = _blank(layer.y_shape, x)
        more = {}
        if shortcut is not None:
            packed = _packed(shortcut.conv_weight, branch, x)
            more = {"shortcut": dense(shortcut.x), "shortcut_weight": packed, "shortcut_norm": _norm(shortcut.norm)}
        elif has_residual:
            more = {"residual": dense(residual), "residual_norm": _norm(residual_norm)}
        triton_launch.conv(dense(x), _packed(conv_weight, layer, x), y, problem, config, _norm(norm), **more)
        return y

    y = _in_own_kernel(problem, x, run, "cuDNN and a pass behind it")
    if y is None:
        if shortcut is not None:
            residual, residual_norm = _library(*shortcut[:3]), shortcut.norm
        y = triton_batch_norm.apply(_library(x, conv_weight, geometry), norm, residual, residual_norm, relu)
    return y


def _branch(shortcut: Shortcut) -> Tensor:
    """The shortcut's norm(conv(x)), stored."""
    return _join(*shortcut, None, None, None, relu=False)


def _dgrad(dconv_out, x, conv_weight, geometry: Geometry, add) -> Tensor | None:
    """dx as a convolution of dconv_out with the weights rotated and transposed; None where it is none, or slower."""
    layer = _layer(x, conv_weight, geometry).data_gradient
    if layer is None:
        return None
    turned = (conv_weight.flip(2, 3) if max(layer.kernel) > 1 else conv_weight).transpose(0, 1)
    problem = ConvProblem(layer, dtype_name(x.dtype), add is not None, relu=False)

    def run(config):
        dx = _blank(layer.y_shape, x)
        weight, added = _packed(turned, layer, x), None if add is None else dense(add)
        triton_launch.conv(dense(dconv_out), weight, dx, problem, config, triton_launch.Norm(), added)
        return dx

    return _in_own_kernel(problem, x, run, "cuDNN")


def _in_own_kernel(problem: Problem, x: Tensor, run: Callable[[Config], Result], instead: str) -> Result | None:
    """What `run(config)` returns, or None, with the reason logged, where another path is to be taken."""
    gpu, reason = gpus.of_tensor(x), why_only_frozen(problem)
    if reason is None:
        choice = selection.choose(problem, gpu)
        if choice.config is not None:
            try:
                return run(choice.config)
            except triton_launch.REFUSALS as error:
                if selection.is_forced(problem):
                    raise
                selection.refuse(problem, gpu, f"{type(error).__name__}: {error}")
        reason = selection.choose(problem, gpu).reason
    _log.once(f"triton: {problem.key} takes {instead}: {reason}", logging.INFO)
    return None


def _partial(config: Config, problem: Problem, x: Tensor):
    """Where the epilogue leaves its statistics, or None where there are none to leave."""
    if not problem.statistics:
        return None
    rows, channels = pixel_tiles(config, problem), problem.conv.out_channels
    shapes = (rows, channels), (rows, channels), (rows,)
    return triton_launch.Statistics(*(_blank_sums(shape, x) for shape in shapes))


def _merged(partial) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if partial is None else triton_batch_norm.merge_statistics(*partial)


def _activated(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else triton_batch_norm.apply(x, norm)


def _library(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution(x, conv_weight, None, stride, padding, dilation, False, [0, 0], groups)


def _norm(norm: Norm | None):
    return None if norm is None else triton_launch.Norm(None, *norm)


def _packed(conv_weight: Tensor, layer: Conv, x: Tensor) -> Tensor:
    return triton_launch.pack_conv(conv_weight, ConvProblem(layer, dtype_name(x.dtype)))


def _layer(x: Tensor, conv_weight: Tensor, geometry: Geometry) -> Conv:
    return Conv.of(x.shape, conv_weight.shape, *geometry)


def _blank(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _blank_sums(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)

"""A 3x3 on the CPU by oneDNN and by Winograd, as networks call them: for `tune`."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import frozen
from ..backends import winograd
from ..backends.primitives import Geometry, reference
from ..kernels.configs import Config
from ..problems import ConvProblem, WeightGradientProblem
from ..training import LIBRARY as LIBRARY_STAGE
from . import workload
from .workload import Outputs, Run, Workload

LIBRARY = "onednn"


def of(problem: ConvProblem | WeightGradientProblem) -> Workload:
    """The workload of a convolution without shortcut, or of a weight's gradient."""
    if isinstance(problem, WeightGradientProblem):
        return _weight_gradient(problem)
    return _folded(problem) if problem.folded else _live(problem)


def _folded(problem: ConvProblem) -> Workload:
    """Of a frozen network. oneDNN's run is right once: it adds into the residual."""
    images, weights = workload.conv_inputs(problem, workload.Source(problem, "cpu"))
    layer, x, residual = _layer(problem, weights), images["x"], images.get("residual")
    written = None if residual is None else residual.clone()

    @torch.no_grad()
    def onednn() -> Outputs:
        return {"y": layer.by_onednn(x, written, overwrite_residual=True)}

    ours = torch.no_grad()(lambda: {"y": layer.by_winograd(x, residual)})
    return replace(workload.of(problem, "cpu"), kernel=_always(ours), library={LIBRARY: onednn})


def _live(problem: ConvProblem) -> Workload:
    """Of a network whose weight may change, so that it is transformed in every run."""
    conv, source = problem.conv, workload.Source(problem, "cpu")
    x, weight = source.image(conv.x_shape), source.conv(conv)["weight"]
    geometry = Geometry.of(conv)

    def onednn(x: Tensor, weight: Tensor) -> Outputs:
        return {"y": reference.conv(x, None, weight, geometry, LIBRARY_STAGE, statistics=False)[0]}

    def ours() -> Outputs:
        return {"y": winograd.conv(x, None, weight, False)[0]}

    return _workload(onednn, (x, weight), ours)


def _weight_gradient(problem: WeightGradientProblem) -> Workload:
    conv, source = problem.conv, workload.Source(problem, "cpu")
    dy, x, weight = source.image(conv.y_shape), source.image(conv.x_shape).relu_(), source.conv(conv)["weight"]
    geometry = Geometry.of(conv)

    def onednn(dy: Tensor, x: Tensor, weight: Tensor) -> Outputs:
        wants = {"wants_dx": False, "wants_dweight": True}
        return {"dweight": reference.conv_backward(dy, x, None, weight, geometry, LIBRARY_STAGE, **wants)[1]}

    return _workload(onednn, (dy, x, weight), lambda: {"dweight": winograd.weight_gradient(dy, x, None, weight)})


def _workload(onednn: Callable[..., Outputs], tensors: tuple[Tensor, ...], ours: Run) -> Workload:
    def exact() -> Outputs:
        return onednn(*(tensor.double() for tensor in tensors))

    def library() -> Outputs:
        return onednn(*tensors)

    return Workload(exact, library, _always(ours), {LIBRARY: library}, {})


def _always(run: Run) -> Callable[[Config], Run]:
    """There is one configuration."""
    return lambda config: run


def _layer(problem: ConvProblem, weights: Outputs) -> frozen.FrozenConv2d:
    conv = problem.conv
    geometry = (conv.kernel, conv.stride, conv.padding, conv.dilation, conv.groups)
    stock = nn.Conv2d(conv.in_channels, conv.out_channels, *geometry, device="meta")
    stock.weight, stock.bias = (nn.Parameter(weights[name]) for name in ("weight", "bias"))
    return frozen.FrozenConv2d(stock, None, problem.relu, None)

"""A 3x3 of a frozen network on the CPU, by oneDNN and by Winograd, as frozen networks call them: for `tune`."""

from dataclasses import replace

import torch
from torch import nn

from .. import frozen
from ..kernels.configs import Config
from ..problems import ConvProblem
from . import workload
from .workload import Run, Workload

LIBRARY = "onednn"


def of(problem: ConvProblem) -> Workload:
    """The workload of a folded convolution without shortcut. oneDNN's run is right once: it adds into the residual."""
    images, weights = workload.conv_inputs(problem, workload.Source(problem, "cpu"))
    layer, x, residual = _layer(problem, weights), images["x"], images.get("residual")
    written = None if residual is None else residual.clone()

    @torch.no_grad()
    def onednn() -> workload.Outputs:
        return {"y": layer.by_onednn(x, written, overwrite_residual=True)}

    def winograd(config: Config) -> Run:
        return torch.no_grad()(lambda: {"y": layer.by_winograd(x, residual)})

    return replace(workload.of(problem, "cpu"), kernel=winograd, library={LIBRARY: onednn})


def _layer(problem: ConvProblem, weights: workload.Outputs) -> frozen.FrozenConv2d:
    conv = problem.conv
    geometry = (conv.kernel, conv.stride, conv.padding, conv.dilation, conv.groups)
    stock = nn.Conv2d(conv.in_channels, conv.out_channels, *geometry, device="meta")
    stock.weight, stock.bias = (nn.Parameter(weights[name]) for name in ("weight", "bias"))
    return frozen.FrozenConv2d(stock, None, problem.relu, None)

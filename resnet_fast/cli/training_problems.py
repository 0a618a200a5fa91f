"""What the blocks of a network choose kernels for in a training step on the Triton backend, in whichever stage.

The counterpart of `backends.triton_conv`, which asks `kernels.selection` for each of these where statistics are the
batch's own. The library's convolutions for weights' gradients, and for data gradients that are no convolution, are no
choice and not listed. A data gradient of stride 1 is the forward kernel's on turned weights, and its problem that of a
convolution.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..blocks import fast_type
from ..kernels.configs import why_only_frozen
from ..layers import conv_of
from ..problems import ConvProblem, GramDgradProblem, Problem, PrologueProblem
from ..shapes import Conv
from . import networks


def of_network(name: str, shape: tuple[int, int, int, int], dtype: str) -> Iterator[Problem]:
    """Of all blocks of the network `name` for images of `shape`, some more than once."""
    inputs: dict[nn.Module, tuple[int, ...]] = {}

    def note(block: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs[block] = tuple(arguments[0].shape)

    with torch.device("meta"), torch.no_grad():
        model = networks.untrained(name).eval()
        for block in model.modules():
            if fast_type(block):
                block.register_forward_pre_hook(note)
        model(torch.empty(shape))
    for block, x_shape in inputs.items():
        yield from of_block(block, x_shape, dtype)


def of_block(block: nn.Module, x_shape: tuple[int, ...], dtype: str) -> Iterator[Problem]:
    """Of one block, stock or fast, for an input of `x_shape`."""
    found = (*_main(block, x_shape, dtype), *_shortcut(block, x_shape, dtype))
    yield from (problem for problem in found if why_only_frozen(problem) is None)


def _main(block: nn.Module, x_shape: tuple[int, ...], dtype: str) -> Iterator[Problem]:
    stages, shape = fast_type(block)._stages(block), x_shape
    for number, (conv, _) in enumerate(stages):
        layer = conv_of(conv, shape)
        yield ConvProblem(layer, dtype, relu=False, statistics=True)
        if number and layer.pointwise and layer.groups == 1:
            yield PrologueProblem(layer, dtype, statistics=True)
        yield from _data_gradient(layer, dtype, add=number == 0)
        if number == len(stages) - 1 and _expands(layer):
            for residual_norm in (False, True) if block.downsample else (False,):
                yield PrologueProblem(layer, dtype, joined=True, residual=True, residual_norm=residual_norm)
            yield from _joins(block, layer, x_shape, dtype)
            yield _gram(layer, dtype, prologue=number > 0)
        shape = layer.y_shape


def _shortcut(block: nn.Module, x_shape: tuple[int, ...], dtype: str) -> Iterator[Problem]:
    if block.downsample is None:
        return
    layer = conv_of(block.downsample[0], x_shape)
    yield ConvProblem(layer, dtype, relu=False, statistics=True)
    yield from _data_gradient(layer, dtype, add=False)
    if _expands(layer):
        yield ConvProblem(layer, dtype, relu=False)
        yield ConvProblem(layer, dtype, residual=True)
        yield _gram(layer, dtype, prologue=False)


def _joins(block: nn.Module, last: Conv, x_shape: tuple[int, ...], dtype: str) -> Iterator[ConvProblem]:
    """The last convolution where its input is activated in a pass of its own."""
    yield ConvProblem(last, dtype, residual=True)
    if block.downsample is not None:
        yield ConvProblem(last, dtype, shortcut=conv_of(block.downsample[0], x_shape))


def _data_gradient(layer: Conv, dtype: str, add: bool) -> Iterator[ConvProblem]:
    if (gradient := layer.data_gradient) is not None:
        yield ConvProblem(gradient, dtype, residual=add, relu=False)


def _gram(layer: Conv, dtype: str, prologue: bool) -> GramDgradProblem:
    read = Conv(layer.batch, layer.in_channels, layer.out_height, layer.out_width, layer.out_channels)
    return GramDgradProblem(read, dtype, prologue)


def _expands(layer: Conv) -> bool:
    return layer.pointwise and layer.groups == 1 and layer.in_channels < layer.out_channels

"""The training ops as every backend runs them: the ops' lists as layers and records, and the algorithm on them.

An empty tensor in a list stands for an absent one. Gradients of weights keep the weights' own strides.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..training import RECORD
from . import residual_block
from .primitives import Geometry
from .residual_block import Grads, Layer, Record, Wants


def make(primitives: Callable[[], ModuleType]) -> tuple[Callable, ...]:
    """residual_block_train, residual_block_backward, stem_train, stem_backward by the primitives that are loaded."""

    def residual_block_train(
        x, residual, conv_weights, weights, biases, running_means, running_vars,
        geometry, eps, batch_statistics, downsample, stages, group,
    ):  # fmt: skip
        """`ops.residual_block_train`."""
        layers = _layers(
            conv_weights, weights, biases, running_means, running_vars, geometry, eps, batch_statistics, stages
        )
        y, records = residual_block.forward(primitives(), x, residual, layers, downsample, group)
        return y, _flat(records, x)

    def residual_block_backward(
        dy, x, y, conv_weights, weights, biases, records,
        geometry, eps, batch_statistics, downsample, identity, stages, output_mask, group,
    ):  # fmt: skip
        """`ops.residual_block_backward`."""
        nothing = [x.new_empty(0)] * len(conv_weights)
        layers = _layers(conv_weights, weights, biases, nothing, nothing, geometry, eps, batch_statistics, stages)
        wants = _wants(output_mask, len(layers), downsample)
        dx, dz, grads = residual_block.backward(
            primitives(), dy, x, y, layers, _records(records), wants, downsample, identity, group
        )
        outputs = (dx, dz if output_mask[1] else None, *_columns(grads, layers))
        return [x.new_empty(0) if grad is None else grad for grad in outputs]

    def stem_train(x, conv_weight, weight, bias, running_mean, running_var, geometry, eps, group):
        """`ops.stem_train`."""
        layer = Layer(conv_weight, weight, bias, running_mean, running_var, _geometry(geometry), eps, True, 1)
        y, record = residual_block.stem_forward(primitives(), x, layer, group)
        return y, _flat([record], x)

    def stem_backward(dy, x, conv_weight, weight, bias, records, geometry, eps, output_mask, group):
        """`ops.stem_backward`."""
        layer = Layer(conv_weight, weight, bias, None, None, _geometry(geometry), eps, True, 1)
        wants_dx, *wanted = output_mask
        (record,) = _records(records)
        dx, grads = residual_block.stem_backward(
            primitives(), dy, x, layer, record, Wants(*wanted, input=wants_dx), group
        )
        return [x.new_empty(0) if grad is None else grad for grad in (dx, *_columns([grads], [layer]))]

    ops = (residual_block_train, residual_block_backward, stem_train, stem_backward)
    return tuple(map(_without_autocast, ops))


def _without_autocast(op: Callable) -> Callable:
    """Inside an op the dtypes are settled: a product in float32 must not be cast once more."""

    @functools.wraps(op)
    def run(tensor, *args):
        if not torch.is_autocast_enabled(tensor.device.type):  # as in most backward passes
            return op(tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return op(tensor, *args)

    return run


def _layers(conv_weights, weights, biases, means, variances, geometry, eps, batch_statistics, stages) -> list[Layer]:
    columns = zip(conv_weights, weights, biases, means, variances, strict=True)
    return [
        Layer(
            conv_weight,
            *(None if vector.numel() == 0 else vector for vector in vectors),
            _geometry(geometry[7 * number : 7 * number + 7]),
            eps[number],
            batch_statistics[number],
            stages[number],
        )
        for number, (conv_weight, *vectors) in enumerate(columns)
    ]


def _geometry(numbers) -> Geometry:
    return Geometry(list(numbers[0:2]), list(numbers[2:4]), list(numbers[4:6]), numbers[6])


def _flat(records: list[Record], x: Tensor) -> list[Tensor]:
    entries = [getattr(record, name) for record in records for name in RECORD]
    return [x.new_empty(0) if entry is None else entry for entry in entries]


def _records(flat: list[Tensor]) -> list[Record]:
    entries = [None if tensor.numel() == 0 else tensor for tensor in flat]
    width = len(RECORD)
    return [Record(*entries[at : at + width]) for at in range(0, len(entries), width)]


def _wants(output_mask, count: int, downsample: bool) -> list[Wants]:
    """output_mask: of x, the residual, then of all convolutions' weights, of all norms' weights, of all biases."""
    columns = [output_mask[2 + kind * count : 2 + (kind + 1) * count] for kind in range(3)]
    wants, below = [], output_mask[0]
    for number, (conv_weight, weight, bias) in enumerate(zip(*columns, strict=True)):
        is_branch = downsample and number == count - 1
        wants.append(Wants(conv_weight, weight, bias, output_mask[0] if is_branch else below))
        below = below or conv_weight or weight or bias
    return wants


def _columns(grads: list[Grads], layers: list[Layer]) -> list[Tensor | None]:
    conv_weights = [
        _as_strided_like(grad.conv_weight, layer.conv_weight) for grad, layer in zip(grads, layers, strict=True)
    ]
    return [*conv_weights, *(grad.weight for grad in grads), *(grad.bias for grad in grads)]


def _as_strided_like(grad: Tensor | None, conv_weight: Tensor) -> Tensor | None:
    if grad is None or grad.stride() == conv_weight.stride():
        return grad
    return torch.empty_like(conv_weight).copy_(grad)

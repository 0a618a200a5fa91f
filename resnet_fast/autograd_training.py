"""Gradients of the training ops: one autograd node a residual block, one for the stem.

Saved are the block's input and output, the convolutions' raw outputs and the statistics, each only where a gradient
that is wanted needs it. Under create_graph=True the gradients are computed again in differentiable PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, ops
from .autograd import seen_through
from .training import GRAM, RECORD

_ops = torch.ops.resnet_fast


def _setup_residual_block_train(ctx, inputs, output):
    (x, residual, conv_weights, weights, biases, _means, _variances,
     geometry, eps, batch_statistics, downsample, stages, group, backend) = inputs  # fmt: skip
    y, records = output
    ctx.mark_non_differentiable(*records)
    ctx.set_materialize_grads(False)
    count = len(conv_weights)
    wanted = list(ctx.needs_input_grad[: 2 + 3 * count])
    records = _needed(records, wanted, count, downsample, batch_statistics, stages)
    ctx.save_for_backward(x, y, *conv_weights, *weights, *biases, *records)
    ctx.count, ctx.wanted, ctx.identity = count, wanted, residual is None and not downsample
    ctx.block = (geometry, eps, batch_statistics, downsample, stages, group, backend)


def _needed(records, wanted, count: int, downsample: bool, batch_statistics, stages) -> list[Tensor]:
    """`records` without the raw outputs that no wanted gradient is computed from."""
    records, below = list(records), wanted[0]
    own = [wanted[2 + number : 2 + 3 * count : count] for number in range(count)]  # conv_weight, weight, bias
    last = count - 1 - downsample
    for number in range(count):
        joined = number >= last  # no ReLU of its own behind it, nor a layer
        wants_conv = own[number][0] or (wanted[0] if number > last else below)
        needed = any(own[number][1:]) or (wants_conv and (batch_statistics[number] or not joined))
        if not joined:  # it is what the next layer reads
            after = own[number + 1]
            needed = needed or after[0] or (stages[number + 1] == GRAM and any(after))
        below = below or any(own[number])
        if not needed:
            at = number * len(RECORD)
            records[at] = records[at].new_empty(0)
    return records


def _residual_block_train_backward(ctx, dy, _drecords, run=None):
    """run: in the place of `ops.residual_block_backward`."""
    x, y, *saved = ctx.saved_tensors
    geometry, eps, batch_statistics, downsample, stages, group, backend = ctx.block
    count, nothing = ctx.count, (None,) * 7
    none = [None] * count
    if dy is None:
        return None, None, none, none, none, none, none, *nothing
    conv_weights, weights, biases = (saved[at : at + count] for at in (0, count, 2 * count))
    records = saved[3 * count :]
    if torch.is_grad_enabled():
        grads = _differentiable(ctx, dy, x, y, conv_weights, weights, biases, records)
    else:
        grads = (run or _ops.residual_block_backward)(
            dy, x, y, conv_weights, weights, biases, records,
            geometry, eps, batch_statistics, downsample, ctx.identity, stages, ctx.wanted, group, backend,
        )  # fmt: skip
    like = (x, y, *conv_weights, *weights, *biases)
    dx, dresidual, *grads = (
        grad.to(tensor.dtype) if wanted else None for grad, wanted, tensor in zip(grads, ctx.wanted, like, strict=True)
    )
    columns = (grads[at : at + count] for at in (0, count, 2 * count))
    return dx, dresidual, *map(list, columns), none, none, *nothing


def _differentiable(ctx, dy, x, y, conv_weights, weights, biases, records) -> list[Tensor | None]:
    """The gradients as a differentiable function of dy and of what the block was given."""
    geometry, eps, batch_statistics, downsample, _stages, group, _backend = ctx.block
    if group:
        raise NotImplementedError(
            "a second derivative through a residual block with SyncBatchNorm is not implemented; "
            "run it under resnet_fast.disabled()"
        )
    count, width = ctx.count, len(RECORD)

    def layer(value: Tensor, number: int) -> Tensor:
        at = 7 * number
        pairs = (tuple(geometry[at : at + 2]), tuple(geometry[at + 2 : at + 4]), tuple(geometry[at + 4 : at + 6]))
        mean, var = records[number * width + 1 : number * width + 3]
        return _conv_bn(
            value, conv_weights[number], weights[number], biases[number], mean, var, pairs, geometry[at + 6],
            eps[number], batch_statistics[number],
        )  # fmt: skip

    value = x
    for number in range(count - downsample):
        value = layer(value if number == 0 else value.relu(), number)
    if downsample:
        value = value + layer(x, count - 1)
    dz = dy.masked_fill(y.detach() <= 0, 0.0)
    inputs = (x, None, *conv_weights, *weights, *biases)
    grads = _grads(value, inputs, dz, ctx.wanted)
    if ctx.identity and ctx.wanted[0]:
        grads[0] = grads[0] + dz
    if ctx.wanted[1]:
        grads[1] = dz
    return grads


def _setup_stem_train(ctx, inputs, output):
    x, conv_weight, weight, bias, _mean, _var, geometry, eps, group, backend = inputs
    _, records = output
    ctx.mark_non_differentiable(*records)
    ctx.set_materialize_grads(False)
    ctx.wanted = list(ctx.needs_input_grad[:4])
    ctx.save_for_backward(x, conv_weight, weight, bias, *records)
    ctx.stem = (geometry, eps, group, backend)


def _stem_train_backward(ctx, dy, _drecords):
    if dy is None:
        return (None,) * 10
    x, conv_weight, weight, bias, *records = ctx.saved_tensors
    geometry, eps, group, backend = ctx.stem
    like = (x, conv_weight, weight, bias)
    if torch.is_grad_enabled():
        if group:
            raise NotImplementedError(
                "a second derivative through a stem with SyncBatchNorm is not implemented; "
                "run it under resnet_fast.disabled()"
            )
        pairs = (tuple(geometry[:2]), tuple(geometry[2:4]), tuple(geometry[4:6]))
        value = _conv_bn(x, conv_weight, weight, bias, *records[1:3], pairs, geometry[6], eps, True)
        grads = _grads(F.max_pool2d(value.relu(), 3, 2, 1), like, dy, ctx.wanted)
    else:
        grads = _ops.stem_backward(dy, x, conv_weight, weight, bias, records, geometry, eps, ctx.wanted, group, backend)
    grads = (
        grad.to(tensor.dtype) if wanted else None for grad, wanted, tensor in zip(grads, ctx.wanted, like, strict=True)
    )
    return *grads, *(None,) * 6


def _conv_bn(x, conv_weight, weight, bias, mean, var, pairs, groups, eps, batch_statistics) -> Tensor:
    """bn(conv(x)) in differentiable PyTorch; an absent vector is None or empty."""
    conv_out = F.conv2d(x, conv_weight, None, *pairs, groups)
    weight, bias = (None if vector is None or vector.numel() == 0 else vector for vector in (weight, bias))
    if batch_statistics:
        return F.batch_norm(conv_out, None, None, weight, bias, True, 0.0, eps)
    dtype = conv_out.dtype if weight is None else weight.dtype
    return F.batch_norm(conv_out, mean.to(dtype), var.to(dtype), weight, bias, False, 0.0, eps)


def _grads(value: Tensor, inputs, dvalue: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """Of those `inputs` that are wanted and not None, differentiable."""
    places = [place for place, tensor in enumerate(inputs) if tensor is not None and wanted[place]]
    result: list[Tensor | None] = [None] * len(inputs)
    if places:
        found = torch.autograd.grad(value, [inputs[place] for place in places], dvalue, create_graph=True)
        for place, grad in zip(places, found, strict=True):
            result[place] = grad
    return result


_block_backward = seen_through(_residual_block_train_backward)


class ResidualBlockTrain(torch.autograd.Function):
    """`ops.residual_block_train` and its gradient, called straight: y and the records.

    apply(x, residual, *conv_weights, *weights, *biases, *running_means, *running_vars, then the op's other arguments).
    The op costs the host half a millisecond more a block, which can be longer than a GPU takes for it.
    """

    @staticmethod
    def forward(ctx, x, residual, *rest):
        """Also what the op's backward needs."""
        tensors, settings = rest[: -len(_SETTINGS)], rest[-len(_SETTINGS) :]
        count = len(tensors) // 5
        columns = [list(tensors[at : at + count]) for at in range(0, len(tensors), count)]
        *arguments, backend = settings
        y, records = dispatch.load(backend).residual_block_train(x, residual, *columns, *arguments)
        _setup_residual_block_train(ctx, (x, residual, *columns, *settings), (y, records))
        return y, *records

    @staticmethod
    def backward(ctx, dy, *drecords):
        """Of x, the residual, the weights of convolutions and norms, and the biases."""
        dx, dresidual, *columns = _block_backward(ctx, dy, drecords, run=_run_backward)
        return dx, dresidual, *(grad for column in columns[:5] for grad in column), *columns[5:]


_SETTINGS = ("geometry", "eps", "batch_statistics", "downsample", "stages", "group", "backend")


def _run_backward(*arguments) -> list[Tensor]:
    *arguments, backend = arguments
    return dispatch.load(backend).residual_block_backward(*arguments)


for _name, _setup, _backward in (
    ("residual_block_train", _setup_residual_block_train, _block_backward),
    ("stem_train", _setup_stem_train, seen_through(_stem_train_backward)),
):
    torch.library.register_autograd(f"resnet_fast::{_name}", _backward, setup_context=_setup, lib=ops.library)

"""A whole residual block, and a ResNet's stem: one autograd node each where something is learnt.

y = relu(F(x) + shortcut(x))        He et al. 2015, https://arxiv.org/abs/1512.03385
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments, dispatch, training
from ..autograd_training import ResidualBlockTrain
from ..context import cast, conv_dtype, is_traced
from ..training import RECORD
from .conv_bn_act import (
    ConvBn,
    apply_layer,
    cast_layer,
    checked,
    checked_layer,
    conv_bn_shortcut_act,
    learns_any,
    needs_plain_pytorch,
    update_running,
)
from .repeat import Repeatable

_ops = torch.ops.resnet_fast


def residual_block(
    x: Tensor,
    main: Sequence[ConvBn],
    shortcut: ConvBn | Tensor | None = None,
    *,
    train_stage: int | str = "auto",
    group: str = "",
    backend: str = "auto",
    keep: Callable[[Repeatable], None] | None = None,
) -> Tensor:
    """relu(F(x) + shortcut), F being the layers of `main` with a ReLU between each two.

    One autograd node, which saves x, y and raw convolution outputs, no activation between them. Where nothing is
    learnt and all statistics are running ones, one op that saves nothing.

    Args:
        x: (N, C, H, W), as `conv_bn_act`'s.
        main: the block's convolutions with their batch norms, in order: two of a basic block, three of a bottleneck.
        shortcut: the downsample's convolution and batch norm; a tensor of the output's shape; or None, which is x.
        train_stage: how much is fused, 1 to 4 (see `resnet_fast.training`), or "auto": RESNET_FAST_TRAIN if it is
            set, else what is fastest.
        group: name of the torch.distributed process group over which statistics in training are taken (SyncBatchNorm),
            "" for this process alone.
        backend: as `conv_bn_act`.
        keep: called with what repeats this call, where nothing is learnt and the shortcut is no tensor.

    Returns:
        y: (N, K, P, Q) in the convolutions' output dtype and memory format.

    Raises:
        As `conv_bn_act`; and ValueError where `main` is empty, `train_stage` is no stage, shapes do not fit each other,
        a process of a group has an empty batch, or a convolution of a group a bias.
    """
    if not main:
        raise ValueError("main must have at least one convolution, but is empty")
    stage, requested = training.requested(train_stage), backend
    downsample = isinstance(shortcut, ConvBn)
    layers = [*main, shortcut] if downsample else list(main)
    _check_group(x, group)
    residual = None if downsample else shortcut
    learns = learns_any(x, residual, *(tensor for layer in layers for tensor in layer.tensors))
    has_bias = any(layer.conv_bias is not None for layer in layers)
    inference = not (learns or any(layer.training for layer in layers))
    if group and has_bias:
        raise ValueError("group: statistics over processes are only taken of convolutions without a conv_bias")
    # By name, Triton has to have a kernel for each convolution, which is told when each is an op of its own.
    if needs_plain_pytorch(x) or has_bias or (inference and dispatch.requested(backend) == "triton"):
        return _layer_by_layer(x, main, shortcut, backend)

    given_x, given = x, layers
    x, layers, shapes = _checked_chain(x, main, shortcut if downsample else None)
    for layer, shape in zip(layers, shapes, strict=True):
        arguments.check_batch(shape, layer.training and not group)
    out_shape = shapes[len(main) - 1]
    if downsample and shapes[-1] != out_shape:
        raise ValueError(f"shortcut gives {shapes[-1]} and main {out_shape}; they must have one shape")
    if not downsample:
        arguments.check_residual(x if residual is None else residual, out_shape, x.device)
        residual = cast(residual, x.dtype)
    numbers = [number for layer in layers for number in _geometry(layer)]
    epsilons = [layer.eps for layer in layers]
    if inference:
        backend = dispatch.select("residual_block", x.device.type, x.dtype, backend)
        op, rest = _inference_op("residual_block", x, backend), (*_columns(x, layers), numbers, epsilons, downsample)
        if keep is not None and residual is None and not is_traced(x):
            keep(Repeatable(given_x, given, requested, op, rest, out_shape))
        return op(x, residual, *rest)
    layers = [cast_layer(layer, x.dtype) for layer in layers]
    backend = dispatch.select("residual_block_train", x.device.type, x.dtype, backend)
    stages = training.stages(stage, layers, downsample, x.device.type, x.dtype, backend)
    columns, training_now = _columns(x, layers), [layer.training for layer in layers]
    settings = (numbers, epsilons, training_now, downsample, stages, group, backend)
    if is_traced(x):
        y, records = _ops.residual_block_train(x, residual, *columns, *settings)
    else:
        vectors = (tensor for column in columns for tensor in column)
        y, *records = ResidualBlockTrain.apply(x, residual, *vectors, *settings)
    _update(layers, records, shapes, group)
    return y


def stem(x: Tensor, layer: ConvBn, *, group: str = "", backend: str = "auto") -> Tensor:
    """max_pool2d(relu(batch_norm(conv2d(x))), 3, stride 2, padding 1).

    With the batch's own statistics one autograd node, which saves x and the convolution's output and neither activation
    nor pooling indices; one op too with running ones where nothing is learnt.

    Args:
        x: (N, C, H, W), as `conv_bn_act`'s. layer: the convolution and its batch norm. group, backend: as
        `residual_block`.

    Returns:
        y: (N, K, P, Q), pooled, in the convolution's output dtype and memory format.

    Raises:
        As `residual_block`; and ValueError where the convolution has a bias.
    """
    if layer.conv_bias is not None:
        raise ValueError("layer must have no conv_bias")
    _check_group(x, group)
    if needs_plain_pytorch(x) or (not layer.training and learns_any(x, *layer.tensors)):
        return F.max_pool2d(apply_layer(x, layer, None, "relu", backend), 3, 2, 1)
    if not layer.training:
        arguments.check_input("x", x)
        dtype = conv_dtype(x)
        layer, _ = checked_layer(x, x.shape, dtype, layer)
        backend = dispatch.select("stem", x.device.type, dtype, backend)
        vectors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        run = _inference_op("stem", x, backend)
        return run(x, cast(layer.conv_weight, dtype), *vectors, _geometry(layer), layer.eps)
    x, layer, shape = checked(x, layer)
    arguments.check_batch(shape, not group)
    backend = dispatch.select("stem_train", x.device.type, x.dtype, backend)
    vectors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    y, records = _ops.stem_train(x, layer.conv_weight, *vectors, _geometry(layer), layer.eps, group, backend)
    _update([layer], records, [shape], group)
    return y


def _inference_op(name: str, x: Tensor, backend: str) -> Callable[..., Tensor]:
    """The op without its last argument, or, where nobody follows x, what it runs.

    The dispatcher's way there and back takes 60 us a block, which one image is noticeably slower by.
    """
    if is_traced(x):
        return functools.partial(getattr(_ops, name), backend=backend)
    return getattr(dispatch.load(backend), name)


def _check_group(x: Tensor, group: str) -> None:
    if group and x.numel() == 0:
        raise ValueError("x is empty; every process of a group with SyncBatchNorm needs at least one image")


def _layer_by_layer(x: Tensor, main: Sequence[ConvBn], shortcut: ConvBn | Tensor | None, backend: str) -> Tensor:
    """`residual_block` by one op a convolution."""
    value, last = x, main[-1]
    for layer in main[:-1]:
        value = apply_layer(value, layer, None, "relu", backend)
    if not isinstance(shortcut, ConvBn):
        return apply_layer(value, last, x if shortcut is None else shortcut, "relu", backend)
    pointwise = tuple(shortcut.conv_weight.shape[2:]) == (1, 1) and shortcut.padding in (0, (0, 0), [0, 0])
    if pointwise and shortcut.groups == 1:
        return conv_bn_shortcut_act(value, last, x, shortcut, backend=backend)
    return apply_layer(value, last, apply_layer(x, shortcut, None, None, backend), "relu", backend)


def _checked_chain(x: Tensor, main: Sequence[ConvBn], branch: ConvBn | None):
    """x as the first convolution takes it, all layers validated, `branch` last, and their outputs' shapes."""
    arguments.check_input("x", x)
    dtype, shape, layers, shapes = conv_dtype(x), x.shape, [], []
    for layer in main:
        layer, shape = checked_layer(x, shape, dtype, layer)
        layers.append(layer)
        shapes.append(shape)
    if branch is not None:
        branch, shape = checked_layer(x, x.shape, dtype, branch)
        layers.append(branch)
        shapes.append(shape)
    return cast(x, dtype), layers, shapes


def _columns(x: Tensor, layers: Sequence[ConvBn]) -> list[list[Tensor]]:
    """The op's lists of tensors, an empty one for None."""
    none = x.new_empty(0)
    rows = ((c.conv_weight, c.weight, c.bias, c.running_mean, c.running_var) for c in layers)
    return [[none if tensor is None else tensor for tensor in column] for column in zip(*rows, strict=True)]


def _geometry(layer: ConvBn) -> list[int]:
    return [*layer.stride, *layer.padding, *layer.dilation, layer.groups]


def _update(layers: Sequence[ConvBn], records: Sequence[Tensor], shapes: Sequence[tuple], group: str) -> None:
    """The layers' running statistics from the op's records."""
    rows = []
    for number, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        if layer.training:
            mean, var, count = records[number * len(RECORD) + 1 :][:3]
            count = count if group else shape[0] * shape[2] * shape[3]
            rows.append((layer.running_mean, layer.running_var, mean, var, count, layer.momentum))
    update_running(rows)

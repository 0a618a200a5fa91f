"""The library `torch.ops.resnet_fast`: one op per fused stage, with its fake (shape) function.

Schemas are functional: nothing is mutated, outputs never alias inputs, batch statistics are returned. The last argument
of each op is the name of the backend that runs it, resolved beforehand by `dispatch.select`. Vectors are (C,); `y` and
`dx` follow the memory format of the tensor they belong to; statistics and parameter gradients are float64 for float64
tensors, else float32. Gradients are in `autograd.py`.
"""

import torch
from torch import Tensor

from . import dispatch
from .training import GRAM

_BN = "Tensor? weight, Tensor? bias, Tensor mean, Tensor var"
_CONV = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_FORWARD = "float eps, bool relu, str backend"
_SCHEMAS = {
    "bn_act": f"(Tensor x, {_BN}, Tensor? residual, {_FORWARD}) -> Tensor",
    "bn_act_train": f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, {_FORWARD}) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    "bn_act_backward": f"(Tensor dy, Tensor x, Tensor? y, {_BN}, "
    "float eps, bool relu, bool training, bool[4] output_mask, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "conv_bn_act": f"(Tensor x, Tensor conv_weight, Tensor? conv_bias, {_BN}, Tensor? residual, {_CONV}, {_FORWARD}) "
    "-> Tensor",
    "conv_bn_shortcut_act": f"(Tensor x, Tensor conv_weight, Tensor? conv_bias, {_BN}, {_CONV}, float eps, "
    "Tensor shortcut, Tensor shortcut_conv_weight, Tensor? shortcut_conv_bias, Tensor? shortcut_weight, "
    "Tensor? shortcut_bias, Tensor shortcut_mean, Tensor shortcut_var, SymInt[2] shortcut_stride, float shortcut_eps, "
    "bool relu, str backend) -> Tensor",
    "conv_bn_act_train": "(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? weight, Tensor? bias, "
    f"Tensor? residual, {_CONV}, {_FORWARD}) -> (Tensor y, Tensor conv_out, Tensor mean, Tensor var)",
    "residual_block": "(Tensor x, Tensor? residual, Tensor[] conv_weights, Tensor[] weights, Tensor[] biases, "
    "Tensor[] running_means, Tensor[] running_vars, SymInt[] geometry, float[] eps, bool downsample, str backend) "
    "-> Tensor",
    "stem": "(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "SymInt[] geometry, float eps, str backend) -> Tensor",
    "residual_block_train": "(Tensor x, Tensor? residual, Tensor[] conv_weights, Tensor[] weights, Tensor[] biases, "
    "Tensor[] running_means, Tensor[] running_vars, SymInt[] geometry, float[] eps, bool[] batch_statistics, "
    "bool downsample, int[] stages, str group, str backend) -> (Tensor y, Tensor[] records)",
    "residual_block_backward": "(Tensor dy, Tensor x, Tensor y, Tensor[] conv_weights, Tensor[] weights, "
    "Tensor[] biases, Tensor[] records, SymInt[] geometry, float[] eps, bool[] batch_statistics, bool downsample, "
    "bool identity, int[] stages, bool[] output_mask, str group, str backend) -> Tensor[]",
    "stem_train": "(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, SymInt[] geometry, float eps, str group, str backend) -> (Tensor y, Tensor[] records)",
    "stem_backward": "(Tensor dy, Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor[] records, "
    "SymInt[] geometry, float eps, bool[] output_mask, str group, str backend) -> Tensor[]",
    "conv_bn_act_backward": f"(Tensor dy, Tensor x, Tensor conv_weight, Tensor conv_out, Tensor? y, {_BN}, {_CONV}, "
    "float eps, bool relu, bool training, bool[6] output_mask, str backend) "
    "-> (Tensor dx, Tensor dconv_weight, Tensor dconv_bias, Tensor dweight, Tensor dbias, Tensor dresidual)",
}
NAMES = tuple(_SCHEMAS)

library = torch.library.Library("resnet_fast", "DEF")


def _launcher(name: str):
    def launch(*args):
        *args, backend = args
        return getattr(dispatch.load(backend), name)(*args)

    return launch


for _name, _schema in _SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _launcher(_name), "CompositeExplicitAutograd")


def _fake(function):
    return torch.library.register_fake(f"resnet_fast::{function.__name__.removesuffix('_fake')}", function, lib=library)


@_fake
def bn_act_fake(x, weight, bias, mean, var, residual, eps, relu, backend):
    return _like(x)


@_fake
def bn_act_train_fake(x, weight, bias, residual, eps, relu, backend):
    return _like(x), _statistic(x, x.shape[1]), _statistic(x, x.shape[1])


@_fake
def bn_act_backward_fake(dy, x, y, weight, bias, mean, var, eps, relu, training, output_mask, backend):
    channels = x.shape[1]
    grads = (_like(x), _statistic(x, channels), _statistic(x, channels), _like(x))
    return _wanted(x, grads, output_mask)


@_fake
def conv_bn_act_fake(
    x, conv_weight, conv_bias, weight, bias, mean, var, residual, stride, padding, dilation, groups, eps, relu, backend
):
    return _like(_conv(x, conv_weight, conv_bias, stride, padding, dilation, groups))


@_fake
def conv_bn_shortcut_act_fake(x, conv_weight, conv_bias, weight, bias, mean, var, *rest):
    return _like(_conv(x, conv_weight, conv_bias, *rest[:4]))


@_fake
def conv_bn_act_train_fake(
    x, conv_weight, conv_bias, weight, bias, residual, stride, padding, dilation, groups, eps, relu, backend
):
    conv_out = _conv(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    channels = conv_weight.shape[0]
    return _like(conv_out), conv_out, _statistic(x, channels), _statistic(x, channels)


@_fake
def conv_bn_act_backward_fake(
    dy, x, conv_weight, conv_out, y, weight, bias, mean, var,
    stride, padding, dilation, groups, eps, relu, training, output_mask, backend,
):  # fmt: skip
    channels = conv_weight.shape[0]
    dx, dconv_weight, dconv_bias = torch.ops.aten.convolution_backward(
        _like(conv_out), x, conv_weight, [channels], stride, padding, dilation, False, [0, 0], groups, [True] * 3
    )
    grads = (dx, dconv_weight, dconv_bias, _statistic(x, channels), _statistic(x, channels), _like(conv_out))
    return _wanted(x, grads, output_mask)


@_fake
def residual_block_fake(
    x, residual, conv_weights, weights, biases, running_means, running_vars, geometry, eps, downsample, backend
):
    value = x
    for number in range(len(conv_weights) - downsample):
        value = _like(_conv(value, conv_weights[number].to(x.dtype), None, *_geometry(geometry, number)))
    return value


@_fake
def stem_fake(x, conv_weight, weight, bias, running_mean, running_var, geometry, eps, backend):
    conv_out = _conv(x.to(conv_weight.dtype), conv_weight, None, *_geometry(geometry, 0))
    return _like(torch.nn.functional.max_pool2d(_like(conv_out), 3, 2, 1))


@_fake
def residual_block_train_fake(
    x, residual, conv_weights, weights, biases, running_means, running_vars,
    geometry, eps, batch_statistics, downsample, stages, group, backend,
):  # fmt: skip
    value, records = x, []
    for number, conv_weight in enumerate(conv_weights):
        is_branch = downsample and number == len(conv_weights) - 1
        source = x if is_branch else value
        conv_out = _conv(source, conv_weight, None, *_geometry(geometry, number))
        gram = stages[number] == GRAM
        records += _record(source, None if gram else conv_out, conv_weight, group, gram)
        if not is_branch:
            value = _like_other(conv_out, source) if gram else conv_out
    return _like(value), records


@_fake
def residual_block_backward_fake(
    dy, x, y, conv_weights, weights, biases, records,
    geometry, eps, batch_statistics, downsample, identity, stages, output_mask, group, backend,
):  # fmt: skip
    vectors = [_statistic(x, conv_weight.shape[0]) for conv_weight in conv_weights]
    grads = (_like(x), _like_other(y, x), *map(torch.empty_like, conv_weights), *vectors, *vectors)
    return [torch.empty_like(g) if wanted else x.new_empty(0) for g, wanted in zip(grads, output_mask, strict=True)]


@_fake
def stem_train_fake(x, conv_weight, weight, bias, running_mean, running_var, geometry, eps, group, backend):
    conv_out = _conv(x, conv_weight, None, geometry[:2], geometry[2:4], geometry[4:6], geometry[6])
    y = torch.nn.functional.max_pool2d(_like(conv_out), 3, 2, 1)
    return y, _record(x, conv_out, conv_weight, group, False, torch.empty_like(y, dtype=torch.uint8))


@_fake
def stem_backward_fake(dy, x, conv_weight, weight, bias, records, geometry, eps, output_mask, group, backend):
    vector = _statistic(x, conv_weight.shape[0])
    grads = (_like(x), torch.empty_like(conv_weight), vector, vector)
    return [torch.empty_like(g) if wanted else x.new_empty(0) for g, wanted in zip(grads, output_mask, strict=True)]


def _record(
    x: Tensor, conv_out: Tensor | None, conv_weight: Tensor, group: str, gram: bool, index: Tensor | None = None
) -> list[Tensor]:
    """A layer's entries of `records`, in the order of `backends.train_ops.RECORD`."""
    mean, channels = _statistic(x, conv_weight.shape[0]), x.shape[1]
    sizes = ((), (channels,), (channels, channels))  # of count, input_mean, input_cov
    wanted = (bool(group), gram, gram)
    rest = [mean.new_empty(size) if there else x.new_empty(0) for size, there in zip(sizes, wanted, strict=True)]
    conv_out, index = (x.new_empty(0) if tensor is None else tensor for tensor in (conv_out, index))
    return [conv_out, mean, torch.empty_like(mean), *rest, index]


def _geometry(geometry, number: int) -> tuple:
    """stride, padding, dilation and groups of layer `number`: seven numbers."""
    at = 7 * number
    return geometry[at : at + 2], geometry[at + 2 : at + 4], geometry[at + 4 : at + 6], geometry[at + 6]


def _like_other(tensor: Tensor, other: Tensor) -> Tensor:
    """Of `tensor`'s shape in `other`'s memory format."""
    return torch.empty_like(tensor, memory_format=torch._prims_common.suggest_memory_format(other))


def _conv(x, conv_weight, conv_bias, stride, padding, dilation, groups) -> Tensor:
    return torch.ops.aten.convolution(x, conv_weight, conv_bias, stride, padding, dilation, False, [0, 0], groups)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch._prims_common.suggest_memory_format(x))


def _statistic(x: Tensor, channels) -> Tensor:
    return x.new_empty(channels, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _wanted(x: Tensor, grads: tuple[Tensor, ...], output_mask) -> tuple[Tensor, ...]:
    return tuple(g if wanted else x.new_empty(0) for g, wanted in zip(grads, output_mask, strict=True))

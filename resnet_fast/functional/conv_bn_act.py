"""One convolution or batch norm with what follows it.

    y = act(batch_norm(conv2d(x)) + residual)

All functions have `torch.nn.functional.batch_norm`'s meaning: with `training=True` they normalise with the batch's own
statistics and update the running ones in place. They are differentiable (twice, too), autocast-aware and traceable by
torch.compile and torch.export. Where a fused op has no meaning to the caller (TorchScript and ONNX tracing, torch.func
transforms, forward-mode AD, empty batches) the same arithmetic runs as plain PyTorch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments, autograd, dispatch  # noqa: F401  (autograd registers the formulas)
from ..context import autocasts, cast, conv_dtype, plain_pytorch_reason
from ..weight_cast import cast_weight

_ops = torch.ops.resnet_fast


def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    backend: str = "auto",
) -> Tensor:
    """act(batch_norm(x) + residual).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; contiguous or channels_last, which y follows.
        running_mean, running_var: (C,), used when `training` is False, else updated in place (the variance unbiased)
            as `running = (1 - momentum) * running + momentum * batch`; None when training without them.
        weight, bias: (C,) or None for 1 and 0. x's dtype, or float32 beside a bfloat16 or float16 x.
        residual: x's shape; added before the activation.
        act: "relu" or None.
        backend: "auto", "triton", "native", "reference".

    Returns:
        y: x's shape, dtype and memory format.

    Raises:
        TypeError: an argument is not a tensor of a supported dtype. ValueError: a shape, a device, `act` or `backend`
        does not fit, or training with one value per channel. BackendUnavailable: the named backend cannot run here.
    """
    arguments.check_input("x", x)
    channels = x.shape[1]
    arguments.check_batch_norm(x.dtype, x.device, channels, running_mean, running_var, weight, bias, training)
    arguments.check_residual(residual, x.shape, x.device)
    relu = arguments.wants_relu(act)
    if needs_plain_pytorch(x):
        return _plain(x, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu)
    arguments.check_batch(x.shape, training)
    backend = dispatch.select("bn_act", x.device.type, x.dtype, backend)
    residual = cast(residual, x.dtype)
    if not training:
        return _ops.bn_act(x, weight, bias, running_mean, running_var, residual, eps, relu, backend)
    y, mean, var = _ops.bn_act_train(x, weight, bias, residual, eps, relu, backend)
    update_running([(running_mean, running_var, mean, var, x.numel() // channels, momentum)])
    return y


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    conv_bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    backend: str = "auto",
) -> Tensor:
    """act(batch_norm(conv2d(x, conv_weight, conv_bias)) + residual).

    Args:
        x: (N, Cin, H, W); under autocast it and the convolution's parameters are cast as conv2d's are.
        conv_weight: (Cout, Cin / groups, R, S); conv_bias: (Cout,) or None.
        stride, padding, dilation: one int or (rows, columns); groups: as conv2d.
        running_mean, running_var, weight, bias, training, momentum, eps, act, backend: as `bn_act`, with C = Cout.
        residual: (N, Cout, P, Q), the output's shape.

    Returns:
        y: (N, Cout, P, Q) in the convolution's output dtype and memory format.

    Raises:
        As `bn_act`, and ValueError where x's channels, `conv_weight` and `groups` do not fit each other.
    """
    stage = ConvBn(
        conv_weight,
        running_mean,
        running_var,
        weight,
        bias,
        conv_bias,
        stride,
        padding,
        dilation,
        groups,
        eps,
        training,
    )
    x, stage, shape = checked(x, stage)
    relu = arguments.wants_relu(act)
    arguments.check_residual(residual, shape, x.device)
    conv_weight, conv_bias = stage.conv_weight, stage.conv_bias
    conv = (stage.stride, stage.padding, stage.dilation, groups)
    if needs_plain_pytorch(x):
        conv_out = F.conv2d(x, conv_weight, conv_bias, *conv)
        return _plain(conv_out, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu)
    arguments.check_batch(shape, training)
    requested, backend = backend, dispatch.select("conv_bn_act", x.device.type, x.dtype, backend)
    residual = cast(residual, x.dtype)
    if training:
        y, _, mean, var = _ops.conv_bn_act_train(
            x, conv_weight, conv_bias, weight, bias, residual, *conv, eps, relu, backend
        )
        update_running([(running_mean, running_var, mean, var, shape[0] * shape[2] * shape[3], momentum)])
        return y
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        # weight's gradient needs the convolution's output: two ops keep it, where one would compute it twice
        conv_out = F.conv2d(x, conv_weight, conv_bias, *conv)
        return _ops.bn_act(conv_out, weight, bias, running_mean, running_var, residual, eps, relu, backend)
    dispatch.check_convolution(requested, x, conv_weight, *conv, residual is not None, relu)
    return _ops.conv_bn_act(
        x, conv_weight, conv_bias, weight, bias, running_mean, running_var, residual, *conv, eps, relu, backend
    )


class ConvBn(NamedTuple):
    """A convolution and its batch norm: what `conv_bn_act` takes one by one.

    training: the statistics are the batch's own, and the running ones, where there are any, are updated in place.
    """

    conv_weight: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    conv_bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    eps: float = 1e-5
    training: bool = False
    momentum: float = 0.1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the ops' order."""
        return self.conv_weight, self.conv_bias, self.weight, self.bias, self.running_mean, self.running_var


def conv_bn_shortcut_act(
    x: Tensor, main: ConvBn, shortcut: Tensor, branch: ConvBn, *, act: str | None = "relu", backend: str = "auto"
) -> Tensor:
    """act(batch_norm(conv2d(x)) + batch_norm(conv2d(shortcut))): a block's last convolution with its downsample.

    Where a backend can, one kernel computes both convolutions, so that the shortcut's output never reaches memory;
    where a gradient is wanted or statistics are the batch's own, two `conv_bn_act` calls do.

    Args:
        x: (N, Cin, H, W). main: its convolution and batch norm.
        shortcut: (N, Cs, Hs, Ws), the block's input. branch: its convolution, a dense 1x1 without padding, and norm.
        act, backend: as `conv_bn_act`.

    Returns:
        y: (N, Cout, P, Q) in the convolution's output dtype and memory format.

    Raises:
        As `conv_bn_act`, and ValueError where `branch` is no such 1x1 or the outputs' shapes differ.
    """
    learns = learns_any(x, *main.tensors, shortcut, *branch.tensors)
    if learns or main.training or branch.training or needs_plain_pytorch(x):
        residual = apply_layer(shortcut, branch, None, None, backend)
        return apply_layer(x, main, residual, act, backend)
    x, main, shape = checked(x, main)
    shortcut, branch, branch_shape = checked(shortcut, branch, "shortcut")
    arguments.check_device("shortcut", shortcut, x.device)
    if shortcut.dtype != x.dtype:
        raise TypeError(f"shortcut is {shortcut.dtype} and x is {x.dtype}; they must have one dtype")
    if tuple(branch.conv_weight.shape[2:]) != (1, 1) or branch.padding != [0, 0] or branch.groups != 1:
        raise ValueError(
            f"branch must be a dense 1x1 convolution without padding, but conv_weight is "
            f"{tuple(branch.conv_weight.shape)}, padding {branch.padding}, groups {branch.groups}"
        )
    if branch_shape != shape:
        raise ValueError(f"shortcut's convolution gives {branch_shape} and x's {shape}; they must have one shape")
    backend = dispatch.select("conv_bn_shortcut_act", x.device.type, x.dtype, backend)
    geometry = (main.stride, main.padding, main.dilation, main.groups, main.eps)
    return _ops.conv_bn_shortcut_act(
        x,
        *main.tensors,
        *geometry,
        shortcut,
        *branch.tensors,
        branch.stride,
        branch.eps,
        arguments.wants_relu(act),
        backend,
    )


def apply_layer(x: Tensor, stage: ConvBn, residual: Tensor | None, act: str | None, backend: str) -> Tensor:
    keywords = dict(zip(stage._fields[5:], stage[5:], strict=True))
    return conv_bn_act(x, *stage[:5], **keywords, residual=residual, act=act, backend=backend)


def learns_any(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def checked(x: Tensor, stage: ConvBn, name: str = "x") -> tuple[Tensor, ConvBn, tuple[int, ...]]:
    """x and `stage` validated, cast as autocast casts and with pairs for geometry, and the output's shape."""
    arguments.check_input(name, x)
    dtype = conv_dtype(x)
    stage, shape = checked_layer(x, x.shape, dtype, stage, name)
    return cast(x, dtype), cast_layer(stage, dtype), shape


def checked_layer(
    x: Tensor, shape: Sequence[int], dtype: torch.dtype, stage: ConvBn, name: str = "x"
) -> tuple[ConvBn, tuple[int, ...]]:
    """`stage` validated and with pairs for geometry, and its output's shape, for an input of `shape` on x's device.

    dtype: that of the arithmetic, which autocast may cast to.
    """
    conv_weight, running_mean, running_var, weight, bias, conv_bias, stride, padding, dilation, groups, *rest = stage
    arguments.check_conv(name, shape[1], x.device, conv_weight, conv_bias, groups)
    if dtype != conv_weight.dtype and not autocasts(x):
        raise TypeError(
            f"conv_weight is {conv_weight.dtype} and {name} is {x.dtype}; they must have one dtype "
            f"(convert one, or run under torch.autocast)"
        )
    stride = arguments.pair("stride", stride, 1)
    padding = arguments.pair("padding", padding, 0)
    dilation = arguments.pair("dilation", dilation, 1)
    vectors = (running_mean, running_var, weight, bias)
    arguments.check_batch_norm(dtype, x.device, conv_weight.shape[0], *vectors, stage.training)
    shape = arguments.conv_shape(shape, conv_weight, stride, padding, dilation)
    return ConvBn(conv_weight, *vectors, conv_bias, stride, padding, dilation, groups, *rest), shape


def cast_layer(stage: ConvBn, dtype: torch.dtype) -> ConvBn:
    """`stage` with the convolution's weight and bias in `dtype`, as autocast casts; batch norm's stay as they are."""
    if stage.conv_weight.dtype == dtype:
        return stage
    return stage._replace(conv_weight=cast_weight(stage.conv_weight, dtype), conv_bias=cast(stage.conv_bias, dtype))


def needs_plain_pytorch(x: Tensor) -> bool:
    return x.numel() == 0 or plain_pytorch_reason() is not None


def _plain(x, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return F.relu(y) if relu else y


def update_running(rows: Iterable[tuple]) -> None:
    """What (running_mean, running_var, mean, var, count, momentum) of each layer becomes, in a few launches for all.

    (1 - momentum) * running + momentum * batch, in which the large product is not rounded before it is added, as in
    PyTorch. Not lerp, whose other forms of the same sum differ where the batch is infinite.
    """
    rows = [row for row in rows if row[0] is not None]
    if torch.compiler.is_exporting():  # torch.export.save cannot save a region without gradients that returns nothing
        _update_running([(*row[:2], row[2].detach(), row[3].detach(), *row[4:]) for row in rows])
    elif rows:
        with torch.no_grad():
            _update_running(rows)


def _update_running(rows: Iterable[tuple]) -> None:
    alike: dict[float, tuple[list[Tensor], list[Tensor], list[float]]] = {}
    for running_mean, running_var, mean, var, count, momentum in rows:
        unbiased = count / (count - 1)
        if not isinstance(unbiased, float):  # a tensor's, or a symbol's, which torch.export.save takes in no list
            var, unbiased = var * unbiased, 1.0
        running, batch, weights = alike.setdefault(momentum, ([], [], []))
        running += [running_mean, running_var]
        batch += [mean, var]
        weights += [momentum, momentum * unbiased]
    for momentum, (running, batch, weights) in alike.items():
        new = torch._foreach_mul(batch, weights)
        old = [
            tensor if tensor.dtype == sum_.dtype else tensor.to(sum_.dtype)
            for tensor, sum_ in zip(running, new, strict=True)
        ]
        torch._foreach_add_(new, old, alpha=1 - momentum)
        torch._foreach_copy_(running, new)

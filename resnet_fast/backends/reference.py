"""Plain PyTorch: the contract every other backend is tested against, and the path where none of them can run.

The arithmetic is done in the accumulation dtype (float64 for float64, else float32) and rounded once at the end.
Batch normalisation: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167; its backward is equation set 3.4 there.
"""

import torch
from torch import Tensor

from ..layout import memory_format
from . import inference, train_ops
from .primitives import reference as primitives

OpMask = list[bool]


def available() -> str | None:
    """Always usable."""
    return None


def why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Runs every op on every device and dtype that PyTorch itself does."""
    return None


def why_not_auto(device_type: str, op: str) -> str | None:
    """Always the last resort."""
    return None


def kernel(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Name for reports."""
    return "PyTorch"


def train_stage(device_type: str, dtype: torch.dtype) -> int:
    """The stage of training that "auto" takes (`resnet_fast.training`)."""
    return 1


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """act((x - mean) * rsqrt(var + eps) * weight + bias [+ residual]); x (N, C, H, W), the vectors (C,); y as x."""
    acc = _acc_dtype(x)
    y = (x.to(acc) - _channels(mean, acc)) * _scale(weight, var, eps, acc)
    if bias is not None:
        y = y + _channels(bias, acc)
    if residual is not None:
        y = y + residual.to(acc)
    if relu:
        y = y.relu()
    return y.to(x.dtype, memory_format=memory_format(x))


def bn_act_train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`bn_act` with x's own statistics. Returns y, and mean (C,) and biased var (C,) in the accumulation dtype."""
    x_acc = x.to(_acc_dtype(x))
    var, mean = torch.var_mean(x_acc, dim=(0, 2, 3), correction=0)
    mean = torch.where(mean.isnan(), x_acc.mean(dim=(0, 2, 3)), mean)  # infinite x: batch_norm's mean is infinite too
    return bn_act(x, weight, bias, mean, var, residual, eps, relu), mean, var


def bn_act_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    training: bool,
    output_mask: OpMask,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, residual, in `output_mask`'s order; an unwanted one is an empty tensor.

    `y` is the forward's output where the ReLU mask cannot be recomputed from x (there was a residual).
    """
    acc = _acc_dtype(x)
    dz = dy.to(acc)
    if relu:
        y = bn_act(x, weight, bias, mean, var, None, eps, relu=False) if y is None else y
        dz = dz.masked_fill(y <= 0, 0.0)  # not y > 0: a NaN output passes its gradient, as in PyTorch
    centered = x.to(acc) - _channels(mean, acc)
    rstd = torch.rsqrt(var.to(acc) + eps)
    dbias = dz.sum(dim=(0, 2, 3))
    dweight = (dz * centered).sum(dim=(0, 2, 3)) * rstd
    dx = dz
    if training:
        count = x.numel() // x.shape[1]
        dx = dx - _channels(dbias / count, acc) - centered * _channels(dweight * rstd / count, acc)
    dx = dx * _scale(weight, var, eps, acc)
    layout = memory_format(x)
    dresidual = dz.to(x.dtype, memory_format=layout, copy=not relu)  # without ReLU dz is dy, which it must not alias
    grads = (dx.to(x.dtype, memory_format=layout), dweight, dbias, dresidual)
    return tuple(g if wanted else x.new_empty(0) for g, wanted in zip(grads, output_mask, strict=True))


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
) -> Tensor:
    """`bn_act` of a convolution: x (N, Cin, H, W), conv_weight (Cout, Cin / groups, R, S), y (N, Cout, P, Q)."""
    conv_out = _conv(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    return bn_act(conv_out, weight, bias, mean, var, residual, eps, relu)


def conv_bn_shortcut_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    shortcut: Tensor,
    shortcut_conv_weight: Tensor,
    shortcut_conv_bias: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    shortcut_mean: Tensor,
    shortcut_var: Tensor,
    shortcut_stride: list[int],
    shortcut_eps: float,
    relu: bool,
) -> Tensor:
    """act(bn(conv(x)) + bn(conv1x1(shortcut))): a block's last convolution with its downsample; y (N, Cout, P, Q)."""
    branch = (shortcut, shortcut_conv_weight, shortcut_conv_bias, shortcut_weight, shortcut_bias)
    pointwise = (shortcut_stride, [0, 0], [1, 1], 1)
    residual = conv_bn_act(*branch, shortcut_mean, shortcut_var, None, *pointwise, shortcut_eps, relu=False)
    main = (x, conv_weight, conv_bias, weight, bias, mean, var)
    return conv_bn_act(*main, residual, stride, padding, dilation, groups, eps, relu)


def conv_bn_act_train(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`bn_act_train` of a convolution. Returns y, the convolution's output, mean, biased var."""
    conv_out = _conv(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    y, mean, var = bn_act_train(conv_out, weight, bias, residual, eps, relu)
    return y, conv_out, mean, var


def conv_bn_act_backward(
    dy: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    conv_out: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
    training: bool,
    output_mask: OpMask,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, conv_weight, conv_bias, weight, bias, residual; an unwanted one is an empty tensor."""
    conv_mask = output_mask[:3]
    bn_mask = [any(conv_mask), *output_mask[3:]]
    dconv_out, dweight, dbias, dresidual = bn_act_backward(
        dy, conv_out, y, weight, bias, mean, var, eps, relu, training, bn_mask
    )
    dconv: tuple[Tensor | None, ...] = (None, None, None)
    if any(conv_mask):
        dconv = torch.ops.aten.convolution_backward(
            dconv_out,
            x,
            conv_weight,
            [conv_weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            conv_mask,
        )
    dconv = tuple(x.new_empty(0) if g is None else g for g in dconv)
    return *dconv, dweight, dbias, dresidual


residual_block, stem = inference.make(conv_bn_act, conv_bn_shortcut_act)
residual_block_train, residual_block_backward, stem_train, stem_backward = train_ops.make(lambda: primitives)


def _conv(x, conv_weight, conv_bias, stride, padding, dilation, groups) -> Tensor:
    return torch.ops.aten.convolution(x, conv_weight, conv_bias, stride, padding, dilation, False, [0, 0], groups)


def _acc_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _channels(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype).view(1, -1, 1, 1)


def _scale(weight: Tensor | None, var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    rstd = torch.rsqrt(var.to(dtype) + eps)
    return _channels(rstd if weight is None else rstd * weight.to(dtype), dtype)

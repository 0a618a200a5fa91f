"""The library's path for a folded convolution: cuDNN's (or oneDNN's) convolution, the rest fused in or in one pass.

It stands beside the Triton kernels layer by layer: a tuned table says which is faster, and where no kernel fits this is
what runs. Variants, for activations dense in channels_last:

    separate    aten's convolution, then bias, residual and ReLU in one pointwise Triton kernel, where Triton runs
    fused       cudnn_convolution_relu or cudnn_convolution_add_relu: all in cuDNN. Its ReLU may turn NaN into 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problems import ConvProblem
from ..shapes import Conv
from . import triton as triton_backend

DEFAULT = "separate"


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    problem: ConvProblem,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    variant: str = "",
) -> Tensor:
    """act(conv2d(x, weight, bias) + residual, or + conv2d(shortcut)); weights (K, C / groups, R, S) as conv2d's.

    Raises:
        ValueError: no such variant for this problem on this device.
    """
    if problem.shortcut is not None:
        residual = _aten(shortcut, shortcut_weight, shortcut_bias, problem.shortcut)
    runs = _variants(x, problem)
    variant = variant or DEFAULT
    if variant not in runs:
        raise ValueError(f"variant={variant!r} does not run here; it must be one of: {', '.join(runs)}")
    return runs[variant](x, weight, bias, problem, residual)


def max_pool(x: Tensor) -> Tensor:
    """max_pool2d(x, 3, stride 2, padding 1): of the Triton kernel where it reads x, else PyTorch's."""
    return triton_backend.max_pool(x)


def variants(x: Tensor, problem: ConvProblem) -> tuple[str, ...]:
    """The names `conv` takes for this problem on x's device."""
    return tuple(_variants(x, problem))


def _variants(x: Tensor, problem: ConvProblem) -> dict[str, Callable[..., Tensor]]:
    found = {"separate": _separate}
    if x.is_cuda and problem.relu and torch.backends.cudnn.is_available():
        found["fused"] = _fused
    return found


def _separate(x: Tensor, weight: Tensor, bias: Tensor | None, problem: ConvProblem, residual: Tensor | None) -> Tensor:
    if triton_backend.why_not("bn_act", x.device.type, x.dtype) is None:
        y = _aten(x, weight, None, problem.conv)
        return triton_backend.bias_act_(y, bias, residual, problem.relu)
    y = _aten(x, weight, bias, problem.conv)
    if residual is not None:
        y += residual
    return y.relu_() if problem.relu else y


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, problem: ConvProblem, residual: Tensor | None) -> Tensor:
    geometry = _geometry(problem.conv)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def _aten(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Conv) -> Tensor:
    return F.conv2d(x, weight, bias, *_geometry(geometry))


def _geometry(conv: Conv) -> tuple:
    return conv.stride, conv.padding, conv.dilation, conv.groups

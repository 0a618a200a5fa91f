"""PyTorch's own arithmetic for every fused function, and one runner for both: outputs and all gradients by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS = ("running_mean", "running_var")


def bn_act(x, running_mean, running_var, weight=None, bias=None, *, residual=None, training=False, momentum=0.1,
           eps=1e-5, act="relu") -> Tensor:  # fmt: skip
    """`resnet_fast.functional.bn_act` as eager PyTorch spells it."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return F.relu(y) if act == "relu" else y


def conv_bn_act(x, conv_weight, running_mean, running_var, weight=None, bias=None, *, conv_bias=None, stride=1,
                padding=0, dilation=1, groups=1, **keywords) -> Tensor:  # fmt: skip
    """`resnet_fast.functional.conv_bn_act` as eager PyTorch spells it."""
    conv_out = F.conv2d(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    return bn_act(conv_out, running_mean, running_var, weight, bias, **keywords)


def run(function: Callable[..., Tensor], tensors: dict[str, Tensor], **keywords) -> dict[str, Tensor]:
    """Call `function` on copies of `tensors`; returns y, the gradient of every input ("d" + name), the buffers."""
    inputs = {name: clone(tensor) for name, tensor in tensors.items() if name != "dy"}
    wants = [name for name in inputs if name not in STATISTICS]
    for name in wants:
        inputs[name].requires_grad_()
    y = function(**inputs, **keywords)
    gradients = torch.autograd.grad(y, [inputs[name] for name in wants], tensors["dy"])
    results = {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wants, gradients, strict=True)}
    return results | {name: inputs[name] for name in STATISTICS if name in inputs}


def clone(tensor: Tensor) -> Tensor:
    """A copy with the same strides that starts as far off alignment as the original."""
    offset = tensor.storage_offset()
    if offset == 0:
        return tensor.detach().clone()
    buffer = torch.empty(offset + tensor.numel(), dtype=tensor.dtype)
    return buffer.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor.detach())


def off_the_kink(function: Callable[..., Tensor], tensors: dict[str, Tensor], **keywords) -> dict[str, Tensor]:
    """`tensors` with dy zero where the float64 y is within rounding of ReLU's zero: there, in this dtype, a gradient
    that passes and one that is stopped are equally right, and PyTorch and we may differ. `function` is PyTorch's."""
    exact = double({name: clone(tensor) for name, tensor in tensors.items() if name != "dy"})
    before_relu = function(**exact, **keywords | {"act": None})
    margin = 8 * torch.finfo(tensors["x"].dtype).eps
    return tensors | {"dy": clone(tensors["dy"]).masked_fill_(before_relu.abs() < margin, 0.0)}


def terms(function: Callable[..., Tensor], tensors: dict[str, Tensor], **keywords) -> dict[str, float]:
    """What `numerics.compare` wants to know of the gradients that are sums over N, H, W: the size of their terms,
    which are dy for bias and dy times the normalised input for weight. `function` is PyTorch's."""
    exact = double({name: clone(tensor) for name, tensor in tensors.items()})
    dy = exact.pop("dy")
    normalised = function(**exact | {"weight": None, "bias": None, "residual": None}, **keywords | {"act": None})

    def size(summed: Tensor) -> float:
        return summed.square().sum().div(dy.shape[1]).sqrt().item()

    return {"dweight": size(dy * normalised), "dbias": size(dy), "dconv_bias": size(dy)}


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64."""
    return {name: tensor.double() for name, tensor in tensors.items()}

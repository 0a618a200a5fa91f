"""Stateless fused functions, and the one place where arguments are validated.

    y = act(batch_norm(conv2d(x)) + residual)

Both functions have `torch.nn.functional.batch_norm`'s meaning: with `training=True` they normalise with the batch's own
statistics and update the running ones in place. They are differentiable (twice, too), autocast-aware and traceable by
torch.compile and torch.export. Where a fused op has no meaning to the caller (TorchScript and ONNX tracing, torch.func
transforms, forward-mode AD, empty batches) the same arithmetic runs as plain PyTorch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, dispatch  # noqa: F401  (autograd registers the formulas)

_ops = torch.ops.resnet_fast
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    _check_input("x", x)
    channels = x.shape[1]
    _check_batch_norm(x.dtype, x.device, channels, running_mean, running_var, weight, bias, training)
    _check_residual(residual, x.shape, x.device)
    relu = _relu(act)
    if _plain_pytorch(x):
        return _plain(x, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu)
    _check_batch(x.shape, training)
    backend = dispatch.select("bn_act", x.device.type, x.dtype, backend)
    residual = _cast(residual, x.dtype)
    if not training:
        return _ops.bn_act(x, weight, bias, running_mean, running_var, residual, eps, relu, backend)
    y, mean, var = _ops.bn_act_train(x, weight, bias, residual, eps, relu, backend)
    _update_running(running_mean, running_var, mean, var, x.numel() // channels, momentum)
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
        conv_weight, running_mean, running_var, weight, bias, conv_bias, stride, padding, dilation, groups, eps
    )
    x, stage, shape = _checked(x, stage, training)
    relu = _relu(act)
    _check_residual(residual, shape, x.device)
    conv_weight, conv_bias = stage.conv_weight, stage.conv_bias
    conv = (stage.stride, stage.padding, stage.dilation, groups)
    if _plain_pytorch(x):
        conv_out = F.conv2d(x, conv_weight, conv_bias, *conv)
        return _plain(conv_out, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu)
    _check_batch(shape, training)
    requested, backend = backend, dispatch.select("conv_bn_act", x.device.type, x.dtype, backend)
    residual = _cast(residual, x.dtype)
    if training:
        y, _, mean, var = _ops.conv_bn_act_train(
            x, conv_weight, conv_bias, weight, bias, residual, *conv, eps, relu, backend
        )
        _update_running(running_mean, running_var, mean, var, shape[0] * shape[2] * shape[3], momentum)
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
    """A convolution and its batch norm: what `conv_bn_act` takes one by one."""

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

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the ops' order."""
        return self.conv_weight, self.conv_bias, self.weight, self.bias, self.running_mean, self.running_var


def conv_bn_shortcut_act(
    x: Tensor, main: ConvBn, shortcut: Tensor, branch: ConvBn, *, act: str | None = "relu", backend: str = "auto"
) -> Tensor:
    """act(batch_norm(conv2d(x)) + batch_norm(conv2d(shortcut))): a block's last convolution with its downsample.

    Inference statistics only. Where a backend can, one kernel computes both convolutions, so that the shortcut's
    output never reaches memory; where a gradient is wanted, two `conv_bn_act` calls do.

    Args:
        x: (N, Cin, H, W). main: its convolution and batch norm.
        shortcut: (N, Cs, Hs, Ws), the block's input. branch: its convolution, a dense 1x1 without padding, and norm.
        act, backend: as `conv_bn_act`.

    Returns:
        y: (N, Cout, P, Q) in the convolution's output dtype and memory format.

    Raises:
        As `conv_bn_act`, and ValueError where `branch` is no such 1x1 or the outputs' shapes differ.
    """
    learns = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *main.tensors, shortcut, *branch.tensors)
    )
    if learns or _plain_pytorch(x):
        residual = conv_bn_act(shortcut, *branch[:5], **_keywords(branch), act=None, backend=backend)
        return conv_bn_act(x, *main[:5], **_keywords(main), residual=residual, act=act, backend=backend)
    x, main, shape = _checked(x, main, False)
    shortcut, branch, branch_shape = _checked(shortcut, branch, False, "shortcut")
    _check_device("shortcut", shortcut, x.device)
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
        x, *main.tensors, *geometry, shortcut, *branch.tensors, branch.stride, branch.eps, _relu(act), backend
    )


def _keywords(stage: ConvBn) -> dict:
    return dict(zip(stage._fields[5:], stage[5:], strict=True))


def _checked(x: Tensor, stage: ConvBn, training: bool, name: str = "x") -> tuple[Tensor, ConvBn, tuple[int, ...]]:
    """x and `stage` validated, cast as autocast casts and with pairs for geometry, and the output's shape."""
    _check_input(name, x)
    _check_conv(name, x, stage.conv_weight, stage.conv_bias, stage.groups)
    dtype = conv_dtype(x)
    if dtype != stage.conv_weight.dtype and not autocasts(x):
        raise TypeError(
            f"conv_weight is {stage.conv_weight.dtype} and {name} is {x.dtype}; they must have one dtype "
            f"(convert one, or run under torch.autocast)"
        )
    stage = stage._replace(
        conv_weight=_cast(stage.conv_weight, dtype),
        conv_bias=_cast(stage.conv_bias, dtype),
        stride=_pair("stride", stage.stride, 1),
        padding=_pair("padding", stage.padding, 0),
        dilation=_pair("dilation", stage.dilation, 1),
    )
    vectors = (stage.running_mean, stage.running_var, stage.weight, stage.bias)
    _check_batch_norm(dtype, x.device, stage.conv_weight.shape[0], *vectors, training)
    shape = _conv_shape(x, stage.conv_weight, stage.stride, stage.padding, stage.dilation)
    return _cast(x, dtype), stage, shape


def plain_pytorch_reason() -> str | None:
    """Why the current context (tracing, torch.func, forward-mode AD) forbids fused ops; None where it does not."""
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "TorchScript or ONNX tracing records plain PyTorch"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms see through plain PyTorch only"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD needs plain PyTorch: a fused op has no jvp"
    return None


def _plain_pytorch(x: Tensor) -> bool:
    return x.numel() == 0 or plain_pytorch_reason() is not None


def _plain(x, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return F.relu(y) if relu else y


@torch.no_grad()
def _update_running(running_mean, running_var, mean, var, count: int, momentum: float) -> None:
    if running_mean is not None:
        _average_(running_mean, mean, momentum)
        _average_(running_var, var * (count / (count - 1)), momentum)


def _average_(running: Tensor, batch: Tensor, momentum: float) -> None:
    """Not lerp_, whose other forms of the same sum differ where the batch is infinite."""
    if running.dtype == batch.dtype:
        running.mul_(1 - momentum).add_(batch, alpha=momentum)
    else:
        running.copy_(running.to(batch.dtype).mul_(1 - momentum).add_(batch, alpha=momentum))


def autocasts(x: Tensor) -> bool:
    """Whether conv2d would cast x: autocast is on, and x is not float64. The meta device has no autocast."""
    device_type = x.device.type
    return device_type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type)


def conv_dtype(x: Tensor) -> torch.dtype:
    """The dtype that conv2d computes x in."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _check_input(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must be 4-D (N, C, H, W), but has shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}; it must be one of {', '.join(map(str, _DTYPES))}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; it must be dense (torch.strided): call .to_dense()")


def _check_conv(name: str, x: Tensor, conv_weight, conv_bias, groups: int) -> None:
    _check_input("conv_weight", conv_weight)
    out_channels, in_channels = conv_weight.shape[0], conv_weight.shape[1] * groups
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups={groups} must be positive and divide conv_weight's {out_channels} output channels")
    if x.shape[1] != in_channels:
        raise ValueError(
            f"{name} has {x.shape[1]} channels, but conv_weight {tuple(conv_weight.shape)} with groups={groups} "
            f"takes {in_channels}"
        )
    _check_device("conv_weight", conv_weight, x.device)
    if conv_bias is not None:
        _check_vector("conv_bias", conv_bias, out_channels, x.device)
        if conv_bias.dtype != conv_weight.dtype:
            raise TypeError(f"conv_bias is {conv_bias.dtype} and conv_weight {conv_weight.dtype}; give them one dtype")


def _check_batch_norm(dtype, device, channels: int, running_mean, running_var, weight, bias, training: bool) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var are needed when training=False; they were None")
    param_dtype = None
    vectors = (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var))
    for name, vector in vectors:
        if vector is None:
            continue
        _check_vector(name, vector, channels, device)
        if vector.dtype != dtype and not (vector.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)):
            raise TypeError(f"{name} is {vector.dtype}; beside {dtype} activations it must be {dtype} or torch.float32")
        if vector.dtype != (param_dtype := param_dtype or vector.dtype):
            raise TypeError(f"{name} is {vector.dtype}, but the other batch-norm vectors are {param_dtype}")


def _check_vector(name: str, vector, channels: int, device: torch.device) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, not {type(vector).__name__}")
    if vector.dim() != 1 or vector.shape[0] != channels:
        raise ValueError(f"{name} must have shape ({channels},), one value a channel, but has {tuple(vector.shape)}")
    _check_device(name, vector, device)


def _check_residual(residual, shape: Sequence[int], device: torch.device) -> None:
    if residual is None:
        return
    _check_input("residual", residual)
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual must have the output's shape {tuple(shape)}, but has {tuple(residual.shape)}")
    _check_device("residual", residual, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and x on {device}; move them to one device")


def _check_batch(shape: Sequence[int], training: bool) -> None:
    if training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size torch.Size({list(shape)})"
        )


def _relu(act: str | None) -> bool:
    if act not in ("relu", None):
        raise ValueError(f'act={act!r} is not supported; it must be "relu" or None')
    return act == "relu"


def _pair(name: str, value: int | Sequence[int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(pair) != 2 or isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be an int or two ints (rows, columns)")
    if min(pair) < least:
        raise ValueError(f"{name}={value!r} must be at least {least}")
    return pair


def _conv_shape(x: Tensor, conv_weight: Tensor, stride, padding, dilation) -> tuple[int, ...]:
    """The output's shape, by the formula in torch.nn.Conv2d's documentation."""
    spatial = (
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dil in zip(
            x.shape[2:], conv_weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    rows, columns = spatial
    if rows < 1 or columns < 1:
        raise ValueError(
            f"x {tuple(x.shape)} is too small for conv_weight {tuple(conv_weight.shape)} with stride {stride}, "
            f"padding {padding}, dilation {dilation}: the output would be {rows} x {columns}"
        )
    return x.shape[0], conv_weight.shape[0], rows, columns

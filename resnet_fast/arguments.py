"""Argument validation: typed errors that name the argument, what was given and what would work.

Called by `functional` alone; nothing below it checks again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_input(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must be 4-D (N, C, H, W), but has shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}; it must be one of {', '.join(map(str, _DTYPES))}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; it must be dense (torch.strided): call .to_dense()")


def check_conv(name: str, channels: int, device: torch.device, conv_weight, conv_bias, groups: int) -> None:
    check_input("conv_weight", conv_weight)
    out_channels, in_channels = conv_weight.shape[0], conv_weight.shape[1] * groups
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups={groups} must be positive and divide conv_weight's {out_channels} output channels")
    if channels != in_channels:
        raise ValueError(
            f"{name} has {channels} channels, but conv_weight {tuple(conv_weight.shape)} with groups={groups} "
            f"takes {in_channels}"
        )
    check_device("conv_weight", conv_weight, device)
    if conv_bias is not None:
        check_vector("conv_bias", conv_bias, out_channels, device)
        if conv_bias.dtype != conv_weight.dtype:
            raise TypeError(f"conv_bias is {conv_bias.dtype} and conv_weight {conv_weight.dtype}; give them one dtype")


def check_batch_norm(dtype, device, channels: int, running_mean, running_var, weight, bias, training: bool) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var are needed when training=False; they were None")
    param_dtype = None
    vectors = (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var))
    for name, vector in vectors:
        if vector is None:
            continue
        check_vector(name, vector, channels, device)
        if vector.dtype != dtype and not (vector.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)):
            raise TypeError(f"{name} is {vector.dtype}; beside {dtype} activations it must be {dtype} or torch.float32")
        if vector.dtype != (param_dtype := param_dtype or vector.dtype):
            raise TypeError(f"{name} is {vector.dtype}, but the other batch-norm vectors are {param_dtype}")


def check_vector(name: str, vector, channels: int, device: torch.device) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, not {type(vector).__name__}")
    if vector.dim() != 1 or vector.shape[0] != channels:
        raise ValueError(f"{name} must have shape ({channels},), one value a channel, but has {tuple(vector.shape)}")
    check_device(name, vector, device)


def check_residual(residual, shape: Sequence[int], device: torch.device) -> None:
    if residual is None:
        return
    check_input("residual", residual)
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual must have the output's shape {tuple(shape)}, but has {tuple(residual.shape)}")
    check_device("residual", residual, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and x on {device}; move them to one device")


def check_batch(shape: Sequence[int], training: bool) -> None:
    if training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size torch.Size({list(shape)})"
        )


def wants_relu(act: str | None) -> bool:
    if act not in ("relu", None):
        raise ValueError(f'act={act!r} is not supported; it must be "relu" or None')
    return act == "relu"


def pair(name: str, value: int | Sequence[int], least: int) -> list[int]:
    if type(value) is tuple or type(value) is list:  # before Sequence's own, slower answer
        pair = list(value)
    else:
        pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(pair) == 1:  # as conv2d takes it
        pair *= 2
    if len(pair) != 2 or isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be an int or two ints (rows, columns)")
    if min(pair) < least:
        raise ValueError(f"{name}={value!r} must be at least {least}")
    return pair


def conv_shape(shape: Sequence[int], conv_weight: Tensor, stride, padding, dilation) -> tuple[int, ...]:
    """The output's shape for an input of this one, by the formula in torch.nn.Conv2d's documentation."""
    batch, _, height, width = shape
    out_channels, _, *kernel = conv_weight.shape
    rows = (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    if rows < 1 or columns < 1:
        raise ValueError(
            f"x {tuple(shape)} is too small for conv_weight {tuple(conv_weight.shape)} with stride {stride}, "
            f"padding {padding}, dilation {dilation}: the output would be {rows} x {columns}"
        )
    return batch, out_channels, rows, columns

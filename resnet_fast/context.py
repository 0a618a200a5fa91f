"""What surrounds a call: autocast, and tracers and transforms that must see plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import Parameter


def plain_pytorch_reason() -> str | None:
    """Why the current context (tracing, torch.func, forward-mode AD) forbids fused ops; None where it does not."""
    if torch.onnx.is_in_onnx_export():  # by torch.export or by tracing
        return "ONNX has plain PyTorch's ops only"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "TorchScript's tracing records plain PyTorch"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms see through plain PyTorch only"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD needs plain PyTorch: a fused op has no jvp"
    return None


def is_traced(x: Tensor) -> bool:
    """Whether somebody follows the ops that x goes through: torch.compile, a dispatch mode, or x by what it is."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or type(x) not in (Tensor, Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def autocasts(x: Tensor) -> bool:
    """Whether conv2d would cast x: autocast is on, and x is not float64. The meta device has no autocast."""
    device_type = x.device.type
    return device_type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type)


def conv_dtype(x: Tensor) -> torch.dtype:
    """The dtype that conv2d computes x in."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)

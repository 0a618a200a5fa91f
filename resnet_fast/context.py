"""What surrounds a call: autocast, and tracers and transforms that must see plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import Parameter


def plain_pytorch_reason() -> str | None:
    """Why the current context (tracing, torch.func, forward-mode AD) forbids fused ops; None where it does not."""
    if torch.onnx.is_in_onnx_export():  # by torch.export or by tracing
        return "ONNX has plain PyTorch's ops only"
    if _transforms():
        return "torch.func transforms see through plain PyTorch only"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD needs plain PyTorch: a fused op has no jvp"
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        return "TorchScript's tracing records plain PyTorch"
    return None


@torch.compiler.assume_constant_result  # asked by torch.compile as it traces; it guards what the answer depends on
def _transforms() -> bool:
    """Whether this is inside a torch.func transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(x: Tensor) -> bool:
    """Whether x is one of many that vmap, or `is_grads_batched`, which has a vmap of its own, computes at once."""
    return torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)


def is_traced(x: Tensor) -> bool:
    """Whether somebody follows the ops that x goes through: torch.compile, a dispatch mode, or x by what it is."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or type(x) not in (Tensor, Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_followed(x: Tensor) -> bool:
    """Whether somebody follows PyTorch's ops from x on, and would not see others: `is_traced`, tracers, transforms."""
    return is_traced(x) or plain_pytorch_reason() is not None


def autocasts(x: Tensor) -> bool:
    """Whether conv2d would cast x: autocast is on, and x is not float64. The meta device has no autocast."""
    device_type = x.device.type
    return device_type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type)


def conv_dtype(x: Tensor) -> torch.dtype:
    """The dtype that conv2d computes x in."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)

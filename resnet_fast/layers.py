"""A convolution and its batch norm as modules: whether they can be fused as they are, and what `functional` takes.

Everything is looked at on every call, because conversions, parametrizations, hooks and edits may come at any time.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from . import arguments, dispatch
from .backends import native
from .context import autocasts, conv_dtype, plain_pytorch_reason
from .functional import ConvBn
from .shapes import Conv

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


_depth = {"disabled": 0, "any_size": 0}  # a dictionary, whose values torch.compile guards; those of a class it does not


class _OnEveryThread(contextlib.ContextDecorator):
    """A context manager or decorator that is in force on every thread. Reentrant."""

    _name: ClassVar[str]

    def __enter__(self) -> None:
        _depth[self._name] += 1

    def __exit__(self, *exc_info) -> None:
        _depth[self._name] -= 1


class disabled(_OnEveryThread):
    """Context manager in which every fast block, on every thread, runs its stock forward. Reentrant."""

    _name = "disabled"


class any_size(_OnEveryThread):
    """Context manager in which no thread leaves a call to PyTorch because it is small: for checks, on small inputs, of
    what is timed or trusted on large ones. Reentrant."""

    _name = "any_size"


def is_disabled() -> bool:
    """Whether this is inside `disabled()`."""
    return _depth["disabled"] > 0


def why_not_stage(conv_name: str, conv: nn.Module, bn_name: str, bn: nn.Module) -> str | None:
    """Why a convolution and its batch norm cannot be fused; None where they can."""
    reason = why_not_module(conv_name, conv, (nn.Conv2d,))
    if reason is None:
        reason = why_not_module(bn_name, bn, (*_BATCH_NORMS, FrozenBatchNorm2d))
    if reason is not None:
        return reason
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"{conv_name} pads {conv.padding!r} with {conv.padding_mode!r}; only zero padding by numbers is fused"
    if conv.bias is not None and process_group(bn) is not None:
        return f"{bn_name} takes its statistics over processes, which is not fused behind {conv_name}'s bias"
    return None


def why_not_module(name: str, module: nn.Module, types: tuple[type, ...]) -> str | None:
    """Exact types only: a subclass (a parametrization, a quantizable twin) may compute otherwise."""
    if type(module) not in types:
        return f"{name} is {type(module).__name__}, not {' or '.join(t.__name__ for t in types)}"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own, bound to the instance"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks, which a fused call would skip"
    return None


_LITTLE = 16 * 2**20
"""Bytes: of a smaller input a GPU has done a layer's work before the host has launched the next."""


def why_not_worth_it(x: Tensor, backend: str) -> str | None:
    """Why a call that could be fused is better left to PyTorch; None where it is not, or was asked for by name."""
    if x.is_cuda and x.nbytes < _LITTLE and not _depth["any_size"] and dispatch.requested(backend) == "auto":
        return f"input of less than {_LITTLE >> 20} MiB: launches set the time, not the GPU (freeze, or name a backend)"
    return None


def why_not_worth_training(x: Tensor, convs: Sequence[nn.Conv2d], backend: str) -> str | None:
    """The same of a training step of a residual block of these convolutions on a CPU, whose calls take the host longer
    than PyTorch's layers do."""
    if not x.is_cpu or _depth["any_size"] or torch.compiler.is_compiling() or dispatch.requested(backend) != "auto":
        return None
    dtype = conv_dtype(x)
    stride = arguments.pair("stride", convs[0].stride, 1)[0]
    least = native.least_training_bytes(dtype, all(conv.kernel_size == (3, 3) for conv in convs), stride)
    if x.numel() * dtype.itemsize >= least:
        return None
    return f"training on an input of less than {least / 2**20:g} MiB: calls set the time (or name backend, train_stage)"


def why_not_called(op: str, x: Tensor, conv: nn.Conv2d, backend: str) -> str | None:
    """Why this call, whose input `conv` is the first to take, cannot be fused; None where it can."""
    if (reason := why_not_worth_it(x, backend)) is not None:
        return reason
    if is_disabled() or os.environ.get("RESNET_FAST_DISABLE", "0") not in ("", "0"):
        return "fusion is disabled (resnet_fast.disabled() or RESNET_FAST_DISABLE)"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "global module hooks are registered, which a fused call would skip"
    reason = plain_pytorch_reason()
    if reason is not None:
        return reason
    if x.dim() != 4 or x.numel() == 0 or x.shape[1] != conv.in_channels or x.device != conv.weight.device:
        return f"input {tuple(x.shape)} on {x.device} is left to the stock forward"
    dtype = conv_dtype(x)
    if dtype != conv.weight.dtype and not autocasts(x):
        return f"input is {dtype} and conv1.weight {conv.weight.dtype}"
    if dispatch.runs_fused(op, x.device.type, dtype, backend):
        return None
    return f"no fused backend for {x.device.type} {dtype} ({dispatch.why_not_fused(op, x.device.type, dtype)})"


def why_not_normalised(batch_norms: Sequence[nn.Module], x: Tensor) -> str | None:
    """Why these batch norms together, in a call with x, are stock; None where they can be fused."""
    if len(set(batch_norms)) < len(batch_norms):
        return "one batch norm is used more than once, so that its statistics are updated in turn"
    if len(_groups(batch_norms)) > 1:
        return "its batch norms take their statistics over different groups of processes"
    dtype = conv_dtype(x)
    for bn in batch_norms:
        if type(bn) is FrozenBatchNorm2d and bn.weight.dtype != dtype:
            return f"FrozenBatchNorm2d is {bn.weight.dtype} beside {dtype} activations and would promote them"
    return None


def group_name(batch_norms: Sequence[nn.Module]) -> str:
    """`functional`'s name of the processes over which they take their statistics; "" for this one alone."""
    return next((group.group_name for group in _groups(batch_norms) if group is not None), "")


def _groups(batch_norms: Sequence[nn.Module]) -> set[dist.ProcessGroup | None]:
    return {process_group(bn) for bn in batch_norms if has_batch_statistics(bn)}


def conv_bn(conv: nn.Conv2d, bn: nn.Module) -> ConvBn:
    """The two as `functional` takes them, with the momentum of this batch, which `count_batch` is still to count."""
    training, momentum = False, 0.0
    running_mean, running_var = _tensor(bn, "running_mean"), _tensor(bn, "running_var")
    if type(bn) in _BATCH_NORMS:
        momentum = 0.0 if bn.momentum is None else bn.momentum
        if _counts(bn) and bn.momentum is None:  # cumulative average
            momentum = 1.0 / float(bn.num_batches_tracked + 1)
        training = has_batch_statistics(bn)
        if bn.training and not bn.track_running_stats:
            running_mean = running_var = None
    statistics = (running_mean, running_var, _tensor(bn, "weight"), _tensor(bn, "bias"))
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return ConvBn(_tensor(conv, "weight"), *statistics, _tensor(conv, "bias"), *geometry, bn.eps, training, momentum)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """The attribute, which takes ten times as long where it is a parameter or a buffer."""
    found = module._parameters.get(name)
    if found is None:
        found = module._buffers.get(name)
    return getattr(module, name) if found is None else found


def count_batch(batch_norms: Sequence[nn.Module]) -> None:
    """What torch.nn.BatchNorm2d.forward does to num_batches_tracked. It comes after the op, as the running statistics
    do, so that a forward that checkpointing ends early counts for neither."""
    if counters := [bn.num_batches_tracked for bn in batch_norms if _counts(bn)]:
        torch._foreach_add_(counters, 1)


def _counts(bn: nn.Module) -> bool:
    return type(bn) in _BATCH_NORMS and bn.training and bn.track_running_stats and bn.num_batches_tracked is not None


def has_batch_statistics(bn: nn.Module) -> bool:
    """Whether this batch norm now normalises with the batch's own statistics."""
    return type(bn) in _BATCH_NORMS and (bn.training or (bn.running_mean is None and bn.running_var is None))


def process_group(bn: nn.Module) -> dist.ProcessGroup | None:
    """The processes that this batch norm takes its statistics over; None for this one alone."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def conv_of(module: nn.Module, shape: Sequence[int]) -> Conv:
    """The shapes of a convolution, an nn.Conv2d or a FrozenConv2d, of an input of `shape` (N, C, H, W)."""
    out_channels, _, *kernel = module.weight.shape
    spatial = (tuple(kernel), module.stride, module.padding, module.dilation)
    return Conv(*shape, out_channels, *spatial, module.groups)

"""Drop-in residual blocks: torchvision's, with the same constructor, parameters, buffers and numbers, computed fused.

    y = relu(F(x) + shortcut(x))        He et al. 2015, https://arxiv.org/abs/1512.03385

A block holds parameters and state, the arithmetic is `functional.conv_bn_act`'s. What the children are is looked at on
every call, because SyncBatchNorm conversion, parametrizations, hooks and edits of stride or dilation may come after
construction; where something cannot be fused, the stock forward runs and the reason is logged once.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

from . import _log, dispatch
from .context import autocasts, conv_dtype, plain_pytorch_reason
from .functional import ConvBn, residual_block

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_disabled_depth = 0


class FusionError(RuntimeError):
    """A block that must be fused (`strict=True`) cannot be; the message says why."""


class disabled:
    """Context manager in which every fast block, on every thread, runs its stock forward. Reentrant."""

    def __enter__(self) -> None:
        global _disabled_depth
        _disabled_depth += 1

    def __exit__(self, *exc_info) -> None:
        global _disabled_depth
        _disabled_depth -= 1


class _FastBlock:
    """What both blocks share: deciding between the fused and the stock forward."""

    fast_backend: str = "auto"
    fast_strict: bool = False
    fast_train_stage: int | str = "auto"

    def why_stock(self, x: Tensor | None = None) -> str | None:
        """Why the stock forward would run (for input `x`, if given); None where the fused one does."""
        reason = why_not_fusable(self)
        if reason is None and x is not None:
            reason = _why_not_now(self, x)
        return reason

    def _fused_or_none(self, x: Tensor) -> Tensor | None:
        """The block's output, or None where the stock forward has to compute it."""
        reason = self.why_stock(x)
        if reason is None:
            return self._fused(x)
        if not torch.compiler.is_compiling():
            _say(self, reason)
        return None

    def _fused(self, x: Tensor) -> Tensor:
        """relu(F(x) + shortcut), by one op where something is learnt."""
        shortcut = self.downsample
        if shortcut is not None:
            shortcut = shortcut(x) if why_not_downsample(shortcut) is not None else conv_bn(*shortcut)
        main = [conv_bn(conv, bn) for conv, bn in self._stages()]
        settings = {"train_stage": self.fast_train_stage, "backend": self.fast_backend}
        y = residual_block(x, main, shortcut, group=_group(self), **settings)
        for bn in batch_norms(self):
            count_batch(bn)
        return y


class FastBasicBlock(_FastBlock, BasicBlock):
    """torchvision's BasicBlock (ResNet-18/34), fused: x (N, Cin, H, W) -> (N, planes, H / stride, W / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; dtype, layout and running statistics as BasicBlock's."""
        if not torch.jit.is_scripting():
            out = self._fused_or_none(x)
            return super().forward(x) if out is None else out
        identity = x  # TorchScript compiles only this copy of BasicBlock.forward
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)

    def _stages(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)


class FastBottleneck(_FastBlock, Bottleneck):
    """torchvision's Bottleneck (ResNet-50 up, ResNeXt, Wide ResNet), fused: (N, Cin, H, W) -> (N, 4 planes, P, Q)"""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; dtype, layout and running statistics as Bottleneck's."""
        if not torch.jit.is_scripting():
            out = self._fused_or_none(x)
            return super().forward(x) if out is None else out
        identity = x  # TorchScript compiles only this copy of Bottleneck.forward
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)

    def _stages(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)


FAST: dict[type, type] = {BasicBlock: FastBasicBlock, Bottleneck: FastBottleneck}
"""Stock block type -> its fast subclass."""


def fast_type(block: nn.Module) -> type | None:
    """The fast class for a block of exactly a stock or fast type; None for anything else."""
    return FAST.get(type(block)) or (type(block) if type(block) in FAST.values() else None)


def why_not_fusable(block: nn.Module) -> str | None:
    """Why `block`'s children, as they are now, cannot be fused; None where they can. Its own type is not looked at."""
    stages = fast_type(block)._stages(block)
    for number, (conv, bn) in enumerate(stages, 1):
        reason = why_not_stage(f"conv{number}", conv, f"bn{number}", bn)
        if reason is not None:
            return reason
    return _why_not_module("relu", block.relu, (nn.ReLU,))


def why_not_stage(conv_name: str, conv: nn.Module, bn_name: str, bn: nn.Module) -> str | None:
    """Why a convolution and its batch norm cannot be fused; None where they can."""
    reason = _why_not_module(conv_name, conv, (nn.Conv2d,))
    if reason is None:
        reason = _why_not_module(bn_name, bn, (*_BATCH_NORMS, FrozenBatchNorm2d))
    if reason is not None:
        return reason
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"{conv_name} pads {conv.padding!r} with {conv.padding_mode!r}; only zero padding by numbers is fused"
    return None


def _why_not_module(name: str, module: nn.Module, types: tuple[type, ...]) -> str | None:
    """Exact types only: a subclass (SyncBatchNorm, a parametrization, a quantizable twin) may compute otherwise."""
    if type(module) not in types:
        return f"{name} is {type(module).__name__}, not {' or '.join(t.__name__ for t in types)}"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own, bound to the instance"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks, which a fused call would skip"
    return None


def why_not_downsample(downsample: nn.Module) -> str | None:
    """Why the shortcut runs as the module it is (the rest of the block is fused all the same)."""
    reason = _why_not_module("downsample", downsample, (nn.Sequential,))
    if reason is None and len(downsample) != 2:
        reason = f"downsample has {len(downsample)} layers, not a convolution and a batch norm"
    return reason or why_not_stage("downsample.0", downsample[0], "downsample.1", downsample[1])


def _why_not_now(block: nn.Module, x: Tensor) -> str | None:
    """Why this call cannot be fused, whatever the children are."""
    if _disabled_depth or os.environ.get("RESNET_FAST_DISABLE", "0") not in ("", "0"):
        return "fusion is disabled (resnet_fast.disabled() or RESNET_FAST_DISABLE)"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "global module hooks are registered, which a fused call would skip"
    reason = plain_pytorch_reason()
    if reason is not None:
        return reason
    weight = block.conv1.weight
    if x.dim() != 4 or x.numel() == 0 or x.shape[1] != block.conv1.in_channels or x.device != weight.device:
        return f"input {tuple(x.shape)} on {x.device} is left to the stock forward"
    dtype = conv_dtype(x)
    if dtype != weight.dtype and not autocasts(x):
        return f"input is {dtype} and conv1.weight {weight.dtype}"
    groups = {process_group(bn) for bn in batch_norms(block)}
    if len(groups) > 1:
        return "its batch norms take their statistics over different groups of processes"
    for _, bn in block._stages():
        if type(bn) is FrozenBatchNorm2d and bn.weight.dtype != dtype:
            return f"FrozenBatchNorm2d is {bn.weight.dtype} beside {dtype} activations and would promote them"
    op = "residual_block_train" if block.training else "conv_bn_act"
    if dispatch.runs_fused(op, x.device.type, dtype, block.fast_backend):
        return None
    return f"no fused backend for {x.device.type} {dtype} ({dispatch.why_not_fused(op, x.device.type, dtype)})"


def batch_norms(block: nn.Module) -> list[nn.Module]:
    """Those of the block's layers, and of a downsample that is fused."""
    norms = [bn for _, bn in fast_type(block)._stages(block)]
    if block.downsample is not None and why_not_downsample(block.downsample) is None:
        norms.append(block.downsample[1])
    return norms


def _group(block: nn.Module) -> str:
    groups = {process_group(bn) for bn in batch_norms(block) if has_batch_statistics(bn)} - {None}
    return groups.pop().group_name if groups else ""


def conv_bn(conv: nn.Conv2d, bn: nn.Module) -> ConvBn:
    """The two as `functional` takes them, with the momentum of this batch, which `count_batch` is still to count."""
    training, momentum, running_mean, running_var = False, 0.0, bn.running_mean, bn.running_var
    if type(bn) in _BATCH_NORMS:
        momentum = 0.0 if bn.momentum is None else bn.momentum
        if _counts(bn) and bn.momentum is None:  # cumulative average
            momentum = 1.0 / float(bn.num_batches_tracked + 1)
        training = has_batch_statistics(bn)
        if bn.training and not bn.track_running_stats:
            running_mean = running_var = None
    statistics = (running_mean, running_var, bn.weight, bn.bias)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return ConvBn(conv.weight, *statistics, conv.bias, *geometry, bn.eps, training, momentum)


def count_batch(bn: nn.Module) -> None:
    """What torch.nn.BatchNorm2d.forward does to num_batches_tracked. It comes after the op, as the running statistics
    do, so that a forward that checkpointing ends early counts for neither."""
    if _counts(bn):
        bn.num_batches_tracked.add_(1)


def _counts(bn: nn.Module) -> bool:
    return (
        type(bn) in _BATCH_NORMS and bn.training and bn.track_running_stats and bn.num_batches_tracked is not None
    )


def has_batch_statistics(bn: nn.Module) -> bool:
    """Whether this batch norm now normalises with the batch's own statistics."""
    return type(bn) in _BATCH_NORMS and (bn.training or (bn.running_mean is None and bn.running_var is None))


def process_group(bn: nn.Module) -> dist.ProcessGroup | None:
    """The processes that this batch norm takes its statistics over; None for this one alone."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _say(block: _FastBlock, reason: str) -> None:
    if block.fast_strict and not _disabled_depth:
        raise FusionError(f"{type(block).__name__} was to be fused (strict=True) but cannot be: {reason}")
    _log.once(f"{type(block).__name__} runs its stock forward: {reason}")

"""Drop-in residual blocks: torchvision's, with the same constructor, parameters, buffers and numbers, computed fused.

    y = relu(F(x) + shortcut(x))        He et al. 2015, https://arxiv.org/abs/1512.03385

A block holds parameters and state, the arithmetic is `functional.conv_bn_act`'s. What the children are is looked at on
every call, because SyncBatchNorm conversion, parametrizations, hooks and edits of stride or dilation may come after
construction; where something cannot be fused, the stock forward runs and the reason is logged once.
"""

import functools
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from . import _log, training
from .functional import ConvBn, residual_block
from .functional.repeat import Repeatable
from .layers import (
    conv_bn,
    count_batch,
    group_name,
    is_disabled,
    why_not_called,
    why_not_module,
    why_not_normalised,
    why_not_stage,
    why_not_worth_it,
    why_not_worth_training,
)


class FusionError(RuntimeError):
    """A block that must be fused (`strict=True`) cannot be; the message says why."""


_repeatable: WeakKeyDictionary[nn.Module, Repeatable] = WeakKeyDictionary()
"""Of blocks, their last call in which nothing was learnt."""


class FastBlock:
    """What all blocks share: deciding between the fused and the stock forward."""

    fast_backend: str = "auto"
    fast_strict: bool = False
    fast_train_stage: int | str = "auto"

    def why_stock(self, x: Tensor | None = None) -> str | None:
        """Why the stock forward would run (for input `x`, if given); None where the fused one does."""
        reason = why_not_fusable(self)
        if reason is None and x is not None:
            reason = _why_not_now(self, x)
        return reason

    def _why_not_others(self) -> str | None:
        """Why what a block has beside convolutions and batch norms cannot be fused; None where it can."""
        return why_not_module("relu", self.relu, (nn.ReLU,))

    def _fused_or_none(self, x: Tensor) -> Tensor | None:
        """The block's output, or None where the stock forward has to compute it."""
        if not isinstance(x, Tensor):  # torch.fx's Proxy, whose graph is of the stock forward, or a mistake
            return None
        reason = why_not_worth_it(x, self.fast_backend) or self.why_stock(x)
        if reason is None:
            return self._fused(x)
        if not torch.compiler.is_compiling():
            _say(self, reason)
        return None

    def _fused(self, x: Tensor) -> Tensor:
        """relu(F(x) + shortcut), by one op where something is learnt."""
        layers, shortcut = self._layers(), None
        settings = {"train_stage": self.fast_train_stage, "backend": self.fast_backend}
        if not torch.compiler.is_compiling() and layers is not None:
            repeatable = _repeatable.get(self)
            if repeatable is not None and (y := repeatable(x, layers, self.fast_backend)) is not None:
                return y
            settings["keep"] = functools.partial(_repeatable.__setitem__, self)
        main = [conv_bn(conv, bn) for conv, bn in self._stages()] if layers is None else layers
        if layers is None:
            shortcut = self.downsample(x)
        elif self.downsample is not None:
            *main, shortcut = layers
        norms = batch_norms(self)
        y = residual_block(x, main, shortcut, group=group_name(norms), **settings)
        count_batch(norms)
        return y

    def _layers(self) -> list[ConvBn] | None:
        """The main branch's and the downsample's; None where the shortcut runs as the module it is."""
        stages = self._stages()
        if self.downsample is not None:
            if why_not_downsample(self.downsample) is not None:
                return None
            stages = *stages, self.downsample
        return [conv_bn(conv, bn) for conv, bn in stages]

    def last_call(self) -> Repeatable | None:
        """The last call in which nothing was learnt, if it can be repeated; of no use once something has changed."""
        return _repeatable.get(self)

    def repeats(self, call: Repeatable, x: Tensor) -> bool:
        """Whether the block, called now and with what `call` took, of x's kind, would do the same: x is of a block
        before it, and not looked at otherwise."""
        reason = why_not_module("", self, (type(self),)) or why_not_fusable(self)
        reason = reason or why_not_normalised(batch_norms(self), x)
        layers = None if reason is not None else self._layers()
        return layers is not None and call.is_of(layers, self.fast_backend)


class BasicStages:
    """Where a basic block's layers are, which are named alike in torchvision and timm."""

    def _stages(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        children = self._modules  # an attribute of a module costs ten times as much
        return (children["conv1"], children["bn1"]), (children["conv2"], children["bn2"])


class BottleneckStages:
    """Where a bottleneck's are."""

    def _stages(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        children = self._modules
        first, second = (children["conv1"], children["bn1"]), (children["conv2"], children["bn2"])
        return first, second, (children["conv3"], children["bn3"])


class FastBasicBlock(BasicStages, FastBlock, BasicBlock):
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


class FastBottleneck(BottleneckStages, FastBlock, Bottleneck):
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


FAST: dict[type, type] = {BasicBlock: FastBasicBlock, Bottleneck: FastBottleneck}
"""Stock block type -> its fast subclass: torchvision's, and timm's once `libraries` has found it."""


def fast_type(block: nn.Module) -> type | None:
    """The fast class for a block of exactly a stock or fast type; None for anything else."""
    return FAST.get(type(block)) or (type(block) if type(block) in FAST.values() else None)


def _layout(block: nn.Module) -> type:
    """The class that says where the block's layers are: of a fast block its own, which may be somebody's subclass."""
    return fast_type(block) or type(block)


def why_not_fusable(block: nn.Module) -> str | None:
    """Why `block`'s children, as they are now, cannot be fused; None where they can. Its own type is not looked at."""
    fast = _layout(block)
    for number, (conv, bn) in enumerate(fast._stages(block), 1):
        reason = why_not_stage(f"conv{number}", conv, f"bn{number}", bn)
        if reason is not None:
            return reason
    return fast._why_not_others(block) or _why_not_shortcut(block.downsample)


def why_not_downsample(downsample: nn.Module) -> str | None:
    """Why the shortcut runs as the module it is (the rest of the block is fused all the same)."""
    reason = why_not_module("downsample", downsample, (nn.Sequential,))
    if reason is None and len(downsample) != 2:
        reason = f"downsample has {len(downsample)} layers, not a convolution and a batch norm"
    return reason or why_not_stage("downsample.0", downsample[0], "downsample.1", downsample[1])


def batch_norms(block: nn.Module) -> list[nn.Module]:
    """Those of the block's layers, and of a downsample that is fused."""
    norms = [bn for _, bn in _layout(block)._stages(block)]
    if block.downsample is not None and why_not_downsample(block.downsample) is None:
        norms.append(block.downsample[1])
    return norms


def _why_not_now(block: nn.Module, x: Tensor) -> str | None:
    """Why this call cannot be fused, whatever the children are."""
    op = "residual_block_train" if block.training else "conv_bn_act"
    reason = why_not_called(op, x, block.conv1, block.fast_backend)
    if reason is None and block.training and training.requested(block.fast_train_stage) is None:
        convs = [conv for conv, _ in _layout(block)._stages(block)]
        reason = why_not_worth_training(x, convs, block.fast_backend)
    return reason or why_not_normalised(batch_norms(block), x)


def _why_not_shortcut(shortcut: nn.Module | None) -> str | None:
    """Why a shortcut cannot run before the convolutions that read the same input; None where it can."""
    while isinstance(shortcut, nn.Sequential) and len(shortcut):
        shortcut = shortcut[0]
    return "downsample changes the block's input in place" if getattr(shortcut, "inplace", False) else None


def _say(block: nn.Module, reason: str) -> None:
    """Log once why the stock forward runs; raise FusionError where it must not."""
    if block.fast_strict and not is_disabled():
        raise FusionError(f"{type(block).__name__} was to be fused (strict=True) but cannot be: {reason}")
    _log.once(f"{type(block).__name__} runs its stock forward: {reason}")

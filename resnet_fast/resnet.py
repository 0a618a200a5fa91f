"""A ResNet with its stem fused: conv1, bn1, ReLU and maxpool as one op, in training one autograd node.

The stem's activations are the largest of the network: stock training keeps the convolution's output, the ReLU's and the
pooling's 8-byte indices for the backward pass, and this keeps the first of them.
"""

import logging
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from . import _log
from .functional import stem
from .layers import (
    conv_bn,
    count_batch,
    group_name,
    has_batch_statistics,
    why_not_called,
    why_not_module,
    why_not_normalised,
    why_not_stage,
)

_POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False, "return_indices": False}


class FastStem:
    """What networks with a fused stem share, whose ReLU is the child named `fast_activation`."""

    fast_backend: str = "auto"
    fast_activation: ClassVar[str] = "relu"

    def why_stock_stem(self, x: Tensor | None = None) -> str | None:
        """Why the stem would run stock (for input `x`, if given); None where it is fused."""
        reason = why_not_stem(self, self.fast_activation)
        if reason is None and x is not None:
            op = "stem_train" if has_batch_statistics(self.bn1) else "stem"
            reason = why_not_called(op, x, self.conv1, self.fast_backend) or why_not_normalised([self.bn1], x)
        return reason

    def _fused_stem(self, x: Tensor) -> Tensor | None:
        """The stem's output (N, K, P / 2, Q / 2), or None where the stock forward has to compute it."""
        if not isinstance(x, Tensor):
            return None
        reason = self.why_stock_stem(x)
        if reason is not None:
            if not torch.compiler.is_compiling():
                _log.once(f"{type(self).__name__} runs its stock stem: {reason}", logging.INFO)
            return None
        layer, group = conv_bn(self.conv1, self.bn1), group_name([self.bn1])
        y = stem(x, layer, group=group, backend=self.fast_backend)
        count_batch([self.bn1])
        return y

    def _staged(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class FastResNet(FastStem, ResNet):
    """torchvision's ResNet, what `optimize` makes of one: the blocks are fused for themselves, and here the stem."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._forward_fused(x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # TorchScript compiles only this copy of ResNet's
        return self._behind_stem(x)

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> Tensor:
        y = self._fused_stem(x)
        return super()._forward_impl(x) if y is None else self._behind_stem(y)

    def _behind_stem(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self._staged(x)), 1))


FAST_NETWORKS: dict[type, type] = {ResNet: FastResNet}
"""Stock network type -> its fast subclass, as `blocks.FAST`."""


def why_not_stem(model: nn.Module, activation: str) -> str | None:
    """Why the children of `model` that make its stem, as they are now, cannot be fused; None where they can."""
    reason = why_not_stage("conv1", model.conv1, "bn1", model.bn1)
    reason = reason or why_not_module(activation, getattr(model, activation), (nn.ReLU,))
    reason = reason or why_not_module("maxpool", model.maxpool, (nn.MaxPool2d,))
    if reason is not None:
        return reason
    if model.conv1.bias is not None:
        return "conv1 has a bias"
    for name, usual in _POOL.items():
        value = getattr(model.maxpool, name)
        if value not in (usual, (usual, usual)):
            return f"maxpool has {name}={value}, not {usual}"
    return None

"""timm's ResNets (timm.models.resnet): their residual blocks, stems and frozen networks, beside torchvision's.

Imported by `libraries` where something has imported timm. The layers are named as in torchvision but for the ReLUs, and
a block may have more: anti-aliasing and attention, which are not fused, and DropBlock and DropPath, which do nothing in
eval mode and are not fused in training. What is not fused runs as timm has it.
"""

from typing import ClassVar

import torch
from timm.layers import DropBlock2d, DropPath, SelectAdaptivePool2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .blocks import FAST, BasicStages, BottleneckStages, FastBlock
from .layers import why_not_module
from .planned import PLANNED, PlannedNetwork
from .resnet import FAST_NETWORKS, FastStem

_NOTHING_IN_EVAL_MODE = (DropBlock2d, DropPath)


class _FastTimmBlock(FastBlock):
    """What both blocks share."""

    def _why_not_others(self) -> str | None:
        for name, module in self._modules.items():
            if module is None or name == "downsample" or name.startswith(("conv", "bn")):
                continue
            types = (nn.ReLU,) if name.startswith("act") else (nn.Identity,)
            if name.startswith("drop") and not module.training:
                types = (*types, *_NOTHING_IN_EVAL_MODE)
            if (reason := why_not_module(name, module, types)) is not None:
                return reason
        return None

    def _joined(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """What of timm's forward lies between the last batch norm and the last ReLU, for TorchScript."""
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return x + shortcut


class FastTimmBasicBlock(BasicStages, _FastTimmBlock, BasicBlock):
    """timm's BasicBlock, fused: x (N, Cin, H, W) -> (N, planes, H / stride, W / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; dtype, layout and running statistics as BasicBlock's."""
        if not torch.jit.is_scripting():
            out = self._fused_or_none(x)
            return super().forward(x) if out is None else out
        # TorchScript compiles only this copy of BasicBlock.forward
        out = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return self.act2(self._joined(self.bn2(self.conv2(out)), x))


class FastTimmBottleneck(BottleneckStages, _FastTimmBlock, Bottleneck):
    """timm's Bottleneck, fused: x (N, Cin, H, W) -> (N, 4 planes, H / stride, W / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; dtype, layout and running statistics as Bottleneck's."""
        if not torch.jit.is_scripting():
            out = self._fused_or_none(x)
            return super().forward(x) if out is None else out
        # TorchScript compiles only this copy of Bottleneck.forward
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(out)))))
        return self.act3(self._joined(self.bn3(self.conv3(out)), x))


class FastTimmResNet(FastStem, ResNet):
    """timm's ResNet, what `optimize` makes of one: the blocks are fused for themselves, and here the stem."""

    fast_activation: ClassVar[str] = "act1"

    def forward_features(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) -> the last stage's output."""
        if not torch.jit.is_scripting():
            return self._features_fused(x)
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))  # TorchScript compiles only this copy of ResNet's
        return self._staged(x)

    @torch.jit.unused
    def _features_fused(self, x: Tensor) -> Tensor:
        y = None if self.grad_checkpointing else self._fused_stem(x)
        return super().forward_features(x) if y is None else self._staged(y)


class PlannedTimmResNet(PlannedNetwork, ResNet):
    """A frozen timm ResNet."""

    frozen_activation: ClassVar[str] = "act1"
    frozen_pool: ClassVar[str] = "global_pool"

    def behind(self, y: Tensor) -> Tensor:
        return self.forward_head(y)

    def _pools_usually(self) -> bool:
        pool = self.global_pool
        return type(pool) is SelectAdaptivePool2d and pool.pool_type == "avg" and type(pool.flatten) is nn.Flatten


FAST.update({BasicBlock: FastTimmBasicBlock, Bottleneck: FastTimmBottleneck})
FAST_NETWORKS[ResNet] = FastTimmResNet
PLANNED[ResNet] = PlannedTimmResNet

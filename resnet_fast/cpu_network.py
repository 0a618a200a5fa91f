"""A `Section` of a frozen network as one call on a CPU, for inputs of one shape: oneDNN's convolutions and Winograd's.

What `frozen.py` does layer by layer, without Python between the layers, which takes 20 microseconds a convolution.
"""

from collections.abc import Sequence

import torch

from . import extension
from .frozen import FrozenBlock, FrozenConv2d
from .layers import conv_of
from .planner import Section, why_not_plannable


def why_not(section: Section) -> str | None:
    """Why `section` cannot be one call here; None where it can."""
    reason = extension.available() or why_not_plannable(section)
    if reason is None and not all(conv.runs_onednn() for _, conv in section.convs()):
        return f"oneDNN computes no convolutions of {section.dtype} on this CPU, or is off"
    return reason


@torch.no_grad()
def build(section: Section, shape: Sequence[int]) -> object:
    """The `resnet_fast._C.FrozenNetwork` of `section`, which `why_not` has nothing against, for inputs of `shape`.

    Raises:
        ValueError: a convolution does not fit its input.
    """
    builder = _Builder(shape)
    x = 0
    if section.stem is not None:
        x = builder.conv(*section.stem, x)
    if section.max_pool:
        x = builder.max_pool(x)
    for name, block in section.blocks:
        x = builder.block(name, block, x)
    return builder.network


class _Builder:
    """Values are numbers; of each the shape is known."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.network, self.shapes = extension.load().FrozenNetwork(), [torch.Size(shape)]

    def block(self, name: str, block: FrozenBlock, x: int) -> int:
        *early, last = block.convs
        value = x
        for number, module in enumerate(early, 1):
            value = self.conv(f"{name}.conv{number}", module, value)
        shortcut = x if block.downsample is None else self.conv(f"{name}.downsample", block.downsample, x)
        return self.conv(f"{name}.conv{len(block.convs)}", last, value, shortcut)

    def conv(self, name: str, module: FrozenConv2d, x: int, residual: int | None = None) -> int:
        shape, wanted = self.shapes[x], module.weight.shape[1] * module.groups
        if len(shape) != 4 or shape[1] != wanted:
            raise ValueError(f"{name} takes {wanted} channels; its input is {tuple(shape)}")
        conv = conv_of(module, shape)
        if min(conv.out_height, conv.out_width) < 1:
            raise ValueError(f"{name} does not fit into its input's {conv.height}x{conv.width} pixels")
        if residual is not None and tuple(self.shapes[residual]) != tuple(conv.y_shape):
            raise ValueError(f"{name} gives {tuple(conv.y_shape)} and is added to {tuple(self.shapes[residual])}")
        self.shapes.append(torch.Size(conv.y_shape))
        return self.network.conv(x, residual, **module.prepared(shape, residual is not None))

    def max_pool(self, x: int) -> int:
        batch, channels, height, width = self.shapes[x]
        self.shapes.append(torch.Size((batch, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)))
        return self.network.max_pool(x)

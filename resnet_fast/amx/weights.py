"""Weights as AMX tile products and dot products take them: blocks of 32 input by 32 output channels."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frozen import FrozenConv2d
from ..planner import Section

VECTOR = 32
"""Channels in a block."""

IMAGE_CHANNELS = 4
"""Of a stem's input, the image, at most: its pixels lie one behind another, and a product takes a row of the kernel."""

PLANES = {torch.bfloat16: 1, torch.float32: 3}
"""bfloat16s that a value of each dtype is the sum of."""


@dataclass(frozen=True)
class Packed:
    """One layer's weights.

    weight: bfloat16 (K / 32, C / 32, taps, planes, 2, 16, 16, 2): in every block two halves of 16 output channels, in
    those 16 pairs of input channels. bias: float32 (K,), zero where K is padded to whole blocks. taps: the kernel's
    positions as (row, column) from the first pixel that a window is placed by. blocks: of input channels that an output
    block sums up; outputs_per_group: output blocks that share them.
    """

    weight: Tensor
    bias: Tensor
    taps: list[list[int]]
    blocks: int
    outputs_per_group: int

    @property
    def bytes(self) -> int:
        """Of weight and bias."""
        return self.weight.nbytes + self.bias.nbytes


class Weights:
    """Those of a section, each packed when it is first asked for. head: the classifier's are among them."""

    def __init__(self, section: Section, head: bool) -> None:
        self.section, self.head = section, head
        self._packed: dict[tuple[nn.Module, bool], Packed] = {}

    def of(self, module: nn.Module, winograd: bool = False) -> Packed:
        """Of one of the section's modules. winograd: for Winograd's products, of a 3x3."""
        key = module, winograd
        if key not in self._packed:
            self._packed[key] = self._pack(module, winograd)
        return self._packed[key]

    def _pack(self, module: nn.Module, winograd: bool) -> Packed:
        if winograd:
            return pack_winograd(module)
        if isinstance(module, nn.Linear):
            return pack_linear(module)
        return pack_stem(module) if self.section.stem and module is self.section.stem[1] else pack(module)


def why_not_conv(name: str, conv: FrozenConv2d) -> str | None:
    """Why `conv`, called `name`, cannot be packed; None where it can."""
    if isinstance(conv.padding, str) or conv.stride[0] != conv.stride[1]:
        return f"{name} has padding by name, or strides that differ"
    if conv.groups == 1:
        return None
    channels, out_channels = conv.weight.shape[1], conv.weight.shape[0] // conv.groups
    whole = channels % VECTOR == 0 and out_channels % VECTOR == 0
    inside = out_channels == channels and VECTOR % channels == 0 and conv.weight.shape[0] % VECTOR == 0
    return None if whole or inside else f"{name} has groups of {channels} channels, which blocks of 32 do not fit"


def why_not_stem(name: str, conv: FrozenConv2d) -> str | None:
    """`why_not_conv` for the convolution of an image."""
    _, channels, _, width = conv.weight.shape
    wide = channels > IMAGE_CHANNELS or channels * width > VECTOR
    if wide or conv.groups > 1 or tuple(conv.dilation) != (1, 1):
        return f"{name} is not a dense convolution of at most {IMAGE_CHANNELS} channels, and {VECTOR} weights in a row"
    return None if conv.relu else f"{name} has no ReLU"


def pack(conv: FrozenConv2d) -> Packed:
    """Of any convolution but a stem's."""
    weight = conv.weight
    out_channels, channels, rows, columns = weight.shape
    (down, right), (top, left) = conv.dilation, conv.padding
    taps = [[row * down - top, column * right - left] for row in range(rows) for column in range(columns)]
    if conv.groups == 1 or channels % VECTOR == 0:
        return _packed(weight.flatten(2), conv.bias, taps, out_channels // conv.groups)
    # Groups of less than a block: every output block takes its own input block, with zeros between groups.
    place = torch.arange(out_channels) // channels % (VECTOR // channels)
    dense = weight.new_zeros(out_channels, VECTOR // channels, channels, rows, columns)
    dense[torch.arange(out_channels), place] = weight
    return _packed(dense.flatten(1, 2).flatten(2), conv.bias, taps, VECTOR)


def pack_stem(conv: FrozenConv2d) -> Packed:
    """A tap is a row of the kernel, whose weights, pixel by pixel, are the input channels."""
    out_channels, _, rows, _ = conv.weight.shape
    (top, left) = conv.padding
    taps = [[row - top, -left] for row in range(rows)]
    return _packed(conv.weight.permute(0, 3, 1, 2).flatten(1, 2), conv.bias, taps, out_channels)


def pack_winograd(conv: FrozenConv2d) -> Packed:
    """Of a 3x3 for Winograd's F(2x2, 3x3): G w G' (Lavin and Gray 2016, arXiv:1509.09308).

    weight: (K / 32, 16, C / 32, 1, 2, 16, 16, 2); there are no taps.
    """
    rows = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    weight = torch.einsum("ir,kcrs,js->kcij", rows, conv.weight.float(), rows)
    packed = _packed(weight.to(conv.weight.dtype).flatten(2), conv.bias, [], conv.weight.shape[0])
    return replace(packed, weight=packed.weight.transpose(1, 2).contiguous())


def pack_linear(linear: nn.Linear) -> Packed:
    """As a 1x1 convolution of one pixel."""
    return _packed(linear.weight.unsqueeze(-1), linear.bias, [[0, 0]], linear.out_features)


def _packed(weight: Tensor, bias: Tensor | None, taps: list[list[int]], group_channels: int) -> Packed:
    """weight: (K, C, positions). group_channels: output channels that share their input channels."""
    out_channels, channels, positions = weight.shape
    out_blocks, blocks = -(-out_channels // VECTOR), -(-channels // VECTOR)
    weight = F.pad(weight, (0, 0, 0, blocks * VECTOR - channels, 0, out_blocks * VECTOR - out_channels))
    planes = torch.stack(_split(weight))
    halves = planes.view(len(planes), out_blocks, 2, VECTOR // 2, blocks, VECTOR // 2, 2, positions)
    wide_bias = weight.new_zeros(out_blocks * VECTOR, dtype=torch.float32)
    if bias is not None:
        wide_bias[:out_channels] = bias
    ordered = halves.permute(1, 4, 7, 0, 2, 5, 3, 6).contiguous()
    return Packed(ordered, wide_bias, taps, blocks, -(-group_channels // VECTOR))


def _split(weight: Tensor) -> list[Tensor]:
    """bfloat16s whose sum is `weight`."""
    if weight.dtype == torch.bfloat16:
        return [weight]
    high = weight.bfloat16()
    middle = (weight - high.float()).bfloat16()
    return [high, middle, (weight - high.float() - middle.float()).bfloat16()]

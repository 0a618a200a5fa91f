"""From a `Section` and an image size to a `Program` of the C++ extension: its buffers, its steps, and what they cost.

Large images with few channels go through their layers one by one, each thread with its own, so that what is between
the layers stays in its second cache level. From where images are small, 16 of them lie side by side and fill the tiles,
and the threads share each layer, so that its weights are read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .. import extension
from ..backends import units, winograd
from ..frozen import FrozenBlock, FrozenConv2d
from ..kernels.winograd import flops as winograd_flops
from ..layers import conv_of
from ..planner import Section
from ..problems import SectionProblem, dtype_name
from ..shapes import BlockShapes, Conv
from .weights import PLANES, VECTOR, Packed, Weights

GROUP = 16
"""Images side by side in a tile."""

_SMALL_PIXELS = 256  # an image of no more is small: tiles of 16 images are fuller than tiles of 16 pixels
_NONE = -1  # in place of a buffer


@dataclass(frozen=True)
class Cost:
    """What a step does for one image: FLOPs, and activations read and written, in values; weights in bytes.

    winograd: the FLOPs are those of Winograd's products.
    """

    flops: int
    values: int
    weight_bytes: int
    winograd: bool


@dataclass(frozen=True)
class Built:
    """program: `resnet_fast._C.Program`. y_shape: (K, P, Q) of its output. costs: of its steps, in their order."""

    program: object
    y_shape: tuple[int, int, int]
    costs: list[Cost]


@dataclass(frozen=True)
class _Buffer:
    number: int
    role: str
    channels: int
    height: int
    width: int
    group: int  # images side by side
    own: bool  # a buffer for each thread, not for each image


class Builder:
    """Builds one program. winograd: 3x3s may be Winograd's, where that is faster.

    Buffers are reused from block to block; `role` tells apart those that live at the same time. A block's output takes
    the place of its shortcut.
    """

    def __init__(self, weights: Weights, image: Sequence[int], capacity: int, threads: int, winograd: bool) -> None:
        self.weights, self.section, self.image, self.capacity = weights, weights.section, tuple(image), capacity
        self.winograd = winograd
        self.by_image = capacity >= 2 * threads
        dtype = self.section.dtype
        self.tiles = units.unit(dtype) == "tiles"
        self.program = extension.load().Program(PLANES[dtype], capacity, threads, self.tiles)
        self.buffers: dict[tuple, _Buffer] = {}
        self.costs: list[Cost] = []
        self.section_by_image: bool | None = None
        self.halos: dict[tuple[int, int], int] = {}
        for conv in self._convs():
            at = (conv.height, conv.width)
            self.halos[at] = max(self.halos.get(at, 0), *conv.padding)

    def build(self) -> Built:
        """Raises ValueError where a convolution does not fit into the image."""
        x = self._stem() if self.section.stem is not None else self._read("block", *self.image, VECTOR)
        for name, block in self.section.blocks:
            x = self._block(name, block, x)
        channels = x.channels
        if self.weights.head:
            x, channels = self._classifier(x), self.section.classifier.out_features
        self._enter(x)
        self.program.write(x.number)
        self._cost(values=2 * channels * x.height * x.width)
        return Built(self.program, (channels, x.height, x.width), self.costs)

    def _convs(self) -> list[Conv]:
        """Every convolution with the image it reads, and the max-pool as one."""
        problem = problem_of(self.section, (1, *self.image))
        for (name, module), conv in zip(self.section.convs(), problem.convs, strict=True):
            channels = module.weight.shape[1] * module.groups
            if conv.in_channels != channels:
                raise ValueError(f"{name} takes {channels} channels, not {conv.in_channels}")
            if min(conv.out_height, conv.out_width) < 1:
                raise ValueError(f"{name} does not fit into its input's {conv.height}x{conv.width} pixels")
        for (name, _), block in zip(self.section.blocks, problem.blocks, strict=True):
            shape, added = block.convs[-1].y_shape, block.convs[0].x_shape
            added = added if block.downsample is None else block.downsample.y_shape
            if added != shape:
                raise ValueError(f"{name} adds {added} to {shape}")
        return [*problem.convs, *([_max_pool(problem.stem.y_shape)] if self.section.max_pool else [])]

    def _read(self, role: str, channels: int, height: int, width: int, vector: int) -> _Buffer:
        x = self._buffer(role, channels, height, width, vector)
        self._enter(x)
        self.program.read(x.number)
        self._cost(values=2 * channels * height * width)
        return x

    def _stem(self) -> _Buffer:
        name, module = self.section.stem
        x = self._read("image", *self.image, vector=self.image[0])
        if not self.section.max_pool:
            return self._conv(name, module, x, "stem")
        conv, packed = conv_of(module, (1, x.channels, x.height, x.width)), self.weights.of(module)
        pool = _max_pool(conv.y_shape)
        y = self._buffer("block", conv.out_channels, pool.out_height, pool.out_width)
        self._enter(x, y)
        tensors, size = (packed.weight, packed.bias), (conv.out_height, conv.out_width)
        shape = (conv.kernel[1], conv.stride[0], *size)
        self.program.conv_max_pool(f"{name}+maxpool", x.number, y.number, *tensors, packed.taps, *shape)
        self._cost(conv.real_flops, conv.x_elements + pool.y_elements, packed.bytes)
        return y

    def _block(self, name: str, block: FrozenBlock, x: _Buffer) -> _Buffer:
        *early, last = block.convs
        value, shortcut, downsample, pixels = x, x, block.downsample, None
        role = "shortcut" if x.role != "shortcut" else "other shortcut"  # x is there until the block is done
        first = conv_of(early[0], (1, x.channels, x.height, x.width))
        if first.pointwise and first.stride[0] == 1:  # right behind what writes x, which it may be joined to
            value, early = self._conv(f"{name}.conv1", early[0], x, "conv1"), early[1:]
        if downsample is not None:  # first, while x is there: a thread's own buffer soon holds another image
            pixels = self._skip(downsample, x)
            if pixels is None:
                shortcut = self._conv(f"{name}.downsample", downsample, x, role)
        for number, module in enumerate(early, len(block.convs) - len(early)):
            value = self._conv(f"{name}.conv{number}", module, value, f"conv{number}")
        if pixels is not None:
            shortcut = self._conv(f"{name}.downsample", downsample, pixels, role, skipped=True)
        return self._conv(f"{name}.conv{len(block.convs)}", last, value, residual=shortcut)

    def _skip(self, module: FrozenConv2d, x: _Buffer) -> _Buffer | None:
        """The pixels that a strided 1x1 reads, where it goes from a thread's own image to a group, or where its rows
        would fill half of a tile; else None."""
        conv = conv_of(module, (1, x.channels, x.height, x.width))
        if not (conv.pointwise and conv.stride[0] > 1):
            return None
        y = self._buffer("skip", x.channels, conv.out_height, conv.out_width)
        if not ((x.own and not y.own) or (self.tiles and y.group == 1 and 2 * y.width <= GROUP)):
            return None
        self._enter(x)
        self.program.skip(x.number, y.number, conv.stride[0])
        self._cost(values=2 * conv.x_elements)
        return y

    def _conv(
        self,
        name: str,
        module: FrozenConv2d,
        x: _Buffer,
        role: str = "",
        residual: _Buffer | None = None,
        skipped: bool = False,
    ) -> _Buffer:
        """A step that writes a buffer of this role, or over the residual. skipped: x is only what a stride leaves."""
        conv = conv_of(module, (1, x.channels, x.height, x.width))
        conv = replace(conv, stride=(1, 1)) if skipped else conv
        y = residual or self._buffer(role, conv.out_channels, conv.out_height, conv.out_width)
        added, values = y.number if residual else _NONE, conv.x_elements + conv.y_elements * (2 if residual else 1)
        if self.winograd and winograd.takes_folded(replace(conv, batch=self.capacity)):
            packed = self.weights.of(module, winograd=True)
            self._enter(x, y)
            self.program.winograd(name, x.number, y.number, added, packed.weight, packed.bias, module.relu)
            self._cost(winograd_flops(conv, "bfloat16"), values, packed.bytes, winograd=True)
            return y
        packed = self.weights.of(module)
        joined = self._add(name, packed, x, y, added, conv.stride[0], module.relu)
        self._cost(conv.real_flops, values, packed.bytes, joined=joined)
        return y

    def _classifier(self, x: _Buffer) -> _Buffer:
        linear, packed = self.section.classifier, self.weights.of(self.section.classifier)
        pooled = self._buffer("pooled", x.channels, 1, 1)
        self._enter(x)
        self.program.average_pool(x.number, pooled.number)
        self._cost(values=x.channels * (x.height * x.width + 1))
        y = self._buffer("logits", linear.out_features, 1, 1)
        self._add("fc", packed, pooled, y, _NONE, 1, relu=False)
        self._cost(2 * linear.in_features * linear.out_features, linear.in_features + linear.out_features, packed.bytes)
        return y

    def _add(self, name: str, packed: Packed, x: _Buffer, y: _Buffer, residual: int, stride: int, relu: bool) -> bool:
        """Whether the program computes it piece by piece with the step before, as one."""
        self._enter(x, y)
        tensors, shape = (packed.weight, packed.bias), (packed.blocks, packed.outputs_per_group)
        return self.program.conv(name, x.number, y.number, residual, *tensors, packed.taps, stride, *shape, relu)

    def _buffer(self, role: str, channels: int, height: int, width: int, vector: int = VECTOR) -> _Buffer:
        """The one of this role and shape."""
        key = (role, channels, height, width)
        if key not in self.buffers:
            small = height * width <= _SMALL_PIXELS
            one = (height, width) == (1, 1)  # whose images may be rows of a tile however few they are
            # A stem's kernel reads an image's pixels one behind another: its images are never side by side.
            together = GROUP if self.tiles else min(self.capacity, GROUP)
            group = together if vector == VECTOR and (one or (small and self.capacity >= together)) else 1
            own, halo = self.by_image and not small, self.halos.get((height, width), 0)
            number = self.program.buffer(channels, height, width, halo, group, own, vector)
            self.buffers[key] = _Buffer(number, role, channels, height, width, group, own)
        return self.buffers[key]

    def _enter(self, *buffers: _Buffer) -> None:
        """Start a new section of the program where steps with these buffers cannot be in the present one."""
        by_image = any(buffer.own for buffer in buffers)
        if by_image is not self.section_by_image:
            self.program.section(by_image)
            self.section_by_image = by_image

    def _cost(
        self, flops: int = 0, values: int = 0, weight_bytes: int = 0, winograd: bool = False, joined: bool = False
    ) -> None:
        if joined:
            before = self.costs.pop()
            flops, values = flops + before.flops, values + before.values
            weight_bytes += before.weight_bytes
        self.costs.append(Cost(flops, values, weight_bytes, winograd))


def problem_of(section: Section, shape: Sequence[int]) -> SectionProblem:
    """What `section` computes of x of `shape` (N, C, H, W)."""
    stem, blocks = None, []
    if section.stem is not None:
        stem = conv_of(section.stem[1], shape)
        shape = stem.y_shape
    if section.max_pool:
        shape = _max_pool(shape).y_shape
    for _, block in section.blocks:
        downsample = None if block.downsample is None else conv_of(block.downsample, shape)
        convs = []
        for module in block.convs:
            convs.append(conv_of(module, shape))
            shape = convs[-1].y_shape
        blocks.append(BlockShapes(tuple(convs), downsample))
    return SectionProblem(tuple(blocks), dtype_name(section.dtype), stem)


def _max_pool(shape: Sequence[int]) -> Conv:
    """The shapes of a stem's max-pool, as a convolution's."""
    return Conv(*shape, shape[1], kernel=(3, 3), stride=(2, 2), padding=(1, 1))

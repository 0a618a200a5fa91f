"""What one kernel is asked to do, as plain data: shapes, fused parts, and the work and traffic that follow from them.

A problem is the key of the tuned tables and the input of the cost model, the planner and `profile`. Sizes are counted
in elements, work in FLOPs (2 per multiply-add, padding included), traffic in bytes, every tensor read or written once.
"""

import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .shapes import BlockShapes, Conv

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Bytes per element."""

STEM_CHANNELS = 4
"""Channels of a stem's packed image, which are as many as its input has at most."""

STEM_WINDOW = 8
"""Columns that a stem's packed weights have, which are as many as its kernel has at most."""

KERNEL_DTYPES = ("float32", "bfloat16", "float16")
"""What the Triton kernels take; float64 is the library's."""


def dtype_name(dtype: torch.dtype) -> str:
    """As problems have it, without the module: float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ConvProblem:
    """act(bn(conv(x)) [+ residual | + bn(residual) | + bn(shortcut(s))]): one convolution with its epilogue.

    shortcut: a 1x1 on a second input whose output is added before the activation; then there is no residual.
    folded: batch norm is in the weights already, so that one accumulator serves convolution and shortcut. Otherwise the
    weights are a model's own, which may change from call to call.
    residual_norm: a batch norm is pending on the residual. statistics: those of the output are wanted too. Both are of
    training.
    """

    conv: Conv
    dtype: str
    residual: bool = False
    shortcut: Conv | None = None
    folded: bool = True
    relu: bool = True
    residual_norm: bool = False
    statistics: bool = False

    @property
    def flops(self) -> int:
        return self.conv.flops + (self.shortcut.flops if self.shortcut else 0)

    @cached_property
    def bytes(self) -> int:
        elements = self.conv.x_elements + self.conv.weight_elements + self.conv.y_elements * (2 if self.residual else 1)
        if self.shortcut:
            elements += self.shortcut.x_elements + self.shortcut.weight_elements
        return elements * ITEMSIZE[self.dtype]

    @property
    def key(self) -> str:
        parts = ["conv", self.conv.key, self.dtype]
        parts += _residual_parts(self) + (["+statistics"] if self.statistics else [])
        parts += [f"+shortcut({self.shortcut.key})"] if self.shortcut else []
        parts += [] if self.relu else ["no-relu"]
        return " ".join(parts + ([] if self.folded else ["bn"]))


@dataclass(frozen=True)
class PrologueProblem:
    """conv1x1(relu(bn(x))), x a raw convolution output, in training: raw, or relu(bn(.) [+ residual | + bn(residual)]).

    joined: the second; then nothing raw is stored. statistics: of the raw output.
    """

    conv: Conv
    dtype: str
    statistics: bool = False
    joined: bool = False
    residual: bool = False
    residual_norm: bool = False

    @property
    def flops(self) -> int:
        return self.conv.flops

    @cached_property
    def bytes(self) -> int:
        elements = self.conv.x_elements + self.conv.weight_elements + self.conv.y_elements * (2 if self.residual else 1)
        return elements * ITEMSIZE[self.dtype]

    @property
    def key(self) -> str:
        parts = ["prologue", self.conv.key, self.dtype, *_residual_parts(self)]
        parts += ["+statistics"] if self.statistics else []
        return " ".join(parts + (["joined"] if self.joined else []))


@dataclass(frozen=True)
class GramDgradProblem:
    """The data gradient of a 1x1 in the Gram form: dz @ (K, C) + (act(x) - mean) @ (C, C) + constant [+ add].

    conv: the layer's own, without stride. prologue: a batch norm and ReLU are pending on x.
    """

    conv: Conv
    dtype: str
    prologue: bool = False
    add: bool = False

    @property
    def flops(self) -> int:
        return self.conv.flops + 2 * self.conv.x_elements * self.conv.in_channels

    @cached_property
    def bytes(self) -> int:
        channels = self.conv.in_channels
        elements = self.conv.y_elements + self.conv.x_elements * (3 if self.add else 2)
        return (elements + self.conv.weight_elements + channels * channels) * ITEMSIZE[self.dtype]

    @property
    def key(self) -> str:
        parts = ["gram_dgrad", self.conv.key, self.dtype]
        return " ".join(parts + ["+prologue"] * self.prologue + ["+add"] * self.add)


@dataclass(frozen=True)
class _OfTraining:
    """A convolution of x, weight and y: whichever is written, the other two are read."""

    conv: Conv
    dtype: str

    @property
    def flops(self) -> int:
        return self.conv.flops

    @cached_property
    def bytes(self) -> int:
        return (self.conv.x_elements + self.conv.weight_elements + self.conv.y_elements) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class WeightGradientProblem(_OfTraining):
    """The gradient of a convolution's weight, from x and the gradient of y, in float32 on CPUs."""

    @property
    def key(self) -> str:
        return f"weight_gradient {self.conv.key} {self.dtype}"


@dataclass(frozen=True)
class TrainingConvProblem(_OfTraining):
    """A training step's convolution with its output's statistics, or one of its gradients, on CPUs with AMX.

    of: what is computed, "output", "data_gradient" or "weight_gradient".
    """

    of: str

    @property
    def key(self) -> str:
        return f"training {self.of} {self.conv.key} {self.dtype}"


@dataclass(frozen=True)
class SectionProblem:
    """Consecutive residual blocks, on CPUs: of a frozen network, or, not folded, one of a model's own.

    stem: the convolution before them, with ReLU and max-pool.
    """

    blocks: tuple[BlockShapes, ...]
    dtype: str
    stem: Conv | None = None
    folded: bool = True

    @property
    def convs(self) -> tuple[Conv, ...]:
        found = (conv for block in self.blocks for conv in block.all_convs)
        return (self.stem, *found) if self.stem else tuple(found)

    @property
    def flops(self) -> int:
        return sum(conv.flops for conv in self.convs)

    @cached_property
    def bytes(self) -> int:
        first, last = self.convs[0], self.blocks[-1].convs[-1]
        elements = first.x_elements + last.y_elements + sum(conv.weight_elements for conv in self.convs)
        return elements * ITEMSIZE[self.dtype]

    @property
    def key(self) -> str:
        """Of all convolutions a checksum, the same for any batch."""
        batch, channels, height, width = self.convs[0].x_shape
        shapes = "; ".join(replace(conv, batch=1).key for conv in self.convs)
        kind = "network" if self.folded else "block"
        parts = [kind, f"n{batch}", f"{channels}x{height}x{width}", f"{len(self.convs)} convs"]
        return " ".join([*parts, f"{zlib.crc32(shapes.encode()):08x}", self.dtype, *([] if self.folded else ["bn"])])


@dataclass(frozen=True)
class StemProblem:
    """max_pool(relu(conv(x)), 3, stride 2, padding 1), batch norm folded: packed, convolved and pooled, one by one.

    flops and bytes are of the whole, without what lies between its kernels.
    """

    conv: Conv
    dtype: str

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        """Of the packed image (`kernels.stem`), in which the convolution's zeros are stored too."""
        return self.conv.batch, STEM_CHANNELS, self.windows.conv.height, 2 * (self.conv.out_width - 1) + STEM_WINDOW

    @property
    def windows(self) -> ConvProblem:
        """The convolution as it is computed, over the packed image as windows of STEM_WINDOW pixels that overlap."""
        conv, (rows, _) = self.conv, self.conv.kernel
        height = 2 * (conv.out_height - 1) + rows
        height += height % 2  # rows are split by the stride
        channels = STEM_WINDOW * STEM_CHANNELS
        image = (conv.batch, channels, height, conv.out_width)
        return ConvProblem(Conv(*image, conv.out_channels, (rows, 1), (2, 1)), self.dtype)

    @property
    def pool_height(self) -> int:
        return (self.conv.out_height - 1) // 2 + 1

    @property
    def pool_width(self) -> int:
        return (self.conv.out_width - 1) // 2 + 1

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.conv.batch, self.conv.out_channels, self.pool_height, self.pool_width

    @property
    def flops(self) -> int:
        return self.conv.flops

    @cached_property
    def bytes(self) -> int:
        pooled = self.conv.batch * self.conv.out_channels * self.pool_height * self.pool_width
        return (self.conv.x_elements + self.conv.weight_elements + pooled) * ITEMSIZE[self.dtype]

    @property
    def key(self) -> str:
        return f"stem {self.conv.key} {self.dtype}"


@dataclass(frozen=True)
class TailProblem:
    """relu(conv3(relu(conv2(x))) + residual or shortcut(s)), then relu(next_conv(that)) if a block follows; folded."""

    conv2: Conv
    conv3: Conv
    dtype: str
    shortcut: Conv | None = None
    next_conv: Conv | None = None

    @property
    def convs(self) -> tuple[Conv, ...]:
        return tuple(conv for conv in (self.conv2, self.conv3, self.shortcut, self.next_conv) if conv)

    @property
    def flops(self) -> int:
        return sum(conv.flops for conv in self.convs)

    @cached_property
    def bytes(self) -> int:
        elements = self.conv2.x_elements + self.conv3.y_elements + sum(conv.weight_elements for conv in self.convs)
        elements += self.shortcut.x_elements if self.shortcut else self.conv3.y_elements
        elements += self.next_conv.y_elements if self.next_conv else 0
        return elements * ITEMSIZE[self.dtype]

    @property
    def key(self) -> str:
        parts = ["tail", self.conv2.key, f"k{self.conv3.out_channels}", self.dtype]
        parts += [f"+shortcut({self.shortcut.key})"] if self.shortcut else ["+residual"]
        return " ".join(parts + ([f"+next(k{self.next_conv.out_channels})"] if self.next_conv else []))


@dataclass(frozen=True)
class PoolProblem:
    """max_pool of x (batch, channels, height, width), 3x3 stride 2 padding 1, with one kernel that needs no choice."""

    batch: int
    channels: int
    height: int
    width: int
    dtype: str

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, (self.height - 1) // 2 + 1, (self.width - 1) // 2 + 1

    @property
    def flops(self) -> int:
        return 0

    @cached_property
    def bytes(self) -> int:
        batch, channels, rows, columns = self.y_shape
        return batch * channels * (self.height * self.width + rows * columns) * ITEMSIZE[self.dtype]

    @property
    def key(self) -> str:
        return f"pool n{self.batch} {self.channels}x{self.height}x{self.width} {self.dtype}"


@dataclass(frozen=True)
class AveragePoolProblem:
    """The mean over the pixels of x (batch, channels, height, width): always PyTorch's own kernel."""

    batch: int
    channels: int
    height: int
    width: int
    dtype: str

    @property
    def flops(self) -> int:
        return 0

    @cached_property
    def bytes(self) -> int:
        return self.batch * self.channels * (self.height * self.width + 1) * ITEMSIZE[self.dtype]

    @property
    def key(self) -> str:
        return f"avgpool n{self.batch} {self.channels}x{self.height}x{self.width} {self.dtype}"


def _residual_parts(problem: ConvProblem | PrologueProblem) -> list[str]:
    if not problem.residual:
        return []
    return ["+bn(residual)" if problem.residual_norm else "+residual"]


Problem = (
    ConvProblem
    | StemProblem
    | TailProblem
    | PrologueProblem
    | GramDgradProblem
    | WeightGradientProblem
    | TrainingConvProblem
    | SectionProblem
)
"""What a kernel of ours computes that has configurations; pools have none."""


def is_training(problem: Problem) -> bool:
    """Whether only a GPU's training step asks for this problem."""
    return isinstance(problem, (PrologueProblem, GramDgradProblem)) or (
        isinstance(problem, ConvProblem) and problem.statistics
    )

"""Shapes of convolutions and of residual blocks, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Conv:
    """A convolution of x (batch, in_channels, height, width); pairs are (rows, columns)."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, x_shape: Sequence[int], weight_shape: Sequence[int], stride, padding, dilation, groups: int) -> "Conv":
        """From what conv2d is given: (N, C, H, W), (K, C / groups, R, S), and pairs."""
        out_channels, _, *kernel = weight_shape
        return cls(*x_shape, out_channels, *(tuple(pair) for pair in (kernel, stride, padding, dilation)), groups)

    @property
    def data_gradient(self) -> "Conv | None":
        """The convolution of y's gradient, with the kernels turned by 180 degrees, that gives x's.

        None where none does: with strides, groups, or more padding than the kernel reaches.
        """
        outside = tuple(
            step * (side - 1) - pad for step, side, pad in zip(self.dilation, self.kernel, self.padding, strict=True)
        )
        if self.stride != (1, 1) or self.groups > 1 or min(outside) < 0:
            return None
        dy = self.batch, self.out_channels, self.out_height, self.out_width
        return Conv(*dy, self.in_channels, self.kernel, padding=outside, dilation=self.dilation)

    @cached_property
    def out_height(self) -> int:
        return self._out(self.height, 0)

    @cached_property
    def out_width(self) -> int:
        return self._out(self.width, 1)

    @cached_property
    def pixels(self) -> int:
        """Output pixels of the batch."""
        return self.batch * self.out_height * self.out_width

    @property
    def pointwise(self) -> bool:
        """A 1x1 without padding: each output pixel reads one input pixel."""
        return self.kernel == (1, 1) and self.padding == (0, 0)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, self.height, self.width

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, self.out_height, self.out_width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    @property
    def x_elements(self) -> int:
        """Elements of x that are read: a strided 1x1 skips pixels."""
        return self.in_channels * (self.pixels if self.pointwise else self.batch * self.height * self.width)

    @property
    def weight_elements(self) -> int:
        rows, columns = self.kernel
        return self.out_channels * (self.in_channels // self.groups) * rows * columns

    @property
    def y_elements(self) -> int:
        return self.out_channels * self.pixels

    @property
    def flops(self) -> int:
        rows, columns = self.kernel
        return 2 * self.y_elements * (self.in_channels // self.groups) * rows * columns

    @property
    def real_flops(self) -> int:
        """FLOPs of taps on pixels: `flops` without those on padding, which a good kernel skips."""
        return (
            2
            * self.batch
            * self.out_channels
            * (self.in_channels // self.groups)
            * self._real_taps(0)
            * self._real_taps(1)
        )

    def _real_taps(self, axis: int) -> int:
        """Over all outputs along one axis, the kernel's taps that fall on a pixel."""
        length, outputs = ((self.height, self.out_height), (self.width, self.out_width))[axis]
        first = (output * self.stride[axis] - self.padding[axis] for output in range(outputs))
        taps = range(self.kernel[axis])
        return sum(0 <= start + tap * self.dilation[axis] < length for start in first for tap in taps)

    @property
    def key(self) -> str:
        """Short, exact, stable: it names rows of the tuned tables."""
        parts = [f"n{self.batch}", f"{self.in_channels}x{self.height}x{self.width}", f"k{self.out_channels}"]
        for letter, pair, usual in (
            ("f", self.kernel, None),
            ("s", self.stride, (1, 1)),
            ("p", self.padding, (0, 0)),
            ("d", self.dilation, (1, 1)),
        ):
            if pair != usual:
                parts.append(f"{letter}{pair[0]}" if pair[0] == pair[1] else f"{letter}{pair[0]}x{pair[1]}")
        return " ".join([*parts, f"g{self.groups}"] if self.groups > 1 else parts)

    def _out(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1


@dataclass(frozen=True)
class BlockShapes:
    """A residual block's convolutions, in order; downsample: that of the shortcut, if it has one."""

    convs: tuple[Conv, ...]
    downsample: Conv | None = None

    @classmethod
    def of(cls, x_shape: Sequence[int], weight_shapes, geometry: Sequence[int], downsample: bool) -> "BlockShapes":
        """From what `ops.residual_block` is given."""
        convs, shape, branch = [], x_shape, len(weight_shapes) - 1 if downsample else None
        for number, weight_shape in enumerate(weight_shapes):
            *pairs, groups = geometry[7 * number : 7 * number + 7]
            x_of_conv = x_shape if number == branch else shape
            convs.append(Conv.of(x_of_conv, weight_shape, pairs[:2], pairs[2:4], pairs[4:], groups))
            shape = convs[-1].y_shape
        return cls(tuple(convs[:branch]), convs[-1] if downsample else None)

    @property
    def all_convs(self) -> tuple[Conv, ...]:
        return (*self.convs, self.downsample) if self.downsample else self.convs

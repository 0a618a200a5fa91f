"""The layers of ResNet-18 and ResNet-50 that the benchmarks time, by stage, and how much work each is.

RESNET_FAST_BENCH_BATCH (16) and RESNET_FAST_BENCH_IMAGE (224) scale all of them.
"""

import os
from dataclasses import dataclass

import torch

BATCH = int(os.environ.get("RESNET_FAST_BENCH_BATCH", "16"))
IMAGE = int(os.environ.get("RESNET_FAST_BENCH_IMAGE", "224"))
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """conv (Cin -> Cout, kernel, stride, groups) on x (BATCH, Cin, size, size), then batch norm (+ residual), ReLU."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1
    residual: bool = False

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return BATCH, self.in_channels, self.size, self.size

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        size = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return BATCH, self.out_channels, size, size

    @property
    def conv_flop(self) -> int:
        """Multiplications and additions of the forward convolution."""
        batch, channels, rows, columns = self.y_shape
        return 2 * batch * channels * rows * columns * self.in_channels // self.groups * self.kernel**2

    def bn_bytes(self, dtype: torch.dtype, training: bool, backward: bool) -> int:
        """What an ideal batch norm + ReLU (+ residual) reads and writes: forward y from x; statistics read x once more;
        backward reads dy and x twice and writes dx."""
        batch, channels, rows, columns = self.y_shape
        passes = 2 + self.residual + training + (5 + 2 * self.residual if backward else 0)
        return passes * batch * channels * rows * columns * dtype.itemsize


_QUARTER, _EIGHTH, _SIXTEENTH, _THIRTYSECOND = (max(1, IMAGE // n) for n in (4, 8, 16, 32))

LAYERS = (
    Layer("resnet50_layer1_conv1", 256, 64, 1, _QUARTER),
    Layer("resnet50_layer1_conv2", 64, 64, 3, _QUARTER),
    Layer("resnet50_layer1_conv3", 64, 256, 1, _QUARTER, residual=True),
    Layer("resnet50_layer3_conv2", 256, 256, 3, _SIXTEENTH),
    Layer("resnet50_layer4_conv3", 512, 2048, 1, _THIRTYSECOND, residual=True),
    Layer("resnet50_layer2_downsample", 256, 512, 1, _QUARTER, stride=2),
    Layer("resnext50_layer2_conv2", 256, 256, 3, _EIGHTH, groups=32),
    Layer("resnet18_layer2_conv2", 128, 128, 3, _EIGHTH, residual=True),
)

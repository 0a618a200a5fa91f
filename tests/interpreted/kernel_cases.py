"""Named cases for the Triton kernels: few, tiny, each there for a reason, with configurations that `why_not` allows."""

from dataclasses import dataclass, replace

import torch

from resnet_fast.kernels.configs import PointerConfig, StemConfig, TailConfig, TmaConfig
from resnet_fast.problems import ITEMSIZE, ConvProblem, StemProblem, TailProblem
from resnet_fast.shapes import Conv

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = {  # name -> the vectors it has
    "none": (),
    "folded": ("conv_bias",),
    "bn": ("mean", "var", "weight", "bias"),
    "no_affine": ("mean", "var"),
    "everything": ("conv_bias", "mean", "var", "weight", "bias"),
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ConvCase:
    """norm: one of NORMS, of the convolution and of its shortcut. half_vectors: they are of the activations' dtype."""

    name: str
    conv: Conv
    config: PointerConfig | TmaConfig
    norm: str = "folded"
    residual: bool = False
    shortcut: Conv | None = None
    relu: bool = True
    half_vectors: bool = False

    def problem(self, dtype: torch.dtype) -> ConvProblem:
        folded = "mean" not in NORMS[self.norm]
        return ConvProblem(self.conv, dtype_name(dtype), self.residual, self.shortcut, folded, self.relu)

    def config_for(self, dtype: torch.dtype) -> PointerConfig | TmaConfig:
        """128 bytes of channels at a time at most: float32 has half as many of them."""
        return replace(self.config, block_in=min(self.config.block_in, 128 // ITEMSIZE[dtype_name(dtype)]))


@dataclass(frozen=True)
class StemCase:
    name: str
    conv: Conv
    config: StemConfig | PointerConfig
    norm: str = "folded"

    def problem(self, dtype: torch.dtype) -> StemProblem:
        return StemProblem(self.conv, dtype_name(dtype))


@dataclass(frozen=True)
class TailCase:
    """A tail of `mid` channels from conv2 on; conv3 widens to `out`, `following` is the next convolution's channels."""

    name: str
    conv2: Conv
    out: int
    shortcut: int | None = None
    following: int | None = None
    box: tuple[int, int, int] = (2, 4, 4)

    @property
    def config(self) -> TailConfig:
        return TailConfig(self.box, 64, 64, 4, 2)

    def problem(self, dtype: torch.dtype) -> TailProblem:
        conv2, batch = self.conv2, self.conv2.batch
        plane = conv2.out_height, conv2.out_width
        shortcut = following = None
        if self.shortcut:
            shortcut = Conv(batch, self.shortcut, conv2.height, conv2.width, self.out, stride=conv2.stride)
        if self.following:
            following = Conv(batch, self.out, *plane, self.following)
        conv3 = Conv(batch, conv2.out_channels, *plane, self.out)
        return TailProblem(conv2, conv3, dtype_name(dtype), shortcut, following)


def three_by_three(batch, channels, height, width, out_channels, stride=1, dilation=1, groups=1) -> Conv:
    """A 3x3 that keeps the size, but for its stride."""
    twice = (dilation, dilation)
    return Conv(batch, channels, height, width, out_channels, (3, 3), (stride, stride), twice, twice, groups)


_SMALL = PointerConfig(64, 16, 16, 4, 2)
_POINTER = PointerConfig(64, 32, 32, 4, 2)
_WIDE = PointerConfig(64, 64, 64, 4, 2)
POINTER_CASES = (
    ConvCase("pointwise_residual", Conv(2, 32, 7, 7, 64), _POINTER, residual=True),
    ConvCase("three_by_three_bn", three_by_three(2, 16, 6, 7, 24), _SMALL, "bn"),
    ConvCase("three_by_three_bn_residual", three_by_three(1, 32, 6, 5, 32), _POINTER, "bn", residual=True),
    ConvCase("stride2_three_by_three", three_by_three(2, 16, 11, 9, 16, stride=2), _SMALL, "bn"),
    ConvCase("dilated", three_by_three(2, 16, 9, 9, 16, dilation=2), _SMALL, "bn"),
    ConvCase(
        "rows_unlike_columns", Conv(2, 6, 11, 12, 10, (2, 3), (2, 1), (0, 2), (3, 2)), _SMALL, "bn", residual=True
    ),
    ConvCase("one_channel", three_by_three(3, 1, 7, 7, 1), _SMALL, "bn", residual=True),
    ConvCase("stem_7x7", Conv(1, 3, 20, 20, 16, (7, 7), (2, 2), (3, 3)), _SMALL, "bn"),
    ConvCase("five_to_65_channels", three_by_three(2, 5, 7, 6, 65), _SMALL, "bn", residual=True),
    ConvCase("65_to_five_channels", Conv(2, 65, 5, 6, 5), PointerConfig(64, 16, 64, 4, 2), "bn", residual=True),
    ConvCase("hundred_channels", three_by_three(1, 100, 5, 5, 100), PointerConfig(64, 64, 64, 4, 2), "bn"),
    ConvCase("spatial_1x1", Conv(8, 16, 1, 1, 32), _SMALL, residual=True),
    ConvCase("three_by_three_on_one_pixel", three_by_three(3, 16, 1, 1, 16), _SMALL, "bn"),
    ConvCase("padding_larger_than_the_image", Conv(2, 16, 2, 3, 16, (5, 5), (1, 1), (4, 4)), _SMALL),
    ConvCase("padded_strided_pointwise", Conv(2, 16, 7, 8, 16, (1, 1), (3, 3), (1, 1)), _SMALL),
    ConvCase("grouped_packed", three_by_three(2, 32, 6, 6, 32, groups=4), _POINTER, residual=True),
    ConvCase("grouped_uneven", three_by_three(2, 24, 6, 6, 6, groups=3), _SMALL),
    ConvCase("grouped_packed_in_two", three_by_three(2, 128, 5, 6, 128, groups=32), _WIDE),
    ConvCase("grouped_wide", three_by_three(2, 256, 4, 4, 128, groups=2), _WIDE),
    ConvCase("shortcut", Conv(2, 16, 7, 7, 24), _SMALL, shortcut=Conv(2, 20, 14, 14, 24, stride=(2, 2))),
    ConvCase(
        "shortcut_two_norms", Conv(2, 16, 7, 7, 24), _SMALL, "bn", shortcut=Conv(2, 20, 13, 14, 24, stride=(2, 2))
    ),
    ConvCase(
        "shortcut_rows_unlike_columns",
        three_by_three(1, 16, 4, 9, 16),
        _SMALL,
        shortcut=Conv(1, 16, 11, 18, 16, stride=(3, 2)),
    ),
    ConvCase("no_affine", three_by_three(1, 16, 5, 5, 16), _SMALL, "no_affine"),
    ConvCase("conv_bias_and_bn", three_by_three(1, 16, 5, 5, 16), _SMALL, "everything"),
    ConvCase("no_norm_no_relu", Conv(1, 16, 5, 5, 16), _SMALL, "none", relu=False),
    ConvCase("no_relu_residual", Conv(1, 16, 5, 5, 16), _SMALL, "bn", residual=True, relu=False),
    ConvCase("half_vectors", Conv(1, 16, 5, 5, 16), _SMALL, "everything", half_vectors=True),
)

_BOX = TmaConfig((2, 4, 4), 64, 64, 4, 3)
TMA_CASES = (
    ConvCase("pointwise_residual", Conv(3, 64, 7, 7, 64), _BOX, residual=True),
    ConvCase("pointwise_strided", Conv(3, 64, 9, 9, 72, stride=(2, 2)), _BOX, "bn"),
    ConvCase("pointwise_rows_unlike_columns", Conv(2, 64, 10, 9, 64, stride=(3, 2)), _BOX),
    ConvCase("channels_not_multiple_of_block", Conv(2, 72, 5, 6, 136), _BOX, "bn", residual=True),
    ConvCase("three_by_three_bn_residual", three_by_three(3, 64, 7, 7, 64), _BOX, "bn", residual=True),
    ConvCase("stride2_three_by_three", three_by_three(3, 64, 10, 8, 128, stride=2), _BOX, "bn"),
    ConvCase("stride2_five_by_five", Conv(2, 64, 8, 10, 64, (5, 5), (2, 2), (2, 2)), _BOX),
    ConvCase("stride2_dilated", three_by_three(2, 64, 8, 10, 64, stride=2, dilation=2), _BOX),
    ConvCase("dilated", three_by_three(2, 64, 7, 5, 64, dilation=2), _BOX),
    ConvCase("rows_unlike_columns", Conv(2, 64, 7, 8, 64, (2, 3), (1, 1), (0, 2), (3, 2)), _BOX, "bn"),
    ConvCase("grouped_packed_in_two", three_by_three(2, 128, 4, 6, 128, groups=32), _BOX),
    ConvCase("grouped_wide", three_by_three(2, 256, 4, 4, 128, groups=2), _BOX),
    ConvCase("shortcut", Conv(2, 64, 7, 7, 64), _BOX, shortcut=Conv(2, 128, 13, 14, 64, stride=(2, 2))),
    ConvCase("shortcut_two_norms", Conv(2, 64, 7, 7, 64), _BOX, "bn", shortcut=Conv(2, 72, 13, 14, 64, stride=(2, 2))),
    ConvCase("box_larger_than_the_image", three_by_three(2, 64, 3, 3, 64), TmaConfig((2, 8, 8), 64, 64, 4, 3)),
    ConvCase("spatial_1x1", Conv(40, 64, 1, 1, 64), TmaConfig((64, 1, 1), 64, 64, 4, 3), residual=True),
    ConvCase("one_image", three_by_three(1, 64, 7, 9, 64), TmaConfig((1, 4, 16), 64, 64, 4, 3), "bn"),
    ConvCase("padding_larger_than_the_image", Conv(2, 64, 2, 3, 64, (3, 3), (1, 1), (3, 3)), _BOX),
    ConvCase("wide_blocks", Conv(2, 64, 4, 4, 256), TmaConfig((2, 4, 4), 256, 64, 4, 3), "no_affine"),
    ConvCase("conv_bias_and_bn", Conv(2, 64, 4, 4, 64), _BOX, "everything"),
    ConvCase("no_norm_no_relu", Conv(2, 64, 4, 4, 64), _BOX, "none", relu=False),
)

_SEVEN = {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)}
_STEM = StemConfig((1, 8, 8), 64, 32, 4, 3)
STEM_CASES = (
    StemCase("resnet", Conv(2, 3, 28, 36, 64, **_SEVEN), StemConfig((1, 8, 16), 64, 32, 4, 3)),
    StemCase("images_in_one_box", Conv(3, 3, 26, 20, 64, **_SEVEN), StemConfig((2, 8, 8), 64, 32, 4, 3)),
    StemCase("pointers", Conv(2, 3, 28, 36, 64, **_SEVEN), PointerConfig(64, 64, 32, 4, 1)),
    StemCase("pointers_odd_size", Conv(1, 3, 25, 21, 16, **_SEVEN), PointerConfig(64, 16, 32, 4, 1)),
    StemCase("odd_size", Conv(1, 3, 25, 21, 16, **_SEVEN), _STEM),
    StemCase("odd_output", Conv(1, 3, 30, 26, 16, **_SEVEN), _STEM),
    StemCase("several_channel_blocks", Conv(1, 3, 22, 24, 80, **_SEVEN), _STEM),
    StemCase("two_norm_vectors", Conv(1, 3, 18, 18, 16, **_SEVEN), _STEM, "no_affine"),
    StemCase("bn", Conv(1, 3, 18, 18, 16, **_SEVEN), _STEM, "bn"),
    StemCase("one_channel", Conv(2, 1, 17, 18, 16, **_SEVEN), _STEM),
    StemCase("two_channels", Conv(1, 2, 16, 19, 16, **_SEVEN), _STEM),
    StemCase("four_channels", Conv(1, 4, 16, 18, 16, **_SEVEN), _STEM),
    StemCase("three_by_three", Conv(1, 3, 19, 18, 16, (3, 3), (2, 2), (1, 1)), _STEM),
    StemCase("even_kernel", Conv(1, 3, 19, 18, 16, (6, 6), (2, 2), (1, 1)), _STEM),
    StemCase("rows_unlike_columns", Conv(1, 3, 17, 22, 16, (4, 8), (2, 2), (0, 2)), _STEM),
    StemCase("smaller_than_the_kernel", Conv(1, 3, 2, 3, 16, **_SEVEN), _STEM),
    StemCase("one_pixel", Conv(2, 3, 1, 1, 16, **_SEVEN), _STEM),
)
POOL_SHAPES = {  # name -> (N, C, H, W)
    "several_tiles": (1, 64, 10, 34),  # ten: of four slabs of three the last has one
    "odd_size": (2, 64, 9, 11),
    "one_pixel": (3, 64, 1, 1),
    "one_row": (2, 8, 1, 7),
    "one_column": (2, 8, 6, 1),
    "five_channels": (2, 5, 7, 8),
    "two_blocks_of_channels": (1, 136, 5, 6),
    "one_channel": (2, 1, 6, 5),
}

TAIL_CASES = (
    TailCase("identity", three_by_three(2, 64, 5, 6, 64), 128, following=64),
    TailCase("last_block", three_by_three(3, 64, 4, 5, 64), 128),
    TailCase("wider_next", three_by_three(2, 64, 4, 4, 64), 64, following=128),
    TailCase("shortcut", three_by_three(2, 64, 5, 6, 64), 128, shortcut=64, following=64),
    TailCase("shortcut_last_block", three_by_three(1, 64, 5, 6, 64), 128, shortcut=128),
    TailCase("strided", three_by_three(2, 64, 10, 12, 64, stride=2), 128, shortcut=64, following=64),
    TailCase("dilated", three_by_three(2, 64, 6, 5, 64, dilation=2), 128, following=64),
    TailCase("stage_2", three_by_three(2, 128, 8, 6, 128, stride=2), 128, shortcut=128, following=128),
    TailCase("stage_3", three_by_three(1, 256, 3, 4, 256), 256, following=256, box=(1, 4, 4)),
)

UNUSUAL = (  # no ResNet has them; `why_not` may refuse them, or else the kernel has to be right
    TailCase("dilated_rows_unlike_columns", Conv(2, 64, 6, 7, 64, (3, 3), (1, 1), (1, 2), (1, 2)), 128, following=64),
    ConvCase("twice_padded_strided_pointwise", Conv(2, 72, 6, 8, 64, (1, 1), (2, 2), (2, 2)), _BOX),
)

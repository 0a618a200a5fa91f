"""Mutants of the direct convolutions' sources: every one must be noticed by what the original gets right."""

import ctypes

import pytest
import torch
from cases import draw
from kernel_mutants import KERNELS, close, compile_mutants, guarded, notices
from torch.nn import functional as F

SIZES = ("direct_sizes.h", "kDirectRows = 6", "kDirectRows = 3")
SOURCES = [
    KERNELS / name
    for name in (
        *("products.h", "direct_parts.h", "direct_pack.cpp"),
        *("direct_conv.cpp", "direct_conv_copied.cpp", "direct_conv_image.cpp"),
    )
]

MUTANTS = {  # name -> (before, after)
    "original": ("", ""),
    "padding_above": ("row >= 0 && row < conv.height && column", "row < conv.height && column"),
    "padding_right": ("column >= 0 && column < conv.width;", "column >= 0;"),
    "padding_of_the_other_axis": ("conv_.stride[1] - conv_.padding[1]", "conv_.stride[1] - conv_.padding[0]"),
    "stride_of_the_other_axis": ("column_ * conv_.stride[1]", "column_ * conv_.stride[0]"),
    "dilation_lost": ("pixel.left() + s * conv.dilation[1]", "pixel.left() + s"),
    "dilation_of_the_other_axis": ("pixel.top() + r * conv.dilation[0]", "pixel.top() + r * conv.dilation[1]"),
    "image_lost": ("(image_ * conv_.height + row)", "row"),
    "image_stays": ("    ++image_;\n", ""),
    "row_too_long": ("++column_ < conv_.out_width", "++column_ <= conv_.out_width"),
    "range_begins_above": ("row_(pixel / conv.out_width % conv.out_height)", "row_(0)"),
    "range_begins_left": ("column_(pixel % conv.out_width)", "column_(0)"),
    "pixels_stay": ("++i, pixel.step())", "++i)"),
    "channel_lost": ("with_count<rows>(smaller(kSummed, conv", "with_count<rows>(smaller(kSummed - 1, conv"),
    "weights_of_one_term": ("Vec::loadu(b + term * b_step", "Vec::loadu(b"),
    "no_terms_behind_runs": ("; term < terms; ++term", "; term < 0; ++term"),
    "run_lost": ("term += kRun", "term += 2 * kRun"),
    "sum_restarts": ("sums[row][i] = sums[row][i] + own", "sums[row][i] = own"),
    "weight_stays": ("    weight += channels * kStep;\n", ""),
    "taps_lost": ("taps == 1 && conv.channels", "conv.channels"),
    "half_of_the_channels": ("int64_t, kSummed / 2>()", "int64_t, 1>()"),
    "nothing_written": ("      write_outputs<rows>(conv, sums, pixel, output);\n    });", "    });"),
    "same_channels_again": ("from[row] = x[tap][row] + channel", "from[row] = x[tap][row]"),
    "one_pixel_of_six": ("kByRows[count - 1]", "kByRows[0]"),
    "outputs_beyond": ("left >= Vec::size()", "left > 0"),
    "outputs_of_the_first_vector": ("pixel * conv.outputs + column;", "pixel * conv.outputs;"),
    "pixel_of_the_first": ("      offset += conv.outputs;\n", ""),
    "no_residual": ("if (conv.residual != nullptr) out", "if (false) out"),
    "no_relu": ("if (conv.relu) out", "if (false) out"),
    "no_bias": ("L::load(conv.bias + column, span)", "L::fill(0)"),
    "no_scale": ("conv.scale == nullptr ? L::fill(1)", "true ? L::fill(1)"),
    "panel_of_another": ("weight = packed + (panel - begin)", "weight = packed + 0"),
    "outputs_packed_elsewhere": ("at / kStep * kStep * terms", "at / kStep * terms"),
    "packed_elsewhere": ("w.packed + (panel - begin)", "w.packed + panel"),
    "packed_in_the_models_order": ("number % w.taps * w.channels + number / w.taps", "number"),
    "packed_short": ("count = smaller(kSquare, terms - term)", "count = smaller(kSquare - 1, terms - term)"),
    "copied_beyond_a_chunk": ("some = smaller(count - done, room_)", "some = count - done"),
    "copied_to_the_same_chunk": ("to_ += (kBlock - 1) * kChunk, room_", "to_ -= kChunk, room_"),
    "copied_in_whole_vectors": ("for (; i < count; ++i) to[i]", "for (; i < 0; ++i) to[i]"),
    "copied_without_the_last": (".store(to + count - Vec::size())", ".store(to)"),
    "copied_pixel_stays": ("Row to(copies + i * kChunk)", "Row to(copies)"),
    "copied_padding_above": ("inside = row >= 0 && row < conv.height;", "inside = row < conv.height;"),
    "copied_padding_left": ("bounded(-column, together)", "0"),
    "copied_padding_right": ("bounded(column + together - conv.width, together - before)", "0"),
    "copied_dilation_lost": ("at.left() + s * conv.dilation[1]", "at.left() + s"),
    "copied_dilation_of_the_other_axis": ("at.top() + r * conv.dilation[0]", "at.top() + r * conv.dilation[1]"),
    "taps_side_by_side": ("conv.dilation[1] == 1 ? conv.kernel_columns : 1", "conv.kernel_columns"),
    "chunks_forgotten": ("if (!tile.is_first)", "if (false)"),
    "chunks_of_before": ("tile.is_first = term == 0;", "tile.is_first = false;"),
    "chunks_not_kept": ("if (!tile.is_last) sums", "if (false) sums"),
    "tile_of_the_first_chunk": ("copies + term * kBlock + row * kChunk", "copies + row * kChunk"),
    "tile_of_the_first_pixels": ("term * kBlock + row * kChunk", "term * kBlock"),
    "tile_written_to_the_first": ("tile.pixel = pixel + row;", "tile.pixel = pixel;"),
    "sums_shared": ("tile.sums = sums + row * kStep;", "tile.sums = sums;"),
    "weights_of_the_chunk_before": ("weight += tile.terms * kStep;", "weight += kChunk * kStep;"),
    "copied_pixels_stay": ("++i, at.step()) {", "++i) {"),
    "image_of_another": ("(image * conv.height + row) * row_step", "row * row_step"),
    "image_row_of_the_first": ("first * conv.stride[0] - conv.padding[0]", "-conv.padding[0]"),
    "image_padding_of_the_other_axis": ("conv.padding[1] * conv.channels,", "conv.padding[0] * conv.channels,"),
    "image_padding_above": ("if (row < 0 || row >= conv.height) {", "if (row >= conv.height) {"),
    "image_padding_below": ("if (row < 0 || row >= conv.height) {", "if (row < 0) {"),
    "image_padding_left": ("    zero(to, before);\n", ""),
    "image_padding_right": ("zero(to + before + inside, behind)", "zero(to + before + inside, 0)"),
    "image_row_too_long": ("smaller(row_step, values - before)", "values - before"),
    "image_rows_too_few": ("* conv.stride[0] + conv.kernel_rows", "* conv.stride[0] + conv.kernel_rows - 1"),
    "image_pixels_side_by_side": ("pixel_step = conv.stride[1] * conv.channels,", "pixel_step = conv.channels,"),
    "image_taps_of_the_row_before": ("    window += row_step;\n", ""),
    "image_weight_stays": ("    weight += run * kStep;\n", ""),
    "image_rows_stay": ("rows += conv.stride[0] * row_step", "rows += 0"),
    "image_pixels_stay": ("pixel += conv.out_width, rows", "pixel += 0, rows"),
    "image_tile_of_the_first": ("rows + column * conv.stride[1] * conv.channels", "rows"),
    "image_tile_written_to_the_first": ("output * terms, pixel + column,", "output * terms, pixel,"),
    "image_weight_of_the_first": ("row_step, packed + output * terms,", "row_step, packed,"),
    "image_tile_too_short": ("kOfWindows[count - 1](conv, window", "kOfWindows[0](conv, window"),
    "block_too_short": ("kMultiply[rows - 1]", "kMultiply[0]"),
}  # fmt: skip


class Conv(ctypes.Structure):
    """`DirectConv` of csrc/cpu/conv_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "zeros", "scale", "bias", "residual", "y")),
        ("relu", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("channels", "outputs", "height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("kernel_rows", "kernel_columns")),
        *((name, ctypes.c_int64 * 2) for name in ("stride", "padding", "dilation")),
    )


class Weight(ctypes.Structure):
    """`DirectWeight` of csrc/cpu/conv_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "packed")),
        *((name, ctypes.c_int64) for name in ("outputs", "channels", "taps")),
        ("channels_last", ctypes.c_bool),
    )


@pytest.fixture
def kernels(tmp_path):
    return compile_mutants(tmp_path, MUTANTS, SOURCES, "direct.cpp", SIZES)


# images, channels, outputs, rows and columns, all of them odd
USUAL = ((2, 131, 9, 7), 135, (3, 2), {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)})
SHORT = [
    ((1, 64, 3, 5), 23, kernel, {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)})
    for kernel in ((1, 1), (1, 2))
]
IMAGE = ((2, 3, 9, 27), 135, (5, 3), {"stride": (2, 2), "padding": (2, 1), "dilation": (1, 1)})


def check(shape, outputs, kernel, geometry, *convs) -> None:
    """In both orders of a weight."""
    x = guarded(draw(shape, torch.float32, "channels_last"))
    channels = shape[1]
    scale, bias = (draw((outputs,), torch.float32) for _ in range(2))
    for layout in ("nchw", "channels_last"):
        weight = guarded(draw((outputs, channels, *kernel), torch.float32, layout))
        plain = F.conv2d(x.double(), weight.double(), **geometry)
        residual = draw(plain.shape, torch.float32, "channels_last")
        pairs = [(ctypes.c_int64 * 2)(*pair) for pair in geometry.values()]
        sizes = (channels, outputs, *x.shape[2:], *plain.shape[2:], *kernel)
        packing = Weight(weight.data_ptr(), None, outputs, channels, kernel[0] * kernel[1], layout != "nchw")
        wide = plain * scale.double()[:, None, None] + bias.double()[:, None, None] + residual.double()
        for conv in convs:
            y = guarded(torch.full_like(residual, float("nan")))
            tensors = (tensor.data_ptr() for tensor in (scale, bias, residual, y))
            pixels = ctypes.c_int64(y.numel() // outputs)
            conv(Conv(x.data_ptr(), None, *tensors, True, *sizes, *pairs), packing, pixels)
            close(y, wide.relu())


def test_each_is_noticed(kernels, native):
    """In one test, which one worker compiles for."""

    def check_all(name: str) -> None:
        check(*IMAGE, getattr(kernels, f"{name}_conv_image"))
        for short in SHORT:
            check(*short, getattr(kernels, f"{name}_conv"))
        check(*USUAL, *(getattr(kernels, f"{name}_{entry}") for entry in ("conv", "conv_copied")))

    assert [name for name in MUTANTS if not notices(check_all, name)] == ["original"]

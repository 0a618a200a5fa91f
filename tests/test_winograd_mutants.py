"""Mutants of the Winograd kernels' source: every one must be noticed by what the original gets right."""

import ctypes

import pytest
import torch
from cases import draw
from kernel_mutants import KERNELS, close, compile_mutants, guarded, notices
from torch.nn import functional as F

SIZES = ("winograd_points.h", "kWinogradRows = 6", "kWinogradRows = 3")
SOURCES = [KERNELS / name for name in ("products.h", "winograd_parts.h", "winograd.cpp", "winograd_gradient.cpp")]

MUTANTS = {  # name -> (before, after)
    "original": ("", ""),
    "point": ("Vec even_q = fma(-p2, x2, x4), odd_q", "Vec even_q = fma(-q2, x2, x4), odd_q"),
    "last_row": ("fma(-(p2 + q2), x3, x[5 * step])", "fma(-(p2 - q2), x3, x[5 * step])"),
    "output_power": ("fma(q2 * q, odd_q,", "fma(q2, odd_q,"),
    "no_padding": ("place.row + i - 1", "place.row + i"),
    "padding_right": ("column >= conv.width;", "false;"),
    "tile_edge": ("i >= place.rows || j", "i > place.rows || j"),
    "rows_for_columns": ("place.rows || j >= place.columns", "place.columns || j >= place.rows"),
    "channel_lost": ("smaller(terms.summed, terms.count - term)", "smaller(terms.summed - 1, terms.count - term)"),
    "last_channels_lost": ("if (left > 0) add(a, left)", "if (false) add(a, left)"),
    "block_again": ("a += terms.block_step", "a += 0"),
    "block_of_the_first": ("term / kWinogradBlock * terms.block_step", "0"),
    "sum_restarts": ("first = false;", ""),
    "next_channels_restart": ("channel == 0 && !conv.continues", "!conv.continues"),
    "next_channels_are_the_first": ("transformed + block_offset(channel", "transformed + block_offset(0"),
    "sum_continues": ("bool first = terms.first;", "bool first = false;"),
    "tile_tail": ("smaller(kRows, slab.tiles - tile) - 1", "0"),
    "no_residual": ("conv.residual != nullptr", "false"),
    "no_bias": ("L{{row[j]}} + bias", "L{{row[j]}}"),
    "no_relu": ("if (conv.relu) out", "if (false) out"),
    "nan_unnoticed": ("zero_if_finite = fma(0, row[j], zero_if_finite);\n          if", "if"),
    "weight_point": ("fma(-kOverQ * kQ, w1, even_q)", "fma(-kOverQ, w1, even_q)"),
    "no_scale": ("scale * at::vec::gather", "at::vec::gather"),
    "beyond_the_outputs": ("smaller(output + lane, conv.outputs - 1)", "smaller(lane, conv.outputs - 1)"),
    "norm_on_padding": ("pixel == zeros_ ? Vec(0) : relu", "false ? Vec(0) : relu"),
    "norm_without_relu": ("relu(normalize(x, mean_, scale_, bias_)).v[0]", "normalize(x, mean_, scale_, bias_).v[0]"),
    "norm_bias_lost": ("conv.norm.bias) + channel", "conv.norm.bias)"),
    "moments_restart": ("tile % conv.chunk == 0", "true"),
    "moments_of_another_chunk": ("tile / conv.chunk * 3", "tile * 3 / conv.chunk"),
    "moments_not_centred": ("fmadd(centred, centred, square_)", "fmadd(out, centred, square_)"),
    "moments_of_the_last_row": ("moments.add(out);", "if (i == 3) moments.add(out);"),
    "gradient_point": ("const Vec even_q = fma(q2, y2, y0), odd_q", "const Vec even_q = fma(p2, y2, y0), odd_q"),
    "gradient_columns": ("out[3] = x[3] - x[1]", "out[3] = x[3] - x[2]"),
    "gradient_dy_columns": ("out[2] = dy[0] - dy[1]", "out[2] = dy[1] - dy[0]"),
    "gradient_edge": ("i < place.rows && j < place.columns", "i < place.rows"),
    "gradient_sums": ("fma(kQ * kQ, even_q, m[5 * step])", "fma(kQ * kQ, even_q, m[4 * step])"),
    "gradient_sums_columns": ("out[0] = even - m[0]", "out[0] = even + m[0]"),
    "gradient_slab_lost": ("slab.first == 0 ? value : Vec::loadu(to + i) + value", "value"),
    "gradient_next_tiles_restart": ("kSum * kWinogradBlock, tile == 0}", "kSum * kWinogradBlock, true}"),
    "gradient_tail": ("smaller(kRows, channels - channel) - 1", "0"),
    "gradient_turned": ("c * kAll + tap : tap * group + c", "c * kAll + tap : c * kAll + tap"),
    "gradient_nan_unnoticed": ("zero_if_finite = fma(0, row[j], zero_if_finite);\n            row", "row"),
}  # fmt: skip


@pytest.fixture
def kernels(tmp_path):
    library = compile_mutants(tmp_path, MUTANTS, SOURCES, "winograd.cpp", SIZES)
    for name in MUTANTS:
        for part in ("conv", "gradient"):
            getattr(library, f"{name}_{part}").restype = ctypes.c_bool
    return library


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "channels", "outputs", "height", "width", "chunk")),
        *((name, ctypes.c_bool) for name in ("relu", "turned", "taps_together")),
    )


def pointers(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


IMAGES, CHANNELS, OUTPUTS, HEIGHT, WIDTH = 3, 35, 70, 9, 15  # everything odd
CHUNK, CHUNKS = 5, 8  # of 36 tiles


def draw_norm() -> tuple[torch.Tensor, torch.Tensor]:
    """mean, scale and bias as the kernels take them, and for PyTorch."""
    rows = draw((3, CHANNELS), torch.float32)
    return F.pad(rows, (0, 64)).contiguous(), rows.double()[:, :, None, None]


def close_moments(found: torch.Tensor, y: torch.Tensor) -> None:
    """Beside the means and the centred squares of y's tiles, CHUNK after CHUNK."""
    image, row, column = torch.meshgrid(*map(torch.arange, (IMAGES, HEIGHT, WIDTH)), indexing="ij")
    chunk = ((image * 3 + row // 4) * 4 + column // 4) // CHUNK
    for number, (shift, total, squares) in enumerate(found.view(CHUNKS, 3, OUTPUTS).double()):
        values = y.double().permute(0, 2, 3, 1)[chunk == number]
        torch.testing.assert_close(shift + total / len(values), values.mean(0), rtol=1e-4, atol=1e-4)
        spread = (values - values.mean(0)).square().sum(0)
        rounding = 1e-5 * float(squares.max())  # of a value that ReLU or the image's edge has taken far from the others
        torch.testing.assert_close(squares - total.square() / len(values), spread, rtol=1e-3, atol=rounding)


def check(conv, gradient) -> None:
    """A convolution of every kind, and its weight's gradient, and both with a NaN."""
    x = guarded(draw((IMAGES, CHANNELS, HEIGHT, WIDTH), torch.float32, "channels_last"))
    residual = draw((IMAGES, OUTPUTS, HEIGHT, WIDTH), torch.float32, "channels_last")
    y, bias, scale = guarded(torch.full_like(residual, float("nan"))), draw((OUTPUTS,), torch.float32), None
    norm, (mean, factor, shift) = draw_norm()
    activated, moments = ((x.double() - mean) * factor + shift).relu(), None

    for turned, layout in ((False, "nchw"), (True, "channels_last")):
        shape = (CHANNELS, OUTPUTS, 3, 3) if turned else (OUTPUTS, CHANNELS, 3, 3)
        weight = draw(shape, torch.float32, layout)
        scale, pending = (None, norm) if turned else (draw((OUTPUTS,), torch.float32), None)
        moments = guarded(torch.full((CHUNKS * 3 * OUTPUTS,), float("nan"))) if turned else None
        sizes = Sizes(IMAGES, CHANNELS, OUTPUTS, HEIGHT, WIDTH, CHUNK, True, turned, layout == "nchw")
        assert conv(*pointers(x, weight, scale, bias, residual, y, pending, moments), ctypes.byref(sizes))
        kernel = weight.double().transpose(0, 1).flip(2, 3) if turned else weight.double() * scale[:, None, None, None]
        seen = activated if turned else x.double()
        close(y, (F.conv2d(seen, kernel, bias.double(), padding=1) + residual.double()).relu())
    close_moments(moments, y)

    dy = guarded(residual)
    for layout, pending in (("nchw", None), ("channels_last", norm)):
        dweight = guarded(torch.full_like(draw((OUTPUTS, CHANNELS, 3, 3), torch.float32, layout), float("nan")))
        sizes.taps_together = layout == "nchw"
        assert gradient(*pointers(dy, x, dweight, pending), ctypes.byref(sizes))
        seen = x.double() if pending is None else activated
        close(dweight, torch.nn.grad.conv2d_weight(seen, dweight.shape, dy.double(), padding=1))

    x[1, 3, 8, 13] = float("nan")
    assert not conv(*pointers(x, weight, scale, bias, residual, y, None, None), ctypes.byref(sizes))
    assert not gradient(*pointers(dy, x, dweight, None), ctypes.byref(sizes))


def check_many(conv, gradient) -> None:
    """More channels, and of the gradient more tiles in a slab, than one call adds up."""
    x, weight = draw((1, 260, 4, 4), torch.float32, "channels_last"), draw((5, 260, 3, 3), torch.float32, "nchw")
    bias, y = draw((5,), torch.float32), guarded(torch.empty(1, 5, 4, 4).contiguous(memory_format=torch.channels_last))
    sizes = Sizes(1, 260, 5, 4, 4, 1, False, False, True)
    assert conv(*pointers(x, weight, None, bias, None, y, None, None), ctypes.byref(sizes))
    close(y, F.conv2d(x.double(), weight.double(), bias.double(), padding=1))

    x, dy = (draw((2, channels, 33, 64), torch.float32, "channels_last") for channels in (2, 3))
    dweight = guarded(torch.empty(3, 2, 3, 3))
    sizes = Sizes(2, 2, 3, 33, 64, 1, False, False, True)
    assert gradient(*pointers(dy, x, dweight, None), ctypes.byref(sizes))
    close(dweight, torch.nn.grad.conv2d_weight(x.double(), dweight.shape, dy.double(), padding=1))


def test_each_is_noticed(kernels, native):
    """In one test, which one worker compiles for."""

    def functions(name: str):
        return (getattr(kernels, f"{name}_{part}") for part in ("conv", "gradient"))

    def check_all(*functions) -> None:
        check(*functions)
        check_many(*functions)

    assert [name for name in MUTANTS if not notices(check_all, *functions(name))] == ["original"]

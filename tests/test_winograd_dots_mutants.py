"""Mutants of the source of Winograd in dot products: every one must be noticed by what the original gets right."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from host_compiler import BFLOAT16_FLAGS, host_compiler
from torch.nn import functional as F

from resnet_fast import numerics
from resnet_fast.amx.weights import pack_winograd
from resnet_fast.backends import units
from resnet_fast.frozen import FrozenConv2d

ROOT = Path(__file__).resolve().parents[1]
AMX = ROOT / "csrc" / "cpu" / "amx"

MUTANTS = {  # of winograd_dots.cpp and its transforms: name -> (before, after)
    "original": ("", ""),
    "first_point": ("out[0] = _mm512_sub_ps(x[0], x[2 * step])", "out[0] = _mm512_sub_ps(x[0], x[step])"),
    "sign": ("_mm512_sub_ps(x[2 * step], x[step])", "_mm512_sub_ps(x[step], x[2 * step])"),
    "last_point": ("_mm512_sub_ps(x[step], x[3 * step])", "_mm512_sub_ps(x[step], x[2 * step])"),
    "columns_not_shared": ("column[0][row] = column[2][row]", "column[0][row] = column[3][row]"),
    "next_columns": ("load_column(2 * tile + 3", "load_column(2 * tile + 2"),
    "points_turned": ("(kSide * row + i) * point", "(kSide * i + row) * point"),
    "half_a_vector": ("x + 16, strip", "x, strip"),
    "strip_after_strip": ("to += strip[i++].tiles * kVector", "++i"),
    "block_lost": ("block < args.blocks; ++block, weight", "block < args.blocks - 1; ++block, weight"),
    "pairs_lost": ("pair < kPairs; ++pair", "pair < kPairs - 1; ++pair"),
    "second_half": ("low + kBlockValues / 2", "low"),
    "output_sum": ("out[0] = _mm512_add_ps(m[0], sum)", "out[0] = sum"),
    "output_difference": ("_mm512_sub_ps(difference, m[3 * step])", "_mm512_add_ps(difference, m[3 * step])"),
    "output_rows": ("transform(rows + row * in, 1", "transform(rows + row, 1"),
    "edge_below": ("i / 2 >= tile.rows ||", "i / 2 > tile.rows ||"),
    "edge_beside": ("i % 2 >= tile.columns", "i % 2 > tile.columns"),
    "no_scale": ("args.scale == nullptr", "true"),
    "bias_of_the_other_half": ("args.bias + first + 16 * half", "args.bias + first"),
    "no_residual": ("args.residual != nullptr", "false"),
    "residual_of_the_other_half": ("load_half(args.residual + at + 16)", "load_half(args.residual + at)"),
    "no_relu": ("if (args.relu)", "if (false)"),
    "not_finite_unnoticed": ("_CMP_UNORD_Q) == 0", "_CMP_UNORD_Q) >= 0"),
    "group_of_one_too_many": ("first += count", "first += count - (groups > 1)"),
    "weights_of_the_block_before": ("args.weight + block * block_values", "args.weight"),
}

GRADIENT_MUTANTS = {  # of winograd_gradient_dots.cpp and its transforms
    "original_gradient": ("", ""),
    "x_first_point": ("out[0] = _mm512_sub_ps(x[0], x[2 * step])", "out[0] = _mm512_sub_ps(x[0], x[step])"),
    "x_sign": ("_mm512_sub_ps(x[2 * step], x[step])", "_mm512_sub_ps(x[step], x[2 * step])"),
    "dy_sign": ("_mm512_sub_ps(_mm512_setzero_ps(), dy[step])", "dy[step]"),
    "dy_point": ("_mm512_sub_ps(dy[0], dy[step])", "_mm512_add_ps(dy[0], dy[step])"),
    "sums_first": ("out[0] = _mm512_add_ps(m[0], even)", "out[0] = even"),
    "sums_half": ("_mm512_mul_ps(half, _mm512_sub_ps(m[step], m[2 * step]))", "_mm512_sub_ps(m[step], m[2 * step])"),
    "sums_last": ("_mm512_add_ps(even, m[3 * step])", "_mm512_sub_ps(even, m[3 * step])"),
    "no_halo": ("args.x, args.channels, tile, 1), x1", "args.x, args.channels, tile, 0), x1"),
    "another_image": ("number * args.height + r", "number + r"),
    "beyond_the_right": ("c >= 0 && c < args.width", "c >= 0 && c <= args.width"),
    "beyond_the_last_tile": ("tile < args.tiles && ", ""),
    "rows_for_columns": ("load_half(at[i] + channel)", "load_half(at[i % side * side + i / side] + channel)"),
    "tiles_swapped_in_one": ("values_of<transform>(first, channel, low)", "values_of<transform>(second, channel, low)"),
    "one_block_of_dy": ("args.dy_values + channel / kVector *", "args.dy_values + 0 *"),
    "sums_begin_anew": ("restart ? _mm512_setzero_ps() : _mm512_loadu_ps(before);", "_mm512_setzero_ps();"),
    "pair_lost": ("pair < pairs; ++pair", "pair < pairs - 1; ++pair"),
    "row_of_another": ("2 * (row + i)", "2 * i"),
    "other_outputs": ("(output_block * kWinogradPoints + point)", "point"),
    "column_half": ("low + kVector", "low"),
    "tap_after_tap": ("to + tap * args.tap_step, narrow", "to + (8 - tap) * args.tap_step, narrow"),
    "gradient_not_finite_unnoticed": ("_CMP_UNORD_Q) == 0", "_CMP_UNORD_Q) >= 0"),
}  # fmt: skip

CASES = [  # channels, outputs, height, width, scaled, residual and ReLU
    (32, 32, 6, 10, False, False),
    (64, 96, 5, 7, True, True),
    (96, 64, 1, 33, False, True),
    (32, 64, 11, 2, True, False),
]


@pytest.fixture
def library(tmp_path) -> ctypes.CDLL:
    """All copies in one: most of the time goes into the intrinsics' header."""
    if not units.has_dots():
        pytest.skip("this CPU has no bfloat16 in AVX-512")
    compiler = host_compiler()
    if not AMX.is_dir():
        pytest.skip("csrc/ is not beside the tests")
    copies, target = tmp_path / "copies.cpp", tmp_path / "copies.so"
    text = ["#include <vector>", '#include "amx.h"', '#include "dots.h"', '#include "vectors.h"']
    text += [copy_of(AMX / "winograd_dots.cpp", name, *mutation) for name, mutation in MUTANTS.items()]
    text += [copy_of(AMX / "winograd_gradient_dots.cpp", name, *each) for name, each in GRADIENT_MUTANTS.items()]
    copies.write_text("\n".join(text))
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w", *BFLOAT16_FLAGS]
    flags += [f"-I{AMX}", f"-I{ROOT / 'tests' / 'csrc'}"]
    subprocess.run([*compiler, *flags, str(copies), "-o", str(target)], check=True, timeout=300)
    return ctypes.CDLL(str(target))


def copy_of(source: Path, name: str, before: str, after: str) -> str:
    """Transforms and source, mutated, in a namespace of this name, and a function that calls them."""
    text = (AMX / "winograd_transforms.h").read_text() + source.read_text()
    assert before in text, f"mutant {name}: {before!r} is not in the source"
    text = text.replace(before, after, 1) if before else text
    body = "\n".join(line for line in text.splitlines() if not line.startswith(("#include", "#pragma once")))
    what = "gradient" if "gradient" in source.name else "convolve"
    copy = f"namespace {name} {{\nusing namespace ::resnet_fast::cpu::amx;\n{body}\n}}"
    names = f"#define MUTANT {name}\n#define {what.upper()} {what}_{name}"
    return f'{copy}\n{names}\n#include "{what}_by_dots.h"\n#undef MUTANT\n#undef {what.upper()}'


def test_every_mutant_is_noticed(library):
    wrong = {}
    for name in MUTANTS:
        function = library[f"convolve_{name}"]
        function.restype = ctypes.c_bool
        wrong[name] = next(filter(None, (error(function, *case) for case in CASES)), None) or unnoticed(function)
    for name in GRADIENT_MUTANTS:
        function = library[f"gradient_{name}"]
        function.restype = ctypes.c_bool
        wrong[name] = gradient_error(function)
    assert (wrong.pop("original"), wrong.pop("original_gradient")) == (None, None)
    assert [name for name, reason in wrong.items() if reason is None] == []


def error(function, *case) -> str | None:
    """What is wrong with one convolution; None where nothing is."""
    ours, stock, exact, finite = convolve(function, *case)
    verdict = numerics.compare("y", ours, stock, exact)
    return None if verdict.match and finite else f"{case}: {verdict}, finite: {finite}"


def unnoticed(function) -> str | None:
    return "an Inf was not noticed" if convolve(function, *CASES[0], value=float("inf"))[3] else None


def convolve(function, channels, outputs, height, width, scaled, residual, value=None):
    """Ours, PyTorch's and float64's result; whether ours said that all is finite, and wrote nothing beyond y."""
    torch.manual_seed(channels + width)
    x = torch.randn(1, channels, height, width).bfloat16()
    if value is not None:
        x[0, 3, height // 2, width // 2] = value
    conv = torch.nn.Conv2d(channels, outputs, 3, padding=1).bfloat16()
    torch.nn.init.normal_(conv.weight, std=(9 * channels) ** -0.5)
    added = torch.randn(1, outputs, height, width).bfloat16() if residual else None
    scale = torch.rand(outputs) + 0.5 if scaled else None
    bias = torch.randn(outputs)

    def expected(dtype: torch.dtype) -> torch.Tensor:
        y = F.conv2d(x.double(), conv.weight.double(), padding=1)
        y = y * (1 if scale is None else scale.double().view(-1, 1, 1)) + bias.double().view(-1, 1, 1)
        return (y if added is None else (y + added.double()).relu()).to(dtype)

    halo = F.pad(x, (1, 3, 1, 3)).view(channels // 32, 32, height + 4, width + 4).permute(0, 2, 3, 1).contiguous()
    packed = pack_winograd(FrozenConv2d(conv, None, False, None)).weight
    rows = None if added is None else added.view(outputs // 32, 32, height, width).permute(0, 2, 3, 1).contiguous()
    room = torch.full((outputs // 32 + 1, height + 1, width + 1, 32), float("nan"), dtype=torch.bfloat16)  # for mutants
    y = room.flatten()[: outputs * height * width].view(outputs // 32, height, width, 32)
    pointers = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (halo, packed, scale, bias, rows, y)]
    steps = [ctypes.c_int64(n) for n in (halo.stride(1), halo.stride(0), channels // 32)]
    sizes = [ctypes.c_int64(n) for n in (height, width, outputs // 32)]
    finite = function(pointers[0], *steps, *pointers[1:], *sizes, ctypes.c_bool(residual))
    finite &= room.flatten()[y.numel() :].isnan().all().item()  # nothing is written beyond y
    ours = y.permute(0, 3, 1, 2).reshape(1, outputs, height, width)
    return ours, expected(torch.bfloat16), expected(torch.float64), finite


def gradient_error(function) -> str | None:
    """What is wrong with the gradient of one weight, or with how an Inf is told; None where nothing is."""
    torch.manual_seed(3)
    images, channels, outputs, height, width = 3, 32, 64, 5, 6  # 27 tiles: the last pair is one
    x, dy = (torch.randn(images, n, height, width).bfloat16() for n in (channels, outputs))

    def gradient() -> tuple[torch.Tensor, bool]:
        rows = [torch.cat([t, torch.ones_like(t[:1])]).permute(0, 2, 3, 1).contiguous() for t in (x, dy)]  # for mutants
        dweight = torch.full((outputs, 3, 3, channels), float("nan"), dtype=torch.bfloat16)
        sizes = [ctypes.c_int64(n) for n in (images, height, width, channels, outputs, 7)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*rows, dweight)]
        finite = function(*pointers[:2], *sizes, pointers[2])
        return dweight.permute(0, 3, 1, 2).contiguous(), finite

    exact = torch.nn.grad.conv2d_weight(x.double(), (outputs, channels, 3, 3), dy.double(), padding=1)
    ours, finite = gradient()
    verdict = numerics.compare("dweight", ours, exact.bfloat16(), exact)
    if not verdict.match or not finite:
        return f"{verdict}, finite: {finite}"
    x[1, 2, 3, 4] = float("inf")
    return "an Inf was not noticed" if gradient()[1] else None

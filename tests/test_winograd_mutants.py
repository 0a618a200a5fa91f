"""Mutants of the Winograd kernels' source: every one must be noticed by a convolution that the original gets right."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import draw
from torch.nn import functional as F
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "cpu" / "kernels" / "winograd.cpp"

MUTANTS = {  # name -> (before, after)
    "original": ("", ""),
    "point": ("out[3 * out_step] = fma(q, odd_q, even_q)", "out[3 * out_step] = fma(p, odd_q, even_q)"),
    "last_row": ("fma(-(p2 + q2), x3, x[5 * step])", "fma(-(p2 - q2), x3, x[5 * step])"),
    "output_power": ("fma(q2 * q, odd_q,", "fma(q2, odd_q,"),
    "no_padding": ("place.row + i - 1", "place.row + i"),
    "padding_right": ("column >= conv.width;", "false;"),
    "tile_edge": ("i >= place.rows || j", "i > place.rows || j"),
    "rows_for_columns": ("place.rows || j >= place.columns", "place.columns || j >= place.rows"),
    "channel_lost": ("channels = smaller(conv.summed, ", "channels = smaller(conv.summed - 1, "),
    "sum_restarts": ("channel == 0, next", "true, next"),
    "tile_tail": ("smaller(kRows, slab.tiles - tile) - 1", "0"),
    "no_residual": ("conv.residual != nullptr", "false"),
    "no_bias": ("L{{row[j]}} + bias", "L{{row[j]}}"),
    "no_relu": ("if (conv.relu) out", "if (false) out"),
    "nan_unnoticed": ("zero_if_finite = fma(0, row[j], zero_if_finite)", "(void)zero_if_finite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """All copies in one library: most of the time goes into PyTorch's headers."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]} is not on PATH)")
    if not SOURCE.is_file():
        pytest.skip("csrc/ is not beside the tests")
    folder = tmp_path_factory.mktemp("winograd")
    (folder / "copies.h").write_text("\n".join(copy_of(name) for name in MUTANTS))
    entries = " ".join(f"entry({name})" for name in MUTANTS)
    defines = ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", f"-DWINOGRAD_NAMES(entry)={entries}"]
    defines += [f'-DWINOGRAD_COPIES="{folder / "copies.h"}"']
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w"]
    source, target = ROOT / "tests" / "csrc" / "winograd.cpp", folder / "winograd.so"
    subprocess.run([*compiler, *flags, *defines, *includes, str(source), "-o", str(target)], check=True, timeout=300)
    return ctypes.CDLL(str(target))


def copy_of(name: str) -> str:
    """The source with its mutation, in a namespace `name`, without its includes."""
    before, after = MUTANTS[name]
    text = SOURCE.read_text()
    assert not before or text.count(before) == 1, f"the mutant {name} is out of date"
    lines = [line for line in text.replace(before, after).splitlines() if not line.startswith("#include")]
    opening, closing = "namespace CPU_CAPABILITY {", "}  // namespace CPU_CAPABILITY"
    body = "\n".join(lines)
    return body.replace(opening, f"{opening} namespace {name} {{").replace(closing, f"}} {closing}")


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of x with NaN before and behind it, where mutants may read and write."""
    around = torch.full((3 * x.numel(),), float("nan"))
    inside = around[x.numel() : 2 * x.numel()]
    return inside.as_strided(x.shape, x.stride(), inside.storage_offset()).copy_(x)


def check(run) -> None:
    """A convolution with everything odd, and one with a NaN."""
    channels, outputs, height, width = 35, 70, 9, 14
    x = guarded(draw((1, channels, height, width), torch.float32, "channels_last"))
    weight, bias = draw((outputs, channels, 3, 3), torch.float32), draw((outputs,), torch.float32)
    residual = draw((1, outputs, height, width), torch.float32, "channels_last")
    packed = torch.ops.resnet_fast_native.winograd_pack(weight)
    y = guarded(torch.full_like(residual, float("nan")))
    sizes = (ctypes.c_int64 * 6)(channels, outputs, height, width, packed.shape[1], 1)

    def call() -> bool:
        return run(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, packed, bias, residual, y)), sizes)

    assert call()
    assert int(y._base.isnan().sum()) == 2 * y.numel()
    wide = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
    torch.testing.assert_close(y, wide.relu().float(), rtol=1e-5, atol=1e-4)
    x[0, 3, 8, 13] = float("nan")
    assert not call()


@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_noticed(name, kernels, native):
    run = getattr(kernels, name)
    run.restype = ctypes.c_bool
    if name == "original":
        check(run)
    else:
        with pytest.raises(AssertionError):
            check(run)

"""The emulation of AMX's tiles: beside what the manual says, beside a CPU with AMX, and as a judge of the kernels."""

import ctypes
import signal
import subprocess
from pathlib import Path

import emulation
import fresh
import numpy as np
import pytest
import torch
from host_compiler import BFLOAT16_FLAGS, emulated_amx_flags, host_compiler

from resnet_fast import extension
from resnet_fast.backends import units
from resnet_fast.cli import environment, info

ROOT = Path(__file__).resolve().parents[1]
AMX = ROOT / "csrc" / "cpu" / "amx"
CONV = (AMX / "conv.cpp").read_text().replace('#include "tiles.h"', (AMX / "tiles.h").read_text())
NATIVE = ("-mamx-tile", "-mamx-bf16", *BFLOAT16_FLAGS)

MUTANTS = {  # name -> (before, after)
    "original": ("", ""),
    "stride": ("a_bytes = args.x_row * 2", "a_bytes = 64"),
    "pixels": ("*a1 = x + other->x", "*a1 = a0"),
    "sum": ("{0, 16, 512, 528}", "{0, 16, 528, 512}"),
    "row": ("step(wanted ? y_row_ : args_.y_gap);", "step(args_.y_gap);"),
    "all rows": ("if (wanted_ == kAllRows)", "if (true)"),
    "start": ("? kZeros : args.bias + block", "? kZeros : args.bias + 0 * block"),
    "epilogue": ("row < 2 * kTileRows; row += rows", "row < kTileRows; row += rows"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(conv.cpp's text, flags) -> the library."""
    compiler = host_compiler()
    known: dict = {}

    def compile(text: str, flags: tuple[str, ...]) -> Path:
        if (text, flags) not in known:
            folder = tmp_path_factory.mktemp("tiles")
            (folder / "conv.cpp").write_text(text)
            source, target = ROOT / "tests" / "csrc" / "amx_tiles.cpp", folder / "tiles.so"
            command = [*compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *flags, f'-DCONV="{folder}/conv.cpp"']
            command += [f"-I{ROOT / 'csrc'}", f"-I{AMX}", str(source), "-o", str(target)]
            subprocess.run(command, check=True, timeout=300)
            known[text, flags] = target
        return known[text, flags]

    return compile


@pytest.fixture
def emulated(compiled) -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled(CONV, emulated_amx_flags())))


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def by_the_manual(total: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """TDPBF16PS: two chains from zero, fused; their sum; and that added. a (16, 16, 2), b (16, 16, 2)."""
    a, b = flushed(widened(a)), flushed(widened(b))
    chains = [np.zeros((16, 16), np.float32) for _ in range(2)]
    for k in range(16):
        for i, chain in enumerate(chains):
            exact = np.longdouble(a[:, k, i])[:, None] * np.longdouble(b[k, :, i])[None, :] + np.longdouble(chain)
            chain[...] = flushed(exact.astype(np.float32))
    return flushed(flushed(total) + flushed(chains[0] + chains[1]))


def numbers(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sum and two operands, of magnitudes for which a long double is exact."""
    draw = np.random.default_rng(seed)
    total = draw.standard_normal((16, 16), dtype=np.float32)
    bits = [draw.standard_normal((16, 16, 2), dtype=np.float32).view(np.uint32) >> 16 for _ in range(2)]
    return total, *(each.astype(np.uint16) for each in bits)


def tiny(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same where sums, operands and products are partly too small for a float32 to be normal."""
    total, a, b = numbers(seed)
    scaled = [(widened(x) * np.float32(2.0**-63)).view(np.uint32) >> 16 for x in (a, b)]
    a, b = (x.astype(np.uint16) for x in scaled)
    a[3], b[5] = 0x0012, 0x8034  # denormals
    return total * np.float32(2.0**-126), a, b


def multiply_add(library: ctypes.CDLL, total, a, b) -> np.ndarray:
    """Rows are further apart than they are long; between them is NaN."""
    held = []
    for array in (total.view(np.uint8), a.reshape(16, 32).view(np.uint8), b.reshape(16, 32).view(np.uint8)):
        rows = np.full((16, 192), 0xFF, np.uint8)
        rows[:, :64] = array
        held.append(rows)
    library.multiply_add(*(ctypes.c_void_p(rows.ctypes.data) for rows in held), ctypes.c_int64(192))
    assert (held[0][:, 64:] == 0xFF).all()
    return held[0][:, :64].copy().view(np.float32)


@pytest.mark.parametrize("draw", [numbers, tiny])
def test_it_is_the_manual_bit_by_bit(draw, emulated):
    for seed in range(20):
        inputs = draw(seed)
        expected = by_the_manual(*inputs)
        np.testing.assert_array_equal(multiply_add(emulated, *inputs), expected)
        assert expected.any()


@pytest.mark.parametrize("draw", [numbers, tiny])
def test_it_is_the_cpu_bit_by_bit(draw, emulated, compiled):
    if not units.has_tiles() or units.unit_name() != "AMX":
        pytest.skip("this CPU has no AMX with bfloat16")
    real = ctypes.CDLL(str(compiled(CONV, NATIVE)))
    for seed in range(20):
        inputs = draw(seed)
        np.testing.assert_array_equal(multiply_add(emulated, *inputs), multiply_add(real, *inputs))


def test_tiles_that_are_not_configured_are_a_fault(compiled):
    library = str(compiled(CONV, emulated_amx_flags()))
    script = f"import ctypes; ctypes.CDLL({library!r}).without_configuration()"
    done = fresh.python(script)
    assert done.returncode == -signal.SIGABRT
    assert "#UD" in done.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_convolution_is_noticed(name, compiled):
    before, after = MUTANTS[name]
    assert not before or CONV.count(before) == 1, f"the mutant {name} is out of date"
    library = ctypes.CDLL(str(compiled(CONV.replace(before, after), emulated_amx_flags())))
    x, weight, bias = torch.randn(32, 32).bfloat16(), torch.randn(64, 32).bfloat16(), torch.randn(64)
    packed = weight.view(2, 2, 16, 16, 2).permute(0, 1, 3, 2, 4).contiguous()  # [block][half][pair][output][2]
    wide, y = torch.full((64, 96), float("nan")).bfloat16(), torch.full((64, 96), float("nan")).bfloat16()
    wide[:32, :32] = x
    library.conv(*(ctypes.c_void_p(t.data_ptr()) for t in (wide, packed, bias, y)), ctypes.c_int64(96))
    rows = [row for row in range(32) if row != 19]
    expected = torch.full((64, 96), float("nan")).bfloat16()
    expected[:31, :64] = (x.double() @ weight.double().T + bias).bfloat16()[rows]
    same = torch.allclose(y, expected, rtol=1e-2, atol=1e-2, equal_nan=True)
    assert same == (name == "original")


@pytest.mark.amx
def test_info_names_what_multiplies(native):
    """An emulation says that it is one; what is installed never does."""
    text = info._frozen_cpu_by(torch.bfloat16)
    if emulation.mode() is not None:
        assert text == "emulated AMX, for tests"
        assert text in extension.build_info()["capabilities"]
        assert any("emulated AMX" in (row["kernel"] or "") for row in info._backends())
    else:
        assert "emulated" not in text
        assert not any("emulated" in name for name in extension.build_info()["capabilities"])
        assert (text == "AMX") == ("amx_bf16" in environment.cpu()["isa"] and units.has_tiles())
        assert text.startswith("AVX-512 bfloat16; 3x3s by Winograd") <= units.has_dots()

"""The C++ compiler of tests that build sources, or mutants of them, by themselves."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from resnet_fast.cli import environment

BFLOAT16_FLAGS = ("-mavx512bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
"""For AVX-512 with bfloat16."""

_HEADERS = Path(__file__).resolve().parent / "csrc"


def emulated_amx_flags() -> tuple[str, ...]:
    """For csrc/cpu/amx with emulated tiles, and emulated AVX-512 where this CPU has none; skips without AVX2."""
    isa = environment.cpu()["isa"]
    if "avx2" not in isa:
        pytest.skip("AMX is emulated by AVX2, which this CPU has not")
    tiles = ("-include", str(_HEADERS / "amx_tiles.h"))
    if "avx512_bf16" in isa:
        return *tiles, *BFLOAT16_FLAGS
    return "-include", str(_HEADERS / "avx512.h"), *tiles, "-ffp-contract=off", "-mavx2", "-mfma"


def host_compiler() -> list[str]:
    """CXX, or c++, as a command line; skips where there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler ({command[0]} is not on PATH)")
    return command

"""The C++ compiler of tests that build sources, or mutants of them, by themselves."""

import os
import shlex
import shutil

import pytest

BFLOAT16_FLAGS = ("-mavx512bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
"""For AVX-512 with bfloat16."""


def host_compiler() -> list[str]:
    """CXX, or c++, as a command line; skips where there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler ({command[0]} is not on PATH)")
    return command

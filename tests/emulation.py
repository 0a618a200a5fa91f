"""AMX kernels on CPUs that have no AMX: an extension with emulated tiles in place of the installed one, in one process.

RESNET_FAST_EMULATE_AMX=marked pytest tests     the tests marked `amx`, as `make test` has them run
RESNET_FAST_EMULATE_AMX=all pytest tests        all that are chosen

The extension is what `setup.py emulate_amx` makes of the build's objects: seconds where these are, minutes without.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_compiler import emulated_amx_flags

from resnet_fast.cli import environment

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "emulated-amx" / "resnet_fast"
MODES = ("marked", "all")


def mode() -> str | None:
    """What RESNET_FAST_EMULATE_AMX asks for; None where there is to be no emulation."""
    asked = os.environ.get("RESNET_FAST_EMULATE_AMX") or None
    if asked not in (None, *MODES):
        raise pytest.UsageError(f"RESNET_FAST_EMULATE_AMX={asked!r} is unknown; valid: {', '.join(MODES)}")
    return asked


def why_not() -> str | None:
    """Why nothing is emulated here; None where it can be."""
    if "amx_bf16" in environment.cpu()["isa"]:
        return "this CPU has AMX, which the tests use"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "AMX is emulated by AVX-512 or AVX2, which this CPU, or PyTorch on it, has not"
    if os.environ.get("RESNET_FAST_BUILD") == "none":
        return "RESNET_FAST_BUILD=none has no AMX kernels"
    if importlib.util.find_spec("resnet_fast._C") is None:
        return "resnet_fast._C is not built"
    return None


def concerns(item: pytest.Item) -> bool:
    """Whether the test is marked, and not of another backend than the one with the kernels."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return item.get_closest_marker("amx") is not None and parameters.get("backend", "native") == "native"


def build() -> None:
    """Raises UsageError with what the build said where it fails."""
    command = [sys.executable, "setup.py", "-q", "emulate_amx"]
    variables = os.environ | {"RESNET_FAST_EMULATED_AMX_FLAGS": shlex.join(emulated_amx_flags())}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise pytest.UsageError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def install() -> None:
    """As resnet_fast._C, before anything has imported that."""
    assert "resnet_fast._C" not in sys.modules
    [path] = FOLDER.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("resnet_fast._C", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

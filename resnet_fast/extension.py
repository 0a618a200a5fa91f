"""The C++ extension resnet_fast._C: imported once, on first use, and its registered ops by name.

Everything works without it, slower. A failure to load is remembered: `available()` says what is wrong and what helps.
"""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch

from . import _log

REINSTALL = "run `pip install -e .` in the source tree, or reinstall resnet-fast"
"""What helps against one that is missing, or of another build."""

_names: list[str] = []  # of its ops that this package calls

_module: ModuleType | None = None
_failure: str | None = None


def load() -> ModuleType | None:
    """The extension module, imported on the first call; None if it cannot be used, and then `available()` says why."""
    global _module, _failure
    if _module is None and _failure is None:
        try:
            module = importlib.import_module("resnet_fast._C")
        except ModuleNotFoundError as error:
            if error.name == "resnet_fast._C":
                # Not an accident: a pure-Python install. Reports and `info` say so.
                _failure = f"the C++ extension resnet_fast._C is not built: {REINSTALL}, with a C++ compiler"
                _log.once(_failure, logging.INFO)
            else:
                _fail(f"the C++ extension resnet_fast._C needs {error.name}, which is not installed")
        except Exception as error:  # a broken library fails in many ways, and none may break the import of a model
            _fail(f"the C++ extension resnet_fast._C does not load ({_first_line(error)}): {REINSTALL}")
        else:
            _failure = _mismatch(module)
            if _failure is None:
                _module = module
            else:
                _fail(_failure)
    return _module


def available() -> str | None:
    """None if the extension can be used, else one line that says why not and what would help."""
    load()
    return _failure


def build_info() -> dict | None:
    """What the extension was built with and the CPU capability it uses; None without the extension.

    Keys: torch_version, cuda_version (or None), compiler, cplusplus, cxx11_abi, openmp, capabilities, cpu_capability,
    cxx_flags; with CUDA also cuda_archs (as TORCH_CUDA_ARCH_LIST), cudnn_version (the one loaded), nvcc_flags.
    """
    module = load()
    return None if module is None else module.build_info()


def _fail(reason: str) -> None:
    global _failure
    _failure = reason
    _log.once(f"native backend off: {reason}")


def _mismatch(module: ModuleType) -> str | None:
    """Why an extension that was imported must not be used: it was made for another torch, ABI or version of ours."""
    info = module.build_info()
    built, running = info["torch_version"], torch.__version__
    if built.split(".")[:2] != running.split(".")[:2]:
        return f"the C++ extension resnet_fast._C was built for torch {built} and this is torch {running}: {REINSTALL}"
    abi = info.get("cxx11_abi")
    if abi is not None and abi != torch.compiled_with_cxx11_abi():
        return f"the C++ extension resnet_fast._C has another C++ ABI than torch (cxx11_abi={abi}): {REINSTALL}"
    missing = [name for name in _names if not hasattr(torch.ops.resnet_fast_native, name)]
    if missing:
        return f"the C++ extension resnet_fast._C is of another version and lacks {', '.join(missing)}: {REINSTALL}"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def op(name: str) -> Callable:
    """The registered op `name`, looked up on the first call, when the extension has been loaded."""
    resolved = None
    _names.append(name)

    def call(*args):
        nonlocal resolved
        if resolved is None:
            if load() is None:
                raise RuntimeError(f"backend 'native' cannot run {name}: {_failure}")
            resolved = getattr(torch.ops.resnet_fast_native, name).default
        return resolved(*args)

    call.__name__ = call.__qualname__ = name
    return call

"""Backend `native`: the C++ extension resnet_fast._C. On CPUs, oneDNN convolutions and our vectorised batch norm.

Functions have the arguments of `resnet_fast.ops` without `backend` and return the same; see there for shapes. The
extension is imported once, on first use, and a failure is remembered: `available()` says what is wrong and what helps.
"""

import importlib
import logging
from types import ModuleType

import torch

from .. import _log
from ..training import LIBRARY, PROLOGUE
from . import train_ops

TILE_DTYPES = (torch.float32, torch.bfloat16)
"""Of the convolutions that a CPU with AMX trains with."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CUDA_OPS = ("bn_act", "bn_act_train", "bn_act_backward")
_REINSTALL = "run `pip install -e .` in the source tree, or reinstall resnet-fast"

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
                _failure = f"the C++ extension resnet_fast._C is not built: {_REINSTALL}, with a C++ compiler"
                _log.once(_failure, logging.INFO)
            else:
                _fail(f"the C++ extension resnet_fast._C needs {error.name}, which is not installed")
        except Exception as error:  # a broken library fails in many ways, and none may break the import of a model
            _fail(f"the C++ extension resnet_fast._C does not load ({_first_line(error)}): {_REINSTALL}")
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

    Keys: torch_version, cuda_version (or None), compiler, cplusplus, cxx11_abi, openmp, capabilities, cpu_capability.
    """
    module = load()
    return None if module is None else module.build_info()


def why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `op` cannot run here on tensors of this device and dtype; None where it can."""
    reason = available()
    if reason is not None:
        return reason
    if dtype not in _DTYPES:
        return f"{dtype} is not one of float32, float64, bfloat16, float16"
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"no kernels for {device_type} tensors, only cpu and cuda"
    if build_info()["cuda_version"] is None:
        return "built without CUDA: install with nvcc and a CUDA build of PyTorch, RESNET_FAST_BUILD=cuda"
    return None if op in _CUDA_OPS else f"{op} has no CUDA kernel; convolutions on GPUs are cuDNN's"


def why_not_auto(device_type: str) -> str | None:
    """Why "auto" passes this backend over where it can run."""
    return None if device_type == "cpu" else f"not yet verified and timed on {device_type}"


def kernel(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Short name of what runs, for reports."""
    where = "CUDA" if device_type == "cuda" else (build_info() or {}).get("cpu_capability", "CPU")
    tiles = op == "residual_block_train" and dtype in TILE_DTYPES and has_tiles()
    conv = "" if op.startswith("bn") else "AMX conv + " if tiles else "oneDNN conv + "
    return f"{conv}fused bn_act ({where})"


def train_stage(device_type: str, dtype: torch.dtype) -> tuple[int, tuple[float, float] | None]:
    """The stage of training that "auto" takes (`resnet_fast.training`), and bandwidth and peak where it may be 4."""
    tiles = device_type == "cpu" and dtype in TILE_DTYPES and has_tiles()
    return (PROLOGUE if tiles else LIBRARY), None


def has_tiles() -> bool:
    """Whether training's convolutions may be AMX tile products here."""
    return load() is not None and _module.amx_usable()


def _fail(reason: str) -> None:
    global _failure
    _failure = reason
    _log.once(f"native backend off: {reason}")


def _mismatch(module: ModuleType) -> str | None:
    built, running = module.build_info()["torch_version"], torch.__version__
    if built.split(".")[:2] == running.split(".")[:2]:
        return None
    return f"the C++ extension resnet_fast._C was built for torch {built} and this is torch {running}: {_REINSTALL}"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _op(name: str):
    """The registered op `name`, looked up on the first call, when the extension has been loaded."""
    resolved = None

    def call(*args):
        nonlocal resolved
        if resolved is None:
            if load() is None:
                raise RuntimeError(f"backend 'native' cannot run {name}: {_failure}")
            resolved = getattr(torch.ops.resnet_fast_native, name).default
        return resolved(*args)

    call.__name__ = call.__qualname__ = name
    return call


bn_act = _op("bn_act")
bn_act_train = _op("bn_act_train")
bn_act_backward = _op("bn_act_backward")
conv_bn_act = _op("conv_bn_act")
conv_bn_act_train = _op("conv_bn_act_train")
conv_bn_act_backward = _op("conv_bn_act_backward")


def conv_bn_shortcut_act(*args) -> torch.Tensor:
    """`ops.conv_bn_shortcut_act` as two calls: oneDNN's convolutions take no second input."""
    *main, eps, shortcut, conv_weight, conv_bias, weight, bias, mean, var, stride, shortcut_eps, relu = args
    tensors, geometry = main[:7], main[7:]
    branch = (shortcut, conv_weight, conv_bias, weight, bias, mean, var)
    residual = conv_bn_act(*branch, None, stride, [0, 0], [1, 1], 1, shortcut_eps, False)
    return conv_bn_act(*tensors, residual, *geometry, eps, relu)


residual_block_train, residual_block_backward, stem_train, stem_backward = train_ops.make(
    lambda: importlib.import_module(".primitives.native", __package__)
)

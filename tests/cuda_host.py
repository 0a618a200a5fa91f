"""The CUDA kernels' host-device code, compiled for the host: what the GPU would do, thread by thread, on CPU tensors.

Functions named as those of `backends.primitives.reference` are called and return as these do.
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from host_compiler import host_compiler
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from resnet_fast.backends.primitives import Norm, reference

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NO_MASK, FROM_X, FROM_Y = range(3)
_FLAGS = ("-O0", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas")
"""Not optimised, which changes no result: compiling takes most of the time."""


class Image(ctypes.Structure):
    """`Image` of csrc/cuda/launch.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "channels", "plane")] + [("channels_last", ctypes.c_bool)]


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """tests/csrc/<name>.cpp, compiled once a process; skips where there is no compiler or the sources are not there."""
    return compiled(name, ROOT / "csrc")


def compiled(name: str, sources: Path) -> ctypes.CDLL:
    """`library` with other sources than this tree's."""
    compiler = host_compiler()
    if not sources.is_dir():
        pytest.skip("csrc/ is not beside the tests")
    includes = [f"-I{path}" for path in (sources, *include_paths())]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{name}.so"
        source = ROOT / "tests" / "csrc" / f"{name}.cpp"
        subprocess.run([*compiler, *_FLAGS, *includes, str(source), "-o", str(target)], check=True, timeout=300)
        return ctypes.CDLL(str(target))


def image_of(x: Tensor) -> Image:
    """As `make_problem` of csrc/cuda/bn.cpp sees a dense tensor."""
    batch, channels, height, width = x.shape
    return Image(batch, channels, height * width, x.is_contiguous(memory_format=torch.channels_last))


def batch_statistics(conv_out: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.batch_statistics`."""
    x = _dense(conv_out)
    mean, var = _vector(x), _vector(x)
    library("bn").statistics(*_head(x), _pointers(x, mean, var))
    return mean, var


def apply(conv_out, norm: Norm, residual=None, residual_norm: Norm | None = None, relu: bool = True) -> Tensor:
    """`reference.apply`."""
    x = _dense(conv_out)
    added, y = _like(x, residual), torch.empty_like(x)
    own, other = _norm(x, norm), _norm(x, residual_norm)
    epses = (ctypes.c_double(n.eps if n else 0.0) for n in (norm, residual_norm))
    join = ctypes.c_bool(residual is not None and residual_norm is not None)
    library("bn").apply(*_head(x), _pointers(x, added, y, *own, *other), *epses, join, ctypes.c_bool(relu))
    return y


def mask(dy: Tensor, y: Tensor, layout_like: Tensor) -> Tensor:
    """`reference.mask`."""
    kept = y.contiguous(memory_format=_format(layout_like))
    dz, none = torch.empty_like(kept), [None] * 4
    tensors = _pointers(_like(kept, dy), None, kept, *none, None, None, None, dz)
    library("bn").backward_apply(*_head(kept), tensors, ctypes.c_double(0), FROM_Y, ctypes.c_double(1))
    return dz


def backward_reduce(dy: Tensor, conv_out: Tensor, norm: Norm, relu: bool, index=None) -> tuple[Tensor, Tensor]:
    """`reference.backward_reduce`."""
    dy = dy if index is None else reference.unpool(dy, index, conv_out)
    return _reduce(dy, conv_out, norm, FROM_X if relu else NO_MASK)[:2]


def backward_apply(
    dy: Tensor, conv_out: Tensor | None, norm: Norm, relu: bool, mean_dz, mean_dzx, index=None
) -> Tensor:
    """`reference.backward_apply`."""
    dy = dy if index is None else reference.unpool(dy, index, conv_out)
    x = _dense(dy if conv_out is None else conv_out)
    needed = x if relu or mean_dz is not None else None
    sums, dx = [_wide(x, vector) for vector in (mean_dz, mean_dzx)], torch.empty_like(x)
    tensors = _pointers(_like(x, dy), needed, None, *_norm(x, norm), *sums, dx, None)
    mask = FROM_X if relu else NO_MASK
    library("bn").backward_apply(*_head(x), tensors, ctypes.c_double(norm.eps), mask, ctypes.c_double(1))
    return dx


def bn_act_backward(dy: Tensor, x: Tensor, y: Tensor | None, norm: Norm, relu: bool, training: bool) -> tuple:
    """dx, dweight, dbias and dresidual as bn_act_op.cpp puts them together."""
    x = _dense(x)
    kept = _like(x, y)
    mask = NO_MASK if not relu else FROM_X if y is None else FROM_Y
    sum_dz, sum_dzx, dweight = _reduce(dy, x, norm, mask, kept)
    dx, dresidual = torch.empty_like(x), torch.empty_like(x)
    sums = (sum_dz, sum_dzx) if training else (None, None)
    tensors = _pointers(_like(x, dy), x, kept, *_norm(x, norm), *sums, dx, dresidual)
    inverse = ctypes.c_double(x.shape[1] / x.numel())
    library("bn").backward_apply(*_head(x), tensors, ctypes.c_double(norm.eps), mask, inverse)
    return dx, dweight, sum_dz, dresidual


def _reduce(dy, conv_out, norm: Norm, mask: int, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(conv_out)
    sums = [_vector(x) for _ in range(3)]
    tensors = _pointers(_like(x, dy), x, kept, *_norm(x, norm), *sums)
    library("bn").backward_reduce(*_head(x), tensors, ctypes.c_double(norm.eps), mask)
    return tuple(sums)


def _pointers(*tensors: Tensor | None):
    """A C array of them; it keeps the tensors alive."""
    array = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
    array.tensors = tensors
    return array


def _head(x: Tensor) -> tuple:
    return ctypes.byref(image_of(x)), DTYPES[x.dtype]


def _format(x: Tensor) -> torch.memory_format:
    return torch._prims_common.suggest_memory_format(x)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_format(x))


def _like(x: Tensor, other: Tensor | None) -> Tensor | None:
    return None if other is None else other.to(x.dtype).contiguous(memory_format=_format(x))


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=_acc(x))


def _wide(x: Tensor, vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(_acc(x)).contiguous()


def _norm(x: Tensor, norm: Norm | None) -> list[Tensor | None]:
    return [None] * 4 if norm is None else [_wide(x, vector) for vector in norm[:4]]

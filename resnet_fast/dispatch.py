"""Which backend runs an op, and why the others do not.

A backend is one module in `resnet_fast.backends`: a function per op, plus `available()`, `why_not()`, `why_not_auto()`
and `kernel()`. Order of decision: the `backend=` argument, then RESNET_FAST_BACKEND, then the first usable row of
`PRIORITY` that has been measured on the device. An explicit choice that cannot run raises; "auto" always ends at
`reference`, which is plain PyTorch.
"""

import functools
import importlib
import os
from types import ModuleType

import torch

PRIORITY = ("triton", "native", "reference")
"""Backend names, fastest first."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why and what would help."""


@functools.cache
def load(name: str) -> ModuleType:
    """The backend's module. It imports everywhere; whether it can run is `why_not`'s business."""
    return importlib.import_module(f"resnet_fast.backends.{name}")


def why_not(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot run `op` for tensors of this device and dtype; None where it can.

    Raises:
        ValueError: no such backend.
    """
    return load(_known(name)).why_not(op, device_type, dtype)


def requested(backend: str = "auto") -> str:
    """The backend asked for: the argument unless it is "auto", then RESNET_FAST_BACKEND, then "auto".

    Raises:
        ValueError: no such backend; says which of the two named it.
    """
    if backend != "auto":
        return _known(backend)
    from_environment = os.environ.get("RESNET_FAST_BACKEND", "auto") or "auto"
    return _known(from_environment, "RESNET_FAST_BACKEND")


@torch.compiler.assume_constant_result
def select(op: str, device_type: str, dtype: torch.dtype, backend: str = "auto") -> str:
    """The name of the backend that will run `op`.

    Raises:
        ValueError: `backend` or RESNET_FAST_BACKEND is not a backend's name.
        BackendUnavailable: the one asked for cannot run this op here; carries `why_not`'s reason.
    """
    return _select(op, device_type, dtype, requested(backend))


@functools.cache
def _select(op: str, device_type: str, dtype: torch.dtype, backend: str) -> str:
    if backend != "auto":
        reason = why_not(backend, op, device_type, dtype)
        if reason is not None:
            usable = [name for name in PRIORITY if why_not(name, op, device_type, dtype) is None]
            raise BackendUnavailable(
                f"backend={backend!r} cannot run {op} on {device_type} {dtype}: {reason}. "
                f"Usable here: {', '.join(usable)}."
            )
        return backend
    return next(name for name in PRIORITY if why_not_auto(name, op, device_type, dtype) is None)


def check_convolution(backend: str, x, conv_weight, stride, padding, dilation, groups, residual, relu) -> None:
    """Raise BackendUnavailable where `backend`, asked for by name, has no kernel of its own for this convolution.

    Only `triton` decides by shape; where it was not asked for by name, such a layer takes the library's path.
    """
    if torch.compiler.is_compiling() or requested(backend) != "triton":
        return
    reason = load("triton").why_not_convolution(x, conv_weight, stride, padding, dilation, groups, residual, relu)
    if reason is not None:
        raise BackendUnavailable(f"backend='triton' cannot run this convolution: {reason}")


def why_not_auto(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why "auto" passes backend `name` over; None where it may take it. What can run may still be by request only."""
    reason = why_not(name, op, device_type, dtype)
    if reason is None and (reason := load(name).why_not_auto(device_type, op)):
        return f"{reason}, so only by request (backend={name!r})"
    return reason


def runs_fused(op: str, device_type: str, dtype: torch.dtype, backend: str = "auto") -> bool:
    """Whether a fused backend runs `op`, or `reference` by request. Raises as `select`."""
    return select(op, device_type, dtype, backend) != "reference" or requested(backend) == "reference"


@functools.cache
def why_not_fused(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Why "auto" ends at plain PyTorch: the reason of every faster backend, in one line."""
    fused = PRIORITY[: PRIORITY.index("reference")]
    return "; ".join(f"{name}: {why_not_auto(name, op, device_type, dtype)}" for name in fused)


@torch.compiler.assume_constant_result
def train_stage(backend: str, device_type: str, dtype: torch.dtype) -> int:
    """The stage of training that "auto" takes on this backend."""
    return load(backend).train_stage(device_type, dtype)


def clear_cache() -> None:
    """Forget past selections, for tests that break and mend backends."""
    _select.cache_clear()
    why_not_fused.cache_clear()


def _known(name: str, argument: str = "backend") -> str:
    if name != "auto" and name not in PRIORITY:
        raise ValueError(f"{argument}={name!r} is not a backend; it must be one of: auto, {', '.join(PRIORITY)}")
    return name

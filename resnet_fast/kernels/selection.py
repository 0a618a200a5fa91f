"""Which kernel runs a problem: what a tuned table measured, else what the cost model predicts, else the library.

Decided once per problem and device and remembered; nothing is tuned or timed inside a call.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..cpus import Cpu, Device
from ..problems import ConvProblem, GramDgradProblem, Problem, PrologueProblem, StemProblem
from . import tables
from .configs import (
    Config,
    GramDgradConfig,
    PointerConfig,
    PrologueConfig,
    StemConfig,
    TailConfig,
    TmaConfig,
    candidates,
    kernel_name,
    of_cpu,
    why_not,
    why_not_unmeasured,
)


@dataclass(frozen=True)
class Choice:
    """config: of the kernel, or None for the library's path (backends.library; on CPUs oneDNN), in its `variant`.

    source: "tuned" (measured on this device), "tuned at n<batch>" (at the nearest batch size), "predicted" (cost model;
    on CPUs `configs.why_not_unmeasured`), "library" (no kernel was considered) or "refused" (the launch failed).
    reason: why the library's path was taken.
    """

    config: Config | None
    source: str
    reason: str = ""
    variant: str = ""

    @property
    def kernel(self) -> str:
        """Short name for reports."""
        return "library" if self.config is None else kernel_name(self.config)


_refused: dict[tuple[Problem, Device], str] = {}
_forced: dict[Problem, Choice] = {}


@contextlib.contextmanager
def forced(problem: Problem, choice: Choice) -> Iterator[None]:
    """Inside, `problem` takes `choice` whatever is known of it: for `tune`, which measures one after the other."""
    _forced[problem] = choice
    try:
        yield
    finally:
        del _forced[problem]


def is_forced(problem: Problem) -> bool:
    """Whether this is inside `forced` for `problem`: what is refused then is an error."""
    return problem in _forced


_remembered = []
REMEMBERED = 4096  # shapes, of a function: images of any size may come, and nothing is to grow without end


def remember(function: Callable) -> Callable:
    """`functools.lru_cache` for what follows from choices; it forgets when they may change."""
    cached = functools.lru_cache(REMEMBERED)(function)
    _remembered.append(cached)
    return cached


def refuse(problem: Problem, device: Device, reason: str) -> None:
    """Take the library's path for `problem` from now on: what was chosen did not run."""
    _refused[problem, device] = reason
    _choose_anew()


def choose(problem: Problem, device: Device) -> Choice:
    """The choice for `problem` on `device`."""
    if problem in _forced:
        return _forced[problem]
    if problem.dtype == "float32" and not isinstance(device, Cpu) and (reason := why_not_float32()):
        return Choice(None, "library", reason)
    return _choose(problem, device)


def why_not_float32() -> str | None:
    """Why convolutions in float32 are the library's; None where Triton may compute them. It depends on flags."""
    if not torch.backends.cudnn.allow_tf32:
        return "float32 without TF32 has no tensor cores, and without them cuDNN is faster"
    if os.environ.get("TRITON_INTERPRET", "0") != "1":  # whose products are exact
        return "Triton's TF32 products cut their operands' last bits off, which biases sums; cuDNN rounds them"
    return None


@remember
def _choose(problem: Problem, device: Device) -> Choice:
    if (problem, device) in _refused:
        return Choice(None, "refused", _refused[problem, device])
    as_measured = measured_as(problem, device)
    measured = tables.lookup(as_measured, device)
    if measured is not None:
        row, key = measured
        source = "tuned" if key == as_measured.key else f"tuned at {tables.batch_of(key)}"
        source += "" if problem.dtype in key.split() else " in the other half type"
        if row.config is None:
            if newer := _newer(row, problem, device):
                return Choice(newer, "predicted")
            return Choice(None, source, "measured faster than every kernel of ours", row.variant)
        if why_not(row.config, problem, device) is None:  # a table may be older than the kernels
            return Choice(row.config, source)
    ranked = candidates(problem, device)
    if not ranked:
        return Choice(None, "predicted", why_no_kernel(problem, device))
    best = _taken_unmeasured(ranked, problem, device)
    if best is None:
        return Choice(None, "predicted", "; ".join(why_not_unmeasured(config, problem, device) for config in ranked))
    return Choice(best, "predicted")


def _newer(row: tables.Row, problem: Problem, device: Device) -> Config | None:
    """On a CPU, a kernel that is newer than the row, and is taken where nothing is measured."""
    if not isinstance(device, Cpu) or not row.tried:
        return None
    newer = [config for config in candidates(problem, device) if kernel_name(config) not in row.tried]
    return _taken_unmeasured(newer, problem, device)


def _taken_unmeasured(ranked: list[Config], problem: Problem, device: Device) -> Config | None:
    return next((config for config in ranked if why_not_unmeasured(config, problem, device) is None), None)


def measured_as(problem: Problem, device: Device) -> Problem:
    """What `tune` measures for `problem`: a convolution folded; on CPUs one that is not, alone.

    Batch norm in the epilogue costs a GPU's kernel next to nothing and the library a pass, so that a kernel which is
    faster folded is faster with it. A CPU transforms weights that are not folded in every call, whatever follows.
    """
    if not isinstance(problem, ConvProblem):
        return problem
    if not isinstance(device, Cpu):
        return replace(problem, folded=True, residual_norm=False)
    if problem.folded and problem.dtype == "bfloat16":  # as part of a program, where what follows costs nothing
        return ConvProblem(problem.conv, problem.dtype)
    return problem if problem.folded else ConvProblem(problem.conv, problem.dtype, relu=False, folded=False)


def forget() -> None:
    """Choose anew, and from tables read anew: for `tune` and the tests."""
    _refused.clear()
    _choose_anew()
    tables.forget()


def _choose_anew() -> None:
    for cached in _remembered:
        cached.cache_clear()


def why_no_kernel(problem: Problem, device: Device) -> str:
    """Why no configuration fits `problem`: the validity function's reasons, each once."""
    tried: tuple[Config, ...]
    if isinstance(device, Cpu):
        tried = of_cpu(problem)
    elif isinstance(problem, ConvProblem):
        tried = (PointerConfig(64, 16, 16, 4, 3), TmaConfig((1, 8, 8), 64, 64, 4, 3))
    elif isinstance(problem, PrologueProblem):
        tried = (PrologueConfig(64, 64, 16, 1, 4, 1),)
    elif isinstance(problem, GramDgradProblem):
        tried = (GramDgradConfig(64, 64, 16, 4, 2),)
    elif isinstance(problem, StemProblem):
        tried = (StemConfig((1, 8, 16), 64, 32, 4, 3), PointerConfig(128, 64, 32, 4, 1))
    else:
        tried = (TailConfig((1, 8, 8), 64, 64, 8, 2),)
    reasons = [f"{kernel_name(config)}: {why_not(config, problem, device)}" for config in tried]
    return "; ".join(dict.fromkeys(reasons))

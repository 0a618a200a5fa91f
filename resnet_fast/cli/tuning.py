"""Measuring one problem: every candidate verified against float64, then timed. `tune` decides what is measured.

On a GPU a candidate is timed as the engine runs it, in a CUDA graph, so that the host's part of a launch is in no time;
L2 is overwritten before every replay. On a CPU what a layer reads is out of the caches before every run, too: in a
network other layers' weights and activations have passed through them. Under Triton's interpreter times are wall-clock
and mean nothing.
"""

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from time import perf_counter

import numpy as np
import torch

from .. import numerics
from ..backends import triton as triton_backend
from ..cpus import Cpu, Device
from ..kernels import configs
from ..kernels.configs import Config
from ..problems import Problem
from . import checks, workloads
from .workloads import cpu as cpu_workloads
from .workloads.workload import Outputs, Run

STOCK = "PyTorch"
"""Label of PyTorch's own ops, one by one: what every candidate's error is compared with."""

WRONG = "wrong: "
"""How the reason begins why a candidate was rejected that ran and gave other numbers."""

_WARMUP_MS, _TIMED_MS = 10, 40
_CPU_TURNS, _CPU_RUNS = 5, 7
_CPU_CACHES = 64 << 20  # bytes, more than the caches of a few cores


class DeviceLost(RuntimeError):
    """A candidate left the GPU unusable for this process; `label` says which."""

    def __init__(self, label: str, reason: str) -> None:
        super().__init__(f"{label}: {reason}")
        self.label, self.reason = label, reason


@dataclass(frozen=True)
class Timing:
    """Microseconds: median and quantiles."""

    us: float
    p20_us: float
    p80_us: float

    def of_one(self, repeats: int) -> "Timing":
        """Where so many were timed together."""
        return Timing(*(value / repeats for value in astuple(self)))


def measure(
    problem: Problem,
    target: Device,
    device: str,
    *,
    top: int,
    crashed: Mapping[str, str],
    trying: Callable[[str], None] = lambda label: None,
) -> dict:
    """The table's row for `problem`: the fastest right one of its `top` most promising configurations and the library.

    Args:
        target: what is tuned for. device: where it runs, PyTorch's name of it.
        crashed: label -> reason of candidates that are not to be run again.
        trying: called with the label of each candidate before it first runs.

    Returns:
        The row of a tuned table (kernels.tables) and beside it: kernel, p20_us, p80_us, tflop_per_s, gb_per_s,
        candidates (how many configurations are valid), times (label -> microseconds), rejected (label -> reason).

    Raises:
        DeviceLost. Whatever PyTorch's own ops raise.
    """
    in_turn = isinstance(target, Cpu)
    work = cpu_workloads.of(problem) if in_turn else workloads.of(problem, device)
    valid = configs.candidates(problem, target)
    runs: dict[str, tuple[Config | None, str, Run]] = {}
    for config in valid[:top]:
        runs[label_of(config)] = (config, "", work.kernel(config))
    for variant, run in work.library.items():
        runs[f"library {variant}"] = (None, variant, run)
    rejected = dict(crashed)
    _compile([run for label, (config, _, run) in runs.items() if config and label not in rejected], device)
    trying(STOCK)
    try:
        reference, stock, right = work.reference(), work.stock(), {STOCK: work.stock}
        timings = {} if in_turn else {STOCK: time(work.stock, device)}
    except Exception as error:
        if _usable(device):
            raise
        raise DeviceLost(STOCK, _line(error)) from error
    for label, (config, _, run) in runs.items():
        if label in rejected:
            continue
        trying(label)
        try:
            work.poison()
            with checks.poisoned_memory() if config else contextlib.nullcontext():
                found = run()
            verdict = numerics.worst(numerics.compare_all(found, stock, reference))
            if verdict.match:
                right[label] = run
                if not in_turn:
                    timings[label] = time(run, device)
            else:
                rejected[label] = f"{WRONG}{verdict.name}: {verdict.reason}"
        except Exception as error:  # a kernel that nobody has run yet fails in any way, and costs itself alone
            rejected[label] = _line(error)
            if not _usable(device):
                raise DeviceLost(label, rejected[label]) from error
    if in_turn:
        of_run = _time_in_turn(dict.fromkeys(right.values()))  # PyTorch's own op may be the library's path too
        timings = {label: of_run[run] for label, run in right.items()}
    timings = {label: each.of_one(work.repeats) for label, each in timings.items()}
    return _row(problem, runs, timings, rejected, len(valid))


def label_of(config: Config) -> str:
    """Short and exact: "conv_tma 2x8x8-64-64-4-3", the fields in the order of the configuration's."""
    values = ("x".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in astuple(config))
    return f"{configs.kernel_name(config)} {'-'.join(values)}".rstrip()


def time(run: Run, device: str) -> Timing:
    """How long `run`, which has run before, takes."""
    if torch.device(device).type == "cpu":
        return _timing(_interpreted_seconds(run)) if triton_backend.interpreted() else _time_in_turn([run])[run]
    from triton.testing import do_bench

    graph, _outputs = _captured(run)
    milliseconds = do_bench(graph.replay, warmup=_WARMUP_MS, rep=_TIMED_MS, quantiles=[0.5, 0.2, 0.8])
    return Timing(*(value * 1e3 for value in milliseconds))


def _interpreted_seconds(run: Run) -> list[float]:
    from torch.utils.benchmark import Timer  # which looks for CUDA's compiler, and warns where there is none

    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=1e-3).times


def _timing(seconds: Sequence[float]) -> Timing:
    return Timing(*(np.quantile(seconds, (0.5, 0.2, 0.8)) * 1e6).tolist())


def _time_in_turn(runs: Collection[Run]) -> dict[Run, Timing]:
    """Each of `runs` on the CPU, turn by turn: what disturbs one of them for a while then disturbs the others too."""
    passing, samples = torch.empty(_CPU_CACHES // 4), {run: [] for run in runs}
    for _ in range(_CPU_TURNS):
        for run, seconds in samples.items():
            for _ in range(_CPU_RUNS):
                passing.fill_(1.0)
                start = perf_counter()
                run()
                seconds.append(perf_counter() - start)
    return {run: _timing(seconds) for run, seconds in samples.items()}


def launch_time(device: str) -> Timing:
    """What `time` gives for a kernel that does nothing to speak of: part of every other time."""
    tensor = torch.zeros(1, device=device)

    def run() -> Outputs:
        return {"y": tensor.add_(1.0)}

    run()
    return time(run, device)


def _captured(run: Run) -> tuple[torch.cuda.CUDAGraph, Outputs]:
    """`run` as a graph, and the outputs that it writes, which must outlive it."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what libraries set up for a stream they do before the capture
        run()
        with torch.cuda.graph(graph, stream=stream):
            outputs = run()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, outputs


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _compile(runs: list[Run], device: str) -> None:
    """Compile what `runs` launch, on every core at once. What does not compile fails when it is launched."""
    if torch.device(device).type == "cpu" or not runs:
        return
    from triton import AsyncCompileMode

    module = triton_backend.launcher()
    launch, cores = module.launch, len(os.sched_getaffinity(0))
    module.launch = module.compile_only
    try:
        with (
            concurrent.futures.ThreadPoolExecutor(cores) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            for run in runs:
                with contextlib.suppress(Exception):
                    run()
    finally:
        module.launch = launch


def _usable(device: str) -> bool:
    """Whether the GPU still answers: after an illegal access nothing in this process runs any more."""
    if torch.device(device).type == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _row(problem: Problem, runs: dict, timings: dict[str, Timing], rejected: dict[str, str], valid: int) -> dict:
    right = {label: timing.us for label, timing in timings.items() if label in runs}
    library = {label: us for label, us in right.items() if runs[label][0] is None}
    best = min(right, key=right.get, default=STOCK)
    fastest_library = min(library, key=library.get, default=None)
    config, _, _ = runs.get(best, (None, "", None))
    timing = timings[best]
    return {
        "config": None if config is None else configs.to_dict(config),
        "us": round(timing.us, 2),
        "library_us": None if fastest_library is None else round(library[fastest_library], 2),
        "variant": "" if fastest_library is None else runs[fastest_library][1],
        "kernel": best,
        "p20_us": round(timing.p20_us, 2),
        "p80_us": round(timing.p80_us, 2),
        "tflop_per_s": round(problem.flops / timing.us / 1e6, 2),
        "gb_per_s": round(problem.bytes / timing.us / 1e3, 1),
        "candidates": valid,
        "times": {label: round(each.us, 2) for label, each in timings.items()},
        "rejected": rejected,
    }


def _line(error: Exception) -> str:
    """The error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".strip()

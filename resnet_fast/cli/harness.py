"""Fair timing: a correctness gate, interleaved rounds in one process, peak memory in its own pass.

Used by `bench`, `demo` and the files under benchmarks/. A `Contender` is one way to compute the same thing; `run`
gates, times and measures several side by side and returns one `Row` each. What fails its gate is never timed.
"""

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from .. import memory, numerics
from ..numerics import Comparison

CONTENDERS = {
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager channels_last",
    "eager_pooled": "eager channels_last, pooled",
    "compile": "torch.compile",
    "eager_graph": "eager channels_last, CUDA graph",
    "fast": "fast",
    "fast_graph": "fast, CUDA graph",
    "frozen": "frozen",
}
"""Names of the usual contenders and how they are shown. The ratio is to BASELINE's time in the same run. A graph is of
a whole training step, on a GPU; in inference the engine of a frozen model has its own."""

BASELINE = "eager_channels_last"

NOT_RUN = "not run"
"""In place of the worst tensor: nothing was verified, because the contender does not exist here."""


@dataclass
class Contender:
    """`step()` is what is timed; `check()` compares its results beforehand.

    items: images (or whatever is counted) per step. flops, bytes: per step, None where they are not known. saved:
    counts the bytes that a step keeps for its backward pass, None where there is none.
    """

    name: str
    step: Callable[[], object]
    check: Callable[[], Iterable[Comparison]]
    items: int = 1
    flops: float | None = None
    bytes: float | None = None
    device: str = "cpu"
    label: str = ""
    saved: Callable[[], int] | None = None
    samples: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One contender's result; flat, so that it is a line of CSV. None: failed its gate, or not known.

    match, worst_ratio, worst_tensor, reason: the gate. *_ms: one step. *_per_s: items a second at that quantile of time
    (p20 is the fast end). ratio: the baseline's median time an item / this one's. peak_memory_mb: highest memory during
    a step above that before it (CPU: resident, from VmHWM; CUDA: allocated). tflop_per_s, gb_per_s: at the median.
    saved_mb_per_item: kept for the backward pass (`resnet_fast.saved`), in 10^6 bytes an item.
    """

    contender: str
    label: str
    match: bool
    worst_ratio: float | None
    worst_tensor: str
    reason: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    median_per_s: float | None = None
    p20_per_s: float | None = None
    p80_per_s: float | None = None
    ratio: float | None = None
    peak_memory_mb: float | None = None
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    saved_mb_per_item: float | None = None
    samples: int = 0

    def to_dict(self) -> dict:
        return asdict(self)


def run(
    contenders: Sequence[Contender],
    *,
    rounds: int = 10,
    iterations: int = 1,
    warmup: int = 2,
    measure_memory: bool = True,
    baseline: str = BASELINE,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Row]:
    """Gate, time, measure; ratios are to `baseline`. `progress` is called `stages(contenders, rounds)` times."""
    verdicts, right = {}, []
    for contender in contenders:
        progress(f"verifying {contender.label}")
        verdicts[contender.name] = gate(contender)
        if all(comparison.match for comparison in verdicts[contender.name]):
            right.append(contender)
    time_interleaved(right, rounds=rounds, iterations=iterations, warmup=warmup, progress=progress)
    reference = next((contender for contender in right if contender.name == baseline), None)
    rows = []
    for contender in contenders:
        progress(f"memory of {contender.label}")
        peak = peak_memory(contender) if contender in right and measure_memory else None
        rows.append(row(contender, verdicts[contender.name], reference, peak))
    return rows


def stages(contenders: Sequence[Contender], rounds: int) -> int:
    """How often `run` calls `progress`, if all pass."""
    return 2 * len(contenders) + rounds


def gate(contender: Contender) -> list[Comparison]:
    """The contender's own check; an exception in it is a mismatch with that reason."""
    try:
        comparisons = list(contender.check())
    except Exception as error:  # one contender that cannot run must not end the comparison of the others
        reason = f"raised {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return [Comparison("run", False, math.inf, math.inf, math.nan, reason)]
    if not comparisons:
        return [Comparison("check", False, math.inf, math.inf, math.nan, "nothing was compared")]
    return comparisons


def time_interleaved(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    iterations: int = 1,
    warmup: int = 2,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Append `rounds * iterations` times (ms) to each contender's samples.

    Each round runs every contender, starting with another one each time, so that drift of the machine's clock and
    whatever the one before left in caches fall on all alike.
    """
    for contender in contenders:
        for _ in range(warmup):
            contender.step()
    for number in range(rounds):
        progress(f"timing, round {number + 1} of {rounds}")
        shift = number % max(1, len(contenders))
        for contender in [*contenders[shift:], *contenders[:shift]]:
            gc.collect()
            for _ in range(iterations):
                contender.samples.append(_milliseconds(contender))


def peak_memory(contender: Contender) -> int | None:
    """Bytes that one step needs at its peak, above what was in use before it; None where the system does not say."""
    memory.empty_cache()
    gc.collect()
    if torch.device(contender.device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _status_bytes("VmRSS")
    except (OSError, ValueError):
        return None
    contender.step()
    return max(0, _status_bytes("VmHWM") - before)


def _milliseconds(contender: Contender) -> float:
    cuda = torch.device(contender.device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    contender.step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def row(
    contender: Contender, verdict: Sequence[Comparison], baseline: Contender | None = None, peak: int | None = None
) -> Row:
    """The result of a contender: its verdict and, if it was timed, its samples beside the baseline's."""
    worst = numerics.worst(verdict)
    ratio = worst.ratio if math.isfinite(worst.ratio) else None
    head = (contender.name, contender.label or contender.name, worst.match, ratio, worst.name, worst.reason)
    if not contender.samples:
        return Row(*head)
    median = statistics.median(contender.samples)
    p20, p80 = np.quantile(contender.samples, (0.2, 0.8)).tolist()
    per_s = [contender.items * 1e3 / milliseconds for milliseconds in (median, p20, p80)]
    return Row(
        *head,
        median,
        p20,
        p80,
        *per_s,
        ratio=_milliseconds_an_item(baseline) / _milliseconds_an_item(contender) if baseline else None,
        peak_memory_mb=None if peak is None else peak / 2**20,
        tflop_per_s=None if contender.flops is None else contender.flops / median / 1e9,
        gb_per_s=None if contender.bytes is None else contender.bytes / median / 1e6,
        saved_mb_per_item=None if contender.saved is None else contender.saved() / contender.items / 1e6,
        samples=len(contender.samples),
    )


def not_run(name: str, label: str, reason: str) -> Row:
    """The row of a contender that cannot take part, so that it is seen to be missing."""
    return Row(name, label, False, None, NOT_RUN, reason)


def _milliseconds_an_item(contender: Contender) -> float:
    return statistics.median(contender.samples) / contender.items


def _trim_heap() -> None:
    """Give freed heap back to the system, so that the next step's allocations are seen. glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")

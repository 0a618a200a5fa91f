"""What the pytest-benchmark files share: contenders, the correctness gate's tensors, and what is written beside a time.

    pytest benchmarks --benchmark-only [--benchmark-json FILE] [-k resnet50]

Every benchmark first compares its result with float64, beside PyTorch's error in the same dtype. What does not match
fails and is not timed. Contenders: `eager` is stock PyTorch in channels_last, the others are backends of resnet_fast.
"""

import platform

import pytest
import torch

from resnet_fast import dispatch

CONTENDERS = ("eager", "native")


@pytest.fixture(params=CONTENDERS)
def contender(request) -> str:
    """ "eager", or a backend that can run here."""
    if request.param != "eager" and (reason := dispatch.load(request.param).available()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def timed(benchmark):
    """timed(step, contender, dtype, flop=, bytes=): time `step` and note the rates at its median."""

    def measure(step, contender: str, dtype: torch.dtype, *, flop: int | None = None, bytes: int | None = None) -> None:
        benchmark.extra_info |= {
            "contender": contender,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cpu": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }
        benchmark.pedantic(step, rounds=8, iterations=1, warmup_rounds=2)
        if benchmark.stats is None:  # --benchmark-disable
            return
        median = benchmark.stats.stats.median
        if flop:
            benchmark.extra_info["GFLOP/s"] = round(flop / median / 1e9, 1)
        if bytes:
            benchmark.extra_info["GB/s"] = round(bytes / median / 1e9, 2)

    return measure

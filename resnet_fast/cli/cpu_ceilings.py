"""What this CPU reaches at best, measured: its rate in large matrix products and its bandwidth in copies.

A limit is made of these, so they are the best of several runs, where a layer's time is the median.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MATMULS = ((2048, 2048, 2048), (4096, 512, 1024), (3136, 1024, 512))
"""(m, n, k); what the best library kernel does with the best of them is the peak."""

CACHE_COPY_BYTES = 16 << 20
"""About what a layer's activations are: caches hold part of it."""

MEMORY_COPY_BYTES = 1 << 30
"""More than caches hold."""


@dataclass(frozen=True)
class Ceilings:
    """flops: FLOP/s by dtype. cache_bandwidth, memory_bandwidth: bytes read plus bytes written per second."""

    flops: dict[str, float]
    cache_bandwidth: float
    memory_bandwidth: float


def measured(dtypes: Sequence[str]) -> Ceilings:
    """The ceilings of as many threads as PyTorch has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Ceilings(
        {dtype: matmul_flops(getattr(torch, dtype)) for dtype in dtypes},
        copy_bandwidth(CACHE_COPY_BYTES),
        copy_bandwidth(min(MEMORY_COPY_BYTES, memory // 8)),
    )


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the best large matrix product."""
    best = 0.0
    for m, n, k in MATMULS:
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        best = max(best, 2 * m * n * k / min(times(lambda a=a, b=b: torch.nn.functional.linear(a, b))))
    return best


def copy_bandwidth(size: int) -> float:
    """Bytes read plus bytes written per second, copying `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / min(times(lambda: target.copy_(source)))


def times(run: Callable[[], object], repeats: int = 30, budget: float = 0.7) -> list[float]:
    """Seconds that each of up to `repeats` calls takes; fewer where they are longer than `budget` together."""
    run()
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < budget:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds

"""What a GPU reaches at best, measured: its rate in large matrix products and its bandwidth in large copies.

A limit is made of these two, so they are the best of several runs, where a step's time is the median.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch

from ..gpus import Gpu

MATMULS = ((8192, 8192, 8192), (4096, 8192, 4096), (16384, 4096, 2048))
"""(m, n, k); what the best library kernel does with the best of them is the peak."""

COPY_BYTES = 1 << 30
_FLUSH_BYTES = 512 << 20  # several times any L2 cache


def measured(gpu: Gpu, device: str, dtype: str) -> Gpu:
    """`gpu` with the ceilings of `device`, a CUDA device, for `dtype`; other dtypes' FLOP/s stay as they are."""
    flops = gpu.flops | {gpu.arithmetic(dtype): matmul_flops(device, dtype)}
    return replace(gpu, flops=flops, bandwidth=copy_bandwidth(device))


def matmul_flops(device: str, dtype: str) -> float:
    """FLOP/s of the best large matrix product; float32 in TF32 where convolutions may use it."""
    with _tf32_as_convolutions():
        return max(_matmul_flops(device, getattr(torch, dtype), *sizes) for sizes in MATMULS)


def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written per second, copying 1 GiB."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)  # zeros may be moved compressed
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(times(lambda: target.copy_(source), device))


def times(run: Callable[[], object], device: str, repeats: int = 20, warmup: int = 3) -> list[float]:
    """Seconds that each of several calls takes on `device`, a CUDA device, by events.

    Before each call L2 is overwritten: every tensor then comes from memory, as limits assume. The GPU is busy with that
    while the host launches the call, so that the host's time is not in it.
    """
    with torch.cuda.device(device):
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        for _ in range(warmup):
            run()
        torch.cuda.synchronize()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _matmul_flops(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> float:
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    return 2 * m * n * k / min(times(lambda: torch.nn.functional.linear(a, b), device))


@contextlib.contextmanager
def _tf32_as_convolutions():
    """PyTorch allows TF32 to convolutions and matrix products separately."""
    matmul, allowed = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed

"""bfloat16 on CPUs that compute it slower than float32: a float32 twin does the work of a frozen module.

Without AMX, an Intel CPU multiplies bfloat16 at half of float32's rate (benchmarks/NOTES.md). The twin has the same
weights, rounded to bfloat16, so its answer is the more exact one; it takes twice their memory besides.
"""

import copy
import functools
import logging
import time

import torch
from torch import Tensor, nn

from . import _log

_SLOWER = 1.25
"""How many times float32's time counts as slower: AMX takes a tenth of it, Zen 4 half, Intel without AMX twice."""

_SIZE, _RUNS = 512, 5


@functools.cache
def bfloat16_is_slow() -> bool:
    """Whether matrix products in bfloat16 take longer than in float32 on this CPU; measured once, in some 20 ms."""
    seconds = {dtype: _seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.bfloat16] > _SLOWER * seconds[torch.float32]


def _seconds(dtype: torch.dtype) -> float:
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    best = float("inf")
    with torch.no_grad():
        for _ in range(_RUNS):
            start = time.perf_counter()
            torch.mm(a, a)
            best = min(best, time.perf_counter() - start)
    return best


def float32_twin(module: nn.Module, x: Tensor, dtype: torch.dtype) -> nn.Module | None:
    """The twin that should compute `module`, whose weights are `dtype`, on x; None where `module` itself should.

    It is kept in `module.__dict__["_float32_twin"]`, out of its state_dict; `module` drops it when its weights change.
    """
    if x.device.type != "cpu" or dtype != torch.bfloat16 or not bfloat16_is_slow():
        return None
    twin = module.__dict__.get("_float32_twin")
    if twin is None:
        twin = module.__dict__["_float32_twin"] = copy.deepcopy(module).float()
        _log.once(
            "freeze: bfloat16 is slower than float32 on this CPU, so its convolutions run in float32", logging.INFO
        )
    return twin

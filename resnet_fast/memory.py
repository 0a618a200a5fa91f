"""The activation pool: large CPU tensors from memory that is already mapped.

A fresh 25 MB tensor costs its page faults, about 15 ms, each time it is allocated. Inside `pooled()` tensors of 1 MiB
and more come from a process-wide cache of 2 MiB-aligned blocks with huge pages advised, and return to it when freed, on
whichever thread and wherever. The native ops do this for themselves; `pooled()` extends it to the rest of a model.

Linux with the C++ extension only; elsewhere, and with RESNET_FAST_POOL=0, nothing changes. The cache keeps at most
RESNET_FAST_POOL_LIMIT bytes, a quarter of the machine's memory unless set, read when the pool is first used.
"""

from contextlib import AbstractContextManager, nullcontext

from . import extension

_context: AbstractContextManager | None = None


def pooled() -> AbstractContextManager:
    """Context manager: CPU tensors of 1 MiB and more that this thread allocates inside come from the pool.

    Nests, and costs well under a microsecond. Tensors may outlive it. A no-op without the C++ extension.
    """
    global _context
    if _context is None:
        module = extension.load()
        # Neither object holds state, so one serves every caller.
        _context = nullcontext() if module is None else module.Pooled()
    return _context


def empty_cache() -> None:
    """Return the pool's free blocks to the operating system. Blocks that tensors hold stay."""
    module = extension.load()
    if module is not None:
        module.pool_empty_cache()


def memory_stats() -> dict[str, int | bool]:
    """Counters of the pool, all zero without the C++ extension.

    enabled: whether the pool serves anything here. limit_bytes: most bytes kept cached. cached_bytes: in free blocks.
    allocated_bytes: in blocks that tensors hold. peak_bytes: largest sum of those two. hits, misses: requests served
    from the cache and by the system.
    """
    module = extension.load()
    if module is not None:
        return module.pool_stats()
    zeros = ("limit_bytes", "cached_bytes", "allocated_bytes", "peak_bytes", "hits", "misses")
    return {"enabled": False} | dict.fromkeys(zeros, 0)

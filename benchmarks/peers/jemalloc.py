"""jemalloc, which keeps the pages that activations lived in: another allocator for the same contenders."""

import ctypes.util
import os
from pathlib import Path

CONFIGURATION = (
    "oversize_threshold:1,background_thread:true,metadata_thp:auto,dirty_decay_ms:9000000000,muzzy_decay_ms:9000000000"
)
"""As Intel's tuning guide for PyTorch on CPUs has it: freed pages are kept for good."""


def find(asked: str) -> str:
    """The library to preload: `asked` is a path, or "auto" for the system's. Raises ValueError where there is none."""
    if asked != "auto":
        if not Path(asked).is_file():
            raise ValueError(f"{asked} is no file")
        return str(Path(asked).resolve())
    found = ctypes.util.find_library("jemalloc")
    if found is None:
        raise ValueError("libjemalloc is not on this machine (Debian and Ubuntu: apt install libjemalloc2)")
    return found


def variables(library: str) -> dict[str, str]:
    """The environment of a process that runs under it."""
    preloaded = " ".join(filter(None, (library, os.environ.get("LD_PRELOAD"))))
    return {"LD_PRELOAD": preloaded, "MALLOC_CONF": CONFIGURATION}


def loaded() -> bool:
    """Whether this process runs under it: the dynamic loader only warns where a preload fails."""
    return "jemalloc" in Path("/proc/self/maps").read_text()

"""The kernels with one mistake in their source: a copy, imported under another name and put before the launcher."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from interpreted.forked import PASSED, outcome

from resnet_fast.backends import triton_launch, triton_pool

SOURCES = Path(triton_launch.__file__).parents[1] / "kernels"
KERNELS = {  # what a launcher calls a kernel -> its module, and its name there
    "conv_bn_act_pointer": ("conv_pointer", "conv_bn_act_pointer"),
    "conv_bn_act_tma": ("conv_tma", "conv_bn_act_tma"),
    "pack_kernel": ("stem", "pack"),
    "max_pool_kernel": ("max_pool", "max_pool"),
    "bottleneck_tail": ("tail", "bottleneck_tail"),
    "bn_act_kernel": ("bn_act", "bn_act"),
    "pool_kernel": ("pool_train", "pool"),
    "backward_reduce_kernel": ("pool_train", "pool_backward_reduce"),
    "backward_apply_kernel": ("pool_train", "pool_backward_apply"),
    "conv_prologue_kernel": ("conv_prologue", "conv_prologue"),
    "gram_dgrad_kernel": ("gram_dgrad", "gram_dgrad"),
}


@dataclass(frozen=True)
class Mutant:
    """In resnet_fast/kernels/`file`, `old` becomes `new`."""

    file: str
    old: str
    new: str
    notices: Callable[[], None]


def check_noticed(mutant: Mutant, directory: Path) -> None:
    """Assert that `mutant.notices` fails, dies or overflows with the mutant, which is written to `directory`."""
    _write(directory, mutant.file, mutant.old, mutant.new)
    became = _outcome_with(directory, mutant.notices)
    assert became.startswith(("AssertionError", "SIGSEGV", "SIGBUS")) or "overflow detected" in became, became


def check_copy_passes(directory: Path, *notices: Callable[[], None]) -> None:
    """Assert that each passes with a faithful copy, so that what fails with a mutant fails because of it."""
    _write(directory, "", "", "")
    for notice in notices:
        assert _outcome_with(directory, notice) == PASSED


def _outcome_with(directory: Path, notices: Callable[[], None]) -> str:
    def run() -> None:
        _launch(directory)
        notices()

    return outcome(run)


def _write(directory: Path, file: str, old: str, new: str) -> None:
    """Copy every kernel into `directory`, with `old` replaced by `new` in `file`, where it must stand exactly once."""
    directory.mkdir()
    for path in SOURCES.glob("*.py"):
        source = path.read_text()
        if "@triton.jit" not in source:
            continue
        if path.name == file:
            assert source.count(old) == 1, f"{file} has {old!r} {source.count(old)} times; this mutant needs a new text"
            source = source.replace(old, new)
        (directory / path.name).write_text(source)
    (directory / "__init__.py").touch()


def _launch(directory: Path) -> None:
    """From here on the launchers start the kernels in `directory`. There is no way back: call it in a child process."""
    sys.path.insert(0, str(directory.parent))
    importlib.invalidate_caches()
    for name, (module, kernel) in KERNELS.items():
        owner = triton_launch if hasattr(triton_launch, name) else triton_pool
        setattr(owner, name, getattr(importlib.import_module(f"{directory.name}.{module}"), kernel))

"""A process that holds all contenders of one case under one allocator, and times them when it is told to.

One process a case and allocator: nothing that torch.compile, TorchScript or an allocator keeps reaches the next case.
Every contender of an allocator is timed in the same process, in turns; the processes of two allocators take turns too,
round by round, so that a busy machine hurts all alike.

Three pools of threads live in such a process, PyTorch's OpenMP one, OpenVINO's TBB and ONNX Runtime's own, each of as
many threads as PyTorch has. One that waits for work by spinning would take a core from whoever runs next. libgomp's
threads spin for about a millisecond, then sleep; TBB's sleep at once, ONNX Runtime is told to stop with its call, and
the harness collects garbage before every turn, some 0.1 s: by then all others sleep. Within a turn, several calls where
they are short, everybody's threads wait as they always do.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest import mock

import torch

from resnet_fast.cli import harness
from resnet_fast.cli.harness import Contender, Row
from resnet_fast.numerics import Comparison

from . import jemalloc
from .case import Case, in_order


class _Bench:
    """What lives in the worker's process."""

    def __init__(self, case: Case, threads: int, under_jemalloc: bool) -> None:
        if under_jemalloc and not jemalloc.loaded():
            raise RuntimeError("jemalloc was preloaded but is not there; the loader's warning is above")
        torch.set_num_threads(threads)
        self.case = case
        self.contenders, self.absent = case.contenders()
        self.verdicts: dict[str, list[Comparison]] = {}

    def verify(self) -> None:
        self.verdicts = {contender.name: harness.gate(contender) for contender in self.contenders}

    @property
    def right(self) -> list[Contender]:
        return [each for each in self.contenders if all(found.match for found in self.verdicts[each.name])]

    def time(self, rounds: int, first: int, iterations: int, warmup: int) -> None:
        """`rounds` more samples of `iterations`, the first contender to run being number `first`."""
        right = self.right
        shift = first % max(1, len(right))
        order = [*right[shift:], *right[:shift]]
        harness.time_interleaved(order, rounds=rounds, iterations=iterations, warmup=warmup)

    def rows(self) -> list[Row]:
        baseline = next((each for each in self.right if each.name == harness.BASELINE), None)
        rows = [harness.row(each, self.verdicts[each.name], baseline) for each in self.contenders]
        return in_order([*rows, *self.absent], self.case.chosen)


_bench: _Bench | None = None


def _start(*args) -> None:
    global _bench
    _bench = _Bench(*args)


def _call(method: str, *args):
    return getattr(_bench, method)(*args)


class Worker:
    """A `_Bench` in a process of its own; its methods raise what they raise there."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def verify(self) -> None:
        """Make every contender and hold its results against float64."""
        self._pool.submit(_call, "verify").result()

    def time(self, rounds: int, first: int, iterations: int, warmup: int) -> None:
        """Time what was right."""
        self._pool.submit(_call, "time", rounds, first, iterations, warmup).result()

    def rows(self) -> list[Row]:
        """One a contender, whatever became of it."""
        return self._pool.submit(_call, "rows").result()


@contextmanager
def started(case: Case, threads: int, library: str | None) -> Iterator[Worker]:
    """A worker for `case`; under jemalloc if `library` names it."""
    variables = {} if library is None else jemalloc.variables(library)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, variables):
            starting = pool.submit(_start, case, threads, library is not None)  # starts the process
        starting.result()
        yield Worker(pool)

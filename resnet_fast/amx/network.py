"""A `Section` of a frozen network with its weights packed: programs by image size and number of images."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cpus
from ..backends.programs import why_not_section
from ..planner import Section, why_not_plannable
from .program import GROUP, Builder, Built, problem_of
from .weights import Weights, why_not_conv, why_not_stem

_FULL = 14  # of a group's images: no fewer are worth one
_SHAPES_REMEMBERED = 256
KINDS_KEPT = 4
"""Kinds of programs that a network keeps; the one unused longest goes first."""


def why_not_packable(section: Section) -> str | None:
    """Why `section` cannot be a program; None where it can."""
    reason = why_not_plannable(section)
    if reason is None and section.max_pool and section.stem is None:
        reason = "there is a max-pool without a stem"
    if reason is None and section.stem is not None:
        reason = why_not_stem(*section.stem) or why_not_conv(*section.stem)
    if reason is None and any(len(block.convs) < 2 for _, block in section.blocks):
        reason = "there is a block of one convolution, which would write over what it reads"
    if reason is not None:
        return reason
    return next(filter(None, (why_not_conv(name, conv) for name, conv in section.convs())), None)


@dataclass(frozen=True)
class StepTime:
    """A step of one run: seconds, FLOPs, and bytes that it moves, each tensor once.

    winograd: the FLOPs are those of Winograd's products.
    """

    name: str
    seconds: float
    flops: int
    bytes: int
    winograd: bool


class AmxNetwork:
    """`section` for any number of images of any size.

    Callers run at the same time as long as there are cores for the threads of all, each with a program, and with it
    memory for activations, of its own; else the next one waits. Weights are shared.

    head: average pool and classifier are run too, and give logits; else the last block's output is what comes out.

    Raises:
        ValueError: the section cannot be a program (`why_not_packable`).
    """

    def __init__(self, section: Section, head: bool) -> None:
        reason = why_not_packable(section)
        if reason is not None:
            raise ValueError(reason)
        self.section, self.head = section, head
        self._weights = Weights(section, head)
        self._why_slower = functools.lru_cache(_SHAPES_REMEMBERED)(
            lambda shape: why_not_section(problem_of(section, shape))
        )
        self._idle: OrderedDict[tuple, list[Built]] = OrderedDict()  # programs that nobody runs, by their kind
        self._busy = 0  # threads
        self._turn = threading.Condition()

    def why_not(self, x: Tensor) -> str | None:
        """Why x is not to be this network's input; None where it is. PyTorch's own layers have the error for users."""
        if x.dim() != 4:
            return f"x has {x.dim()} dimensions, not 4"
        try:
            reason = self._why_slower(x.shape)
            if reason is None:
                self._idle_of(_key(x.shape[1:], _parts(len(x))[0]))
        except ValueError as error:
            return str(error)
        return reason

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """x (N, C, H, W), N > 0, float32 or bfloat16 -> (N, K, P, Q) channels_last, or logits (N, classes).

        Raises:
            ValueError: a convolution does not fit into x.
        """
        first, y = 0, None
        for images in _parts(len(x)):
            with self._borrowed(x.shape[1:], images) as built:
                y = self._empty(built, len(x)) if y is None else y
                infinite = built.program.run(self._readable(x[first : first + images]), y[first : first + images])
            for number in infinite:  # which Winograd's transforms make NaN of
                self._run_directly(x[first + number :][:1], y[first + number :][:1])
            first += images
        return y.flatten(1) if self.head else y

    def _run_directly(self, x: Tensor, y: Tensor) -> None:
        """Without Winograd."""
        with self._borrowed(x.shape[1:], len(x), winograd=False) as built:
            built.program.run(self._readable(x), y)

    @torch.no_grad()
    def timings(self, x: Tensor) -> list[StepTime]:
        """One run of x by its steps, in their order; the images must be what one program takes."""
        with self._borrowed(x.shape[1:], len(x)) as built:
            times = built.program.timed_run(self._readable(x), self._empty(built, len(x)))
        itemsize = self.section.dtype.itemsize
        return [
            StepTime(
                name, seconds, cost.flops * len(x), cost.values * len(x) * itemsize + cost.weight_bytes, cost.winograd
            )
            for (name, seconds), cost in zip(times, built.costs, strict=True)
        ]

    def _empty(self, built: Built, batch: int) -> Tensor:
        return torch.empty((batch, *built.y_shape), dtype=self.section.dtype, memory_format=torch.channels_last)

    def _readable(self, x: Tensor) -> Tensor:
        """x as a program reads it: a stem takes any strides, blocks take channels_last."""
        return x if self.section.stem is not None else x.contiguous(memory_format=torch.channels_last)

    @contextmanager
    def _borrowed(self, image: torch.Size, images: int, winograd: bool = True) -> Iterator[Built]:
        """A program that nobody else runs, as soon as there are cores for it: a new one where all are in use."""
        key = _key(image, images, winograd)
        threads, cores = key[2], cpus.here().cores
        with self._turn:
            self._turn.wait_for(lambda: self._busy == 0 or self._busy + threads <= cores)
            idle = self._idle_of(key)
            built = idle.pop() if idle else self._build(key)
            self._busy += threads
        try:
            yield built
        finally:
            with self._turn:
                idle.append(built)
                self._busy -= threads
                self._turn.notify_all()

    def _idle_of(self, key: tuple) -> list[Built]:
        """The programs of `key` that nobody runs; of a new key there is one."""
        with self._turn:
            if key not in self._idle:
                self._idle[key] = [self._build(key)]
                if len(self._idle) > KINDS_KEPT:
                    self._idle.popitem(last=False)
            self._idle.move_to_end(key)
            return self._idle[key]

    def _build(self, key: tuple) -> Built:
        return Builder(self._weights, *key).build()


def _key(image: torch.Size, images: int, winograd: bool = True) -> tuple[tuple[int, ...], int, int, bool]:
    """Of programs that are alike: the image's shape, how many at once, threads, and whether 3x3s may be Winograd's."""
    return tuple(image), min(images, GROUP) if images < _FULL else GROUP, torch.get_num_threads(), winograd


def _parts(batch: int) -> list[int]:
    """Images by the programs that take them: whole groups, and the rest."""
    rest = batch % GROUP
    whole = batch if rest >= _FULL else batch - rest
    return [part for part in (whole, batch - whole) if part]

"""What a frozen network is on a GPU, step by step: layers that share a kernel, tensors between them, where those lie.

Plain data, made by `planner.build` from shapes alone. The engine runs the steps of a plan in order; `profile` prints
what they cost.
"""

import math
from dataclasses import dataclass, replace

from .frozen import FrozenConv2d
from .gpus import Gpu
from .kernels import tables
from .kernels.configs import predicted_seconds
from .kernels.selection import Choice
from .problems import ITEMSIZE, AveragePoolProblem, ConvProblem, PoolProblem, Problem

Shape = tuple[int, int, int, int]
_ALIGNMENT = 256
_LIBRARY_EFFICIENCY = 0.8
_LAUNCH_SECONDS = 2e-6


@dataclass(frozen=True)
class Step:
    """One kernel, or the library's few: what it computes, with which configuration, from and to which tensors.

    modules: in the order in which the kernel takes their weights: of a convolution, then its shortcut's; of a tail
    conv2, conv3, the shortcut's, the next block's conv1, as far as they are there; none for a pool.
    reads: x, then the residual or the shortcut's input. writes: y, then the next block's first activation.
    scratch: what lies between several kernels of the step, of which nothing is left; a stem's packed image and the
    convolution's output.
    """

    name: str
    problem: Problem | PoolProblem | AveragePoolProblem
    choice: Choice
    modules: tuple[FrozenConv2d, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scratch: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        return self.problem.flops

    @property
    def bytes(self) -> int:
        """To and from memory, each tensor once."""
        return self.problem.bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    @property
    def tuned(self) -> bool:
        """Whether the choice was measured, not predicted."""
        return self.choice.source.startswith("tuned")

    def bound(self, gpu: Gpu) -> str:
        """Which of the two ceilings sets the limit: "compute" or "memory"."""
        return "compute" if self.flops * gpu.bandwidth > self.bytes * gpu.peak(self.problem.dtype) else "memory"

    def limit_seconds(self, gpu: Gpu) -> float:
        """What no kernel can be faster than: max(FLOPs / peak, bytes / bandwidth) by `gpu`'s ceilings."""
        return max(self.flops / gpu.peak(self.problem.dtype), self.bytes / gpu.bandwidth)

    def predicted_seconds(self, gpu: Gpu) -> float:
        """What tuning measured, in proportion from another batch size if need be; else the cost model's."""
        if self.tuned and (measured := tables.lookup(self.problem, gpu)) is not None:
            row, key = measured
            batches = [int(tables.batch_of(each)[1:]) for each in (self.problem.key, key)]
            return max(row.us * 1e-6 * batches[0] / batches[1], _LAUNCH_SECONDS)
        if self.choice.config is not None:
            return predicted_seconds(self.choice.config, self.problem, gpu)
        return self._library_seconds(gpu)

    def _library_seconds(self, gpu: Gpu) -> float:
        """A kernel a convolution, then one over their outputs, each somewhat slower than its limit."""
        if not isinstance(self.problem, ConvProblem):
            return self.limit_seconds(gpu) / _LIBRARY_EFFICIENCY + _LAUNCH_SECONDS
        whole, convs = self.problem, [conv for conv in (self.problem.conv, self.problem.shortcut) if conv]
        alone = [replace(self, problem=ConvProblem(conv, whole.dtype)) for conv in convs]
        tensors = 1 + len(convs) + whole.residual
        y_bytes = self.problem.conv.y_elements * ITEMSIZE[whole.dtype]
        seconds = sum(step.limit_seconds(gpu) for step in alone) + tensors * y_bytes / gpu.bandwidth
        return seconds / _LIBRARY_EFFICIENCY + (1 + len(convs)) * _LAUNCH_SECONDS


@dataclass(frozen=True)
class Plan:
    """Steps in the order they run, and the tensors between them.

    tensors: name -> shape (N, C, H, W), dense in channels_last, of `dtype`; input and output are two of them.
    head: average pool and classifier behind the last step; counted in all totals below, not run by the engine.
    """

    gpu: Gpu
    dtype: str
    fusion: str
    steps: tuple[Step, ...]
    head: tuple[Step, ...]
    tensors: dict[str, Shape]
    input: str
    output: str

    @property
    def batch(self) -> int:
        return self.tensors[self.input][0]

    @property
    def flops(self) -> int:
        return sum(step.flops for step in (*self.steps, *self.head))

    @property
    def bytes(self) -> int:
        """To and from memory, every step's."""
        return sum(step.bytes for step in (*self.steps, *self.head))

    @property
    def bytes_per_image(self) -> float:
        return self.bytes / self.batch

    def limit_seconds(self, gpu: Gpu | None = None) -> float:
        """The sum of the steps' limits, by the ceilings of `gpu` (measured ones, say) or of the plan's own."""
        return sum(step.limit_seconds(gpu or self.gpu) for step in (*self.steps, *self.head))

    def predicted_seconds(self) -> float:
        """The sum of what the steps are expected to take."""
        return sum(step.predicted_seconds(self.gpu) for step in (*self.steps, *self.head))

    def offsets(self) -> tuple[dict[str, int], int]:
        """Where each tensor starts in one arena, in bytes, and the arena's size; input and output are not in it.

        A tensor lives from the step that writes it to the last that reads it, both included, so no step writes where
        it reads. Largest first, each goes into the tightest gap between those already placed that live when it does.
        """
        born: dict[str, int] = {}
        dies: dict[str, int] = {}
        for place, step in enumerate(self.steps):
            born |= dict.fromkeys((*step.writes, *step.scratch), place)
            dies |= dict.fromkeys((*step.reads, *step.writes, *step.scratch), place)
        sizes = {
            name: -(-math.prod(shape) * ITEMSIZE[self.dtype] // _ALIGNMENT) * _ALIGNMENT
            for name, shape in self.tensors.items()
            if name not in (self.input, self.output)
        }
        offsets: dict[str, int] = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], born[name])):
            taken = [
                (offsets[other], offsets[other] + sizes[other])
                for other in offsets
                if born[other] <= dies[name] and born[name] <= dies[other]
            ]
            offsets[name] = _tightest_gap(sorted(taken), sizes[name])
        return offsets, max((offsets[name] + sizes[name] for name in offsets), default=0)


def _tightest_gap(taken: list[tuple[int, int]], size: int) -> int:
    """The start of the smallest gap of `size` or more between the sorted (start, end) in `taken`, else their end."""
    end, best, best_gap = 0, None, math.inf
    for start, stop in taken:
        if size <= start - end < best_gap:
            best, best_gap = end, start - end
        end = max(end, stop)
    return end if best is None else best

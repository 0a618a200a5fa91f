"""Workloads of the convolutions of a training step: batch statistics, prologues, joins, gradients in the Gram form.

Each is one primitive of `backends.triton_conv`, called as a block's training calls it with `selection` told what to
take, so that what is timed, packing of weights and merging of statistics included, is what runs. The reference and
PyTorch's side are `backends.primitives.reference`'s, and the library's path is what the primitive does where it has no
kernel. Outputs are allocated inside, so that there is nothing to poison beforehand.
"""

from collections.abc import Callable

from torch import Tensor

from ...backends import triton_conv
from ...backends.primitives import Geometry, Norm, reference
from ...kernels import selection
from ...kernels.configs import Config
from ...problems import ConvProblem, GramDgradProblem, Problem, PrologueProblem
from ...shapes import Conv
from ...training import EPILOGUE, PROLOGUE
from .workload import Outputs, Run, Source, Workload

LIBRARY = "library"
"""The one variant of the library's path."""


def of(problem: Problem, device: str) -> Workload:
    """The workload of `problem`, one that `is_training`."""
    source = Source(problem, device)
    name, arguments = _BUILDERS[type(problem)](problem, source)
    ours, theirs = getattr(triton_conv, name), getattr(reference, name)

    def forced(config: Config | None) -> Run:
        choice = selection.Choice(config, "forced", "measured by itself")

        def run() -> Outputs:
            with selection.forced(problem, choice):
                return _outputs(ours(*arguments))

        return run

    def exact() -> Outputs:
        return _outputs(theirs(*map(_double, arguments)))

    return Workload(exact, lambda: _outputs(theirs(*arguments)), forced, {LIBRARY: forced(None)}, {})


def _conv(problem: ConvProblem, source: Source) -> tuple[str, tuple]:
    conv = problem.conv
    return "conv", (source.image(conv.x_shape), None, _weight(conv, source), Geometry.of(conv), EPILOGUE, True)


def _prologue(problem: PrologueProblem, source: Source) -> tuple[str, tuple]:
    conv = problem.conv
    layer = (source.image(conv.x_shape), _norm(conv.in_channels, source), _weight(conv, source), Geometry.of(conv))
    if not problem.joined:
        return "conv", (*layer, PROLOGUE, problem.statistics)
    residual = source.image(conv.y_shape) if problem.residual else None
    residual_norm = _norm(conv.out_channels, source) if problem.residual_norm else None
    return "conv_join", (*layer, _norm(conv.out_channels, source), residual, residual_norm)


def _gram_dgrad(problem: GramDgradProblem, source: Source) -> tuple[str, tuple]:
    conv = problem.conv
    x, dz = source.image(conv.x_shape), source.image(conv.y_shape)
    x_norm = _norm(conv.in_channels, source) if problem.prologue else None
    channels, out_channels = conv.in_channels, conv.out_channels
    matrices = (source.vectors(rows, channels) * rows**-0.5 for rows in (out_channels, channels))
    add = source.image(conv.x_shape) if problem.add else None
    return "gram_dgrad", (dz, x, x_norm, Geometry.of(conv), *matrices, *source.vectors(2, channels), add)


_BUILDERS: dict[type, Callable] = {ConvProblem: _conv, PrologueProblem: _prologue, GramDgradProblem: _gram_dgrad}


def _weight(conv: Conv, source: Source) -> Tensor:
    return source.conv(conv)["weight"]


def _norm(channels: int, source: Source) -> Norm:
    mean, weight, bias, spread = source.vectors(4, channels)
    return Norm(mean, 0.5 + spread.abs(), weight, bias, 1e-5)


def _outputs(found: Tensor | tuple[Tensor | None, ...]) -> Outputs:
    """By name; the variance as it is used, in a running one after a step of momentum 0.1."""
    if isinstance(found, Tensor):
        return {"y": found}
    y, mean, var = found
    return {"y": y} | ({} if mean is None else {"mean": mean, "running_var": 0.9 + 0.1 * var})


def _double(value):
    if isinstance(value, Tensor):
        return value.double()
    return Norm(*map(_double, value)) if isinstance(value, Norm) else value

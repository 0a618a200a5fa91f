"""Winograd on CPUs: what it can compute, and what it is taken for unmeasured.

In float32 F(4x4, 3x3) for convolutions (csrc/cpu/winograd.h), F(4x2) for the gradients of their weights
(winograd_gradient.h). In bfloat16 F(2x2, 3x3) for both, by dot products (csrc/cpu/amx/winograd_dots.cpp): what is
multiplied is rounded to bfloat16 after its transform, which larger tiles do not allow (benchmarks/NOTES.md).
"""

from ..cpus import Cpu
from ..problems import ConvProblem, Problem, WeightGradientProblem
from ..shapes import Conv

NAME = "Winograd F(4x4, 3x3)"
NAME_OF_DOTS = "Winograd F(2x2, 3x3)"

_MIN_CHANNELS = 64
_MIN_SIDE = 7
MIN_ELEMENTS = 20480
"""Of x. Below, PyTorch computes float32 without oneDNN, and below the other two bounds sums are so short, or so much of
a tile is padding, that its error is less than half of Winograd's (benchmarks/NOTES.md): the results would be too far
from PyTorch's. Little time is spent on such layers."""

_MIN_ROWS = 112
"""Of pixels in a batch, for a weight's gradient: PyTorch sums them up one after the other, and in fewer its error is
less than half of Winograd's (benchmarks/NOTES.md)."""

_TILES_A_CORE, _LIVE_TILES_A_CORE = 12, 24
"""With fewer, four times the weights may cost more to fetch, or if they are transformed in every call to make, than the
products save."""

_DOTS_CHANNELS = 32
"""What lies together where dot products multiply."""

_DOTS_SAVED = 1.4
"""Of dot products, how many times as many a convolution must have that is not measured, without those that only read
padding: transforms take a tenth to a fifth of the time (benchmarks/NOTES.md)."""


def why_not(problem: Problem) -> str | None:
    """Why Winograd cannot compute `problem`; None where it can."""
    gradient = isinstance(problem, WeightGradientProblem)
    if not (gradient or (isinstance(problem, ConvProblem) and not problem.shortcut)):
        return "only one convolution, or its weight's gradient"
    if problem.dtype not in ("float32", "bfloat16"):
        return "only float32 and bfloat16"
    conv = problem.conv
    if (conv.kernel, conv.stride, conv.padding, conv.dilation) != ((3, 3), (1, 1), (1, 1), (1, 1)) or conv.groups > 1:
        return "only a dense 3x3 with stride, padding and dilation 1"
    if problem.dtype == "bfloat16":
        whole = conv.in_channels % _DOTS_CHANNELS == 0 and conv.out_channels % _DOTS_CHANNELS == 0
        return None if whole else f"only multiples of {_DOTS_CHANNELS} channels"
    if min(conv.in_channels, conv.out_channels) < _MIN_CHANNELS:
        return f"only {_MIN_CHANNELS} channels and more, not {conv.in_channels} -> {conv.out_channels}"
    if min(conv.height, conv.width) < _MIN_SIDE or conv.x_elements <= MIN_ELEMENTS:
        return f"n{conv.batch} {conv.height}x{conv.width} is too small to be as exact as PyTorch"
    if gradient and conv.batch * conv.height < _MIN_ROWS:
        return f"a weight's gradient of fewer than {_MIN_ROWS} rows of pixels is not as exact as PyTorch's"
    return None


def why_not_unmeasured(problem: ConvProblem | WeightGradientProblem, cpu: Cpu) -> str | None:
    """Why oneDNN is taken where nothing was measured; None where Winograd is. Errs on oneDNN's side."""
    packed_once = isinstance(problem, ConvProblem) and problem.folded
    conv = problem.conv
    if problem.dtype == "bfloat16":
        if (saved := conv.real_flops / flops(conv, problem.dtype)) < _DOTS_SAVED:
            return f"{saved:.2f} times fewer products; unmeasured, winograd is taken from {_DOTS_SAVED} on"
        if packed_once:
            return None
    found, a_core = tiles(conv), _TILES_A_CORE if packed_once else _LIVE_TILES_A_CORE
    if found < (wanted := a_core * cpu.cores):
        return f"{found} tiles of 4x4; unmeasured, winograd is taken from {wanted} on, {a_core} a core"
    return None


def flops(conv: Conv, dtype: str = "float32") -> int:
    """Those of Winograd's products: a channel, 36 multiply-adds for 16 outputs or in bfloat16 16 for 4, where the
    convolution has 144 or 36."""
    points, side = (16, 2) if dtype == "bfloat16" else (36, 4)
    return 2 * points * tiles(conv, side) * conv.in_channels * conv.out_channels


def tiles(conv: Conv, side: int = 4) -> int:
    """Tiles of so many rows and columns that cover the outputs."""
    return conv.batch * -(-conv.out_height // side) * -(-conv.out_width // side)

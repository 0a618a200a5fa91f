"""Winograd's F(4x4, 3x3) on CPUs (csrc/cpu/winograd.h): what it can compute, and what it is taken for unmeasured."""

from ..cpus import Cpu
from ..problems import Conv, ConvProblem, Problem

NAME = "Winograd F(4x4, 3x3)"

_MIN_CHANNELS = 64
_MIN_SIDE = 7
_MIN_ELEMENTS = 20480
"""Of x. Below, PyTorch computes float32 without oneDNN, and below the other two bounds sums are so short, or so much of
a tile is padding, that its error is less than half of Winograd's (benchmarks/NOTES.md): the results would be too far
from PyTorch's. Little time is spent on such layers."""

_TILES_A_CORE = 12
"""With fewer, fetching four times the weights may cost more than the products save."""


def why_not(problem: Problem) -> str | None:
    """Why Winograd cannot compute `problem`; None where it can."""
    if not isinstance(problem, ConvProblem) or problem.shortcut or not problem.folded or problem.dtype != "float32":
        return "only one folded float32 convolution"
    conv = problem.conv
    if (conv.kernel, conv.stride, conv.padding, conv.dilation) != ((3, 3), (1, 1), (1, 1), (1, 1)) or conv.groups > 1:
        return "only a dense 3x3 with stride, padding and dilation 1"
    if min(conv.in_channels, conv.out_channels) < _MIN_CHANNELS:
        return f"only {_MIN_CHANNELS} channels and more, not {conv.in_channels} -> {conv.out_channels}"
    if min(conv.height, conv.width) < _MIN_SIDE or conv.x_elements <= _MIN_ELEMENTS:
        return f"n{conv.batch} {conv.height}x{conv.width} is too small to be as exact as PyTorch"
    return None


def why_not_unmeasured(problem: ConvProblem, cpu: Cpu) -> str | None:
    """Why oneDNN is taken where nothing was measured; None where Winograd is. Errs on oneDNN's side."""
    found, wanted = tiles(problem.conv), _TILES_A_CORE * cpu.cores
    if found < wanted:
        return f"{found} tiles of 4x4; unmeasured, winograd is taken from {wanted} on, {_TILES_A_CORE} a core"
    return None


def flops(conv: Conv) -> int:
    """Those of Winograd's products: 36 multiply-adds for 16 outputs, a channel, where the convolution has 144."""
    return 2 * 36 * tiles(conv) * conv.in_channels * conv.out_channels


def tiles(conv: Conv) -> int:
    """4x4 tiles that cover the outputs."""
    return conv.batch * -(-conv.out_height // 4) * -(-conv.out_width // 4)

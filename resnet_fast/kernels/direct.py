"""The direct convolution on CPUs, float32: what it can compute, and what it is taken for unmeasured.

csrc/cpu/direct_conv.h. A weight that may change oneDNN packs in every call, which takes long beside its products where
few pixels are multiplied with it. By one that is packed once it multiplies as fast in AVX-512, and slower in AVX2; so
it does an image.
"""

from ..cpus import Cpu
from ..problems import ConvProblem
from ..shapes import Conv
from .winograd import MIN_ELEMENTS

NAME = "direct"

_MIN_CHANNELS = 32
"""With fewer, sums are too short for what surrounds them, unless they are few enough to copy rows of an image."""

_FEW_CHANNELS = 4
"""At most, of an image, whose kernel takes a row of taps at once (csrc/cpu/direct_image.h); without dilation."""

_PANEL = 64
"""Outputs whose weights lie together (csrc/cpu/direct_sizes.h)."""

_MAX_TAPS = 64
"""Of a kernel, as there."""

_MOST_PIXELS, _MOST_CORES = 1024, 8
"""Unmeasured. With more pixels of output oneDNN's packing is a small part of its time (benchmarks/NOTES.md), and more
cores would each pack the same parts."""


def why_not(problem: ConvProblem) -> str | None:
    """Why the direct convolution does not compute `problem`; None where it does."""
    if problem.shortcut is not None:
        return "only one convolution"
    if problem.dtype != "float32":
        return "only float32"
    conv = problem.conv
    if conv.groups > 1 or conv.kernel[0] * conv.kernel[1] > _MAX_TAPS:
        return f"only dense convolutions of at most {_MAX_TAPS} taps"
    if not (_is_of_image(conv) or conv.in_channels >= _MIN_CHANNELS) or conv.out_channels % _PANEL:
        channels = f"from {_MIN_CHANNELS} channels on, or up to {_FEW_CHANNELS} without dilation"
        return f"only {channels}, to multiples of {_PANEL}, not {conv.in_channels} -> {conv.out_channels}"
    if conv.x_elements <= MIN_ELEMENTS and not problem.folded:
        return (
            f"x has {conv.x_elements} values; up to {MIN_ELEMENTS} PyTorch convolves without oneDNN, and packs nothing"
        )
    return None


def why_not_unmeasured(problem: ConvProblem, cpu: Cpu) -> str | None:
    """Why oneDNN is taken where nothing was measured; None where the direct convolution is."""
    if problem.folded:
        return None if cpu.isa == "AVX2" else "packed once, oneDNN's weights are multiplied as fast"
    if _is_of_image(problem.conv):  # so small a weight is packed in no time
        return None if cpu.isa == "AVX2" else "unmeasured, images are oneDNN's but with AVX2"
    if cpu.cores > _MOST_CORES:
        return f"{cpu.cores} cores; unmeasured, direct is taken on up to {_MOST_CORES}"
    if problem.conv.pixels > _MOST_PIXELS:
        return f"{problem.conv.pixels} pixels; unmeasured, direct is taken up to {_MOST_PIXELS}"
    return None


def _is_of_image(conv: Conv) -> bool:
    return conv.in_channels <= _FEW_CHANNELS and conv.dilation == (1, 1)

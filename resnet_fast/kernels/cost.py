"""What a launch costs: its programs, its shared memory, and the seconds that it should take.

The cost model ranks configurations where nothing has been measured.
"""

import math

from ..gpus import Gpu
from ..problems import ITEMSIZE, ConvProblem, Problem, StemProblem
from ..shapes import Conv
from .config_types import Config, GramDgradConfig, PointerConfig, PrologueConfig, StemConfig, TailConfig, TmaConfig

_THROUGH_POINTERS = (PointerConfig, PrologueConfig, GramDgradConfig)

SUPERGROUP = 64
"""Grouped convolutions are computed as dense ones over groups packed together, this many channels at least."""


def group_shape(problem: ConvProblem) -> tuple[int, int, int]:
    """(groups, input channels, output channels of each) as the kernels see them: small groups are packed together."""
    conv = problem.conv
    group_in, group_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    together = 1
    if conv.groups > 1:
        divisors = (count for count in range(1, conv.groups + 1) if conv.groups % count == 0)
        wide_enough = (count for count in divisors if count * max(group_in, group_out) >= SUPERGROUP)
        together = next(wide_enough, conv.groups)
    return conv.groups // together, group_in * together, group_out * together


def shared_memory(config: Config, problem: Problem) -> int:
    """An upper estimate of the bytes of shared memory a block takes; the compile-only tests hold it against ptxas."""
    itemsize = ITEMSIZE[problem.dtype]
    if isinstance(config, TailConfig):
        mid, last = problem.conv2.out_channels, problem.next_conv.out_channels if problem.next_conv else 0
        shortcut = problem.shortcut.in_channels if problem.shortcut else 0
        first = config.stages * config.block_in * (config.block_pixels + mid)
        second = config.block_pixels * (mid + shortcut + 2 * config.block_out) + config.block_out * (mid + shortcut)
        return itemsize * max(first, second + last * config.block_out) + 1024
    if isinstance(config, PrologueConfig):
        channels = -(-problem.conv.in_channels // config.block_in) * config.block_in
        kept = channels * (config.block_pixels + config.stages * config.block_out)
        return itemsize * kept + 4 * config.block_pixels * config.block_out + 2048
    if isinstance(config, GramDgradConfig):
        tile = config.block_in * (config.block_pixels + config.block_out)
        return itemsize * max(config.stages * tile, config.block_pixels * config.block_out) + 4096
    if isinstance(problem, StemProblem):
        problem = problem.windows
    tile = config.block_in * (config.block_pixels + config.block_out)
    stages = config.stages + (1 if problem.shortcut else 0)
    return max(itemsize * stages * tile, itemsize * config.block_pixels * config.block_out) + 1024


def box_count(box: tuple[int, int, int], conv: Conv) -> int:
    """How many boxes cover `conv`'s output."""
    sizes = (conv.batch, conv.out_height, conv.out_width)
    return math.prod(-(-size // side) for size, side in zip(sizes, box, strict=True))


def programs(config: Config, problem: Problem) -> int:
    """How many programs the launch has, a stem's convolution."""
    if isinstance(config, TailConfig):
        return box_count(config.box, problem.conv2)
    if isinstance(config, TmaConfig | StemConfig):
        return box_count(config.box, problem.conv) * -(-problem.conv.out_channels // config.block_out)
    if isinstance(config, PrologueConfig):
        return pixel_tiles(config, problem) * config.splits
    if isinstance(config, GramDgradConfig):
        return pixel_tiles(config, problem) * -(-problem.conv.in_channels // config.block_out)
    groups, _, group_out = group_shape(problem)
    return -(-problem.conv.pixels // config.block_pixels) * groups * -(-group_out // config.block_out)


def pixel_tiles(config: Config, problem: Problem) -> int:
    """How many programs share a channel: the rows of the statistics that an epilogue leaves."""
    if isinstance(config, TmaConfig):
        return box_count(config.box, problem.conv)
    return -(-problem.conv.pixels // config.block_pixels)


def predicted_seconds(config: Config, problem: Problem, gpu: Gpu) -> float:
    """The cost model: the slowest of tensor cores, memory and L2, in whole waves of programs.

    Tensor cores lose to small tiles (operands are read from shared memory once per tile side) and to padding; the
    last wave counts in full; memory waits for programs that are alone on their multiprocessor. Constants are from
    instruction counts of compiled kernels and from an H200 (benchmarks/NOTES.md); `tune` replaces all this.
    """
    if isinstance(problem, StemProblem):
        return _stem_seconds(config, problem, gpu)
    return _seconds(config, problem, gpu, problem.bytes)


def _stem_seconds(config: StemConfig | PointerConfig, problem: StemProblem, gpu: Gpu) -> float:
    """Three launches, of which packing and pooling wait for memory alone."""
    itemsize = ITEMSIZE[problem.dtype]
    packed, conv_out, pooled = map(math.prod, (problem.packed_shape, problem.conv.y_shape, problem.y_shape))
    copied = problem.conv.x_elements + packed + conv_out + pooled
    convolved = packed + problem.windows.conv.weight_elements + conv_out  # each window's numbers once
    copies = copied * itemsize / gpu.bandwidth + 2 * 2e-6
    return copies + _seconds(config, problem.windows, gpu, convolved * itemsize)


def _seconds(config: Config, problem: Problem, gpu: Gpu, moved: int) -> float:
    """Of a launch that moves so many bytes to and from memory."""
    count = programs(config, problem)
    itemsize = ITEMSIZE[problem.dtype]
    together = max(1, gpu.shared_memory_per_multiprocessor // (shared_memory(config, problem) + 1024))
    together = max(1, min(together, 16 // config.warps, 4))
    concurrent = together * gpu.multiprocessors
    waves = math.ceil(count / concurrent) / (count / concurrent)

    issued, loaded = _issued_and_loaded(config, problem)
    intensity = 1 / (1 / config.block_pixels + 1 / config.block_out)
    addressing = 0.62 if isinstance(config, _THROUGH_POINTERS) else 1.0
    efficiency = min(1.0, intensity / 64) ** 0.5 * addressing
    efficiency *= (0.75 if config.warps == 4 else 0.5) if isinstance(config, TailConfig) else 1.0
    compute = count * issued / (gpu.peak(problem.dtype) * efficiency)
    memory = moved / gpu.bandwidth / addressing**0.5 * (1 + 0.65 / together**2)
    l2 = count * loaded * itemsize / (3 * gpu.bandwidth)
    return max(compute * waves, memory, l2) + 0.15 * min(compute * waves, memory) + 2e-6


def _issued_and_loaded(config: Config, problem: Problem) -> tuple[float, float]:
    """FLOPs that one program issues, padding included, and elements it loads."""
    pixels = config.block_pixels
    if isinstance(config, TailConfig):
        work = sum(conv.flops / conv.pixels for conv in problem.convs) * pixels
        loads = sum(conv.weight_elements for conv in problem.convs)
        return work, loads + pixels * (9 * problem.conv2.in_channels + 2 * problem.conv3.out_channels)
    if isinstance(config, PrologueConfig):
        channels = -(-problem.conv.in_channels // config.block_in) * config.block_in
        outs = -(-problem.conv.out_channels // config.splits)
        stored = pixels * outs * (2 if problem.residual else 1)
        return 2 * pixels * outs * channels, channels * (pixels + outs) + stored
    if isinstance(config, GramDgradConfig):
        sides = problem.conv.out_channels, problem.conv.in_channels
        terms = sum(-(-channels // config.block_in) * config.block_in for channels in sides)
        stored = pixels * config.block_out * (2 if problem.add else 1)
        return 2 * pixels * config.block_out * terms, terms * (pixels + config.block_out) + stored
    _, group_in, _ = group_shape(problem)
    taps = math.prod(problem.conv.kernel)
    terms = taps * -(-group_in // config.block_in) * config.block_in
    if problem.shortcut:
        terms += -(-problem.shortcut.in_channels // config.block_in) * config.block_in
    stored = pixels * config.block_out * (2 if problem.residual else 1)
    return 2 * pixels * config.block_out * terms, terms * (pixels + config.block_out) + stored

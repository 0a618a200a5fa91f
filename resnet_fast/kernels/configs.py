"""Launch configurations: which exist, which are valid for a problem on a device, and which should be fastest.

`why_not` is the one validity function, `candidates` what tuning measures, ranked by the cost model (`cost`). A kernel's
tile sizes are chosen nowhere else.
"""

from collections.abc import Iterator

from ..cpus import Cpu, Device
from ..gpus import Gpu
from ..problems import (
    ITEMSIZE,
    KERNEL_DTYPES,
    STEM_CHANNELS,
    STEM_WINDOW,
    ConvProblem,
    GramDgradProblem,
    Problem,
    PrologueProblem,
    SectionProblem,
    StemProblem,
    TailProblem,
    TrainingConvProblem,
)
from ..shapes import Conv
from . import direct, winograd
from .config_types import (
    KERNELS,
    BoxConfig,
    Config,
    DirectConfig,
    GramDgradConfig,
    PointerConfig,
    ProgramConfig,
    PrologueConfig,
    StemConfig,
    TailConfig,
    TileConfig,
    TmaConfig,
    WinogradConfig,
    from_dict,
    kernel_name,
    to_dict,
)
from .cost import SUPERGROUP, box_count, group_shape, pixel_tiles, predicted_seconds, programs, shared_memory

__all__ = [
    "KERNELS",
    "SUPERGROUP",
    "Config",
    "DirectConfig",
    "GramDgradConfig",
    "PointerConfig",
    "ProgramConfig",
    "PrologueConfig",
    "StemConfig",
    "TailConfig",
    "TileConfig",
    "TmaConfig",
    "WinogradConfig",
    "box_count",
    "boxes",
    "candidates",
    "from_dict",
    "group_shape",
    "kernel_name",
    "of_cpu",
    "pixel_tiles",
    "predicted_seconds",
    "programs",
    "shared_memory",
    "to_dict",
    "why_not",
    "why_only_frozen",
]

_ON_CPUS = (WinogradConfig, DirectConfig, TileConfig, ProgramConfig)

_PROLOGUE_CHANNELS = 512
"""More leave no room in shared memory for two tiles of weights beside them."""


def why_not(config: Config, problem: Problem, device: Device) -> str | None:
    """Why `config` cannot compute `problem` on `device`; None where it can."""
    if isinstance(config, _ON_CPUS) != isinstance(device, Cpu):
        return f"{kernel_name(config)} does not run on a {device.kind.upper()}"
    return _why_not_on_cpu(config, problem) if isinstance(device, Cpu) else _why_not_on_gpu(config, problem, device)


def why_only_frozen(problem: Problem) -> str | None:
    """Why only frozen models compute `problem` by a kernel; None where others may, too."""
    if isinstance(problem, ConvProblem) and group_shape(problem)[0] != problem.conv.groups:
        # Between groups packed together stand zero weights, and NaN or Inf times zero is NaN.
        return "small groups are packed together only in frozen models"
    return None


def of_cpu(problem: Problem) -> tuple[Config, ...]:
    """Those there are on CPUs for problems like this, the one with the fewest products first."""
    if isinstance(problem, ConvProblem):
        return WinogradConfig(), DirectConfig()
    kinds = {SectionProblem: ProgramConfig, TrainingConvProblem: TileConfig}
    return (kinds.get(type(problem), WinogradConfig)(),)


def why_not_unmeasured(config: Config, problem: Problem, device: Device) -> str | None:
    """Why the library is taken where nothing was measured, though `config` can compute `problem`; None where not."""
    if isinstance(config, WinogradConfig):
        return winograd.why_not_unmeasured(problem, device)
    return direct.why_not_unmeasured(problem, device) if isinstance(config, DirectConfig) else None


def _why_not_on_cpu(config: Config, problem: Problem) -> str | None:
    if config not in of_cpu(problem):
        return f"{kernel_name(config)} is nothing for this {type(problem).__name__}"
    if isinstance(config, WinogradConfig):
        return winograd.why_not(problem)
    if isinstance(config, DirectConfig):
        return direct.why_not(problem)
    if isinstance(config, TileConfig):
        conv = problem.conv
        fits = conv.groups == 1 and conv.in_channels % 32 == 0 and conv.out_channels % 32 == 0
        return None if fits else "only a dense convolution whose channels are multiples of 32"
    return None


def _why_not_on_gpu(config: Config, problem: Problem, gpu: Gpu) -> str | None:
    if gpu.capability < (8, 0):
        return f"{gpu.name} is sm_{gpu.capability[0]}{gpu.capability[1]}; the kernels need sm_80 or newer"
    if problem.dtype not in KERNEL_DTYPES:
        return f"the kernels take {', '.join(KERNEL_DTYPES)}, not {problem.dtype}"
    if type(config) not in _COMPUTES[type(problem)]:
        return f"{kernel_name(config)} does not compute a {type(problem).__name__}"
    if isinstance(problem, ConvProblem) and (reason := _why_not_shortcut(problem)):
        return reason
    check = _why_not_stem if isinstance(problem, StemProblem) else _WHY_NOT[type(config)]
    reason = check(config, problem, gpu)
    if reason is None and (needed := shared_memory(config, problem)) > gpu.shared_memory:
        reason = f"needs {needed} bytes of shared memory and {gpu.name} gives a block {gpu.shared_memory}"
    return reason


def _why_not_shortcut(problem: ConvProblem) -> str | None:
    branch = problem.shortcut
    if branch is None or (branch.pointwise and branch.groups == 1 and branch.y_shape == problem.conv.y_shape):
        return None
    return "the shortcut is not a dense 1x1 with the convolution's output shape"


def _why_not_pointer(config: PointerConfig, problem: ConvProblem, gpu: Gpu) -> str | None:
    _, group_in, group_out = group_shape(problem)
    if config.block_out > 16 and config.block_out >= 2 * group_out:
        return f"block_out={config.block_out} is mostly empty beside {group_out} output channels"
    if config.block_in > 16 and config.block_in >= 2 * group_in:
        return f"block_in={config.block_in} is mostly empty beside {group_in} input channels"
    if config.block_in * ITEMSIZE[problem.dtype] > 128:
        return f"block_in={config.block_in} is more than 128 bytes, whose pointers take too many registers"
    limit = _pointer_registers(config, problem, gpu)
    if problem.statistics:
        limit = min(limit, 64 if config.warps == 8 else 32)
    return _why_not_warps(config, problem, limit)


def _pointer_registers(config: PointerConfig, problem: ConvProblem, gpu: Gpu) -> int:
    """How many accumulators a thread of conv_pointer can have beside its pointers before the compiler spills."""
    _, group_in, _ = group_shape(problem)
    inputs = [group_in] + ([problem.shortcut.in_channels] if problem.shortcut else [])
    if any(channels * ITEMSIZE[problem.dtype] % 16 for channels in (*inputs, problem.conv.out_channels)):
        return 32  # element by element: a pointer each
    if problem.dtype == "float32" or (problem.shortcut and not problem.conv.pointwise):
        return 32  # twice the pointers: of twice as many bytes, or of two loops
    if gpu.capability >= (10, 0) and not problem.folded:
        return 32  # a thread has whole rows of the tile, and with them a copy of every channel's batch norm
    plain = not problem.residual and not problem.shortcut
    if gpu.capability >= (9, 0) and plain and min(config.block_pixels, config.block_out) >= 128:
        return 128  # wgmma and tcgen05 take both operands from shared memory
    return 64


def _why_not_tma(config: TmaConfig, problem: ConvProblem, gpu: Gpu) -> str | None:
    conv, (groups, group_in, group_out) = problem.conv, group_shape(problem)
    if gpu.capability < (9, 0):
        return "descriptors compile to unpipelined loads before sm_90"
    reason = _why_not_split(conv)
    if reason is not None:
        return reason
    inputs = [conv.in_channels] + ([problem.shortcut.in_channels] if problem.shortcut else [])
    if any(channels * ITEMSIZE[problem.dtype] % 16 for channels in (*inputs, conv.out_channels)):
        return "channels are not a multiple of 16 bytes, which descriptors need"
    if group_in % config.block_in and (conv.kernel != (1, 1) or groups > 1):
        return f"block_in={config.block_in} does not divide {group_in} input channels, so it would cross taps"
    if group_out % config.block_out and groups > 1:
        return f"block_out={config.block_out} does not divide a group's {group_out} output channels"
    if config.block_out > max(64, conv.out_channels):
        return f"block_out={config.block_out} is mostly empty beside {conv.out_channels} output channels"
    even = box_count(config.box, conv) * config.block_pixels == conv.pixels
    much = problem.residual_norm or (problem.statistics and (not even or gpu.capability >= (10, 0)))
    limit = 64 if much else 128
    return _why_not_box(config, conv, problem) or _why_not_warps(config, problem, limit)


def _why_not_tail(config: TailConfig, problem: TailProblem, gpu: Gpu) -> str | None:
    conv2, conv3 = problem.conv2, problem.conv3
    if gpu.capability < (9, 0):
        return "descriptors compile to unpipelined loads before sm_90"
    if (
        conv2.kernel != (3, 3)
        or conv2.padding != conv2.dilation
        or conv2.dilation[0] != conv2.dilation[1]
        or conv2.groups > 1
    ):
        return "conv2 is not a dense 3x3 that keeps its size"
    if not all(conv.pointwise and conv.groups == 1 for conv in problem.convs[1:]):
        return "what follows conv2 is not a dense 1x1"
    reason = _why_not_split(conv2)
    if reason is not None:
        return reason
    if problem.dtype == "float32":
        return "only for bfloat16 and float16: float32 blocks do not fit into shared memory"
    if conv2.in_channels != conv2.out_channels or not _fits_on_chip(conv2.out_channels):
        return f"conv2 has {conv2.in_channels} -> {conv2.out_channels} channels; 64, 128 and 256 fit on chip"
    if conv3.out_channels % config.block_out or conv2.in_channels % config.block_in:
        return "blocks do not divide the channels"
    if problem.next_conv and not _fits_on_chip(problem.next_conv.out_channels):
        return f"the next convolution's {problem.next_conv.out_channels} channels do not fit on chip"
    if problem.shortcut and not _fits_on_chip(problem.shortcut.in_channels):
        return f"the shortcut's {problem.shortcut.in_channels} channels do not fit on chip"
    widest = max(conv2.out_channels, _next_channels(problem))
    registers = config.block_pixels * (widest + config.block_out) // (32 * config.warps)
    if registers > 96:
        return f"{registers} accumulator registers a thread; beyond 96 the compiler spills"
    return _why_not_box(config, conv2, problem)


def _fits_on_chip(channels: int) -> bool:
    return channels in (64, 128, 256)


def _why_not_stem(config: StemConfig | PointerConfig, problem: StemProblem, gpu: Gpu) -> str | None:
    conv = problem.conv
    if isinstance(config, StemConfig) and gpu.capability < (9, 0):
        return "descriptors compile to unpipelined loads before sm_90"
    if conv.stride != (2, 2) or conv.dilation != (1, 1) or conv.groups != 1:
        return "a stem is packed for a dense convolution of stride 2"
    if conv.in_channels > STEM_CHANNELS:
        return f"{conv.in_channels} input channels; a stem is packed with at most {STEM_CHANNELS}"
    if conv.kernel[1] > STEM_WINDOW:
        return f"the kernel has {conv.kernel[1]} columns; a stem is packed for at most {STEM_WINDOW}"
    if config.block_in != STEM_WINDOW * STEM_CHANNELS:
        return f"block_in={config.block_in} is not the {STEM_WINDOW * STEM_CHANNELS} numbers of a window"
    if conv.out_channels * ITEMSIZE[problem.dtype] % 16:
        return "channels are not a multiple of 16 bytes, which pooling reads at a time"
    if config.block_out > max(64, conv.out_channels):
        return f"block_out={config.block_out} is mostly empty beside {conv.out_channels} output channels"
    if isinstance(config, PointerConfig):
        return _why_not_pointer(config, problem.windows, gpu)
    return _why_not_box(config, conv, problem) or _why_not_warps(config, problem.windows, 128)


def _why_not_split(conv: Conv) -> str | None:
    """A stride is a dense box of a view: of every other pixel for a 1x1, else of rows and columns split in two."""
    if conv.stride == (1, 1) or conv.pointwise:
        return None
    if conv.stride == (2, 2) and conv.height % 2 == 0 and conv.width % 2 == 0:
        return None
    return f"stride {conv.stride} over {conv.height}x{conv.width} is no dense view of it"


def _why_not_box(config: BoxConfig, conv: Conv, problem: Problem) -> str | None:
    images = config.box[0]
    covered = box_count(config.box, conv) * config.block_pixels
    if images > max(1, conv.batch) * 2 or covered > 4 * max(conv.pixels, 64):
        return f"box {config.box} is mostly empty over {conv.batch} images of {conv.out_height}x{conv.out_width}"
    if config.block_in * ITEMSIZE[problem.dtype] > 128:
        return f"block_in={config.block_in} is wider than the 128 bytes of a swizzled row"
    return None


def _why_not_warps(config: PointerConfig | TmaConfig | StemConfig, problem: ConvProblem, limit: int) -> str | None:
    accumulators = 2 if problem.shortcut and not problem.folded else 1
    registers = accumulators * config.block_pixels * config.block_out // (32 * config.warps)
    if config.block_pixels * config.block_out < 256 * config.warps:
        return f"{config.warps} warps have too little to do"
    if registers > limit:
        return f"{registers} accumulator registers a thread; beyond {limit} the compiler spills"
    return None


def _why_not_prologue(config: PrologueConfig, problem: PrologueProblem, gpu: Gpu) -> str | None:
    conv = problem.conv
    if not conv.pointwise or conv.stride != (1, 1) or conv.groups > 1:
        return "only a dense 1x1 without stride transforms its input as it reads"
    if problem.statistics and problem.joined:
        return "statistics are those of a raw output"
    if conv.in_channels > _PROLOGUE_CHANNELS:
        return f"{conv.in_channels} input channels; at most {_PROLOGUE_CHANNELS} are kept in shared memory"
    if config.block_in * ITEMSIZE[problem.dtype] > 128:
        return f"block_in={config.block_in} is more than 128 bytes, whose pointers take too many registers"
    tiles = -(-conv.out_channels // config.block_out)
    if tiles % config.splits:
        return f"splits={config.splits} do not divide {tiles} tiles of output channels"
    return _why_not_whole(config, problem)


def _why_not_gram_dgrad(config: GramDgradConfig, problem: GramDgradProblem, gpu: Gpu) -> str | None:
    conv = problem.conv
    if not conv.pointwise or conv.stride != (1, 1) or conv.groups > 1:
        return "only a dense 1x1 without stride has a Gram form here"
    if config.block_in * ITEMSIZE[problem.dtype] > 128:
        return f"block_in={config.block_in} is more than 128 bytes, whose pointers take too many registers"
    if config.block_out > 64 and config.block_out >= 2 * conv.in_channels:
        return f"block_out={config.block_out} is mostly empty beside {conv.in_channels} channels"
    return _why_not_whole(config, problem)


def _why_not_whole(config: PrologueConfig | GramDgradConfig, problem: Problem) -> str | None:
    """Of the kernels that transform as they read: what the compiler can hold in registers."""
    conv = problem.conv
    registers = config.block_pixels * config.block_out // (32 * config.warps)
    aligned = not any(side * ITEMSIZE[problem.dtype] % 16 for side in (conv.in_channels, conv.out_channels))
    limit = 64 if aligned and problem.dtype != "float32" else 32
    if registers > limit:
        return f"{registers} accumulator registers a thread; beyond {limit} the compiler spills"
    return None


_COMPUTES = {
    ConvProblem: (PointerConfig, TmaConfig),
    StemProblem: (StemConfig, PointerConfig),
    TailProblem: (TailConfig,),
    PrologueProblem: (PrologueConfig,),
    GramDgradProblem: (GramDgradConfig,),
}
_WHY_NOT = {
    PointerConfig: _why_not_pointer,
    TmaConfig: _why_not_tma,
    TailConfig: _why_not_tail,
    PrologueConfig: _why_not_prologue,
    GramDgradConfig: _why_not_gram_dgrad,
}


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Every valid configuration there is for `problem` on `device`, the most promising first."""
    if isinstance(device, Cpu):
        return [config for config in of_cpu(problem) if why_not(config, problem, device) is None]
    if isinstance(problem, ConvProblem):
        everything: Iterator[Config] = _conv_configs(problem)
    elif isinstance(problem, PrologueProblem):
        everything = _prologue_configs(problem)
    elif isinstance(problem, GramDgradProblem):
        everything = _gram_dgrad_configs(problem)
    elif isinstance(problem, StemProblem):
        everything = _stem_configs()
    else:
        everything = (
            TailConfig(box, 64, 64, warps, stages)
            for box in boxes(problem.conv2)
            for warps in (4, 8)
            for stages in (2, 3)
        )
    valid = [config for config in everything if why_not(config, problem, device) is None]
    return sorted(valid, key=lambda config: predicted_seconds(config, problem, device))


_BOXES = {
    64: ((1, 8, 8), (4, 4, 4), (16, 2, 2), (64, 1, 1), (1, 4, 16), (1, 2, 32)),
    128: ((2, 8, 8), (8, 4, 4), (32, 2, 2), (128, 1, 1), (1, 8, 16), (1, 4, 32)),
    256: ((4, 8, 8), (16, 4, 4), (64, 2, 2), (256, 1, 1), (1, 16, 16), (1, 8, 32)),
}
"""Pixels -> boxes, the ones that share most of a 3x3's inputs first. 56, 28, 14 and 7 square images fill one each."""


_STEM_BOXES = (
    *(((1, 16, 16), 8), ((2, 8, 16), 8), ((1, 16, 16), 4), ((1, 8, 16), 4), ((2, 8, 8), 4), ((1, 8, 16), 8)),
    *(((1, 4, 32), 4), ((1, 8, 8), 4)),
)
"""With their warps. 112 square images fill all but one of them; a large one reads fewer weights."""


def boxes(conv: Conv) -> list[tuple[int, int, int]]:
    """The box of each size that covers `conv`'s output with the least waste."""
    return [min(shapes, key=lambda box: box_count(box, conv)) for shapes in _BOXES.values()]


_OUT_IN = ((64, 64), (128, 64), (256, 64), (64, 32), (128, 32), (32, 32), (32, 16), (16, 16))


def _conv_configs(problem: ConvProblem) -> Iterator[Config]:
    row = 128 // ITEMSIZE[problem.dtype]  # channels in the widest row that descriptors swizzle
    covering = boxes(problem.conv)
    for block_out, block_in in _OUT_IN:
        for warps in (4, 8):
            for stages in (2, 3, 4):
                for pixels in (64, 128, 256):
                    yield PointerConfig(pixels, block_out, block_in, warps, stages)
                if block_out >= 64 and block_in == row:
                    for box in covering:
                        yield TmaConfig(box, block_out, block_in, warps, stages)


def _stem_configs() -> Iterator[StemConfig | PointerConfig]:
    # Windows overlap: descriptors, and pointers in more than one stage, fetch each from L2, one stage finds them in L1.
    window = STEM_WINDOW * STEM_CHANNELS
    for box, warps in _STEM_BOXES:
        for stages in (3, 4):
            yield StemConfig(box, 64, window, warps, stages)
    for pixels, warps in ((128, 4), (128, 8), (256, 8), (64, 4)):
        for stages in (1, 3):
            yield PointerConfig(pixels, 64, window, warps, stages)


def _prologue_configs(problem: PrologueProblem) -> Iterator[PrologueConfig]:
    row = 128 // ITEMSIZE[problem.dtype]
    for pixels in (64, 128):
        for block_out, warps in ((64, 4), (128, 8), (64, 8)):
            for splits in (1, 2, 4, 8):
                for stages in (1, 2):
                    yield PrologueConfig(pixels, block_out, row, splits, warps, stages)


def _gram_dgrad_configs(problem: GramDgradProblem) -> Iterator[GramDgradConfig]:
    row = 128 // ITEMSIZE[problem.dtype]
    for pixels in (64, 128):
        for block_out, warps in ((64, 4), (64, 8), (128, 8)):
            for stages in (2, 3, 4):
                yield GramDgradConfig(pixels, block_out, row, warps, stages)


def _next_channels(problem: TailProblem) -> int:
    return problem.next_conv.out_channels if problem.next_conv else 0

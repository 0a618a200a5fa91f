"""Launch configurations as data: one dataclass a kernel, and their JSON."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class PointerConfig:
    """conv_pointer: a program computes block_pixels x block_out outputs, block_in channels at a time."""

    block_pixels: int
    block_out: int
    block_in: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BoxConfig:
    """A program has a box of output pixels, (images, rows, columns), which descriptors load and store whole."""

    box: tuple[int, int, int]
    block_out: int
    block_in: int
    warps: int
    stages: int

    @property
    def block_pixels(self) -> int:
        return math.prod(self.box)


class TmaConfig(BoxConfig):
    """conv_tma: a program computes its box x block_out output channels, block_in input channels at a time."""


class TailConfig(BoxConfig):
    """tail: a program computes all channels of its box, block_out of the block's output at a time."""


class StemConfig(BoxConfig):
    """stem: of its convolution, a program computes its box x block_out output channels, a row of windows at a time."""


@dataclass(frozen=True)
class PrologueConfig:
    """conv_prologue: a program computes block_pixels x a splits-th of the output channels, block_out at a time."""

    block_pixels: int
    block_out: int
    block_in: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GramDgradConfig:
    """gram_dgrad: a program computes block_pixels x block_out of dx, block_in terms at a time."""

    block_pixels: int
    block_out: int
    block_in: int
    warps: int
    stages: int


@dataclass(frozen=True)
class WinogradConfig:
    """winograd, on CPUs: the one there is, F(4x4, 3x3) in float32, F(2x2, 3x3) in bfloat16."""


@dataclass(frozen=True)
class DirectConfig:
    """direct, on CPUs: without transforms; a weight that may change is packed in every call."""


@dataclass(frozen=True)
class TileConfig:
    """tiles, on CPUs: AMX's, of bfloat16."""


@dataclass(frozen=True)
class ProgramConfig:
    """program, on CPUs: all layers of a section in one, multiplied by AMX's tiles or AVX-512's dot products."""


Config = (
    PointerConfig
    | TmaConfig
    | TailConfig
    | StemConfig
    | PrologueConfig
    | GramDgradConfig
    | WinogradConfig
    | DirectConfig
    | TileConfig
    | ProgramConfig
)
KERNELS: dict[str, type] = {
    "conv_pointer": PointerConfig,
    "conv_tma": TmaConfig,
    "bottleneck_tail": TailConfig,
    "stem": StemConfig,
    "conv_prologue": PrologueConfig,
    "gram_dgrad": GramDgradConfig,
    "winograd": WinogradConfig,
    "direct": DirectConfig,
    "tiles": TileConfig,
    "program": ProgramConfig,
}
"""Kernel name -> its configuration's type."""


def kernel_name(config: Config) -> str:
    """The kernel that `config` is for."""
    return next(name for name, kind in KERNELS.items() if type(config) is kind)


def to_dict(config: Config) -> dict:
    """Plain data for JSON; `from_dict` reads it back."""
    return {"kernel": kernel_name(config), **asdict(config)}


def from_dict(data: dict) -> Config:
    """Raises KeyError or TypeError for a kernel or a field that does not exist."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "kernel"}
    return KERNELS[data["kernel"]](**fields)

"""What is known of a GPU: the limits that decide which configurations are valid, and the ceilings of its speed.

Ceilings here are what large matrix products and copies are expected to reach, not data-sheet peaks; on the device,
`resnet-fast profile` measures them and uses what it measured.
"""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Gpu:
    """shared_memory: bytes one block can have; flops: FLOP/s by dtype name ("tf32" too); bandwidth: bytes/s."""

    kind: ClassVar[str] = "gpu"

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    shared_memory_per_multiprocessor: int
    flops: dict[str, float]
    bandwidth: float

    def peak(self, dtype: str) -> float:
        """FLOP/s of convolutions in `dtype`; float32 is TF32 where PyTorch's convolutions may use it, too."""
        return self.flops.get(self.arithmetic(dtype)) or self.flops["float32"] / 2

    def arithmetic(self, dtype: str) -> str:
        """The key of `flops` for convolutions in `dtype`; float64, where nothing is known, is not one."""
        tf32 = dtype == "float32" and self.capability >= (8, 0) and torch.backends.cudnn.allow_tf32
        return "tf32" if tf32 else dtype

    @property
    def slug(self) -> str:
        """The name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
        return slug_of(self.name)

    def __hash__(self) -> int:
        return hash((self.name, self.capability, self.multiprocessors, self.shared_memory))


def slug_of(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _gpu(name, capability, multiprocessors, shared_kib, shared_per_multiprocessor_kib, half, tf32, fp32, bandwidth):
    flops = {"bfloat16": half, "float16": half, "tf32": tf32, "float32": fp32}
    kib = 1024
    return Gpu(
        name, capability, multiprocessors, shared_kib * kib, shared_per_multiprocessor_kib * kib, flops, bandwidth
    )


KNOWN = {
    "a100": _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163, 164, 260e12, 130e12, 18e12, 1.75e12),
    "h100": _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 227, 228, 750e12, 380e12, 55e12, 3.0e12),
    "h200": _gpu("NVIDIA H200", (9, 0), 132, 227, 228, 790e12, 390e12, 55e12, 4.3e12),
    "b200": _gpu("NVIDIA B200", (10, 0), 148, 227, 228, 1600e12, 800e12, 65e12, 7.0e12),
}
"""GPUs that can be named without having one, by the names the command line takes."""


def named(name: str) -> Gpu:
    """The GPU called `name` ("h200", or its full name).

    Raises:
        ValueError: unknown; lists what is known.
    """
    for short, gpu in KNOWN.items():
        if name.lower() in (short, gpu.name.lower(), gpu.slug):
            return gpu
    raise ValueError(f"gpu={name!r} is not known; it must be one of: {', '.join(KNOWN)}")


@functools.cache
def of_device(index: int) -> Gpu:
    """The CUDA device; ceilings are the known GPU's of that name, else its generation's, scaled by size."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    for gpu in KNOWN.values():
        if gpu.name == properties.name:
            return gpu
    relative = min(KNOWN.values(), key=lambda gpu: abs(gpu.capability[0] - capability[0]))
    scale = properties.multi_processor_count / relative.multiprocessors
    return Gpu(
        properties.name,
        capability,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        {dtype: flops * scale for dtype, flops in relative.flops.items()},
        relative.bandwidth * scale,
    )


def of_tensor(x: torch.Tensor) -> Gpu:
    """The GPU that x is on; for a CPU's, under Triton's interpreter, an H200, whose kernels are then what is tested."""
    return of_device(x.device.index) if x.is_cuda else KNOWN["h200"]

"""What every workload has, and the tensors it is made of. Inputs come from a seed made of the problem's key."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.configs import Config
from ...problems import Problem
from ...shapes import Conv

Outputs = dict[str, Tensor]
Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Workload:
    """reference: in float64. stock: PyTorch's ops, one by one, in the problem's dtype. library: by variant.

    kernel: the run of one configuration; Triton's write to `outputs`. repeats: how often a run computes the problem.
    """

    reference: Run
    stock: Run
    kernel: Callable[[Config], Run]
    library: dict[str, Run]
    outputs: Outputs
    repeats: int = 1

    def poison(self) -> None:
        """NaN into everything that a Triton candidate has to write."""
        for tensor in self.outputs.values():
            tensor.fill_(float("nan"))


class Source:
    """Tensors of a problem: standard normal, weights scaled so that what comes out is of order one too."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.dtype, self.device = getattr(torch, problem.dtype), device
        self.generator = torch.Generator(device).manual_seed(zlib.crc32(problem.key.encode()))

    def image(self, shape: tuple[int, ...]) -> Tensor:
        """(N, C, H, W), channels_last."""
        return self.empty(shape).normal_(generator=self.generator)

    def conv(self, conv: Conv, prefix: str = "") -> dict[str, Tensor]:
        """Weight and bias by name."""
        weight = self.image(conv.weight_shape) * (conv.weight_elements // conv.out_channels) ** -0.5
        bias = torch.empty(conv.out_channels, dtype=self.dtype, device=self.device).normal_(generator=self.generator)
        return {f"{prefix}weight": weight, f"{prefix}bias": bias}

    def vectors(self, count: int, size: int) -> Tensor:
        """(count, size), float32: of batch norms and Gram matrices."""
        return torch.empty(count, size, device=self.device).normal_(generator=self.generator)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)

"""What a residual block's training is made of, once for each backend: see `reference` for the contract.

`backends.residual_block` is the algorithm; it calls these functions and knows no kernel. Each backend's module has all
of them. Activations are (N, C, H, W) tensors of one dtype and memory format; statistics, sums and the matrices of
`gram` and `outer` are of the accumulation dtype: float64 for float64 activations, else float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...shapes import Conv


class Norm(NamedTuple):
    """One batch norm of one call: (c - mean) * rsqrt(var + eps) * weight + bias; vectors (C,), None is left out."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def scale(self, dtype: torch.dtype) -> Tensor:
        """weight * rsqrt(var + eps), (C,)."""
        rstd = torch.rsqrt(self.var.to(dtype) + self.eps)
        return rstd if self.weight is None else rstd * self.weight.to(dtype)


def arguments(norm: Norm | None) -> tuple[list[Tensor | None], float]:
    """A norm as the extension's ops take one: mean, var, weight and bias, and eps; nothing for None."""
    return ([], 0.0) if norm is None else (list(norm[:4]), norm.eps)


class Geometry(NamedTuple):
    """How a convolution slides: pairs are [rows, columns]."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @classmethod
    def of(cls, conv: Conv) -> "Geometry":
        """That of a convolution's shapes."""
        return cls(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)


class Shortcut(NamedTuple):
    """A downsample's convolution whose output is not stored: norm(conv(x)), computed where it is added."""

    x: Tensor
    conv_weight: Tensor
    geometry: Geometry
    norm: Norm

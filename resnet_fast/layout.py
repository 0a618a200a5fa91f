"""The memory format of a tensor."""

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """What x's strides suggest, as C++'s `Tensor::suggest_memory_format`: torch.channels_last or contiguous_format.

    `torch._prims_common` has it in Python, with a symbolic question for each of a dozen comparisons, which take longer
    than a kernel's launch.
    """
    if x.dim() != 4 or x.layout != torch.strided or x.stride(1) == 0:
        return torch.contiguous_format
    sizes, strides, smallest = x.shape, x.stride(), 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < smallest:
            return torch.contiguous_format
        if dim == 0 and smallest == strides[1]:  # N111 and the like fit both
            return torch.contiguous_format
        smallest = strides[dim] * sizes[dim]
    return torch.channels_last

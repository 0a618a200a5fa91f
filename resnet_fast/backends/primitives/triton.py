"""The primitives of training in Triton kernels; see `reference` for the contract."""

from ..triton_batch_norm import apply, batch_statistics, gram, mask, outer
from ..triton_conv import conv, conv_backward, conv_join, gram_dgrad
from ..triton_pool import backward_apply, backward_reduce, pool

__all__ = [
    "apply",
    "backward_apply",
    "backward_reduce",
    "batch_statistics",
    "conv",
    "conv_backward",
    "conv_join",
    "gram",
    "gram_dgrad",
    "mask",
    "outer",
    "pool",
]

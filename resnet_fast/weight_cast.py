"""A convolution's weight in autocast's dtype: cast once, however many forward passes share an autocast context.

The backward pass reads what the forward pass has cast. For further forward passes (accumulated gradients, a block used
twice) autocast has a cache, which `F.conv2d` goes through and our ops, whose dtypes are settled before, do not.
"""

import torch
from torch import Tensor

from .backends import native
from .context import is_traced, plain_pytorch_reason

_VERSION = "_resnet_fast_version"
"""Attribute of a cast that autocast keeps: the weight's version that it is of."""


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, differentiable: by the cast that autocast keeps of it until its context ends, if it does."""
    if weight.dtype == dtype:
        return weight
    if not _is_kept(weight):
        return weight.to(dtype)
    kept = native.autocast_cast(weight, dtype)
    version = vars(kept).get(_VERSION)
    if version is None:  # new, and differentiable as it is
        vars(kept)[_VERSION] = weight._version
        return kept
    # Autocast's cache does not see that a weight has been stepped.
    return _Cast.apply(weight, (kept,)) if version == weight._version else weight.to(dtype)


class _Cast(torch.autograd.Function):
    """`weight.to(kept.dtype)` where that is known. A node of its own, so that the gradients of several forward passes
    are added up in the weight's dtype: those through one node are added in the cast's."""

    @staticmethod
    def forward(ctx, weight: Tensor, kept: tuple[Tensor]) -> Tensor:
        """kept: in a tuple, past autograd."""
        ctx.dtype = weight.dtype
        return kept[0].detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """Differentiable too."""
        return grad.to(ctx.dtype), None


def _is_kept(weight: Tensor) -> bool:
    """Whether autocast keeps casts of `weight`, one may be used here, and the extension is there to ask it."""
    return (
        weight.device.type == "cpu"  # on a GPU a CUDA graph may be recorded, in which every cast must be made anew
        and weight.dtype == torch.float32
        and weight.requires_grad
        and weight.is_leaf
        and torch.is_grad_enabled()
        and torch.is_autocast_cache_enabled()
        and not is_traced(weight)
        and plain_pytorch_reason() is None
        and native.available() is None
    )

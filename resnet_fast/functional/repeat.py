"""A block's call in which nothing was learnt, to be repeated with other values; or those of several blocks as one.

Validation, and the lists that the op takes, cost the host 30 microseconds a block, which one small image is noticeably
slower by.
"""

import operator
from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from .. import dispatch
from ..backends import native
from ..context import cast, conv_dtype, is_traced
from .conv_bn_act import ConvBn


class Repeatable:
    """What `residual_block` found to be right: `op(x, None, *arguments)` computes it from an x in the convolutions'
    dtype.

    layers: as they were given. Of their tensors other values are no news; other tensors, shapes or dtypes are.
    y_shape: of its output.
    """

    def __init__(
        self,
        x: Tensor,
        layers: Sequence[ConvBn],
        backend: str,
        op: Callable[..., Tensor],
        arguments: tuple,
        y_shape: tuple[int, ...],
    ) -> None:
        self._given, self._fields, self._kinds = _given(x), _fields(layers), _kinds(layers)
        self._backend, self.dtype = dispatch.requested(backend), conv_dtype(x)
        self.op, self.arguments, self.x_shape, self.y_shape = op, arguments, tuple(x.shape), tuple(y_shape)

    def __call__(self, x: Tensor, layers: Sequence[ConvBn], backend: str) -> Tensor | None:
        """y; None where something is not as it was, somebody may want a gradient, or follows x.

        What forbids fused ops (`context.plain_pytorch_reason`) is for the caller to ask.
        """
        if not (self.takes(x) and self.is_of(layers, backend)):
            return None
        return self.op(cast(x, self.dtype), None, *self.arguments)

    def takes(self, x: Tensor) -> bool:
        """Whether x is as it was, and nobody wants a gradient or follows it."""
        return is_only_computed(x) and self._given == _given(x)

    def is_of(self, layers: Sequence[ConvBn], backend: str) -> bool:
        """Whether everything but x is as it was."""
        fields = _fields(layers)
        same = len(fields) == len(self._fields) and all(map(operator.is_, fields, self._fields))
        return same and self._kinds == _kinds(layers) and self._backend == dispatch.requested(backend)


def in_one_call(blocks: Sequence[Repeatable]) -> Callable[[Tensor], Tensor] | None:
    """What computes the blocks one behind another, from the first one's x, in one call; None where nothing does."""
    fits = all(one.y_shape == other.x_shape and one.dtype == other.dtype for one, other in pairwise(blocks))
    if not fits or any(block.op is not native.residual_block for block in blocks):
        return None
    dtype = blocks[0].dtype
    run = native.residual_stage([block.x_shape for block in blocks], dtype, [block.arguments for block in blocks])
    return None if run is None else lambda x: run(cast(x, dtype))


def is_only_computed(x: Tensor) -> bool:
    """Whether nobody wants a gradient of what x goes through, or follows it."""
    return not (torch.is_grad_enabled() or is_traced(x))


def _given(x: Tensor) -> tuple:
    return x.shape, x.dtype, x.device, conv_dtype(x)


def _fields(layers: Sequence[ConvBn]) -> tuple:
    return tuple(chain.from_iterable(layers))


def _kinds(layers: Sequence[ConvBn]) -> list[tuple]:
    """Of the tensors, what an assignment to `.data` may change."""
    return [(tensor.dtype, tensor.shape) for layer in layers for tensor in layer[:5] if tensor is not None]

"""Residual blocks one behind another, as networks have them in a Sequential: as one call where nothing is learnt.

What is between two blocks then stays in the buffers, and so in the caches, that one writes and the other reads.
"""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .blocks import FAST, FastBlock
from .functional.repeat import Repeatable, in_one_call, is_only_computed
from .layers import why_not_called

_calls: WeakKeyDictionary[nn.Module, tuple[list[Repeatable], Callable[[Tensor], Tensor] | None]] = WeakKeyDictionary()
"""Of stages, their blocks' last calls, and what repeats them all; None where nothing does."""


class FastStage(nn.Sequential):
    """A Sequential of fast blocks: x (N, Cin, H, W) -> the last block's output, to the bit what the blocks compute.

    Dtypes, layouts and errors are the blocks'. Where not all can be one call, each runs for itself, fused or stock.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The last block's output."""
        if not torch.jit.is_scripting():
            return self._forward_fused(x)
        for block in self:  # TorchScript compiles only this copy of Sequential's
            x = block(x)
        return x

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _may_be_one_call(x) or not _are_fast(self):
            return super().forward(x)
        blocks = list(self)
        kept, run = _calls.get(self, ([], None))
        if run is not None and _repeat(blocks, kept, x):
            return run(x)
        y = super().forward(x)
        calls = [block.last_call() for block in blocks]
        if None not in calls and calls != kept:
            _calls[self] = calls, in_one_call(calls)
        return y


def takes_stage(module: nn.Module) -> bool:
    """Whether this is a Sequential of fast blocks alone, and so may become a FastStage."""
    return type(module) is nn.Sequential and "forward" not in module.__dict__ and _are_fast(module)


def _are_fast(blocks: nn.Sequential) -> bool:
    return len(blocks) > 0 and all(type(block) in FAST.values() for block in blocks)


def _repeat(blocks: Sequence[FastBlock], calls: Sequence[Repeatable], x: Tensor) -> bool:
    """Whether blocks that are given x would do what they did in these calls."""
    first = blocks[0]
    if len(calls) != len(blocks) or not calls[0].takes(x):
        return False
    if why_not_called("conv_bn_act", x, first.conv1, first.fast_backend) is not None:
        return False
    return all(block.repeats(call, x) for block, call in zip(blocks, calls, strict=True))


def _may_be_one_call(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_cpu and is_only_computed(x)

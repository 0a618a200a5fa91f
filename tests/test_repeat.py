"""A block in eval mode repeats its last call without looking at everything again: never where something has changed."""

import copy
import gc

import pytest
import torch
from cases import draw
from models import lively
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import blocks, optimize
from resnet_fast.functional import residual_block

pytestmark = pytest.mark.usefixtures("native")


def downsampling() -> BasicBlock:
    return BasicBlock(8, 16, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16)))


MAKE = {"basic": lambda: BasicBlock(8, 8), "bottleneck": lambda: Bottleneck(16, 4), "downsample": downsampling}


@pytest.fixture
def looked(monkeypatch) -> list:
    """One entry for each call that was validated."""
    calls = []

    def validated(*given, **settings):
        calls.append(given)
        return residual_block(*given, **settings)

    monkeypatch.setattr(blocks, "residual_block", validated)
    return calls


def pair(name: str = "basic") -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The stock block, the fast one, and an input."""
    torch.manual_seed(2)
    stock = lively(MAKE[name]()).eval().to(memory_format=torch.channels_last)
    return (
        stock,
        optimize(copy.deepcopy(stock)),
        draw((2, stock.conv1.in_channels, 9, 9), torch.float32, "channels_last"),
    )


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_the_second_call_is_not_validated_again(name, looked):
    stock, fast, x = pair(name)
    for _ in range(3):
        torch.testing.assert_close(fast(x), stock(x))
    assert len(looked) == 1
    torch.testing.assert_close(fast(2 * x), stock(2 * x))
    assert len(looked) == 1


def _assign(module, name, value):
    setattr(module, name, value)


CHANGES = {
    "shape": lambda fast, x: (fast, x[:1]),
    "dtype": lambda fast, x: (fast.double(), x.double()),
    "stride": lambda fast, x: (
        (_assign(fast.conv2, "padding", (2, 2)), _assign(fast.conv2, "dilation", (2, 2))) and (fast, x)
    ),
    "eps": lambda fast, x: _assign(fast.bn1, "eps", 0.5) or (fast, x),
    "weight": lambda fast, x: _assign(fast.conv1, "weight", nn.Parameter(fast.conv1.weight * 2)) or (fast, x),
    "bias": lambda fast, x: _assign(fast.bn2, "bias", None) or (fast, x),
    "statistics": lambda fast, x: _assign(fast.bn1, "running_mean", fast.bn1.running_mean + 1) or (fast, x),
    "backend": lambda fast, x: _assign(fast, "fast_backend", "reference") or (fast, x),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_what_changes_is_looked_at(name, looked):
    _, fast, x = pair()
    fast(x)
    fast, x = CHANGES[name](fast, x)
    y = fast(x)
    assert len(looked) == 2
    stock = copy.deepcopy(fast)
    stock.__class__ = BasicBlock
    torch.testing.assert_close(y, stock(x))


@torch.no_grad()
def test_values_written_behind_autograds_back_are_seen(looked):
    stock, fast, x = pair()
    fast(x)
    for block in (stock, fast):
        block.conv1.weight.data.mul_(2)
        block.bn1.running_var.data.add_(1)
    torch.testing.assert_close(fast(x), stock(x))
    assert len(looked) == 1


@torch.no_grad()
def test_data_of_another_shape_raises(looked):
    _, fast, x = pair()
    fast(x)
    fast.bn1.weight.data = torch.ones(5)
    with pytest.raises(ValueError, match="weight must have shape"):
        fast(x)


def test_gradients_hooks_training_and_autocast_are_never_skipped(looked):
    stock, fast, x = pair()
    with torch.no_grad():
        fast(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16
        assert fast(x).dtype == torch.float32
    assert len(looked) == 3
    assert fast(x).requires_grad
    with torch.no_grad():
        handle = fast.conv1.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
        plain = copy.deepcopy(fast)
        plain.__class__ = BasicBlock
        torch.testing.assert_close(fast(x), plain(x))
        handle.remove()
        before = fast.bn1.running_mean.clone()
        torch.testing.assert_close(fast.train()(x), stock.train()(x))
        assert not torch.equal(fast.bn1.running_mean, before)


@torch.no_grad()
def test_blocks_are_freed_and_copied_without_it():
    _, fast, x = pair()
    fast(x)
    kept = len(blocks._repeatable)
    assert "_repeatable" not in str(fast.__dict__.keys())
    torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x))
    del fast
    gc.collect()
    assert len(blocks._repeatable) <= kept

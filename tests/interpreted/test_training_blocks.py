"""Whole residual blocks and the stem in training on the Triton backend: every gradient, every stage, beside float64."""

import copy

import pytest
import requires_triton  # noqa: F401
import torch
from cases import draw
from models import lively
from numerics import assert_all_match
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1

from resnet_fast import optimize, training
from resnet_fast.backends import triton_launch

STAGES = pytest.mark.parametrize("stage", training.STAGES)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were started."""
    names, launch = [], triton_launch.launch

    def recording(kernel, *args):
        names.append(kernel.fn.__name__)
        return launch(kernel, *args)

    monkeypatch.setattr(triton_launch, "launch", recording)
    return names


def bottleneck(stride: int) -> nn.Module:
    downsample = nn.Sequential(conv1x1(32, 64, stride), nn.BatchNorm2d(64)) if stride > 1 else None
    return Bottleneck(32 if stride > 1 else 64, 16, stride, downsample)


def basic(stride: int) -> nn.Module:
    downsample = nn.Sequential(conv1x1(16, 32, stride), nn.BatchNorm2d(32)) if stride > 1 else None
    return BasicBlock(16 if stride > 1 else 32, 32, stride, downsample)


def frozen_in_part() -> nn.Module:
    block = bottleneck(2).train()
    block.bn2.eval()
    block.requires_grad_(True)
    block.bn1.weight.requires_grad_(False)
    return block


BLOCKS = {
    "bottleneck": lambda: bottleneck(1).train(),
    "bottleneck_stride2": lambda: bottleneck(2).train(),
    "basic": lambda: basic(1).train(),
    "basic_stride2": lambda: basic(2).train(),
    "frozen_in_part": frozen_in_part,
    "odd_channels": lambda: Bottleneck(20, 5).train(),
}


def results(block: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = block(leaf)
    learnt = {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(y, [leaf, *learnt.values()], dy.to(y.dtype))
    found = {"y": y.detach(), "dx": grads[0]} | {f"d{name}": g for name, g in zip(learnt, grads[1:], strict=True)}
    return found | {name: buffer.clone() for name, buffer in block.named_buffers() if buffer.is_floating_point()}


def off_the_kink(block: nn.Module, x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dy, zero where rounding decides whether the last ReLU passes it."""
    twin = copy.deepcopy(block).double()
    before = []
    twin.relu.register_forward_pre_hook(lambda module, args: before.append(args[0].clone()))
    with torch.no_grad():
        twin(x.double())
    return dy.masked_fill(before[-1].abs() < 16 * torch.finfo(dtype).eps, 0.0)


@STAGES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype, stage, launched, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # else float32 convolutions are all cuDNN's
    torch.manual_seed(5)
    stock = lively(BLOCKS[name]()).to(memory_format=torch.channels_last)
    fast = optimize(copy.deepcopy(stock), backend="triton", train_stage=stage, strict=True)
    x = draw((2, stock.conv1.in_channels, 6, 6), torch.float32, "channels_last")
    size = 6 // stock.stride
    dy = draw(
        (2, stock._modules["bn2" if isinstance(stock, BasicBlock) else "bn3"].num_features, size, size), torch.float32
    )
    dy = off_the_kink(stock, x, dy, dtype)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast:
        ours, theirs = results(fast, x, dy), results(stock, x, dy)
    exact = results(copy.deepcopy(stock).double(), x.double(), dy.double())
    assert_all_match(ours, theirs, exact, compute_dtype=dtype)
    assert "bn_backward_reduce" in launched or stage == training.GRAM
    if name.startswith("bottleneck"):
        own = {training.LIBRARY: "bn_statistics", training.EPILOGUE: "conv_bn_act_pointer",
               training.PROLOGUE: "conv_prologue", training.GRAM: "outer"}  # fmt: skip
        assert own[stage] in launched
        assert ("gram_dgrad" in launched) == (stage == training.GRAM)
        assert stage == training.LIBRARY or "conv_bn_act_pointer" in launched


@STAGES
def test_the_same_bits_every_time(stage, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.manual_seed(5)
    block = optimize(lively(bottleneck(2)).train(), backend="triton", train_stage=stage, strict=True)
    x = draw((2, 32, 6, 6), torch.float32, "channels_last")
    dy = torch.ones(2, 64, 3, 3)
    twin = copy.deepcopy(block)
    first, second = results(block, x, dy), results(twin, x, dy)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_stem(launched):
    torch.manual_seed(5)
    stock = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    for name in ("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"):
        setattr(stock, name, nn.Identity())
    stock = lively(stock.train().to(memory_format=torch.channels_last))
    fast = copy.deepcopy(stock)
    from resnet_fast import FastResNet

    fast.__class__, fast.fast_backend = FastResNet, "triton"
    x = draw((2, 3, 20, 18), torch.float32, "channels_last")
    dy = draw((2, 64 * 5 * 5), torch.float32)
    found = [results(model, value, grad) for model, value, grad in (
        (fast, x, dy), (stock, x, dy), (copy.deepcopy(stock).double(), x.double(), dy.double()),
    )]  # fmt: skip
    assert_all_match(*found)
    assert {"bn_statistics", "pool", "pool_backward_reduce", "pool_backward_apply"} <= set(launched)
    assert not {"bn_apply", "bn_backward_reduce", "bn_backward_apply"} & set(launched)

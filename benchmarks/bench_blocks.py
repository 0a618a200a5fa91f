"""Whole residual blocks of ResNet-18 and ResNet-50, inference and training step (forward, backward, no optimizer).

pytest benchmarks/bench_blocks.py --benchmark-only --benchmark-group-by=param:name,param:dtype,func
"""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

import resnet_fast
from benchmarks.shapes import BATCH, DTYPES, IMAGE
from resnet_fast import numerics


def down(inplanes, planes, stride):
    return nn.Sequential(conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))


BLOCKS = {  # name -> (block, input channels, input size as a fraction of the image)
    "resnet18_layer1": (lambda: BasicBlock(64, 64), 64, 4),
    "resnet18_layer2_0": (lambda: BasicBlock(64, 128, 2, down(64, 128, 2)), 64, 4),
    "resnet50_layer1": (lambda: Bottleneck(256, 64), 256, 4),
    "resnet50_layer2_0": (lambda: Bottleneck(256, 128, 2, down(256, 512, 2)), 256, 4),
    "resnet50_layer3": (lambda: Bottleneck(1024, 256), 1024, 16),
    "resnext50_layer2": (lambda: Bottleneck(512, 128, groups=32, base_width=4), 512, 8),
}

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")),
    pytest.mark.parametrize("name", BLOCKS),
]


def build(name, contender):
    torch.manual_seed(0)
    make, channels, fraction = BLOCKS[name]
    block = make().to(memory_format=torch.channels_last)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
    size = max(1, IMAGE // fraction)
    x = torch.randn(BATCH, channels, size, size).contiguous(memory_format=torch.channels_last)
    if contender != "eager":
        resnet_fast.optimize(block, backend=contender, strict=True)
    return block, x


def forward(block, x, dtype):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return block(x)


@torch.no_grad()
def gate(name, contender, dtype, training):
    """AssertionError unless the output is as near to float64 as eager PyTorch's."""
    outputs = []
    for which in (contender, "eager"):
        block, x = build(name, which)
        outputs.append(forward(block.train(training), x, dtype))
    block, x = build(name, "eager")
    exact = copy.deepcopy(block).double().train(training)(x.double())
    numerics.assert_match(numerics.compare("output", *outputs, exact))


def test_infer(name, dtype, contender, timed):
    gate(name, contender, dtype, training=False)
    block, x = build(name, contender)
    block.eval()

    @torch.no_grad()
    def step():
        forward(block, x, dtype)

    timed(step, contender, dtype)


def test_train(name, dtype, contender, timed):
    gate(name, contender, dtype, training=True)
    block, x = build(name, contender)
    block.train()
    x.requires_grad_()

    def step():
        block.zero_grad()
        forward(block, x, dtype).sum().backward()

    timed(step, contender, dtype)

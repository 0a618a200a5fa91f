"""Backend triton by its ops, as users reach it: functional, blocks, opcheck, torch.compile; gradients too."""

import copy

import pytest
import stock
import torch
from cases import BN_CASES, CONV_CASES, LAYOUTS, bn_case, conv_case, draw, named
from models import count_fused_calls, lively
from numerics import assert_all_match
from test_shortcut import CASES as SHORTCUT_CASES
from test_shortcut import arguments, double, eager, stages
from torch import nn
from torch.library import opcheck
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import functional, optimize
from resnet_fast.backends import triton
from resnet_fast.kernels.configs import TmaConfig
from resnet_fast.kernels.selection import Choice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.resnet_fast


@pytest.fixture
def kernels(monkeypatch):
    """The names of the kernels launched while the test runs."""
    launched = []
    module = triton.launcher()
    original = module.launch

    def launch(kernel, *args):
        launched.append(kernel.__name__)
        return original(kernel, *args)

    monkeypatch.setattr(module, "launch", launch)
    return launched


def check(op, tensors, case, dtype):
    keywords = {"act": "relu" if case.relu else None, "eps": 1e-3, **getattr(case, "geometry", {})}
    function = getattr(stock, op)
    tensors = stock.off_the_kink(function, tensors, **keywords)
    ours = stock.run(getattr(functional, op), tensors, backend="triton", **keywords)
    theirs = stock.run(function, tensors, **keywords)
    exact = stock.run(function, stock.double(tensors), **keywords)
    assert_all_match(ours, theirs, exact, dtype, stock.terms(function, tensors, **keywords))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named(BN_CASES))
def test_bn_act(case, layout, dtype, kernels):
    check("bn_act", bn_case(case, dtype, layout), case, dtype)
    assert set(kernels) == {"bn_act"}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named(CONV_CASES))
def test_conv_bn_act(case, layout, dtype):
    check("conv_bn_act", conv_case(case, dtype, layout), case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named(CONV_CASES))
def test_conv_bn_act_takes_one_kernel_where_it_can(case, layout, kernels):
    tensors = conv_case(case, torch.float16, layout)
    tensors.pop("dy")
    with torch.no_grad():
        functional.conv_bn_act(**tensors, backend="triton", **case.geometry)
    one_kernel = layout == "channels_last" and case.groups == 1 and not case.unaligned
    if case.name not in ("one_channel", "spatial_1x1", "unaligned_view"):  # their memory format is both
        assert kernels == ["conv_bn_act_pointer" if one_kernel else "bn_act"]
    assert len(kernels) == 1


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHORTCUT_CASES)
def test_conv_bn_shortcut_act(name, layout, dtype, kernels):
    x, main, shortcut, branch, act = stages(name, dtype, layout)
    with torch.no_grad():
        ours = functional.conv_bn_shortcut_act(x, main, shortcut, branch, act=act, backend="triton")
        theirs = eager(x, main, shortcut, branch, act)
        exact = eager(*(double(each) for each in (x, main, shortcut, branch)), act)
    assert_all_match({"y": ours}, {"y": theirs}, {"y": exact})
    if layout == "channels_last" and main.groups == 1:
        assert kernels == ["conv_bn_act_pointer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    opcheck(
        OPS.conv_bn_shortcut_act.default, arguments(*stages("bottleneck_stride2", dtype, "channels_last"), "triton")
    )
    tensors = conv_case(CONV_CASES[2], dtype, "channels_last")
    vectors = [tensors[name] for name in ("weight", "bias", "running_mean", "running_var")]
    args = (tensors["x"], tensors["conv_weight"], None, *vectors, tensors["residual"], [1, 1], [1, 1], [1, 1], 1)
    opcheck(OPS.conv_bn_act.default, (*args, 1e-5, True, "triton"))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_blocks_in_eval(block, kernels):
    torch.manual_seed(1)
    downsample = nn.Sequential(nn.Conv2d(8, 4 * block.expansion, 1, 2, bias=False), nn.BatchNorm2d(4 * block.expansion))
    model = lively(nn.Sequential(block(8, 4, 2, downsample))).eval().to(memory_format=torch.channels_last)
    x = draw((2, 8, 6, 6), torch.float32, "channels_last")
    fast = optimize(copy.deepcopy(model), backend="triton", strict=True)
    with torch.no_grad(), count_fused_calls() as calls:
        ours, theirs, exact = fast(x), model(x), copy.deepcopy(model).double()(x.double())
    assert_all_match({"y": ours}, {"y": theirs}, {"y": exact})
    convolutions = 2 + block.expansion // 4 + 1
    assert calls() == convolutions
    assert kernels == ["conv_bn_act_pointer"] * (convolutions - 1)  # the downsample is inside the last


def test_compile_fullgraph():
    tensors = conv_case(CONV_CASES[0], torch.float32, "channels_last")
    tensors.pop("dy")

    def function(tensors):
        return functional.conv_bn_act(**tensors, backend="triton", **CONV_CASES[0].geometry)

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tensors), function(tensors))


def test_descriptors_of_unaligned_inputs(monkeypatch, kernels):
    """A view that starts between two 16-byte addresses: copied for the descriptor, right all the same."""
    config = TmaConfig((2, 4, 4), 64, 64, 4, 3)
    monkeypatch.setattr(triton.selection, "choose", lambda problem, gpu: Choice(config, "tuned"))
    x, residual = (draw((2, 64, 5, 5), torch.float16, "channels_last", unaligned=True) for _ in range(2))
    weight = draw((64, 64, 3, 3), torch.float16, "channels_last", unaligned=True, scale=0.05)
    statistics = torch.zeros(64), torch.ones(64)
    assert x.data_ptr() % 16
    ours = functional.conv_bn_act(x, weight, *statistics, residual=residual, padding=1, backend="triton")
    theirs = stock.conv_bn_act(x, weight.half(), *(s.half() for s in statistics), residual=residual, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert kernels == ["conv_bn_act_tma"]

"""The direct convolution of an image with the max-pool behind it: alone, in frozen networks, in a stem in eval mode."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import CPU, draw
from models import lively
from numerics import assert_matches
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fast import cpus, freeze, optimize
from resnet_fast.backends import direct, units
from resnet_fast.frozen import FrozenConv2d
from resnet_fast.kernels import selection

pytestmark = pytest.mark.usefixtures("native", "unmeasured_cpu")

CONVS = {  # x, weight, stride, padding, dilation
    "7x7": ((2, 3, 61, 45), (64, 3, 7, 7), (2, 2), (3, 3), (1, 1)),
    "3x3": ((3, 3, 20, 33), (64, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    "gray": ((1, 1, 36, 20), (70, 1, 5, 3), (1, 2), (2, 0), (1, 1)),
    "one_row": ((2, 4, 3, 30), (64, 4, 3, 3), (2, 1), (0, 1), (1, 1)),
    "one_pixel": ((2, 3, 3, 3), (64, 3, 3, 3), (1, 1), (0, 0), (1, 1)),
    "dilated": ((1, 3, 24, 20), (64, 3, 3, 3), (1, 1), (2, 2), (2, 2)),
    "many_channels": ((2, 40, 13, 12), (64, 40, 3, 3), (1, 1), (1, 1), (1, 1)),
}
DTYPES = torch.float32, torch.float64


def op(x, weight, scale, bias, *geometry):
    packed = direct.pack(weight)
    return torch.ops.resnet_fast_native.direct_conv_max_pool(x, packed, len(weight), scale, bias, *geometry)


def pooled(y):
    """In channels_last, which PyTorch takes a gray image's for no layout of its own."""
    return F.max_pool2d(y.contiguous(memory_format=torch.channels_last).relu(), 3, 2, 1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", CONVS)
def test_as_near_to_float64_as_pytorch(name, layout):
    shape, weight_shape, *geometry = CONVS[name]
    x, weight = draw(shape, torch.float32, layout), draw(weight_shape, torch.float32)
    scale, bias = (draw((len(weight),), torch.float32) for _ in range(2))
    rows = x.contiguous(memory_format=torch.channels_last)

    def plain(dtype):
        y = F.conv2d(rows.to(dtype), weight.to(dtype), None, *geometry)
        return pooled(y * scale.to(dtype)[:, None, None] + bias.to(dtype)[:, None, None])

    y = op(x, weight, scale, bias, *geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_matches("y", y, *(plain(dtype) for dtype in DTYPES))
    stock, exact = (pooled(F.conv2d(rows.to(dtype), weight.to(dtype), None, *geometry)) for dtype in DTYPES)
    assert_matches("alone", op(x, weight, None, None, *geometry), stock, exact)


@pytest.mark.parametrize("name", CONVS)
def test_it_is_the_convolution_pooled_at_any_number_of_threads(name):
    """Bands of rows, which threads share out, are as high as there are threads for."""
    shape, weight_shape, *geometry = CONVS[name]
    x, weight = draw(shape, torch.float32, "channels_last"), draw(weight_shape, torch.float32)
    y = torch.ops.resnet_fast_native.direct_conv(x, weight, None, None, None, *geometry, True)
    for threads in (1, 2, 3, 5, 16):
        torch.set_num_threads(threads)
        assert torch.equal(op(x, weight, None, None, *geometry), F.max_pool2d(y, 3, 2, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_where_pytorch_lets_it_go(value):
    shape, weight_shape, *geometry = CONVS["7x7"]
    x, weight = draw(shape, torch.float32, "channels_last"), draw(weight_shape, torch.float32)
    x[1, 2, 30, 40] = value
    expected, y = pooled(F.conv2d(x, weight, None, *geometry)), op(x, weight, None, None, *geometry)
    assert expected.isnan().any() or expected.isinf().any()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_no_images():
    shape, weight_shape, *geometry = CONVS["7x7"]
    y = op(torch.empty(0, *shape[1:]), torch.empty(weight_shape), None, None, *geometry)
    assert y.shape == (0, 64, 16, 12)


def test_bad_input_is_an_error_that_says_so():
    x, packed, geometry = torch.zeros(2, 3, 8, 8), direct.pack(torch.zeros(64, 3, 7, 7)), ((2, 2), (3, 3), (1, 1))
    call = torch.ops.resnet_fast_native.direct_conv_max_pool
    with pytest.raises(RuntimeError, match="x must be 4-D and float32"):
        call(x.double(), packed, 64, None, None, *geometry)
    with pytest.raises(RuntimeError, match=r"what direct_pack made of a weight \(65, 3, R, S\), not"):
        call(x, packed, 65, None, None, *geometry)
    with pytest.raises(RuntimeError, match=r"scale must be float32 and \[64\]"):
        call(x, packed, 64, torch.zeros(3), None, *geometry)
    with pytest.raises(RuntimeError, match="the kernel is larger than x"):
        call(x, packed, 64, None, None, (2, 2), (0, 0), (3, 3))


@pytest.fixture
def avx2(unmeasured_cpu, monkeypatch) -> None:
    """A CPU that nothing is measured on and that has no more."""
    if units.has_tiles():
        pytest.skip("AMX computes stems here")
    monkeypatch.setattr(cpus, "here", lambda: replace(CPU, isa="AVX2"))
    selection.forget()


def network() -> ResNet:
    return lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).eval().to(memory_format=torch.channels_last)


def run(model, x) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_frozen_network(layout):
    model, x = network(), draw((2, 3, 75, 64), torch.float32, layout)
    frozen = freeze(copy.deepcopy(model))
    kept = x.clone()
    assert_matches("logits", run(frozen, x), run(model, x), run(copy.deepcopy(model).double(), x.double()))
    assert torch.equal(x, kept)
    stems = [module for module in frozen.modules() if isinstance(module, FrozenConv2d)]
    assert stems[0].kernel == "direct"


@pytest.mark.usefixtures("avx2")
def test_a_frozen_network_whose_stem_somebody_watches():
    """Then the convolution and the max-pool are calls of their own."""
    model, x = network(), draw((2, 3, 75, 64), torch.float32, "channels_last")
    frozen, seen = freeze(copy.deepcopy(model)), []
    in_one = run(frozen, x)
    frozen.maxpool.register_forward_hook(lambda module, args, y: seen.append(y))
    assert torch.equal(run(frozen, x), in_one)
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    assert_matches("pooled", seen[0], run(stem, x), run(copy.deepcopy(stem).double(), x.double()))


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("x_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_an_optimized_network_in_eval_mode(layout, x_layout, monkeypatch):
    """channels_last weights or images make PyTorch's activations channels_last, which the kernel takes."""
    model, x = network().to(memory_format=layout), draw((2, 3, 75, 64), torch.float32, x_layout)
    fast, calls = optimize(copy.deepcopy(model)), []
    computes = direct.computes_stem
    monkeypatch.setattr(direct, "computes_stem", lambda *call: calls.append(computes(*call)) or calls[-1])
    for _ in range(2):
        exact = run(copy.deepcopy(model).double(), x.double())
        assert_matches("logits", run(fast, x), run(model, x), exact)
        for each in (fast, model):
            each.conv1.weight.data.mul_(2)
    assert calls == [True, True]
    fast = optimize(copy.deepcopy(model), backend="reference")
    assert_matches("reference", run(fast, x), run(model, x), run(copy.deepcopy(model).double(), x.double()))
    assert calls == [True, True]


@pytest.mark.usefixtures("avx2")
def test_what_a_stem_is_not_computed_by_it():
    x, weight, geometry = torch.empty(2, 3, 75, 64), torch.empty(64, 3, 7, 7), (2, 2, 3, 3, 1, 1, 1)
    assert direct.computes_stem(x, weight, geometry)
    assert not direct.computes_stem(x.bfloat16(), weight.bfloat16(), geometry)
    assert not direct.computes_stem(x, weight.bfloat16(), geometry)
    assert not direct.computes_stem(x, weight[:63], geometry)
    assert not direct.computes_stem(x, weight, (2, 2, 3, 3, 2, 2, 1))

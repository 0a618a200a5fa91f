"""float32 Winograd where weights may change: optimized blocks in eval mode, training's forward and both gradients."""

import copy

import pytest
import torch
from cases import CPU, draw
from models import lively
from numerics import assert_all_match, assert_match, assert_matches, compare
from test_primitives import draw_norm
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, resnet18

from resnet_fast import optimize
from resnet_fast.backends import native as native_backend
from resnet_fast.backends import units, winograd
from resnet_fast.backends.primitives import Geometry, reference
from resnet_fast.backends.primitives import native as native_primitives
from resnet_fast.kernels import selection
from resnet_fast.kernels.configs import WinogradConfig
from resnet_fast.numerics import K_WHOLE_GRADIENT
from resnet_fast.problems import ConvProblem, WeightGradientProblem
from resnet_fast.shapes import Conv

pytestmark = pytest.mark.usefixtures("native", "unmeasured_cpu")

SHAPES = {  # x, output channels
    "layer1": ((2, 64, 56, 56), 64),
    "layer2": ((4, 128, 28, 28), 128),
    "layer3": ((8, 256, 14, 14), 256),
    "layer4": ((16, 512, 7, 7), 512),
    "odd_everything": ((17, 67, 9, 11), 70),
    "one_row_of_tiles": ((17, 64, 7, 37), 96),
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SAME = Geometry([1, 1], [1, 1], [1, 1], 1)


def activation(shape) -> torch.Tensor:
    """Nothing negative, which makes long sums of one sign."""
    return draw(shape, torch.float32, "channels_last").relu()


def weight_gradient(dy, x, weight):
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry)[1]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_weights_gradient_is_as_near_to_float64_as_pytorchs(name, layout):
    shape, outputs = SHAPES[name]
    x, dy = activation(shape), draw((shape[0], outputs, *shape[2:]), torch.float32, "channels_last")
    weight = draw((outputs, shape[1], 3, 3), torch.float32, layout)
    dweight = winograd.weight_gradient(dy, x, None, weight)
    assert dweight.is_contiguous(memory_format=LAYOUTS[layout])
    stock = weight_gradient(dy, x, weight).contiguous(memory_format=LAYOUTS[layout])
    assert_matches(name, dweight, stock, weight_gradient(dy.double(), x.double(), weight.double()))


def by_op(x, weight, scale=None, bias=None, residual=None, relu=False, turned=False):
    y, finite = torch.ops.resnet_fast_native.winograd_conv(x, weight, scale, bias, residual, relu, turned)
    assert finite
    return y


WEIGHTS = {  # (K, C), images: by slabs, all together, and these packed part by part
    "slabs": ((70, 67), 9),
    "together": ((64, 66), 2),
    "part_by_part": ((200, 131), 1),
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("layout", [*LAYOUTS, "strided"])
@pytest.mark.parametrize("turned", [False, True], ids=["straight", "turned"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_any_layout(name, turned, layout):
    """With a scale as batch norm folds in, and for the gradient of x."""
    sizes, images = WEIGHTS[name]
    shape = (*sizes, 3, 3)
    weight = draw(shape, torch.float32, layout) if layout in LAYOUTS else draw((*sizes, 3, 5), torch.float32)[..., 1:4]
    outputs, channels = sizes[::-1] if turned else sizes
    scale, x = draw((outputs,), torch.float32), draw((images, channels, 19, 12), torch.float32, "channels_last")

    def plain(dtype):
        kernel = weight.to(dtype)
        kernel = kernel.transpose(0, 1).flip(2, 3) if turned else kernel
        return F.conv2d(x.to(dtype), kernel, padding=1) * scale.to(dtype)[:, None, None]

    assert_matches("y", by_op(x, weight, scale, turned=turned), plain(torch.float32), plain(torch.float64))


@pytest.mark.parametrize("name", WEIGHTS)
def test_packed_once_or_in_every_call_is_the_same_to_a_bit(name):
    (outputs, channels), images = WEIGHTS[name]
    weight, bias = draw((outputs, channels, 3, 3), torch.float32), draw((outputs,), torch.float32)
    x = draw((images, channels, 19, 12), torch.float32, "channels_last")
    residual = draw((images, outputs, 19, 12), torch.float32, "channels_last")
    packed = winograd.conv_packed(x, winograd.pack(weight), bias, outputs, residual, relu=True)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(by_op(x, weight, None, bias, residual, relu=True), packed)


@pytest.mark.parametrize("name", ["layer3", "odd_everything"])
def test_thread_count_changes_no_bit(name):
    shape, outputs = SHAPES[name]
    x, dy = activation(shape), draw((shape[0], outputs, *shape[2:]), torch.float32, "channels_last")
    weight, results = draw((outputs, shape[1], 3, 3), torch.float32), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((winograd.weight_gradient(dy, x, None, weight), winograd.pack(weight)))
    for dweight, packed in results[1:]:
        assert torch.equal(dweight, results[0][0])
        assert torch.equal(packed, results[0][1])


def pending(name: str):
    """x with a norm pending on it, a weight, and a gradient."""
    shape, outputs = SHAPES[name]
    x, dy = (draw((shape[0], channels, *shape[2:]), torch.float32, "channels_last") for channels in (shape[1], outputs))
    return x.add_(0.5), draw_norm(shape[1], torch.float32), draw((outputs, shape[1], 3, 3), torch.float32), dy


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", SHAPES)
def test_a_norm_that_is_pending_is_applied_to_a_bit(name):
    x, norm, weight, dy = pending(name)
    applied = native_primitives.apply(x, norm)
    conv_out, mean, var = winograd.conv(x, norm, weight, False)
    assert (mean, var) == (None, None)
    assert torch.equal(conv_out, winograd.conv(applied, None, weight, False)[0])
    gradient = winograd.weight_gradient(dy, x, norm, weight)
    assert torch.equal(gradient, winograd.weight_gradient(dy, applied, None, weight))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", [*SHAPES, "few_tiles"])
def test_statistics_are_as_near_to_float64_as_pytorchs(name, monkeypatch):
    monkeypatch.setitem(SHAPES, "few_tiles", ((3, 64, 9, 13), 96))
    x, norm, weight, _ = pending(name)
    conv_out, *statistics = winograd.conv(x, norm, weight, True)
    assert torch.equal(conv_out, winograd.conv(x, norm, weight, False)[0])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for ours, same in zip((conv_out, *statistics), winograd.conv(x, norm, weight, True), strict=True):
            assert torch.equal(ours, same)
    judged = [dict(zip(("mean", "var"), statistics, strict=True))]
    for raw in (conv_out, conv_out.double()):
        judged.append(dict(zip(("mean", "var"), reference.batch_statistics(raw), strict=True)))
    assert_all_match(*judged)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("into", ["x", "dy"])
def test_a_weights_gradient_that_is_not_finite_is_none(into, value):
    tensors = {name: draw((8, 64, 14, 14), torch.float32, "channels_last") for name in ("x", "dy")}
    tensors[into][3, 5, 13, 13] = value
    assert winograd.weight_gradient(tensors["dy"], tensors["x"], None, torch.zeros(64, 64, 3, 3)) is None


def test_what_does_not_belong_together_raises():
    x, dy = torch.zeros(2, 64, 8, 8), torch.zeros(2, 32, 8, 8)
    with pytest.raises(RuntimeError, match="not of one 3x3 convolution"):
        winograd.weight_gradient(dy, x, None, torch.zeros(64, 64, 3, 3))
    with pytest.raises(RuntimeError, match="float32"):
        winograd.weight_gradient(dy.double(), x, None, torch.zeros(32, 64, 3, 3))
    with pytest.raises(RuntimeError, match="an element an output"):
        by_op(x, torch.zeros(64, 64, 3, 3), torch.zeros(32))
    with pytest.raises(RuntimeError, match="not of one convolution"):
        winograd.conv(x, None, torch.zeros(64, 32, 3, 3), False)
    with pytest.raises(RuntimeError, match=r"\(K, C, 3, 3\)"):
        winograd.pack(torch.zeros(64, 64, 1, 1))


def test_no_image_has_no_gradient():
    dweight = winograd.weight_gradient(
        torch.zeros(0, 64, 8, 8), torch.zeros(0, 64, 8, 8), None, torch.ones(64, 64, 3, 3)
    )
    assert torch.equal(dweight, torch.zeros(64, 64, 3, 3))


BLOCKS = {
    "basic": (lambda: BasicBlock(64, 64), (8, 64, 20, 21), (0, 1)),
    "downsample": (
        lambda: BasicBlock(
            64, 128, 2, torch.nn.Sequential(torch.nn.Conv2d(64, 128, 1, 2, bias=False), torch.nn.BatchNorm2d(128))
        ),
        (8, 64, 40, 41),
        (1,),
    ),
    "bottleneck": (lambda: Bottleneck(256, 64), (8, 256, 20, 21), (1,)),
}


@pytest.fixture
def ran(monkeypatch):
    """Names of what Winograd was called for, in order; a block in eval mode by its layers."""
    calls = []
    for name in ("conv", "data_gradient", "weight_gradient"):
        original = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *call, f=original, name=name: calls.append(name) or f(*call))
    block = native_backend.cpu_residual_block
    monkeypatch.setattr(native_backend, "cpu_residual_block", lambda *call: calls.append(call[-3]) or block(*call))
    if units.has_tiles():
        pytest.skip("AMX computes blocks here")
    return calls


def block_of(name: str):
    make, shape, layers = BLOCKS[name]
    block = lively(make()).to(memory_format=torch.channels_last)
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return block, activation(shape), layers


@pytest.mark.parametrize("name", BLOCKS)
def test_an_optimized_block_in_eval_mode(name, ran):
    stock, x, layers = block_of(name)
    stock.eval()
    fast = optimize(copy.deepcopy(stock))
    with torch.no_grad():
        assert_matches("y", fast(x), stock(x), copy.deepcopy(stock).double()(x.double()))
        assert ran == [layers]
        fast.conv2.weight.mul_(2)
        stock.conv2.weight.mul_(2)
        assert_matches("changed", fast(x), stock(x), copy.deepcopy(stock).double()(x.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_block_of_what_is_not_finite_is_pytorchs(value, ran):
    stock, x, layers = block_of("basic")
    stock.eval()
    fast = optimize(copy.deepcopy(stock))
    x[1, 3, 7, 7] = value
    with torch.no_grad():
        assert_matches("y", fast(x), stock(x), copy.deepcopy(stock).double()(x.double()))
    assert ran == [layers]


def learn(block, x, dy) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(dy.to(y.dtype))
    grads = {f"d{name}": parameter.grad for name, parameter in block.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_learns(name, ran):
    stock, x, layers = block_of(name)
    fast, wide = optimize(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    with torch.no_grad():
        dy = draw(stock(x).shape, torch.float32, "channels_last")
    ours, theirs, exact = learn(fast, x, dy), learn(stock, x, dy), learn(wide, x.double(), dy)
    assert sorted(ran) == sorted(["conv", "data_gradient", "weight_gradient"] * len(layers))
    sums = [name for name in ours if "bn" in name or "downsample.1" in name]
    assert_all_match(ours, theirs, exact, terms=dict.fromkeys(sums, float(dy.norm())))


def test_a_step_with_nan_gives_what_pytorch_gives(ran):
    stock, x, _ = block_of("basic")
    x[0, 0, 0, 0] = float("nan")
    fast = optimize(copy.deepcopy(stock))
    dy = torch.ones_like(x)
    ours, theirs = learn(fast, x, dy), learn(stock, x, dy)
    assert "conv" in ran
    for name, value in ours.items():
        assert torch.equal(value.isnan(), theirs[name].isnan()), name


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_last_takes_it_unless_reference_is_asked_for(layout, backend, ran):
    stock, x, _ = block_of("basic")
    fast = optimize(stock.to(memory_format=LAYOUTS[layout]), backend=backend)
    fast(x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()).sum().backward()
    taken = layout == "channels_last" and backend != "reference"
    assert ran == (["conv", "conv", *["data_gradient", "weight_gradient"] * 2] if taken else [])


def test_half_types_and_other_convolutions_are_the_librarys():
    x, weight = torch.empty(8, 64, 28, 28), torch.empty(64, 64, 3, 3)
    for takes in (winograd.takes, winograd.takes_data_gradient, winograd.takes_weight_gradient):
        assert takes(x, weight, SAME)
        assert not takes(x.half(), weight.half(), SAME)
        assert takes(x.bfloat16(), weight.bfloat16(), SAME) == winograd.by_dots(torch.bfloat16)
        for field, value in (("stride", [2, 2]), ("padding", [0, 0]), ("dilation", [2, 2]), ("groups", 2)):
            assert not takes(x, weight, SAME._replace(**{field: value}))
        assert not takes(x[:, :32], weight[:, :32], SAME)
    assert winograd.takes(x[:3], weight, SAME)
    assert not winograd.takes_weight_gradient(x[:3], weight, SAME)  # of too few rows


def test_why_not_says_so():
    few = WeightGradientProblem(Conv(3, 64, 28, 28, 64, (3, 3), padding=(1, 1)), "float32")
    assert "fewer than 112 rows" in selection.choose(few, CPU).reason
    live = ConvProblem(Conv(1, 64, 20, 20, 70, (3, 3), padding=(1, 1)), "float32", folded=False)
    assert "25 tiles of 4x4; unmeasured, winograd is taken from 48 on" in selection.choose(live, CPU).reason
    folded = ConvProblem(live.conv, "float32")
    assert selection.choose(folded, CPU).config == WinogradConfig()


def test_choices_are_forgotten_with_the_tables(monkeypatch):
    x, weight = torch.empty(8, 64, 28, 28), torch.empty(64, 64, 3, 3)
    assert winograd.takes(x, weight, SAME)
    monkeypatch.setattr(winograd, "why_not", lambda: "no vectors for the test")
    assert winograd.takes(x, weight, SAME)
    selection.forget()
    assert not winograd.takes(x, weight, SAME)


def test_a_networks_gradient(ran):
    """Of all weights of a small ResNet-18, most of whose 3x3s and their gradients are Winograd's."""
    torch.manual_seed(1)
    stock = lively(resnet18(num_classes=5)).to(memory_format=torch.channels_last).train()
    x, wide = draw((16, 3, 64, 64), torch.float32, "channels_last"), copy.deepcopy(stock).double()
    fast = optimize(copy.deepcopy(stock))

    def gradient(model, x):
        model(x).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    found = compare("gradient", gradient(fast, x), gradient(stock, x), gradient(wide, x.double()), k=K_WHOLE_GRADIENT)
    assert_match(found)
    assert ran.count("weight_gradient") >= 6

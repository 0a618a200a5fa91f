"""FastBasicBlock and FastBottleneck beside torchvision's: every constructor variant, training and eval."""

import copy

import pytest
import torch
from cases import LAYOUTS, draw
from models import assert_trains_alike, count_fused_calls, lively, pair
from numerics import assert_all_match
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import FastBasicBlock, FastBottleneck


def down(inplanes, planes, stride=1, norm_layer=nn.BatchNorm2d):
    return nn.Sequential(conv1x1(inplanes, planes, stride), norm_layer(planes))


def no_affine(planes):
    return nn.BatchNorm2d(planes, affine=False)


def no_statistics(planes):
    return nn.BatchNorm2d(planes, track_running_stats=False)


def cumulative(planes):
    return nn.BatchNorm2d(planes, momentum=None)


def loud(planes):
    return nn.BatchNorm2d(planes, eps=1e-2, momentum=0.7)


def frozen(planes):
    return FrozenBatchNorm2d(planes, eps=1e-3)


BLOCKS = {
    "basic": lambda: BasicBlock(8, 8),
    "basic_stride2": lambda: BasicBlock(8, 12, stride=2, downsample=down(8, 12, 2)),
    "basic_widened": lambda: BasicBlock(8, 12, downsample=down(8, 12)),
    "basic_cumulative": lambda: BasicBlock(8, 8, norm_layer=cumulative),
    "basic_no_affine": lambda: BasicBlock(8, 8, norm_layer=no_affine),
    "basic_no_statistics": lambda: BasicBlock(8, 8, norm_layer=no_statistics),
    "basic_frozen": lambda: BasicBlock(8, 8, norm_layer=frozen),
    "bottleneck": lambda: Bottleneck(16, 4),
    "bottleneck_stride2": lambda: Bottleneck(16, 8, stride=2, downsample=down(16, 32, 2)),
    "bottleneck_grouped": lambda: Bottleneck(32, 8, groups=4, base_width=32),
    "bottleneck_wide": lambda: Bottleneck(16, 4, base_width=128),
    "bottleneck_dilated": lambda: Bottleneck(16, 4, dilation=2),
    "bottleneck_odd": lambda: Bottleneck(20, 5, stride=2, downsample=down(20, 20, 2)),
    "bottleneck_cumulative": lambda: Bottleneck(16, 4, norm_layer=cumulative, downsample=down(16, 16, 1, cumulative)),
    "bottleneck_loud": lambda: Bottleneck(16, 4, norm_layer=loud),
    "bottleneck_no_affine": lambda: Bottleneck(16, 4, norm_layer=no_affine),
    "bottleneck_no_statistics": lambda: Bottleneck(16, 4, norm_layer=no_statistics),
    "bottleneck_frozen": lambda: Bottleneck(16, 8, stride=2, downsample=down(16, 32, 2, frozen), norm_layer=frozen),
}


def block_pair(name, backend):
    torch.manual_seed(1)
    return pair(lively(BLOCKS[name]()).double(), backend)


def inputs(block, dtype=torch.float64, layout="channels_last", count=3):
    return [draw((3, block.conv1.in_channels, 7, 5), dtype, layout) for _ in range(count)]


@pytest.mark.parametrize("name", BLOCKS)
def test_training_three_steps(name, backend):
    stock_block, fast_block = block_pair(name, backend)
    with count_fused_calls() as calls:
        assert_trains_alike(stock_block.train(), fast_block.train(), inputs(stock_block))
    assert calls() >= 3 * len(fast_block._stages()), "the fused path must have run"


@pytest.mark.parametrize("name", BLOCKS)
def test_fine_tuning_in_eval_mode(name, backend):
    """Frozen statistics, trained weights."""
    stock_block, fast_block = block_pair(name, backend)
    assert_trains_alike(stock_block.eval(), fast_block.eval(), inputs(stock_block), steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["basic_stride2", "bottleneck_stride2", "bottleneck_grouped", "bottleneck_frozen"])
def test_eval_numerics(name, layout, dtype, backend):
    torch.manual_seed(1)
    exact_block, fast_block = pair(lively(BLOCKS[name]()).to(dtype).eval(), backend)
    stock_block, exact_block = copy.deepcopy(exact_block), exact_block.double()
    x = inputs(stock_block, dtype, layout, 1)[0]
    with torch.no_grad():
        results = [
            {"y": block(value)} for block, value in ((fast_block, x), (stock_block, x), (exact_block, x.double()))
        ]
    assert_all_match(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_gradient_and_its_layout(layout, backend):
    stock_block, fast_block = block_pair("bottleneck_stride2", backend)
    grads = []
    for block in (stock_block.train(), fast_block.train()):
        x = draw((2, 16, 6, 6), torch.float64, layout)
        torch.manual_seed(0)
        x = draw((2, 16, 6, 6), torch.float64, layout).requires_grad_()
        grads += torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)
    assert grads[0].stride() == grads[1].stride()


def test_double_backward(backend):
    """A gradient penalty trains the same."""
    stock_block, fast_block = block_pair("basic_stride2", backend)
    results = []
    for block in (stock_block.train(), fast_block.train()):
        torch.manual_seed(0)
        x = draw((2, 8, 5, 5), torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), list(block.parameters())))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast(training, backend):
    torch.manual_seed(1)
    stock_block = lively(BLOCKS["bottleneck_stride2"]()).train(training)
    exact_block = copy.deepcopy(stock_block).double()
    _, fast_block = pair(stock_block, backend)
    x = inputs(stock_block, torch.float32, count=1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ({"y": block(x)} for block in (fast_block, stock_block))
    assert_all_match(ours, theirs, {"y": exact_block(x.double())})
    assert ours["y"].dtype == torch.bfloat16
    if training:
        for name in ("bn1.running_mean", "bn3.running_var", "downsample.1.running_var"):
            buffers = [block.state_dict()[name] for block in (fast_block, stock_block, exact_block)]
            assert_all_match(*({name: buffer} for buffer in buffers), torch.bfloat16)


@pytest.mark.parametrize(("fast", "stock"), [(FastBasicBlock, BasicBlock), (FastBottleneck, Bottleneck)])
def test_resnet_is_built_from_fast_blocks(fast, stock, backend, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", backend)
    models = []
    for block in (fast, stock):
        torch.manual_seed(0)
        models.append(ResNet(block, [1, 1, 1, 1], num_classes=7, zero_init_residual=True).double())
    ours, theirs = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    last = ours.layer1[0].bn3 if fast is FastBottleneck else ours.layer1[0].bn2
    assert last.weight.count_nonzero() == 0, "torchvision's zero-init must recognise the block"
    x = draw((2, 3, 33, 33), torch.float64)
    with count_fused_calls() as calls:
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)
    assert calls() > 0


class Doubled(FastBottleneck):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_subclass_is_fused_inside_and_left_as_it_is(training, backend):
    """Of a fast class: its layers are where its parent's are, and what it does with them is not known."""
    torch.manual_seed(1)
    fast = lively(Doubled(16, 8, downsample=down(16, 32))).double().train(training)
    fast.fast_backend = backend
    stock = lively(Bottleneck(16, 8, downsample=down(16, 32))).double().train(training)
    stock.load_state_dict(fast.state_dict())
    x = draw((3, 16, 7, 7), torch.float64)
    with count_fused_calls() as calls:
        torch.testing.assert_close(fast(x), 2 * stock(x))
    assert calls() >= 1
    last = lively(Bottleneck(32, 8)).double()
    network, expected = nn.Sequential(fast, last).eval(), 2 * stock.eval()(x)
    for changed in (resnet_fast.optimize(copy.deepcopy(network)), resnet_fast.freeze(network)):
        assert [type(module) for module in changed.modules()].count(Doubled) == 1
        torch.testing.assert_close(changed(x), last(expected))


@pytest.mark.parametrize("fast", [FastBasicBlock, FastBottleneck])
def test_same_constructor_errors(fast):
    [stock] = [stock for stock, known in resnet_fast.blocks.FAST.items() if known is fast]
    for arguments in ({"groups": 0}, {"norm_layer": 3}, {"dilation": 2, "stride": "a"}):
        outcomes = []
        for block in (fast, stock):
            try:
                block(16, 4, **arguments)
            except Exception as error:
                outcomes.append((type(error), str(error)))
            else:
                outcomes.append(None)
        assert outcomes[0] == outcomes[1]


def test_num_batches_tracked_counts_empty_batches_too(backend):
    stock_block, fast_block = block_pair("basic_stride2", backend)
    fast_block.fast_strict = False
    for block in (stock_block.train(), fast_block.train()):
        block(torch.empty(0, 8, 6, 6, dtype=torch.float64)).sum().backward()
    for name, buffer in stock_block.named_buffers():
        assert torch.equal(buffer, fast_block.state_dict()[name]), name
    assert fast_block.bn1.num_batches_tracked == 1
    for name, parameter in fast_block.named_parameters():
        assert parameter.grad.count_nonzero() == 0, name


def test_one_value_a_channel_raises_and_leaves_the_same_state(backend):
    stock_block, fast_block = block_pair("basic", backend)
    messages = []
    for block in (stock_block.train(), fast_block.train()):
        with pytest.raises(ValueError) as raised:
            block(torch.ones(1, 8, 1, 1, dtype=torch.float64))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert torch.equal(fast_block.bn1.running_mean, stock_block.bn1.running_mean)


@pytest.mark.parametrize("shape", [(3, 7, 5, 5), (7, 5, 5), (2, 3, 4, 5, 5)], ids=["channels", "rank3", "rank5"])
def test_wrong_inputs_raise_as_stock(shape, backend):
    stock_block, fast_block = block_pair("basic", backend)
    fast_block.fast_strict = False
    errors = []
    for block in (stock_block, fast_block):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            block(torch.ones(shape, dtype=torch.float64))
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


def test_input_is_not_changed_in_place(backend):
    _, fast_block = block_pair("basic", backend)
    x = inputs(fast_block, count=1)[0]
    before = x.clone()
    fast_block.train()(x).sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("x", [None, [1.0], "x"], ids=repr)
def test_what_is_no_tensor_raises_as_stock(x, backend):
    for module in (BasicBlock(8, 8), ResNet(BasicBlock, [1, 1, 1, 1])):
        fast = resnet_fast.optimize(nn.Sequential(module), backend=backend)
        with pytest.raises(TypeError, match="conv2d"):
            fast(x)


@torch.no_grad()
def test_a_downsample_in_place_changes_what_it_changes_in_stock(backend):
    """Its input is the block's, which the convolutions have read by then."""
    torch.manual_seed(1)
    stock = Bottleneck(16, 8, downsample=nn.Sequential(nn.ReLU(inplace=True), *down(16, 32)))
    stock = nn.Sequential(lively(stock)).double().eval()
    fast = resnet_fast.optimize(copy.deepcopy(stock), backend=backend)
    x = draw((3, 16, 7, 7), torch.float64)
    torch.testing.assert_close(fast(x.clone()), stock(x.clone()))
    assert "in place" in fast[0].why_stock()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_geometry_of_one_number(training, backend):
    """As conv2d takes it; nn.Conv2d's constructor makes two of it."""
    torch.manual_seed(1)
    stock = lively(BasicBlock(8, 8)).double().train(training)
    stock.conv1.stride, stock.conv1.padding, stock.conv2.dilation = 1, [1], (1,)
    x = draw((3, 8, 7, 7), torch.float64)
    for name in (backend, "auto"):
        fast = resnet_fast.optimize(nn.Sequential(copy.deepcopy(stock)), backend=name)
        torch.testing.assert_close(fast(x), copy.deepcopy(stock)(x))


def test_statistics_over_processes_need_convolutions_without_bias():
    x, weight, ones = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3), torch.ones(4)
    layer = resnet_fast.functional.ConvBn(weight, ones, ones, conv_bias=ones, padding=1, training=True)
    with pytest.raises(ValueError, match="conv_bias"):
        resnet_fast.functional.residual_block(x, [layer], group="world")

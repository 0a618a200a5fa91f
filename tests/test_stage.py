"""Sequentials of residual blocks in eval: one call where the CPU has tiles or dot products, to the blocks' own bits."""

import copy
import gc
import pickle

import pytest
import torch
from cases import draw
from models import lively
from test_inference import downsample
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fast
from resnet_fast import optimize, restore, stage, twin
from resnet_fast.backends import native as native_backend
from resnet_fast.backends import units, winograd
from resnet_fast.blocks import FastBasicBlock
from resnet_fast.kernels import selection
from resnet_fast.kernels.winograd import why_not as why_not_winograd
from resnet_fast.stage import FastStage

pytestmark = [pytest.mark.amx, pytest.mark.usefixtures("native")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def bottlenecks(**settings) -> list[nn.Module]:
    first = Bottleneck(64, 32, 2, downsample(64, 128, 2), **settings)
    return [first, Bottleneck(128, 32, **settings), Bottleneck(128, 32, **settings)]


def between() -> list[nn.Module]:
    """Downsamples in the middle and at the end, of every kind."""
    pointwise, usual = (Bottleneck(128, 32, 1, downsample(128, 128, 1, kernel)) for kernel in (1, 3))
    return [Bottleneck(128, 32), pointwise, usual, BasicBlock(128, 64, 2, downsample(128, 64, 2, 3))]


STAGES = {  # images of more than 256 pixels are laid out one by one, smaller ones side by side
    "bottlenecks": (bottlenecks, (64, 35, 33)),
    "to_small": (bottlenecks, (64, 23, 17)),
    "small": (bottlenecks, (64, 9, 11)),
    "identity": (lambda: [Bottleneck(128, 32), Bottleneck(128, 32)], (128, 17, 19)),
    "basic": (lambda: [BasicBlock(64, 64), BasicBlock(64, 64)], (64, 17, 18)),
    "basic_stride2": (lambda: [BasicBlock(32, 64, 2, downsample(32, 64, 2)), BasicBlock(64, 64)], (32, 37, 34)),
    "between": (between, (128, 20, 19)),
    "narrow_groups": (lambda: bottlenecks(groups=8, base_width=64), (64, 36, 34)),
    "one": (lambda: [Bottleneck(128, 32)], (128, 18, 17)),
}


def pair(name: str, dtype=torch.float32) -> tuple[nn.Module, nn.Module, tuple[int, int, int]]:
    """The fast stage, an equal Sequential of equal blocks, which are one call each, and an image's shape."""
    make, image = STAGES[name]
    torch.manual_seed(3)
    blocks = lively(nn.Sequential(*make())).eval().to(dtype, memory_format=torch.channels_last)
    one_by_one = optimize(copy.deepcopy(blocks))
    one_by_one.__class__ = nn.Sequential
    return optimize(blocks), one_by_one, image


@pytest.fixture
def as_one(monkeypatch) -> list:
    """One entry for each call of a whole stage."""
    calls, op = [], native_backend._cpu_residual_stage
    monkeypatch.setattr(native_backend, "_cpu_residual_stage", lambda *call: [calls.append(call), op(*call)][1])
    return calls


def has_unit(dtype=torch.bfloat16) -> bool:
    return units.unit(dtype) != ""


@pytest.mark.parametrize("batch", [1, 3, 17])
@DTYPES
@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_the_bits_of_its_blocks(name, dtype, batch, as_one):
    fast, one_by_one, image = pair(name, dtype)
    x = draw((batch, *image), dtype, "channels_last")
    for _ in range(3):
        ours, theirs = fast(x), one_by_one(x)
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)
        x = x.flip(0) * 0.5
    assert len(as_one) == (2 if has_unit(dtype) else 0)


@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_the_bits_of_its_blocks_by_dot_products(name, batch, as_one, monkeypatch):
    if not units.has_dots():
        pytest.skip("this CPU has no bfloat16 in AVX-512")
    monkeypatch.setattr(units, "has_tiles", lambda: False)
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: False)
    monkeypatch.setattr(winograd, "_chosen", lambda problem: why_not_winograd(problem) is None)
    selection.forget()
    fast, one_by_one, image = pair(name, torch.bfloat16)
    x = draw((batch, *image), torch.bfloat16, "channels_last")
    for _ in range(2):
        assert torch.equal(fast(x), one_by_one(x))
    selection.forget()
    assert [call[-1] for call in as_one] == ["dots"]


@torch.no_grad()
def test_under_autocast_and_in_any_layout(as_one):
    fast, one_by_one, image = pair("bottlenecks")
    for layout in ("channels_last", "nchw"):
        x = draw((2, *image), torch.float32, layout)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                ours, theirs = fast(x), one_by_one(x)
                assert ours.dtype == torch.bfloat16
                assert torch.equal(ours, theirs)
    assert bool(as_one) == has_unit()


@DTYPES
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@torch.no_grad()
def test_what_is_not_finite_is_as_in_its_blocks(value, dtype):
    fast, one_by_one, image = pair("narrow_groups", dtype)
    x = draw((2, *image), dtype, "channels_last")
    fast(x)
    x[1, 5, 7, 9] = value
    ours, theirs = fast(x), one_by_one(x)
    assert not theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def edit_weight(fast):
    fast[1].conv2.weight.mul_(2)


def edit_data(fast):
    fast[1].conv2.weight.data = fast[1].conv2.weight.data * 0.5


def edit_statistics(fast):
    fast[2].bn1.running_mean.add_(1)


def edit_eps(fast):
    fast[1].bn2.eps = 0.5


def edit_stride(fast):
    fast[1].conv2.dilation, fast[1].conv2.padding = (2, 2), (2, 2)


def edit_layer(fast):
    fast[2].bn3 = lively(nn.BatchNorm2d(128), 9).eval()


def edit_block(fast):
    fast[1] = fast[2]


def edit_length(fast):
    del fast[2]


def edit_to_stock(fast):
    fast[1].__class__ = Bottleneck


def edit_to_foreign(fast):
    fast[2] = nn.ReLU()


EDITS = [edit for name, edit in globals().items() if name.startswith("edit_")]


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_edits_are_noticed(edit):
    fast, one_by_one, image = pair("bottlenecks")
    x = draw((2, *image), torch.float32, "channels_last")
    before = [fast(x) for _ in range(2)][-1]
    for model in (fast, one_by_one):
        edit(model)
    for _ in range(3):
        ours, theirs = fast(x), one_by_one(x)
        assert torch.equal(ours, theirs)
        assert ours.shape != before.shape or not torch.equal(ours, before)


@torch.no_grad()
def test_hooks_inside_run(as_one):
    fast, _, image = pair("bottlenecks")
    x = draw((2, *image), torch.float32, "channels_last")
    expected = [fast(x) for _ in range(2)][-1]
    as_one.clear()
    for module in (fast[1], fast[1].conv2):
        seen = []
        handle = module.register_forward_hook(lambda *call, seen=seen: seen.append(call[0]))
        for _ in range(2):
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
        handle.remove()
        assert seen == [module, module]
        assert not as_one
    handle = nn.modules.module.register_module_forward_hook(lambda *call: None)
    fast(x)
    handle.remove()
    assert not as_one
    fast(x)
    assert len(as_one) == has_unit(torch.float32)


@torch.no_grad()
def test_what_forbids_fusion_forbids_one_call(as_one, monkeypatch):
    fast, _, image = pair("bottlenecks")
    x = draw((2, *image), torch.float32, "channels_last")
    fast(x)
    with resnet_fast.disabled():
        fast(x)
    monkeypatch.setenv("RESNET_FAST_DISABLE", "1")
    fast(x)
    monkeypatch.delenv("RESNET_FAST_DISABLE")
    with torch.enable_grad():
        fast(x)
    fast[1].fast_backend = "reference"
    fast(x)
    fast[1].fast_backend = "auto"
    fast.train()
    fast(x)
    assert not as_one


def test_training_is_the_blocks(as_one):
    fast, one_by_one, image = pair("basic")
    x = draw((2, *image), torch.float32, "channels_last")
    for model in (fast, one_by_one):
        model.train()
        model(x).square().mean().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), one_by_one.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    assert not as_one


@torch.no_grad()
def test_copies_pickles_and_ways_back(as_one):
    stock = lively(resnet18(num_classes=10)).eval().to(memory_format=torch.channels_last)
    keys = list(stock.state_dict())
    fast = optimize(copy.deepcopy(stock))
    assert [type(module) for module in (fast.layer1, fast.layer2[0].downsample)] == [FastStage, nn.Sequential]
    x = draw((2, 3, 64, 64), torch.float32, "channels_last")
    expected = [fast(x) for _ in range(2)][-1]
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert list(again.state_dict()) == keys
        for _ in range(2):
            assert torch.equal(again(x), expected)
    assert isinstance(fast.layer1[:1], FastStage)
    assert torch.equal(fast.layer1[:1](fast.conv1(x)), fast.layer1[0](fast.conv1(x)))
    for way_back in (restore, resnet_fast.freeze):
        back = way_back(copy.deepcopy(fast))
        assert not any(isinstance(module, (FastStage, FastBasicBlock)) for module in back.modules())
        torch.testing.assert_close(back(x), stock(x), rtol=1e-3, atol=1e-3)


def test_a_sequential_of_more_than_blocks_stays_one():
    mixed = nn.Sequential(BasicBlock(8, 8), nn.ReLU())
    bound = nn.Sequential(BasicBlock(8, 8))
    bound.forward = lambda x: x
    left_alone = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
    optimize(left_alone, filter_fn=lambda name, block: name != "1")
    for module in (optimize(mixed), optimize(bound), left_alone):
        assert type(module) is nn.Sequential
    assert type(optimize(left_alone)) is FastStage


@torch.no_grad()
def test_tracers_see_the_blocks():
    fast, one_by_one, image = pair("basic")
    x = draw((2, *image), torch.float32, "channels_last")
    expected = one_by_one(x)
    assert torch.equal(torch.compile(fast, fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.jit.script(fast)(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.trace(fast, x)(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.fx.symbolic_trace(fast)(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nothing_is_kept_of_a_stage_that_is_gone():
    kept = len(stage._calls)
    fast, _, image = pair("basic")
    for _ in range(2):
        fast(draw((1, *image), torch.float32, "channels_last"))
    del fast
    gc.collect()
    assert len(stage._calls) <= kept

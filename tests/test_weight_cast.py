"""Training under bfloat16 autocast casts each weight once a step: counted, and what shares the cast is right."""

import collections
import copy

import pytest
import torch
from models import lively
from numerics import assert_all_match
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import disabled, optimize
from resnet_fast.functional import conv_bn_act

STAGES = pytest.mark.parametrize("stage", [1, 2, 3, 4])


def casts(step, model: nn.Module) -> dict[str, collections.Counter]:
    """How often each weight was copied to which dtype while `step` ran, inside ops too."""
    weights = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.dim() > 1}
    found = {name: collections.Counter() for name in weights.values()}
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    events = list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "aten::copy_":
            to, source = event.extra_fields.inputs[:2]
            name = weights.get(source.storage_data_ptr)
            if name is not None and to.dtype != source.dtype:
                found[name][to.dtype] += 1
    return found


def network(block: type, stage: int, backend: str) -> tuple[nn.Module, torch.Tensor]:
    model = ResNet(block, [2, 1, 1, 1], num_classes=7).to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    return optimize(model, backend=backend, train_stage=stage, strict=True), x


def step(model: nn.Module, x: torch.Tensor, forwards: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(model(x).float().square().mean() for _ in range(forwards))
    loss.backward()


@STAGES
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_step_casts_each_weight_once(block, stage, backend):
    model, x = network(block, stage, backend)
    assert set(map(_bfloat16_alone, casts(lambda: step(model, x, 1), model).values())) == {1}


@STAGES
def test_gradients_that_are_accumulated_share_the_cast(stage, native):
    """Two forward passes under one autocast context."""
    model, x = network(Bottleneck, stage, native)
    assert set(map(_bfloat16_alone, casts(lambda: step(model, x, 2), model).values())) == {1}


def _bfloat16_alone(found: collections.Counter) -> int:
    assert set(found) == {torch.bfloat16}
    return found[torch.bfloat16]


def bottleneck(backend: str, stage: int | str = "auto") -> tuple[nn.Module, torch.Tensor]:
    branch = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    block = lively(Bottleneck(32, 16, 2, branch)).to(memory_format=torch.channels_last).train()
    x = torch.randn(4, 32, 12, 12).contiguous(memory_format=torch.channels_last)
    return optimize(block, backend=backend, train_stage=stage), x


@pytest.mark.parametrize("stage", [1, 4])
def test_a_compiled_step_casts_each_weight_once(stage, backend):
    """Nor does the partitioner cast again in the backward pass."""
    block, x = bottleneck(backend, stage)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager")
    step(compiled, x, 1)
    assert set(map(_bfloat16_alone, casts(lambda: step(compiled, x, 1), block).values())) == {1}


def gradients(block: nn.Module, outputs) -> dict[str, torch.Tensor]:
    block.zero_grad()
    sum(y.float().square().mean() for y in outputs).backward()
    return {name: p.grad.clone() for name, p in block.named_parameters()}


def uncached(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return block(x)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, theirs[name]), name


def test_accumulated_gradients_are_added_in_float32(native):
    """Bit by bit those of forward passes that cast for themselves."""
    block, x = bottleneck(native)
    with torch.autocast("cpu", torch.bfloat16):
        shared = gradients(block, [block(x), block(x * 2), block(x * 3)])
    assert_same(shared, gradients(block, [uncached(block, x), uncached(block, x * 2), uncached(block, x * 3)]))


def test_a_weight_that_was_stepped_is_cast_again(native):
    """Steps under one context, whose cache of autocast's would hand out the first step's weights."""
    block, x = bottleneck(native)
    twin = copy.deepcopy(block)
    with torch.autocast("cpu", torch.bfloat16):
        found = [train_step(block, block(x)) for _ in range(3)]
    assert found == [train_step(twin, uncached(twin, x)) for _ in range(3)]
    assert_same(dict(block.named_parameters()), dict(twin.named_parameters()))


def train_step(block: nn.Module, y: torch.Tensor) -> float:
    gradients(block, [y])
    torch.optim.SGD(block.parameters(), 0.5).step()
    return y.sum().item()


def test_a_cast_made_without_gradients_does_not_lose_them(native):
    """By the stock layers, under no_grad, in the same context."""
    block, x = bottleneck(native)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), disabled():
            block(x)
        found = gradients(block, [block(x)])
    assert_same(found, gradients(block, [uncached(block, x)]))


def test_a_shared_cast_can_be_differentiated_twice(native):
    block, x = bottleneck(native)
    weights = [conv.weight for conv in (block.conv1, block.conv2, block.conv3, block.downsample[0])]

    def second(*outputs):
        first = torch.autograd.grad(sum(y.float().square().mean() for y in outputs), weights, create_graph=True)
        return dict(enumerate(torch.autograd.grad(sum(each.square().sum() for each in first), weights)))

    with torch.autocast("cpu", torch.bfloat16):
        shared = second(block(x), block(x * 2))
    assert_same(shared, second(uncached(block, x), uncached(block, x * 2)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_and_out_of_the_context(reentrant, native):
    block, x = bottleneck(native)
    expected = gradients(block, [uncached(block, x)])
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(block, x, use_reentrant=reentrant)
        inside = gradients(block, [checkpoint(block, x, use_reentrant=reentrant)])
    assert_same(inside, expected)
    assert_same(gradients(block, [y]), expected)


def test_transforms_and_fakes_leave_the_cache_alone(native):
    """torch.func, forward-mode AD and fake tensors in a context whose cache a real step uses behind them."""
    block, x = bottleneck(native)
    weight, expected = block.conv1.weight, gradients(block, [uncached(block, x)])

    def loss(conv_weight, value=x):
        return conv_bn_act(value, conv_weight, None, None, training=True).float().square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.func.grad(loss)(weight).isfinite().all()
        assert torch.func.grad(loss, argnums=1)(weight, x).isfinite().all()
        assert torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))[1].isfinite()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert block(mode.from_tensor(x)).dtype == torch.bfloat16
        assert_same(gradients(block, [block(x)]), expected)


def test_two_steps_are_as_exact_as_stock(native):
    """The bounds of every other training test, with the cast shared."""
    block, x = bottleneck(native)
    stock, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(block, [block(x), block(x)])
        with disabled():
            theirs = gradients(stock, [stock(x), stock(x)])
    with disabled():
        truth = gradients(exact, [exact(x.double()), exact(x.double())])
    assert_all_match(ours, theirs, truth, compute_dtype=torch.bfloat16)

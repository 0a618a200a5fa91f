"""Frozen networks on AMX or AVX-512: every kind of layer beside PyTorch, any batch and image; what goes another way."""

import contextlib
import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fresh
import pytest
import torch
from models import lively, network_of
from numerics import assert_all_match
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import freeze, planned, twin
from resnet_fast.amx import network as amx
from resnet_fast.backends import units, winograd
from resnet_fast.planner import conv_of


def skipped(dtype: torch.dtype):
    reason = units.why_no_unit(dtype)
    return pytest.mark.skipif(reason is not None, reason=f"{reason} (frozen layers run by oneDNN)")


DTYPES = [torch.bfloat16, pytest.param(torch.float32, marks=skipped(torch.float32))]


def needs_program(test):
    """In bfloat16, and in those of DTYPES."""
    return pytest.mark.amx(skipped(torch.bfloat16)(test))


def needs_tiles(test):
    return pytest.mark.amx(skipped(torch.float32)(test))


@pytest.fixture(params=["tiles", "dot products"])
def unit(request, monkeypatch) -> str:
    """What multiplies; the other one than this CPU's best is skipped, or asked for."""
    if request.param == "dot products":
        if not units.has_dots():
            pytest.skip("this CPU has no bfloat16 in AVX-512")
        monkeypatch.setattr(units, "has_tiles", lambda: False)
        monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: False)
    elif not units.has_tiles():
        pytest.skip("this CPU has no AMX")
    return request.param


def downsample(channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


BLOCKS = {  # name -> (a block, the size of its input)
    "basic": (lambda: BasicBlock(64, 64), (64, 9, 11)),
    "rows_run_on": (lambda: BasicBlock(32, 32), (32, 19, 23)),
    "basic_stride_2": (lambda: BasicBlock(64, 128, 2, downsample(64, 128, 2)), (64, 17, 20)),
    "large_to_small_images": (lambda: Bottleneck(64, 32, 2, downsample(64, 128, 2)), (64, 26, 30)),
    "bottleneck": (lambda: Bottleneck(64, 32, 1, downsample(64, 128, 1)), (64, 20, 20)),
    "channels_not_multiple_of_32": (lambda: Bottleneck(40, 10, 1), (40, 7, 7)),
    "groups_inside_a_block": (
        lambda: Bottleneck(64, 64, 2, downsample(64, 256, 2), groups=32, base_width=4),
        (64, 12, 12),
    ),
    "groups_of_whole_blocks": (lambda: Bottleneck(128, 32, 1, groups=2, base_width=64), (128, 5, 6)),
    "many_channels": (lambda: Bottleneck(1024, 256, 1), (1024, 4, 5)),
    "dilated": (lambda: Bottleneck(128, 32, 1, None, dilation=3), (128, 18, 15)),
    "one_pixel": (lambda: BasicBlock(32, 32), (32, 1, 1)),
}


def stage(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, tuple[int, int, int]]:
    """A stage of one block, its frozen copy and its input's size."""
    torch.manual_seed(7)
    make, size = BLOCKS[name]
    model = nn.Sequential(lively(make())).eval()
    return model, freeze(model, dtype=dtype), size


@pytest.mark.amx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 19])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks(name, batch, dtype, unit, poison):
    if (reason := units.why_no_unit(dtype)) is not None:
        pytest.skip(reason)
    model, frozen, size = stage(name, dtype)
    x = torch.randn(batch, *size).to(memory_format=torch.channels_last)
    ours = {"y": network_of(frozen)(x.to(dtype))}
    stock = {"y": copy.deepcopy(model).to(dtype)(x.to(dtype)).contiguous(memory_format=torch.channels_last)}
    assert_all_match(ours, stock, {"y": copy.deepcopy(model).double()(x.double())})


@needs_tiles
@torch.no_grad()
def test_float32_needs_its_lower_planes():
    """The tolerance of float32 tells a weight without its last 8 bits from one that has them."""
    model, frozen, size = stage("bottleneck", torch.float32)
    x = torch.randn(2, *size)
    network = network_of(frozen)
    conv = network.section.convs()[1][1]
    packed = network._weights.of(conv)
    weight = packed.weight.clone()
    weight[:, :, :, 2] = 0
    network._weights._packed[conv, False] = replace(packed, weight=weight)
    exact = copy.deepcopy(model).double()(x.double()).contiguous(memory_format=torch.channels_last)
    stock = model(x).contiguous(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="rmse"):
        assert_all_match({"y": network(x)}, {"y": stock}, {"y": exact})


@needs_tiles
@torch.no_grad()
def test_shortcuts_of_one_shape_after_another():
    """Each block's output takes its shortcut's place, which must not be that of the block before."""
    torch.manual_seed(7)
    blocks = [BasicBlock(32, 32, 1, downsample(32, 32, 1)) for _ in range(3)]
    model = lively(nn.Sequential(*blocks)).eval()
    x = torch.randn(2, 32, 6, 6).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()(x.double())
    assert_all_match({"y": network_of(freeze(model))(x)}, {"y": model(x)}, {"y": exact})


def small_resnet(dtype: torch.dtype, **settings) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    model = lively(ResNet(Bottleneck, [2, 1, 1, 1], num_classes=7, **settings)).eval()
    return model, freeze(model, dtype=dtype)


@needs_program
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "a_view"])
@torch.no_grad()
def test_images_of_any_strides(layout, dtype):
    model, frozen = small_resnet(dtype)
    x = torch.randn(3, 3, 70, 53)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "a_view":
        x = torch.randn(3, 53, 70, 6)[..., 1:4].permute(0, 3, 2, 1)
    assert frozen.amx_network(x.to(dtype)) is not None
    ours, stock, exact = frozen(x), model.to(dtype)(x.to(dtype)), copy.deepcopy(model).double()(x.double())
    if dtype == torch.bfloat16:  # whose weights are rounded once in ours and in PyTorch's
        exact = lively(small_resnet(torch.float32)[0]).double()(x.double())
    assert_all_match({"y": ours}, {"y": stock}, {"y": exact})


@needs_program
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_an_image_is_computed_alike_in_any_batch_by_any_threads(dtype):
    _, frozen = small_resnet(dtype)
    x = torch.randn(37, 3, 64, 64, dtype=dtype)
    network = frozen.amx_network(x)  # a float32 classifier is PyTorch's, and not alike in any batch
    torch.set_num_threads(2)
    y = network(x)
    assert all(torch.equal(network(x), y) for _ in range(3))
    for batch in (1, 4, 15, 16):
        assert torch.equal(network(x[:batch]), y[:batch]), batch
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(network(x), y), threads


@needs_program
@torch.no_grad()
def test_threads_that_come_at_once():
    _, frozen = small_resnet(torch.bfloat16)
    inputs = [torch.randn(1 + number % 3, 3, 64, 64) for number in range(8)]
    expected = [frozen(x) for x in inputs]
    _, fresh = small_resnet(torch.bfloat16)
    results: list = [None] * 8

    def run(number: int) -> None:
        results[number] = [fresh(inputs[number]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert all(torch.equal(y, expected[number]) for y in results[number])


@needs_program
@pytest.mark.parametrize(("cores", "threads", "most"), [(2, 1, 2), (3, 1, 3), (2, 2, 1), (1, 4, 1)])
@torch.no_grad()
def test_as_many_run_at_a_time_as_there_are_cores_for(cores, threads, most, monkeypatch):
    """Of whatever size their images are."""
    _, frozen = small_resnet(torch.bfloat16)
    inputs = [torch.randn(1, 3, size, size) for size in (64, 40)]
    x, network = inputs[0], frozen.amx_network(inputs[0])
    monkeypatch.setattr(amx.cpus, "here", lambda: amx.cpus.Cpu("of this test", cores, "AVX512"))
    torch.set_num_threads(threads)
    callers = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(threads,))
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(network._borrowed(x.shape[1:], 1)).program for _ in range(most)]
        assert len({id(program) for program in programs}) == most
        late = [callers.submit(frozen, image) for image in inputs]
        for each in late:
            with pytest.raises(TimeoutError):
                each.result(0.2)
    assert all(torch.equal(each.result(60), frozen(image)) for each, image in zip(late, inputs, strict=True))
    assert len(network._idle[amx._key(x.shape[1:], 1)]) == most


@needs_program
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_what_is_not_a_number_stays_in_its_image(dtype):
    _, frozen = small_resnet(dtype)
    x = torch.randn(17, 3, 64, 64)
    y = frozen(x)
    x[4, 1, 30, 30] = float("nan")
    z = frozen(x)
    assert z[4].isnan().all()
    others = torch.arange(17) != 4
    assert torch.equal(z[others], y[others])
    assert torch.equal(frozen(x.nan_to_num(0.5))[others], y[others])  # nor does it stay in a buffer


@needs_program
@torch.no_grad()
def test_new_weights_are_seen():
    _, frozen = small_resnet(torch.bfloat16)
    x = torch.randn(2, 3, 64, 64)
    before, state = frozen(x), copy.deepcopy(frozen.state_dict())
    frozen.layer2[0].convs[1].weight.mul_(1.5)
    changed = frozen(x)
    assert not torch.equal(changed, before)
    assert torch.equal(copy.deepcopy(frozen)(x), changed)
    frozen.load_state_dict(state)
    assert torch.equal(frozen(x), before)
    frozen.layer1 = nn.Identity()
    with pytest.raises(RuntimeError):  # PyTorch's: layer2 takes 256 channels and gets 64
        frozen(x)


@needs_tiles
@torch.no_grad()
def test_sizes_change_after_freezing():
    model, frozen = small_resnet(torch.float32)
    for batch, size in [(2, 64), (1, 64), (2, 40), (3, 33), (1, 96), (18, 32), (16, 16), (31, 11), (2, 64)]:
        x = torch.randn(batch, 3, size, size)
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(frozen.amx_network(x)._idle) <= amx.KINDS_KEPT


@needs_program
@torch.no_grad()
def test_the_steps_times_are_of_the_whole_work(monkeypatch):
    monkeypatch.setattr(winograd, "takes_folded", lambda conv: False)  # which does less
    _, frozen = small_resnet(torch.bfloat16)
    x = torch.randn(4, 3, 64, 64, dtype=torch.bfloat16)
    network = frozen.amx_network(x)
    steps = network.timings(x)
    convs = [f"layer1.0.conv{number}" for number in (1, 2, 3)]
    parts = [part for step in steps for part in step.name.split("+")]
    assert [part for part in parts if part.startswith("layer1.0.conv")] == convs
    # Of large images a 1x1 runs piece by piece behind the one that it reads.
    assert ("layer1.0.conv3+layer1.1.conv1" in [step.name for step in steps]) == units.has_tiles()
    assert all(step.seconds > 0 and step.bytes > 0 for step in steps)
    counted = []
    stock = small_resnet(torch.float32)[0]
    for module in stock.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda layer, inputs, y: counted.append(
                    conv_of(layer, inputs[0].shape).real_flops
                    if isinstance(layer, nn.Conv2d)
                    else 2 * y.numel() * layer.in_features
                )
            )
    stock(x.float())
    assert sum(step.flops for step in steps) == sum(counted)


WRONG_IMAGES = {
    "channels": (torch.randn(2, 4, 64, 64), RuntimeError),
    "three_dimensions": (torch.randn(3, 64, 64), RuntimeError),
}


@needs_program
@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_wrong_images_get_pytorchs_errors(name):
    x, error = WRONG_IMAGES[name]
    _, frozen = small_resnet(torch.bfloat16)
    with torch.no_grad(), pytest.raises((error, ValueError)):
        frozen(x)


@needs_program
@torch.no_grad()
def test_what_goes_another_way(said):
    _, frozen = small_resnet(torch.bfloat16)
    x = torch.randn(2, 3, 64, 64)
    y = frozen(x)
    for other in (freeze(small_resnet(torch.float32)[0], dtype=torch.bfloat16, backend="reference"),):
        assert other.amx_network(x) is None
        torch.testing.assert_close(other(x), y, rtol=2e-2, atol=2e-2)
    seen = []
    hook = frozen.layer1[0].register_forward_hook(lambda *_: seen.append(1))
    assert frozen.amx_network(x) is None
    frozen(x)
    assert seen
    hook.remove()
    assert frozen.amx_network(x) is not None
    assert frozen(x[:0]).shape == (0, 7)
    model, odd = small_resnet(torch.bfloat16, groups=2, width_per_group=12)  # groups of 12, 24, 48 and 96 channels
    assert odd.amx_network(x) is None
    assert any("groups" in message for message in said())
    plain = freeze(model, dtype=torch.bfloat16, backend="reference")
    torch.testing.assert_close(odd(x), plain(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_refused(dtype):
    assert "float" in units.why_no_unit(dtype)


@torch.no_grad()
def test_without_amx_the_layers_run_one_by_one(monkeypatch, said):
    monkeypatch.setattr(planned, "why_no_unit", lambda dtype: "no AMX, for this test")
    model, frozen = small_resnet(torch.float32)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)
    assert frozen.amx_network(x) is None
    assert any("no AMX, for this test" in message for message in said())


def test_a_lower_cpu_capability_is_obeyed(native):
    """PyTorch told to use AVX2 means that AMX is not used either, and never an instruction that is not there."""
    script = """
import torch, torchvision, resnet_fast
from resnet_fast.backends import units
assert "no AMX" in units.why_no_unit(torch.bfloat16), units.why_no_unit(torch.bfloat16)
model = torchvision.models.resnet18(num_classes=5).eval()
with torch.no_grad():
    torch.testing.assert_close(resnet_fast.freeze(model)(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64)),
                               rtol=1e-4, atol=1e-4)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    run = fresh.python(script, environment=environment)
    assert run.returncode == 0, run.stderr


@needs_program
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [resnet18, resnet50])
@torch.no_grad()
def test_whole_networks(make, dtype):
    torch.manual_seed(1)
    model = lively(make()).eval()
    frozen = freeze(model, dtype=dtype)
    x = torch.randn(2, 3, 224, 224)
    network = frozen.amx_network(x.to(dtype))
    assert network is not None
    ours, exact = frozen(x), copy.deepcopy(model).double()(x.double())
    assert_all_match({"y": ours}, {"y": model.to(dtype)(x.to(dtype))}, {"y": exact})


def test_dot_products_where_there_are_no_tiles(native, monkeypatch):
    """In bfloat16, unless float32 is faster, on as many threads as were measured."""
    found = {"has_tiles": False, "has_dots": True}
    for name in found:
        monkeypatch.setattr(units, name, lambda name=name: found[name])
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: False)
    assert units.why_no_unit(torch.bfloat16) is None
    assert units.unit_name() == "AVX-512 bfloat16"
    assert "no AMX" in units.why_no_unit(torch.float32)
    torch.set_num_threads(9)
    assert "more than 8 threads" in units.why_no_unit(torch.bfloat16)
    torch.set_num_threads(8)
    assert units.why_no_unit(torch.bfloat16) is None
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: True)
    assert "slower than float32" in units.why_no_unit(torch.bfloat16)
    found["has_dots"] = False
    assert "nor its products in AVX-512" in units.why_no_unit(torch.bfloat16)
    found["has_tiles"] = True
    assert units.why_no_unit(torch.float32) is None

"""A frozen network as one call on a CPU, beside its layers one by one."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import draw
from models import lively
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import cpu_network, freeze, planned
from resnet_fast.backends import winograd
from resnet_fast.frozen import FrozenConv2d, FrozenStage, onednn_runs

pytestmark = pytest.mark.usefixtures("native", "unmeasured_cpu", "without_amx")

MODELS = {
    "basic": lambda: ResNet(BasicBlock, [2, 1, 1, 1], num_classes=7),
    "bottleneck": lambda: ResNet(Bottleneck, [2, 2, 1, 1], num_classes=7),
    "grouped": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7, groups=32, width_per_group=4),
    "dilated": lambda: ResNet(
        Bottleneck, [1, 2, 1, 1], num_classes=7, replace_stride_with_dilation=[False, True, True]
    ),
}


@pytest.fixture
def without_amx(monkeypatch):
    monkeypatch.setattr(planned, "why_no_unit", lambda dtype: "it is turned off")


@pytest.fixture
def ran(monkeypatch) -> list[tuple]:
    """The input shapes of networks that were built, in order."""
    built, original = [], cpu_network.build
    monkeypatch.setattr(
        cpu_network, "build", lambda section, shape: built.append(tuple(shape)) or original(section, shape)
    )
    return built


def frozen_model(name: str = "basic", dtype: torch.dtype | None = None) -> nn.Module:
    torch.manual_seed(3)
    return freeze(lively(MODELS[name]()).eval(), dtype=dtype)


@torch.no_grad()
def one_by_one(frozen: nn.Module, x: torch.Tensor) -> torch.Tensor:
    watched = copy.deepcopy(frozen)
    watched.register_forward_hook(lambda *_: None)
    first = next(module for module in watched.modules() if isinstance(module, FrozenConv2d))
    first.register_forward_hook(lambda *_: None)
    return watched(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_bit_for_bit_what_the_layers_give(name, layout, dtype, ran, monkeypatch):
    monkeypatch.setattr("resnet_fast.twin.bfloat16_is_slow", lambda: False)
    frozen, x = frozen_model(name, dtype), draw((9, 3, 61, 64), torch.float32).to(memory_format=layout)
    before, calls = x.clone(), [(9, 3, 61, 64)] if onednn_runs(dtype) else []
    with torch.no_grad():
        y = frozen(x)
    assert ran == calls
    assert torch.equal(y, one_by_one(frozen, x))
    assert torch.equal(x, before)
    assert ran == calls


@torch.no_grad()
def test_a_stage_by_itself(ran):
    """Its first residual is the caller's input, which stays what it was."""
    stage = freeze(nn.Sequential(*(lively(BasicBlock(64, 64)) for _ in range(2))).eval())
    x = draw((4, 64, 16, 16), torch.float32, "channels_last")
    before = x.clone()
    y, kept = stage(x), stage(x).clone()
    assert ran == [(4, 64, 16, 16)]
    assert torch.equal(y, kept)
    assert torch.equal(x, before)
    assert torch.equal(y, FrozenStage.forward(copy.deepcopy(stage), x))


@torch.no_grad()
def test_shapes_come_and_go(ran):
    frozen = frozen_model()
    images = [draw((batch, 3, size, 40), torch.float32) for batch in (1, 2, 5) for size in (40, 48)]
    expected = [frozen(x) for x in images]
    assert len(ran) == len(images)
    assert all(torch.equal(frozen(x), y) for x, y in zip(images, expected, strict=True))
    assert len(frozen.__dict__["_cpu_networks"]) == planned.SHAPES_KEPT


@torch.no_grad()
def test_weights_are_packed_for_the_threads_in_use(ran, monkeypatch):
    """For another number of threads oneDNN may want another layout, and would pack anew in every call."""
    frozen, x, packed = frozen_model(), draw((2, 3, 40, 40), torch.float32), []
    layer, original = frozen.layer1[0].convs[0], FrozenConv2d._reordered
    monkeypatch.setattr(FrozenConv2d, "_reordered", lambda self, shape: packed.append(self) or original(self, shape))
    torch.set_num_threads(1)
    y = frozen(x)
    torch.set_num_threads(2)
    for _ in range(2):
        torch.testing.assert_close(frozen(x), y)
    assert len(ran) == 2
    assert packed.count(layer) == 2
    torch.set_num_threads(1)
    assert torch.equal(frozen(x), y)
    assert packed.count(layer) == 2
    inputs = draw((2, 64, 10, 10), torch.float32, "channels_last")
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        layer(inputs)
    assert packed.count(layer) == 4


@torch.no_grad()
def test_threads_run_one_network_side_by_side(ran):
    frozen, images = frozen_model(), [draw((2, 3, 40, 40), torch.float32) for _ in range(12)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(torch.no_grad()(frozen), images))
    assert len(ran) == 1
    assert all(torch.equal(y, frozen(x)) for x, y in zip(images, answers, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_goes_to_onednn(value):
    frozen, x = frozen_model(), draw((9, 3, 64, 64), torch.float32)
    assert any("Winograd" in row.kernel for row in _reported(frozen, x))
    x[3, 1, 30, 30] = value
    y, expected = frozen(x), one_by_one(frozen, x)  # whose fused ReLU may turn NaN into 0
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert y[[image for image in range(9) if image != 3]].isfinite().all()


def _reported(frozen: nn.Module, x: torch.Tensor):
    frozen(x)
    return frozen.resnet_fast_report


@torch.no_grad()
def test_new_weights_are_seen():
    frozen, other = frozen_model(), freeze(lively(MODELS["basic"]()).eval())
    x = draw((2, 3, 40, 40), torch.float32)
    before, expected = frozen(x), other(x)
    frozen.load_state_dict(other.state_dict())
    assert torch.equal(frozen(x), expected)
    assert not torch.equal(before, expected)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), expected)
    assert torch.equal(copy.deepcopy(frozen)(x), expected)


@torch.no_grad()
def test_hooks_see_the_layers(ran):
    frozen, seen = frozen_model(), []
    handle = frozen.layer1[0].convs[0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    x = draw((2, 3, 40, 40), torch.float32)
    y = frozen(x)
    assert seen == [(2, 64, 10, 10)]
    assert not ran
    handle.remove()
    assert torch.equal(frozen(x), y)
    assert ran


@pytest.mark.parametrize("place", ["maxpool", "layer1.1"])
@torch.no_grad()
def test_a_layer_that_was_replaced(place):
    frozen, x = frozen_model(), draw((2, 3, 40, 40), torch.float32)
    before = frozen(x)
    parent, _, name = place.rpartition(".")
    setattr(frozen.get_submodule(parent), name, nn.Identity())
    y = frozen(x)
    assert torch.equal(y, one_by_one(frozen, x))
    assert not torch.equal(y, before)


@pytest.mark.parametrize("shape", [(2, 4, 40, 40), (3, 40)], ids=str)
def test_images_that_do_not_fit_raise_what_the_layers_raise(shape, said):
    frozen, x = frozen_model(), torch.zeros(shape)
    with torch.no_grad(), pytest.raises(RuntimeError) as ours:
        frozen(x)
    with pytest.raises(RuntimeError) as theirs:
        one_by_one(frozen, x)
    assert str(ours.value) == str(theirs.value)
    assert any("conv1 takes 3 channels" in line for line in said())


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float32), ("auto", torch.float64)], ids=str)
@torch.no_grad()
def test_who_goes_layer_by_layer(backend, dtype, ran, said):
    torch.manual_seed(3)
    frozen = freeze(lively(MODELS["basic"]()).eval(), dtype=dtype, backend=backend)
    assert frozen(draw((2, 3, 40, 40), dtype)).shape == (2, 7)
    assert not ran
    if dtype == torch.float64:
        assert any("oneDNN computes no convolutions of torch.float64" in line for line in said())


@torch.no_grad()
def test_winograd_is_inside(monkeypatch):
    frozen, x = frozen_model(), draw((9, 3, 64, 64), torch.float32)
    packed = []
    original = winograd.pack
    monkeypatch.setattr(winograd, "pack", lambda weight: packed.append(weight.shape) or original(weight))
    frozen(x)
    assert packed
    assert all(shape[2:] == (3, 3) for shape in packed)

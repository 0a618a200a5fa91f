"""float32 3x3s of frozen models by Winograd's F(4x4, 3x3) on the CPU: numbers, special values, and who takes them."""

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fresh
import pytest
import torch
from cases import CPU, draw
from models import lively
from numerics import assert_matches
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from resnet_fast import cpus, freeze, twin
from resnet_fast.backends import winograd as backend
from resnet_fast.frozen import FrozenConv2d
from resnet_fast.kernels import selection
from resnet_fast.kernels.configs import WinogradConfig
from resnet_fast.problems import ConvProblem
from resnet_fast.shapes import Conv

pytestmark = pytest.mark.usefixtures("native", "unmeasured_cpu")

SHAPES = {  # x, output channels
    "layer1": ((1, 64, 56, 56), 64),
    "layer2": ((1, 128, 28, 28), 128),
    "layer3": ((1, 256, 14, 14), 256),
    "layer4": ((2, 512, 7, 7), 512),
    "odd_everything": ((5, 67, 9, 11), 70),
    "one_row_of_tiles": ((3, 64, 7, 37), 96),
    "many_slabs": ((7, 64, 30, 29), 64),
}


def layer(channels: int, outputs: int, relu: bool = True, bias: bool = True) -> FrozenConv2d:
    conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=bias)
    return FrozenConv2d(conv, None, relu, None)


def image(shape, relu: bool = True) -> torch.Tensor:
    """As activations are: nothing negative, which makes long sums of one sign."""
    x = draw(shape, torch.float32, "channels_last")
    return x.relu() if relu else x


def plain(conv: FrozenConv2d, x, residual=None, dtype=torch.float32) -> torch.Tensor:
    bias = None if conv.bias is None else conv.bias.to(dtype)
    y = F.conv2d(x.to(dtype), conv.weight.to(dtype), bias, padding=1)
    y = y if residual is None else y + residual.to(dtype)
    return y.relu() if conv.relu else y


def computed_by(conv: FrozenConv2d) -> str:
    return conv.kernel.split(" ")[0]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", SHAPES)
def test_as_near_to_float64_as_pytorch(name, with_residual, relu):
    shape, outputs = SHAPES[name]
    conv = layer(shape[1], outputs, relu, bias=not with_residual)
    x = image(shape, relu)
    residual = image((shape[0], outputs, *shape[2:]), False) if with_residual else None
    before = x.clone(), None if residual is None else residual.clone()
    with torch.no_grad():
        y = conv.by_kernel(WinogradConfig(), x, residual)
        stock = plain(conv, x, residual)
        assert_matches(name, y, stock, plain(conv, x, residual, torch.float64))
    assert y.stride() == stock.stride()
    assert torch.equal(x, before[0])
    assert residual is None or torch.equal(residual, before[1])


@pytest.mark.parametrize("name", ["layer3", "odd_everything", "many_slabs"])
def test_thread_count_changes_no_bit(name):
    """Slab by slab on one thread, all together on eight."""
    shape, outputs = SHAPES[name]
    conv, x, results = layer(shape[1], outputs), image(shape), []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(conv.by_kernel(WinogradConfig(), x, None))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_batch_size_changes_no_bit():
    conv, x = layer(64, 64), image((7, 64, 13, 14))
    whole = conv.by_kernel(WinogradConfig(), x, None)
    assert torch.equal(conv.by_kernel(WinogradConfig(), x[2:3], None), whole[2:3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 63, 27, 25), (0, 5, 13, 12)], ids=["first", "last", "middle"])
def test_what_is_not_finite_is_computed_by_onednn(place, value):
    """3e38 is finite, and overflows in the transform."""
    conv, x = layer(64, 64), image((2, 64, 28, 26))
    x[place] = value
    with torch.no_grad():
        assert conv.by_kernel(WinogradConfig(), x, None) is None
        assert torch.equal(conv(x).nan_to_num(7.0), conv.by_onednn(x, None).nan_to_num(7.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_a_residual_keeps_what_is_not_finite(value, relu):
    conv, x = layer(64, 64, relu), image((2, 64, 28, 28))
    residual = image(x.shape, False)
    residual[0, 1, 2, 3] = residual[1, 63, 27, 27] = value
    with torch.no_grad():
        y, stock = conv(x, residual), plain(conv, x, residual)
    assert computed_by(conv) == "Winograd"
    assert_matches("y", y, stock, plain(conv, x, residual, torch.float64))
    assert torch.equal(y.isnan(), stock.isnan())


def test_batch_size_may_change_and_be_none():
    conv = layer(64, 64)
    with torch.no_grad():
        for batch, name in ((8, "Winograd"), (1, "oneDNN"), (16, "Winograd"), (0, "oneDNN")):
            x = image((batch, 64, 10, 10))
            assert_matches(f"n{batch}", conv(x), plain(conv, x), plain(conv, x, dtype=torch.float64))
            assert computed_by(conv) == name, batch


def test_weights_are_packed_again_when_they_change():
    conv, x = layer(64, 64), image((4, 64, 28, 28))
    with torch.no_grad():
        first = conv(x)
        conv.load_state_dict({name: 2 * value for name, value in conv.state_dict().items()})
        torch.testing.assert_close(conv(x), 2 * first)
        conv.double()
        torch.testing.assert_close(conv(x.double()), 2 * first.double(), rtol=1e-5, atol=1e-5)
        assert torch.equal(conv.float()(x), copy.deepcopy(conv)(x))
        assert torch.equal(pickle.loads(pickle.dumps(conv))(x), conv(x))


def test_simultaneous_calls_share_nothing():
    conv, images = layer(64, 64), [image((4, 64, 28, 28)) for _ in range(4)]
    with torch.no_grad():
        expected = [conv.by_kernel(WinogradConfig(), x, None) for x in images]
    fresh = copy.deepcopy(conv)

    def call(x):
        with torch.no_grad():
            return [fresh(x) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(call, images), expected, strict=True):
            assert all(torch.equal(y, right) for y in found)


@pytest.mark.parametrize(("shape", "residual"), [
    pytest.param((64, 28, 28), None, id="three_dimensions"),
    pytest.param((4, 128, 28, 28), None, id="more_channels"),
    pytest.param((4, 64, 28, 28), (4, 64, 28, 27), id="narrower_residual"),
    pytest.param((4, 64, 28, 28), (4, 1, 28, 28), id="residual_of_one_channel"),
])  # fmt: skip
def test_other_shapes_raise(shape, residual):
    conv = layer(64, 64)
    with torch.no_grad(), pytest.raises(RuntimeError):
        conv(torch.zeros(shape), None if residual is None else torch.zeros(residual))
    assert conv(image((4, 64, 28, 28))).shape == (4, 64, 28, 28)


PROBLEM = ConvProblem(Conv(8, 64, 28, 28, 64, (3, 3), padding=(1, 1)), "float32")
OTHERS = {
    "stride": {"stride": (2, 2)},
    "padding": {"padding": (0, 0)},
    "dilation": {"dilation": (2, 2), "padding": (2, 2)},
    "groups": {"groups": 2},
    "kernel": {"kernel": (1, 1)},
    "few_channels": {"in_channels": 32},
    "few_outputs": {"out_channels": 32},
    "low": {"height": 6},
    "narrow": {"width": 6},
    "small": {"batch": 1, "height": 14, "width": 14},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_takes_onednn(name):
    choice = selection.choose(ConvProblem(replace(PROBLEM.conv, **OTHERS[name]), "float32"), CPU)
    assert choice.config is None
    assert choice.reason
    assert selection.choose(PROBLEM, CPU).config == WinogradConfig()


def test_without_a_measurement_few_tiles_take_onednn():
    many = cpus.Cpu("some CPU", 64, "AVX512")
    assert selection.choose(PROBLEM, CPU).source == "predicted"
    assert selection.choose(PROBLEM, many).config is None
    assert "392 tiles" in selection.choose(PROBLEM, many).reason


def test_by_request_the_librarys_or_ours(monkeypatch):
    x = image((4, 64, 28, 28))
    for name, expected in (("reference", False), ("native", True), ("auto", True)):
        conv, ran = layer(64, 64), []
        conv.backend = name
        monkeypatch.setattr(backend, "conv_packed", lambda *call, ran=ran: ran.append(call))
        with torch.no_grad():
            conv(x)
        assert bool(ran) == expected, name


def network():
    return lively(resnet18(num_classes=7)).eval()


def test_the_report_says_what_computed_each_layer():
    frozen = freeze(network())
    with torch.no_grad():
        frozen(image((8, 3, 64, 64)))
    if frozen.amx_network(image((8, 3, 64, 64))) is not None:
        pytest.skip("AMX computes the network")
    rows = {row.name: row.kernel for row in frozen.resnet_fast_report}
    assert rows["layer1.0"].startswith("convs.0 Winograd F(4x4, 3x3) (predicted), convs.1 Winograd")
    assert "convs.0 oneDNN (packed once, oneDNN's weights are multiplied as fast)" in rows["layer2.0"]
    assert rows["layer2.0"].endswith("downsample oneDNN")


def test_a_float32_twin_takes_it_too(monkeypatch):
    """Where bfloat16 is slow, a bfloat16 network computes in float32."""
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: True)
    model, x, ran = network(), image((8, 3, 64, 64)), []
    original = backend.pack
    monkeypatch.setattr(backend, "pack", lambda weight: ran.append(weight) or original(weight))
    frozen = freeze(model, dtype=torch.bfloat16)
    if frozen.amx_network(x.bfloat16()) is not None:
        pytest.skip("AMX computes the network")
    with torch.no_grad():
        ours, stock = frozen(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert_matches("logits", ours, stock, copy.deepcopy(model).double()(x.double()))
    assert len(ran) >= 4
    assert "Winograd" in str(frozen.resnet_fast_report)


@pytest.mark.parametrize(("capability", "runs"), [("avx2", True), ("default", False)])
def test_less_of_the_cpu(capability, runs):
    """Where PyTorch is told to use less of the CPU: AVX2's kernels, or none of ours and the reason."""
    code = """
import torch
from torch.nn import functional as F
from resnet_fast import cpus
from resnet_fast.backends import direct, winograd
from resnet_fast.backends.primitives import Geometry
from resnet_fast.frozen import FrozenConv2d
reason = winograd.why_not()
torch.manual_seed(0)
cpus.here = lambda: cpus.Cpu("some CPU", 2, "AVX512")
conv = FrozenConv2d(torch.nn.Conv2d(67, 70, 3, padding=1), None, True, None)
x = torch.randn(8, 67, 23, 30)
with torch.no_grad():
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1).relu())
    try:
        y = direct.conv(x, conv.weight, Geometry([2, 2], [1, 1], [1, 1], 1))
    except RuntimeError as error:
        assert reason and "need AVX2" in str(error)
    else:
        assert not reason
        torch.testing.assert_close(y, F.conv2d(x, conv.weight, stride=2, padding=1))
print(reason, conv.kernel, conv.reason, sep="|")
"""
    done = fresh.python(code, environment=os.environ | {"ATEN_CPU_CAPABILITY": capability})
    assert done.returncode == 0, done.stderr
    reason, kernel, why = done.stdout.strip().split("|")
    assert (reason, kernel, why) == ("None", "Winograd F(4x4, 3x3)", "predicted") if runs else (why, "oneDNN", why)
    assert runs or "need AVX2" in why

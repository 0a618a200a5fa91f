"""`resnet-fast profile` on the CPU: what it counts, what it times, what it writes."""

import csv
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import CPU
from models import lively
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fast import cli, cpus, freeze, planned, twin
from resnet_fast.backends import winograd
from resnet_fast.backends.units import unit_name, why_no_unit
from resnet_fast.cli import cpu_ceilings, layer_timings, networks, profile_cpu
from resnet_fast.cli.cpu_ceilings import Ceilings
from resnet_fast.cli.layer_timings import LayerTiming
from resnet_fast.frozen import FrozenConv2d
from resnet_fast.kernels import selection
from resnet_fast.planned import PlannedResNet
from resnet_fast.shapes import Conv

CEILINGS = Ceilings({"float32": 1e9, "bfloat16": 1e9}, 1e9, 5e8)
"""Slow enough that no step is faster, so that limits are by these numbers."""


def run(*arguments):
    return cli.main(["profile", *(str(argument) for argument in arguments)])


SMALL = ("--device", "cpu", "--model", "resnet18", "-b", "2", "--img-size", "64", "--dtype", "float32")


@pytest.fixture(autouse=True)
def _layers_one_by_one(request, monkeypatch):
    """As on a CPU without AMX, but for tests of it."""
    if request.node.get_closest_marker("amx") is None:
        monkeypatch.setattr(planned, "why_no_unit", lambda dtype: "it is turned off")


@pytest.fixture
def small(monkeypatch):
    """A network smaller than its name says, and ceilings that take no time to measure."""
    monkeypatch.setattr(networks, "build", lambda name, images: lively(_network()))
    monkeypatch.setattr(cpu_ceilings, "measured", lambda dtypes: CEILINGS)


def _network():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 2, 1, 1], num_classes=10)
    return model.to(memory_format=torch.channels_last).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("unmeasured_cpu")
def test_what_is_measured_is_verified_and_reported(small, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(profile_cpu, "layer_timings", _seconds_each(profile_cpu.layer_timings, 10.0))
    files = {kind: tmp_path / f"profile.{kind}" for kind in ("json", "csv", "png")}
    assert run(*SMALL, *(word for kind, path in files.items() for word in (f"--{kind}", path))) == 0
    out = capsys.readouterr().out
    assert "layer2.1.conv2" in out
    assert "Limits are by 0.001 TFLOP/s (float32, the best seen) and 1.0 GB/s" in " ".join(out.split())
    report = json.loads(files["json"].read_text())
    assert report["schema"] == "resnet_fast.profile_cpu/1"
    assert report["environment"]["cpu"]["threads"] == torch.get_num_threads()
    assert report["verification"]["match"]
    assert report["ceilings"]["tflop_per_s"] == {"float32": 1e-3, "bfloat16": 1e-3}
    assert (report["ceilings"]["cache_gb_per_s"], report["ceilings"]["memory_gb_per_s"]) == (1.0, 0.5)
    rows, total = report["rows"], report["total"]
    assert [row["step"] for row in rows] == [
        "conv1", "maxpool",
        "layer1.0.conv1", "layer1.0.conv2",
        "layer2.0.conv1", "layer2.0.downsample", "layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2",
        "layer3.0.conv1", "layer3.0.downsample", "layer3.0.conv2",
        "layer4.0.conv1", "layer4.0.downsample", "layer4.0.conv2",
        "avgpool", "fc",
    ]  # fmt: skip
    assert [row["stage"] for row in rows if "." not in row["step"]] == ["stem", "stem", "head", "head"]
    for row in rows:
        by = {"compute": row["gflop"] * 1e6, "memory": row["mb"] * 1e3}
        assert row["limit_us"] == pytest.approx(max(by.values()))
        assert row["bound"] == max(by, key=by.get)
        assert row["of_limit"] == pytest.approx(row["limit_us"] / 10e6)
    limit = sum(row["limit_us"] for row in rows) / 1e6
    assert total["limit_img_per_s"] == pytest.approx(2 / limit)
    assert total["steps_img_per_s"] == pytest.approx(2 / (10 * len(rows)))
    assert total["of_limit"] == pytest.approx(total["img_per_s"] * limit / 2)
    assert total["mb_per_img"] == pytest.approx(sum(row["mb"] for row in rows) / 2)
    with files["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def _seconds_each(right, seconds):
    """`layer_timings`, its clock replaced."""
    return lambda frozen, images: [
        LayerTiming(each.name, each.kernel, seconds, each.flops, each.bytes) for each in right(frozen, images)
    ]


def test_the_peak_is_no_less_than_what_a_step_reaches(small, monkeypatch, tmp_path):
    monkeypatch.setattr(profile_cpu, "layer_timings", _seconds_each(profile_cpu.layer_timings, 1e-6))
    path = tmp_path / "profile.json"
    assert run(*SMALL, "--no-layers", "--json", path) == 0
    report = json.loads(path.read_text())
    fastest = max(row["gflop"] for row in report["rows"]) * 1e3
    assert report["peak_tflop_per_s"] == pytest.approx(fastest)


def test_it_says_where_float32_computes(small, monkeypatch, capsys):
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: True)
    monkeypatch.setattr(profile_cpu, "layer_timings", _seconds_each(profile_cpu.layer_timings, 10.0))
    assert run(*SMALL[:-1], "bfloat16") == 0
    assert "64 px, bfloat16, computed in float32, on " in " ".join(capsys.readouterr().out.split())


def test_a_wrong_network_is_not_timed(small, monkeypatch, capsys, tmp_path):
    path = tmp_path / "profile.json"
    right = PlannedResNet.forward
    monkeypatch.setattr(PlannedResNet, "forward", lambda self, x: right(self, x) * 1.01)
    monkeypatch.setattr(profile_cpu, "layer_timings", lambda *_: pytest.fail("timed"))
    assert run(*SMALL, "--json", path) == 1
    assert "FAILED, so nothing was timed: logits: MISMATCH" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert not report["verification"]["match"]
    assert report["rows"] == []
    assert report["total"] is None


@pytest.mark.parametrize("words", [(), ("--device", "cpu")], ids=["default", "asked"])
def test_it_is_the_cpu_where_there_is_no_gpu(words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = []
    monkeypatch.setattr(profile_cpu, "run", lambda args: seen.append(args) or 0)
    assert run(*words) == 0
    assert (seen[0].model, seen[0].batch_size, seen[0].dtype) == ("resnet50", 16, "bfloat16")


CONVS = {
    "stem_7x7_stride2": Conv(2, 3, 19, 18, 8, (7, 7), (2, 2), (3, 3)),
    "3x3_dilated": Conv(1, 4, 9, 7, 4, (3, 3), (1, 1), (2, 2), (2, 2)),
    "3x3_grouped": Conv(1, 4, 5, 6, 8, (3, 3), (2, 1), (1, 1), groups=2),
    "1x1_stride2": Conv(3, 4, 5, 5, 6, (1, 1), (2, 2)),
}


@pytest.mark.parametrize("name", CONVS)
def test_flops_are_those_of_real_pixels(name):
    """A convolution of ones by ones counts its own multiply-adds."""
    conv = CONVS[name]
    ones = torch.ones(conv.x_shape, dtype=torch.float64), torch.ones(conv.weight_shape, dtype=torch.float64)
    counted = F.conv2d(*ones, None, conv.stride, conv.padding, conv.dilation, conv.groups).sum().item()
    assert conv.real_flops == 2 * counted


def test_bytes_are_every_tensor_once(images):
    frozen = freeze(_network(), dtype=torch.float32)
    found = {each.name: each for each in layer_timings.layer_timings(frozen, images, repeats=1)}
    size = 2 * 64 * 16 * 16  # of activations in layer1; a 3x3 of 64 channels reads x, weight, bias and writes y
    weight = 64 * 64 * 9 + 64
    assert found["layer1.0.conv1"].bytes == 4 * (2 * size + weight)
    assert found["layer1.0.conv2"].bytes == 4 * (3 * size + weight)  # and the residual
    # a strided 1x1 reads a quarter of the pixels
    assert found["layer2.0.downsample"].bytes == 4 * (size // 4 + size // 2 + 64 * 128 + 128)
    assert found["layer1.0.conv2"].kernel.endswith("residual + ReLU")
    assert found["fc"].flops == 2 * 2 * 512 * 10
    assert found["avgpool"].flops == 0


@pytest.mark.parametrize("isa", ["AVX512", "AVX2"])
def test_layers_are_timed_in_the_call_for_all(isa, unmeasured_cpu, native, images, monkeypatch):
    """Where nothing is measured, AVX2 takes the first convolution and the max-pool in one."""
    monkeypatch.setattr(cpus, "here", lambda: replace(CPU, isa=isa))
    selection.forget()
    frozen = freeze(_network(), dtype=torch.float32)
    with torch.inference_mode():
        as_one = frozen.network_of(images)
    if as_one is None:
        pytest.skip("oneDNN is off")
    found = {each.name: each for each in layer_timings.layer_timings(frozen, images, repeats=1)}
    frozen.backend = "reference"
    assert frozen.network_of(images) is None
    alone = {each.name: each for each in layer_timings.layer_timings(frozen, images, repeats=1)}
    if isa == "AVX2" and winograd.why_not() is None:
        stem = found.pop("conv1+maxpool")
        assert stem.kernel == "direct + ReLU + max-pool"
        assert stem.flops == alone["conv1"].flops
        output = 4 * 2 * 64 * 32 * 32
        assert stem.bytes == alone["conv1"].bytes + alone["maxpool"].bytes - 2 * output
        del alone["conv1"], alone["maxpool"]
    assert [(each.name, each.kernel, each.flops, each.bytes) for each in found.values()] == [
        (each.name, each.kernel, each.flops, each.bytes) for each in alone.values()
    ]
    with torch.inference_mode():
        seconds = [time for _, time in as_one.timed_run(images)]
        layers = sum(layers for layers, _ in as_one.timed_run(images))
    assert layers == 15
    assert min(seconds) > 0


def test_steps_are_timed_inside_the_network(images, monkeypatch):
    """Layer by layer, by a clock that ticks once a look, every step takes one tick; no hook stays behind."""
    frozen = freeze(_network(), dtype=torch.float32)
    frozen.backend = "reference"
    ticks = iter(range(10**6))
    monkeypatch.setattr(layer_timings.time, "perf_counter", lambda: float(next(ticks)))
    found = layer_timings.layer_timings(frozen, images, repeats=3)
    assert [each.seconds for each in found] == [1.0] * 17
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in frozen.modules())


@pytest.mark.parametrize("slow", [False, True])
def test_a_twin_is_timed_where_it_computes(slow, images, monkeypatch):
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: slow)
    frozen = freeze(_network(), dtype=torch.bfloat16)
    dtype = torch.float32 if slow else torch.bfloat16
    assert layer_timings.computed_by(frozen, images).conv1.weight.dtype == dtype
    found = {each.name: each for each in layer_timings.layer_timings(frozen, images, repeats=1)}
    assert found["layer1.0.conv1"].bytes == dtype.itemsize * (2 * 2 * 64 * 16 * 16 + 64 * 64 * 9 + 64)


@pytest.mark.amx
@pytest.mark.skipif(why_no_unit(torch.bfloat16) is not None, reason=str(why_no_unit(torch.bfloat16)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_programs_are_timed_step_by_step(dtype, images, monkeypatch):
    """With the same work as the layers; the classifier is PyTorch's in float32, and in the program in bfloat16."""
    if (reason := why_no_unit(dtype)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(winograd, "takes_folded", lambda conv: False)  # which does less work
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: False)
    frozen = freeze(_network(), dtype=dtype)
    found = {each.name: each for each in layer_timings.layer_timings(frozen, images, repeats=2)}
    for module in (frozen, *(m for m in frozen.modules() if isinstance(m, FrozenConv2d))):
        module.backend = "reference"  # the convolutions' too: Winograd does less work
    by_layer = {each.name: each for each in layer_timings.layer_timings(frozen, images, repeats=1)}
    assert {each.kernel for each in found.values()} == {unit_name()} | (
        {"PyTorch"} if dtype == torch.float32 else set()
    )
    apart = {"conv1", "maxpool"} | ({"avgpool", "fc"} if dtype == torch.float32 else set())
    assert set(by_layer) - set(found) == apart
    assert "conv1+maxpool" in found
    assert sum(each.flops for each in found.values()) == sum(each.flops for each in by_layer.values())
    assert all(each.seconds > 0 for each in found.values())


def test_ceilings_are_rates_of_the_work_done(monkeypatch):
    """Half a second a call."""

    def times(launch):
        launch()
        return [0.75, 0.5]

    monkeypatch.setattr(cpu_ceilings, "times", times)
    monkeypatch.setattr(cpu_ceilings, "MATMULS", ((8, 4, 2), (16, 8, 4)))
    monkeypatch.setattr(cpu_ceilings, "CACHE_COPY_BYTES", 100)
    monkeypatch.setattr(cpu_ceilings, "MEMORY_COPY_BYTES", 1000)
    assert cpu_ceilings.measured(("float32", "bfloat16")) == Ceilings(
        {"float32": 4 * 16 * 8 * 4, "bfloat16": 4 * 16 * 8 * 4}, 400.0, 4000.0
    )


def test_the_clock_stops_at_its_budget(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(cpu_ceilings.time, "perf_counter", lambda: float(next(ticks)))
    calls = []
    assert cpu_ceilings.times(lambda: calls.append(0), repeats=5, budget=2.5) == [1.0] * 3
    assert len(calls) == 4  # one to warm up
    assert cpu_ceilings.times(lambda: None, repeats=2, budget=10.0) == [1.0] * 2

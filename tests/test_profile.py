"""`resnet-fast profile`: what it prints and writes without a GPU, and its measuring path with the clock replaced."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from models import lively
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fast import cli, engine, gpus
from resnet_fast.cli import ceilings, networks, profile
from resnet_fast.kernels import selection, tables


@pytest.fixture(autouse=True)
def _no_tuned_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "cache"))
    selection.forget()
    yield
    selection.forget()


def run(*arguments):
    return cli.main(["profile", *(str(argument) for argument in arguments)])


def test_resnet50_on_an_h200_that_is_not_here(capsys, tmp_path):
    path = tmp_path / "profile.json"
    assert run("--gpu", "h200", "--json", path) == 0
    out = capsys.readouterr().out
    assert "Nothing was measured" in out
    assert "790 TFLOP/s" in out
    assert "layer1.1.conv2+conv3, layer1.2.conv1" in out
    report = json.loads(path.read_text())
    assert report["schema"] == "resnet_fast.profile/1"
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert "commit" in report["environment"]
    assert report["flags"]["batch_size"] == 256
    assert report["gpu"] == {"name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132}
    assert report["ceilings"] == {"measured": False, "tflop_per_s": 790.0, "gb_per_s": 4300.0}
    assert report["verification"] is None
    totals = {row["fusion"]: row for row in report["totals"]}
    assert totals.keys() == {"auto", "conv", "tail"}
    assert totals["conv"]["mb_per_img"] <= 46
    assert totals["tail"]["mb_per_img"] <= 32
    assert all(row["gflop_per_img"] == pytest.approx(8.178, rel=0.01) for row in totals.values())
    assert all(row["limit_img_per_s"] > row["predicted_img_per_s"] > 0 for row in totals.values())
    assert all(row["img_per_s"] is None and row["arena_bytes"] > 0 for row in totals.values())
    rows = report["rows"]
    assert len(rows) == totals["auto"]["steps"] + 2
    assert rows[0]["step"] == "conv1+maxpool"
    assert [row["step"] for row in rows[-2:]] == ["avgpool", "fc"]
    assert {row["stage"] for row in rows} == {"stem", "layer1", "layer2", "layer3", "layer4", "head"}
    assert all(row["time_us"] is None and row["of_limit"] is None for row in rows)
    assert all(row["kernel"] == "library" or row["config"] for row in rows)
    assert sum(row["gflop"] for row in rows) / 256 == pytest.approx(totals["auto"]["gflop_per_img"])
    assert sum(row["mb"] for row in rows) / 256 == pytest.approx(totals["auto"]["mb_per_img"])
    assert 256e6 / sum(row["limit_us"] for row in rows) == pytest.approx(totals["auto"]["limit_img_per_s"])


@pytest.mark.parametrize("model", ["resnet18", "resnext50_32x4d"])
def test_other_networks_as_csv_and_picture(model, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"profile.{kind}" for kind in ("csv", "png")}
    words = [word for kind, path in files.items() for word in (f"--{kind}", path)]
    assert run("--gpu", "a100", "--model", model, "-b", 32, "--img-size", 97, "--dtype", "float16", *words) == 0
    out = capsys.readouterr().out
    assert "NVIDIA A100" in out
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["step"], rows[0]["kernel"]) == ("conv1+maxpool", "conv_pointer")  # no descriptors there
    assert {row["bound"] for row in rows} == {"compute", "memory"}
    assert not any(row["kernel"] == "bottleneck_tail" for row in rows)
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_totals_alone(capsys):
    assert run("--gpu", "h100", "--model", "resnet18", "--no-layers", "--fusion", "conv", "--dtype", "float64") == 0
    out = capsys.readouterr().out
    assert "layer1.0.conv1" not in out
    assert "predicted img/s" in out
    assert all(fusion in out for fusion in ("auto", "conv", "tail"))


@pytest.mark.parametrize(("dtype", "tflops"), [("float32", 380), ("float64", 27.5)])
def test_the_ceiling_is_that_of_the_arithmetic(dtype, tflops, tmp_path):
    path = tmp_path / "profile.json"
    assert run("--gpu", "h100", "--model", "resnet18", "--no-layers", "--dtype", dtype, "--json", path) == 0
    assert json.loads(path.read_text())["ceilings"]["tflop_per_s"] == pytest.approx(tflops)


BAD = {
    "unknown_gpu": (["--gpu", "h300"], "h100, h200"),
    "fusion_on_a_cpu": (["--fusion", "tail"], "--gpu: a100, h100, h200, b200"),
    "gpu_and_device": (["--gpu", "h200", "--device", "cuda"], "one of them"),
    "model": (["--gpu", "h200", "--model", "resnet51"], "resnet50"),
    "path": (["--gpu", "h200", "--json", "/proc/nowhere/profile.json"], "/proc/nowhere"),
    "picture": (["--gpu", "h200", "--png", "/proc/nowhere/profile.png"], "/proc/nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_line_that_says_what_would_work(name, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, word = BAD[name]
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("resnet-fast profile: error: ")
    assert word in lines[0]


@pytest.mark.parametrize(("flag", "value"), [("--dtype", "int8"), ("--fusion", "block"), ("-b", "0")])
def test_bad_choices_are_argparse_errors(flag, value, capsys):
    with pytest.raises(SystemExit) as ended:
        run("--gpu", "h200", flag, value)
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.fixture
def measuring(monkeypatch):
    """The CPU in a GPU's place, every step the library's, every call 1 ms: all of the measuring path but the clock.
    The network is a smaller one than its name says."""
    gpu = replace(gpus.named("a100"), name="Tesla V100", capability=(7, 0))
    timed = []

    def times(launch, device):
        launch()
        timed.append(device)
        return [2e-3, 1e-3, 1e-3]

    monkeypatch.setattr(profile, "_target", lambda args: (gpu, "cpu"))
    monkeypatch.setattr(networks, "build", lambda name, images: lively(ResNet(BasicBlock, [1, 1, 1, 1])).eval())
    monkeypatch.setattr(ceilings, "measured", lambda gpu, device, dtype: replace(gpu, bandwidth=1e12))
    monkeypatch.setattr(ceilings, "times", times)
    return timed


def test_ceilings_are_rates_of_the_work_done(monkeypatch):
    """Half a second a call: FLOP/s and bytes/s, TF32 allowed as to convolutions and only meanwhile."""
    seen = []

    def times(launch, device):
        seen.append((launch().dtype, torch.backends.cuda.matmul.allow_tf32))
        return [0.75, 0.5]

    monkeypatch.setattr(ceilings, "times", times)
    monkeypatch.setattr(ceilings, "MATMULS", ((8, 4, 2), (16, 8, 4)))
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1000)
    h200 = gpus.named("h200")
    measured = ceilings.measured(h200, "cpu", "float32")
    assert measured.flops == h200.flops | {"tf32": 4 * 16 * 8 * 4}
    assert measured.bandwidth == 4000
    assert seen[:2] == [(torch.float32, True)] * 2
    assert not torch.backends.cuda.matmul.allow_tf32
    assert ceilings.measured(h200, "cpu", "bfloat16").flops["bfloat16"] == 4 * 16 * 8 * 4


SMALL = ("--model", "resnet18", "-b", "2", "--img-size", "64", "--dtype", "float32")


def test_what_is_measured_is_verified_and_reported(measuring, capsys, tmp_path):
    path = tmp_path / "profile.json"
    assert run(*SMALL, "--json", path) == 0
    out = capsys.readouterr().out
    assert "measured here" in out
    assert "Nothing was measured" not in out
    report = json.loads(path.read_text())
    assert report["verification"]["match"]
    assert report["ceilings"]["measured"]
    assert report["ceilings"]["gb_per_s"] == 1000
    rows = report["rows"]
    assert len(rows) == len(measuring)
    assert all(row["time_us"] == 1000 for row in rows)
    assert all(row["of_limit"] == pytest.approx(row["limit_us"] / 1000) for row in rows)
    total = next(row for row in report["totals"] if row["fusion"] == "auto")
    assert total["img_per_s"] == pytest.approx(2000 / len(rows))


def test_a_wrong_network_is_not_timed(measuring, capsys, monkeypatch, tmp_path):
    path = tmp_path / "profile.json"
    right = engine.Engine.__call__
    monkeypatch.setattr(engine.Engine, "__call__", lambda self, x: right(self, x) * 1.01)
    assert run(*SMALL, "--json", path) == 1
    assert "FAILED, so no step was timed: logits: MISMATCH" in capsys.readouterr().out
    assert measuring == []
    report = json.loads(path.read_text())
    assert not report["verification"]["match"]
    assert all(row["time_us"] is None for row in report["rows"])


def test_a_kernel_that_the_gpu_refuses_is_planned_around(measuring, monkeypatch, tmp_path):
    refused = []
    warmup = engine.Engine.warmup

    def refusing(self, x):
        if not refused:
            step = self.plan.steps[2]
            refused.append(step.problem.key)
            raise engine.LaunchFailed(step, RuntimeError("out of shared memory"))
        return warmup(self, x)

    monkeypatch.setattr(engine.Engine, "warmup", refusing)
    path = tmp_path / "profile.json"
    assert run(*SMALL[:-1], "bfloat16", "--json", path) == 0
    row = next(row for row in json.loads(path.read_text())["rows"] if row["problem"] == refused[0])
    assert (row["kernel"], row["source"]) == ("library", "refused")
    assert "out of shared memory" in row["reason"]


@pytest.mark.gpu
@pytest.mark.parametrize("fusion", ["conv", "tail"])
def test_on_a_gpu(fusion, capsys, tmp_path):
    path = tmp_path / "profile.json"
    assert run("-b", "16", "--fusion", fusion, "--json", path) == 0, capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["verification"]["match"]
    assert report["ceilings"]["measured"]
    assert all(row["time_us"] > 0 for row in report["rows"])
    assert all(0 < row["of_limit"] < 1.3 for row in report["rows"])

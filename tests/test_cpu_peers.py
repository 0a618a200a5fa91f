"""`benchmarks/cpu_peers.py`: rehearsed on a tiny network, and what it does with who is wrong, missing or crashing."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import fresh
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "cpu_peers.py"
sys.path.append(str(SCRIPT.parent))  # behind tests/, which has a conftest too

import cpu_peers  # noqa: E402
from peers import jemalloc, others, worker  # noqa: E402
from peers.budget import LEAST_ROUNDS, Budget  # noqa: E402
from peers.case import Case  # noqa: E402
from peers.others import Other  # noqa: E402

from resnet_fast.cli import harness  # noqa: E402

TINY = ("--models", "resnet18", "--batch-sizes", 2, "--img-size", 64, "--rounds", 2, "--warmup", 1, "--threads", 1)


def script(*arguments):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of the processes it starts
    return fresh.script(SCRIPT, *map(str, arguments), environment=os.environ | {"PYTHONPATH": paths}, timeout=500)


def rows_of(path):
    record = json.loads(path.read_text())
    assert record["schema"] == "resnet_fast.cpu_peers/1"
    assert record["environment"]["cpu"]["threads"] == 1
    assert set(record["peers"]) == set(cpu_peers.PACKAGES)
    return {row["contender"]: row for row in record["rows"]}


def test_inference_rehearsed(tmp_path):
    names = ("eager_channels_last", "folded", "openvino_latency", "onnxruntime", "fast", "frozen")
    done = script("--out", tmp_path, *TINY, "--dtypes", "bfloat16", "--contenders", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "cpu-peers-inference.json")
    assert list(rows) == list(names)
    for name in ("eager_channels_last", "folded", "fast", "frozen"):
        row = rows[name]
        assert row["match"], row["reason"]
        assert row["samples"] == 2 * 4  # rounds, and four calls a turn at batch 2
        assert row["median_per_s"] == pytest.approx(2e3 / row["median_ms"])
        assert row["ratio"] == pytest.approx(row["median_per_s"] / rows["eager_channels_last"]["median_per_s"])
        assert (row["allocator"], row["task"], row["dtype"]) == ("malloc", "inference", "bfloat16")
    if importlib.util.find_spec("openvino") is None:
        assert "pip install 'resnet-fast[peers]'" in rows["openvino_latency"]["reason"]
        assert "OpenVINO, latency: not run: openvino not installed" in done.stdout
    else:
        assert rows["openvino_latency"]["match"]
    assert rows["onnxruntime"]["median_ms"] is None
    assert "ONNX Runtime: not run: " in done.stdout
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "cpu-peers-inference.png").read_bytes().startswith(b"\x89PNG")


def test_training_rehearsed(tmp_path):
    names = ("eager_channels_last", "eager_fused_sgd", "fast_fused_sgd")
    # at 64 pixels a ReLU that rounding flips shows in the whole gradient, which then is no measure
    bound = ("--name", "mine", "--minutes", 100)
    settings = ("--img-size", 96, "--dtypes", "float32", "--contenders", *names)
    done = script("--out", tmp_path, "--train", *TINY, *bound, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "mine-training.json")
    assert list(rows) == list(names)
    assert all(row["match"] and row["median_ms"] > 0 for row in rows.values())


def test_minutes_are_shared_out_among_the_cases():
    """Of 9 minutes: a case that takes 2 leaves more for the next, one that takes 8 leaves none."""
    now = [100.0]
    budget = Budget(9, 3, lambda: now[0])
    assert budget.begin()
    now[0] += 120
    assert not budget.is_spent(LEAST_ROUNDS)
    assert budget.begin()
    now[0] += 209
    assert not budget.is_spent(LEAST_ROUNDS)
    now[0] += 1
    assert budget.is_spent(LEAST_ROUNDS)
    assert not budget.is_spent(LEAST_ROUNDS - 1)
    now[0] += 300
    assert not budget.begin()


def test_without_a_bound_no_time_is_too_long():
    budget = Budget(None, 1, iter([]).__next__)
    assert budget.begin()
    assert not budget.is_spent(1000)


def _other(call):
    """A contender that computes `call(model, images)`."""
    return Other("another", lambda setting: lambda model: lambda images: call(model, images))


def _crash(model, images):
    raise RuntimeError("no such instruction")


@pytest.fixture
def benched(monkeypatch):
    """benched(others) -> the rows of eager channels_last and them, in this process."""

    def measure(**found):
        for name, other in found.items():
            monkeypatch.setitem(others.INFERENCE, name, other)
        chosen = ("eager_channels_last", *found)
        bench = worker._Bench(Case("resnet18", False, "float32", 2, 32, chosen), torch.get_num_threads(), False)
        bench.verify()
        bench.time(2, 1, 1, 1)
        return {row.contender: row for row in bench.rows()}

    return measure


def test_who_is_wrong_missing_or_crashing_is_listed_and_has_no_time(benched):
    rows = benched(
        wrong=_other(lambda model, images: model(images) * 1.01),
        crash=_other(_crash),
        missing=Other("missing", lambda setting: pytest.fail("made"), ("no_such_package",)),
        same=_other(lambda model, images: model(images)),
    )
    assert list(rows) == ["eager_channels_last", "wrong", "crash", "missing", "same"]
    for name in ("wrong", "crash", "missing"):
        assert not rows[name].match
        assert (rows[name].median_ms, rows[name].ratio, rows[name].samples) == (None, None, 0)
    assert "rmse" in rows["wrong"].reason
    assert rows["crash"].reason == "raised RuntimeError: no such instruction"
    assert rows["missing"].reason == "no_such_package not installed: pip install 'resnet-fast[peers]'"
    assert rows["same"].match
    assert rows["same"].samples == rows["eager_channels_last"].samples == 2


def test_batches_in_flight_are_counted(benched):
    """One call that runs the images several times: images a second, and the ratio, count them all."""
    inner = Other("in flight", lambda setting: lambda model: model, in_flight=True)
    rows = benched(flying=inner)
    row, images = rows["flying"], 2 * others.REQUESTS_A_THREAD * torch.get_num_threads()
    assert row.median_per_s == pytest.approx(images * 1e3 / row.median_ms)
    assert row.ratio == pytest.approx(row.median_per_s / rows["eager_channels_last"].median_per_s)


def test_the_exit_code_is_about_ours_and_the_baseline(benched, capsys):
    case = Case("resnet18", False, "float32", 2, 32, ("eager_channels_last", "wrong"))
    rows = benched(wrong=_other(lambda model, images: model(images) * 1.01))
    assert not cpu_peers.show(case, {"malloc": list(rows.values())})
    assert "another: FAILED, logits: rmse" in capsys.readouterr().out
    ours = Case("resnet18", False, "float32", 2, 32, ("eager_channels_last", "frozen_wrong"))
    rows = benched(frozen_wrong=_other(lambda model, images: model(images) * 1.01))
    assert cpu_peers.show(ours, {"malloc": list(rows.values())})


def test_the_picture_has_everybody(tmp_path):
    """Who is compiled, who is from elsewhere, who was wrong and who did not run."""
    pytest.importorskip("matplotlib")
    from peers import picture

    times = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.2, "median_per_s": 500.0, "p20_per_s": 526.0}
    timed = {**times, "p80_per_s": 455.0, "ratio": 1.0, "samples": 3}
    rows = [harness.Row(name, name, True, 0.3, "logits", "", **timed) for name in ("folded", "compile_default", "fast")]
    rows.append(harness.Row("frozen", "frozen", False, 2.0, "logits", "rmse"))
    rows.append(harness.not_run("onnxruntime", "ONNX Runtime", "not installed"))
    path = tmp_path / "peers.png"
    picture.draw({f"case {number}": rows for number in range(5)}, "machine", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_jemalloc_that_is_not_there_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is no file"):
        jemalloc.find(str(tmp_path / "libjemalloc.so"))
    monkeypatch.setattr(jemalloc.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ValueError, match="apt install libjemalloc2"):
        jemalloc.find("auto")
    with pytest.raises(RuntimeError, match="jemalloc was preloaded"):
        worker._Bench(Case("resnet18", False, "float32", 2, 32, ()), 1, True)


@pytest.fixture
def torchscript():
    """Settings that are this whole process's, put back behind the test."""
    yield
    torch.jit.enable_onednn_fusion(False)
    torch._C._jit_set_autocast_mode(True)


def test_onednn_graph_answers_as_pytorch_does(benched, torchscript):
    rows = benched(onednn_graph=others.INFERENCE["onednn_graph"])
    assert rows["onednn_graph"].match, rows["onednn_graph"].reason


@pytest.mark.parametrize("name", ["openvino_latency", "openvino_throughput", "onnxruntime"])
def test_engines_answer_as_pytorch_does(name, benched):
    for package in others.INFERENCE[name].packages:
        pytest.importorskip(package)
    rows = benched(**{name: others.INFERENCE[name]})
    assert rows[name].match, rows[name].reason

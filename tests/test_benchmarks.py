"""The pytest-benchmark files run, gate included, on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("pytest_benchmark")


def bench(tmp_path, *arguments, **environment):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }  # xdist's, for one
    environment = {**inherited, "RESNET_FAST_BENCH_BATCH": "4", "RESNET_FAST_BENCH_IMAGE": "64", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_tiny_run_of_every_file(tmp_path):
    report = tmp_path / "bench.json"
    chosen = "resnet50_layer1_conv3 or resnet18_layer2_0 or (networks and resnet18 and float32)"
    done = bench(tmp_path, "benchmarks", "--benchmark-only", f"--benchmark-json={report}", "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = json.loads(report.read_text())["benchmarks"]
    assert {Path(row["fullname"].split("::")[0]).name for row in rows} == {
        "bench_ops.py", "bench_blocks.py", "bench_networks.py"
    }  # fmt: skip
    for row in rows:
        assert {"contender", "dtype", "threads", "torch"} <= row["extra_info"].keys()
    assert all("GFLOP/s" in row["extra_info"] for row in rows if row["name"].startswith("test_conv_bn_act"))
    assert all("GB/s" in row["extra_info"] for row in rows if row["name"].startswith("test_bn_act"))


def test_a_wrong_result_fails_instead_of_being_timed(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "from resnet_fast import functional\n"
        "right = functional.bn_act\n"
        "functional.bn_act = lambda *call, **keywords: right(*call, **keywords) * 1.01\n"
    )
    chosen = "test_bn_act and resnet50_layer1_conv2 and float32 and infer and native"
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = bench(tmp_path, "-p", "wrong", "benchmarks/bench_ops.py", "--benchmark-only", "-k", chosen, PYTHONPATH=path)
    if "1 skipped" in done.stdout:
        pytest.skip("no native backend here")
    assert done.returncode == 1
    assert "MISMATCH" in done.stdout

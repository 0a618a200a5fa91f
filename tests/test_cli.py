"""The command line, in this process: what it prints, what it writes, its exit codes and one-line errors."""

import csv
import dataclasses
import json

import fresh
import pytest
import torch
from conftest import native_missing

from resnet_fast import __version__, cli, dispatch


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_version_help_and_no_command(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"resnet-fast {__version__}\n"
    assert run() == 2
    assert "verify" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run("bench", "--help")
    assert ended.value.code == 0
    assert "--amp-dtype" in capsys.readouterr().out


def test_unknown_command_and_flag(capsys):
    for arguments in (["fly"], ["info", "--fast"]):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2
    assert "--fast" in capsys.readouterr().err


def test_python_dash_m():
    done = fresh.module("resnet_fast", "--version")
    assert (done.returncode, done.stdout) == (0, f"resnet-fast {__version__}\n")


def test_info_json_says_what_runs_and_why_not(capsys, monkeypatch):
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    code = run("info", "--json")
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["broken"] else 0)
    assert report["broken"] == []
    assert report["versions"]["torch"] == torch.__version__
    usable = {"reference": True, "native": native_missing() is None, "triton": False}
    here = [row for row in report["backends"] if row["device"] == "cpu"]
    assert {row["backend"] for row in here} == set(dispatch.PRIORITY)
    assert all(row["usable"] == usable[row["backend"]] for row in here)
    assert all(row["usable"] or row["reason"] for row in report["backends"])
    assert all(row["match"] for row in report["self_test"])
    assert len(report["self_test"]) > 0


def test_info_prints_tables(capsys):
    assert run("info") == 0
    out = capsys.readouterr().out
    assert "reference" in out
    assert "torch" in out


def test_info_fails_where_a_variable_names_no_backend(capsys, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cudnn")
    assert run("info", "--json") == 1
    assert "RESNET_FAST_BACKEND='cudnn'" in json.loads(capsys.readouterr().out)["broken"][0]


def test_info_fails_where_a_backend_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "reference")
    module = dispatch.load("reference")
    original = module.bn_act
    monkeypatch.setattr(module, "bn_act", lambda *call: original(*call) * 1.01)
    assert run("info", "--json") == 1
    assert "self-test" in json.loads(capsys.readouterr().out)["broken"][0]


@pytest.mark.parametrize("variable", ["RESNET_FAST_BACKEND", "RESNET_FAST_TRAIN"])
def test_a_variable_that_names_nothing_is_one_line(variable, capsys, monkeypatch):
    monkeypatch.setenv(variable, "nine")
    assert run("verify", "--quick") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{variable}='nine'" in line


def test_verify_quick(capsys, tmp_path, backend):
    assert run("verify", "--quick", "--backend", backend, "--json", tmp_path / "verify.json") == 0
    report = json.loads((tmp_path / "verify.json").read_text())
    text = json.dumps(report)
    assert "bn_act" in text
    assert backend in text
    assert '"match": false' not in text
    assert '"match": true' in text


def test_verify_notices_a_wrong_backend(capsys, monkeypatch):
    module = dispatch.load("reference")
    original = module.bn_act_backward
    monkeypatch.setattr(module, "bn_act_backward", lambda *call: [grad * 1.01 for grad in original(*call)])
    assert run("verify", "--quick", "--backend", "reference") == 1


def tiny_bench(*more):
    return (
        "bench",
        "--model",
        "resnet18",
        "-b",
        "2",
        "--img-size",
        "32",
        "--num-warm-iter",
        "1",
        "--num-bench-iter",
        "2",
        "--rounds",
        "2",
        "--backend",
        "reference",
        *more,
    )


def test_bench_writes_what_it_prints(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "csv", "png")}
    code = run(*tiny_bench("--bench", "both", *[word for kind, path in files.items() for word in (f"--{kind}", path)]))
    out = capsys.readouterr().out
    assert code == 0, out
    rows = json.loads(files["json"].read_text())["rows"]
    assert {row["task"] for row in rows} == {"infer", "train"}
    assert all(row["match"] and row["median_ms"] > 0 and row["p20_ms"] <= row["p80_ms"] for row in rows)
    assert {row["contender"] for row in rows if row["task"] == "infer"} >= {"eager_channels_last", "fast", "frozen"}
    with files["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_bench_never_times_a_wrong_result(capsys, monkeypatch, tmp_path):
    module = dispatch.load("reference")
    original = module.conv_bn_act
    monkeypatch.setattr(module, "conv_bn_act", lambda *call: original(*call) * 1.05)
    bn_act = module.bn_act
    monkeypatch.setattr(module, "bn_act", lambda *call: bn_act(*call) * 1.05)
    assert run(*tiny_bench("--bench", "infer", "--json", tmp_path / "bench.json")) == 1
    fast = next(r for r in json.loads((tmp_path / "bench.json").read_text())["rows"] if r["contender"] == "fast")
    assert not fast["match"]
    assert fast["median_ms"] is None


def test_bench_leaves_out_the_task_that_no_contender_has(capsys):
    assert run(*tiny_bench("--bench", "both", "--contenders", "frozen")) == 0
    out, err = capsys.readouterr()
    assert "inference" in out
    assert "training step" not in out
    assert "no frozen there" in err


BAD = {
    "model": (["bench", "--model", "resnet51"], "resnet50"),
    "bench_path": ([*tiny_bench(), "--json", "/proc/nowhere/bench.json"], "/proc/nowhere"),
    "verify_path": (["verify", "--quick", "--json", "/proc/nowhere/verify.json"], "/proc/nowhere"),
    "info_path": (["info", "--json", "/proc/nowhere/info.json"], "/proc/nowhere"),
    "demo_path": (["demo", "--output", "/proc/nowhere/demo"], "/proc/nowhere"),
    "device": (["bench", "--device", "tpu"], "tpu"),
    "full_disk": (["info", "--json", "/dev/full"], "cannot write /dev/full: No space left"),
    "nothing_to_verify": (["verify", "--quick", "--device", "cpu", "--backend", "triton"], "nothing of backend triton"),
    "nothing_left": (
        [*tiny_bench(), "--no-channels-last", "--contenders", "eager_channels_last"],
        "eager_channels_last",
    ),
    "nothing_to_time": ([*tiny_bench(), "--bench", "train", "--contenders", "frozen"], "nothing to time"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_line_that_names_the_thing(name, capsys):
    arguments, word = BAD[name]
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"resnet-fast {arguments[0]}: error: ")
    assert word in lines[0]


def test_unknown_backend_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cudnn")
    assert run(*tiny_bench()) == 2
    assert "RESNET_FAST_BACKEND='cudnn' is not a backend" in capsys.readouterr().err


def test_an_unavailable_backend_is_an_error_not_a_trace(capsys, monkeypatch):
    monkeypatch.setattr(dispatch.load("native"), "why_not", lambda *call: "the cable is unplugged")
    dispatch.clear_cache()
    code = run(*tiny_bench("--bench", "infer", "--backend", "native"))
    captured = capsys.readouterr()
    assert code in (1, 2)
    assert "the cable is unplugged" in captured.err + captured.out


@pytest.mark.slow
def test_demo_quick(capsys, monkeypatch, tmp_path):
    for module in ("matplotlib", "sklearn", "PIL"):
        pytest.importorskip(module)
    from resnet_fast.cli import demo, digits, photos

    # in less time: as many steps, of a third of the images
    data, batch = digits.load(), digits.BATCH // 3
    few = dataclasses.replace(data, train=data.train[: 30 * batch], train_labels=data.train_labels[: 30 * batch])
    monkeypatch.setattr(digits, "load", lambda: few)
    monkeypatch.setattr(digits, "BATCH", batch)
    monkeypatch.setattr(photos, "_SHIPPED", photos._SHIPPED[:2])
    monkeypatch.setitem(demo.EPOCHS, True, 2)
    monkeypatch.setitem(demo.ACCURACY, True, 0.7)
    assert run("demo", "--quick", "--output", tmp_path) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "demo.json").read_text())
    assert len(report["checks"]) >= 3
    assert all(check["passed"] for check in report["checks"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

"""Which kernel a frozen 3x3 takes on the CPU by a tuned table, and `resnet-fast tune --device cpu`, which writes it."""

import json

import pytest
import torch
from cases import CPU, draw
from torch import nn

from resnet_fast import cli
from resnet_fast.backends import winograd as backend
from resnet_fast.cli import info, tune, tuning
from resnet_fast.frozen import FrozenConv2d
from resnet_fast.kernels import configs, selection, tables
from resnet_fast.kernels.configs import WinogradConfig
from resnet_fast.problems import Conv, ConvProblem

pytestmark = pytest.mark.usefixtures("native", "unmeasured_cpu")

PROBLEM = ConvProblem(Conv(8, 64, 28, 28, 64, (3, 3), padding=(1, 1)), "float32")


def computed(shape) -> FrozenConv2d:
    """A layer, after it has seen an input of `shape`."""
    conv = FrozenConv2d(nn.Conv2d(shape[1], 64, 3, padding=1), None, True, None)
    with torch.no_grad():
        conv(draw(shape, torch.float32, "channels_last"))
    return conv


def table(row, **changes) -> str:
    head = {"schema": tables.SCHEMA, "cpu": CPU.name, "environment": {}}
    return json.dumps(head | changes | {"rows": {PROBLEM.key: row}})


ONEDNN = {"config": None, "us": 1.0, "library_us": 1.0, "variant": "onednn"}
OURS = {"config": {"kernel": "winograd"}, "us": 1.0, "library_us": 2.0, "variant": "onednn"}


@pytest.mark.parametrize(("row", "name"), [(ONEDNN, "oneDNN: measured faster"), (OURS, "Winograd F(4x4, 3x3): tuned")])
def test_a_tuned_table_decides(unmeasured_cpu, row, name):
    unmeasured_cpu.write_text(table(row))
    conv = computed(PROBLEM.conv.x_shape)
    assert f"{conv.kernel}: {conv.reason}".startswith(name)


@pytest.mark.parametrize("text", [
    pytest.param("{", id="no_json"),
    pytest.param(table(ONEDNN, cpu="another CPU"), id="another_cpu"),
    pytest.param(table(ONEDNN, schema="other/1"), id="another_schema"),
    pytest.param(table({"us": 1.0}), id="half_a_row"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_is_not_used_and_said(unmeasured_cpu, text, said):
    unmeasured_cpu.write_text(text)
    assert selection.choose(PROBLEM, CPU) == selection.Choice(WinogradConfig(), "predicted")
    assert any(f"tuned table {unmeasured_cpu} is not used" in message for message in said())


def test_a_row_of_an_unknown_kernel_is_skipped_and_said(unmeasured_cpu, said):
    unmeasured_cpu.write_text(table({**ONEDNN, "config": {"kernel": "nothing"}}))
    assert selection.choose(PROBLEM, CPU) == selection.Choice(WinogradConfig(), "predicted")
    assert any(
        f"tuned table {unmeasured_cpu}: 1 rows are of kernels that have changed" in message for message in said()
    )


def test_a_gpus_kernel_in_a_cpus_table_is_not_taken(unmeasured_cpu):
    gpus_own = {"kernel": "conv_pointer", "block_pixels": 64, "block_out": 16, "block_in": 16, "warps": 4, "stages": 3}
    unmeasured_cpu.write_text(table({**OURS, "config": gpus_own}))
    assert selection.choose(PROBLEM, CPU).source == "predicted"
    assert configs.why_not(WinogradConfig(), PROBLEM, tune.REHEARSAL) == "winograd does not run on a GPU"


@pytest.fixture
def tuned(monkeypatch, unmeasured_cpu):
    """`tune --device cpu` for one layer, with few runs; its exit code and table."""
    monkeypatch.setattr(tuning, "_CPU_RUNS", 3)
    monkeypatch.setattr(tune.triton_backend, "interpreted", lambda: False)

    def run(*arguments):
        usual = ["--model", "resnet18", "-b", "4", "--img-size", "64", "--only", "* n4 64x16x16 k64 f3 p1 float32*"]
        code = cli.main(["tune", "--device", "cpu", *usual, *arguments])
        return code, json.loads(unmeasured_cpu.read_text()) if unmeasured_cpu.exists() else None

    return run


def test_tune_writes_the_table_that_freeze_reads(capsys, tuned, unmeasured_cpu):
    code, written = tuned()
    assert code == 0
    assert written["cpu"] == CPU.name
    assert set(written["rows"]) == {
        "conv n4 64x16x16 k64 f3 p1 float32",
        "conv n4 64x16x16 k64 f3 p1 float32 +residual",
        "conv n4 64x16x16 k64 f3 p1 float32 no-relu bn",
    }
    for row in written["rows"].values():
        assert set(row["times"]) == {"PyTorch", "library onednn", "winograd"}
        assert row["us"] == min(row["times"]["winograd"], row["library_us"])
        assert not row["rejected"]
    assert "3 rows in" in capsys.readouterr().out
    assert computed((4, 64, 16, 16)).reason in ("tuned", "measured faster than every kernel of ours")
    [row] = [row for row in info.collect()["tuned"] if row["device"] == CPU.name]
    assert (row["rows"], row["reason"]) == (3, "")
    assert row["files"] == [str(unmeasured_cpu)]
    assert tuned() == (0, written)


def test_tune_measures_training_steps(tuned):
    """On a CPU of these rows only the weight's gradient is training's alone."""
    code, written = tuned("--task", "train", "-b", "8", "--only", "* n8 64x16x16 k64 f3 p1 float32*")
    assert code == 0
    assert set(written["rows"]) == {
        "conv n8 64x16x16 k64 f3 p1 float32 no-relu bn",
        "weight_gradient n8 64x16x16 k64 f3 p1 float32",
    }
    for row in written["rows"].values():
        assert set(row["times"]) == {"PyTorch", "library onednn", "winograd"}
        assert not row["rejected"]


def test_tune_never_takes_a_wrong_kernel(capsys, monkeypatch, tuned):
    packed, live = backend.conv_packed, backend.conv
    monkeypatch.setattr(backend, "conv_packed", lambda *call: packed(*call) * (1 + 1e-5))
    monkeypatch.setattr(backend, "conv", lambda *call: (live(*call)[0] * (1 + 1e-5), None, None))
    code, written = tuned()
    assert code == 1
    assert capsys.readouterr().out.count("WRONG conv n4 64x16x16") == 3
    assert all(row["config"] is None and "winograd" in row["rejected"] for row in written["rows"].values())


def test_tune_says_what_it_cannot(capsys, monkeypatch, tuned):
    for arguments, message in (
        (["--dtype", "bfloat16"], "single layers in float32 alone"),
        (["--fusion", "tail"], "single layers in float32 alone"),
        (["--only", "nothing"], "matches no problem"),
    ):
        assert tuned(*arguments) == (2, None)
        assert message in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(backend, "why_not", lambda: "no extension for the test")
    assert tuned() == (2, None)
    assert "no extension for the test" in capsys.readouterr().err


def test_under_the_interpreter_it_rehearses_a_gpu_and_needs_a_file(tuned, monkeypatch, capsys):
    monkeypatch.setattr(tune.triton_backend, "interpreted", lambda: True)
    assert tuned() == (2, None)
    assert "makes no table of anything" in capsys.readouterr().err.splitlines()[-1]


def test_tune_refuses_a_file_that_is_no_table(unmeasured_cpu, tuned, capsys):
    unmeasured_cpu.write_text("{}")
    assert tuned() == (2, {})
    assert "name another --output" in capsys.readouterr().err


def test_tune_lists_a_cpus_problems(tuned, capsys):
    assert tuned("--list")[0] == 0
    out = capsys.readouterr().out
    assert "3 problems on" in out
    assert "conv n4 64x16x16 k64 f3 p1 float32 +residual" in out


def test_info_says_what_a_cpu_takes(monkeypatch):
    text = info._frozen_cpu_by(torch.float32)
    assert text.startswith(("AMX", "emulated AMX")) or text.endswith("where predicted to be faster")
    monkeypatch.setattr(info.native, "why_no_unit", lambda dtype: "no AMX for the test")
    monkeypatch.setattr(backend, "why_not", lambda: "no vectors for the test")
    assert "no Winograd F(4x4, 3x3): no vectors for the test" in info._frozen_cpu_by(torch.float32)
    assert "Winograd" not in info._frozen_cpu_by(torch.bfloat16)

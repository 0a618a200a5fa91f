"""Which kernel a frozen 3x3 takes on the CPU by a tuned table, and `resnet-fast tune --device cpu`, which writes it."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from cases import CPU, ONEDNN, draw, tuned_table
from models import lively
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnet_fast import cli, freeze, optimize, twin
from resnet_fast.backends import direct as direct_backend
from resnet_fast.backends import native as native_backend
from resnet_fast.backends import units
from resnet_fast.backends import winograd as backend
from resnet_fast.cli import environment, info, tune, tuning
from resnet_fast.frozen import FrozenConv2d
from resnet_fast.kernels import configs, selection
from resnet_fast.kernels.configs import WinogradConfig
from resnet_fast.problems import ConvProblem, SectionProblem
from resnet_fast.shapes import BlockShapes, Conv

pytestmark = pytest.mark.usefixtures("native", "unmeasured_cpu")

PROBLEM = ConvProblem(Conv(8, 64, 28, 28, 64, (3, 3), padding=(1, 1)), "float32")


def computed(shape) -> FrozenConv2d:
    """A layer, after it has seen an input of `shape`."""
    conv = FrozenConv2d(nn.Conv2d(shape[1], 64, 3, padding=1), None, True, None)
    with torch.no_grad():
        conv(draw(shape, torch.float32, "channels_last"))
    return conv


def table(row, **changes) -> str:
    return tuned_table({PROBLEM.key: row}, **changes)


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


@pytest.fixture
def no_tiles(monkeypatch):
    """With AMX a training step's convolution has three problems more: `test_tune_measures_training_in_tiles`."""
    monkeypatch.setattr(units, "has_tiles", lambda: False)


def test_tune_writes_the_table_that_freeze_reads(capsys, tuned, unmeasured_cpu, no_tiles):
    code, written = tuned()
    assert code == 0
    assert written["cpu"] == CPU.name
    assert set(written["rows"]) == {
        "conv n4 64x16x16 k64 f3 p1 float32",
        "conv n4 64x16x16 k64 f3 p1 float32 +residual",
        "conv n4 64x16x16 k64 f3 p1 float32 no-relu bn",
    }
    for key, row in written["rows"].items():
        assert set(row["times"]) == {"PyTorch", "library onednn", "winograd", "direct"}
        assert row["us"] == min(row["library_us"], *(row["times"][name] for name in ("winograd", "direct")))
        assert key.endswith("bn") == (row["times"]["PyTorch"] == row["library_us"])  # the same call
        assert not row["rejected"]
    assert "3 rows in" in capsys.readouterr().out
    assert computed((4, 64, 16, 16)).reason in ("tuned", "measured faster than every kernel of ours")
    [row] = [row for row in info.collect()["tuned"] if row["device"] == CPU.name]
    assert (row["rows"], row["reason"]) == (3, "")
    assert row["library_rows"] == sum(each["config"] is None for each in written["rows"].values())
    assert row["files"] == [str(unmeasured_cpu)]
    assert tuned() == (0, written)


def test_tune_measures_training_steps(tuned, no_tiles):
    """On a CPU of these rows only the weight's gradient is training's alone."""
    code, written = tuned("--task", "train", "-b", "8", "--only", "* n8 64x16x16 k64 f3 p1 float32*")
    assert code == 0
    assert set(written["rows"]) == {
        "conv n8 64x16x16 k64 f3 p1 float32 no-relu bn",
        "weight_gradient n8 64x16x16 k64 f3 p1 float32",
    }
    for key, row in written["rows"].items():
        direct = ["direct"] if key.endswith("bn") else []
        assert set(row["times"]) == {"PyTorch", "library onednn", "winograd", *direct}
        assert not row["rejected"]


@pytest.fixture
def unit(monkeypatch) -> str:
    """What multiplies bfloat16 here."""
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: False)
    if (reason := units.why_no_unit(torch.bfloat16)) is not None:
        pytest.skip(reason)
    return units.unit(torch.bfloat16)


def stage_of(block: BasicBlock) -> tuple[nn.Module, torch.Tensor, nn.Module]:
    """The block optimized, its input, and it frozen as a stage."""
    block = lively(block).eval().bfloat16().to(memory_format=torch.channels_last)
    x = draw((4, block.conv1.in_channels, 16, 16), torch.bfloat16, "channels_last")
    return optimize(nn.Sequential(copy.deepcopy(block)), backend="native")[0], x, freeze(nn.Sequential(block).eval())


@pytest.mark.amx
def test_tune_measures_blocks_and_networks(tuned, unit):
    if not environment.cpu()["onednn_bf16"]:
        pytest.skip("oneDNN, beside which it measures, packs no bfloat16 here")
    usual = ["--task", "infer", "--dtype", "bfloat16", "--only"]
    code, written = tuned(*usual, "network n4 3x64x64 *")
    assert code == 0
    code, written = tuned(*usual, "block n4 64x16x16 *")
    assert code == 0
    assert [key.split()[0] for key in written["rows"]] == ["network", "block", "block"]  # with a downsample and without
    for row in written["rows"].values():
        assert set(row["times"]) == {"PyTorch", "library onednn", "program"}
        assert not row["rejected"]
        assert row["candidates"] == 1


@pytest.mark.amx
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tune_measures_training_in_tiles(tuned, dtype):
    if not units.has_tiles():
        pytest.skip("this CPU has no AMX with bfloat16")
    code, written = tuned("--task", "train", "--dtype", dtype, "--only", "training * n4 64x16x16 k128 f3 s2 p1 *")
    assert code == 0
    of = ("output", "data_gradient", "weight_gradient")
    assert set(written["rows"]) == {f"training {each} n4 64x16x16 k128 f3 s2 p1 {dtype}" for each in of}
    for row in written["rows"].values():
        assert set(row["times"]) == {"PyTorch", "library onednn", "tiles"}
        assert not row["rejected"]


@pytest.mark.amx
def test_tune_never_takes_a_wrong_program(tuned, unit, monkeypatch):
    op = native_backend.cpu_residual_block
    monkeypatch.setattr(native_backend, "cpu_residual_block", lambda *call: op(*call) * (1.05 if call[-1] else 1.0))
    code, written = tuned("--task", "infer", "--dtype", "bfloat16", "--only", "block n4 64x16x16 2 convs *")
    assert code == 1
    [row] = written["rows"].values()
    assert row["config"] is None
    assert row["rejected"]["program"].startswith(tuning.WRONG)


@pytest.mark.amx
@pytest.mark.parametrize("is_program", [True, False])
@torch.no_grad()
def test_a_tuned_table_decides_what_is_a_program(unmeasured_cpu, unit, is_program, monkeypatch):
    """Of blocks in eval mode, and of frozen stages; with the same results as far as float64 can tell them apart."""
    fast, x, frozen = stage_of(BasicBlock(64, 64))
    conv = Conv(*x.shape, 64, (3, 3), padding=(1, 1))
    live = SectionProblem((BlockShapes((conv, conv)),), "bfloat16", folded=False)
    row = ONEDNN | ({"config": {"kernel": "program"}} if is_program else {})
    unmeasured_cpu.write_text(tuned_table({problem.key: row for problem in (live, replace(live, folded=True))}))
    selection.forget()
    units, op = [], native_backend.cpu_residual_block
    monkeypatch.setattr(native_backend, "cpu_residual_block", lambda *call: [units.append(call[-1]), op(*call)][1])
    expected = None if is_program else "measured faster than every kernel of ours"
    assert frozen.amx_network(x).why_not(x) == expected
    torch.testing.assert_close(fast(x), frozen(x), rtol=3e-2, atol=3e-2)
    assert units == [unit if is_program else ""]
    x = x[:, :, :12].contiguous(memory_format=torch.channels_last)  # nothing is measured of this shape
    assert frozen.amx_network(x).why_not(x) is None
    fast(x)
    assert units[1] == unit


def test_a_sections_key_is_the_same_for_any_batch_and_no_other_shapes():
    def key(batch=4, stride=1, downsample=None, dtype="bfloat16", **rest) -> str:
        convs = [Conv(batch, 64, 16, 16, 64, (3, 3), (n, n), (1, 1)) for n in (1, stride)]
        return SectionProblem((BlockShapes(tuple(convs), downsample),), dtype, **rest).key

    assert re.fullmatch("network n4 64x16x16 2 convs [0-9a-f]{8} bfloat16", key())
    assert re.fullmatch("block n4 64x16x16 2 convs [0-9a-f]{8} bfloat16 bn", key(folded=False))
    assert key(batch=16) == key().replace("n4", "n16")
    branch = Conv(4, 64, 16, 16, 64)
    different = {key(), key(stride=2), key(downsample=branch), key(dtype="float32"), key(folded=False)}
    assert len(different | {key(stem=Conv(4, 3, 64, 64, 64, (7, 7), (2, 2), (3, 3)))}) == 6


def test_tune_never_takes_a_wrong_kernel(capsys, monkeypatch, tuned, no_tiles):
    packed, live = backend.conv_packed, backend.conv
    direct_packed, direct = direct_backend.conv_packed, direct_backend.conv
    monkeypatch.setattr(backend, "conv_packed", lambda *call: packed(*call) * (1 + 1e-5))
    monkeypatch.setattr(backend, "conv", lambda *call: (live(*call)[0] * (1 + 1e-5), None, None))
    monkeypatch.setattr(direct_backend, "conv_packed", lambda *call: direct_packed(*call) * (1 + 1e-5))
    monkeypatch.setattr(direct_backend, "conv", lambda *call: direct(*call) * (1 + 1e-5))
    code, written = tuned()
    assert code == 1
    assert capsys.readouterr().out.count("WRONG conv n4 64x16x16") == 6
    for row in written["rows"].values():
        assert row["config"] is None
        assert set(row["rejected"]) == {"winograd", "direct"}


def test_tune_says_what_it_cannot(capsys, monkeypatch, tuned):
    train = ["--dtype", "bfloat16", "--task", "train"]
    no_choice = [] if units.unit(torch.bfloat16) else [(train, "in more than one way")]
    for arguments, message in (
        (["--dtype", "float16"], "in float32 and bfloat16 alone"),
        (["--fusion", "tail"], "in float32 and bfloat16 alone"),
        *no_choice,
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


def test_tune_lists_a_cpus_problems(tuned, capsys, no_tiles):
    assert tuned("--list")[0] == 0
    out = capsys.readouterr().out
    assert "3 problems on" in out
    assert "conv n4 64x16x16 k64 f3 p1 float32 +residual" in out


def test_info_says_what_a_cpu_takes(monkeypatch):
    text = info._frozen_cpu_by(torch.float32)
    assert text.startswith(("AMX", "emulated AMX")) or text.endswith("where predicted to be faster")
    monkeypatch.setattr(info.units, "why_no_unit", lambda dtype: "no AMX for the test")
    monkeypatch.setattr(backend, "why_not", lambda: "no vectors for the test")
    assert "no Winograd F(4x4, 3x3): no vectors for the test" in info._frozen_cpu_by(torch.float32)
    assert "Winograd" not in info._frozen_cpu_by(torch.bfloat16)

"""`tune` measures what training chooses kernels for, by the very calls that training makes."""

from dataclasses import replace

import pytest
import requires_triton  # noqa: F401
import torch
from cases import draw
from interpreted.test_training_blocks import BLOCKS

from resnet_fast import gpus, optimize, training
from resnet_fast.cli import training_problems, tuning, workloads
from resnet_fast.kernels import selection
from resnet_fast.kernels.configs import candidates
from resnet_fast.problems import ConvProblem, GramDgradProblem, PrologueProblem
from resnet_fast.shapes import Conv

H200 = gpus.KNOWN["h200"]
POINTWISE = Conv(2, 64, 4, 4, 128)
PROBLEMS = [
    ConvProblem(Conv(2, 64, 4, 4, 64, (3, 3), padding=(1, 1)), "float32", relu=False, statistics=True),
    PrologueProblem(POINTWISE, "float32", statistics=True),
    PrologueProblem(POINTWISE, "float32", joined=True, residual=True, residual_norm=True),
    GramDgradProblem(POINTWISE, "float32", prologue=True),
]


@pytest.fixture(autouse=True)
def _tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # else float32 convolutions are all cuDNN's


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck_stride2", "basic_stride2"])
def test_every_problem_that_training_chooses_for_is_measured(name, monkeypatch):
    asked, choose = set(), selection.choose  # those that there is something to choose for

    def watching(problem, gpu):
        asked.update([selection.measured_as(problem, gpu).key] if candidates(problem, gpu) else [])
        return choose(problem, gpu)

    monkeypatch.setattr(selection, "choose", watching)
    block = optimize(BLOCKS[name](), backend="triton", strict=True)
    x = draw((2, block.conv1.in_channels, 6, 6), torch.float32, "channels_last")
    for stage in training.STAGES[1:]:
        block.fast_train_stage = stage
        block(x.clone().requires_grad_()).sum().backward()
    measured = {problem.key for problem in training_problems.of_block(block, x.shape, "float32")}
    assert asked
    assert asked <= measured


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.key)
def test_a_row(problem):
    row = tuning.measure(problem, H200, "cpu", top=1, crashed={})
    (label,) = [label for label in row["times"] if label not in (tuning.STOCK, "library library")]
    assert row["rejected"] == {}
    assert row["library_us"] > 0
    assert row["variant"] == "library"
    assert not selection.is_forced(problem)
    assert label.split()[0] in ("conv_pointer", "conv_tma", "conv_prologue", "gram_dgrad")


def test_a_wrong_kernel_is_rejected(monkeypatch):
    from resnet_fast.backends import triton_conv

    def half_written(*arguments):
        y, mean, var = conv(*arguments)
        return y, mean, var * 1.1

    conv = triton_conv.conv
    monkeypatch.setattr(triton_conv, "conv", half_written)
    row = tuning.measure(PROBLEMS[0], H200, "cpu", top=1, crashed={})
    assert row["kernel"] == tuning.STOCK
    assert all(reason.startswith("wrong: running_var") for reason in row["rejected"].values())


def test_what_is_refused_while_it_is_measured_is_not_refused_for_good(monkeypatch):
    from resnet_fast.backends import triton

    problem = replace(PROBLEMS[0], conv=replace(PROBLEMS[0].conv, height=5))
    error = triton.launcher().REFUSALS[0]

    def refuse(*arguments, **keywords):
        raise error(1, 1, "shared memory") if error.__init__ is not Exception.__init__ else error("no")

    monkeypatch.setattr(triton.launcher(), "conv", refuse)
    row = tuning.measure(problem, H200, "cpu", top=1, crashed={})
    assert len(row["rejected"]) == 1
    assert row["library_us"] > 0
    assert selection.choose(problem, H200).source == "predicted"
    assert workloads.of(problem, "cpu").library["library"]()["y"].isfinite().all()

"""`benchmarks/convergence.py` and `benchmarks/training_memory.py`: what they claim of the stages of training."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet50

from resnet_fast.frozen import onednn_runs

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # behind tests/, which has a conftest too

import convergence  # noqa: E402
import training_memory  # noqa: E402

pytest.importorskip("sklearn")


def test_the_stages_learn_what_stock_learns(native, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    low = "bfloat16" if onednn_runs(torch.bfloat16) else "float32"  # without oneDNN bfloat16 takes minutes
    arguments = ["--backend", native, "--steps", "4", "--dtypes", "float64", low, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["convergence.py", *arguments])
    assert convergence.main() == 0
    record = json.loads((tmp_path / "convergence-cpu.json").read_text())
    assert "float64: distance to stock" in capsys.readouterr().out
    for result in record["results"].values():
        assert set(result["curves"]) == {"stock", "stock, NCHW", *(f"stage {stage}" for stage in (1, 2, 3, 4))}
        assert all(len(curve) == 4 for curve in result["curves"].values())
        assert result["curves"]["stock"][-1] < result["curves"]["stock"][0], "it must learn something"
    assert (tmp_path / "convergence-cpu.png").stat().st_size > 10_000


def test_a_stage_that_strays_is_told(monkeypatch):
    from resnet_fast.backends import residual_block

    original = residual_block._gram_backward
    forgetful = lambda *call: (lambda dx, grads: (dx * 1.001, grads))(*original(*call))  # noqa: E731
    monkeypatch.setattr(residual_block, "_gram_backward", forgetful)
    found = convergence.run(2, "reference", "cpu", "float64", stages=(3, 4))
    assert found["strays"] == ["stage 4"]


def test_every_stage_moves_less_than_the_one_before():
    """Bytes of a step, from the shapes; the ideal without the Gram form is 228 MB an image, eager moves 475."""
    with torch.device("meta"), torch.no_grad():
        model = resnet50().to(torch.bfloat16)
        images = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
        moved = [training_memory.moved(model, images, stage) / 256 / 1e6 for stage in (1, 2, 3, 4, None)]
    first, second, third, fourth, auto = moved
    assert 475 > first > second > third > fourth > 166
    assert auto == third  # stage 4 is by request

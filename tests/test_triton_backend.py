"""Backend triton where it cannot run, or not everything: reasons, errors by name, the library's path instead.

What the kernels compute is tested in tests/interpreted and, on a GPU, in test_gpu.py.
"""

import importlib.metadata
import json
from dataclasses import replace

import pytest
import torch
from cases import draw
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fast import BackendUnavailable, dispatch, freeze, functional, gpus, optimize
from resnet_fast.backends import triton
from resnet_fast.kernels import selection, tables
from resnet_fast.kernels.configs import PointerConfig, to_dict, why_not
from resnet_fast.problems import ConvProblem
from resnet_fast.shapes import Conv

CALL = ("conv_bn_act", "cuda", torch.bfloat16)
H200 = gpus.KNOWN["h200"]
SM70 = gpus.Gpu("Tesla V100", (7, 0), 80, 96 << 10, 96 << 10, {"bfloat16": 1e14}, 0.9e12)
PROBLEM = ConvProblem(Conv(8, 64, 14, 14, 64, (3, 3), padding=(1, 1)), "bfloat16")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    cached = triton.available  # a test may put another in its place
    cached.cache_clear()
    selection.forget()
    yield
    cached.cache_clear()
    selection.forget()


@pytest.fixture
def h200(monkeypatch):
    """A machine with an H200, as far as dispatch can tell."""
    monkeypatch.setattr(triton, "available", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpus, "of_device", lambda index: H200)


def write_table(rows: dict, gpu=H200, schema=tables.SCHEMA) -> None:
    path = tables.paths(gpu)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": schema, "gpu": gpu.name, "environment": {}, "rows": rows}))
    selection.forget()


def version(monkeypatch, answer):
    def lookup(name):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(importlib.metadata, "version", lookup)
    triton.available.cache_clear()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (importlib.metadata.PackageNotFoundError("triton"), "Triton is not installed: pip install 'triton>=3.6'"),
        ("3.5.1", "Triton 3.5.1 is too old: pip install 'triton>=3.6'"),
    ],
    ids=["missing", "too_old"],
)
def test_without_a_usable_triton(answer, reason, monkeypatch):
    version(monkeypatch, answer)
    assert dispatch.why_not("triton", *CALL) == reason
    with pytest.raises(BackendUnavailable, match="backend='triton' cannot run bn_act on cpu"):
        functional.bn_act(draw((2, 3, 4, 4), torch.float32), torch.zeros(3), torch.ones(3), backend="triton")
    assert functional.bn_act(draw((2, 3, 4, 4), torch.float32), torch.zeros(3), torch.ones(3)).shape == (2, 3, 4, 4)


def test_a_triton_that_does_not_load(monkeypatch):
    def broken():
        raise OSError("libtriton.so: invalid ELF header\nand more")

    monkeypatch.setattr(triton, "launcher", broken)
    triton.available.cache_clear()
    assert "does not load (OSError: libtriton.so: invalid ELF header" in dispatch.why_not("triton", *CALL)


def test_devices_and_dtypes_it_has_no_kernels_for(h200, monkeypatch):
    assert dispatch.why_not("triton", *CALL) is None
    assert "float64 is not one of" in dispatch.why_not("triton", "conv_bn_act", "cuda", torch.float64)
    assert dispatch.why_not("triton", "bn_act", "meta", torch.float32) == "no kernels for meta tensors, only cuda"
    assert dispatch.why_not("triton", "bn_act", "cpu", torch.float32) == "Triton kernels run on GPUs"
    assert "whole residual blocks have" in dispatch.why_not("triton", "conv_bn_act_train", "cuda", torch.float32)
    monkeypatch.setattr(gpus, "of_device", lambda index: SM70)
    assert dispatch.why_not("triton", *CALL) == "Tesla V100 is sm_70; the kernels need sm_80 or newer"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.why_not("triton", *CALL) == "no CUDA device"


def test_by_name_it_raises_with_the_reason():
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    with pytest.raises(BackendUnavailable, match="Triton kernels run on GPUs"):
        optimize(model, backend="triton")
    assert not hasattr(model, "resnet_fast_report")
    frozen = freeze(model, backend="triton")
    with pytest.raises(
        BackendUnavailable, match="backend='triton' cannot run this frozen PlannedResNet: Triton kernels"
    ):
        frozen(draw((1, 3, 32, 32), torch.float32))


def test_auto_waits_for_something_measured(h200):
    assert "nothing measured for NVIDIA H200: run `resnet-fast tune` on it" in dispatch.why_not_auto("triton", *CALL)
    write_table({PROBLEM.key: {"config": None, "us": 10.0, "library_us": 10.0, "variant": "fused"}})
    assert dispatch.why_not_auto("triton", *CALL) is None
    dispatch.clear_cache()
    assert dispatch.select(*CALL) == "triton"


def test_a_measured_row_decides_and_the_nearest_batch_stands_in():
    config = PointerConfig(128, 64, 32, 4, 3)
    bigger = ConvProblem(replace(PROBLEM.conv, batch=256), "bfloat16")
    write_table({
        PROBLEM.key: {"config": None, "us": 10.0, "library_us": 10.0, "variant": "fused"},
        bigger.key: {"config": to_dict(config), "us": 90.0, "library_us": 120.0},
    })  # fmt: skip
    choice = selection.choose(PROBLEM, H200)
    assert (choice.config, choice.source, choice.variant) == (None, "tuned", "fused")
    assert selection.choose(bigger, H200).config == config
    near = selection.choose(ConvProblem(replace(PROBLEM.conv, batch=128), "bfloat16"), H200)
    assert (near.config, near.source) == (config, "tuned at n256")
    far = ConvProblem(replace(PROBLEM.conv, batch=8192), "bfloat16")
    assert selection.choose(far, H200).source == "predicted"
    half = selection.choose(ConvProblem(bigger.conv, "float16"), H200)
    assert (half.config, half.source) == (config, "tuned at n256 in the other half type")


def test_batch_norm_in_the_epilogue_goes_by_the_folded_row():
    config = PointerConfig(64, 64, 32, 4, 3)
    write_table({PROBLEM.key: {"config": to_dict(config), "us": 9.0, "library_us": 12.0}})
    choice = selection.choose(replace(PROBLEM, folded=False), H200)
    assert (choice.config, choice.source) == (config, "tuned")


def test_a_row_that_is_no_longer_valid_is_not_taken():
    bad = PointerConfig(512, 256, 64, 4, 3)
    assert why_not(bad, PROBLEM, H200) is not None
    write_table({PROBLEM.key: {"config": to_dict(bad), "us": 1.0, "library_us": 2.0}})
    assert selection.choose(PROBLEM, H200).source == "predicted"


def test_rows_of_kernels_that_have_changed_are_left_out(said):
    other = replace(PROBLEM, relu=False)
    gone = {"kernel": "stem", "tile_h": 8, "tile_w": 16, "block_out": 64, "block_in": 32, "warps": 4, "stages": 2}
    kept = {"config": None, "us": 1.0, "library_us": 1.0}
    write_table({PROBLEM.key: {"config": gone, "us": 1.0, "library_us": 2.0}, other.key: kept})
    assert selection.choose(PROBLEM, H200).source == "predicted"
    assert selection.choose(other, H200).source == "tuned"
    assert sum("1 rows are of kernels that have changed" in message for message in said()) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "other/9", "rows": {}}', '{"schema": "resnet_fast.tuned/1"}'])
def test_a_broken_table_is_named_once_and_not_used(text, said):
    path = tables.paths(H200)[0]
    path.parent.mkdir(parents=True)
    path.write_text(text)
    selection.forget()
    assert tables.why_none(H200) is not None
    assert selection.choose(PROBLEM, H200).source == "predicted"
    assert sum(str(path) in message for message in said()) == 1


def test_what_the_gpu_refused_takes_the_library_from_then_on():
    assert selection.choose(PROBLEM, H200).config is not None
    selection.refuse(PROBLEM, H200, "OutOfResources: shared memory")
    choice = selection.choose(PROBLEM, H200)
    assert (choice.config, choice.source, choice.reason) == (None, "refused", "OutOfResources: shared memory")


def test_no_configuration_on_an_old_gpu_says_so():
    choice = selection.choose(PROBLEM, SM70)
    assert choice.config is None
    assert "conv_pointer: Tesla V100 is sm_70" in choice.reason


def test_a_gpu_with_little_shared_memory_gets_smaller_tiles():
    small = gpus.Gpu("small", (8, 6), 20, 48 << 10, 64 << 10, H200.flops, 5e11)
    config = selection.choose(PROBLEM, small).config
    assert isinstance(config, PointerConfig)
    assert why_not(config, PROBLEM, small) is None
    tiny = gpus.Gpu("tiny", (8, 6), 20, 2 << 10, 2 << 10, H200.flops, 5e11)
    assert "shared memory" in selection.choose(PROBLEM, tiny).reason


@pytest.mark.parametrize(("allowed", "why"), [(False, "without TF32"), (True, "cut their operands' last bits off")])
def test_float32_is_the_librarys(allowed, why, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    choice = selection.choose(ConvProblem(PROBLEM.conv, "float32"), H200)
    assert (choice.config, choice.source) == (None, "library")
    assert why in choice.reason
    assert selection.choose(PROBLEM, H200).config is not None
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # whose products are exact
    choice = selection.choose(ConvProblem(PROBLEM.conv, "float32"), H200)
    assert (choice.config is not None) == allowed

"""The native backend's CUDA part, as far as no GPU is needed: what is registered, what is said where it cannot run, and
what the public ops promise for CUDA tensors."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fast import BackendUnavailable, dispatch, extension, freeze, optimize
from resnet_fast.backends import native as backend

pytestmark = pytest.mark.usefixtures("native")

OPS = (
    "bn_act", "bn_act_train", "bn_act_backward", "conv_bn_act", "conv_bn_act_train", "conv_bn_act_backward",
    "bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply", "relu_mask", "conv_epilogue",
)  # fmt: skip


@pytest.fixture
def built(monkeypatch):
    """Call it with what build_info() is to say otherwise."""

    def say(**changes):
        info = extension.build_info() | changes
        monkeypatch.setattr(extension, "build_info", lambda: info)
        dispatch.clear_cache()

    return say


def with_cuda() -> None:
    if extension.build_info()["cuda_version"] is None:
        pytest.skip("built without CUDA")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_cuda_kernel(op):
    with_cuda()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fast_native::{op}", "CUDA")


def test_build_info_says_what_was_compiled():
    with_cuda()
    info = extension.build_info()
    assert info["cuda_version"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert any(backend.covers(info["cuda_archs"], capability) for capability in ((8, 0), (9, 0), (10, 0), (12, 0)))
    assert info["cudnn_version"] == torch.backends.cudnn.version()
    assert "-O3" in info["nvcc_flags"]
    assert "-O3" in info["cxx_flags"]


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 6), True),
        ("8.0;9.0+PTX", (9, 0), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.0 9.0", (10, 0), False),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("Hopper", (9, 0), True),
    ],
)
def test_which_gpus_an_arch_list_covers(archs, capability, covered):
    assert backend.covers(archs, capability) is covered


def test_cuda_part_missing(built):
    built(cuda_version=None)
    reason = dispatch.why_not("native", "residual_block_train", "cuda", torch.float32)
    assert reason.startswith("built without CUDA")
    assert "RESNET_FAST_BUILD=cuda" in reason
    assert reason in dispatch.why_not_fused("bn_act", "cuda", torch.float32)
    with pytest.raises(BackendUnavailable, match=r"built without CUDA.*Usable here: .*reference"):
        dispatch.select("bn_act", "cuda", torch.float32, "native")
    assert dispatch.why_not("native", "bn_act", "cpu", torch.float32) is None, "the CPU part is none the worse"


def test_cuda_part_of_another_cuda(built):
    built(cuda_version="11.8")
    if torch.version.cuda is None:
        pytest.skip("a PyTorch without CUDA")
    reason = dispatch.why_not("native", "bn_act", "cuda", torch.float32)
    assert f"built for CUDA 11.8 and this PyTorch is of CUDA {torch.version.cuda}" in reason
    assert dispatch.why_not("native", "bn_act", "cpu", torch.float32) is None


def test_cuda_part_for_other_gpus(built, monkeypatch):
    built(cuda_version=torch.version.cuda or "13.0", cuda_archs="9.0")
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    reason = dispatch.why_not("native", "bn_act", "cuda", torch.float32)
    assert "compiled for 9.0 and this GPU is 7.5" in reason
    assert "TORCH_CUDA_ARCH_LIST=7.5" in reason


def test_auto_takes_no_cuda_kernel_that_nobody_measured():
    with_cuda()
    assert dispatch.why_not("native", "conv_bn_act", "cuda", torch.bfloat16) is None
    assert "only by request (backend='native')" in dispatch.why_not_auto(
        "native", "conv_bn_act", "cuda", torch.bfloat16
    )
    assert dispatch.select("conv_bn_act", "cuda", torch.bfloat16) == "reference"
    assert dispatch.select("conv_bn_act", "cuda", torch.bfloat16, "native") == "native"


def test_reports_explain_each_step_down(built):
    """A model on a GPU without Triton's kernels or the extension's: stock, and both reasons in the report."""
    built(cuda_version=None)
    with FakeTensorMode(), torch.device("cuda"):
        model = ResNet(BasicBlock, [1, 1, 1, 1]).eval()
    report = str(optimize(model, dry_run=True).resnet_fast_report)
    rows = optimize(model, dry_run=True).resnet_fast_report
    assert all(not row.fused for row in rows), report
    assert all("triton: " in row.reason and "native: built without CUDA" in row.reason for row in rows)
    with pytest.raises(BackendUnavailable, match="built without CUDA"):
        optimize(model, backend="native")


@pytest.mark.parametrize("stage", [1, 4])
def test_fakes_promise_what_a_training_step_returns(stage):
    """Shapes, dtypes and strides of CUDA tensors that are not there."""
    with_cuda()
    torch.manual_seed(0)
    real = optimize(ResNet(BasicBlock, [1, 1, 1, 1]), backend="reference")
    real.layer2[0].fast_train_stage = stage
    expected = real.layer2[0](torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last))
    with FakeTensorMode(), torch.device("cuda"):
        model = optimize(ResNet(BasicBlock, [1, 1, 1, 1]), backend="native", strict=True)
        model.layer2[0].fast_train_stage = stage
        x = torch.empty(2, 64, 8, 8, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
        y = model.layer2[0](x)
        assert (y.shape, y.stride(), y.dtype, y.device.type) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
            "cuda",
        )
        assert model.eval()(torch.empty(2, 3, 32, 32)).shape == (2, 1000)


def test_a_frozen_model_by_name_says_what_it_takes(built):
    model = ResNet(BasicBlock, [1, 1, 1, 1]).eval()
    frozen = freeze(model, backend="native")
    assert all(row.kernel.startswith(("oneDNN", "AMX")) for row in frozen.resnet_fast_report)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(copy.deepcopy(frozen)(x), freeze(model)(x))
    with_cuda()
    from resnet_fast.freeze import _kernel

    block = copy.deepcopy(frozen.layer1[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        for conv in block.convs:
            conv.weight = torch.empty_like(conv.weight, device="cuda")
        assert _kernel(block).startswith("cuDNN's fused conv")
        built(cuda_version=None)
        assert "built without CUDA" in _kernel(block)
        with pytest.raises(BackendUnavailable, match="built without CUDA"):
            block.convs[0](torch.empty(1, 64, 8, 8, device="cuda"))

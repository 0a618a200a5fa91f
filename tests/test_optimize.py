"""optimize, restore, disabled, the report: what changes, what must not, and what is said."""

import copy

import pytest
import torch
import torchvision
from cases import draw
from models import count_fused_calls, fast_blocks
from torch import nn
from torchvision.models.quantization.resnet import QuantizableBasicBlock
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import resnet_fast
from resnet_fast import (
    BackendUnavailable,
    FastBasicBlock,
    FusionError,
    Report,
    disabled,
    dispatch,
    layers,
    optimize,
    restore,
)
from resnet_fast.backends import units, winograd
from resnet_fast.layers import any_size


def small(block=BasicBlock, seed=0):
    torch.manual_seed(seed)
    return ResNet(block, [1, 1, 1, 1], num_classes=5)


class MyBlock(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


def test_returns_the_model_itself_and_touches_nothing_else(backend):
    model = small()
    keys, tensors = list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    stem, head = model.conv1, model.fc
    assert optimize(model, backend=backend) is model
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    assert model.conv1 is stem
    assert model.fc is head
    assert isinstance(model.layer1[0], BasicBlock)
    assert type(model.layer1[0]) is FastBasicBlock


def test_restore_is_exact(backend):
    model = small(Bottleneck)
    before = [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()]
    restored = restore(optimize(model, backend=backend))
    assert restored is model
    assert [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()] == before


def test_restore_of_a_model_never_optimized_is_a_logged_no_op(said):
    model = small()
    assert restore(model) is model
    assert [message for message in said() if "ResNet has no fast blocks" in message]


def test_restore_makes_fast_built_blocks_stock():
    model = restore(ResNet(FastBasicBlock, [1, 1, 1, 1]))
    assert {type(module) for module in model.modules() if isinstance(module, BasicBlock)} == {BasicBlock}


def test_optimizing_twice_changes_nothing_and_says_so(backend):
    model = optimize(small(), backend=backend)
    types = [type(module) for module in model.modules()]
    optimize(model, backend=backend)
    assert [type(module) for module in model.modules()] == types
    assert [row.reason for row in model.resnet_fast_report] == ["already fast"] * 4
    assert model.resnet_fast_report.fused == 4
    assert not fast_blocks(restore(model))


def test_no_residual_blocks(said):
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    assert optimize(model) is model
    assert [message for message in said() if "Sequential has no BasicBlock or Bottleneck" in message]
    assert len(model.resnet_fast_report) == 0
    with pytest.raises(ValueError, match="no BasicBlock or Bottleneck of torchvision or timm"):
        optimize(model, strict=True)


@pytest.mark.parametrize("function", [optimize, restore])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not dict"):
        function({"a": 1})


def test_a_single_block_can_be_optimized(backend):
    block = optimize(BasicBlock(8, 8), backend=backend)
    assert type(block) is FastBasicBlock
    assert block.resnet_fast_report.fused == 1


def test_unknown_backend_changes_nothing():
    model = small()
    with pytest.raises(
        ValueError, match="backend='cudnn' is not a backend; it must be one of: auto, triton, native, reference"
    ):
        optimize(model, backend="cudnn")
    assert not fast_blocks(model)
    assert "resnet_fast_report" not in model.__dict__


def test_unavailable_backend_changes_nothing(monkeypatch):
    monkeypatch.setattr(dispatch.load("native"), "why_not", lambda *call: "the cable is unplugged")
    model = small()
    with pytest.raises(BackendUnavailable, match="the cable is unplugged"):
        optimize(model, backend="native")
    assert not fast_blocks(model)


def test_filter_fn_chooses_by_name_and_module(backend):
    model = optimize(small(), backend=backend, filter_fn=lambda name, block: name != "layer2.0" and block.stride == 2)
    assert [row.name for row in model.resnet_fast_report if row.fused] == ["layer3.0", "layer4.0"]
    assert model.resnet_fast_report.blocks[0].reason == "left alone by filter_fn"
    assert type(model.layer1[0]) is BasicBlock


def test_a_filter_that_fails_leaves_the_model_whole():
    model = small()

    def fails(name, block):
        if name == "layer3.0":
            raise KeyError("mine")
        return True

    with pytest.raises(KeyError, match="mine"):
        optimize(model, backend="reference", filter_fn=fails)
    assert not fast_blocks(model)


def test_strict_names_the_block_and_changes_nothing(backend):
    model = small()
    model.layer3[0].bn2 = nn.GroupNorm(2, 256)
    with pytest.raises(FusionError, match=r"'layer3.0' cannot be fused: bn2 is GroupNorm"):
        optimize(model, backend=backend, strict=True)
    assert not fast_blocks(model)


def test_without_strict_the_odd_block_is_reported_and_the_others_fused(backend):
    model = small()
    model.layer3[0].bn2 = nn.GroupNorm(2, 256)
    optimize(model, backend=backend)
    rows = {row.name: row for row in model.resnet_fast_report}
    assert not rows["layer3.0"].fused
    assert "bn2 is GroupNorm" in rows["layer3.0"].reason
    assert model.resnet_fast_report.fused == 3
    assert model.eval()(torch.ones(1, 3, 32, 32)).isfinite().all()


def test_dry_run_only_reports(backend):
    model = optimize(small(), backend=backend, dry_run=True)
    assert not fast_blocks(model)
    assert model.resnet_fast_report.fused == 4
    assert "dry run" in str(model.resnet_fast_report)


@pytest.mark.parametrize("block", [MyBlock, QuantizableBasicBlock])
def test_subclasses_are_left_alone_and_named(block, backend):
    model = optimize(small(block), backend=backend)
    assert type(model.layer1[0]) is block
    assert f"{block.__name__} is a subclass of a torchvision block" in model.resnet_fast_report.blocks[0].reason
    with pytest.raises(FusionError, match=block.__name__):
        optimize(small(block), backend=backend, strict=True)


def test_a_bound_forward_is_left_alone(backend):
    model = small()
    model.layer1[0].forward = lambda x: x
    optimize(model, backend=backend)
    assert type(model.layer1[0]) is BasicBlock
    assert "bound to the instance" in model.resnet_fast_report.blocks[0].reason


def test_one_block_used_twice(backend):
    block = BasicBlock(8, 8)
    model = optimize(nn.Sequential(block, block), backend=backend, strict=True).eval()
    stock = restore(copy.deepcopy(model))
    x = draw((1, 8, 6, 6), torch.float32)
    torch.testing.assert_close(model(x), stock(x))


def test_report_is_a_table_and_plain_data(backend):
    report = optimize(small(), backend=backend).resnet_fast_report
    assert isinstance(report, Report)
    text = str(report)
    assert "4 of 4 residual blocks fused" in text
    assert "layer4.0" in text
    assert backend in text
    call = ("residual_block_train", "cpu", torch.float32)
    kernel = f"{dispatch.load(backend).kernel(*call)}, training stage {dispatch.train_stage(backend, *call[1:])}"
    assert report.to_dict()["blocks"][0] == {"name": "layer1.0", "type": "BasicBlock", "fused": True,
                                             "backend": backend, "kernel": kernel, "reason": ""}  # fmt: skip


UNPLUGGED = "triton: Triton kernels run on GPUs; native: the cable is unplugged"


def test_report_says_why_auto_stays_stock(monkeypatch):
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    monkeypatch.setattr(dispatch.load("native"), "why_not", lambda *call: "the cable is unplugged")
    model = optimize(small())
    assert model.resnet_fast_report.fused == 0
    assert {row.reason for row in model.resnet_fast_report} == {f"no fused backend: {UNPLUGGED}"}
    with pytest.raises(FusionError, match="the cable is unplugged"):
        optimize(small(), strict=True)


def test_auto_without_a_fused_backend_runs_stock_and_says_so(monkeypatch, said):
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    monkeypatch.setattr(dispatch.load("native"), "why_not", lambda *call: "the cable is unplugged")
    model = optimize(small()).eval()
    stock = restore(copy.deepcopy(model))
    x = draw((1, 3, 32, 32), torch.float32)
    with count_fused_calls() as calls:
        assert torch.equal(model(x), stock(x))
    assert calls() == 0
    found = [m for m in said() if f"no fused backend for cpu torch.float32 ({UNPLUGGED})" in m]
    assert sorted(m.split(" runs")[0] for m in found) == ["FastBasicBlock", "FastResNet"]  # once each


def test_disabled_is_stock_bit_for_bit_and_reentrant(backend):
    model = optimize(small(), backend=backend, strict=True).eval()
    stock = restore(copy.deepcopy(model))
    x = draw((2, 3, 32, 32), torch.float32)
    with count_fused_calls() as calls:
        with disabled():
            with disabled():
                assert torch.equal(model(x), stock(x))
            assert torch.equal(model(x), stock(x))
        assert calls() == 0
        model(x)
        assert calls() > 0


def test_disabled_ends_with_an_exception(backend):
    model = optimize(small(), backend=backend).eval()
    with pytest.raises(KeyError), disabled():
        raise KeyError
    with count_fused_calls() as calls:
        model(draw((1, 3, 32, 32), torch.float32))
    assert calls() > 0


@pytest.mark.parametrize(("value", "fused"), [("1", False), ("0", True), ("", True)])
def test_disable_environment_variable(value, fused, backend, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_DISABLE", value)
    model = optimize(small(), backend=backend).eval()
    with count_fused_calls() as calls:
        model(draw((1, 3, 32, 32), torch.float32))
    assert (calls() > 0) is fused


def test_the_backend_argument_is_the_one_that_runs(backend, monkeypatch):
    other = "native" if backend == "reference" else "reference"
    monkeypatch.setenv(
        "RESNET_FAST_BACKEND", other if dispatch.why_not(other, "bn_act", "cpu", torch.float32) is None else ""
    )
    model = optimize(small(), backend=backend, strict=True)
    ran = []
    module = dispatch.load(backend)
    original = module.residual_block_train
    monkeypatch.setattr(module, "residual_block_train", lambda *args: ran.append(1) or original(*args))
    model(draw((2, 3, 32, 32), torch.float32))
    assert len(ran) == len(model.resnet_fast_report)


def test_moving_and_casting_after_the_swap(backend):
    model = optimize(small(), backend=backend, strict=True).eval().to(memory_format=torch.channels_last)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        stock = restore(copy.deepcopy(model))
        x = draw((2, 3, 32, 32), dtype, "channels_last")
        torch.testing.assert_close(model(x), stock(x), rtol=5e-2, atol=5e-2)
        assert model(x).dtype == dtype


def test_public_names():
    for name in resnet_fast.__all__:
        assert getattr(resnet_fast, name) is not None
    assert {"optimize", "restore", "freeze", "disabled", "FastBasicBlock", "FastBottleneck"} <= set(resnet_fast.__all__)
    assert torchvision.models.resnet.BasicBlock is BasicBlock, "nothing is patched at import"


@pytest.mark.parametrize(
    ("block", "pixels", "batch", "reason"),
    [
        (lambda: BasicBlock(64, 64), 8, 8, "calls set the time"),
        (lambda: BasicBlock(64, 64), 28, 16, None),
        (lambda: Bottleneck(64, 16), 28, 16, "calls set the time"),
        (lambda: Bottleneck(256, 64), 28, 16, None),
    ],
)
def test_small_training_steps_on_a_cpu_are_left_to_pytorch(block, pixels, batch, reason, monkeypatch, native, said):
    """Where the calls cost more than the passes; not in eval mode, nor where a backend or a stage is asked for."""
    monkeypatch.setitem(layers._depth, "any_size", 0)
    monkeypatch.setattr(units, "has_tiles", lambda: False)
    monkeypatch.setattr(winograd, "why_not", lambda: None)
    stock = block().train().to(memory_format=torch.channels_last)
    x = torch.randn(batch, stock.conv1.in_channels, pixels, pixels).to(memory_format=torch.channels_last)
    fast = optimize(nn.Sequential(copy.deepcopy(stock)))[0]
    if reason is None:
        assert fast.why_stock(x) is None
    else:
        assert reason in fast.why_stock(x)
        assert torch.equal(fast(x), stock(x))
        assert reason in said()[-1]
        with any_size():
            assert fast.why_stock(x) is None
    assert optimize(nn.Sequential(copy.deepcopy(stock)), backend="native")[0].why_stock(x) is None
    assert optimize(nn.Sequential(copy.deepcopy(stock)), train_stage=1)[0].why_stock(x) is None
    monkeypatch.setenv("RESNET_FAST_TRAIN", "1")
    assert fast.why_stock(x) is None
    monkeypatch.delenv("RESNET_FAST_TRAIN")
    assert fast.eval().why_stock(x) is None


def test_under_autocast_the_convolutions_dtype_counts(monkeypatch, native):
    monkeypatch.setitem(layers._depth, "any_size", 0)
    monkeypatch.setattr(units, "has_tiles", lambda: True)
    fast = optimize(nn.Sequential(BasicBlock(64, 64)).train())[0]
    x = torch.randn(14, 64, 14, 14)  # 0.67 MiB
    assert "less than 0.75 MiB" in fast.why_stock(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert "less than 0.375 MiB" in fast.why_stock(x)
        assert fast.why_stock(torch.randn(16, 64, 14, 14)) is None


def test_disabling_is_seen_by_what_was_compiled():
    seen = []

    def compiler(graph, inputs):
        seen.append(any("resnet_fast" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(optimize(nn.Sequential(BasicBlock(32, 32)).eval()), backend=compiler, dynamic=False)
    x = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        compiled(x)
        with disabled():
            compiled(x)
        compiled(x)
    assert seen == [True, False]

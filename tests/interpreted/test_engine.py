"""Frozen models through plans and the engine: every kind of step, both fusions, against the model in float64."""

import copy
import pickle
import threading

import pytest
import torch
from cases import draw
from models import lively
from numerics import assert_all_match
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import freeze, gpus, planner, warmup
from resnet_fast.engine import Engine, LaunchFailed
from resnet_fast.kernels import selection
from resnet_fast.kernels.selection import Choice
from resnet_fast.planned import SHAPES_KEPT, PlannedResNet, PlannedStage
from resnet_fast.problems import ConvProblem


@pytest.fixture(autouse=True)
def _forget():
    selection.forget()
    yield
    selection.forget()


def stage(block=Bottleneck, planes=64, groups=1, width=64, stride=2) -> nn.Module:
    """Two blocks, the first with a strided downsample, as a model of their own."""
    torch.manual_seed(3)
    out = planes * block.expansion
    downsample = nn.Sequential(nn.Conv2d(64, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    first = block(64, planes, stride, downsample, groups, width)
    return lively(nn.ModuleList([nn.Sequential(first, block(out, planes, groups=groups, base_width=width))])).eval()


STAGES = {
    "bottleneck": stage,
    "basic": lambda: stage(BasicBlock, 32),
    "grouped": lambda: stage(planes=32, groups=8, width=16),
}


def kernels(engine: Engine) -> list[str]:
    return [step.choice.kernel for step in engine.plan.steps]


@pytest.mark.parametrize("fusion", ["conv", "tail"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage(name, dtype, fusion):
    model = STAGES[name]()
    x = draw((2, 64, 6, 6), dtype, "channels_last")
    frozen = freeze(model, dtype=dtype, backend="triton", fusion=fusion)[0]
    assert type(frozen) is PlannedStage
    with torch.no_grad():
        ours = frozen(x)
        theirs = copy.deepcopy(model)[0].to(dtype)(x)
        exact = copy.deepcopy(model)[0].double()(x.double())
    assert_all_match({"y": ours}, {"y": theirs.contiguous(memory_format=torch.channels_last)}, {"y": exact})
    (engine,) = frozen._engines.values()
    wanted = "bottleneck_tail" if fusion == "tail" and name == "bottleneck" else "conv_pointer"
    assert wanted in kernels(engine)


def narrow_resnet() -> ResNet:
    """A ResNet of torchvision's own class with 64 channels throughout: the interpreter has all day, we have not."""
    torch.manual_seed(3)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.inplanes = 64
    for number in range(1, 5):
        setattr(model, f"layer{number}", model._make_layer(BasicBlock, 64, 1, stride=1 if number == 1 else 2))
    model.fc = nn.Linear(64, 5)
    return lively(model).eval()


def test_a_whole_resnet():
    model = narrow_resnet()
    x = draw((1, 3, 32, 32), torch.float32)
    frozen = warmup(freeze(model, dtype=torch.bfloat16, backend="triton"), x)
    assert type(frozen) is PlannedResNet
    with torch.no_grad():
        ours = frozen(x)
        theirs = copy.deepcopy(model).to(torch.bfloat16)(x.to(torch.bfloat16))
        exact = copy.deepcopy(model).double()(x.double())
    assert_all_match({"y": ours}, {"y": theirs}, {"y": exact})
    (engine,) = frozen._engines.values()
    assert kernels(engine)[0] == "stem"
    rows = {row.name: row for row in frozen.resnet_fast_report}
    assert rows.keys() == {f"layer{number}.0" for number in range(1, 5)}
    assert all(row.fused and row.backend == "triton" and "conv_" in row.kernel for row in rows.values())


def test_a_resnet_inside_another_model():
    model = nn.Sequential(narrow_resnet(), nn.Softmax(1)).eval()
    frozen = freeze(model, dtype=torch.float16, backend="triton")
    assert type(frozen[0]) is PlannedResNet
    x = draw((1, 3, 32, 32), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x).float(), model(x), rtol=2e-2, atol=2e-2)
    assert len(frozen.resnet_fast_report) == 4


def test_the_report_says_why_a_layer_is_the_librarys(said):
    model = narrow_resnet()
    x = draw((1, 3, 32, 32), torch.float32)
    frozen = freeze(model, dtype=torch.bfloat16, backend="triton")
    conv1 = planner.conv_of(frozen.layer2[0].convs[0], (1, 64, 8, 8))
    selection.refuse(ConvProblem(conv1, "bfloat16"), gpus.KNOWN["h200"], "it was too tired")
    with torch.no_grad():
        frozen(x)
    row = frozen.resnet_fast_report.blocks[1]
    assert (row.name, row.backend) == ("layer2.0", "triton")
    assert row.kernel.startswith("library, conv_")
    assert row.reason == "layer2.0.conv1: it was too tired"
    assert "it was too tired" in str(frozen.resnet_fast_report)
    assert sum("layer2.0.conv1 takes the library's path: it was too tired" in message for message in said()) == 1


@pytest.mark.parametrize("fusion", ["conv", "tail"])
def test_library_steps_give_the_same(fusion, monkeypatch):
    """What a table that prefers cuDNN everywhere would run."""
    model, x = stage(), draw((2, 64, 6, 6), torch.float16, "channels_last")
    y = freeze(model, dtype=torch.float16, backend="triton", fusion=fusion)[0](x)
    monkeypatch.setattr(planner, "choose", lambda problem, gpu: Choice(None, "tuned", "for the test"))
    library = freeze(model, dtype=torch.float16, backend="triton", fusion=fusion)[0]
    torch.testing.assert_close(library(x), y, rtol=4e-3, atol=4e-3)
    assert set(kernels(next(iter(library._engines.values())))) == {"library"}


def test_a_kernel_that_does_not_fit_is_planned_around(monkeypatch, said):
    from resnet_fast.backends import triton

    launcher = triton.launcher()
    original, refused = launcher.launch, []

    def launch(kernel, *args):
        if not refused:
            refused.append(kernel.__name__)
            raise launcher.OutOfResources(300000, 232448, "shared memory")
        return original(kernel, *args)

    model, x = stage(BasicBlock, 32), draw((1, 64, 4, 4), torch.float16, "channels_last")
    expected = freeze(model, dtype=torch.float16, backend="triton")[0](x)
    monkeypatch.setattr(launcher, "launch", launch)
    frozen = freeze(model, dtype=torch.float16, backend="triton")[0]
    torch.testing.assert_close(frozen(x), expected, rtol=2e-3, atol=2e-3)
    (engine,) = frozen._engines.values()
    assert "refused" in [step.choice.source for step in engine.plan.steps]
    assert any("out of resource: shared memory" in message for message in said())


def test_engine_says_what_it_takes():
    frozen = freeze(stage(BasicBlock, 32), dtype=torch.float16, backend="triton")[0]
    frozen(draw((1, 64, 4, 4), torch.float16, "channels_last"))
    (engine,) = frozen._engines.values()
    with pytest.raises(ValueError, match=r"x is \(2, 64, 4, 4\) .* on cpu; this engine takes \(1, 64, 4, 4\)"):
        engine(torch.zeros(2, 64, 4, 4, dtype=torch.float16))
    assert issubclass(LaunchFailed, RuntimeError)


def test_shapes_come_and_go_and_copies_plan_anew():
    frozen = freeze(stage(BasicBlock, 32), dtype=torch.float16, backend="triton")[0]
    for size in range(2, 4 + SHAPES_KEPT):
        frozen(draw((1, 64, size, 2), torch.float16, "channels_last"))
    assert len(frozen._engines) == SHAPES_KEPT
    assert ((1, 64, 2, 2), torch.device("cpu")) not in frozen._engines
    x = draw((1, 64, 3, 3), torch.float16, "channels_last")
    expected = frozen(x)
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert not copied._engines
        assert torch.equal(copied(x), expected)
    assert not frozen.to(torch.float16)._engines


def test_inputs_are_never_written_and_outputs_are_new():
    frozen = freeze(stage(), dtype=torch.float16, backend="triton", fusion="tail")[0]
    x = draw((1, 64, 4, 4), torch.float16, "channels_last")
    before = x.clone()
    first = frozen(x)
    kept = first.clone()
    frozen(draw((1, 64, 4, 4), torch.float16, "channels_last"))
    assert torch.equal(x, before)
    assert torch.equal(first, kept)


def test_threads_take_turns():
    frozen = freeze(stage(BasicBlock, 32), dtype=torch.float16, backend="triton")[0]
    inputs = [draw((1, 64, 4, 4), torch.float16, "channels_last") for _ in range(4)]
    expected = [frozen(x) for x in inputs]
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda place=place: results.update({place: frozen(inputs[place])}))
        for place in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, y in enumerate(expected):
        assert torch.equal(results[place], y)


def test_hooks_added_later_end_the_plan():
    frozen = freeze(stage(BasicBlock, 32), dtype=torch.float16, backend="triton")[0]
    x = draw((1, 64, 4, 4), torch.float16, "channels_last")
    expected = frozen(x)
    seen = []
    handle = frozen[1].register_forward_hook(lambda *args: seen.append(args))
    with pytest.raises(RuntimeError, match="hooks are registered, which a plan would skip"):
        frozen(x)
    frozen.backend = "auto"
    torch.testing.assert_close(frozen(x), expected, rtol=4e-3, atol=4e-3)
    assert len(seen) == 1
    handle.remove()
    frozen.backend = "triton"
    assert torch.equal(frozen(x), expected)


def test_a_replaced_layer_is_planned_anew():
    frozen = freeze(stage(BasicBlock, 32), dtype=torch.float16, backend="triton")[0]
    x = draw((1, 64, 4, 4), torch.float16, "channels_last")
    before = frozen(x)
    frozen[1] = copy.deepcopy(frozen[1])
    frozen[1].convs[1].weight.zero_()
    after = frozen(x)
    assert not torch.equal(before, after)
    assert len(frozen._engines) == 1

"""freeze: an inference copy with batch norm folded, beside the model in eval mode."""

import copy
import pickle

import pytest
import torch
import torchvision
from cases import draw
from models import first_tensor, lively
from numerics import assert_all_match
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import freeze, planned, twin

MODELS = {
    "basic": lambda: ResNet(BasicBlock, [2, 1, 1, 1], num_classes=7),
    "bottleneck": lambda: ResNet(Bottleneck, [2, 1, 1, 1], num_classes=7),
    "grouped": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7, groups=32, width_per_group=4),
    "frozen_batch_norm": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7, norm_layer=FrozenBatchNorm2d),
    "dilated": lambda: ResNet(
        Bottleneck, [1, 2, 1, 1], num_classes=7, replace_stride_with_dilation=[False, True, True]
    ),
    "segmentation": lambda: torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=3
    ),
}


def model_for(name="basic", dtype=torch.float32):
    torch.manual_seed(3)
    return lively(MODELS[name]()).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs(name, dtype):
    """Judged as everything else: error against float64, beside the eager model's in the same dtype."""
    model = model_for(name)
    exact_model = copy.deepcopy(model).double()
    x = draw((2, 3, 48, 48), torch.float32, "channels_last")
    frozen = freeze(model, dtype=dtype)
    with torch.no_grad():
        ours = first_tensor(frozen(x))
        theirs = first_tensor(copy.deepcopy(model).to(dtype)(x.to(dtype)))
        exact = first_tensor(exact_model(x.double()))
    assert ours.dtype == dtype
    assert_all_match({"y": ours.contiguous()}, {"y": theirs.contiguous()}, {"y": exact.contiguous()})


def test_the_model_itself_is_untouched(backend):
    model = resnet_fast.optimize(model_for(), backend=backend)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    x = draw((2, 3, 32, 32), torch.float32)
    expected = model(x)
    frozen = freeze(model)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)
    assert [type(module) for module in model.modules()] == types
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_answer_the_same(copied, dtype):
    frozen = freeze(model_for("bottleneck"), dtype=dtype)
    x = draw((2, 3, 32, 32), torch.float32)
    with torch.no_grad():
        assert torch.equal(copied(frozen)(x), frozen(x))


def test_input_is_not_overwritten_and_calls_are_independent():
    """The residual is added in place: it must never be the caller's tensor, nor one that a later call shares."""
    stage = freeze(nn.Sequential(lively(BasicBlock(8, 8)), lively(BasicBlock(8, 8))).eval())
    x = draw((2, 8, 9, 9), torch.float32, "channels_last")
    before = x.clone()
    with torch.no_grad():
        first = stage(x)
        kept = first.clone()
        assert torch.equal(x, before)
        stage(draw((2, 8, 9, 9), torch.float32, "channels_last"))
        assert torch.equal(first, kept)
        assert torch.equal(stage(x), kept)


def test_hooked_features_stay_what_they_were():
    frozen = freeze(model_for("bottleneck"))
    kept = []
    frozen.layer1[0].register_forward_hook(lambda module, args, y: kept.append((y, y.clone())))
    with torch.no_grad():
        frozen(draw((2, 3, 32, 32), torch.float32))
    assert torch.equal(*kept[0])


def test_no_gradients():
    frozen = freeze(model_for())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    y = frozen(draw((1, 3, 32, 32), torch.float32))
    assert not y.requires_grad
    with pytest.raises(RuntimeError, match="computes no gradients"):
        frozen(draw((1, 3, 32, 32), torch.float32).requires_grad_())


@pytest.mark.parametrize("whole", [True, False], ids=["network", "stage"])
def test_there_is_no_training_mode(whole):
    frozen = freeze(model_for() if whole else model_for().layer1)
    with pytest.raises(RuntimeError, match="for inference only"):
        frozen.train()
    assert not any(module.training for module in frozen.modules())
    assert frozen.eval() is frozen


@pytest.mark.parametrize(("argument", "error", "word"), [
    (lambda: (model_for().train(), None), ValueError, "call model.eval"),
    (lambda: (nn.Sequential(nn.Linear(2, 2)).eval(), None), ValueError, "nothing to freeze"),
    (lambda: ({"a": 1}, None), TypeError, "must be a torch.nn.Module, not dict"),
    (lambda: (model_for(), torch.int8), TypeError, "dtype is torch.int8"),
], ids=["training", "nothing", "not_a_module", "dtype"])  # fmt: skip
def test_bad_arguments(argument, error, word):
    model, dtype = argument()
    with pytest.raises(error, match=word):
        freeze(model, dtype=dtype)


def test_report_names_every_block():
    frozen = freeze(model_for())
    assert [row.name for row in frozen.resnet_fast_report] == [
        "layer1.0",
        "layer1.1",
        "layer2.0",
        "layer3.0",
        "layer4.0",
    ]
    assert frozen.resnet_fast_report.fused == 5


def test_odd_blocks_stay_stock_and_are_named():
    model = model_for()
    model.layer3[0].bn2 = nn.GroupNorm(2, 256)
    frozen = freeze(model)
    rows = {row.name: row for row in frozen.resnet_fast_report}
    assert not rows["layer3.0"].fused
    assert "GroupNorm" in rows["layer3.0"].reason
    x = draw((2, 3, 32, 32), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)


def test_moving_between_dtypes_repacks():
    model = model_for()
    frozen = freeze(model)
    x = draw((2, 3, 32, 32), torch.float32)
    with torch.no_grad():
        first = frozen(x)
        assert frozen.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(frozen.double()(x.double()).float(), first, rtol=5e-2, atol=5e-2)


def test_statistics_that_are_not_tracked_cannot_be_folded():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="nothing to freeze"):
        freeze(model)


def test_threads_share_a_frozen_model():
    from concurrent.futures import ThreadPoolExecutor

    frozen = freeze(model_for())
    images = [draw((1, 3, 32, 32), torch.float32) for _ in range(12)]

    def answer(x):
        with torch.no_grad():
            return frozen(x)

    expected = [answer(x) for x in images]
    with ThreadPoolExecutor(6) as pool:
        for y, exact in zip(pool.map(answer, images), expected, strict=True):
            assert torch.equal(y, exact)


def test_compile_fullgraph():
    frozen = freeze(model_for())
    x = draw((1, 3, 32, 32), torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(frozen, fullgraph=True, backend="aot_eager")(x), frozen(x), rtol=1e-4, atol=1e-4
        )


@pytest.fixture(params=[True, False], ids=["slow_bfloat16", "fast_bfloat16"])
def slow_bfloat16(request, monkeypatch) -> bool:
    """A CPU without AMX that computes bfloat16 slower than float32, and one that does not."""
    monkeypatch.setattr(planned, "why_no_unit", lambda dtype: "it is turned off")
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: request.param)
    return request.param


@pytest.mark.parametrize("name", ["bottleneck", "segmentation"])
def test_bfloat16_by_a_float32_twin(name, slow_bfloat16, said):
    model = model_for(name)
    x = draw((2, 3, 48, 48), torch.float32, "channels_last")
    frozen = freeze(model, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = first_tensor(frozen(x))
        theirs = first_tensor(copy.deepcopy(model).to(torch.bfloat16)(x.to(torch.bfloat16)))
        exact = first_tensor(copy.deepcopy(model).double()(x.double()))
    assert ours.dtype == torch.bfloat16
    assert_all_match({"y": ours.contiguous()}, {"y": theirs.contiguous()}, {"y": exact.contiguous()})
    twins = [module for module in frozen.modules() if "_float32_twin" in module.__dict__]
    assert bool(twins) == slow_bfloat16
    assert any("bfloat16 is slower" in message for message in said()) == slow_bfloat16
    assert all(tensor.dtype == torch.bfloat16 for tensor in frozen.state_dict().values() if tensor.is_floating_point())


def test_the_twin_is_not_copied_and_follows_new_weights(slow_bfloat16):
    frozen, other = (freeze(model, dtype=torch.bfloat16) for model in (model_for(), lively(MODELS["basic"]()).eval()))
    x = draw((2, 3, 32, 32), torch.float32)
    with torch.no_grad():
        before, expected = frozen(x), other(x)
        assert torch.equal(copy.deepcopy(frozen)(x), before)
        assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), before)
        frozen.load_state_dict(other.state_dict())
        assert torch.equal(frozen(x), expected)
        assert not torch.equal(before, expected)


def test_hooks_keep_the_layers_in_their_own_dtype(slow_bfloat16):
    frozen = freeze(model_for(), dtype=torch.bfloat16)
    seen = []
    frozen.layer2.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        frozen(draw((1, 3, 32, 32), torch.float32))
    assert seen == [torch.bfloat16]


def test_float32_and_gpu_models_have_no_twin():
    x = torch.zeros(1, 3, 8, 8)
    assert twin.float32_twin(nn.Identity(), x, torch.float32) is None
    assert twin.float32_twin(nn.Identity(), x.to("meta"), torch.bfloat16) is None
    assert isinstance(twin.bfloat16_is_slow(), bool)

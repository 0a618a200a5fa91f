"""timm's ResNets: numbers beside stock, what is fused and what says why not, and that nothing of timm is needed."""

import copy
import pickle
import sys

import fresh
import pytest
import torch
from cases import draw
from models import assert_trains_alike, count_fused_calls, lively, pair
from numerics import assert_matches

import resnet_fast
from resnet_fast import FusionError, cli, freeze, optimize, restore

timm = pytest.importorskip("timm")

from timm.layers import BlurPool2d  # noqa: E402
from timm.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402

NETWORKS = {"resnet18": 40, "resnet26": 33, "resnet26d": 33}  # name -> image size; d: deep stem, pooled shortcuts
PLAIN = ("resnet18", "resnet26")


def network(name: str, **settings) -> ResNet:
    torch.manual_seed(4)
    return lively(timm.create_model(name, pretrained=False, num_classes=10, **settings))


@pytest.mark.parametrize("name", NETWORKS)
def test_training(name, native):
    stock, fast = pair(network(name).double().train(), native)
    assert type(fast).__name__ == "FastTimmResNet"
    images = [draw((2, 3, NETWORKS[name], NETWORKS[name]), torch.float64, "channels_last")]
    with count_fused_calls() as calls:
        assert_trains_alike(stock, fast, images, 1)
    assert calls() >= 8


@pytest.mark.parametrize("name", NETWORKS)
def test_inference(name, backend):
    stock, fast = pair(network(name).eval(), backend)
    frozen, exact = freeze(stock, backend=backend), copy.deepcopy(stock).double()
    x = draw((3, 3, NETWORKS[name], NETWORKS[name]), torch.float32, "channels_last")
    with torch.no_grad(), count_fused_calls() as calls:
        assert_matches("fast", fast(x), stock(x), exact(x.double()))
        assert calls() >= 8
        assert_matches("frozen", frozen(x), stock(x), exact(x.double()))
        features = exact.forward_features(x.double())
        assert_matches("features", fast.forward_features(x), stock.forward_features(x), features)
        assert_matches("frozen features", frozen.forward_features(x), stock.forward_features(x), features)
    assert all(row.fused for row in frozen.resnet_fast_report)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())
    assert (type(frozen).__name__ == "PlannedTimmResNet") == (name in PLAIN)


@pytest.mark.parametrize(
    "settings", [{"num_classes": 0}, {"global_pool": "max"}, {"global_pool": "", "num_classes": 0}]
)
def test_other_heads(settings):
    torch.manual_seed(4)
    stock = lively(timm.create_model("resnet18", pretrained=False, **settings)).eval()
    stock, x = stock.to(memory_format=torch.channels_last), draw((2, 3, 64, 64), torch.float32, "channels_last")
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            exact, theirs = copy.deepcopy(stock).double()(x.double()), copy.deepcopy(stock).to(dtype)(x.to(dtype))
            assert_matches(str(dtype), freeze(stock, dtype=dtype)(x.to(dtype)), theirs, exact)


@pytest.mark.parametrize("out_indices", [(0, 2, 4), (1, 3)])
def test_a_feature_backbone(out_indices):
    torch.manual_seed(4)
    model = timm.create_model("resnet26", pretrained=False, features_only=True, out_indices=out_indices)
    stock = lively(model).eval().to(memory_format=torch.channels_last)
    fast, frozen, exact = optimize(copy.deepcopy(stock), strict=True), freeze(stock), copy.deepcopy(stock).double()
    x = draw((2, 3, 64, 64), torch.float32, "channels_last")
    with torch.no_grad():
        for model in (fast, frozen):
            for number, found in enumerate(zip(model(x), stock(x), exact(x.double()), strict=True)):
                assert_matches(f"{type(model).__name__} {number}", *found)


def test_restore_copies_and_pickles():
    model = network("resnet18").eval()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    x = draw((2, 3, 64, 64), torch.float32)
    with torch.no_grad():
        wanted = optimize(model)(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(copied.layer1[0]).__name__ == "FastTimmBasicBlock"
            assert torch.equal(copied(x), wanted)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in restore(model).modules()] == classes


def test_a_pickle_brings_its_classes(tmp_path):
    """Into a process that has imported neither timm nor this package."""
    torch.save(optimize(network("resnet18").eval()), tmp_path / "fast.pt")
    code = f"""
import sys, torch
assert "timm" not in sys.modules
model = torch.load({str(tmp_path / "fast.pt")!r}, weights_only=False)
import resnet_fast
print(type(model.layer1[0]).__name__, len(model.resnet_fast_report))
print(type(resnet_fast.restore(model).layer1[0]).__name__)
"""
    done = fresh.python(code)
    assert done.stdout == "FastTimmBasicBlock 8\nBasicBlock\n", done.stderr


def test_timm_is_not_needed():
    code = """
import sys, torchvision, resnet_fast
sys.modules["timm"] = None  # which makes its import an error
model = resnet_fast.optimize(torchvision.models.resnet18())
resnet_fast.freeze(model.eval())
assert "resnet_fast.timm_models" not in sys.modules
"""
    done = fresh.python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("more", "word"), [
    ({"attn_layer": "se"}, "se is SEModule"),
    ({"aa_layer": BlurPool2d, "stride": 2}, "aa is BlurPool2d"),
    ({"act_layer": torch.nn.SiLU}, "act1 is SiLU"),
], ids=["attention", "anti_aliasing", "activation"])  # fmt: skip
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_what_is_not_fused_is_named(block, more, word, said):
    torch.manual_seed(0)
    down = torch.nn.AvgPool2d(2) if "stride" in more else None
    stock = lively(block(16, 16 // block.expansion, downsample=down, **more)).eval()
    fast = optimize(copy.deepcopy(stock))
    assert word in fast.resnet_fast_report.blocks[0].reason
    x = draw((2, 16, 8, 8), torch.float32)
    assert torch.equal(fast(x), stock(x))
    assert any(word in message for message in said())
    with pytest.raises(FusionError, match=word):
        optimize(stock, strict=True)
    with pytest.raises(ValueError, match="nothing to freeze"):
        freeze(torch.nn.Sequential(stock).eval())


def test_what_only_training_drops_is_fused_in_eval_mode(backend):
    model = network("resnet26", drop_path_rate=0.2, drop_block_rate=0.1).eval()
    stock, fast = pair(model, backend)
    x = draw((2, 3, 64, 64), torch.float32)
    with torch.no_grad(), count_fused_calls() as calls:
        assert_matches("logits", fast(x), stock(x), copy.deepcopy(stock).double()(x.double()))
        assert calls() == 28
    fast.train()
    reasons = {block.why_stock() for stage in (fast.layer1, fast.layer3) for block in stage}
    assert {None, "drop_path is DropPath, not Identity", "drop_block is DropBlock2d, not Identity"} == reasons


@pytest.mark.parametrize("child", ["aa", "drop_block", "act2"])
def test_a_hook_on_any_child_is_called(child, said):
    torch.manual_seed(0)
    block = optimize(lively(BasicBlock(16, 16)).eval())
    seen = []
    getattr(block, child).register_forward_hook(lambda *call: seen.append(call))
    with torch.no_grad():
        block(draw((2, 16, 8, 8), torch.float32))
    assert len(seen) == 1
    assert any(f"{child} has hooks" in message for message in said())


def test_a_hook_on_a_deep_stem_sees_what_it_saw():
    stock = network("resnet26d").eval()
    seen = []
    stock.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    frozen, x = freeze(stock), draw((2, 3, 64, 64), torch.float32)
    with torch.no_grad():
        frozen(x)
        stock(x)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-4)
    assert seen[0].min() < 0, "no ReLU is in it"


def test_a_subclass_is_left_alone():
    class Mine(BasicBlock):
        pass

    row = optimize(Mine(8, 8)).resnet_fast_report.blocks[0]
    assert not row.fused
    assert "subclass of a timm block" in row.reason


def test_checkpointing_compiling_and_scripting(native):
    stock, fast = pair(network("resnet18").double().train(), native)
    fast.set_grad_checkpointing(True)  # stock's would count a batch twice: once more as it is computed again
    assert_trains_alike(stock, fast, [draw((2, 3, 40, 40), torch.float64)], 1)
    stock, fast = (model.eval().float() for model in (stock, fast))
    fast.set_grad_checkpointing(False)
    x = draw((2, 3, 64, 64), torch.float32)
    exact = copy.deepcopy(stock).double()(x.double())
    with torch.no_grad():
        assert_matches("compiled", torch.compile(fast, backend="eager", fullgraph=True)(x), stock(x), exact)
        assert_matches("scripted", torch.jit.script(fast)(x), stock(x), exact)
    with resnet_fast.disabled(), torch.no_grad():
        assert torch.equal(fast(x), stock(x))


def test_on_the_command_line(capsys):
    assert cli.main(["profile", "--model", "timm/resnet26", "--gpu", "h200", "-b", "2"]) == 0
    assert "timm/resnet26, batch 2" in capsys.readouterr().out
    assert cli.main(["bench", "--model", "timm/resnet51"]) == 2
    assert "not one of timm's ResNets; did you mean timm/resnet50" in capsys.readouterr().err


@pytest.mark.parametrize("command", [
    ["profile", "--img-size", "64", "-b", "1"],
    ["profile", "--gpu", "h200", "-b", "1"],
    ["tune", "--list", "--device", "cpu", "--dtype", "float32", "-b", "1"],
], ids=["profile", "plan", "tune"])  # fmt: skip
def test_a_network_that_is_no_plan_is_told_so(command, capsys):
    assert cli.main([*command, "--model", "timm/resnet26d"]) == 2
    assert "conv1 is Sequential, not FrozenConv2d" in capsys.readouterr().err


def test_the_command_line_without_timm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["bench", "--model", "timm/resnet50"]) == 2
    assert "pip install timm" in capsys.readouterr().err

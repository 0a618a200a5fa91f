"""Compilers and transforms that look inside: a right answer from each, and fused ops where they can be kept."""

import copy
import io

import pytest
import torch
from cases import draw
from models import lively
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, resnet18

from resnet_fast import FastBasicBlock, FastBottleneck, optimize, restore


def block_and_input(backend, block=Bottleneck, dtype=torch.float64):
    torch.manual_seed(2)
    if block is Bottleneck:
        downsample = torch.nn.Sequential(conv1x1(16, 32, 2), torch.nn.BatchNorm2d(32))
        module = Bottleneck(16, 8, stride=2, downsample=downsample)
    else:
        module = BasicBlock(16, 16)
    fast = optimize(lively(module).to(dtype), backend=backend, strict=True).eval()
    fast.fast_strict = False
    return fast, restore(copy.deepcopy(fast)), draw((2, 16, 6, 6), dtype)


BOTH = pytest.mark.parametrize("block", [BasicBlock, Bottleneck])


@BOTH
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_torchscript_script(block, training, backend):
    fast, stock, x = block_and_input(backend, block)
    scripted = torch.jit.script(fast.train(training))
    torch.testing.assert_close(scripted(x), stock.train(training)(x))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer).eval()
    stock.load_state_dict(scripted.state_dict())
    torch.testing.assert_close(loaded(x), stock.eval()(x))


@BOTH
def test_torchscript_trace_records_plain_pytorch(block, backend):
    fast, stock, x = block_and_input(backend, block)
    traced = torch.jit.trace(fast, x)
    assert "resnet_fast::" not in str(traced.inlined_graph)
    other = draw((3, 16, 8, 8), torch.float64)
    torch.testing.assert_close(traced(other), stock(other))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_networks_scripted_and_traced_symbolically(training, backend):
    """TorchScript compiles a copy of the forward, torch.fx records the stock one, as feature extractors need."""
    torch.manual_seed(2)
    stock = lively(resnet18(num_classes=5)).double().train(training)
    fast = optimize(copy.deepcopy(stock), backend=backend, strict=True)
    x = draw((2, 3, 33, 33), torch.float64)
    for of_fast, of_stock in (
        (torch.jit.script(copy.deepcopy(fast)), copy.deepcopy(stock)),
        (torch.fx.symbolic_trace(copy.deepcopy(fast)), copy.deepcopy(stock)),
        (create_feature_extractor(fast, ["layer2", "fc"]), create_feature_extractor(stock, ["layer2", "fc"])),
    ):
        torch.testing.assert_close(of_fast(x), of_stock(x))


def test_torchscript_of_blocks_built_fast():
    for block in (FastBasicBlock(8, 8), FastBottleneck(16, 4)):
        block.eval()
        x = draw((1, block.conv1.in_channels, 5, 5), torch.float32)
        torch.testing.assert_close(torch.jit.script(block)(x), restore(copy.deepcopy(block))(x))


@BOTH
def test_export_keeps_one_op_a_block(block, backend):
    fast, stock, x = block_and_input(backend, block, torch.float32)
    with torch.no_grad():
        exported = torch.export.export(fast, (x,))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert [target for target in targets if "resnet_fast" in target] == ["resnet_fast.residual_block.default"]
    torch.testing.assert_close(exported.module()(x), stock(x))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_export_is_saved_and_loaded(training, dynamic, backend):
    """With parameters that learn, and with the running statistics that a step of training leaves."""
    fast, stock, x = block_and_input(backend)
    fast.train(training), stock.train(training)
    sizes = ({0: torch.export.Dim("images", min=2, max=64)},) if dynamic else None
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(fast, (x,), dynamic_shapes=sizes), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    x = draw((5, *x.shape[1:]), torch.float64) if dynamic else x
    torch.testing.assert_close(loaded(x), stock(x))
    torch.testing.assert_close(loaded.state_dict(), dict(stock.state_dict()))


@BOTH
def test_onnx_export_sees_plain_pytorch(block, backend, monkeypatch):
    """Without onnxscript: as torch.onnx.export does it, by torch.export and a flag."""
    fast, stock, x = block_and_input(backend, block)
    monkeypatch.setattr("torch.onnx._internal.exporter._flags._is_onnx_exporting", True)
    exported = torch.export.export(fast, (x,))
    assert not any("resnet_fast" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), stock(x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile_fullgraph(training, backend):
    fast, stock, x = block_and_input(backend)
    fast.train(training), stock.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours, theirs = (module(leaf := x.clone().requires_grad_()) for module in (compiled, stock))
        ours.square().sum().backward()
        theirs.square().sum().backward()
        torch.testing.assert_close(ours, theirs)
    assert leaf.grad is not None
    for (name, our), their in zip(fast.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(our.grad, their.grad, msg=name)
    for (name, our), their in zip(fast.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(our, their, msg=name)


def test_compile_with_dynamic_shapes(backend):
    fast, stock, _ = block_and_input(backend)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((2, 16, 6, 6), (3, 16, 9, 7), (5, 16, 12, 12)):
            x = draw(shape, torch.float64)
            torch.testing.assert_close(compiled(x), stock(x))


def test_compile_after_an_edit_recompiles(backend):
    fast, stock, x = block_and_input(backend)
    torch._dynamo.reset()
    compiled, of_stock = (torch.compile(module, backend="aot_eager") for module in (fast, copy.deepcopy(stock)))
    with torch.no_grad():
        for network in (compiled, of_stock):
            torch.testing.assert_close(network(x), stock(x))
        for module in (fast, stock, of_stock._orig_mod):
            module.conv2.dilation = module.conv2.padding = (2, 2)
        if not torch.allclose(of_stock(x), stock(x)):
            pytest.skip("PyTorch does not notice it of a stock block either (2.11 on Python 3.13.0)")
        torch.testing.assert_close(compiled(x), stock(x))


@BOTH
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_mode_is_right_not_zero(block, training, backend):
    fast, stock, x = block_and_input(backend, block)
    tangent = draw(x.shape, torch.float64)
    if training:  # torch.func forbids buffers that change
        for module in (*fast.modules(), *stock.modules()):
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean = module.running_var = module.num_batches_tracked = None
                module.track_running_stats = False
    ours, theirs = (jvp(module.train(training), (x,), (tangent,))[1] for module in (fast, stock))
    assert theirs.abs().sum() > 0
    torch.testing.assert_close(ours, theirs)


def test_dual_numbers(backend):
    from torch.autograd import forward_ad

    fast, stock, x = block_and_input(backend)
    tangent = draw(x.shape, torch.float64)
    with forward_ad.dual_level():
        ours, theirs = (forward_ad.unpack_dual(m(forward_ad.make_dual(x, tangent))).tangent for m in (fast, stock))
    torch.testing.assert_close(ours, theirs)


def test_per_sample_gradients(backend):
    fast, stock, x = block_and_input(backend)

    def loss(parameters, module, image):
        return functional_call(module, parameters, (image[None],)).square().sum()

    results = []
    for module in (fast, stock):
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        results.append(vmap(lambda image, p=parameters, m=module: grad(loss)(p, m, image))(x))
    torch.testing.assert_close(*results)


def test_functional_call_with_other_weights(backend):
    fast, stock, x = block_and_input(backend)
    weights = {name: draw(tensor.shape, torch.float64) for name, tensor in fast.named_parameters()}
    torch.testing.assert_close(functional_call(fast, weights, (x,)), functional_call(stock, weights, (x,)))


def test_fx_symbolic_trace_and_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    fast, stock, x = block_and_input(backend)
    fast.train(), stock.train()
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    checkpoint(fast, leaf, use_reentrant=False).square().sum().backward()
    stock(other).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    # As without checkpointing. (Stock blocks count a batch twice: once more as they are computed again.)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(fast.get_buffer(name), buffer, msg=name)


def test_inference_mode(backend):
    fast, stock, x = block_and_input(backend)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), stock(x))


def test_fake_tensors(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fast, _, _ = block_and_input(backend, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(torch.empty(2, 16, 6, 6))).shape == (2, 32, 3, 3)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_meta_device(name, monkeypatch):
    """Shapes only; it has no autocast, and is_autocast_enabled raises for it."""
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    fast = block_and_input("reference", dtype=torch.float32)[0].to("meta")
    fast.fast_backend = name
    assert fast(torch.empty(2, 16, 6, 6, device="meta")).shape == (2, 32, 3, 3)


def tangent_of(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


COMPILED = {  # name -> (function, compile, x) -> what a transform makes of it
    "compiled grad": lambda f, compile, x: compile(grad(lambda x: f(x).square().sum()))(x),
    "compiled vmap": lambda f, compile, x: compile(vmap(f))(x[None]),
    "vmap of compiled": lambda f, compile, x: vmap(compile(f))(x[None]),
    "tangent of compiled": lambda f, compile, x: tangent_of(compile(f), x),
}


@pytest.mark.parametrize("name", COMPILED)
def test_transforms_with_compile_see_plain_pytorch(name, backend):
    fast, stock, x = block_and_input(backend)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), stock(x))  # which is fused, and must not be taken for the other
    ours = COMPILED[name](fast, lambda f: torch.compile(f, backend="eager"), x)
    torch.testing.assert_close(ours, COMPILED[name](stock, lambda f: f, x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("network", [False, True], ids=["block", "network"])
def test_gradients_of_a_batch_of_outputs(network, training, backend):
    """is_grads_batched, as of autograd.functional's vectorized Jacobians."""
    fast, stock, x = block_and_input(backend)
    if network:
        stock = lively(resnet18(num_classes=3)).double()
        fast, x = optimize(copy.deepcopy(stock), backend=backend, strict=True), draw((2, 3, 33, 33), torch.float64)
    found = []
    for module in (fast.train(training), stock.train(training)):
        leaf = x.clone().requires_grad_()
        y = module(leaf).flatten(1)[0, :3]
        wanted = [leaf, *module.parameters()]
        found.append(torch.autograd.grad(y, wanted, torch.eye(3, dtype=y.dtype), is_grads_batched=True))
    torch.testing.assert_close(*found)
    assert not any(grad.requires_grad for grad in found[0])

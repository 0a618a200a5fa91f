"""Residual blocks and stems in eval, each one op with live parameters: beside PyTorch, on every backend."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import fresh
import pytest
import torch
from cases import draw
from models import lively
from numerics import assert_matches
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import optimize
from resnet_fast.functional import ConvBn, residual_block, stem
from resnet_fast.layers import conv_bn

pytestmark = pytest.mark.amx
OPS = torch.ops.resnet_fast
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def downsample(channels, out_channels, stride=1, kernel=1):
    conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


BLOCKS = {  # large and small images are laid out differently: more than 256 pixels, and no more
    "bottleneck": (lambda: Bottleneck(128, 32), (17, 19)),
    "bottleneck_small": (lambda: Bottleneck(128, 32), (9, 7)),
    "downsample": (lambda: Bottleneck(64, 32, 1, downsample(64, 128)), (18, 15)),
    "stride2": (lambda: Bottleneck(64, 32, 2, downsample(64, 128, 2)), (35, 33)),
    "stride2_to_small": (lambda: Bottleneck(64, 32, 2, downsample(64, 128, 2)), (23, 17)),
    "stride2_small": (lambda: Bottleneck(64, 32, 2, downsample(64, 128, 2)), (9, 9)),
    "basic": (lambda: BasicBlock(64, 64), (17, 21)),
    "basic_stride2": (lambda: BasicBlock(32, 64, 2, downsample(32, 64, 2)), (21, 20)),
    "basic_3x3_downsample": (lambda: BasicBlock(32, 64, 2, downsample(32, 64, 2, 3)), (20, 19)),
    "narrow_groups": (lambda: Bottleneck(128, 32, groups=8, base_width=64), (17, 18)),
    "wide_groups": (lambda: Bottleneck(128, 32, groups=2, base_width=128), (17, 18)),
    "dilated": (lambda: Bottleneck(128, 32, dilation=2), (19, 17)),
    "tiny": (lambda: Bottleneck(128, 32), (2, 1)),
    "one_pixel": (lambda: Bottleneck(128, 32), (1, 1)),
    "many_channels": (lambda: Bottleneck(1024, 32 * 8), (17, 17)),
    "odd_channels": (lambda: Bottleneck(40, 10), (17, 18)),
}


def blocks_of(name: str):
    """The stock block, its exact twin in float64, and the shape of an image."""
    make, size = BLOCKS[name]
    block = lively(make()).eval().to(memory_format=torch.channels_last)
    return block, copy.deepcopy(block).double(), (block.conv1.in_channels, *size)


def run(block: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return block(x)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("batch", [1, 3, 17])
@DTYPES
@pytest.mark.parametrize("name", BLOCKS)
def test_as_near_to_float64_as_pytorch(name, dtype, batch, backend):
    stock, exact, image = blocks_of(name)
    fast = optimize(copy.deepcopy(stock), backend=backend, strict=True)
    x = draw((batch, *image), dtype, "channels_last")
    ours, theirs = run(fast, x, dtype), run(stock, x, dtype)
    assert_matches(name, ours, theirs, run(exact, x.double(), torch.float64))
    assert ours.dtype == theirs.dtype
    if image[1:] != (1, 1):  # whose strides mean nothing
        assert ours.stride() == theirs.stride()


@DTYPES
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_weights_and_inputs_in_every_layout(layout, dtype, backend):
    for x_layout in ("nchw", "channels_last"):
        stock, exact, image = blocks_of("stride2")
        stock = stock.to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
        fast = optimize(copy.deepcopy(stock), backend=backend, strict=True)
        x = draw((2, *image), dtype, x_layout)
        ours, theirs = run(fast, x, dtype), run(stock, x, dtype)
        assert_matches(x_layout, ours, theirs, run(exact, x.double(), torch.float64))
        assert ours.stride() == theirs.stride()


@DTYPES
def test_views_that_start_anywhere(dtype, backend):
    stock, exact, image = blocks_of("bottleneck")
    fast = optimize(copy.deepcopy(stock), backend=backend, strict=True)
    x = draw((5, *image), dtype, "channels_last")
    for view in (x[1:], x[4:], draw((3, *image), dtype, "channels_last", unaligned=True)):
        assert_matches("y", run(fast, view, dtype), run(stock, view, dtype), run(exact, view.double(), torch.float64))


@DTYPES
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck_small", "basic"])
def test_a_shortcut_that_is_a_tensor(name, dtype, backend):
    """As where a downsample cannot be fused and runs as the module it is."""
    stock, exact, image = blocks_of(name)
    for batch in (1, 18):
        x, residual = (draw((batch, *image), dtype, "channels_last") for _ in range(2))

        def call(block, x, residual, fused):
            if fused:
                return residual_block(x, [conv_bn(*stage) for stage in block._stages()], residual, backend=backend)
            value = x
            for conv, bn in list(block._stages())[:-1]:
                value = bn(conv(value)).relu()
            conv, bn = block._stages()[-1]
            return (bn(conv(value)) + residual).relu()

        fast, exact_block = optimize(copy.deepcopy(stock), backend=backend), optimize(copy.deepcopy(exact))
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                ours, theirs = call(fast, x, residual, True), call(fast, x, residual, False)
            assert_matches(name, ours, theirs, call(exact_block, x.double(), residual.double(), False))


@DTYPES
def test_nothing_is_kept_from_call_to_call(dtype, backend):
    """Whatever changes in place between two calls is seen by the second."""
    stock, _, image = blocks_of("downsample")
    fast = optimize(copy.deepcopy(stock), backend=backend, strict=True)
    x = draw((2, *image), dtype, "channels_last")
    before = run(fast, x, dtype)
    for name in dict(stock.state_dict()):
        if name.endswith("num_batches_tracked"):
            continue
        fast.load_state_dict(stock.state_dict())
        torch.testing.assert_close(run(fast, x, dtype), before, rtol=0, atol=0)
        with torch.no_grad():
            fast.state_dict()[name].mul_(1.5)
        assert not torch.equal(run(fast, x, dtype), before), name


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38], ids=str)
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck_small", "narrow_groups", "basic"])
@pytest.mark.parametrize("where", ["x", "conv_weight"])
def test_what_is_not_finite_comes_out_as_pytorchs(where, name, value, dtype, backend):
    """NaN where PyTorch gives NaN, infinities where it gives infinities, and numbers everywhere else."""
    stock, _, image = blocks_of(name)
    x = draw((2, *image), dtype, "channels_last")
    with torch.no_grad():
        if where == "x":
            x[1, 3, 1, 2] = value
        else:
            stock.conv1.weight[5, 7] = value
    theirs = run(stock, x, dtype)
    ours = run(optimize(stock, backend=backend, strict=True), x, dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    finite = theirs.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(), theirs[~finite].nan_to_num())
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=2e-2, atol=2e-1)


@DTYPES
@pytest.mark.parametrize("name", ["bottleneck", "stride2_to_small", "basic_stride2", "narrow_groups"])
def test_thread_counts_and_repeats_change_no_bit(name, dtype, native):
    stock, _, image = blocks_of(name)
    fast, judged = optimize(copy.deepcopy(stock), backend=native, strict=True), False
    for batch in (1, 5, 17):
        x = draw((batch, *image), dtype, "channels_last")
        results: dict = {stock: [], fast: []}
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            for block, found in results.items():
                found.append(run(block, x, dtype))
        changes = {
            block: any(not torch.equal(other, found[0]) for other in found[1:]) for block, found in results.items()
        }
        assert torch.equal(results[fast][-1], results[fast][0])
        if not changes[stock]:  # oneDNN, whose convolutions these are, splits some sums by threads on some CPUs
            judged = True
            assert not changes[fast]
    if not judged:
        pytest.skip("PyTorch's own convolutions change bits with the number of threads here")


@DTYPES
def test_eight_threads_at_once(dtype, native):
    torch.set_num_threads(1)
    stock, _, image = blocks_of("stride2")
    fast = optimize(stock, backend=native, strict=True)
    inputs = [draw((1 + n % 3, *image), dtype, "channels_last") for n in range(32)]
    expected = [run(fast, x, dtype) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for y, exact in zip(pool.map(lambda x: run(fast, x, dtype), inputs), expected, strict=True):
            assert torch.equal(y, exact)


def test_without_amx():
    """Where PyTorch is told to use less of the CPU, the same ops run one convolution at a time."""
    code = """
import copy, torch, torchvision
from torchvision.models.resnet import Bottleneck
import resnet_fast
from resnet_fast import extension
assert not extension.load().amx_usable()
torch.manual_seed(0)
block = Bottleneck(128, 32).eval().to(memory_format=torch.channels_last)
x = torch.randn(2, 128, 17, 18).to(memory_format=torch.channels_last)
with torch.no_grad():
    expected = block(x)
    torch.testing.assert_close(resnet_fast.optimize(block, backend="native", strict=True)(x), expected)
print("right")
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = fresh.python(code, environment=environment)
    if "is not built" in done.stderr or "'NoneType'" in done.stderr:
        pytest.skip("no native extension")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("right")


def operands(dtype, weight_dtype=torch.float32):
    """The op's arguments for a bottleneck with a downsample."""
    block = lively(Bottleneck(64, 32, 2, downsample(64, 128, 2))).eval()
    stages = (block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)
    layers = [conv_bn(*stage) for stage in stages]
    layers.append(conv_bn(*block.downsample))
    names = ("conv_weight", "weight", "bias", "running_mean", "running_var")
    columns = [[getattr(layer, name).detach().clone() for layer in layers] for name in names]
    columns[0] = [weight.to(weight_dtype) for weight in columns[0]]
    geometry = [n for c in layers for n in (*c.stride, *c.padding, *c.dilation, c.groups)]
    return draw((2, 64, 9, 8), dtype, "channels_last"), None, *columns, geometry, [1e-5] * 4, True


@DTYPES
def test_opcheck(dtype, backend):
    x, residual, *columns, geometry, eps, branch = operands(dtype)
    for tensor in (x, *columns[0], *columns[1], *columns[2]):
        tensor.requires_grad_()
    torch.library.opcheck(OPS.residual_block.default, (x, residual, *columns, geometry, eps, branch, backend))


@DTYPES
def test_opcheck_of_the_stem(dtype, backend):
    layer = conv_bn(nn.Conv2d(3, 32, 7, 2, 3, bias=False), lively(nn.BatchNorm2d(32)).eval())
    weight = layer.conv_weight.detach().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    vectors = (layer.weight.detach().requires_grad_(), layer.bias.detach(), layer.running_mean, layer.running_var)
    x = draw((2, 3, 20, 18), torch.float32, "channels_last").requires_grad_()
    torch.library.opcheck(OPS.stem.default, (x, weight, *vectors, [2, 2, 3, 3, 1, 1, 1], 1e-5, backend))


def test_gradients_are_those_of_the_layers(backend):
    """The op is for inference, but whoever differentiates it gets the truth, twice."""
    x, _, *columns, geometry, eps, branch = operands(torch.float64, torch.float64)
    columns = [[tensor.double() for tensor in column] for column in columns]
    inputs = [x, *columns[0], *columns[1], *columns[2]]
    for tensor in inputs:
        tensor.requires_grad_()
    results = []
    for name in (backend, "reference"):
        y = OPS.residual_block(x, None, *columns, geometry, eps, branch, name)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        results.append((y, *first, *torch.autograd.grad(first[0].square().sum(), inputs[1:5])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@DTYPES
@pytest.mark.parametrize("name", ["stride2", "basic"])
def test_compile_fullgraph_sees_one_op(name, dtype, backend):
    stock, _, image = blocks_of(name)
    fast = optimize(stock, backend=backend, strict=True)
    targets = []

    def keep(graph, _inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = draw((2, *image), dtype, "channels_last")
    torch._dynamo.reset()
    compiled = run(torch.compile(fast, fullgraph=True, backend=keep), x, dtype)
    eager = run(fast, x, dtype)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert compiled.stride() == eager.stride()
    assert sum("residual_block" in target for target in targets) == 1
    assert not any("batch_norm" in target or "conv2d" in target for target in targets)
    torch._dynamo.reset()
    through_aot = run(torch.compile(fast, fullgraph=True, backend="aot_eager"), x, dtype)
    torch.testing.assert_close(through_aot, eager, rtol=0, atol=0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("x_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kernel", [(7, 2, 3), (3, 2, 1), (5, 1, 2)], ids=["7x7", "3x3", "stride1"])
@pytest.mark.parametrize("batch", [1, 5, 17])
@DTYPES
def test_stem_as_near_to_float64_as_pytorch(dtype, batch, kernel, x_layout, backend):
    size, stride, padding = kernel
    conv = nn.Conv2d(3, 32, size, stride, padding, bias=False).to(memory_format=torch.channels_last)
    layer = (conv, lively(nn.BatchNorm2d(32)).eval())
    exact = tuple(copy.deepcopy(module).double() for module in layer)

    def pytorch(conv, bn, x):
        return nn.functional.max_pool2d(bn(conv(x)).relu(), 3, 2, 1)

    x = draw((batch, 3, 45, 38), torch.float32, x_layout)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = stem(x, conv_bn(*layer), backend=backend), pytorch(*layer, x)
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
    with torch.no_grad():
        rounded = x.to(dtype).double()
        assert_matches("stem", ours, theirs, pytorch(*exact, rounded))
        for value in (float("nan"), float("inf")):
            x[0, 1, 20, 17] = value
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                ours, theirs = stem(x, conv_bn(*layer), backend=backend), pytorch(*layer, x)
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.isinf(), theirs.isinf())


@DTYPES
def test_a_stem_of_many_bands(dtype, native):
    """Images so large that AMX pools them in bands of rows; the last pooled row lacks one of its three."""
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False).to(memory_format=torch.channels_last)
    layer = (conv, lively(nn.BatchNorm2d(64)).eval())
    exact = tuple(copy.deepcopy(module).double() for module in layer)

    def pytorch(conv, bn, x):
        return nn.functional.max_pool2d(bn(conv(x)).relu(), 3, 2, 1)

    x = draw((2, 3, 133, 301), torch.float32, "channels_last")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for _ in range(2):
                ours = stem(x, conv_bn(*layer), backend=native)
            theirs = pytorch(*layer, x)
        with torch.no_grad():
            assert_matches("stem", ours, theirs, pytorch(*exact, x.to(dtype).double()))


@pytest.mark.parametrize("x_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("width", [1021, 1022])
@DTYPES
def test_threads_that_share_an_image_leave_each_others_rows_alone(dtype, width, x_layout, native):
    """Rows are read 4 pixels at a time, and one pixel of halo is all that is between two of them."""
    conv = nn.Conv2d(3, 32, 3, 2, 1, bias=False).to(memory_format=torch.channels_last)
    layer = conv_bn(conv, lively(nn.BatchNorm2d(32)).eval())
    x = draw((1, 3, 64, width), torch.float32, x_layout)
    results = []
    for threads in (1, *10 * (2,)):
        torch.set_num_threads(threads)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            results.append(stem(x, layer, backend=native))
    for y in results[1:]:
        torch.testing.assert_close(y, results[0])


@DTYPES
def test_a_network_in_eval_is_a_stem_and_a_block_a_time(dtype, backend):
    model = lively(resnet18(num_classes=5)).eval().to(memory_format=torch.channels_last)
    exact, fast = copy.deepcopy(model).double(), optimize(copy.deepcopy(model), backend=backend, strict=True)
    x = draw((2, 3, 64, 64), torch.float32, "channels_last")
    ran = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        run(fast, x, dtype)
    assert ran.count("resnet_fast.residual_block.default") == 8
    assert ran.count("resnet_fast.stem.default") == 1
    assert not any("convolution" in name or "batch_norm" in name for name in ran)
    assert_matches("logits", run(fast, x, dtype), run(model, x, dtype), run(exact, x.double(), torch.float64))


def test_shapes_that_do_not_fit_are_errors(backend):
    conv = nn.Conv2d(32, 32, 1, bias=False)
    layer = conv_bn(conv, nn.BatchNorm2d(32).eval())
    x = draw((2, 32, 5, 5), torch.float32, "channels_last")
    with torch.no_grad():
        with pytest.raises(ValueError, match="residual must have the output's shape"):
            residual_block(x, [layer], x[:1], backend=backend)
        with pytest.raises(ValueError, match="must have one shape"):
            residual_block(x, [layer], ConvBn(*layer[:5], stride=2), backend=backend)
        with pytest.raises(ValueError, match="running_mean"):
            residual_block(x, [layer._replace(running_mean=None)], backend=backend)

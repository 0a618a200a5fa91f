"""On a CUDA device: `python3 -m pytest -m gpu tests`, which also runs on a checkout that nobody installed."""

import pytest
import stock
import test_cuda_conv
import test_primitives
import test_shortcut as shortcut
import torch
from cases import BN_CASES, CONV_CASES, LAYOUTS, bn_case, bn_tensors, conv_case, draw, named
from models import assert_trains_alike, lively, pair
from numerics import assert_all_match
from torch.utils._pytree import tree_map_only
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import dispatch, freeze, functional, optimize
from resnet_fast.backends import native
from resnet_fast.backends.primitives import native as native_primitives
from resnet_fast.backends.primitives import reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request) -> str:
    """Every backend's name; what it lacks is skipped with its reason by `on_gpu`."""
    return request.param


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(backend: str, op: str, dtype: torch.dtype) -> None:
    """Skip where `backend` has no CUDA kernel for `op`."""
    if reason := dispatch.why_not(backend, op, "cuda", dtype):
        pytest.skip(reason)


def check(op, case_tensors, case, layout, dtype, training, backend):
    on_gpu(backend, f"{op}_train" if training else op, dtype)
    tensors = {name: tensor.cuda() for name, tensor in case_tensors(case, dtype, layout).items()}
    keywords = {
        "training": training,
        "act": "relu" if case.relu else None,
        "eps": 1e-3,
        **getattr(case, "geometry", {}),
    }
    eager = getattr(stock, op)
    tensors = stock.off_the_kink(eager, tensors, **keywords)
    ours = stock.run(getattr(functional, op), tensors, backend=backend, **keywords)
    theirs = stock.run(eager, tensors, **keywords)
    if op == "bn_act" and not training:  # PyTorch's CUDA kernel writes this one contiguous, its CPU kernel as x is
        theirs["dx"] = theirs["dx"].contiguous(memory_format=LAYOUTS[layout])
    exact = stock.run(eager, stock.double(tensors), **keywords)
    assert_all_match(ours, theirs, exact, dtype, stock.terms(eager, tensors, **keywords))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named([case for case in BN_CASES if not case.unaligned]))
def test_bn_act_numerics(case, layout, dtype, training, backend):
    check("bn_act", bn_case, case, layout, dtype, training, backend)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named([case for case in CONV_CASES if not case.unaligned]))
def test_conv_bn_act_numerics(case, layout, dtype, training, backend):
    check("conv_bn_act", conv_case, case, layout, dtype, training, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", shortcut.CASES)
def test_conv_bn_shortcut_act_numerics(name, layout, dtype, backend):
    on_gpu(backend, "conv_bn_shortcut_act", dtype)
    *inputs, act = shortcut.stages(name, dtype, layout)
    inputs = [shortcut.converted(each, torch.Tensor.cuda) for each in inputs]
    with torch.no_grad():
        ours = functional.conv_bn_shortcut_act(*inputs, act=act, backend=backend)
        theirs = shortcut.eager(*inputs, act)
        exact = shortcut.eager(*(shortcut.converted(each, torch.Tensor.double) for each in inputs), act)
    assert_all_match({"y": ours}, {"y": theirs}, {"y": exact})


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_training_three_steps(block):
    torch.manual_seed(1)
    stock_model, fast_model = pair(lively(ResNet(block, [1, 1, 1, 1], num_classes=5)).double().cuda(), "reference")
    images = [draw((4, 3, 48, 48), torch.float64).cuda() for _ in range(3)]
    assert_trains_alike(stock_model.train(), fast_model.train(), images)


def test_cross_device_arguments_are_named():
    x = torch.ones(2, 3, 4, 4, device="cuda")
    with pytest.raises(ValueError, match="running_mean is on cpu and x on cuda:0"):
        functional.bn_act(x, torch.zeros(3), torch.ones(3))


def test_moving_a_model_to_the_gpu_after_the_swap():
    torch.manual_seed(1)
    model = optimize(lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5))).eval()
    x = draw((2, 3, 48, 48), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), model.cpu()(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(freeze(model).cuda()(x.cuda()).cpu(), model(x), rtol=1e-3, atol=1e-3)


def test_side_stream_and_graph_capture(backend):
    on_gpu(backend, "bn_act", torch.float32)
    x = draw((4, 16, 14, 14), torch.float32, "channels_last").cuda()
    tensors = {name: tensor.cuda() for name, tensor in bn_tensors(16, torch.float32).items()}
    expected = functional.bn_act(x, **tensors, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = functional.bn_act(x, **tensors, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = functional.bn_act(x, **tensors, backend=backend)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_twenty_runs_are_bitwise_equal(backend):
    on_gpu(backend, "bn_act_train", torch.bfloat16)
    tensors = {name: tensor.cuda() for name, tensor in bn_case(BN_CASES[0], torch.bfloat16, "channels_last").items()}
    runs = [stock.run(functional.bn_act, tensors, training=True, backend=backend) for _ in range(20)]
    for again in runs[1:]:
        for name in again:
            assert torch.equal(again[name], runs[0][name]), name


# ---- the native kernels: what benchmarks/campaign/sanitizer.py runs under compute-sanitizer ----


def cuda(tree):
    return tree_map_only(torch.Tensor, torch.Tensor.cuda, tree)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """A copy that starts one element into a larger buffer."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", **named(test_primitives.CASES))
def test_native_primitives(case, dtype, layout):
    on_gpu("native", "residual_block_train", dtype)
    for function, arguments, names in test_primitives.calls(case, dtype, layout).values():
        if dtype == torch.float64 and layout == "channels_last" and function.startswith("conv"):
            continue  # cuDNN has no channels_last in float64, and PyTorch's convolutions make contiguous tensors
        arguments = cuda(arguments)
        if case.unaligned:
            whole = [isinstance(a, torch.Tensor) and a.dim() == 4 for a in arguments]
            arguments = tuple(unaligned(a) if is4d else a for a, is4d in zip(arguments, whole, strict=True))
        test_primitives.check((function, arguments, names), dtype)


@pytest.mark.parametrize("path", ["mma", "cudnn", "separate", "auto"])
@pytest.mark.parametrize("dtype", test_cuda_conv.DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(test_cuda_conv.CASES))
def test_native_convolution_paths(case, dtype, path):
    on_gpu("native", "conv_epilogue", dtype)
    tensors = cuda(conv_case(case, dtype, "channels_last"))
    norm = [tensors.pop(name, None) for name in ("running_mean", "running_var", "weight", "bias")]
    relu, geometry = case.relu, tuple(case.geometry.values())
    if path == "cudnn":  # of frozen models: no norm, and never without a ReLU
        norm, relu = [], True
    x, conv_weight, conv_bias, residual = (tensors.get(n) for n in ("x", "conv_weight", "conv_bias", "residual"))
    if path == "mma" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("sm_80 and newer")

    def expected(convert):
        parts = [None if t is None else convert(t) for t in (x, conv_weight, conv_bias, residual)]
        y = torch.nn.functional.conv2d(*parts[:3], **case.geometry)
        if norm:
            y = torch.nn.functional.batch_norm(y, *(None if t is None else convert(t) for t in norm), False, 0.0, 1e-3)
        y = y if parts[3] is None else y + parts[3]
        return y.relu() if relu else y

    ours = native.conv_epilogue(x, conv_weight, conv_bias, norm, 1e-3, residual, *geometry, relu, path)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_all_match({"y": ours}, {"y": expected(lambda t: t)}, {"y": expected(torch.Tensor.double)})


def test_native_convolution_says_what_does_not_fit():
    on_gpu("native", "conv_epilogue", torch.float32)
    x, weight = torch.ones(1, 12, 4, 4, device="cuda"), torch.ones(8, 12, 1, 1, device="cuda")
    rest = ([1, 1], [0, 0], [1, 1], 1, True)
    with pytest.raises(RuntimeError, match="not bfloat16 or float16"):
        native.conv_epilogue(x, weight, None, [], 0.0, None, *rest, "mma")
    with pytest.raises(RuntimeError, match="not multiples of 8"):
        native.conv_epilogue(x.half(), weight.half(), None, [], 0.0, None, *rest, "mma")
    with pytest.raises(RuntimeError, match="no norm in its epilogue"):
        native.conv_epilogue(x, weight, None, [torch.ones(8, device="cuda")] * 4, 0.0, None, *rest, "cudnn")
    with pytest.raises(ValueError, match="path: expected"):
        native.conv_epilogue(x, weight, None, [], 0.0, None, *rest, "fastest")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_native_training_three_steps(block, layout):
    on_gpu("native", "residual_block_train", torch.float64)
    torch.manual_seed(1)
    stock_model, fast_model = pair(lively(ResNet(block, [1, 1, 1, 1], num_classes=5)).double().cuda(), "native")
    images = [draw((4, 3, 48, 48), torch.float64, layout).cuda() for _ in range(3)]
    assert_trains_alike(stock_model.train(), fast_model.train(), images)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_frozen_networks(dtype):
    on_gpu("native", "conv_epilogue", dtype)
    torch.manual_seed(1)
    model = lively(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5)).eval().cuda()
    images = draw((4, 3, 48, 48), dtype, "channels_last").cuda()
    with torch.no_grad():
        ours = freeze(model, dtype=dtype, backend="native")(images)
        theirs = freeze(model, dtype=dtype, backend="reference")(images)
        exact = model.double()(images.double())
    assert_all_match({"logits": ours}, {"logits": theirs}, {"logits": exact})


def test_native_graph_capture_of_a_training_block():
    on_gpu("native", "bn_apply", torch.bfloat16)
    x = draw((4, 24, 9, 9), torch.bfloat16, "channels_last").cuda()
    norm = cuda(test_primitives.draw_norm(24, torch.bfloat16))

    def step():
        mean, var = native_primitives.batch_statistics(x)
        y = native_primitives.apply(x, norm._replace(mean=mean, var=var), x, norm)
        sums = native_primitives.backward_reduce(y, x, norm, True)
        return y, native_primitives.backward_apply(y, x, norm, True, *sums)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for ours, same in zip(captured, expected, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_elements_than_int32_counts(layout):
    """Not named test_native_: compute-sanitizer would take hours over it."""
    on_gpu("native", "bn_apply", torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.ones(2**21 + 1, 8, 16, 8, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    x[-1] = 3
    norm = test_primitives.Norm(*torch.tensor([1.0, 4.0, 1.0, 0.5], device="cuda")[:, None].repeat(1, 8), 0.0)
    y = native_primitives.apply(x, norm)
    assert (y[-1] == 1.5).all()
    assert (y[:-1] == 0.5).all()
    mean, var = native_primitives.batch_statistics(x)
    share = 1 / x.shape[0]
    torch.testing.assert_close(mean.cpu(), torch.full((8,), 1 + 2 * share))
    torch.testing.assert_close(var.cpu(), torch.full((8,), 4 * share * (1 - share)), rtol=1e-4, atol=0)


def test_statistics_are_as_good_as_cudas_own():
    """Beside a large mean, and of odd shapes: the reference on the same device is PyTorch's own reduction."""
    on_gpu("native", "bn_statistics", torch.float32)
    for shape in ((3, 65, 17, 13), (2, 2048, 7, 7), (64, 3, 33, 31)):
        for layout in LAYOUTS:
            x = draw(shape, torch.float32, layout).cuda() + 100
            made = ((native_primitives, x), (reference, x), (reference, x.double()))
            results = (dict(zip(("mean", "var"), module.batch_statistics(t), strict=True)) for module, t in made)
            assert_all_match(*results)

"""On a CUDA device: `python3 -m pytest -m gpu tests`, which also runs on a checkout that nobody installed."""

import pytest
import stock
import test_shortcut as shortcut
import torch
from cases import BN_CASES, CONV_CASES, LAYOUTS, bn_case, bn_tensors, conv_case, draw, named
from models import assert_trains_alike, lively, pair
from numerics import assert_all_match
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import dispatch, freeze, functional, optimize

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

"""The Triton path on a CUDA device: kernels by configuration, frozen models as plans, streams, CUDA graphs, shapes.

    python3 -m pytest -m gpu tests

Ops by their arguments are in test_gpu.py. Everything here is held against float64, beside PyTorch in the same dtype.
"""

import copy
import threading

import pytest
import torch
import torchvision
from cases import draw
from models import lively
from numerics import assert_all_match
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import freeze, gpus, numerics, optimize, warmup
from resnet_fast.backends import triton
from resnet_fast.cli import tuning, workloads
from resnet_fast.kernels import selection
from resnet_fast.kernels.configs import candidates
from resnet_fast.planned import PlannedResNet
from resnet_fast.planner import Section, build
from resnet_fast.problems import StemProblem
from resnet_fast.shapes import Conv

pytestmark = pytest.mark.gpu

NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d")
FUSIONS = ("conv", "tail")
CONFIGURATIONS = 8
"""How many of a problem's configurations are tried here; `resnet-fast tune` tries more, and verifies each as well."""


@pytest.fixture(autouse=True)
def _usable():
    if reason := triton.why_not("conv_bn_act", "cuda", torch.bfloat16):
        pytest.skip(reason)


def network_problems(batch: int = 4) -> dict:
    """Every distinct problem of the networks' plans, by key."""
    found = {}
    for name in NETWORKS:
        with torch.device("meta"):
            frozen = freeze(torchvision.models.get_model(name).eval(), dtype=torch.bfloat16)
        section, shape = Section.of_resnet(frozen), (batch, 3, 224, 224)
        for fusion in FUSIONS:
            for step in build(section, shape, "bfloat16", gpus.KNOWN["h200"], fusion=fusion).steps:
                if not step.name.startswith("maxpool"):
                    found[step.problem.key] = step.problem
    return found


PROBLEMS = network_problems()


@pytest.mark.parametrize("key", PROBLEMS)
def test_configurations(key):
    """The most promising configurations of each problem, each into outputs full of NaN."""
    problem, gpu = PROBLEMS[key], gpus.of_device(torch.cuda.current_device())
    work = workloads.of(problem, "cuda")
    reference, stock = work.reference(), work.stock()
    configs = candidates(problem, gpu)[:CONFIGURATIONS]
    wrong = {}
    for config in configs:
        work.poison()
        verdict = numerics.worst(numerics.compare_all(work.kernel(config)(), stock, reference))
        if not verdict.match:
            wrong[tuning.label_of(config)] = str(verdict)
    assert not wrong
    assert configs or gpu.capability < (9, 0)


@pytest.mark.parametrize("key", [key for key in PROBLEMS if not key.startswith("tail")])
def test_library_variants(key):
    work = workloads.of(PROBLEMS[key], "cuda")
    reference, stock = work.reference(), work.stock()
    assert "separate" in work.library
    for name, run in work.library.items():
        assert numerics.worst(numerics.compare_all(run(), stock, reference)).match, name


def model_and_answers(name: str, dtype: torch.dtype, batch: int = 3):
    """A lively model, images, and its logits in `dtype` and in float64."""
    torch.manual_seed(5)
    model = lively(torchvision.models.get_model(name, num_classes=10)).eval().cuda()
    x = draw((batch, 3, 96, 96), torch.float32, "channels_last").cuda()
    with torch.no_grad():
        stock = copy.deepcopy(model).to(dtype)(x.to(dtype))
        exact = copy.deepcopy(model).double()(x.double())
    return model, x, stock, exact


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["launches", "graph"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_networks(name, dtype, fusion, cuda_graph):
    model, x, stock, exact = model_and_answers(name, dtype)
    frozen = freeze(model, dtype=dtype, backend="triton", fusion=fusion, cuda_graph=cuda_graph)
    assert type(frozen) is PlannedResNet
    with torch.no_grad():
        runs = [frozen(x) for _ in range(3)]
    assert_all_match({"y": runs[0]}, {"y": stock}, {"y": exact})
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert any(step.choice.config for step in next(iter(frozen._engines.values())).plan.steps)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_optimized_networks(name):
    model, x, stock, exact = model_and_answers(name, torch.bfloat16)
    fast = optimize(model.to(torch.bfloat16), backend="triton", strict=True)
    with torch.no_grad():
        assert_all_match({"y": fast(x.bfloat16())}, {"y": stock}, {"y": exact})


def test_capture_by_the_user_after_warmup_and_not_before():
    model, x, _, _ = model_and_answers("resnet18", torch.bfloat16)
    frozen = warmup(freeze(model, dtype=torch.bfloat16, backend="triton", cuda_graph=False), x)
    with torch.no_grad():
        expected = frozen(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = frozen(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    cold = freeze(model, dtype=torch.bfloat16, backend="triton")
    with pytest.raises(RuntimeError, match="not warmed up"), torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cold(x)


def test_streams_and_threads_take_turns():
    torch.manual_seed(5)
    model = lively(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5)).eval().cuda()
    frozen = freeze(model, dtype=torch.bfloat16, backend="triton", cuda_graph=False)
    inputs = [draw((2, 3, 64, 64), torch.float32).cuda() for _ in range(6)]
    with torch.no_grad():
        expected = [frozen(x) for x in inputs]
    torch.cuda.synchronize()
    results: dict[int, torch.Tensor] = {}

    def work(place: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results[place] = frozen(inputs[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for place, y in enumerate(expected):
        assert torch.equal(results[place], y)


def test_new_shapes_are_planned_and_old_answers_stand():
    model, x, _, _ = model_and_answers("resnet18", torch.bfloat16)
    frozen = freeze(model, dtype=torch.bfloat16, backend="triton")
    with torch.no_grad():
        first = frozen(x)
        kept = first.clone()
        frozen(x[:1])
        frozen(draw((2, 3, 65, 97), torch.float32).cuda())
        assert torch.equal(first, kept)
        assert torch.equal(frozen(x), kept)


def test_more_than_two_to_the_31_elements():
    """A 1x1 whose output has 2.2e9 elements: the last image is as right as the first."""
    if torch.cuda.get_device_properties(0).total_memory < 16e9:
        pytest.skip("needs 16 GB")
    from resnet_fast import functional

    x = torch.randn(700, 8, 224, 224, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 8, 1, 1, device="cuda", dtype=torch.bfloat16)
    statistics = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    assert 700 * 64 * 224 * 224 > 2**31
    with torch.no_grad():
        y = functional.conv_bn_act(x, weight, *statistics, backend="triton")
        for image in (0, 699):
            alone = functional.conv_bn_act(x[image : image + 1], weight, *statistics, backend="triton")
            torch.testing.assert_close(y[image : image + 1], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 112, 112), (3, 100, 57, 61), (2, 5, 33, 1)], ids=str)
def test_max_pool(shape, dtype):
    """Its choice of a number is PyTorch's, NaN included."""
    x = draw(shape, dtype, "channels_last").cuda()
    x[0, 3, 0, 0] = x[-1, 4, -1, -1] = x[0, 0, 20, 0] = float("nan")
    x[-1, 1] = -float("inf")
    y = triton.max_pool(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, torch.nn.functional.max_pool2d(x, 3, 2, 1), rtol=0, atol=0, equal_nan=True)


def test_max_pool_of_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 16e9:
        pytest.skip("needs 16 GB")
    x = torch.randn(2700, 64, 112, 112, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    y = triton.max_pool(x)
    for image in (0, 2699):
        alone = torch.nn.functional.max_pool2d(x[image : image + 1], 3, 2, 1)
        torch.testing.assert_close(y[image : image + 1], alone, rtol=0, atol=0)


STEMS = {
    "resnet": Conv(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3)),
    "odd": Conv(3, 3, 97, 131, 64, (7, 7), (2, 2), (3, 3)),
    "grey": Conv(5, 1, 64, 96, 32, (7, 7), (2, 2), (3, 3)),
    "three_by_three": Conv(4, 4, 64, 64, 64, (3, 3), (2, 2), (1, 1)),
    "even_kernel": Conv(2, 2, 61, 64, 64, (6, 8), (2, 2), (2, 1)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", STEMS)
def test_stems(name, dtype):
    """Every configuration, of images that are not ImageNet's too."""
    problem, gpu = StemProblem(STEMS[name], dtype), gpus.of_device(torch.cuda.current_device())
    work = workloads.of(problem, "cuda")
    reference, stock, wrong = work.reference(), work.stock(), {}
    for config in candidates(problem, gpu):
        work.poison()
        verdict = numerics.worst(numerics.compare_all(work.kernel(config)(), stock, reference))
        if not verdict.match:
            wrong[tuning.label_of(config)] = str(verdict)
    assert not wrong


def test_what_the_gpu_refuses_is_planned_around(monkeypatch, said):
    launch = triton.launcher()
    original, refused = launch.launch, []

    def refusing(kernel, *args):
        if not refused:
            refused.append(kernel)
            raise launch.OutOfResources(300000, 232448, "shared memory")
        return original(kernel, *args)

    torch.manual_seed(5)
    model = lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).eval().cuda()
    x = draw((2, 3, 64, 64), torch.float32).cuda()
    monkeypatch.setattr(launch, "launch", refusing)
    frozen = freeze(model, dtype=torch.bfloat16, backend="triton")
    with torch.no_grad():
        torch.testing.assert_close(frozen(x).float(), model(x), rtol=0.1, atol=0.1)
    assert any("shared memory" in message for message in said())
    selection.forget()

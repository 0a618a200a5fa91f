"""Training on the Triton backend on a CUDA device: blocks in every stage, kernels by configuration, memory, bits.

    python3 -m pytest -m gpu tests

Everything is held against float64, beside PyTorch in the same dtype; speeds and loss curves are
`benchmarks/gpu_campaign.py`'s.
"""

import copy

import pytest
import torch
from cases import draw
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import gpus, numerics, optimize, training
from resnet_fast.backends import triton, triton_pool
from resnet_fast.backends.primitives import Norm, reference
from resnet_fast.cli import checks, training_problems, tuning, workloads
from resnet_fast.cli.checks import BlockCase
from resnet_fast.kernels.configs import candidates
from resnet_fast.problems import is_training
from resnet_fast.saved import saved_bytes

pytestmark = pytest.mark.gpu
STAGES = pytest.mark.parametrize("stage", training.STAGES)
BLOCKS = (
    BlockCase("basic", BasicBlock, 64, 64),
    BlockCase("basic_stride2", BasicBlock, 64, 128, 2, downsample=True),
    BlockCase("bottleneck", Bottleneck, 256, 64, size=14),
    BlockCase("bottleneck_stride2", Bottleneck, 256, 128, 2, downsample=True, size=14),
    BlockCase("bottleneck_grouped", Bottleneck, 256, 64, groups=32, base_width=4),
    BlockCase("bottleneck_odd", Bottleneck, 20, 5),
)
CONFIGURATIONS = 4
"""How many of a problem's configurations are tried here; `resnet-fast tune` tries more, and verifies each as well."""


@pytest.fixture(autouse=True)
def _usable():
    if reason := triton.why_not("residual_block_train", "cuda", torch.bfloat16):
        pytest.skip(reason)


@STAGES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_blocks(case, dtype, stage):
    stock = checks.build_block(case, torch.Generator().manual_seed(5)).to("cuda").train()
    x = draw((4, case.inplanes, case.size, case.size), torch.float32, "channels_last").cuda()
    autocast = dtype != torch.float32
    found = checks.compare_block(stock, x, dtype, autocast, "triton", stage)
    worst = numerics.worst(found)
    assert worst.match, f"{worst.name}: {worst.reason}"


def network_problems() -> dict:
    """Every distinct problem of a training step that there is a kernel for, by key."""
    found = {}
    for name in ("resnet50", "resnet18"):
        for problem in training_problems.of_network(name, (8, 3, 64, 64), "bfloat16"):
            if is_training(problem) and candidates(problem, gpus.KNOWN["h200"]):
                found[problem.key] = problem
    return found


PROBLEMS = network_problems()


@pytest.mark.parametrize("key", PROBLEMS)
def test_configurations(key):
    """The most promising configurations of each problem of training, into memory full of NaN."""
    problem = PROBLEMS[key]
    work = workloads.of(problem, "cuda")
    reference, stock = work.reference(), work.stock()
    for config in candidates(problem, gpus.of_device(0))[:CONFIGURATIONS]:
        with checks.poisoned_memory():
            found = work.kernel(config)()
        worst = numerics.worst(numerics.compare_all(found, stock, reference))
        assert worst.match, f"{tuning.label_of(config)}: {worst.name}: {worst.reason}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(32, 64, 112, 112), (3, 100, 57, 61)], ids=str)
def test_pool_behind_batch_norm(shape, dtype):
    """The stem's passes beside PyTorch's, which has its maxima in the same places: no result here is rounded."""
    x = (draw(shape, torch.float32, "channels_last") * 2).round().to(dtype).cuda()
    channels = torch.arange(shape[1], device="cuda")
    weight = torch.where(channels % 3 == 0, -1.0, 0.5)
    norm = Norm((channels % 4).float(), torch.full_like(weight, 4.0), weight, (channels % 2).float(), 0.0)
    y, index = reference.pool(x, norm)
    ours, places = triton_pool.pool(x, norm)
    assert torch.equal(ours, y)
    assert torch.equal(places, index)
    dy, means = draw(y.shape, dtype, "channels_last").cuda(), torch.randn(2, shape[1], device="cuda")
    wide = [tensor.double() for tensor in (dy, x)]
    exact_norm = Norm(*(vector.double() for vector in norm[:4]), norm.eps)
    for name, more in (("backward_reduce", ()), ("backward_apply", means)):
        arguments = dy, x, norm, True, *more, index
        exact = getattr(reference, name)(*wide, exact_norm, True, *(mean.double() for mean in more), index)
        found, stock = (getattr(module, name)(*arguments) for module in (triton_pool, reference))
        outputs = zip(*(each if isinstance(each, tuple) else (each,) for each in (found, stock, exact)), strict=True)
        for number, each in enumerate(outputs):
            verdict = numerics.compare(f"{name} {number}", *each, compute_dtype=dtype)
            assert verdict.match, str(verdict)


@STAGES
def test_twenty_steps_are_bitwise_equal(stage):
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(20):
            torch.manual_seed(4)
            model = resnet18().cuda().to(memory_format=torch.channels_last).train()
            model = optimize(model, backend="triton", train_stage=stage, strict=True)
            x = draw((4, 3, 64, 64), torch.float32, "channels_last").cuda()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for other in results[1:]:
            assert all(torch.equal(ours, first) for ours, first in zip(other, results[0], strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("stage", "limit"), [(1, 36.0), (2, 36.0), (3, 36.0), (4, 24.0)])
def test_resnet50_saves_little(stage, limit):
    """Megabytes an image, counted, and as the allocator sees them."""
    model = resnet50().cuda().to(memory_format=torch.channels_last).train()
    model = optimize(model, backend="triton", train_stage=stage, strict=True)
    x = draw((32, 3, 224, 224), torch.float32, "channels_last").cuda()

    def forward() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(x)

    forward()  # compiled, and workspaces taken, beforehand
    assert saved_bytes(forward, model.parameters()) / len(x) / 1e6 <= limit
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    torch.cuda.synchronize()
    casts = 2 * sum(parameter.numel() for parameter in model.parameters())  # of weights to bfloat16, kept too
    assert (torch.cuda.memory_allocated() - before - casts) / len(x) / 1e6 <= 1.05 * limit
    assert y.isfinite().all()


def test_graphed_callables_train_alike():
    """PyTorch's own way to take the host out of a step; nothing of a fused block needs it."""
    torch.manual_seed(4)
    model = optimize(resnet18().cuda().to(memory_format=torch.channels_last).train(), backend="triton")
    x = draw((8, 3, 64, 64), torch.float32, "channels_last").cuda()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x,))
        replayed, plain = graphed(x), model(x)
    results = []
    for network, y in ((graphed, replayed), (model, plain)):
        y.float().square().mean().backward()
        results.append({name: parameter.grad for name, parameter in network.named_parameters()} | {"y": y.detach()})
    exact = {name: tensor.double() for name, tensor in results[1].items()}
    numerics.assert_match(numerics.compare_all(*results, exact, compute_dtype=torch.bfloat16))

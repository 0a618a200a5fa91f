"""Whole networks: stock eager, optimized, frozen. For comparisons in one process side by side use `resnet-fast bench`.

pytest benchmarks/bench_networks.py --benchmark-only --benchmark-group-by=param:name,param:dtype,func
"""

import copy

import pytest
import torch
import torchvision

import resnet_fast
from benchmarks.shapes import BATCH, DTYPES, IMAGE
from resnet_fast import numerics

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")),
    pytest.mark.parametrize("name", ["resnet18", "resnet50"]),
]


def stock(name):
    """The network with statistics of its own input, so that logits depend on every one of them."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).to(memory_format=torch.channels_last).train()
    x = torch.randn(BATCH, 3, IMAGE, IMAGE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval(), x


def variant(model, contender, dtype):
    """`model` as one contender runs it at inference."""
    if contender == "frozen":
        return resnet_fast.freeze(model, dtype=dtype)
    model = copy.deepcopy(model).to(dtype)
    return model if contender == "eager" else resnet_fast.optimize(model, backend=contender, strict=True)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_infer(name, dtype, frozen, contender, timed):
    if frozen and contender != "eager":
        pytest.skip("frozen networks run the same on every backend")
    contender = "frozen" if frozen else contender
    model, x = stock(name)
    network = variant(model, contender, dtype)
    with torch.no_grad():
        theirs, exact = variant(model, "eager", dtype)(x.to(dtype)), copy.deepcopy(model).double()(x.double())
        numerics.assert_match(numerics.compare("logits", network(x.to(dtype)), theirs, exact))

    @torch.no_grad()
    def step():
        network(x.to(dtype))

    timed(step, contender, dtype)


def test_train(name, dtype, contender, timed):
    """Forward, backward and an SGD step; bfloat16 by autocast."""
    model, x = stock(name)
    outputs = []
    for which in (contender, "eager"):
        network = variant(model, which, torch.float32).train()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs.append(network(x))
    with torch.no_grad():
        exact = copy.deepcopy(model).double().train()(x.double())
    numerics.assert_match(numerics.compare("logits", *outputs, exact))
    network = variant(model, contender, torch.float32).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
    labels = torch.arange(BATCH) % 10

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()

    timed(step, contender, dtype)

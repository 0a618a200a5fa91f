"""Fast models in copies, files, other models and other processes."""

import copy
import io
import pickle

import fresh
import pytest
import torch
from cases import draw
from models import fast_blocks, lively
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fast import FastBasicBlock, disabled, optimize, restore


def fast_model(backend):
    torch.manual_seed(0)
    return optimize(lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)), backend=backend, strict=True).eval()


def stock_model():
    torch.manual_seed(9)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).eval()


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": save_and_load,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_fast_and_independent(name, backend):
    model = fast_model(backend)
    twin = COPIES[name](model)
    assert len(fast_blocks(twin)) == 4
    assert {(block.fast_backend, block.fast_strict) for block in fast_blocks(twin)} == {(backend, True)}
    assert str(twin.resnet_fast_report) == str(model.resnet_fast_report)
    x = draw((2, 3, 32, 32), torch.float32)
    before = model(x)
    assert torch.equal(twin(x), before)
    restore(twin)
    with torch.no_grad():
        twin.layer1[0].bn1.weight.add_(1.0)
    assert len(fast_blocks(model)) == 4
    assert torch.equal(model(x), before)


def test_state_dict_goes_both_ways(backend):
    fast, stock = fast_model(backend), stock_model()
    assert list(fast.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(fast.state_dict())
    x = draw((2, 3, 32, 32), torch.float32)
    with disabled():
        assert torch.equal(stock(x), fast(x))
    other = stock_model()
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(x), other(x))


def test_a_saved_state_loads_into_stock_without_the_package(backend, tmp_path):
    fast = fast_model(backend)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    x = torch.ones(1, 3, 32, 32)
    code = f"""
import sys, torch
from torchvision.models.resnet import BasicBlock, ResNet
model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
model.load_state_dict(torch.load({str(tmp_path / "fast.pt")!r}))
assert not any(name.startswith("resnet_fast") for name in sys.modules)
print(model(torch.ones(1, 3, 32, 32)).tolist())
"""
    done = fresh.python(code)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(eval(done.stdout)), fast(x))


def test_the_optimizer_made_before_the_swap_goes_on(backend):
    torch.manual_seed(0)
    model = stock_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    optimize(model, backend=backend)
    before = model.layer3[0].conv1.weight.detach().clone()
    model(draw((2, 3, 32, 32), torch.float32)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layer3[0].conv1.weight, before)
    state = copy.deepcopy(optimizer.state_dict())
    torch.optim.AdamW(restore(model).parameters(), 1e-3).load_state_dict(state)


def test_data_parallel_replicas_run(backend):
    """DataParallel copies modules with _replicate_for_data_parallel: a forward bound to the instance would be the
    original's; the class stays the replica's own."""
    block = fast_model(backend).layer1[0]
    replica = block._replicate_for_data_parallel()
    assert type(replica) is FastBasicBlock
    replica._parameters, replica._buffers, replica._modules = {}, {}, dict(copy.deepcopy(block)._modules)
    x = draw((2, 64, 8, 8), torch.float32)
    assert torch.equal(replica(x), block(x))
    wrapped = nn.DataParallel(fast_model(backend))
    images = draw((2, 3, 32, 32), torch.float32)
    assert torch.equal(wrapped(images), wrapped.module(images))


def test_share_memory_and_fork(backend):
    """A model inherited by a forked DataLoader worker, the usual way on Linux, still answers."""
    code = f"""
import os, torch
torch.set_num_threads(1)
import resnet_fast
from torchvision.models.resnet import BasicBlock
block = resnet_fast.optimize(BasicBlock(8, 8), backend={backend!r}, strict=True).eval()
x = torch.randn(2, 8, 6, 6)
with torch.no_grad():
    expected = block(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(block(x), expected) else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""
    done = fresh.python(code)
    assert done.returncode == 0, done.stderr

"""One of the processes of test_distributed.py, which all run all checks: RANK WORLD STORE BACKEND"""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from cases import draw
from models import lively
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1

from resnet_fast import disabled, optimize
from resnet_fast.blocks import why_not_downsample
from resnet_fast.training import GRAM, LIBRARY, STAGES

SHARES = (3, 2)  # images of each process: not equal
ENDS = (LIBRARY, GRAM)


def block() -> Bottleneck:
    torch.manual_seed(7)
    downsample = nn.Sequential(conv1x1(16, 32, 2), nn.BatchNorm2d(32))
    return lively(Bottleneck(16, 8, 2, downsample=downsample)).double().train()


def network() -> ResNet:
    torch.manual_seed(7)
    return lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).double().train()


def synchronised(rank: int, backend: str) -> None:
    """Half a batch here and half there, with SyncBatchNorm, is the whole batch with BatchNorm2d."""
    for stage in STAGES:
        for make, shape in ((block, (5, 16, 6, 6)), (network, (5, 3, 40, 40)))[: 2 if stage in ENDS else 1]:
            twin = make()
            whole = draw(shape, torch.float64, "channels_last").requires_grad_()
            y = twin(whole)
            dy = torch.randn_like(y)
            y.backward(dy)

            synced = nn.SyncBatchNorm.convert_sync_batchnorm(make())
            fast = optimize(synced, backend=backend, train_stage=stage, strict=True)
            start = sum(SHARES[:rank])
            mine = slice(start, start + SHARES[rank])
            x = whole.detach()[mine].clone(memory_format=torch.preserve_format).requires_grad_()
            ours = fast(x)
            ours.backward(dy[mine])
            close(ours, y[mine], "y")
            close(x.grad, whole.grad[mine], "dx")
            for name, parameter in fast.named_parameters():
                grad = parameter.grad.clone()
                dist.all_reduce(grad)
                close(grad, twin.get_parameter(name).grad, name)
            for name, buffer in fast.named_buffers():
                close(buffer, twin.get_buffer(name), name)


def behind_a_bias(rank: int, backend: str) -> None:
    """What is not fused: the block where a bias is in the main path, else the shortcut alone."""
    for name in ("conv1", "downsample.0"):
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(block())
        synced.get_submodule(name).bias = nn.Parameter(torch.zeros(synced.get_submodule(name).out_channels).double())
        fast = optimize(nn.Sequential(synced), backend=backend)[0]
        reason = fast.why_stock() if name == "conv1" else why_not_downsample(fast.downsample)
        assert f"behind {name}'s bias" in reason, reason


def one_group_each(rank: int, backend: str) -> None:
    """SyncBatchNorm over a group of one process takes no part in anything; different groups in a block run stock."""
    groups = [dist.new_group([member]) for member in range(dist.get_world_size())]
    fast = optimize(nn.SyncBatchNorm.convert_sync_batchnorm(block(), groups[rank]), backend=backend, strict=True)
    x = draw((2, 16, 6, 6), torch.float64)
    close(fast(x), block()(x), "y")
    fast.bn2.process_group = None  # the whole world
    fast.fast_strict = False
    assert "different groups" in fast.why_stock(x)


def an_empty_share(rank: int, backend: str) -> None:
    """A clear error, at once and before anything is sent, where a process has no image."""
    fast = optimize(nn.SyncBatchNorm.convert_sync_batchnorm(block()), backend=backend)
    from resnet_fast.functional import residual_block
    from resnet_fast.layers import conv_bn

    main = [conv_bn(conv, bn) for conv, bn in fast._stages()]
    with pytest.raises(ValueError, match="at least one image"):
        residual_block(torch.empty(0, 16, 6, 6, dtype=torch.float64), main, conv_bn(*fast.downsample), group="0")


def data_parallel(rank: int, backend: str) -> None:
    """DistributedDataParallel that broadcasts buffers, two forwards before the backward, two steps: as stock without
    the broadcasting, which in stock models is an error (batch_norm saves its buffers), and changes no gradient."""
    for stage in ENDS:
        results = []
        for fast in (False, True):
            model = network()
            if fast:
                optimize(model, backend=backend, train_stage=stage, strict=True)
            parallel = DistributedDataParallel(model, broadcast_buffers=fast)
            optimizer = torch.optim.SGD(parallel.parameters(), 1e-2, momentum=0.9)
            torch.manual_seed(rank + 1)
            for _ in range(2):
                first, second = (draw((2, 3, 40, 40), torch.float64) for _ in range(2))
                loss = parallel(first).square().mean() + parallel(second).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            results.append(copy.deepcopy(model.state_dict()))
        compared = results[0] if rank == 0 else dict(model.named_parameters())  # whose buffers are everybody's
        for name in compared:
            close(results[1][name], results[0][name], name)


def no_second_derivative(rank: int, backend: str) -> None:
    """Through SyncBatchNorm there is none, and that is said."""
    fast = optimize(nn.SyncBatchNorm.convert_sync_batchnorm(block()), backend=backend, strict=True)
    x = draw((2, 16, 6, 6), torch.float64).requires_grad_()
    with pytest.raises(NotImplementedError, match="disabled"):
        torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with disabled():
        assert fast.why_stock(x) is not None


def close(ours, theirs, name: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda message: f"{name}: {message}")


CHECKS = (synchronised, behind_a_bias, one_group_each, an_empty_share, data_parallel, no_second_derivative)

if __name__ == "__main__":
    rank, world, store, backend = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    for check in CHECKS:
        print(check.__name__, flush=True)
        check(int(rank), backend)
        dist.barrier()
    dist.destroy_process_group()

"""What may happen to a block after the swap: always the right answer, and the reason logged once."""

import copy

import pytest
import torch
from cases import draw
from models import count_fused_calls, lively, pair
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import Bottleneck, conv1x1
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast import FusionError, _log


def make_block():
    torch.manual_seed(1)
    downsample = nn.Sequential(conv1x1(16, 32, 2), nn.BatchNorm2d(32))
    return lively(Bottleneck(16, 8, stride=2, downsample=downsample)).double()


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def replace(name, new):
    def edit(block):
        setattr(block, name, new(getattr(block, name)))

    return edit


def doubled(conv):
    new = Doubled(conv.in_channels, conv.out_channels, 1, bias=False).double()
    new.weight = conv.weight
    return new


def frozen(bn):
    new = FrozenBatchNorm2d(bn.num_features, eps=bn.eps).double()
    new.load_state_dict(bn.state_dict(), strict=False)
    return new


def bind_forward(block):
    block.conv2.forward = lambda x: nn.Conv2d.forward(block.conv2, x) * 3


def hook(block):
    block.bn2.register_forward_hook(lambda module, args, output: output + 1)


def pre_hook(block):
    block.conv1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(block):
    block.conv1.register_full_backward_hook(lambda module, grads_in, grads_out: tuple(g * 2 for g in grads_in))


def reflect(block):
    block.conv2.padding_mode = "reflect"
    block.conv2._reversed_padding_repeated_twice = (1, 1, 1, 1)


def weight_norm(block):
    parametrizations.weight_norm(block.conv2)


STOCK = {  # edit of the block after the swap -> a word of the reason
    "identity": (replace("bn2", lambda bn: nn.Identity()), "bn2 is Identity"),
    "group_norm": (replace("bn3", lambda bn: nn.GroupNorm(4, bn.num_features).double()), "bn3 is GroupNorm"),
    "conv_subclass": (replace("conv3", doubled), "conv3 is Doubled"),
    "parametrization": (weight_norm, "conv2 is Parametrized"),
    "bound_forward": (bind_forward, "conv2 has a forward of its own"),
    "hook": (hook, "bn2 has hooks"),
    "pre_hook": (pre_hook, "conv1 has hooks"),
    "backward_hook": (backward_hook, "conv1 has hooks"),
    "other_activation": (replace("relu", lambda relu: nn.LeakyReLU(0.2)), "relu is LeakyReLU"),
    "reflect_padding": (reflect, "only zero padding"),
    "relu_hook": (lambda block: block.relu.register_forward_hook(lambda m, a, y: y * 2), "relu has hooks"),
}


@pytest.mark.parametrize("name", STOCK)
def test_edit_after_the_swap_runs_stock_and_says_why_once(name, backend, said):
    edit, word = STOCK[name]
    stock_block, fast_block = make_block(), make_block()
    resnet_fast.optimize(fast_block, backend=backend)
    for block in (stock_block, fast_block):
        torch.manual_seed(2)
        edit(block)
        block.train()
    x = draw((2, 16, 6, 6), torch.float64)
    with count_fused_calls() as calls:
        for _ in range(3):
            compare_step(stock_block, fast_block, x)
    assert calls() == 0
    assert word in fast_block.why_stock()
    reasons = [message for message in said() if word in message]
    assert len(reasons) == 1, said()
    assert "FastBottleneck runs its stock forward" in reasons[0]


def compare_step(stock_block, fast_block, x):
    results = []
    for block in (stock_block, fast_block):
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()], allow_unused=True)])
    for their, our in zip(*results, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)
    for name, buffer in stock_block.state_dict().items():
        torch.testing.assert_close(fast_block.state_dict()[name], buffer, rtol=1e-8, atol=1e-8)


def dilate(block):
    block.conv2.dilation, block.conv2.padding, block.conv2.stride = (2, 2), (2, 2), (1, 1)
    block.downsample[0].stride = (1, 1)


def freeze_statistics(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def one_frozen(block):
    block.bn2.eval()


FUSED = {  # edits that stay fused, and must be seen: nothing may be cached
    "dilation": dilate,
    "eps": lambda block: setattr(block.bn2, "eps", 0.1),
    "momentum": lambda block: setattr(block.bn2, "momentum", 0.9),
    "frozen_bn": replace("bn2", frozen),
    "batch_norm_in_eval": freeze_statistics,
    "one_batch_norm_in_eval": one_frozen,
    "new_weight": replace("conv1", lambda conv: nn.Conv2d(16, 8, 1, bias=True).double()),
    "requires_grad_off": lambda block: block.bn1.weight.requires_grad_(False),
    "statistics_off": lambda block: setattr(block.bn1, "track_running_stats", False),
}


@pytest.mark.parametrize("name", FUSED)
def test_edit_after_the_swap_is_seen_by_the_fused_path(name, backend, said):
    stock_block, fast_block = pair(make_block(), backend)
    for block in (stock_block, fast_block):
        torch.manual_seed(2)
        block.train()
        FUSED[name](block)
    x = draw((2, 16, 6, 6), torch.float64)
    with count_fused_calls() as calls:
        for _ in range(2):
            results = []
            for block in (stock_block, fast_block):
                leaf = x.clone().requires_grad_()
                y = block(leaf)
                wants = [leaf, *(p for p in block.parameters() if p.requires_grad)]
                results.append([y, *torch.autograd.grad(y.square().sum(), wants)])
            for their, our in zip(*results, strict=True):
                torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)
            for key, buffer in stock_block.state_dict().items():
                torch.testing.assert_close(fast_block.state_dict()[key], buffer, rtol=1e-8, atol=1e-8)
    assert calls() == 8
    assert said() == []


@pytest.mark.parametrize("edit", [
    pytest.param(lambda d: d.append(nn.Dropout(0.0)), id="three_layers"),
    pytest.param(lambda d: d[1].register_forward_hook(lambda m, a, y: y + 1), id="hook"),
    pytest.param(lambda d: d.__setitem__(1, nn.GroupNorm(4, 32).double()), id="group_norm"),
])  # fmt: skip
def test_unusual_shortcut_leaves_the_rest_fused(edit, backend):
    stock_block, fast_block = pair(make_block(), backend)
    for block in (stock_block, fast_block):
        edit(block.downsample)
    with count_fused_calls() as calls:
        compare_step(stock_block.train(), fast_block.train(), draw((2, 16, 6, 6), torch.float64))
    assert calls() == 3


def test_global_hooks_still_see_every_child(backend, said):
    _, fast_block = pair(make_block(), backend)
    fast_block.fast_strict = False
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    try:
        fast_block(draw((2, 16, 6, 6), torch.float64))
    finally:
        handle.remove()
    assert seen.count("BatchNorm2d") == 4
    assert any("global module hooks" in message for message in said())


def test_mixed_dtypes_are_stock_pytorchs_affair(backend):
    stock_block, fast_block = pair(make_block(), backend)
    fast_block.fast_strict = False
    for block in (stock_block, fast_block):
        with pytest.raises(RuntimeError, match=r"expected|should be the same"):
            block(torch.ones(2, 16, 6, 6))


def test_strict_raises_at_the_call(backend):
    _, fast_block = pair(make_block(), backend)
    hook(fast_block)
    with pytest.raises(FusionError, match="bn2 has hooks"):
        fast_block(draw((2, 16, 6, 6), torch.float64))


def test_a_second_reason_is_said_too(backend, said):
    _, fast_block = pair(make_block(), backend)
    fast_block.fast_strict = False
    x = draw((2, 16, 6, 6), torch.float64)
    hook(fast_block)
    fast_block(x)
    pre_hook(fast_block)
    fast_block(x)
    assert len([message for message in said() if "runs its stock forward" in message]) == 2
    assert len(_log.said()) == 2


def test_removed_hook_restores_the_fused_path(backend):
    _, fast_block = pair(make_block(), backend)
    fast_block.fast_strict = False
    handle = fast_block.bn2.register_forward_hook(lambda module, args, y: y)
    assert fast_block.why_stock() is not None
    handle.remove()
    assert fast_block.why_stock() is None


def test_hooks_on_the_block_itself_fire_once(backend):
    _, fast_block = pair(make_block(), backend)
    seen = []
    fast_block.register_forward_hook(lambda module, args, y: seen.append(1))
    with count_fused_calls() as calls:
        fast_block(draw((2, 16, 6, 6), torch.float64))
    assert seen == [1]
    assert calls() == 4


def test_pruned_weights_are_followed(backend):
    """torch.nn.utils.prune puts a hook on the conv: the mask must be applied."""
    from torch.nn.utils import prune

    stock_block, fast_block = make_block(), copy.deepcopy(make_block())
    resnet_fast.optimize(fast_block, backend=backend)
    for block in (stock_block, fast_block):
        prune.l1_unstructured(block.conv2, "weight", amount=0.5)
    x = draw((2, 16, 6, 6), torch.float64)
    torch.testing.assert_close(fast_block.eval()(x), stock_block.eval()(x))

"""The tests must bite: each mutant is one plausible mistake, seeded into the arithmetic, and has to be noticed.

`notices` runs the same comparisons as the other files, on the named cases; without a mutant it has to pass.
"""

import contextlib
import importlib

import pytest
import stock
import torch
from cases import BN_CASES, CONV_CASES, bn_case, conv_case
from models import assert_trains_alike, lively, pair
from numerics import assert_all_match
from torchvision.models.resnet import Bottleneck

from resnet_fast import blocks, dispatch, functional

BN = {case.name: case for case in BN_CASES}
CONV = {case.name: case for case in CONV_CASES}
UPDATES = [importlib.import_module(f"resnet_fast.functional.{name}") for name in ("conv_bn_act", "residual_block")]
"""The modules that update running statistics: of single layers, and of whole blocks."""


@pytest.fixture
def reference():
    return dispatch.load("reference")


def compare_bn(training, case="channels_not_multiple_of_block", dtype=torch.float32, nan=False):
    tensors = bn_case(BN[case], dtype, "channels_last")
    keywords = {"training": training, "eps": 1e-3, "act": "relu" if BN[case].relu else None}
    tensors = stock.off_the_kink(stock.bn_act, tensors, **keywords)
    if nan:
        tensors["x"][0, 3, 1, 1] = float("nan")
    ours = stock.run(functional.bn_act, tensors, backend="reference", **keywords)
    theirs = stock.run(stock.bn_act, tensors, **keywords)
    assert_all_match(ours, theirs, stock.run(stock.bn_act, stock.double(tensors), **keywords), dtype)


def compare_conv(training, case, dtype=torch.float32):
    tensors = conv_case(CONV[case], dtype, "nchw")
    keywords = {"training": training, "eps": 1e-3, **CONV[case].geometry}
    tensors = stock.off_the_kink(stock.conv_bn_act, tensors, **keywords)
    ours = stock.run(functional.conv_bn_act, tensors, backend="reference", **keywords)
    theirs = stock.run(stock.conv_bn_act, tensors, **keywords)
    assert_all_match(ours, theirs, stock.run(stock.conv_bn_act, stock.double(tensors), **keywords), dtype)


def compare_block():
    torch.manual_seed(1)
    stock_block, fast_block = pair(lively(Bottleneck(16, 4)).double().train(), "reference")
    generator = torch.Generator().manual_seed(3)
    assert_trains_alike(stock_block, fast_block, [torch.randn(3, 16, 5, 5, dtype=torch.float64, generator=generator)])


def mutate_update(change):
    """change(original, running_mean, running_var, mean, var, count, momentum)"""

    def mutant(patch, reference=None):
        original = UPDATES[0].update_running

        def one(*row):
            original([row])

        for module in UPDATES:
            patch(module, "update_running", lambda rows: [change(one, *row) for row in rows])

    return mutant


biased_running_var = mutate_update(
    lambda update, m, v, mean, var, count, momentum: update(m, v, mean, var * ((count - 1) / count), count, momentum)
)
swapped_momentum = mutate_update(lambda update, *call: update(*call[:-1], 1 - call[-1]))
no_running_update = mutate_update(lambda update, *call: None)


def dropped_eps(patch, reference):
    original = reference._scale
    patch(reference, "_scale", lambda weight, var, eps, dtype: original(weight, var, 0.0, dtype))


def eps_outside_the_root(patch, reference):
    original = reference._scale
    patch(reference, "_scale", lambda weight, var, eps, dtype: original(weight, (var.sqrt() + eps) ** 2, 0.0, dtype))


def mutate_forward(change):
    def mutant(patch, reference):
        original = reference.bn_act
        patch(reference, "bn_act", lambda *call: original(*change(*call)))

    return mutant


def mutate_grads(change):
    def mutant(patch, reference):
        original = reference.bn_act_backward
        patch(reference, "bn_act_backward", lambda *call: change(call, original(*call)))

    return mutant


def positive_mask(call, grads):
    """`y > 0` instead of `!(y <= 0)`: the same but for NaN."""
    dx, dweight, dbias, dresidual = grads
    stopped = call[1].isnan() if dresidual.numel() == 0 else call[2].isnan()
    return (
        dx.masked_fill(stopped, 0.0),
        dweight,
        dbias,
        dresidual.masked_fill(stopped, 0.0) if dresidual.numel() else dresidual,
    )


def tail_channels(call, grads):
    """What a missing tail mask does: the last channel of 65 is left behind."""
    dx = grads[0].clone()
    dx[:, -1] = 0
    return (dx, *grads[1:])


def no_projection(call, grads):
    return (grads[0] * (1 + 1e-4), *grads[1:])


def geometry(change):
    def mutant(patch, reference):
        original = reference._conv
        patch(reference, "_conv", lambda *call: original(*change(*call)))

    return mutant


def swapped_strides(x, w, b, stride, padding, dilation, groups):
    return x, w, b, stride[::-1], padding, dilation, groups


MUTANTS = {  # name -> (mutant, what must notice it)
    "biased_running_var": (biased_running_var, lambda: compare_bn(True)),
    "swapped_momentum": (swapped_momentum, lambda: compare_bn(True)),
    "no_running_update": (no_running_update, lambda: compare_bn(True)),
    "dropped_eps": (dropped_eps, lambda: compare_bn(False)),
    "eps_outside_the_root": (eps_outside_the_root, lambda: compare_bn(True)),
    "dropped_residual": (
        mutate_forward(lambda x, w, b, m, v, r, eps, relu: (x, w, b, m, v, None, eps, relu)),
        lambda: compare_bn(False),
    ),
    "dropped_relu": (
        mutate_forward(lambda x, w, b, m, v, r, eps, relu: (x, w, b, m, v, r, eps, False)),
        lambda: compare_bn(False),
    ),
    "dropped_bias": (
        mutate_forward(lambda x, w, b, m, v, r, eps, relu: (x, w, None, m, v, r, eps, relu)),
        lambda: compare_bn(False),
    ),
    "dropped_weight": (
        mutate_forward(lambda x, w, b, m, v, r, eps, relu: (x, None, b, m, v, r, eps, relu)),
        lambda: compare_bn(True),
    ),
    "dropped_residual_gradient": (
        mutate_grads(lambda call, grads: (*grads[:3], torch.zeros_like(grads[3]))),
        lambda: compare_bn(True),
    ),
    "unmasked_residual_gradient": (mutate_grads(lambda call, grads: (*grads[:3], call[0])), lambda: compare_bn(True)),
    "dweight_without_rstd": (
        mutate_grads(lambda call, grads: (grads[0], grads[1] * 1.001, *grads[2:])),
        lambda: compare_bn(True),
    ),
    "dx_off_by_one_in_ten_thousand": (mutate_grads(no_projection), lambda: compare_bn(True)),
    "dx_off_in_bfloat16": (
        mutate_grads(lambda call, grads: (grads[0] * 1.03, *grads[1:])),
        lambda: compare_bn(True, dtype=torch.bfloat16),
    ),
    "positive_mask": (mutate_grads(positive_mask), lambda: compare_bn(False, nan=True)),
    "missing_tail": (mutate_grads(tail_channels), lambda: compare_bn(True)),
    "missing_tail_in_bfloat16": (mutate_grads(tail_channels), lambda: compare_bn(True, dtype=torch.bfloat16)),
    "swapped_strides": (geometry(swapped_strides), lambda: compare_conv(True, "rows_unlike_columns")),
    "swapped_padding": (
        geometry(lambda x, w, b, s, p, d, g: (x, w, b, s, p[::-1], d, g)),
        lambda: compare_conv(True, "rows_unlike_columns"),
    ),
    "swapped_dilation": (
        geometry(lambda x, w, b, s, p, d, g: (x, w, b, s, p, d[::-1], g)),
        lambda: compare_conv(True, "rows_unlike_columns"),
    ),
    "dropped_dilation": (
        geometry(lambda x, w, b, s, p, d, g: (x, w, b, s, [1, 1], [1, 1], g)),
        lambda: compare_conv(True, "dilated"),
    ),
    "dropped_conv_bias": (
        geometry(lambda x, w, b, s, p, d, g: (x, w, None, s, p, d, g)),
        lambda: compare_conv(True, "conv_bias_no_affine"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(name, reference, monkeypatch):
    mutant, notices = MUTANTS[name]
    notices()
    mutant(monkeypatch.setattr, reference)
    torch.manual_seed(0)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        notices()


def forget_identity(patch):
    original = blocks.residual_block
    patch(blocks, "residual_block", lambda x, main, shortcut, **keywords: original(
        x, main, torch.zeros_like(x), **keywords))  # fmt: skip


def forget_counter(patch):
    patch(blocks, "count_batch", lambda batch_norms: None)


def mutate_layers(**fields):
    def mutant(patch):
        original = blocks.conv_bn
        patch(blocks, "conv_bn", lambda conv, bn: original(conv, bn)._replace(**fields))

    return mutant


BLOCK_MUTANTS = {
    "identity": forget_identity,
    "counter": forget_counter,
    "momentum": mutate_layers(momentum=0.11),
    "eps": mutate_layers(eps=0.0),
    "biased_running_var": biased_running_var,
    "swapped_momentum": swapped_momentum,
    "no_running_update": no_running_update,
}


@pytest.mark.parametrize("name", BLOCK_MUTANTS)
def test_every_block_mutant_is_noticed(name, monkeypatch):
    compare_block()
    BLOCK_MUTANTS[name](monkeypatch.setattr)
    with pytest.raises(AssertionError):
        compare_block()


def test_memory_format_is_compared():
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(AssertionError, match="memory format"):
        assert_all_match({"y": x}, {"y": x.to(memory_format=torch.channels_last)}, {"y": x.double()})


@pytest.mark.parametrize("change", [
    pytest.param(lambda y: y.double(), id="dtype"),
    pytest.param(lambda y: y[:1], id="shape"),
    pytest.param(lambda y: y * 1.0001, id="all_elements_slightly"),
    pytest.param(lambda y: y.index_fill(0, torch.tensor([1]), float("nan")), id="nan"),
    pytest.param(lambda y: y.index_fill(0, torch.tensor([1]), float("inf")), id="inf"),
    pytest.param(lambda y: torch.cat([y[:-1], y[-1:] + 0.01]), id="one_element"),
])  # fmt: skip
def test_the_comparison_notices(change):
    exact = torch.randn(5000, dtype=torch.float64)
    stock_result = exact.float()
    assert_all_match({"y": stock_result}, {"y": stock_result}, {"y": exact})
    with pytest.raises(AssertionError):
        assert_all_match({"y": change(stock_result)}, {"y": stock_result}, {"y": exact})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_pass_only_where_pytorch_has_the_same(value):
    exact = torch.randn(100, dtype=torch.float64)
    exact[7] = value
    with contextlib.suppress(AssertionError):
        assert_all_match({"y": exact.float()}, {"y": exact.float().nan_to_num()}, {"y": exact.nan_to_num()})
        raise RuntimeError("a value that PyTorch does not have went through")
    assert_all_match({"y": exact.float()}, {"y": exact.float()}, {"y": exact})
    other = exact.clone()
    other[7] = float("inf") if value != float("inf") else float("nan")
    with pytest.raises(AssertionError):
        assert_all_match({"y": other.float()}, {"y": exact.float()}, {"y": exact})

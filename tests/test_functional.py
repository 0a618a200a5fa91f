"""The functional layer beside torch.nn: running statistics, autocast, aliasing, what is accepted."""

import math

import pytest
import stock
import torch
from cases import bn_tensors, draw
from numerics import assert_all_match
from torch import nn
from torch.nn import functional as F

from resnet_fast import BackendUnavailable, functional

SMALL = (2, 5, 2, 1)  # four values a channel: biased and unbiased variance differ by a third


def module_pair(channels=5, *, dtype=torch.float32, **settings):
    """Two BatchNorm2d alike, with statistics that are not trivial."""
    modules = [nn.BatchNorm2d(channels, **settings).to(dtype) for _ in range(2)]
    for module in modules:
        torch.manual_seed(3)
        if module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if module.affine:
            nn.init.uniform_(module.weight, -0.5, 1.5)
            nn.init.normal_(module.bias)
    return modules


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_running_statistics_are_batch_norms(momentum, steps, backend):
    running = bn_tensors(5, torch.float64, affine=False)
    ours, theirs = ({name: tensor.clone() for name, tensor in running.items()} for _ in range(2))
    for _ in range(steps):
        x = draw(SMALL, torch.float64)
        functional.bn_act(x, **ours, training=True, momentum=momentum, backend=backend)
        F.batch_norm(x, **theirs, training=True, momentum=momentum)
    for name in running:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)
        assert momentum == 0.0 or not torch.equal(ours[name], running[name])


@pytest.mark.parametrize("buffers", [torch.bfloat16, torch.float32], ids=["bfloat16_buffers", "float32_buffers"])
def test_bfloat16_with_either_kind_of_buffers(buffers, backend):
    tensors = {"x": draw((4, 6, 5, 5), torch.bfloat16), **bn_tensors(6, buffers)}
    tensors["dy"] = draw((4, 6, 5, 5), torch.bfloat16)
    keywords = {"training": True, "momentum": 0.3, "act": None}
    ours = stock.run(functional.bn_act, tensors, backend=backend, **keywords)
    theirs = stock.run(stock.bn_act, tensors, **keywords)
    exact = stock.run(stock.bn_act, stock.double(tensors), **keywords)
    assert_all_match(ours, theirs, exact, torch.bfloat16, stock.terms(stock.bn_act, tensors, **keywords))
    assert ours["running_mean"].dtype == buffers


def test_training_without_running_statistics(backend):
    x = draw((3, 5, 4, 4), torch.float64)
    y = functional.bn_act(x, None, None, training=True, backend=backend)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True).relu(), rtol=1e-12, atol=1e-12)


def test_statistics_are_not_touched_in_eval(backend):
    tensors = bn_tensors(5, torch.float32)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    functional.bn_act(draw((3, 5, 4, 4), torch.float32), **tensors, backend=backend)
    for name in before:
        assert torch.equal(tensors[name], before[name])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast_gives_the_convolutions_dtype(training, backend):
    x, weight = draw((2, 8, 6, 6), torch.float32), draw((8, 8, 3, 3), torch.float32, scale=0.1)
    tensors = {"x": x, "conv_weight": weight, **bn_tensors(8, torch.float32)}
    tensors |= {"residual": draw((2, 8, 6, 6), torch.bfloat16), "dy": draw((2, 8, 6, 6), torch.bfloat16)}
    keywords = {"training": training, "padding": 1}
    tensors = stock.off_the_kink(stock.conv_bn_act, tensors, **keywords)
    with torch.autocast("cpu", torch.bfloat16):
        ours = stock.run(functional.conv_bn_act, tensors, backend=backend, **keywords)
        theirs = stock.run(stock.conv_bn_act, tensors, **keywords)
    exact = stock.run(stock.conv_bn_act, stock.double(tensors), **keywords)
    assert ours["y"].dtype == torch.bfloat16
    assert ours["dconv_weight"].dtype == torch.float32
    assert_all_match(ours, theirs, exact, torch.bfloat16, stock.terms(stock.conv_bn_act, tensors, **keywords))


def test_autocast_leaves_float64_alone(backend):
    x, weight = draw((2, 4, 5, 5), torch.float64), draw((4, 4, 3, 3), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.conv_bn_act(x, weight, **bn_tensors(4, torch.float64), backend=backend)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_residual_may_alias_x(training, backend):
    """x reached by both paths: its gradient is the sum of the two."""
    x = draw((2, 6, 5, 5), torch.float64, "channels_last").requires_grad_()
    tensors = bn_tensors(6, torch.float64)
    running = {name: tensors.pop(name) for name in stock.STATISTICS}
    dy = draw((2, 6, 5, 5), torch.float64)
    grads = []
    for function, extra in ((functional.bn_act, {"backend": backend}), (stock.bn_act, {})):
        copies = {name: tensor.clone() for name, tensor in running.items()}
        y = function(x, **copies, **tensors, residual=x, training=training, **extra)
        grads += torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_inputs_are_never_written(training, backend):
    x, weight = draw((2, 6, 7, 7), torch.float32, "channels_last"), draw((6, 6, 3, 3), torch.float32)
    tensors = bn_tensors(6, torch.float32)
    residual = draw((2, 6, 7, 7), torch.float32)
    parameters = {
        "x": x,
        "conv_weight": weight,
        "residual": residual,
        "weight": tensors["weight"],
        "bias": tensors["bias"],
    }
    for tensor in parameters.values():
        tensor.requires_grad_()
    versions = {name: (tensor._version, tensor.detach().clone()) for name, tensor in parameters.items()}
    y = functional.conv_bn_act(**parameters, **{n: tensors[n] for n in stock.STATISTICS}, padding=1, training=training,
                               backend=backend)  # fmt: skip
    assert y.untyped_storage().data_ptr() != residual.untyped_storage().data_ptr()
    dy = draw(y.shape, torch.float32)
    before = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, before)
    for name, (version, values) in versions.items():
        assert parameters[name]._version == version, name
        assert torch.equal(parameters[name].detach(), values), name


def test_requires_grad_only_where_asked(backend):
    x = draw((2, 6, 5, 5), torch.float32)
    tensors = bn_tensors(6, torch.float32)
    assert not functional.bn_act(x, **tensors, training=True, backend=backend).requires_grad
    tensors["bias"].requires_grad_()
    y = functional.bn_act(x, **tensors, training=True, backend=backend)
    (dbias,) = torch.autograd.grad(y.sum(), tensors["bias"])
    torch.testing.assert_close(dbias, (y > 0).sum((0, 2, 3)).float())


def test_integers_and_pairs_mean_the_same(backend):
    x, weight = draw((2, 4, 9, 9), torch.float32), draw((4, 4, 3, 3), torch.float32)
    tensors = bn_tensors(4, torch.float32)
    one = functional.conv_bn_act(x, weight, **tensors, stride=2, padding=1, dilation=2, backend=backend)
    pairs = {"stride": (2, 2), "padding": [1, 1], "dilation": torch.Size((2, 2))}
    assert torch.equal(one, functional.conv_bn_act(x, weight, **tensors, **pairs, backend=backend))


def _good():
    return {"x": draw((2, 4, 5, 5), torch.float32), "conv_weight": draw((6, 4, 3, 3), torch.float32),
            **bn_tensors(6, torch.float32)}  # fmt: skip


BAD_CALLS = [  # what is changed in a good call; the error; a word that the message must contain
    pytest.param({"x": torch.ones(4, 5, 5)}, ValueError, "x must be 4-D", id="rank"),
    pytest.param({"x": [1.0]}, TypeError, "x must be a torch.Tensor, not list", id="not_a_tensor"),
    pytest.param({"x": torch.ones(2, 4, 5, 5, dtype=torch.int32)}, TypeError, "x is torch.int32", id="integer"),
    pytest.param({"x": torch.ones(2, 4, 5, 5).to_sparse()}, TypeError, "x has layout", id="sparse"),
    pytest.param({"x": torch.ones(2, 3, 5, 5)}, ValueError, "x has 3 channels", id="channels"),
    pytest.param({"x": torch.ones(2, 4, 5, 5, dtype=torch.float64)}, TypeError, "conv_weight is", id="mixed_dtypes"),
    pytest.param({"x": torch.ones(2, 4, 2, 2)}, ValueError, "too small", id="input_below_kernel"),
    pytest.param(
        {"conv_weight": torch.ones(6, 4, 3, 3, device="meta")}, ValueError, "conv_weight is on meta", id="device"
    ),
    pytest.param({"weight": torch.ones(6, device="meta")}, ValueError, "weight is on meta", id="bn_device"),
    pytest.param({"weight": torch.ones(5)}, ValueError, "weight must have shape (6,)", id="weight_length"),
    pytest.param({"bias": torch.ones(6, 1)}, ValueError, "bias must have shape (6,)", id="bias_rank"),
    pytest.param({"bias": torch.ones(6, dtype=torch.float16)}, TypeError, "bias is torch.float16", id="bias_dtype"),
    pytest.param({"running_var": None}, ValueError, "given together", id="half_the_statistics"),
    pytest.param(
        {"running_mean": None, "running_var": None}, ValueError, "needed when training=False", id="no_statistics"
    ),
    pytest.param({"residual": torch.ones(2, 6, 5, 5)}, ValueError, "residual must have", id="residual_shape"),
    pytest.param({"residual": 1.0}, TypeError, "residual must be a torch.Tensor", id="residual_type"),
    pytest.param({"conv_bias": torch.ones(4)}, ValueError, "conv_bias must have shape (6,)", id="conv_bias_length"),
    pytest.param({"groups": 3}, ValueError, "groups", id="groups_do_not_fit"),
    pytest.param({"groups": 0}, ValueError, "groups=0", id="no_groups"),
    pytest.param({"stride": (1, 1, 1)}, ValueError, "stride=", id="stride_length"),
    pytest.param({"stride": 0}, ValueError, "stride", id="stride_zero"),
    pytest.param({"padding": -1}, ValueError, "padding", id="padding_negative"),
    pytest.param({"dilation": 0}, ValueError, "dilation", id="dilation_zero"),
    pytest.param({"act": "gelu"}, ValueError, "act='gelu'", id="activation"),
    pytest.param({"backend": "cudnn"}, ValueError, "backend='cudnn' is not a backend", id="unknown_backend"),
]


@pytest.mark.parametrize(("change", "error", "word"), BAD_CALLS)
def test_bad_arguments_are_named(change, error, word):
    with pytest.raises(error) as raised:
        functional.conv_bn_act(**_good() | change)
    assert word in str(raised.value)


REFUSED_BY_PYTORCH_TOO = [
    parameter
    for parameter in BAD_CALLS
    if not parameter.values[0].keys() & {"act", "backend"}  # which it does not have
    and parameter.id not in ("device", "residual_type", "bias_rank")  # it lets meta and CPU meet, and broadcasts
]


@pytest.mark.parametrize(("change", "_error", "_word"), REFUSED_BY_PYTORCH_TOO)
def test_pytorch_rejects_what_we_reject(change, _error, _word):
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        stock.conv_bn_act(**{"groups": 1} | _good() | change).sum().item()


def test_one_value_a_channel_in_training_is_pytorchs_error():
    x = torch.ones(1, 3, 1, 1)
    with pytest.raises(ValueError) as theirs:
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError) as ours:
        functional.bn_act(x, None, None, training=True)
    assert str(ours.value) == str(theirs.value)
    assert functional.bn_act(x, torch.zeros(3), torch.ones(3)).shape == x.shape, "it is no error in eval"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_zero_batch(training, backend):
    x, weight = torch.empty(0, 4, 6, 6, requires_grad=True), torch.randn(5, 4, 3, 3, requires_grad=True)
    running = bn_tensors(5, torch.float32, affine=False)
    before = {name: tensor.clone() for name, tensor in running.items()}
    y = functional.conv_bn_act(x, weight, **running, padding=1, stride=2, training=training, backend=backend)
    assert y.shape == (0, 5, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.count_nonzero() == 0
    for name in before:
        assert torch.equal(running[name], before[name])


def test_a_backend_that_cannot_run_raises_with_its_reason(monkeypatch):
    from resnet_fast import dispatch

    monkeypatch.setattr(dispatch.load("native"), "why_not", lambda *call: "it is switched off in this test")
    with pytest.raises(BackendUnavailable, match=r"switched off in this test.*Usable here: reference"):
        functional.bn_act(torch.ones(2, 3, 4, 4), torch.zeros(3), torch.ones(3), backend="native")


def test_eps_and_momentum_reach_the_arithmetic(backend):
    """A case in which a dropped eps or a swapped momentum cannot hide."""
    x = draw((2, 3, 2, 2), torch.float64, scale=1e-3)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = functional.bn_act(x, mean, var, training=True, momentum=0.25, eps=0.5, act=None, backend=backend)
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean, 0.25 * x.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(var, 0.75 + 0.25 * x.var((0, 2, 3)), rtol=1e-10, atol=1e-12)
    assert math.isclose(var.max().item(), 0.75, abs_tol=1e-4)

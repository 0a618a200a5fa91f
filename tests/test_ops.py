"""The four-part op test, for every op and every backend: numerics, fp64 gradients, opcheck, compile(fullgraph)."""

import pytest
import stock
import torch
from cases import BN_CASES, CONV_CASES, DTYPES, LAYOUTS, bn_case, bn_tensors, conv_case, draw, named
from numerics import assert_all_match
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from resnet_fast import functional, ops

OPS = torch.ops.resnet_fast
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.mark.usefixtures("poison")
@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named(BN_CASES))
def test_bn_act_numerics(case, layout, dtype, training, backend):
    tensors = bn_case(case, dtype, layout)
    keywords = {"training": training, "act": "relu" if case.relu else None, "eps": 1e-3}
    tensors = stock.off_the_kink(stock.bn_act, tensors, **keywords)
    ours = stock.run(functional.bn_act, tensors, backend=backend, **keywords)
    theirs = stock.run(stock.bn_act, tensors, **keywords)
    exact = stock.run(stock.bn_act, stock.double(tensors), **keywords)
    assert_all_match(ours, theirs, exact, dtype, stock.terms(stock.bn_act, tensors, **keywords))


@pytest.mark.usefixtures("poison")
@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named(CONV_CASES))
def test_conv_bn_act_numerics(case, layout, dtype, training, backend):
    tensors = conv_case(case, dtype, layout)
    keywords = {"training": training, "act": "relu" if case.relu else None, "eps": 1e-3, **case.geometry}
    tensors = stock.off_the_kink(stock.conv_bn_act, tensors, **keywords)
    ours = stock.run(functional.conv_bn_act, tensors, backend=backend, **keywords)
    theirs = stock.run(stock.conv_bn_act, tensors, **keywords)
    exact = stock.run(stock.conv_bn_act, stock.double(tensors), **keywords)
    assert_all_match(ours, theirs, exact, dtype, stock.terms(stock.conv_bn_act, tensors, **keywords))


def _bn_inputs(channels: int, dtype: torch.dtype, shape=None):
    """x, residual, weight, bias that require gradients, and mean, var."""
    shape = shape or (2, channels, 3, 2)
    x, residual = (draw(shape, dtype, "channels_last").requires_grad_() for _ in range(2))
    mean, var, weight, bias = bn_tensors(channels, dtype).values()
    return x, residual, weight.requires_grad_(), bias.requires_grad_(), mean, var


def _conv_inputs(dtype: torch.dtype):
    x = draw((2, 4, 4, 3), dtype, "channels_last").requires_grad_()
    conv_weight = draw((6, 2, 3, 3), dtype, scale=0.3).requires_grad_()
    conv_bias = draw((6,), dtype).requires_grad_()
    return x, conv_weight, conv_bias, ([2, 2], [1, 1], [1, 1], 2)


OPCHECKS = [
    pytest.param(torch.float32, True, "relu", id="float32-residual-relu"),
    pytest.param(torch.float32, True, None, id="float32-residual"),
    pytest.param(torch.bfloat16, False, "relu", id="bfloat16-relu"),
]
UTILS = ("test_schema", "test_faketensor")  # for ops without a gradient: nothing written, nothing aliased, honest fakes


# A float64 gradcheck steps by 1e-6; none of these draws lies that near to ReLU's kink.
VARIANTS = pytest.mark.parametrize("act", ["relu", None])
RESIDUAL = pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])


@MODES
@VARIANTS
@RESIDUAL
def test_bn_act_gradcheck(with_residual, act, training, backend):
    x, residual, weight, bias, mean, var = _bn_inputs(3, torch.float64)

    def function(x, residual, weight, bias):
        added = residual if with_residual else None
        keywords = {"residual": added, "training": training, "act": act, "backend": backend}
        return functional.bn_act(x, mean.clone(), var.clone(), weight, bias, **keywords)

    inputs = (x, residual if with_residual else residual.detach(), weight, bias)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@MODES
@VARIANTS
@RESIDUAL
@pytest.mark.parametrize("frozen_affine", [False, True], ids=["affine", "frozen_affine"])
def test_conv_bn_act_gradcheck(frozen_affine, with_residual, act, training, backend):
    x, conv_weight, conv_bias, (stride, padding, dilation, groups) = _conv_inputs(torch.float64)
    _, residual, weight, bias, mean, var = _bn_inputs(6, torch.float64, (2, 6, 2, 2))
    if frozen_affine:  # what FrozenBatchNorm2d has: the single conv_bn_act op runs
        weight, bias = weight.detach(), bias.detach()

    def function(x, conv_weight, conv_bias, residual, weight, bias):
        return functional.conv_bn_act(
            x, conv_weight, mean.clone(), var.clone(), weight, bias, conv_bias=conv_bias,
            residual=residual if with_residual else None, stride=stride, padding=padding, dilation=dilation,
            groups=groups, training=training, act=act, backend=backend,
        )  # fmt: skip

    inputs = (x, conv_weight, conv_bias, residual if with_residual else residual.detach(), weight, bias)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("dtype", "with_residual", "act"), OPCHECKS)
def test_bn_act_opcheck(dtype, with_residual, act, backend):
    x, residual, weight, bias, mean, var = _bn_inputs(8, dtype)
    weight, bias, mean, var = (t.detach().float() for t in (weight, bias, mean, var))
    weight.requires_grad_(), bias.requires_grad_()
    residual, relu = residual if with_residual else None, act == "relu"
    opcheck(OPS.bn_act.default, (x, weight, bias, mean, var, residual, 1e-5, relu, backend))
    opcheck(OPS.bn_act_train.default, (x, weight, bias, residual, 1e-5, relu, backend))
    y = x.detach() if with_residual and relu else None
    for mask in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        for training in (True, False):
            call = (x.detach().clone(), x.detach(), y, weight.detach(), bias.detach(), mean, var, 1e-5, relu, training)
            opcheck(OPS.bn_act_backward.default, (*call, mask, backend), test_utils=UTILS)


@pytest.mark.parametrize(("dtype", "with_residual", "act"), OPCHECKS)
def test_conv_bn_act_opcheck(dtype, with_residual, act, backend):
    x, conv_weight, conv_bias, conv = _conv_inputs(dtype)
    _, residual, weight, bias, mean, var = _bn_inputs(6, dtype, (2, 6, 2, 2))
    weight, bias, mean, var = (t.detach().float() for t in (weight, bias, mean, var))
    weight.requires_grad_(), bias.requires_grad_()
    residual, relu = residual if with_residual else None, act == "relu"
    tail = (residual, *conv, 1e-5, relu, backend)
    opcheck(OPS.conv_bn_act.default, (x, conv_weight, conv_bias, weight, bias, mean, var, *tail))
    opcheck(OPS.conv_bn_act_train.default, (x, conv_weight, conv_bias, weight, bias, *tail))
    conv_out = draw((2, 6, 2, 2), dtype, "channels_last")
    y = conv_out.relu() if with_residual and relu else None
    call = (conv_out.clone(), x.detach(), conv_weight.detach(), conv_out, y, weight.detach(), bias.detach(), mean, var)
    for mask in ([True] * 6, [False, True, False, True, True, False]):
        opcheck(OPS.conv_bn_act_backward.default, (*call, *conv, 1e-5, relu, True, mask, backend), test_utils=UTILS)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["bn_act", "conv_bn_act"])
def test_compile_fullgraph(name, training, backend):
    """One graph, no break, same numbers, same strides, forward and backward."""
    case = {"bn_act": BN_CASES[5], "conv_bn_act": CONV_CASES[6]}[name]
    draw_case = {"bn_act": bn_case, "conv_bn_act": conv_case}[name]
    tensors = draw_case(case, torch.float32, "channels_last")
    keywords = {"training": training, "backend": backend, **getattr(case, "geometry", {})}
    function = getattr(functional, name)
    torch._dynamo.reset()
    compiled = stock.run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, **keywords)
    eager = stock.run(function, tensors, **keywords)
    assert compiled.keys() == eager.keys()
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key])
        assert compiled[key].stride() == eager[key].stride(), key


@pytest.mark.slow
def test_compile_inductor():
    """The same through Inductor itself, on the backend that "auto" takes."""
    tensors = conv_case(CONV_CASES[6], torch.float32, "channels_last")
    keywords = {"training": True, **CONV_CASES[6].geometry}
    torch._dynamo.reset()
    compiled = stock.run(torch.compile(functional.conv_bn_act, fullgraph=True), tensors, **keywords)
    eager = stock.run(functional.conv_bn_act, tensors, **keywords)
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key])


def test_compiled_graph_holds_one_op_per_stage(backend):
    """What torch.compile sees is the stage, not its arithmetic."""
    targets = []

    def keep(graph, _inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    tensors = conv_case(CONV_CASES[2], torch.float32, "nchw")
    tensors.pop("dy")
    torch._dynamo.reset()
    torch.compile(functional.conv_bn_act, fullgraph=True, backend=keep)(**tensors, padding=1, backend=backend)
    assert sum("resnet_fast.conv_bn_act" in target for target in targets) == 1
    assert not any("batch_norm" in target or "relu" in target for target in targets)


def test_every_op_has_one_kernel_and_a_gradient():
    """Thin ops: registered once for all devices, no decomposition that would hide the stage."""
    for name in ops.NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fast::{name}", "CompositeExplicitAutograd")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fast::{name}", "CompositeImplicitAutograd")
        differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fast::{name}", "Autograd")
        assert differentiable == (not name.endswith("backward")), name

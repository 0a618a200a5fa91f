"""conv_bn_shortcut_act, a block's last convolution with its downsample: the four-part op test, and its arguments."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, bn_tensors, draw, parameter_dtype
from numerics import assert_all_match
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from resnet_fast import functional
from resnet_fast.functional import ConvBn

# name: main kernel, its stride, padding, dilation, groups; shortcut stride, input size; affine; ReLU
CASES = {
    "bottleneck_stride2": (1, 1, 0, 1, 1, 2, 14, True, "relu"),
    "basic_stride2": (3, 1, 1, 1, 1, 2, 13, True, "relu"),
    "same_size_no_affine": (1, 1, 0, 1, 1, 1, 7, False, "relu"),
    "dilated_grouped_no_relu": (3, 1, 2, 2, 4, 1, 7, True, None),
}


def stages(name: str, dtype: torch.dtype, layout: str, requires_grad: bool = False):
    """x, its ConvBn, the shortcut's input and its ConvBn, act."""
    kernel, stride, padding, dilation, groups, step, size, affine, act = CASES[name]
    out = (size - 1) // step + 1
    x = draw((2, 8, out, out), dtype, layout)
    shortcut = draw((2, 12, size, size), dtype, layout)
    weights = draw((20, 8 // groups, kernel, kernel), dtype, layout, scale=0.3), draw((20, 12, 1, 1), dtype, scale=0.3)
    norms = [bn_tensors(20, parameter_dtype(dtype), affine) for _ in weights]
    main = ConvBn(
        weights[0], **norms[0], conv_bias=draw((20,), dtype), stride=stride, padding=padding, dilation=dilation,
        groups=groups, eps=1e-3,
    )  # fmt: skip
    branch = ConvBn(weights[1], **norms[1], stride=step, eps=1e-4)
    if requires_grad:
        for tensor in (x, shortcut, main.conv_weight, branch.conv_weight, main.weight, branch.bias):
            if tensor is not None:
                tensor.requires_grad_()
    return x, main, shortcut, branch, act


def eager(x, main, shortcut, branch, act):
    """The same in PyTorch."""

    def stage(x, stage):
        y = torch.nn.functional.conv2d(
            x, stage.conv_weight, stage.conv_bias, stage.stride, stage.padding, stage.dilation, stage.groups
        )
        statistics = (stage.running_mean, stage.running_var, stage.weight, stage.bias)
        return torch.nn.functional.batch_norm(y, *statistics, False, 0.0, stage.eps)

    y = stage(x, main) + stage(shortcut, branch)
    return torch.relu(y) if act else y


def converted(value, convert):
    """`value` with its tensors converted; a ConvBn's as well."""
    if isinstance(value, ConvBn):
        return ConvBn(*(converted(each, convert) for each in value))
    return convert(value) if isinstance(value, torch.Tensor) else value


def double(value):
    """`value` in float64."""
    return converted(value, torch.Tensor.double)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_numerics(name, layout, dtype, backend):
    x, main, shortcut, branch, act = stages(name, dtype, layout)
    with torch.no_grad():
        ours = functional.conv_bn_shortcut_act(x, main, shortcut, branch, act=act, backend=backend)
        theirs = eager(x, main, shortcut, branch, act)
        exact = eager(*(double(each) for each in (x, main, shortcut, branch)), act)
    assert_all_match({"y": ours}, {"y": theirs}, {"y": exact})


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, backend):
    x, main, shortcut, branch, act = stages(name, torch.float64, "channels_last", requires_grad=True)
    leaves = [x, shortcut, main.conv_weight, branch.conv_weight]
    if main.weight is not None:
        leaves += [main.weight, branch.bias]

    def function(x, shortcut, conv_weight, branch_weight, weight=None, bias=None):
        ours = main._replace(conv_weight=conv_weight, weight=weight)
        return functional.conv_bn_shortcut_act(
            x, ours, shortcut, branch._replace(conv_weight=branch_weight, bias=bias), act=act, backend=backend
        )

    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def arguments(x, main, shortcut, branch, act, backend):
    """The op's own arguments."""
    pairs = [[value, value] for value in (main.stride, main.padding, main.dilation)]
    step = [branch.stride, branch.stride]
    branch_arguments = (shortcut, *branch.tensors, step, branch.eps)
    return (x, *main.tensors, *pairs, main.groups, main.eps, *branch_arguments, act == "relu", backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["bottleneck_stride2", "dilated_grouped_no_relu"])
def test_opcheck(name, dtype, backend):
    inputs = stages(name, dtype, "channels_last", requires_grad=True)
    opcheck(torch.ops.resnet_fast.conv_bn_shortcut_act.default, arguments(*inputs, backend))


def test_the_op_itself_is_differentiable_twice(backend):
    *inputs, act = stages("basic_stride2", torch.float64, "channels_last", requires_grad=True)
    x, main, shortcut, branch = inputs
    y = torch.ops.resnet_fast.conv_bn_shortcut_act(*arguments(*inputs, act, backend))
    leaves = [x, shortcut, main.conv_weight, branch.conv_weight, main.weight, branch.bias]
    for actual, expected in zip(_twice(y, leaves), _twice(eager(*inputs, act), leaves), strict=True):
        torch.testing.assert_close(actual, expected)


def _twice(y, leaves):
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
    return [*first, *second]


def test_compile_fullgraph(backend):
    x, main, shortcut, branch, act = stages("bottleneck_stride2", torch.float32, "channels_last")

    def function(x, shortcut):
        return functional.conv_bn_shortcut_act(x, main, shortcut, branch, act=act, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, shortcut), function(x, shortcut))


def test_wrong_arguments_are_named():
    x, main, shortcut, branch, _ = stages("bottleneck_stride2", torch.float32, "nchw")
    with pytest.raises(ValueError, match="branch must be a dense 1x1 convolution without padding"):
        functional.conv_bn_shortcut_act(x, main, shortcut, branch._replace(padding=1))
    with pytest.raises(ValueError, match=r"shortcut's convolution gives .* they must have one shape"):
        functional.conv_bn_shortcut_act(x, main, shortcut, branch._replace(stride=1))
    with pytest.raises(ValueError, match="x has 12 channels"):
        functional.conv_bn_shortcut_act(shortcut, main, shortcut, branch)
    with pytest.raises(ValueError, match="shortcut has 8 channels"):
        functional.conv_bn_shortcut_act(x, main, x, branch)
    with pytest.raises(TypeError, match=r"shortcut is torch\.float64 and x is torch\.float32"):
        functional.conv_bn_shortcut_act(x, main, shortcut.double(), double(branch))
    with pytest.raises(TypeError, match=r"conv_weight is torch\.float64 and x is torch\.float32"):
        functional.conv_bn_shortcut_act(x, double(main), shortcut, branch)

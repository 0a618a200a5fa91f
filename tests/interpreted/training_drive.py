"""One call of a convolution primitive of training: its tensors, PyTorch's result in any dtype, the kernels' from fenced
memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import requires_triton  # noqa: F401
import torch
import torch.nn.functional as F
from cases import bn_tensors, draw
from interpreted.guarded import SIDES, Fence
from interpreted.kernel_cases import three_by_three
from numerics import assert_match, compare
from torch import Tensor

from resnet_fast.backends import triton_conv, triton_launch
from resnet_fast.backends.primitives import Geometry, Norm, Shortcut, reference
from resnet_fast.gpus import KNOWN
from resnet_fast.kernels import selection
from resnet_fast.kernels.configs import GramDgradConfig, PointerConfig, PrologueConfig, TmaConfig, why_not
from resnet_fast.problems import ITEMSIZE, ConvProblem, GramDgradProblem, PrologueProblem
from resnet_fast.shapes import Conv
from resnet_fast.training import PROLOGUE

CONVOLUTIONS = ("conv_bn_act_pointer", "conv_bn_act_tma", "conv_prologue", "gram_dgrad")
EPS = 0.1

POINTER = PointerConfig(64, 64, 64, 4, 2)
BOX = TmaConfig((2, 4, 4), 64, 64, 4, 3)
SMALL = PrologueConfig(64, 64, 64, 1, 4, 2)


@dataclass(frozen=True)
class Case:
    """config: of the plain convolutions; prologue: of those that transform their input. norm: a batch norm is pending
    on x. residual: None, "plain", "norm" or "shortcut"."""

    name: str
    conv: Conv
    config: PointerConfig | TmaConfig = POINTER
    prologue: PrologueConfig = SMALL
    norm: bool = False
    affine: bool = True
    eps: float = EPS
    residual: str | None = None
    shortcut: Conv | None = None
    kernels: tuple[str, ...] = ("conv_bn_act_pointer",)

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.conv)


_PROLOGUE = {"norm": True, "kernels": ("conv_prologue",)}
_TMA = {"config": BOX, "kernels": ("conv_bn_act_tma",)}
CONV_CASES = (
    Case("pointwise_tail_tile", Conv(3, 16, 5, 7, 24)),
    Case("three_by_three", three_by_three(2, 16, 6, 7, 24)),
    Case("five_to_65_channels", three_by_three(2, 5, 7, 6, 65)),
    Case("stride2_three_by_three", three_by_three(2, 16, 11, 9, 16, stride=2)),
    Case("stride2_pointwise", Conv(2, 16, 9, 9, 80, stride=(2, 2))),
    Case("grouped_wide", three_by_three(2, 256, 4, 4, 128, groups=2)),
    Case("tma_three_by_three", three_by_three(3, 64, 7, 7, 64), **_TMA),
    Case("tma_even", three_by_three(4, 64, 8, 8, 64), **_TMA),
    Case("tma_pointwise_72_channels", Conv(3, 64, 5, 6, 72), **_TMA),
    Case("tma_stride2_three_by_three", three_by_three(3, 64, 10, 8, 128, stride=2), **_TMA),
    Case("materialised_three_by_three", three_by_three(2, 16, 6, 7, 24), norm=True),
    Case("prologue", Conv(3, 64, 5, 7, 128), **_PROLOGUE),
    Case("prologue_even", Conv(2, 64, 8, 8, 128), **_PROLOGUE),
    Case("prologue_several_blocks", Conv(2, 128, 6, 7, 192), **_PROLOGUE),
    Case("prologue_splits", Conv(1, 64, 6, 7, 256), **_PROLOGUE, prologue=replace(SMALL, splits=2)),
    Case("prologue_100_outputs", Conv(2, 64, 5, 5, 100), **_PROLOGUE),
    Case("prologue_odd_channels", Conv(2, 65, 5, 5, 100), **_PROLOGUE),
    Case("prologue_eps_0", Conv(2, 72, 5, 5, 64), **_PROLOGUE, affine=False, eps=0.0),
)
JOIN_CASES = (
    Case("no_residual", Conv(2, 16, 5, 7, 24)),
    Case("residual", Conv(2, 16, 5, 7, 24), residual="plain"),
    Case("residual_norm", Conv(2, 16, 9, 7, 80, stride=(2, 2)), residual="norm"),
    Case("tma_residual_norm", Conv(3, 64, 9, 7, 72, stride=(2, 2)), residual="norm", **_TMA),
    Case("shortcut", Conv(2, 16, 5, 7, 24), residual="shortcut", shortcut=Conv(2, 20, 10, 13, 24, stride=(2, 2))),
    Case("prologue_no_residual", Conv(2, 65, 5, 5, 100), **_PROLOGUE),
    Case("prologue_residual", Conv(3, 64, 5, 7, 128), residual="plain", **_PROLOGUE),
    Case("prologue_residual_norm", Conv(3, 64, 5, 7, 128), residual="norm", **_PROLOGUE),
    Case(
        "prologue_shortcut",
        Conv(2, 64, 5, 7, 128),
        norm=True,
        residual="shortcut",
        shortcut=Conv(2, 20, 10, 13, 128, stride=(2, 2)),
        kernels=("conv_bn_act_pointer", "conv_prologue"),
    ),
)
BACKWARD_CASES = (
    Case("pointwise", Conv(2, 24, 5, 7, 16)),
    Case("three_by_three", three_by_three(2, 24, 6, 7, 16)),
    Case("dilated", three_by_three(2, 16, 7, 7, 16, dilation=2)),
    Case("rows_unlike_columns", Conv(2, 6, 9, 8, 10, (2, 3), (1, 1), (1, 0), (1, 2))),
    Case("pending_norm", three_by_three(2, 16, 6, 7, 65), norm=True),
    Case("tma", three_by_three(3, 64, 7, 7, 128), **_TMA),
    Case("stride2", three_by_three(2, 16, 8, 9, 16, stride=2), kernels=()),
    Case("grouped", three_by_three(2, 128, 5, 6, 128, groups=2), kernels=()),
)
_GRAM = {"kernels": ("gram_dgrad",)}
GRAM_CASES = (
    Case("plain_input", Conv(3, 16, 5, 7, 80), **_GRAM),
    Case("pending_norm", Conv(3, 64, 5, 7, 256), norm=True, **_GRAM),
    Case("several_tiles", Conv(2, 136, 5, 5, 200), norm=True, **_GRAM),
    Case("odd_channels_eps_0", Conv(2, 65, 5, 5, 100), norm=True, affine=False, eps=0.0, **_GRAM),
    Case("stride2", Conv(2, 16, 9, 8, 40, stride=(2, 2)), **_GRAM),
)


@contextlib.contextmanager
def kernels_of(case: Case, fence: Fence | None = None) -> Iterator[list[str]]:
    """Inside, the case's configurations are chosen and outputs lie in `fence`; yields the convolutions launched."""
    launched: list[str] = []
    before = selection.choose, triton_conv._blank, triton_conv._blank_sums, triton_launch.launch

    def choose(problem, gpu):
        row = 128 // ITEMSIZE[problem.dtype]
        configs = {
            ConvProblem: case.config,
            PrologueProblem: case.prologue,
            GramDgradProblem: GramDgradConfig(64, 64, 64, 4, 2),
        }
        config = replace(configs[type(problem)], block_in=min(64, row))
        reason = why_not(config, problem, KNOWN["h200"])
        if reason is not None and isinstance(problem, ConvProblem):
            config = PointerConfig(64, 16, 16, 4, 2)
            reason = why_not(config, problem, KNOWN["h200"])
        return selection.Choice(None if reason else config, "test", reason or "")

    def launch(kernel, *args):
        launched.extend([kernel.__name__] if kernel.__name__ in CONVOLUTIONS else [])
        return before[3](kernel, *args)

    selection.choose, triton_launch.launch = choose, launch
    if fence is not None:
        triton_conv._blank = lambda shape, like: fence.blank(shape, like.dtype)
        triton_conv._blank_sums = lambda shape, like: fence._empty(torch.Size(shape).numel(), torch.float32).view(shape)
    try:
        yield launched
    finally:
        selection.choose, triton_conv._blank, triton_conv._blank_sums, triton_launch.launch = before


def norm_of(channels: int, dtype: torch.dtype, affine: bool = True, eps: float = EPS) -> Norm:
    """float32 vectors of values that `dtype` has too."""
    vectors = {name: vector.float() for name, vector in bn_tensors(channels, dtype, affine).items()}
    return Norm(vectors["running_mean"], vectors["running_var"], vectors.get("weight"), vectors.get("bias"), eps)


def weight_of(conv: Conv, dtype: torch.dtype) -> Tensor:
    terms = conv.weight_elements // conv.out_channels
    return draw(conv.weight_shape, dtype, "channels_last", scale=terms**-0.5)


def moved(value, put):
    """`value`, a tensor or what is made of tensors, with `put` of every tensor."""
    if isinstance(value, Tensor):
        return put(value)
    if isinstance(value, Geometry):
        return value
    if isinstance(value, tuple):
        each = (moved(part, put) for part in value)
        return type(value)(*each) if hasattr(value, "_fields") else tuple(each)
    return value


def double(value):
    return moved(value, lambda tensor: tensor.double())


def run(case: Case, function, arguments: tuple, exact: dict[str, Tensor], stock: dict[str, Tensor], terms=None) -> dict:
    """The named outputs of a primitive, judged from both sides of the fence; terms: as `numerics.compare`, by name."""
    found = []
    for side in SIDES:
        fence = Fence(side)
        with kernels_of(case, fence) as launched:
            outputs = function(*moved(arguments, fence.put))
        fence.check()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found.append({name: output for name, output in zip(exact, outputs, strict=True) if output is not None})
        assert tuple(launched) == case.kernels
        for name, output in found[-1].items():
            assert_match(compare(name, output, stock[name], exact[name], terms=(terms or {}).get(name)))
    for name in found[0]:
        assert torch.equal(*(outputs[name].nan_to_num() for outputs in found)), "it matters where in memory tensors lie"
    return found[0]


def check_conv(case: Case, dtype: torch.dtype, x: Tensor | None = None) -> None:
    x = draw(case.conv.x_shape, dtype, "channels_last") if x is None else x
    norm = norm_of(case.conv.in_channels, dtype, case.affine, case.eps) if case.norm else None
    arguments = (x, norm, weight_of(case.conv, dtype), case.geometry, PROLOGUE, True)
    conv_out = eager_conv(eager_activated(x, norm), arguments[2], case.conv)
    var, mean = torch.var_mean(conv_out.float(), (0, 2, 3), correction=0)
    names = ("conv_out", "mean", "var")
    exact = dict(zip(names, reference.conv(*double(arguments)), strict=True))
    stock = dict(zip(names, (conv_out, mean, var), strict=True))
    check_statistics(run(case, triton_conv.conv, arguments, exact, stock, terms_of(exact["mean"], exact["var"])))


def check_statistics(outputs: dict[str, Tensor]) -> None:
    """They are those of the output as it is stored."""
    stock_var, stock_mean = torch.var_mean(outputs["conv_out"].float(), (0, 2, 3), correction=0)
    var, mean = torch.var_mean(outputs["conv_out"].double(), (0, 2, 3), correction=0)
    terms = terms_of(mean, var)
    assert_match(
        [
            compare("mean as stored", outputs["mean"], stock_mean, mean, terms=terms["mean"]),
            compare("var as stored", outputs["var"], stock_var, var, terms=terms["var"]),
        ]
    )


def terms_of(mean: Tensor, var: Tensor) -> dict[str, float]:
    """What is rounded on the way to them: tiles' means, of the values' size, and with those the squares about them."""
    size = (mean.square() + var).mean().sqrt().item()
    return {"mean": size, "var": size * var.mean().sqrt().item()}


def check_join(case: Case, dtype: torch.dtype) -> None:
    conv = case.conv
    x = draw(conv.x_shape, dtype, "channels_last")
    x_norm = norm_of(conv.in_channels, dtype, case.affine, case.eps) if case.norm else None
    norm, residual, residual_norm, shortcut = norm_of(conv.out_channels, dtype), None, None, None
    if case.residual in ("plain", "norm"):
        residual = draw(conv.y_shape, dtype, "channels_last")
        residual_norm = norm_of(conv.out_channels, dtype) if case.residual == "norm" else None
    if case.residual == "shortcut":
        branch_x = draw(case.shortcut.x_shape, dtype, "channels_last")
        weight, branch_norm = weight_of(case.shortcut, dtype), norm_of(conv.out_channels, dtype)
        shortcut = Shortcut(branch_x, weight, Geometry.of(case.shortcut), branch_norm)
    weight = weight_of(conv, dtype)
    arguments = (x, x_norm, weight, case.geometry, norm, residual, residual_norm, shortcut)
    total = eager_norm(eager_conv(eager_activated(x, x_norm), weight, conv), norm)
    if residual is not None:
        total = total + (residual if residual_norm is None else eager_norm(residual, residual_norm))
    if shortcut is not None:
        total = total + eager_norm(eager_conv(shortcut.x, shortcut.conv_weight, case.shortcut), shortcut.norm)
    exact = {"y": reference.conv_join(*double(arguments))}
    run(case, triton_conv.conv_join, arguments, exact, {"y": total.relu()})


def check_backward(case: Case, dtype: torch.dtype, add: bool) -> None:
    conv = case.conv
    x, dy = (draw(shape, dtype, "channels_last") for shape in (conv.x_shape, conv.y_shape))
    norm = norm_of(conv.in_channels, dtype) if case.norm else None
    added = draw(conv.x_shape, dtype, "channels_last") if add else None
    arguments = (dy, x, norm, weight_of(conv, dtype), case.geometry, PROLOGUE, True, True, added)
    names = ("dx", "dweight")
    exact = dict(zip(names, reference.conv_backward(*double(arguments)), strict=True))
    stock_arguments = (dy, eager_activated(x, norm), None, *arguments[3:])
    stock = dict(zip(names, reference.conv_backward(*stock_arguments), strict=True))
    run(case, triton_conv.conv_backward, arguments, exact, stock)


def check_gram_dgrad(case: Case, dtype: torch.dtype, add: bool) -> None:
    conv = case.conv
    channels, out_channels = conv.in_channels, conv.out_channels
    x, dz = (draw(shape, dtype, "channels_last") for shape in (conv.x_shape, conv.y_shape))
    norm = norm_of(channels, dtype, case.affine, case.eps) if case.norm else None
    dz_matrix = draw((out_channels, channels), torch.float32) * out_channels**-0.5
    x_matrix = draw((channels, channels), torch.float32) * channels**-0.5
    mean, constant = (draw((channels,), torch.float32) for _ in range(2))
    added = draw(conv.x_shape, dtype, "channels_last") if add else None
    arguments = (dz, x, norm, case.geometry, dz_matrix, x_matrix, mean, constant, added)
    down, right = conv.stride
    rows = eager_activated(x, norm)[:, :, ::down, ::right].permute(0, 2, 3, 1) - mean.to(dtype)
    image = dz.permute(0, 2, 3, 1) @ dz_matrix.to(dtype) + rows @ x_matrix.to(dtype) + constant.to(dtype)
    stock = torch.zeros_like(x)
    stock[:, :, ::down, ::right] = image.permute(0, 3, 1, 2)
    stock = stock + added if add else stock
    exact = {"dx": reference.gram_dgrad(*double(arguments))}
    run(case, triton_conv.gram_dgrad, arguments, exact, {"dx": stock})


def eager_conv(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def eager_norm(x: Tensor, norm: Norm) -> Tensor:
    vectors = (vector if vector is None else vector.to(x.dtype) for vector in norm[:4])
    return F.batch_norm(x, *vectors, eps=norm.eps or 1e-30)


def eager_activated(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else eager_norm(x, norm).relu()

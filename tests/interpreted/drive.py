"""One case of a kernel: its tensors, PyTorch's result for them in any dtype, and the kernel's from fenced memory."""

import math

import requires_triton  # noqa: F401
import torch
import torch.nn.functional as F
from cases import bn_tensors, draw
from interpreted.guarded import SIDES, Fence
from interpreted.kernel_cases import NORMS, ConvCase, StemCase, TailCase
from numerics import assert_match, compare
from stock import bn_act
from torch import Tensor

from resnet_fast.backends import triton_launch
from resnet_fast.backends.triton_launch import Norm
from resnet_fast.gpus import KNOWN
from resnet_fast.kernels.configs import why_not
from resnet_fast.problems import ConvProblem, StemProblem
from resnet_fast.shapes import Conv

EPS = 0.1
"""Large, so that a kernel without it is seen in bfloat16 too."""

TAIL = ("conv2", "conv3", "downsample", "next_conv")

Tensors = dict[str, Tensor]
Case = ConvCase | StemCase | TailCase


def check(case: Case, dtype: torch.dtype) -> None:
    """Raise AssertionError where the kernel is not as right as PyTorch in `dtype`, or leaves its tensors' memory."""
    reason = refused(case, dtype)
    assert reason is None, f"{case} is never chosen: {reason}"
    check_tensors(case, tensors_of(case, dtype))


def refused(case: Case, dtype: torch.dtype) -> str | None:
    """Why the case's configuration cannot be chosen for its problem; None where it can."""
    config = case.config_for(dtype) if isinstance(case, ConvCase) else case.config
    return why_not(config, case.problem(dtype), KNOWN["h200"])


def check_tensors(case: Case, tensors: Tensors) -> Tensors:
    """`check` for these tensors, whose values may be anything; returns the kernel's outputs."""
    stock, exact = pytorch(case, tensors), pytorch(case, double(tensors))
    results = []
    for side in SIDES:
        fence = Fence(side)
        results.append(kernel(case, tensors, fence))
        fence.check()
        assert_match([compare(name, results[-1][name], stock[name], exact[name]) for name in exact])
    for name in exact:
        assert torch.equal(*(result[name].nan_to_num() for result in results)), "it matters where in memory tensors lie"
    return results[0]


def tensors_of(case: Case, dtype: torch.dtype) -> Tensors:
    """The case's tensors by name: x, those of each convolution, residual, shortcut."""
    tensors = {"x": draw(_first(case).x_shape, dtype, "channels_last")}
    if isinstance(case, TailCase):
        for name, conv in _tail(case).items():
            tensors[f"{name}_weight"] = _weight(conv, dtype)
            tensors[f"{name}_bias"] = draw((conv.out_channels,), dtype).float()
        added = _tail(case).get("downsample")
        tensors["shortcut"] = draw(added.x_shape if added else _tail(case)["conv3"].y_shape, dtype, "channels_last")
        return tensors
    tensors |= _conv_tensors(case, "", case.conv, dtype)
    if isinstance(case, ConvCase) and case.residual:
        tensors["residual"] = draw(case.conv.y_shape, dtype, "channels_last")
    if isinstance(case, ConvCase) and case.shortcut:
        tensors["shortcut"] = draw(case.shortcut.x_shape, dtype, "channels_last")
        tensors |= _conv_tensors(case, "shortcut_", case.shortcut, dtype)
    return tensors


def pytorch(case: Case, tensors: Tensors) -> Tensors:
    """The case's outputs as PyTorch computes them, layer by layer in the tensors' dtype."""
    if isinstance(case, TailCase):
        return _pytorch_tail(case, tensors)
    y = _pytorch_conv(tensors, "", tensors["x"], case.conv)
    if isinstance(case, StemCase):
        return {"y": F.max_pool2d(y.relu(), 3, 2, 1).contiguous(memory_format=torch.channels_last)}
    if case.residual:
        y = y + tensors["residual"]
    if case.shortcut:
        y = y + _pytorch_conv(tensors, "shortcut_", tensors["shortcut"], case.shortcut)
    return {"y": y.relu() if case.relu else y}


def kernel(case: Case, tensors: Tensors, fence: Fence) -> Tensors:
    """The case's outputs as the kernel computes them, from copies of the tensors inside `fence`."""
    dtype, put = tensors["x"].dtype, fence.put
    problem = case.problem(dtype)
    if isinstance(case, TailCase):
        return _tail_kernel(case, tensors, fence)
    y = fence.blank(problem.y_shape if isinstance(case, StemCase) else case.conv.y_shape, dtype)
    if isinstance(case, StemCase):
        weight, norm = put(triton_launch.pack_stem(tensors["conv_weight"])), _norm(tensors, "", fence)
        scratch = (fence.blank(shape, dtype) for shape in (problem.packed_shape, problem.conv.y_shape))
        triton_launch.stem(put(tensors["x"]), weight, y, problem, case.config, norm, *scratch)
        return {"y": y}
    branch = {}
    if case.shortcut:
        packed = triton_launch.pack_conv(tensors["shortcut_conv_weight"], ConvProblem(case.shortcut, problem.dtype))
        norm = _norm(tensors, "shortcut_", fence)
        branch = {"shortcut": put(tensors["shortcut"]), "shortcut_weight": put(packed), "shortcut_norm": norm}
    weight = put(triton_launch.pack_conv(tensors["conv_weight"], problem))
    norm, residual = _norm(tensors, "", fence), put(tensors.get("residual"))
    triton_launch.conv(put(tensors["x"]), weight, y, problem, case.config_for(dtype), norm, residual, **branch)
    return {"y": y}


def check_bn_act(x: Tensor, vectors: Tensors, residual: Tensor | None, relu: bool = True, eps: float = EPS) -> None:
    """`check` of the bn_act kernel; `vectors` are running_mean, running_var, weight, bias, as far as there are any."""
    keywords = {"eps": eps, "act": "relu" if relu else None}
    stock = bn_act(x, **vectors, residual=residual, **keywords)
    wide = None if residual is None else residual.double()
    exact = bn_act(x.double(), **double(vectors), residual=wide, **keywords)
    for side in SIDES:
        fence = Fence(side)
        y = fence.blank(x.shape, x.dtype, torch._prims_common.suggest_memory_format(x))
        norm = Norm(**{name.removeprefix("running_"): fence.put(vector) for name, vector in vectors.items()}, eps=eps)
        triton_launch.bn_act(fence.put(x), y, norm, fence.put(residual), relu)
        fence.check()
        assert_match(compare("y", y, stock, exact))


def check_max_pool(x: Tensor) -> None:
    """The pooling kernel picks what PyTorch's does, NaN included."""
    expected = F.max_pool2d(x, 3, 2, 1)
    for side in SIDES:
        fence = Fence(side)
        y = fence.blank(expected.shape, x.dtype)
        triton_launch.max_pool(fence.put(x), y)
        fence.check()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True, check_stride=False)


def check_pack(x: Tensor, problem: StemProblem, dtype: torch.dtype) -> None:
    """The packed image is the image in `dtype`, zeros around it and in channels it does not have."""
    height, width = problem.packed_shape[2:]
    expected = torch.zeros(problem.packed_shape, dtype=dtype)
    rows, columns = (
        min(size, room - pad)
        for size, room, pad in zip(x.shape[2:], (height, width), problem.conv.padding, strict=True)
    )
    down, right = problem.conv.padding
    expected[:, : x.shape[1], down : down + rows, right : right + columns] = x[:, :, :rows, :columns]
    for side in SIDES:
        fence = Fence(side)
        packed = fence.blank(problem.packed_shape, dtype)
        triton_launch.stem_pack(fence.put(x), packed, problem)
        fence.check()
        assert torch.equal(packed, expected)


def double(tensors: Tensors) -> Tensors:
    """The same values in float64."""
    return {name: tensor.double() for name, tensor in tensors.items()}


def _first(case: Case) -> Conv:
    return case.conv2 if isinstance(case, TailCase) else case.conv


def _weight(conv: Conv, dtype: torch.dtype) -> Tensor:
    return draw(conv.weight_shape, dtype, "channels_last", scale=math.prod(conv.weight_shape[1:]) ** -0.5)


def _conv_tensors(case: ConvCase | StemCase, prefix: str, conv: Conv, dtype: torch.dtype) -> Tensors:
    """A convolution's weight and its norm's vectors: float32, of values that `dtype` has too, in which PyTorch takes a
    convolution's bias."""
    vectors = {name.removeprefix("running_"): tensor for name, tensor in bn_tensors(conv.out_channels, dtype).items()}
    vectors["conv_bias"] = draw((conv.out_channels,), dtype)
    wanted = {prefix + name: vectors[name] for name in NORMS[case.norm]}
    if not getattr(case, "half_vectors", False):
        wanted = {name: vector.float() for name, vector in wanted.items()}
    return {f"{prefix}conv_weight": _weight(conv, dtype)} | wanted


def _norm(tensors: Tensors, prefix: str, fence: Fence) -> Norm:
    vectors = {name: fence.put(tensors.get(prefix + name)) for name in NORMS["everything"]}
    return Norm(**vectors, eps=EPS)


def _pytorch_conv(tensors: Tensors, prefix: str, x: Tensor, conv: Conv) -> Tensor:
    bias = tensors.get(f"{prefix}conv_bias")
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, tensors[f"{prefix}conv_weight"], bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    mean, var, weight, bias = (tensors.get(prefix + name) for name in NORMS["bn"])
    return y if mean is None else F.batch_norm(y, mean, var, weight, bias, eps=EPS)


def _tail(case: TailCase) -> dict[str, Conv]:
    """The convolutions that the case has, by name, in the order in which the launcher takes their weights."""
    problem = case.problem(torch.bfloat16)
    convs = (problem.conv2, problem.conv3, problem.shortcut, problem.next_conv)
    return {name: conv for name, conv in zip(TAIL, convs, strict=True) if conv}


def _pytorch_tail(case: TailCase, tensors: Tensors) -> Tensors:
    convs = _tail(case)

    def conv(name: str, x: Tensor) -> Tensor:
        geometry, bias = convs[name], tensors[f"{name}_bias"].to(x.dtype)
        return F.conv2d(x, tensors[f"{name}_weight"], bias, geometry.stride, geometry.padding, geometry.dilation)

    added = conv("downsample", tensors["shortcut"]) if "downsample" in convs else tensors["shortcut"]
    y = (conv("conv3", conv("conv2", tensors["x"]).relu()) + added).relu()
    return {"y": y, "next_y": conv("next_conv", y).relu()} if "next_conv" in convs else {"y": y}


def _tail_kernel(case: TailCase, tensors: Tensors, fence: Fence) -> Tensors:
    dtype, convs = tensors["x"].dtype, _tail(case)
    problem = case.problem(dtype)
    weights, biases = [], []
    for name, conv in convs.items():
        packed = triton_launch.pack_conv(tensors[f"{name}_weight"], ConvProblem(conv, problem.dtype))
        weights.append(fence.put(packed))
        biases.append(fence.put(tensors[f"{name}_bias"]))
    outputs = {"y": fence.blank(convs["conv3"].y_shape, dtype)}
    if "next_conv" in convs:
        outputs["next_y"] = fence.blank(convs["next_conv"].y_shape, dtype)
    triton_launch.tail(
        fence.put(tensors["x"]),
        tuple(weights),
        tuple(biases),
        outputs["y"],
        outputs.get("next_y"),
        problem,
        case.config,
        fence.put(tensors["shortcut"]),
    )
    return outputs

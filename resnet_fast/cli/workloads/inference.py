"""Workloads of a plan's problems: PyTorch's ops, the library's fused ones and Triton's kernels.

What a Triton candidate writes is allocated once and shared by all candidates, so that `poison` shows what one of them
leaves unwritten.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import library
from ...backends import triton as triton_backend
from ...kernels.configs import Config
from ...problems import ConvProblem, Problem, StemProblem, TailProblem
from ...shapes import Conv
from .workload import Outputs, Run, Source, Workload

_IMAGES_AT_ONCE = 32  # of the float64 reference, so that its workspaces stay small


def of(problem: Problem, device: str) -> Workload:
    """The workload of `problem`, one of a plan, folded, on `device`."""
    return _BUILDERS[type(problem)](problem, Source(problem, device))


def conv_inputs(problem: ConvProblem, source: Source) -> tuple[Outputs, Outputs]:
    """Images, then weights, by their names in `library.conv`."""
    conv, branch = problem.conv, problem.shortcut
    images = {"x": source.image(conv.x_shape)}
    images |= {"residual": source.image(conv.y_shape)} if problem.residual else {}
    images |= {"shortcut": source.image(branch.x_shape)} if branch else {}
    return images, source.conv(conv) | (source.conv(branch, "shortcut_") if branch else {})


def _conv(problem: ConvProblem, source: Source) -> Workload:
    conv, branch = problem.conv, problem.shortcut
    images, weights = conv_inputs(problem, source)
    outputs = {"y": source.empty(conv.y_shape)}

    def stock(x, weight, bias, residual=None, shortcut=None, shortcut_weight=None, shortcut_bias=None) -> Outputs:
        y = _conv2d(x, weight, bias, conv)
        if shortcut is not None:
            y = y + _conv2d(shortcut, shortcut_weight, shortcut_bias, branch)
        if residual is not None:
            y = y + residual
        return {"y": y.relu() if problem.relu else y}

    def triton(config: Config) -> Run:
        launch, tensors = triton_backend.launcher(), images | weights
        branch_tensors = ()
        if branch:
            packed = launch.pack_conv(weights["shortcut_weight"], ConvProblem(branch, problem.dtype))
            branch_tensors = (images["shortcut"], packed, launch.Norm(weights["shortcut_bias"]))
        weight, norm = launch.pack_conv(weights["weight"], problem), launch.Norm(weights["bias"])
        args = (tensors["x"], weight, outputs["y"], problem, config, norm, tensors.get("residual"), *branch_tensors)
        return functools.partial(_launched, outputs, launch.conv, args)

    def by_library(variant: str) -> Run:
        return lambda: {"y": library.conv(problem=problem, variant=variant, **images, **weights)}

    runs = {variant: by_library(variant) for variant in library.variants(images["x"], problem)}
    return _workload(stock, images, weights, triton, runs, outputs)


def _stem(problem: StemProblem, source: Source) -> Workload:
    alone = ConvProblem(problem.conv, problem.dtype)
    images, weights = {"x": source.image(problem.conv.x_shape)}, source.conv(problem.conv)
    outputs = {"y": source.empty(problem.y_shape)}
    scratch = source.empty(problem.packed_shape), source.empty(problem.conv.y_shape)

    def stock(x, weight, bias) -> Outputs:
        return {"y": _pool(_conv2d(x, weight, bias, problem.conv).relu())}

    def triton(config: Config) -> Run:
        launch = triton_backend.launcher()
        weight, norm = launch.pack_stem(weights["weight"]), launch.Norm(weights["bias"])
        args = (images["x"], weight, outputs["y"], problem, config, norm, *scratch)
        return functools.partial(_launched, outputs, launch.stem, args)

    def by_library(variant: str) -> Run:
        return lambda: {"y": library.max_pool(library.conv(problem=alone, variant=variant, **images, **weights))}

    runs = {variant: by_library(variant) for variant in library.variants(images["x"], alone)}
    return _workload(stock, images, weights, triton, runs, outputs)


def _tail(problem: TailProblem, source: Source) -> Workload:
    conv2, conv3, branch, following = problem.conv2, problem.conv3, problem.shortcut, problem.next_conv
    images = {"x": source.image(conv2.x_shape), "shortcut": source.image(branch.x_shape if branch else conv3.y_shape)}
    convs = {"conv2_": conv2, "conv3_": conv3, "shortcut_": branch, "next_": following}
    convs = {prefix: conv for prefix, conv in convs.items() if conv}
    weights = {}
    for prefix, conv in convs.items():
        weights |= source.conv(conv, prefix)
    outputs = {"y": source.empty(conv3.y_shape)}
    outputs |= {"next_y": source.empty(following.y_shape)} if following else {}

    def stock(x, shortcut, **weights) -> Outputs:
        def conv(image: Tensor, prefix: str) -> Tensor:
            return _conv2d(image, weights[f"{prefix}weight"], weights[f"{prefix}bias"], convs[prefix])

        y = conv(conv(x, "conv2_").relu(), "conv3_") + (conv(shortcut, "shortcut_") if branch else shortcut)
        results = {"y": y.relu()}
        return results | ({"next_y": conv(results["y"], "next_").relu()} if following else {})

    def triton(config: Config) -> Run:
        launch = triton_backend.launcher()
        packed = tuple(
            launch.pack_conv(weights[f"{prefix}weight"], ConvProblem(conv, problem.dtype))
            for prefix, conv in convs.items()
        )
        biases = tuple(weights[f"{prefix}bias"] for prefix in convs)
        written = (outputs["y"], outputs.get("next_y"))
        args = (images["x"], packed, biases, *written, problem, config, images["shortcut"])
        return functools.partial(_launched, outputs, launch.tail, args)

    return _workload(stock, images, weights, triton, {}, outputs)


_BUILDERS = {ConvProblem: _conv, StemProblem: _stem, TailProblem: _tail}


def _workload(compute: Callable[..., Outputs], images: Outputs, weights: Outputs, triton, runs, outputs) -> Workload:
    def reference() -> Outputs:
        parts = []
        for start in range(0, len(images["x"]), _IMAGES_AT_ONCE):
            chunk = {name: image[start : start + _IMAGES_AT_ONCE].double() for name, image in images.items()}
            parts.append(compute(**chunk, **{name: weight.double() for name, weight in weights.items()}))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return Workload(reference, lambda: compute(**images, **weights), triton, runs, outputs)


def _launched(outputs: Outputs, launch: Callable, args: tuple) -> Outputs:
    launch(*args)
    return outputs


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor, conv: Conv) -> Tensor:
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1)

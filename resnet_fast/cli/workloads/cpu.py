"""Layers on the CPU by oneDNN and by our kernels, blocks and networks by layer and as programs: for `tune`."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import cpu_network, frozen
from ...amx.network import AmxNetwork
from ...backends import direct, native, units, winograd
from ...backends import reference as reference_backend
from ...backends.primitives import Geometry, reference
from ...backends.primitives import native as primitives
from ...kernels import selection
from ...kernels.configs import Config, DirectConfig
from ...planner import Section
from ...problems import ConvProblem, SectionProblem, TrainingConvProblem, WeightGradientProblem
from ...shapes import BlockShapes, Conv
from ...training import LIBRARY as LIBRARY_STAGE
from ...training import PROLOGUE
from . import inference
from .workload import Outputs, Run, Source, Workload

LIBRARY = "onednn"
DOTS = "dots"


def of(problem: ConvProblem | WeightGradientProblem | TrainingConvProblem | SectionProblem) -> Workload:
    """The workload of a convolution without shortcut, of a training step's and its gradients, or of residual blocks."""
    if isinstance(problem, TrainingConvProblem):
        return _training(problem)
    if isinstance(problem, SectionProblem):
        return _network(problem) if problem.folded else _block(problem)
    if isinstance(problem, WeightGradientProblem):
        return _weight_gradient(problem)
    if problem.dtype == "bfloat16":
        return _folded_in_program(problem) if problem.folded else _live_in_program(problem)
    return _folded(problem) if problem.folded else _live(problem)


def _folded(problem: ConvProblem) -> Workload:
    """Of a frozen network. oneDNN's run is right once: it adds into the residual."""
    images, weights = inference.conv_inputs(problem, Source(problem, "cpu"))
    layer, x, residual = _layer(problem, weights), images["x"], images.get("residual")
    written = None if residual is None else residual.clone()

    @torch.no_grad()
    def onednn() -> Outputs:
        return {"y": layer.by_onednn(x, written, overwrite_residual=True)}

    def ours(config: Config) -> Run:
        return torch.no_grad()(lambda: {"y": layer.by_kernel(config, x, residual)})

    return replace(inference.of(problem, "cpu"), kernel=ours, library={LIBRARY: onednn})


@torch.no_grad()
def _folded_in_program(problem: ConvProblem) -> Workload:
    """Of a frozen network that is a program: a block of this convolution twice, which x is added to."""
    source = Source(problem, "cpu")
    x, block = source.image(problem.conv.x_shape), frozen.FrozenBlock([], None, None)
    block.convs.extend(_layer(problem, source.conv(problem.conv)) for _ in range(2))
    section = Section(None, False, [("block", block)])

    def chosen(config: Config | None) -> Run:
        network = AmxNetwork(section, head=False)
        with selection.forced(problem, selection.Choice(config, "forced")):
            network(x)
        return lambda: {"y": network(x)}

    exact, stock = _by_pytorch(section, x)
    return Workload(exact, stock, chosen, {DOTS: chosen(None)}, {}, repeats=2)


def _live_in_program(problem: ConvProblem) -> Workload:
    """The same of a block whose weights may change."""
    block = SectionProblem((BlockShapes((problem.conv, problem.conv)),), problem.dtype, folded=False)
    exact, stock, by_extension = _of_block(block)

    def by(*layers: int) -> Run:
        return lambda: by_extension(units.unit(torch.bfloat16), layers)

    return Workload(exact, stock, _always(by(0, 1)), {DOTS: by()}, {}, repeats=2)


def _live(problem: ConvProblem) -> Workload:
    """Of a network whose weight may change, so that it is transformed or packed in every run."""
    conv, source = problem.conv, Source(problem, "cpu")
    x, weight = source.image(conv.x_shape), source.conv(conv)["weight"]
    geometry = Geometry.of(conv)

    def onednn(x: Tensor, weight: Tensor) -> Outputs:
        return {"y": reference.conv(x, None, weight, geometry, LIBRARY_STAGE, statistics=False)[0]}

    def ours(config: Config) -> Run:
        if isinstance(config, DirectConfig):
            return lambda: {"y": direct.conv(x, weight, geometry)}
        return lambda: {"y": winograd.conv(x, None, weight, False)[0]}

    return _workload(onednn, (x, weight), ours)


def _weight_gradient(problem: WeightGradientProblem) -> Workload:
    conv, source = problem.conv, Source(problem, "cpu")
    dy, x, weight = source.image(conv.y_shape), source.image(conv.x_shape).relu_(), source.conv(conv)["weight"]
    geometry = Geometry.of(conv)

    def onednn(dy: Tensor, x: Tensor, weight: Tensor) -> Outputs:
        wants = {"wants_dx": False, "wants_dweight": True}
        return {"dweight": reference.conv_backward(dy, x, None, weight, geometry, LIBRARY_STAGE, **wants)[1]}

    ours = _always(lambda: {"dweight": winograd.weight_gradient(dy, x, None, weight)})
    return _workload(onednn, (dy, x, weight), ours)


def _training(problem: TrainingConvProblem) -> Workload:
    """By AMX, and by what is taken without."""
    conv, source = problem.conv, Source(problem, "cpu")
    dy, x, weight = source.image(conv.y_shape), source.image(conv.x_shape).relu_(), source.conv(conv)["weight"]
    geometry, wants = Geometry.of(conv), [problem.of == name for name in ("data_gradient", "weight_gradient")]

    def by(backend: ModuleType, dtype: torch.dtype = x.dtype) -> Outputs:
        operands = x.to(dtype), None, weight.to(dtype), geometry, PROLOGUE
        if problem.of == "output":
            names, found = ("y", "mean", "var"), backend.conv(*operands, True)
        else:
            names, found = ("dx", "dweight"), backend.conv_backward(dy.to(dtype), *operands, *wants)
        return {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}

    def chosen(config: Config | None) -> Run:
        def run() -> Outputs:
            with selection.forced(problem, selection.Choice(config, "forced")):
                return by(primitives)

        return run

    exact, stock = (functools.partial(by, reference, dtype) for dtype in (torch.float64, x.dtype))
    return Workload(exact, stock, chosen, {LIBRARY: chosen(None)}, {})


@torch.no_grad()
def _network(problem: SectionProblem) -> Workload:
    """A frozen network, up to its last block."""
    source = Source(problem, "cpu")
    x = source.image(problem.convs[0].x_shape)

    def frozen_conv(conv: Conv, relu: bool) -> frozen.FrozenConv2d:
        return _layer(ConvProblem(conv, problem.dtype, relu=relu), source.conv(conv))

    stem = None if problem.stem is None else ("stem", frozen_conv(problem.stem, relu=True))
    blocks = []
    for shapes in problem.blocks:
        downsample = None if shapes.downsample is None else frozen_conv(shapes.downsample, relu=False)
        block = frozen.FrozenBlock([], downsample, None)
        block.convs.extend(frozen_conv(conv, relu=True) for conv in shapes.convs)
        blocks.append((f"block{len(blocks)}", block))
    section = Section(stem, stem is not None, blocks)
    by_layer, program = cpu_network.build(section, x.shape), AmxNetwork(section, head=False)

    def library() -> Outputs:
        return {"y": by_layer.run(x)}

    ours = _always(lambda: {"y": program(x)})

    return Workload(*_by_pytorch(section, x), ours, {LIBRARY: library}, {})


def _by_pytorch(section: Section, x: Tensor) -> tuple[Run, Run]:
    """A section in float64 and in its dtype, layer by layer."""

    @torch.no_grad()
    def run(dtype: torch.dtype) -> Outputs:
        return {"y": _layer_by_layer(section, x.to(dtype))}

    return functools.partial(run, torch.float64), functools.partial(run, x.dtype)


def _layer_by_layer(section: Section, x: Tensor) -> Tensor:
    def conv(module: frozen.FrozenConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = module.weight.to(x.dtype), module.bias.to(x.dtype)
        y = F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)
        y = y if residual is None else y + residual
        return y.relu() if module.relu else y

    if section.stem is not None:
        x = F.max_pool2d(conv(section.stem[1], x), 3, 2, 1)
    for _, block in section.blocks:
        *early, last = block.convs
        shortcut = x if block.downsample is None else conv(block.downsample, x)
        for module in early:
            x = conv(module, x)
        x = conv(last, x, shortcut)
    return x


def _block(problem: SectionProblem) -> Workload:
    """A block in eval mode whose weights and batch norms may change."""
    exact, stock, by_extension = _of_block(problem)
    unit = units.unit(getattr(torch, problem.dtype))
    return Workload(exact, stock, _always(lambda: by_extension(unit)), {LIBRARY: lambda: by_extension("")}, {})


def _of_block(problem: SectionProblem) -> tuple[Run, Run, Callable[..., Outputs]]:
    """By PyTorch in float64 and in its dtype; by the extension with this unit, and these layers by Winograd, if not the
    chosen ones."""
    source, [shapes] = Source(problem, "cpu"), problem.blocks
    convs, branch = shapes.all_convs, shapes.downsample is not None
    x = source.image(problem.convs[0].x_shape)
    weights = [source.conv(conv)["weight"] for conv in convs]
    vectors = [source.vectors(4, conv.out_channels) for conv in convs]
    columns = [[each[number] for each in vectors] for number in range(3)]  # weights, biases, means
    variances = [0.5 + each[3].abs() for each in vectors]
    geometry = [n for c in convs for n in (*c.stride, *c.padding, *c.dilation, c.groups)]
    rest = (geometry, [1e-5] * len(convs), branch)

    def by_pytorch(dtype: torch.dtype) -> Outputs:
        lists = [[each.to(dtype) for each in column] for column in (weights, *columns, variances)]
        return {"y": reference_backend.residual_block(x.to(dtype), None, *lists, *rest)}

    def by_extension(unit: str, layers: tuple[int, ...] | None = None) -> Outputs:
        layers = winograd.layers(x, weights, geometry, branch) if layers is None else layers
        others = direct.layers(x, weights, geometry, branch)
        return {"y": native.cpu_residual_block(x, None, weights, *columns, variances, *rest, layers, others, unit)}

    return lambda: by_pytorch(torch.float64), lambda: by_pytorch(x.dtype), by_extension


def _workload(onednn: Callable[..., Outputs], tensors: tuple[Tensor, ...], ours: Callable[[Config], Run]) -> Workload:
    def exact() -> Outputs:
        return onednn(*(tensor.double() for tensor in tensors))

    def library() -> Outputs:
        return onednn(*tensors)

    return Workload(exact, library, ours, {LIBRARY: library}, {})


def _always(run: Run) -> Callable[[Config], Run]:
    """There is one configuration."""
    return lambda config: run


def _layer(problem: ConvProblem, weights: Outputs) -> frozen.FrozenConv2d:
    conv = problem.conv
    geometry = (conv.kernel, conv.stride, conv.padding, conv.dilation, conv.groups)
    stock = nn.Conv2d(conv.in_channels, conv.out_channels, *geometry, device="meta")
    stock.weight, stock.bias = (nn.Parameter(weights[name]) for name in ("weight", "bias"))
    return frozen.FrozenConv2d(stock, None, problem.relu, None)

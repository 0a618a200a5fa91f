"""Making plans: `build` turns a `Section` of a frozen network (stem, max-pool, residual blocks) into a `Plan`.

From shapes alone: no GPU, no Triton, and meta tensors will do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from .frozen import FrozenBlock, FrozenConv2d, FrozenMaxPool2d, FrozenStage
from .gpus import Gpu
from .kernels.selection import Choice, choose
from .layers import conv_of
from .plan import Plan, Shape, Step
from .problems import (
    ITEMSIZE,
    AveragePoolProblem,
    ConvProblem,
    PoolProblem,
    Problem,
    StemProblem,
    TailProblem,
    dtype_name,
)
from .shapes import Conv

FUSIONS = ("auto", "conv", "tail")
"""conv: one kernel a convolution, with residual, shortcut and the stem's pooling inside. tail: one kernel for conv2 and
conv3 of a bottleneck, and the next block's conv1, wherever one is valid. auto: a tail where it should be faster."""

DTYPES = tuple(ITEMSIZE)
"""What can be planned; float64 by the library alone."""


@dataclass(frozen=True)
class Section:
    """Consecutive layers of a frozen network; names are those of the modules, for steps and tensors.

    max_pool: 3x3, stride 2, padding 1, behind the stem. classifier: the Linear behind global average pooling; both are
    counted in a plan's totals and are no steps.
    """

    stem: tuple[str, FrozenConv2d] | None
    max_pool: bool
    blocks: Sequence[tuple[str, FrozenBlock]]
    classifier: nn.Linear | None = None

    @classmethod
    def of_resnet(cls, model: nn.Module) -> "Section":
        """All of a frozen ResNet of torchvision or timm.

        Raises:
            ValueError: a layer is not what `freeze` makes of theirs, or has hooks.
        """
        stages = [(name, getattr(model, name)) for name in ("layer1", "layer2", "layer3", "layer4")]
        pool = model.maxpool
        inside = "bn1", getattr(model, "frozen_activation", "relu")  # conv1
        wanted = [("conv1", model.conv1, FrozenConv2d)]
        wanted += [(name, getattr(model, name, None), nn.Identity) for name in inside]
        wanted += [("maxpool", pool, FrozenMaxPool2d), *((name, stage, FrozenStage) for name, stage in stages)]
        for name, module, kind in wanted:
            if (reason := _why_not_module(name, module, kind)) is not None:
                raise ValueError(reason)
        if (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode) != (3, 2, 1, 1, False):
            raise ValueError(f"maxpool is {pool}, not 3x3 with stride 2 and padding 1")
        blocks = [(f"{name}.{index}", block) for name, stage in stages for index, block in enumerate(stage)]
        return cls(("conv1", model.conv1), True, blocks, model.fc if isinstance(model.fc, nn.Linear) else None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.convs()[0][1].weight.dtype

    def convs(self) -> list[tuple[str, nn.Module]]:
        """Name and module of every convolution, in the order in which the frozen model runs them."""
        found = [self.stem] if self.stem else []
        for name, block in self.blocks:
            found += [(f"{name}.conv{number}", conv) for number, conv in enumerate(block.convs, 1)]
            found += [(f"{name}.downsample", block.downsample)] if block.downsample is not None else []
        return found


def why_not_plannable(section: Section) -> str | None:
    """Why fused steps would not compute what `section`'s modules do, as they are now; None where they do."""
    if not section.stem and not section.blocks:
        return "there is no stem and no block"
    reasons = [_why_not_module(name, block, FrozenBlock) for name, block in section.blocks]
    if not any(reasons):
        convs = section.convs()
        reasons = [_why_not_module(name, conv, FrozenConv2d) for name, conv in convs]
    if any(reasons):
        return next(filter(None, reasons))
    for name, block in section.blocks:
        if not all(conv.relu for conv in block.convs):
            return f"{name} has a convolution without ReLU"
    dtypes = {conv.weight.dtype: name for name, conv in convs}
    if len(dtypes) > 1:
        return "weights differ in dtype: " + ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
    return None


def _why_not_module(name: str, module: nn.Module, kind: type) -> str | None:
    if type(module) is not kind:
        return f"{name} is {type(module).__name__}, not {kind.__name__}"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own, bound to the instance"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has hooks, which a fused step would skip"
    return None


def build(
    section: Section, input_shape: Sequence[int], dtype: torch.dtype | str, gpu: Gpu, *, fusion: str = "auto"
) -> Plan:
    """The plan of `section` for an input of `input_shape` (N, C, H, W), of the weights' `dtype`, on `gpu`.

    Where no kernel is valid (float64, a GPU before sm_80, a layer none can express) a step is the library's, and its
    choice says why.

    Raises:
        ValueError: `section` is not plannable, `input_shape` does not fit it, or `dtype` or `fusion` is not one of
            those there are.
    """
    dtype = dtype_name(dtype)
    if fusion not in FUSIONS:
        raise ValueError(f"fusion={fusion!r} is not one of {', '.join(FUSIONS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be planned; it must be one of {', '.join(DTYPES)}")
    if len(input_shape) != 4 or any(size < 1 for size in input_shape):
        raise ValueError(f"input_shape={tuple(input_shape)} must be four positive sizes, (N, C, H, W)")
    reason = why_not_plannable(section)
    if reason is not None:
        raise ValueError(f"cannot be planned: {reason}")
    name, conv = section.convs()[0]
    if conv.weight.dtype != getattr(torch, dtype):
        raise ValueError(f"dtype={dtype!r}, but {name} has weights of {conv.weight.dtype}")
    return _Builder(section, dtype, gpu, fusion).plan(tuple(input_shape))


@dataclass(frozen=True)
class _Layer:
    """A convolution in its place: x and y are tensor names."""

    name: str
    module: FrozenConv2d
    conv: Conv
    x: str
    y: str

    def plain(self, strided: bool) -> bool:
        """A dense 1x1, as what is computed inside another convolution's kernel must be; a shortcut may be strided."""
        return self.conv.pointwise and self.conv.groups == 1 and (strided or self.conv.stride == (1, 1))


@dataclass(frozen=True)
class _Block:
    """x -> layers -> + x or shortcut."""

    x: str
    layers: tuple[_Layer, ...]
    shortcut: _Layer | None

    @property
    def fusable_shortcut(self) -> bool:
        """Whether the shortcut can be computed inside the last convolution's kernel; so can none at all."""
        return self.shortcut is None or (self.shortcut.plain(strided=True) and not self.shortcut.module.relu)


class _Builder:
    """Walks a section twice: for the shapes, then for the steps."""

    def __init__(self, section: Section, dtype: str, gpu: Gpu, fusion: str) -> None:
        self.section, self.dtype, self.gpu, self.fusion = section, dtype, gpu, fusion
        self.tensors: dict[str, Shape] = {}
        self.steps: list[Step] = []
        self.written: set[str] = set()

    def plan(self, input_shape: Shape) -> Plan:
        """The plan for an input of this shape."""
        self.tensors["input"] = input_shape
        x = self.stem("input")
        blocks = []
        for name, module in self.section.blocks:
            blocks.append(self.shapes(name, module, x))
            x = name
        for block, following in pairwise([*blocks, None]):
            self.block(block, following)
        used = {name for step in self.steps for name in (*step.reads, *step.writes, *step.scratch)}
        tensors = {name: shape for name, shape in self.tensors.items() if name in used}
        head = self.head(self.tensors[x])
        return Plan(self.gpu, self.dtype, self.fusion, tuple(self.steps), head, tensors, "input", x)

    def stem(self, x: str) -> str:
        """Emit the stem's steps; returns the name of what they write."""
        if self.section.stem is None:
            return self.pool(x) if self.section.max_pool else x
        name, module = self.section.stem
        layer = self.layer(name, module, x, name)
        if self.section.max_pool and module.relu:
            problem = StemProblem(layer.conv, self.dtype)
            choice = self.choose(problem)
            if choice.config is not None:
                scratch = (f"{name} packed", name)
                self.tensors |= {scratch[0]: problem.packed_shape, "maxpool": problem.y_shape}
                self.emit(Step(f"{name}+maxpool", problem, choice, (module,), (x,), ("maxpool",), scratch))
                return "maxpool"
        self.emit(self.conv(layer))
        return self.pool(name) if self.section.max_pool else name

    def pool(self, x: str) -> str:
        """Emit a max-pool by itself."""
        problem = PoolProblem(*self.tensors[x], self.dtype)
        self.tensors["maxpool"] = problem.y_shape
        self.emit(Step("maxpool", problem, _NO_CHOICE, (), (x,), ("maxpool",)))
        return "maxpool"

    def block(self, block: _Block, following: _Block | None) -> None:
        """Emit a block's steps, without a first convolution that the tail before has computed."""
        *early, last = block.layers
        self.emit(*(self.conv(layer) for layer in early[:-1] if layer.y not in self.written))
        rest = [self.conv(layer) for layer in early[-1:] if layer.y not in self.written] + self.closing(block, last)
        self.emit(*(self.tail(block, following, rest) or rest))

    def closing(self, block: _Block, last: _Layer) -> list[Step]:
        """The steps of a block's last convolution, with the residual or the shortcut."""
        shortcut = block.shortcut
        if shortcut is None:
            return [self.conv(last, residual=block.x)]
        apart = [self.conv(shortcut), self.conv(last, residual=shortcut.y)]
        if not block.fusable_shortcut:
            return apart
        problem = ConvProblem(last.conv, self.dtype, shortcut=shortcut.conv)
        modules, reads = (last.module, shortcut.module), (last.x, block.x)
        joint = Step(f"{last.name}+downsample", problem, self.choose(problem), modules, reads, (last.y,))
        measured_better = joint.tuned and self.seconds([joint]) <= self.seconds(apart)
        return [joint] if joint.choice.config is not None or measured_better else apart

    def tail(self, block: _Block, following: _Block | None, rest: list[Step]) -> list[Step] | None:
        """One step for conv2 and conv3 of a bottleneck, and the next conv1 if it fits; None where `rest` is better."""
        if self.fusion == "conv" or len(block.layers) != 3:
            return None
        if not block.layers[-1].plain(strided=False) or not block.fusable_shortcut:
            return None
        options = [(self.tail_step(block, None), rest)]
        if following and len(following.layers) > 1 and following.layers[0].plain(strided=False):
            first = following.layers[0]
            options.insert(0, (self.tail_step(block, first), [*rest, self.conv(first)]))
        options = [(step, replaced) for step, replaced in options if step.choice.config is not None]
        if self.fusion == "tail":
            return [options[0][0]] if options else None
        gains = [(self.seconds(replaced) - self.seconds([step]), step) for step, replaced in options]
        gain, step = max(gains, key=lambda option: option[0], default=(0.0, None))
        return [step] if gain > 0 else None

    def tail_step(self, block: _Block, following: _Layer | None) -> Step:
        """conv2 and conv3 of `block`, then `following`, the next block's first convolution."""
        _, conv2, conv3 = block.layers
        name, layers, writes = f"{conv2.name}+conv3", [conv2, conv3], [conv3.y]
        problem = TailProblem(conv2.conv, conv3.conv, self.dtype)
        if block.shortcut:
            name, layers = f"{name}+downsample", [*layers, block.shortcut]
            problem = replace(problem, shortcut=block.shortcut.conv)
        if following:
            name, layers, writes = f"{name}, {following.name}", [*layers, following], [*writes, following.y]
            problem = replace(problem, next_conv=following.conv)
        modules = tuple(layer.module for layer in layers)
        return Step(name, problem, self.choose(problem), modules, (conv2.x, block.x), tuple(writes))

    def conv(self, layer: _Layer, residual: str | None = None) -> Step:
        """A convolution with its activation, and its residual where there is one."""
        problem = ConvProblem(layer.conv, self.dtype, residual=residual is not None, relu=layer.module.relu)
        reads = (layer.x,) if residual is None else (layer.x, residual)
        return Step(layer.name, problem, self.choose(problem), (layer.module,), reads, (layer.y,))

    def head(self, shape: Shape) -> tuple[Step, ...]:
        """Average pool and classifier, for the totals."""
        if self.section.classifier is None:
            return ()
        pool = AveragePoolProblem(*shape, self.dtype)
        linear = Conv(shape[0], shape[1], 1, 1, self.section.classifier.out_features)
        return (
            Step("avgpool", pool, _NO_CHOICE, (), (), ()),
            Step("fc", ConvProblem(linear, self.dtype, relu=False), _NO_CHOICE, (), (), ()),
        )

    def shapes(self, name: str, module: FrozenBlock, x: str) -> _Block:
        """A block's layers on `x`; its output is called `name`."""
        *early, last = ((f"{name}.conv{number}", conv) for number, conv in enumerate(module.convs, 1))
        layers, inside = [], x
        for conv_name, conv in early:
            layers.append(self.layer(conv_name, conv, inside, conv_name))
            inside = conv_name
        layers.append(self.layer(*last, inside, name))
        shortcut = None
        if module.downsample is not None:
            shortcut = self.layer(f"{name}.downsample", module.downsample, x, f"{name}.downsample")
        added = shortcut.y if shortcut else x
        if self.tensors[added] != self.tensors[name]:
            raise ValueError(f"{name} adds {self.tensors[added]} ({added}) to {self.tensors[name]}")
        return _Block(x, tuple(layers), shortcut)

    def layer(self, name: str, module: FrozenConv2d, x: str, y: str) -> _Layer:
        conv = conv_of(module, self.tensors[x])
        wanted = module.weight.shape[1] * module.groups
        if conv.in_channels != wanted:
            raise ValueError(f"{name} takes {wanted} channels; its input {x} has {conv.in_channels}")
        if min(conv.out_height, conv.out_width) < 1:
            raise ValueError(f"{name} does not fit into its input's {conv.height}x{conv.width} pixels")
        self.tensors[y] = conv.y_shape
        return _Layer(name, module, conv, x, y)

    def choose(self, problem: Problem) -> Choice:
        return choose(problem, self.gpu)

    def seconds(self, steps: list[Step]) -> float:
        return sum(step.predicted_seconds(self.gpu) for step in steps)

    def emit(self, *steps: Step) -> None:
        for step in steps:
            self.steps.append(step)
            self.written.update(step.writes)


_NO_CHOICE = Choice(None, "predicted", "there is nothing to choose from")

"""What each step of a frozen network takes on the CPU: the one place that knows how it is executed there.

Steps are timed while the whole network runs, so their inputs are where the step before left them: in cache, or not.
"""

import re
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..amx.network import AmxNetwork
from ..backends import units
from ..frozen import FrozenConv2d
from ..kernels import winograd
from ..layers import conv_of
from ..twin import float32_twin


@dataclass(frozen=True)
class LayerTiming:
    """One step. name: as torchvision names the layers. kernel: what computes it. seconds: the median. flops: those of
    real pixels, since a good kernel skips padding; of Winograd's products. bytes: every tensor once, of the input what
    is read."""

    name: str
    kernel: str
    seconds: float
    flops: int
    bytes: int


def computed_by(frozen: nn.Module, images: Tensor) -> nn.Module:
    """The module that computes a frozen ResNet on `images` (N, 3, H, W): itself, or its float32 twin."""
    return float32_twin(frozen, images, frozen.conv1.weight.dtype) or frozen


@torch.inference_mode()
def layer_timings(frozen: nn.Module, images: Tensor, repeats: int = 10) -> list[LayerTiming]:
    """Every step of a frozen ResNet on `images` (N, 3, H, W), on the CPU, in the order they run."""
    network = computed_by(frozen, images)
    images = images.to(network.conv1.weight.dtype)
    if (amx := network.program_of(images)) is not None:
        return _amx_timings(network, amx, images, repeats)
    as_one = network.network_of(images)
    steps = _watched(network, images, repeats)
    if as_one is None:
        return [step.timing() for step in steps]
    runs = [as_one.timed_run(images) for _ in range(2 + repeats)][2:]
    timings, done = [], 0
    for number, (layers, _) in enumerate(runs[0]):
        seconds = statistics.median(run[number][1] for run in runs)
        timings.append(_in_one(steps[done : done + layers], seconds))
        done += layers
    return timings + [step.timing() for step in steps[done:]]


def _watched(network: nn.Module, images: Tensor, repeats: int) -> list["_Step"]:
    """Every layer's step, one by one: hooks end calls for several."""
    steps: list[_Step] = []
    watched = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (FrozenConv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear))
    }
    handles = []
    try:
        for name, module in watched.items():
            step = _Step(name, module, steps)
            handles += [module.register_forward_pre_hook(step.begin), module.register_forward_hook(step.end)]
        for _ in range(2 + repeats):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return steps


def _in_one(steps: list["_Step"], seconds: float) -> LayerTiming:
    """Of steps that are one: what lies between two of them is neither written nor read."""
    each = [step.timing() for step in steps]
    between = sum(2 * step.output_bytes for step in steps[:-1])
    return LayerTiming(
        "+".join(timing.name for timing in each),
        " + ".join([each[0].kernel, *("max-pool" for _ in each[1:])]),
        seconds,
        sum(timing.flops for timing in each),
        sum(timing.bytes for timing in each) - between,
    )


def _amx_timings(network: nn.Module, amx: AmxNetwork, images: Tensor, repeats: int) -> list[LayerTiming]:
    """Of a network that is a program: by its program, and by the clock what PyTorch does behind it."""
    runs = [amx.timings(images) for _ in range(2 + repeats)][2:]
    unit = units.unit_name()
    timings = []
    for number, step in enumerate(runs[0]):
        kernel = winograd.NAME_OF_DOTS if step.winograd else unit
        seconds = statistics.median(run[number].seconds for run in runs)
        timings.append(LayerTiming(step.name, kernel, seconds, step.flops, step.bytes))
    if not amx.head:
        features, seconds = amx(images), []
        for _ in range(repeats):
            start = time.perf_counter()
            y = network.behind(features)
            seconds.append(time.perf_counter() - start)
        flops = 2 * len(y) * network.fc.weight.numel()
        moved = features.nbytes + network.fc.weight.nbytes + y.nbytes
        timings.append(LayerTiming("avgpool, fc", "PyTorch", statistics.median(seconds), flops, moved))
    return timings


class _Step:
    """Watches one module."""

    def __init__(self, name: str, module: nn.Module, order: list["_Step"]) -> None:
        self.name, self.module, self.order = name, module, order
        self.seconds: list[float] = []
        self.flops = self.bytes = self.output_bytes = 0
        self.residual = False

    def begin(self, module: nn.Module, inputs: tuple) -> None:
        self.started = time.perf_counter()

    def end(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) == 1:
            self.order.append(self)
            self._count(inputs, output)

    def timing(self) -> LayerTiming:
        name = re.sub(r"convs\.(\d)", lambda found: f"conv{int(found[1]) + 1}", self.name)
        return LayerTiming(name, self._kernel(), statistics.median(self.seconds[2:]), self.flops, self.bytes)

    def _count(self, inputs: tuple, output: Tensor) -> None:
        x, module, self.output_bytes = inputs[0], self.module, output.nbytes
        tensors = [output.nbytes, *(parameter.nbytes for parameter in (*module.parameters(), *module.buffers()))]
        if isinstance(module, FrozenConv2d):
            conv = conv_of(module, x.shape)
            self.residual = len(inputs) > 1 and inputs[1] is not None
            self.flops = winograd.flops(conv) if module.kernel == winograd.NAME else conv.real_flops
            self.bytes = sum(tensors) + conv.x_elements * x.itemsize + self.residual * output.nbytes
        else:
            self.flops = 2 * x.numel() * output.shape[-1] if isinstance(module, nn.Linear) else 0
            self.bytes = sum(tensors) + x.nbytes

    def _kernel(self) -> str:
        if not isinstance(self.module, FrozenConv2d):
            return f"PyTorch {type(self.module).__name__.removeprefix('Frozen')}"
        parts = [self.module.kernel]
        parts += ["residual"] * self.residual + ["ReLU"] * self.module.relu
        return " + ".join(parts)

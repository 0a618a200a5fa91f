"""Frozen modules that run as one: a whole torchvision ResNet, or one stage of another model's backbone.

On a GPU the layers are planned per input shape, the kernels compiled and, for a ResNet, the whole forward is captured
in a CUDA graph. On a CPU with AMX, or for bfloat16 with AVX-512's, they are a program (`amx`), on others one call for
all layers (`cpu_network`), in float32 where that is faster (`twin.py`). Where nothing can be, or a hook watches, the
layers run one by one as `frozen.py` has them, and the reason is logged once.
"""

import logging
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from . import _log, cpu_network, dispatch, gpus
from .amx.network import AmxNetwork
from .backends.units import why_no_unit
from .capture import CapturedCall
from .context import is_followed
from .dispatch import BackendUnavailable
from .engine import Engine, fitted
from .frozen import Frozen, FrozenConv2d, FrozenStage, as_input
from .plan import Plan
from .planner import Section, build
from .report import BlockReport
from .twin import float32_twin

SHAPES_KEPT = 4
"""Input shapes that a module keeps for: on a GPU an arena and a graph, on a CPU oneDNN's packed weights, as large as
the model's. The one unused longest goes first."""


_building = threading.Lock()
_NOT_COPIED = (
    "_engines_by_shape",
    "_planned_children",
    "_hooks_inside",
    "_float32_twin",
    "_amx",
    "_cpu_networks",
    "_known_weights",
    "_weights_inside",
    "_told_shape",
)


class _Planned(Frozen):
    """What both share. `backend`, `fusion` and `cuda_graph` are `freeze`'s arguments."""

    backend: str = "auto"
    fusion: str = "auto"
    cuda_graph: bool = True

    def why_not_planned(self, x: Tensor) -> str | None:
        """Why x would go through the layers one by one; None where it goes through a plan."""
        asked = dispatch.requested(self.backend)
        if asked not in ("auto", "triton"):
            return f"backend={asked!r} was asked for"
        if self._hooked():
            return "hooks are registered, which a plan would skip"
        reason = dispatch.why_not("triton", "conv_bn_act", x.device.type, self._weight_dtype())
        if reason is None and asked == "auto":
            reason = dispatch.why_not_auto("triton", "conv_bn_act", x.device.type, self._weight_dtype())
        return reason

    def _engine(self, x: Tensor) -> Engine | None:
        """The engine for x's shape, built when it is first seen; None, with the reason said, where there is none."""
        reason = self.why_not_planned(x)
        if reason is None:
            with _building:  # threads that come at once wait for one plan
                engine, reason = self._kept(x)
            if engine is not None:
                return engine
        if dispatch.requested(self.backend) == "triton":
            raise BackendUnavailable(f"backend='triton' cannot run this frozen {type(self).__name__}: {reason}")
        if x.is_cuda:
            _log.once(f"freeze: layers run one by one: {reason}", logging.INFO)
        return None

    def amx_network(self, x: Tensor) -> AmxNetwork | None:
        """The network that computes this module on a CPU by bfloat16 products; None where x goes another way."""
        if x.device.type != "cpu" or x.numel() == 0:
            return None
        if dispatch.requested(self.backend) not in ("auto", "native") or self._hooked():
            return None
        if (reason := why_no_unit(self._weight_dtype())) is not None:
            _log.once(f"freeze: no AMX or AVX-512 program: {reason}", logging.INFO)
            return None
        with _building:
            self._look_at_weights()
            if "_amx" not in self.__dict__:
                self.__dict__["_amx"] = self._make_amx_network()
            return self.__dict__["_amx"]

    def program_of(self, x: Tensor) -> AmxNetwork | None:
        """`amx_network`, where x is to be its input."""
        network = self.amx_network(x)
        return None if network is None or network.why_not(x) is not None else network

    def _make_amx_network(self) -> AmxNetwork | None:
        try:
            return AmxNetwork(self._section(), self._has_head())
        except ValueError as error:
            _log.once(f"freeze: no AMX or AVX-512 program: {error}", logging.INFO)
            return None

    @property
    def _weights(self) -> list[Tensor]:
        if "_weights_inside" not in self.__dict__:
            self.__dict__["_weights_inside"] = [*self.parameters(), *self.buffers()]
        return self.__dict__["_weights_inside"]

    def _by_library(self, x: Tensor) -> Tensor:
        """By oneDNN and the like; in float32 where the CPU is faster so, unless somebody watches the layers."""
        if self._hooked():
            return self._layer_by_layer(x)
        twin = float32_twin(self, x, self._weight_dtype())
        y = self._as_one(x) if twin is None else twin(x.float()).to(x.dtype)
        if x.device.type == "cpu" and self.__dict__.get("_told_shape") != x.shape:
            self.__dict__["_told_shape"] = x.shape
            self._tell_layers(twin or self)
        return y

    def _layer_by_layer(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def _as_one(self, x: Tensor) -> Tensor:
        """All layers in one call, else one by one."""
        network = self.network_of(x)
        if network is None:
            return self._layer_by_layer(x)
        with torch.no_grad():
            return self.behind(network.run(x))

    def network_of(self, x: Tensor) -> object | None:
        """The `resnet_fast._C.FrozenNetwork` for the shape of x (N, C, H, W) and the threads in use, for which oneDNN's
        weights are packed, built when they are first seen; None, with the reason said, where there is none."""
        if x.device.type != "cpu" or x.numel() == 0 or dispatch.requested(self.backend) not in ("auto", "native"):
            return None
        with _building:
            self._look_at_weights()
            networks = self.__dict__.setdefault("_cpu_networks", OrderedDict())
            key = x.shape, torch.get_num_threads()
            if key not in networks:
                try:
                    section = self._section()
                    reason = cpu_network.why_not(section)
                    networks[key] = None if reason else cpu_network.build(section, x.shape)
                except ValueError as error:
                    networks[key], reason = None, str(error)
                if reason is not None:
                    _log.once(f"freeze: layers run one by one: {reason}", logging.INFO)
                if len(networks) > SHAPES_KEPT:
                    networks.popitem(last=False)
            networks.move_to_end(key)
            return networks[key]

    def behind(self, y: Tensor) -> Tensor:
        """What follows the last block: y, its output (N, C, P, Q), or of a whole network its logits."""
        return y

    def _look_at_children(self) -> None:
        """Forget what was made of a layer that was replaced."""
        if self.__dict__.get("_planned_children") != self._two_generations():
            self._forget()

    def _look_at_weights(self) -> None:
        """The same, and what was made of weights that were edited since, as by `load_state_dict` into a part."""
        self._look_at_children()
        weights = _versions(self._weights)
        if self.__dict__.setdefault("_known_weights", weights) != weights:
            self._forget()
            self.__dict__["_known_weights"] = _versions(self._weights)

    def _two_generations(self) -> tuple[nn.Module, ...]:
        """The children and theirs: of a ResNet the stages and their blocks. More would take longer than it helps."""
        children = tuple(child for child in self._modules.values() if child is not None)
        return children + tuple(module for child in children for module in child._modules.values())

    def _tell_layers(self, network: nn.Module) -> None:
        """Say what computed the layers of `network`, this module or its twin, for an input shape first seen."""

    def _kept(self, x: Tensor) -> tuple[Engine | None, str]:
        """The engine of x's shape, or why there is none."""
        self._look_at_children()
        engines, key = self._engines, (tuple(x.shape), x.device)
        if key not in engines:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return (
                    None,
                    "this input shape was not warmed up before the capture (resnet_fast.warmup)",
                )
            try:
                engines[key] = self._build(x)
            except ValueError as error:  # not plannable
                return None, str(error)
            self._tell(engines[key].plan)
            if len(engines) > SHAPES_KEPT:
                engines.popitem(last=False)
        engines.move_to_end(key)
        return engines[key], ""

    def _build(self, x: Tensor) -> Engine:
        gpu = gpus.of_tensor(x)
        return fitted(lambda: build(self._section(), x.shape, x.dtype, gpu, fusion=self.fusion), x)

    def _tell(self, plan: Plan) -> None:
        """Say which layers of a new plan are not Triton's, and why."""
        for step in plan.steps:
            if step.choice.config is None and step.modules:
                _log.once(f"freeze: {step.name} takes the library's path: {step.choice.reason}", logging.INFO)

    def _hooked(self) -> bool:
        hooks = nn.modules.module
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return True
        if "_hooks_inside" not in self.__dict__:
            self._forget()
        return any(self.__dict__["_hooks_inside"])

    @property
    def _engines(self) -> OrderedDict[tuple, Engine]:
        return self.__dict__.setdefault("_engines_by_shape", OrderedDict())

    def _forget(self) -> None:
        """Plan anew: the layers are not what they were."""
        for name in _NOT_COPIED:
            self.__dict__.pop(name, None)
        self.__dict__["_planned_children"] = self._two_generations()
        inside = [module for module in self.modules() if module is not self]
        # The dictionaries, listed once: walking the tree takes longer than launching the network.
        self.__dict__["_hooks_inside"] = [
            h for module in inside for h in (module._forward_hooks, module._forward_pre_hooks)
        ]

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        self._forget()  # .to() and friends change the weights
        return result

    def _load_from_state_dict(self, *args, **keywords) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self._forget()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}


class PlannedStage(_Planned, FrozenStage):
    """A `FrozenStage` outside a torchvision ResNet: its blocks as one plan, each output a new tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, Cin, H, W) of any float dtype -> the last block's output."""
        x = as_input(x, self._weight_dtype())
        if is_followed(x):
            return self._layer_by_layer(x)
        if (network := self.program_of(x)) is not None:
            return network(x)
        engine = self._engine(x)
        return self._by_library(x) if engine is None else engine(x)

    def _section(self) -> Section:
        return Section(None, False, list(self._modules.items()))

    def _has_head(self) -> bool:
        return False

    def _weight_dtype(self) -> torch.dtype:
        return self[0].convs[0].weight.dtype


class PlannedNetwork(_Planned):
    """What whole ResNets share: stem and stages as one plan, then the network's own pool and classifier."""

    frozen_activation: ClassVar[str] = "relu"
    """The child that was the stem's ReLU, and is inside its convolution."""
    frozen_pool: ClassVar[str] = "avgpool"
    """The child that pools what the last stage gives."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) of any float dtype -> logits (N, classes)."""
        x = as_input(x, self._weight_dtype())
        if is_followed(x):
            return self._layer_by_layer(x)
        if (network := self.program_of(x)) is not None:
            y = network(x)
            return y if network.head else self.behind(y)
        engine = self._engine(x)
        if engine is None:
            return self._by_library(x)
        with torch.no_grad():
            return self._replayed(engine, x) if self._captures(x) else self._whole(engine, x)

    def _tell(self, plan: Plan) -> None:
        """Into the report as well: block by block, the kernels of the plan made last."""
        super()._tell(plan)
        report = self.__dict__.get("resnet_fast_report")
        if report is not None:  # else this is a part of the frozen model, which has the report
            blocks = dict(self.named_modules())
            rows = tuple(_row(row, blocks[row.name], plan) if row.name in blocks else row for row in report)
            self.resnet_fast_report = replace(report, blocks=rows)

    def _tell_layers(self, network: nn.Module) -> None:
        """Into the report as well."""
        report = self.__dict__.get("resnet_fast_report")
        if report is not None:
            blocks = dict(network.named_modules())
            self.resnet_fast_report = replace(report, blocks=tuple(_layers_row(row, blocks) for row in report))

    def _whole(self, engine: Engine, x: Tensor) -> Tensor:
        return self.behind(engine(x))

    def _captures(self, x: Tensor) -> bool:
        return self.cuda_graph and x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def _replayed(self, engine: Engine, x: Tensor) -> Tensor:
        if engine.graph is None:
            try:
                engine.graph = CapturedCall(lambda inputs: self._whole(engine, inputs), x)
            except RuntimeError as error:
                _log.once(f"freeze: no CUDA graph, launches go one by one: {error}")
                self.cuda_graph = False
                return self._whole(engine, x)
        return engine.graph(x)

    def _section(self) -> Section:
        return Section.of_resnet(self)

    def _has_head(self) -> bool:
        """Whether average pool and classifier are usual ones, which are then part of the AMX network.

        Not in float32: one sum of 2,048 terms is less exact than PyTorch's, which adds up in parts.
        """
        if self._weight_dtype() != torch.bfloat16 or type(self.fc) is not nn.Linear:
            return False
        head = [*getattr(self, self.frozen_pool).modules(), self.fc]
        return self._pools_usually() and not any("forward" in module.__dict__ for module in head)

    def _pools_usually(self) -> bool:
        """Whether the pool gives (N, C) means."""
        pool = getattr(self, self.frozen_pool)
        return type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))

    def _weight_dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype


class PlannedResNet(PlannedNetwork, ResNet):
    """A frozen torchvision ResNet."""

    def behind(self, y: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(y), 1))


PLANNED: dict[type, type] = {ResNet: PlannedResNet}
"""Network type -> what it is once frozen, as `blocks.FAST`."""


def _versions(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """What changes when a tensor does; one made in inference mode counts no changes."""
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _layers_row(row: BlockReport, blocks: dict[str, nn.Module]) -> BlockReport:
    """`row` with what computed each convolution of its block, and why."""
    if row.name not in blocks:  # removed since
        return row
    inside = blocks[row.name].named_modules()
    convs = [(f"{name} {conv.kernel}", conv.reason) for name, conv in inside if isinstance(conv, FrozenConv2d)]
    kernels = [f"{kernel} ({reason})" if reason else kernel for kernel, reason in convs]
    return replace(row, kernel=", ".join(kernels)) if kernels else row


def _row(row: BlockReport, block: nn.Module, plan: Plan) -> BlockReport:
    """`row` with the kernels that compute `block`'s convolutions, and the reason of each that is the library's."""
    inside = set(block.modules())
    steps = [step for step in plan.steps if inside & set(step.modules)]
    if not steps:
        return row
    library = [step for step in steps if step.choice.config is None]
    return replace(
        row,
        backend="library" if len(library) == len(steps) else "triton",
        kernel=", ".join(dict.fromkeys(step.choice.kernel for step in steps)),
        reason="; ".join(f"{step.name}: {step.choice.reason}" for step in library),
    )

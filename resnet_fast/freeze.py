"""`freeze`: the explicit, inference-only step that folds batch norm and fuses what follows into the convolutions."""

import copy
from dataclasses import replace

import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d

from . import dispatch, libraries
from .amx.network import why_not_packable
from .backends import units, winograd
from .blocks import fast_type, why_not_downsample, why_not_fusable
from .frozen import FrozenBlock, FrozenConv2d, FrozenMaxPool2d, FrozenStage, onednn_runs
from .layers import why_not_module, why_not_stage
from .optimize import restore_classes
from .planned import PLANNED, PlannedNetwork, PlannedStage
from .planner import FUSIONS, Section
from .report import BlockReport, Report

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def freeze(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    fusion: str = "auto",
    cuda_graph: bool = True,
) -> nn.Module:
    """A copy of `model` for inference: batch norm folded, ReLU and residual fused into the convolutions.

    Residual blocks, a ResNet's stem and every Conv2d-BatchNorm(-ReLU) run of a Sequential are frozen; the rest of the
    model is copied as it is. `model` itself, stock or optimized, is not touched. A convolution's output is then batch
    norm's and the ReLU's: who reads between them in a forward of their own reads that.

    Args:
        model: in eval mode (the running statistics are what is folded).
        dtype: of the frozen copy's parameters and output; None keeps them. Inputs of any float dtype are cast.
        backend: "auto" takes the Triton kernels on GPUs that something was measured on (`resnet-fast tune`) and AMX, or
            AVX-512's bfloat16, on CPUs that have it; "triton" takes those kernels or raises when called; "native" takes
            the extension's convolutions (cuDNN's fused ones, or one of its own; on CPUs as "auto") or raises when
            called on a GPU without it; "reference" takes the library's.
        fusion: how far the Triton kernels fuse: "conv", one kernel a convolution; "tail", one for the second half of a
            bottleneck and the next block's first convolution; "auto", whichever is faster layer by layer.
        cuda_graph: on a GPU, capture a ResNet's forward per input shape and replay it.

    Returns:
        The frozen copy, in eval mode, no parameter requiring a gradient, with a `Report` in `resnet_fast_report`.
        It has no training mode, and its state_dict is its own; its weights are constants, packed when first used (for
        Winograd, 36 values for every 9, in bfloat16 16), which only `load_state_dict` and `.to()` may change. Its
        activations are channels_last. It can be moved to another device; what runs there is decided there, when it is
        called.

    Raises:
        TypeError: `model` is not a module or `dtype` not a float dtype. ValueError: `model` is in training mode,
        nothing in it can be frozen, or `backend` or `fusion` is none of those.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}; it must be None or one of {', '.join(map(str, _DTYPES))}")
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first: freezing folds the running statistics")
    dispatch.requested(backend)
    libraries.load()
    if fusion not in FUSIONS:
        raise ValueError(f"fusion={fusion!r} is not one of {', '.join(FUSIONS)}")
    settings = {"backend": backend, "fusion": fusion, "cuda_graph": cuda_graph}
    holder = nn.Module()  # so that a model which is itself a block can be replaced like any other
    holder.model = copy.deepcopy(model)
    restore_classes(holder.model)
    rows: list[BlockReport] = []
    _freeze_children("", holder, dtype, rows)
    _plan_whole(holder, settings)
    frozen = holder.model
    if not any(isinstance(module, FrozenConv2d) for module in frozen.modules()):
        raise ValueError(
            f"{type(model).__name__} has nothing to freeze: no residual block of torchvision or timm and no run of "
            "Conv2d and BatchNorm2d"
        )
    if backend != "auto":
        rows = _bound_to(backend, frozen, rows)
    frozen.requires_grad_(False)
    if dtype is not None:
        frozen.to(dtype)
    frozen.resnet_fast_report = Report(tuple(rows))
    return frozen


def _bound_to(backend: str, frozen: nn.Module, rows: list[BlockReport]) -> list[BlockReport]:
    """Every convolution is told the backend asked for; the report's rows say what it makes of that."""
    modules = dict(frozen.named_modules())
    for module in modules.values():
        if isinstance(module, FrozenConv2d):
            module.backend = backend
    return [replace(row, kernel=_kernel(modules[row.name])) if row.fused else row for row in rows]


def _freeze_children(name: str, parent: nn.Module, dtype: torch.dtype | None, rows: list[BlockReport]) -> None:
    _freeze_stem(parent, dtype)
    _freeze_runs(parent, dtype)
    _freeze_blocks(name, parent, dtype, rows)
    for child_name, child in parent.named_children():
        _freeze_children(f"{name}.{child_name}", child, dtype, rows)


def _freeze_blocks(parent_name: str, parent: nn.Module, dtype: torch.dtype | None, rows: list[BlockReport]) -> None:
    for child_name, block in list(parent.named_children()):
        block_type = fast_type(block)
        if block_type is None:
            continue
        name = f"{parent_name}.{child_name}".removeprefix(".model").removeprefix(".")
        reason = _why_not_frozen(block)
        if reason is not None:
            rows.append(BlockReport(name, type(block).__name__, False, "-", "stock forward", reason))
            continue
        frozen = FrozenBlock(block_type._stages(block), _freeze_downsample(block.downsample, dtype), dtype)
        _move_hooks(block, frozen)
        setattr(parent, child_name, frozen)
        rows.append(BlockReport(name, type(block).__name__, True, "frozen", _kernel(frozen)))
    if type(parent) is nn.Sequential and len(parent) and all(type(child) is FrozenBlock for child in parent):
        parent.__class__ = FrozenStage


def _plan_whole(parent: nn.Module, settings: dict) -> None:
    """Frozen ResNets with the usual stem run as one plan on a GPU, and elsewhere every frozen stage does."""
    for child in parent.children():
        planned = PlannedStage if type(child) is FrozenStage else PLANNED.get(type(child))
        if planned is PlannedStage or (planned is not None and _has_usual_stem(child) and not _goes_its_own_way(child)):
            child.__class__ = planned
            child.__dict__ |= settings
        else:
            _plan_whole(child, settings)


def _goes_its_own_way(module: nn.Module) -> bool:
    """Whether somebody gave this instance another forward than its class has."""
    return not {"forward", "_forward_impl", "forward_features"}.isdisjoint(module.__dict__)


def _has_usual_stem(network: nn.Module) -> bool:
    return type(network.conv1) is FrozenConv2d and type(network.maxpool) is FrozenMaxPool2d


def _freeze_downsample(downsample: nn.Module | None, dtype) -> nn.Module | None:
    if downsample is None or why_not_downsample(downsample) is not None or not _has_statistics(downsample[1]):
        return downsample
    return FrozenConv2d(downsample[0], downsample[1], False, dtype)


def _freeze_stem(module: nn.Module, dtype) -> None:
    """conv1-bn1-ReLU-maxpool of a ResNet, or of the layers that a segmentation or detection model takes from one."""
    if (type(module) is not IntermediateLayerGetter and type(module) not in PLANNED) or _goes_its_own_way(module):
        return
    stem = "conv1", "bn1", PLANNED.get(type(module), PlannedNetwork).frozen_activation
    if set(stem) & set(getattr(module, "return_layers", ())):
        return
    children = dict(module.named_children())
    if set(stem) <= children.keys():
        run = [(module, name) for name in stem]
        if why_not_module("conv1", module.conv1, (nn.Sequential,)) is None and len(module.conv1):  # timm's deep stem
            run[0] = module.conv1, [name for name, _ in module.conv1.named_children()][-1]
        _replace_run(run, dtype)
    if type(children.get("maxpool")) is nn.MaxPool2d:
        module.maxpool.__class__ = FrozenMaxPool2d


def _freeze_runs(module: nn.Module, dtype) -> None:
    """Every Conv2d-BatchNorm2d(-ReLU) run of a Sequential (segmentation heads, for one)."""
    if type(module).forward is not nn.Sequential.forward:
        return
    names = [(module, name) for name in module._modules]  # not named_children(), which has what is used twice once
    for start in range(len(names) - 1):
        _replace_run(names[start : start + 3], dtype)


def _replace_run(run: list[tuple[nn.Module, str]], dtype) -> None:
    """Of a convolution, a batch norm and, perhaps, a ReLU, each by its parent and its name there."""
    conv, bn, *rest = (getattr(parent, name) for parent, name in run)
    if why_not_stage(run[0][1], conv, run[1][1], bn) is not None or not _has_statistics(bn):
        return
    relu = bool(rest) and why_not_module("relu", rest[0], (nn.ReLU,)) is None
    setattr(*run[0], FrozenConv2d(conv, bn, relu, dtype))
    for parent, name in run[1:3] if relu else run[1:2]:
        setattr(parent, name, nn.Identity().eval())


def _why_not_frozen(block: nn.Module) -> str | None:
    reason = why_not_fusable(block)
    if reason is None and _goes_its_own_way(block):
        reason = "it has a forward of its own, bound to the instance"
    training = any(module.training for module in block.modules())  # the shortcut too, which eval() would change
    if reason is None and (training or not all(_has_statistics(bn) for _, bn in fast_type(block)._stages(block))):
        reason = "a batch norm is in training mode or keeps no running statistics, so there is nothing to fold"
    return reason


def _has_statistics(bn: nn.Module) -> bool:
    return type(bn) is FrozenBatchNorm2d or (bn.running_mean is not None and not bn.training)


def _move_hooks(block: nn.Module, frozen: nn.Module) -> None:
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(frozen, kind, getattr(block, kind))
        with_kwargs = f"{kind}_with_kwargs"
        setattr(frozen, with_kwargs, getattr(block, with_kwargs))
    frozen._forward_hooks_always_called = block._forward_hooks_always_called


def _kernel(frozen: FrozenBlock) -> str:
    weight = frozen.convs[0].weight
    if weight.device.type == "cpu" and dispatch.requested(frozen.convs[0].backend) in ("auto", "native"):
        section = Section(None, False, [("block", frozen)])
        if (units.why_no_unit(weight.dtype) or why_not_packable(section)) is None:
            conv = f"{units.unit_name()}{' or Winograd' if winograd.by_dots(weight.dtype) else ''} conv"
            return f"{conv} + residual + ReLU, all layers in one call"
    if weight.device.type == "cpu" and onednn_runs(weight.dtype):
        return "oneDNN or Winograd conv + residual + ReLU, packed weights, all layers in one call"
    if weight.device.type == "cpu":
        return "folded conv2d"
    if dispatch.requested(frozen.convs[0].backend) == "native":
        call = ("conv_epilogue", weight.device.type, weight.dtype)
        reason = dispatch.why_not("native", *call)
        return f"none: {reason}" if reason else dispatch.load("native").kernel(*call)
    call = ("conv_bn_act", weight.device.type, weight.dtype)
    if dispatch.why_not_auto("triton", *call) is None:
        return "Triton kernels or cuDNN, layer by layer (resnet-fast profile)"
    return f"folded conv2d: {dispatch.why_not_fused(*call)}"

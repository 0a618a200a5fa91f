"""One line in, one line out: swap a model's residual blocks for fused ones, and back.

Blocks are swapped by `__class__`: parameters, buffers, state_dict keys, optimizers, hooks, deepcopy and pickle stay as
they are, and `restore` is exact.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from . import _log, dispatch, libraries, training
from .blocks import FAST, FusionError, why_not_fusable
from .report import BlockReport, Report
from .resnet import FAST_NETWORKS
from .stage import FastStage, takes_stage

Model = TypeVar("Model", bound=nn.Module)
_SETTINGS = ("fast_backend", "fast_strict", "fast_train_stage")


def optimize(
    model: Model,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    backend: str = "auto",
    train_stage: int | str = "auto",
    strict: bool = False,
    dry_run: bool = False,
) -> Model:
    """Fuse the residual blocks of `model`, in place, the stems of its ResNets, and Sequentials of blocks.

    Args:
        model: any module that holds BasicBlocks or Bottlenecks of torchvision or timm: ResNet, ResNeXt, Wide ResNet,
            and the segmentation and detection models built on them. Training or eval, any device and dtype.
        filter_fn: called with each block's name and module; False leaves that block alone.
        backend: "auto", or the name of the backend that must run ("triton", "native", "reference").
        train_stage: how much of a block is fused in training, 1 to 4 (`resnet_fast.training` says what they are): 4
            saves least for the backward pass. "auto": RESNET_FAST_TRAIN if it is set, else what is fastest.
        strict: raise where a block cannot be fused, here and at every later call, rather than run it stock.
        dry_run: change nothing, only report.

    Returns:
        `model` itself, with a `Report` in `model.resnet_fast_report` that prints as a table.

    Raises:
        TypeError: `model` is not a module. ValueError: unknown backend or stage, or `strict` and no residual blocks.
        BackendUnavailable: the named backend cannot run on this model. FusionError: `strict`, and a block cannot be
        fused. The model is then as it was before.
    """
    _check_module(model)
    dispatch.requested(backend)
    training.requested(train_stage)
    libraries.load()
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, tuple(FAST))]
    if not blocks:
        _nothing_to_do(model, strict)
    rows, swaps = [], []
    for name, block in blocks:
        reason = _why_not(name, block, filter_fn)
        row = _row(name, block, reason, backend, train_stage)
        if strict and not row.fused and row.reason not in (_FILTERED, _ALREADY):
            raise FusionError(f"optimize(strict=True): block {name!r} cannot be fused: {row.reason}")
        rows.append(row)
        if reason is None:
            swaps.append(block)
    if not dry_run:
        for block in swaps:
            block.__class__ = FAST[type(block)]
            block.fast_backend, block.fast_strict, block.fast_train_stage = backend, strict, train_stage
        for network in [module for module in model.modules() if type(module) in FAST_NETWORKS and filter_fn is None]:
            network.__class__, network.fast_backend = FAST_NETWORKS[type(network)], backend
        for stage in filter(takes_stage, list(model.modules())):
            stage.__class__ = FastStage
    for row in rows:
        if not row.fused:
            _log.once(f"optimize: {row.name} ({row.type}) stays stock: {row.reason}", logging.INFO)
    model.resnet_fast_report = Report(tuple(rows), dry_run)
    return model


def restore(model: Model) -> Model:
    """Undo `optimize`, in place: every fast block gets its stock class back. A model never optimized is left alone.

    Returns:
        `model` itself, without its report. Blocks built as FastBasicBlock or FastBottleneck become stock too.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_module(model)
    if not restore_classes(model):
        _log.once(f"restore: {type(model).__name__} has no fast blocks, so nothing was changed")
    return model


def restore_classes(model: nn.Module) -> bool:
    """`restore` without a word; whether there was anything to do."""
    known = FAST, FAST_NETWORKS, {nn.Sequential: FastStage}
    stock = {fast: stock for fast_types in known for stock, fast in fast_types.items()}
    fast = [module for module in model.modules() if type(module) in stock]
    for module in fast:
        module.__class__ = stock[type(module)]
        for setting in _SETTINGS:
            module.__dict__.pop(setting, None)
    model.__dict__.pop("resnet_fast_report", None)
    return bool(fast)


_FILTERED = "left alone by filter_fn"
_ALREADY = "already fast"


def _why_not(name: str, block: nn.Module, filter_fn) -> str | None:
    if filter_fn is not None and not filter_fn(name, block):
        return _FILTERED
    if type(block) in FAST.values():
        return _ALREADY
    if type(block) not in FAST:
        library = next(stock for stock in FAST if isinstance(block, stock)).__module__.partition(".")[0]
        return f"{type(block).__name__} is a subclass of a {library} block and may compute something else"
    if "forward" in block.__dict__:
        return "its forward is bound to the instance"
    return None


def _row(name: str, block: nn.Module, reason: str | None, backend: str, stage: int | str) -> BlockReport:
    """What will run in this block, judged by its first convolution's device and dtype."""
    if reason in (None, _ALREADY):
        if reason is not None:
            backend, stage = block.fast_backend, block.fast_train_stage
        weight = block.conv1.weight if hasattr(block.conv1, "weight") else next(block.parameters())
        op = "residual_block_train" if block.training else "conv_bn_act"
        call = (op, weight.device.type, weight.dtype)
        runs_fused = dispatch.runs_fused(*call, backend)  # raises for a backend that cannot run, whatever the block
        unfusable = why_not_fusable(block)
        if unfusable is None and runs_fused:
            chosen = dispatch.select(*call, backend)
            kernel = dispatch.load(chosen).kernel(*call) + (
                f", {_stage(chosen, *call[1:], stage)}" if block.training else ""
            )
            return BlockReport(name, type(block).__name__, True, chosen, kernel, reason or "")
        reason = unfusable or f"no fused backend: {dispatch.why_not_fused(*call)}"
    return BlockReport(name, type(block).__name__, False, "-", "stock forward", reason)


def _stage(backend: str, device_type: str, dtype: torch.dtype, stage: int | str) -> str:
    """Which stage of training a block takes, in words."""
    return f"training stage {training.requested(stage) or dispatch.train_stage(backend, device_type, dtype)}"


def _nothing_to_do(model: nn.Module, strict: bool) -> None:
    message = (
        f"optimize: {type(model).__name__} has no BasicBlock or Bottleneck of torchvision or timm, so nothing was "
        "changed (frozen models have none either)"
    )
    if strict:
        raise ValueError(message)
    _log.once(message)


def _check_module(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")

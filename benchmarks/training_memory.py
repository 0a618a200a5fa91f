"""Training's memory: bytes saved for the backward pass, counted, and bytes moved through memory, from the shapes.

    python benchmarks/training_memory.py [--model resnet50] [--batch-size 16] [--compile] [--out FILE]

Saved: a forward pass under bfloat16 autocast, eager, by torch.compile (--compile: minutes) and in every stage, with
`resnet_fast.saved`. Moved: what the primitives of a stage read and write in the Triton backend's kernels, every tensor
once a kernel, in bfloat16, forward and backward, without optimizer; nothing runs for it, so it is a prediction. Weights
count once a step. Stage "auto" is what an H200 would take.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from resnet_fast import optimize, training
from resnet_fast.backends import residual_block
from resnet_fast.backends.primitives import Geometry, reference
from resnet_fast.backends.residual_block import Layer, Wants
from resnet_fast.blocks import fast_type
from resnet_fast.cli import environment, output
from resnet_fast.functional import ConvBn
from resnet_fast.saved import saved_bytes
from resnet_fast.training import EPILOGUE, PROLOGUE


class Traffic:
    """The primitives on tensors without memory: what kernels of the Triton backend would move, added up in `bytes`."""

    def __init__(self) -> None:
        self.bytes = 0

    def __getattr__(self, name: str):
        return functools.partial(self._run, name)

    def _run(self, name: str, *args):
        found = getattr(reference, name)(*args)
        count = getattr(type(self), f"_{name}", type(self)._once)
        self.bytes += count(self, args, found)
        return found

    def _once(self, args: tuple, found) -> int:
        """One kernel: arguments read, results written."""
        results = found if isinstance(found, tuple) else (found,)
        return sum(map(_size, (*args, *results)))

    def _conv(self, args: tuple, found) -> int:
        x, x_norm, conv_weight, geometry, stage, statistics = args
        moved = _read(x, geometry, conv_weight) + _size(conv_weight) + _size(found[0])
        if x_norm is not None and (stage < PROLOGUE or conv_weight.shape[2:] != (1, 1)):
            moved += 2 * _size(x)  # a pass before it
        if statistics and stage < EPILOGUE:
            moved += _size(found[0])
        return moved

    def _gram(self, args: tuple, found) -> int:
        return _read(args[0], args[2])

    def _conv_join(self, args: tuple, found: Tensor) -> int:
        x, _, conv_weight, geometry, _, residual, _, shortcut = (*args, None, None, None)[:8]
        moved = _read(x, geometry, conv_weight) + _size(conv_weight) + _size(residual) + _size(found)
        if shortcut is not None:  # behind a prologue, a kernel of its own
            moved += _read(shortcut.x, shortcut.geometry) + _size(shortcut.conv_weight) + 2 * _size(found)
        return moved

    def _conv_backward(self, args: tuple, found) -> int:
        dconv_out, x, x_norm, conv_weight, geometry, stage, wants_dx, wants_dweight, add = args
        own = stage >= EPILOGUE and geometry.stride == [1, 1] and geometry.groups == 1
        moved = 0
        if wants_dx:
            moved += _size(dconv_out) + _size(conv_weight) + _size(found[0])
            moved += 0 if add is None else _size(add) + (0 if own else 2 * _size(x))
        if wants_dweight:
            moved += _size(dconv_out) + _read(x, geometry, conv_weight) + _size(conv_weight)
            moved += 0 if x_norm is None else 2 * _size(x)  # activated in a pass before it
        return moved

    def _outer(self, args: tuple, found) -> int:
        return _size(args[0]) + _read(args[1], args[3])

    def _gram_dgrad(self, args: tuple, found: Tensor) -> int:
        dz, x, _, geometry, *_, add = args
        skipped = 0 if geometry.stride == [1, 1] else _size(found) + 2 * _read(x, geometry)
        return _size(dz) + _read(x, geometry) + _size(found) + _size(add) + skipped


def _size(value) -> int:
    """Bytes of an image or a weight; vectors and matrices of statistics are nothing beside them."""
    return value.numel() * value.itemsize if isinstance(value, Tensor) and value.dim() == 4 else 0


def _read(x: Tensor, geometry: Geometry, conv_weight: Tensor | None = None) -> int:
    """Of x; a strided 1x1 skips pixels."""
    pointwise = conv_weight is None or conv_weight.shape[2:] == (1, 1)
    down, right = geometry.stride if pointwise else (1, 1)
    return _size(x[:, :, ::down, ::right])


def moved(model: nn.Module, x: Tensor, stage: int | None) -> int:
    """Bytes of a step through the stem and all blocks of a torchvision ResNet on the meta device; None is "auto"."""
    traffic = Traffic()
    stem = _layer(model.conv1, model.bn1, training.LIBRARY)
    y, record = residual_block.stem_forward(traffic, x, stem, "")
    residual_block.stem_backward(traffic, y, x, stem, record, Wants(True, True, True, False), "")
    x = y
    for block in (module for module in model.modules() if fast_type(module)):
        x = _block(traffic, block, x, stage)
    return traffic.bytes


def _block(traffic: Traffic, block: nn.Module, x: Tensor, stage: int | None) -> Tensor:
    pairs = list(fast_type(block)._stages(block))
    downsample = block.downsample is not None
    pairs += [tuple(block.downsample)] if downsample else []
    described = [
        ConvBn(conv.weight, None, None, padding=conv.padding, groups=conv.groups, training=True) for conv, _ in pairs
    ]
    stages = training.stages(stage, described, downsample, "cuda", torch.bfloat16, "triton")
    layers = [_layer(*pair, number) for pair, number in zip(pairs, stages, strict=True)]
    y, records = residual_block.forward(traffic, x, None, layers, downsample, "")
    wants = [Wants(True, True, True, True)] * len(layers)
    residual_block.backward(traffic, y, x, y, layers, records, wants, downsample, not downsample, "")
    return y


def _layer(conv: nn.Conv2d, bn: nn.Module, stage: int) -> Layer:
    geometry = Geometry(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    return Layer(conv.weight, bn.weight, bn.bias, None, None, geometry, bn.eps, True, stage)


def saved(name: str, batch: int, compiled: bool) -> dict[str, float]:
    """Megabytes an image that a forward pass keeps, by contender."""
    torch.manual_seed(0)
    stock = models.get_model(name).to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)

    def count(model) -> float:
        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(images)

        if compiled:
            forward()  # compiled before it is counted
        return saved_bytes(forward, stock.parameters()) / batch / 1e6

    found = {"eager": count(stock)}
    if compiled:
        found["torch.compile"] = count(torch.compile(stock))
    for stage in training.STAGES:
        found[f"stage {stage}"] = count(optimize(copy.deepcopy(stock), train_stage=stage, strict=True))
    return found


def main() -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("-b", "--batch-size", type=output.positive, default=16)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    with torch.device("meta"):
        model = models.get_model(args.model).to(torch.bfloat16)
        images = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
    stages = {f"stage {stage}": stage for stage in training.STAGES} | {"auto": None}
    with torch.no_grad():
        traffic = {name: moved(model, images, stage) / 256 / 1e6 for name, stage in stages.items()}
    kept = saved(args.model, args.batch_size, args.compile)
    for name in (*kept, "auto"):
        print(f"{name}: saved {kept.get(name, float('nan')):.1f}, moved {traffic.get(name, float('nan')):.1f} MB/image")
    if args.out:
        record = {"schema": "resnet_fast.training_memory/1", "environment": environment.record()}
        record |= {"model": args.model, "batch_size": args.batch_size, "dtype": "bfloat16"}
        record |= {"saved_mb_per_image": kept, "moved_mb_per_image_predicted": traffic}
        output.write_json(record, str(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

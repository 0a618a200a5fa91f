"""Do the stages of training learn what stock PyTorch learns? Loss curves on handwritten digits, side by side.

    python benchmarks/convergence.py [--backend native] [--device cpu] [--steps 50] [--dtypes float64 float32 bfloat16]
    python benchmarks/convergence.py --block basic --name cpu-basic      # of 3x3s alone, which CPUs give to Winograd

A small ResNet with the usual stem, of bottlenecks or basic blocks, on scikit-learn's digits enlarged to 32 x 32, or
64 x 64, in float64, in float32 and under bfloat16 autocast. All networks start from the same weights and see the same
batches. In float64 the curves must be the same line. In the others rounding differs, and training amplifies it, so the
yardstick is stock against itself: the same network in NCHW, whose convolutions sum in another order. A stage's curve is
right where it is no further from stock's than `FACTOR` times that, or within `FLOOR`.

Writes convergence-<device>.json and .png into --out, benchmarks/results by default. Exit code 1 if a curve strays.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import optimize, training
from resnet_fast.cli import digits, environment, output

BATCH = 24
SIZES = {"bottleneck": 32, "basic": 64}
"""Of the images, by the network's blocks."""

FACTOR = 3.0
FLOOR = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 2e-2}
"""Relative distance of a step's loss, the mean over all steps, that is always allowed."""


def build(block: str) -> nn.Module:
    """A ResNet of four bottlenecks, 16 to 128 channels inside, or of five basic blocks, 64 to 512. The last two
    bottlenecks dilate instead of striding: of one pixel an image, as they would leave of these, batch statistics make
    chaos, and no two right computations stay together."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if block == "basic":
            model = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=10, zero_init_residual=True)
        else:
            settings = {"zero_init_residual": True, "replace_stride_with_dilation": [False, True, True]}
            model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=16, **settings)
    return model.to(memory_format=torch.channels_last).train()


def batches(steps: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """The same for everybody: (24, 3, size, size) images and labels."""
    data = digits.load()
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        chosen = torch.randint(len(data.train), (BATCH,), generator=generator)
        images = F.interpolate(data.train[chosen], size=size, mode="bilinear").expand(-1, 3, -1, -1)
        found.append((images.contiguous(memory_format=torch.channels_last), data.train_labels[chosen]))
    return found


def losses(model: nn.Module, data: list[tuple[Tensor, Tensor]], device: str, dtype: torch.dtype, layout) -> list[float]:
    """Of every step: SGD with momentum, the learning rate falling to zero."""
    autocast = dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if autocast else dtype
    model = model.to(device, wide, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(data))
    curve = []
    for images, labels in data:
        images, labels = images.to(device, wide, memory_format=layout), labels.to(device)
        with torch.autocast(device, dtype, enabled=autocast):
            loss = F.cross_entropy(model(images).to(wide), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    return curve


def distance(curve: list[float], stock: list[float]) -> float:
    """Mean relative distance of the losses; late ones are near zero, hence the 0.1."""
    return statistics.fmean(abs(a - b) / (b + 0.1) for a, b in zip(curve, stock, strict=True))


def run(
    steps: int, backend: str, device: str, dtype_name: str, stages=training.STAGES, block: str = "bottleneck"
) -> dict:
    """Curves by name, their distances to stock's, and the distance that is allowed."""
    dtype, data, stock = getattr(torch, dtype_name), batches(steps, SIZES[block]), build(block)
    layouts = {"stock": torch.channels_last, "stock, NCHW": torch.contiguous_format}
    curves = {name: losses(copy.deepcopy(stock), data, device, dtype, layout) for name, layout in layouts.items()}
    for stage in stages:
        fast = optimize(copy.deepcopy(stock).to(device), backend=backend, train_stage=stage, strict=True)
        curves[f"stage {stage}"] = losses(fast, data, device, dtype, torch.channels_last)
    distances = {name: distance(curve, curves["stock"]) for name, curve in curves.items() if name != "stock"}
    allowed = FLOOR[dtype_name]
    if dtype_name != "float64":
        allowed = max(allowed, FACTOR * distances["stock, NCHW"])
    strays = [name for name, found in distances.items() if name.startswith("stage") and found > allowed]
    return {"curves": curves, "distances": distances, "allowed": allowed, "strays": strays}


def draw(results: dict[str, dict], block: str, path: Path) -> None:
    """One panel a dtype."""
    from resnet_fast.cli import plots

    figure, axes = plots.pyplot().subplots(1, len(results), figsize=(6 * len(results), 4.2), squeeze=False)
    for axis, (dtype, result) in zip(axes[0], results.items(), strict=True):
        for name, curve in result["curves"].items():
            stock = name.startswith("stock")
            axis.plot(curve, label=name, linewidth=3 if stock else 1, alpha=0.5 if stock else 1.0)
        axis.set(xlabel="step", ylabel="training loss", title=f"digits, {block} ResNet, {dtype}")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="native")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--block", choices=tuple(SIZES), default="bottleneck", help="what the network is made of")
    parser.add_argument("--steps", type=output.positive, default=50)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(FLOOR), default=tuple(FLOOR))
    parser.add_argument("--name", help="of the files (default: the device)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    results = {dtype: run(args.steps, args.backend, args.device, dtype, block=args.block) for dtype in args.dtypes}
    name = f"convergence-{args.name or args.device}"
    record = {"schema": "resnet_fast.convergence/1", "environment": environment.record(), "backend": args.backend}
    record |= {"block": args.block}
    (args.out / f"{name}.json").write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    draw(results, args.block, args.out / f"{name}.png")
    for dtype, result in results.items():
        found = ", ".join(f"{curve} {value:.1e}" for curve, value in result["distances"].items())
        print(f"{dtype}: distance to stock: {found}; allowed {result['allowed']:.1e}")
    return 1 if any(result["strays"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

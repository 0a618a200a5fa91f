"""How fast could a network run on this machine at all? Its FLOPs and bytes, layer by layer, against measured ceilings.

    python benchmarks/limits.py --model resnet50 -b 16 [--json FILE]

The limit of a fused layer (convolution, batch norm, residual and ReLU in one kernel) is max(FLOPs / peak, bytes /
bandwidth): it reads its input, its weight and its residual once and writes its output once. A network's limit is the
sum over its layers. The peak is the best rate seen here, over a few large matrix products and every one of the
network's own convolutions; the bandwidth is a copy of 16 MiB, which is what a layer's activations are to the caches.
FLOPs are those of real pixels: taps that fall on padding are not counted, since a good kernel skips them.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

from resnet_fast.planner import conv_of
from resnet_fast.problems import Conv


@dataclass(frozen=True)
class Layer:
    """One convolution with what is fused behind it, for a batch."""

    name: str
    conv: Conv
    residual: bool

    @property
    def flops(self) -> int:
        """Of taps on pixels: `Conv.flops` counts padding too."""
        conv = self.conv
        macs = math.prod(conv.weight_shape[:2]) * conv.batch * _real_taps(conv, 0) * _real_taps(conv, 1)
        return 2 * macs

    @property
    def elements(self) -> int:
        """Read and written once each: all of the input (`Conv.x_elements` leaves out what a stride skips), weight,
        residual, output."""
        return math.prod(self.conv.x_shape) + self.conv.weight_elements + self.conv.y_elements * (1 + self.residual)

    def seconds(self, flops_per_second: float, bytes_per_second: float, itemsize: int) -> float:
        """The limit of this layer."""
        return max(self.flops / flops_per_second, self.elements * itemsize / bytes_per_second)


def layers(model: str, batch: int, size: int) -> list[Layer]:
    """The convolutions of a torchvision network at (batch, 3, size, size), from shapes alone."""
    found: list[Layer] = []

    def record(name: str):
        def hook(module: nn.Conv2d, inputs, _) -> None:
            # the block's last convolution also reads the residual
            last = name.endswith("conv3") or (name.endswith("conv2") and not hasattr(parents[name], "conv3"))
            found.append(Layer(name, conv_of(module, inputs[0].shape), last))

        return hook

    with torch.device("meta"):
        network = torchvision.models.get_model(model).eval()
        parents = {f"{name}.{child}": module for name, module in network.named_modules() for child in module._modules}
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(record(name))
        network(torch.empty(batch, 3, size, size))
    return found


def _real_taps(conv: Conv, axis: int) -> int:
    """Over all outputs along one axis, the kernel taps that fall on a pixel rather than on padding."""
    length, outputs = ((conv.height, conv.out_height), (conv.width, conv.out_width))[axis]
    stride, padding, dilation = conv.stride[axis], conv.padding[axis], conv.dilation[axis]
    positions = (o * stride - padding + tap * dilation for o in range(outputs) for tap in range(conv.kernel[axis]))
    return sum(0 <= position < length for position in positions)


def best_seconds(run, repeats: int = 7) -> float:
    """The fastest of a few runs: a ceiling is a best case."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the best large matrix product."""
    best = 0.0
    for m, n, k in ((2048, 2048, 2048), (4096, 512, 1024), (3136, 1024, 512)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        best = max(best, 2 * m * n * k / best_seconds(lambda a=a, b=b: torch.nn.functional.linear(a, b)))
    return best


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second, copying 16 MiB."""
    source = torch.randn(4 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), 30)


def convolution_seconds(model: str, batch: int, size: int, dtype: torch.dtype) -> list[float]:
    """What each of PyTorch's own convolutions takes alone, in the order of `layers`; medians."""
    network = torchvision.models.get_model(model).eval().to(dtype).to(memory_format=torch.channels_last)
    calls: list[tuple[nn.Conv2d, torch.Size]] = []
    hooks = [
        module.register_forward_hook(lambda conv, inputs, _: calls.append((conv, inputs[0].shape)))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    seconds = []
    with torch.no_grad():
        network(torch.randn(batch, 3, size, size, dtype=dtype))
        for hook in hooks:
            hook.remove()
        for conv, shape in calls:
            x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
            times = []
            for _ in range(5):
                start = time.perf_counter()
                conv(x)
                times.append(time.perf_counter() - start)
            seconds.append(statistics.median(times))
    return seconds


def main() -> None:
    """Prints the table, and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    network = layers(args.model, args.batch_size, args.img_size)
    bandwidth = copy_bandwidth()
    table = Table("dtype", "peak TFLOP/s", "GFLOP", "MB", "limit ms", "limit img/s", "PyTorch's convolutions ms")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        convolutions = convolution_seconds(args.model, args.batch_size, args.img_size, dtype)
        rates = (layer.flops / took for layer, took in zip(network, convolutions, strict=True))
        peak = max(matmul_flops(dtype), *rates)
        seconds = sum(layer.seconds(peak, bandwidth, dtype.itemsize) for layer in network)
        row = {
            "model": args.model,
            "batch_size": args.batch_size,
            "img_size": args.img_size,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "amx": torch.cpu._is_amx_tile_supported(),
            "torch": torch.__version__,
            "peak_tflops": peak / 1e12,
            "copy_gb_per_s": bandwidth / 1e9,
            "gflop": sum(layer.flops for layer in network) / 1e9,
            "megabytes": sum(layer.elements for layer in network) * dtype.itemsize / 1e6,
            "limit_ms": seconds * 1e3,
            "limit_img_per_s": args.batch_size / seconds,
            "pytorch_convolutions_ms": sum(convolutions) * 1e3,
        }
        rows.append(row)
        shown = ("peak_tflops", "gflop", "megabytes", "limit_ms", "limit_img_per_s", "pytorch_convolutions_ms")
        table.add_row(row["dtype"], *(f"{row[key]:.2f}" for key in shown))
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

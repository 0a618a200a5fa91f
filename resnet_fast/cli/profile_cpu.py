"""`resnet-fast profile` on the CPU: a frozen network step by step, its times beside what this CPU could do.

Ceilings are measured first (`cpu_ceilings`), then the logits are held against float64; where they are wrong (exit code
1) nothing is timed. A step's limit is max(FLOPs / peak, bytes / bandwidth), every tensor read or written once. The peak
is the best rate seen here, be it a matrix product's or a step's own; the bandwidth is that of a 16 MiB copy, since much
of what a step reads is still in cache. A network's limit is the sum over its steps; what fuses steps may pass it.

JSON: {"schema": "resnet_fast.profile_cpu/1", "environment": {...}, "flags": {...}, "ceilings": {"tflop_per_s": by
dtype, "cache_gb_per_s", "memory_gb_per_s"}, "peak_tflop_per_s", "verification": {"match", "ratio", "reason"}, "total":
the fields of `Total` or null, "rows": [...]}; CSV: the rows. A row has the fields of `Row`.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from ..numerics import Comparison
from ..problems import dtype_name
from . import cpu_ceilings, environment, networks, output
from .contenders import CHECKED_IMAGES
from .cpu_ceilings import Ceilings
from .layer_timings import LayerTiming, computed_by, layer_timings


@dataclass(frozen=True)
class Row:
    """One step; flat, so that it is a line of CSV.

    stage: "stem", "layer1" ..., "head". problem: the same for equal steps. intensity: FLOPs a byte. of_limit: limit /
    time.
    """

    step: str
    stage: str
    problem: str
    kernel: str
    gflop: float
    mb: float
    intensity: float | None
    limit_us: float
    bound: str
    time_us: float
    of_limit: float


@dataclass(frozen=True)
class Total:
    """The whole network. steps_img_per_s: by the sum of the steps' times. img_per_s: run as a user runs it."""

    steps: int
    gflop_per_img: float
    mb_per_img: float
    limit_img_per_s: float
    steps_img_per_s: float
    img_per_s: float
    of_limit: float


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Returns 1 if the network's logits are wrong."""
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
    stock = networks.build(args.model, torch.randn(4, *shape[1:], generator=generator))
    dtype = getattr(torch, args.dtype)
    frozen = networks.frozen_whole(args.model, stock, dtype)
    with output.progress() as progress:
        line = progress.add_task("verifying against float64", total=None)
        with torch.inference_mode():
            logits = frozen(images)
        few = images[:CHECKED_IMAGES]
        comparison = networks.compare_logits(logits[:CHECKED_IMAGES], stock, few, dtype)
        progress.update(line, description="measuring the ceilings")
        computing = dtype_name(computed_by(frozen, images).conv1.weight.dtype)
        dtypes = args.dtype if computing == args.dtype else f"{args.dtype}, computed in {computing},"
        on = environment.device_name("cpu")
        title = f"{args.model}, batch {args.batch_size}, {args.img_size} px, {dtypes} on {on}"
        ceilings = cpu_ceilings.measured(tuple(dict.fromkeys(("float32", "bfloat16", args.dtype))))
        if not comparison.match:
            _write(args, ceilings, comparison, ceilings.flops[computing], [], None, title)
            output.console.print(f"FAILED, so nothing was timed: {comparison}", style="bold red", markup=False)
            return 1
        progress.update(line, description="timing every step")
        timings = layer_timings(frozen, images)
        progress.update(line, description="timing the network")
        seconds = network_seconds(frozen, images)
    peak = max(ceilings.flops[computing], *(each.flops / each.seconds for each in timings))
    rows = [row(each, peak, ceilings.cache_bandwidth) for each in timings]
    found = total(rows, args.batch_size, seconds)
    if args.layers:
        _print_rows(rows, title)
    _print_total(found, title)
    output.console.print(_ceilings_line(ceilings, computing, peak), markup=False)
    _write(args, ceilings, comparison, peak, rows, found, title)
    return 0


@torch.inference_mode()
def network_seconds(frozen: nn.Module, images: Tensor) -> float:
    """The median time of the whole network, run as a user runs it."""
    frozen(images)
    return statistics.median(cpu_ceilings.times(lambda: frozen(images), repeats=15, budget=15.0))


def row(timing: LayerTiming, peak: float, bandwidth: float) -> Row:
    """What there is to say about one step."""
    by_compute, by_memory = timing.flops / peak, timing.bytes / bandwidth
    limit = max(by_compute, by_memory)
    return Row(
        step=timing.name,
        stage=_stage(timing.name),
        problem=f"{timing.kernel} {timing.flops} {timing.bytes}",
        kernel=timing.kernel,
        gflop=timing.flops / 1e9,
        mb=timing.bytes / 1e6,
        intensity=timing.flops / timing.bytes or None,
        limit_us=limit * 1e6,
        bound="compute" if by_compute > by_memory else "memory",
        time_us=timing.seconds * 1e6,
        of_limit=limit / timing.seconds,
    )


def total(rows: Sequence[Row], batch_size: int, seconds: float) -> Total:
    """The sums; `seconds` is the whole network's."""
    limit = sum(each.limit_us for each in rows) / 1e6
    return Total(
        steps=len(rows),
        gflop_per_img=sum(each.gflop for each in rows) / batch_size,
        mb_per_img=sum(each.mb for each in rows) / batch_size,
        limit_img_per_s=batch_size / limit,
        steps_img_per_s=batch_size * 1e6 / sum(each.time_us for each in rows),
        img_per_s=batch_size / seconds,
        of_limit=limit / seconds,
    )


_HEAD = ("avgpool", "global_pool", "fc")
_NOT_SETTINGS = ("command", "version", "json", "csv", "png", "gpu", "fusion")


def _stage(name: str) -> str:
    if name.split("+")[0] in _HEAD:
        return "head"
    return name.split(".")[0] if "." in name else "stem"


def _print_rows(rows: Sequence[Row], title: str) -> None:
    table = Table("step", "kernel", title=title, title_justify="left")
    for heading in ("GFLOP", "MB", "TFLOP/s", "GB/s", "limit us"):
        table.add_column(heading, justify="right")
    table.add_column("bound")
    for heading in ("us", "of limit"):
        table.add_column(heading, justify="right")
    for place, each in enumerate(rows):
        rates = (each.gflop / each.time_us * 1e3, each.mb / each.time_us * 1e3)
        cells = [f"{each.gflop:.2f}", f"{each.mb:.1f}", f"{rates[0]:.2f}", f"{rates[1]:.1f}", f"{each.limit_us:.0f}"]
        ends = place + 1 == len(rows) or rows[place + 1].stage != each.stage
        table.add_row(
            each.step, each.kernel, *cells, each.bound, f"{each.time_us:.0f}", f"{each.of_limit:.0%}", end_section=ends
        )
    output.console.print(table)


def _print_total(found: Total, title: str) -> None:
    table = Table(title=f"{title}, the whole network", title_justify="left")
    headings = ("steps", "GFLOP / img", "MB / img", "limit img/s", "steps' img/s", "network img/s", "of limit")
    for heading in headings:
        table.add_column(heading, justify="right")
    rates = (found.limit_img_per_s, found.steps_img_per_s, found.img_per_s)
    cells = [str(found.steps), f"{found.gflop_per_img:.3f}", f"{found.mb_per_img:.1f}"]
    table.add_row(*cells, *(f"{rate:,.1f}" for rate in rates), f"{found.of_limit:.0%}")
    output.console.print(table)


def _ceilings_line(ceilings: Ceilings, computing: str, peak: float) -> str:
    rates = ", ".join(f"{dtype} {flops / 1e12:.3g}" for dtype, flops in ceilings.flops.items())
    cache, memory = ceilings.cache_bandwidth / 1e9, ceilings.memory_bandwidth / 1e9
    found = (
        f"Measured here: matrix products {rates} TFLOP/s; copies {cache:.1f} GB/s at 16 MiB, {memory:.1f} from memory."
    )
    return f"{found} Limits are by {peak / 1e12:.3g} TFLOP/s ({computing}, the best seen) and {cache:.1f} GB/s."


def _write(
    args: argparse.Namespace,
    ceilings: Ceilings,
    comparison: Comparison,
    peak: float,
    rows: Sequence[Row],
    found: Total | None,
    title: str,
) -> None:
    if args.json:
        record = {
            "schema": "resnet_fast.profile_cpu/1",
            "environment": environment.record(),
            "flags": {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS},
            "ceilings": {
                "tflop_per_s": {dtype: flops / 1e12 for dtype, flops in ceilings.flops.items()},
                "cache_gb_per_s": ceilings.cache_bandwidth / 1e9,
                "memory_gb_per_s": ceilings.memory_bandwidth / 1e9,
            },
            "peak_tflop_per_s": peak / 1e12,
            "verification": {"match": comparison.match, "ratio": comparison.ratio, "reason": comparison.reason},
            "total": None if found is None else asdict(found),
            "rows": [asdict(each) for each in rows],
        }
        output.write_json(record, args.json)
    if args.csv:
        output.write_csv([asdict(each) for each in rows], args.csv)
    if args.png and rows:
        from . import plots

        plots.roofline(rows, peak, ceilings.cache_bandwidth, title, args.png, memory=ceilings.memory_bandwidth)

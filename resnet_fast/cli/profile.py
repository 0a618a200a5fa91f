"""`resnet-fast profile`: what a frozen network is on a GPU, step by step: kernel, work, traffic, limit, expected time.

With a CUDA device the ceilings that limits are made of and every step are measured, once the network's logits have
been held against float64; where they are wrong (exit code 1) no step is timed. With --gpu NAME nothing is measured and
no GPU is needed. A limit is max(FLOPs / peak, bytes / bandwidth), every tensor read or written once; a network's is the
sum over its steps. Times are of one step alone, its tensors in memory and not in L2. On a CPU it is
`profile_cpu` that runs, with rows and JSON of its own.

JSON: {"schema": "resnet_fast.profile/1", "environment": {...}, "flags": {...}, "gpu": {"name", "capability",
"multiprocessors"}, "ceilings": {"measured": bool, "tflop_per_s", "gb_per_s"}, "verification": {"match", "ratio",
"reason"} or null, "totals": [one a fusion, the fields of `Total`], "rows": [...]}; CSV: the rows. A row has the fields
of `Row`. What was not measured is null.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from .. import gpus
from ..engine import fitted
from ..gpus import Gpu
from ..kernels.configs import Config, to_dict
from ..numerics import Comparison
from ..plan import Plan, Step
from ..planner import DTYPES, FUSIONS, Section, build
from . import UserError, ceilings, environment, networks, output
from .contenders import CHECKED_IMAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--model", default="resnet50", metavar="NAME", help="any torchvision resnet, resnext or wide_resnet")
    flag("-b", "--batch-size", type=output.positive, metavar="N", help="default: 256 on a GPU, 16 on a CPU")
    flag("--img-size", type=output.positive, default=224, metavar="N")
    flag("--dtype", choices=DTYPES, default="bfloat16")
    flag("--gpu", metavar="NAME", help=f"plan for this GPU, measure nothing: {', '.join(gpus.KNOWN)}")
    flag("--device", help="measure on this one (default: cuda where there is one, else cpu)")
    flag("--fusion", choices=FUSIONS, default="auto", help="what shares a kernel on a GPU (default: the fastest)")
    flag("--layers", action=argparse.BooleanOptionalAction, default=True, help="print every step, not only the totals")
    flag("--json", metavar="FILE")
    flag("--csv", metavar="FILE")
    flag("--png", metavar="FILE", help="the roofline with every step on it (needs matplotlib)")


@dataclass(frozen=True)
class Row:
    """One step; flat, so that it is a line of CSV. None: not measured.

    stage: "stem", "layer1" ..., "head". config: pixels, output / input channels that a program takes at a time, warps,
    stages. reason: why it is the library's. intensity: FLOPs a byte. of_limit: limit / time.
    """

    step: str
    stage: str
    problem: str
    kernel: str
    config: str
    source: str
    reason: str
    gflop: float
    mb: float
    intensity: float | None
    limit_us: float
    bound: str
    predicted_us: float
    time_us: float | None
    of_limit: float | None


@dataclass(frozen=True)
class Total:
    """The whole network, average pool and classifier included, by one way to fuse it. None: not measured."""

    fusion: str
    steps: int
    gflop_per_img: float
    mb_per_img: float
    limit_img_per_s: float
    predicted_img_per_s: float
    img_per_s: float | None
    arena_bytes: int


@dataclass(frozen=True)
class Measurement:
    """ceilings: the GPU with measured ones. seconds: of every step, then of the head; None if `comparison` failed."""

    ceilings: Gpu
    comparison: Comparison
    seconds: list[float] | None


def run(args: argparse.Namespace) -> int:
    """Plan, measure where there is a device, print, write. Returns 1 if the network's logits are wrong."""
    networks.check_name(args.model)
    for path in (args.json, args.csv, args.png):
        output.check_writable(path)
    if args.png:
        from . import plots

        plots.pyplot()
    gpu, device = _target(args)
    args.batch_size = args.batch_size or (16 if gpu is None else 256)
    if gpu is None:
        from . import profile_cpu

        return profile_cpu.run(args)
    stock = _stock(args, device)
    frozen = networks.frozen_whole(args.model, stock, getattr(torch, args.dtype))
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    try:
        make = functools.partial(build, Section.of_resnet(frozen), shape, args.dtype, gpu)
        chosen = functools.partial(make, fusion=args.fusion)
        measurement = None if device is None else measure(chosen, stock, frozen, device)
        plans = {fusion: make(fusion=fusion) for fusion in FUSIONS}
    except ValueError as error:
        raise UserError(str(error)) from None
    plan = plans[args.fusion]
    limits = gpu if measurement is None else measurement.ceilings
    seconds = None if measurement is None else measurement.seconds

    rows = [row(step, plan, limits, seconds and seconds[place]) for place, step in enumerate((*plan.steps, *plan.head))]
    totals = [total(each, limits, seconds if each is plan else None) for each in plans.values()]
    title = f"{args.model}, batch {args.batch_size}, {args.img_size} px, {args.dtype} on {gpu.name}"
    if args.layers:
        _print_rows(rows, f"{title}, fusion {args.fusion}", measured=seconds is not None)
    _print_totals(totals, title, args.fusion)
    output.console.print(_ceilings_line(plan, limits, measurement), markup=False)
    _write(args, plan, limits, measurement, rows, totals, title)
    if measurement is None or measurement.comparison.match:
        return 0
    failed = f"FAILED, so no step was timed: {measurement.comparison}"
    output.console.print(failed, style="bold red", markup=False)
    return 1


def measure(make: Callable[[], Plan], stock: nn.Module, frozen: nn.Module, device: str) -> Measurement:
    """Verify the logits of the plan that `make` makes on `device`, where stock and frozen are, then time its steps."""
    with output.progress() as progress, torch.inference_mode():
        line = progress.add_task("verifying against float64", total=None)
        images = torch.randn(make().tensors["input"], generator=torch.Generator().manual_seed(0))
        images = images.to(device).to(memory_format=torch.channels_last)
        x = images.to(frozen.conv1.weight.dtype)
        engine = fitted(make, x)
        plan, features = engine.plan, engine(x)
        few = images[:CHECKED_IMAGES]
        comparison = networks.compare_logits(frozen.behind(features[:CHECKED_IMAGES]), stock, few, x.dtype)
        progress.update(line, description="measuring the ceilings")
        measured = ceilings.measured(plan.gpu, device, plan.dtype)
        if not comparison.match:
            return Measurement(measured, comparison, None)
        launches = [*engine.launches(x), *_head_launches(plan, frozen, features)]
        progress.update(line, total=len(launches))
        seconds = []
        for step, launch in launches:
            progress.update(line, description=f"timing {step.name}", advance=1)
            seconds.append(statistics.median(ceilings.times(launch, device)))
    return Measurement(measured, comparison, seconds)


def row(step: Step, plan: Plan, limits: Gpu, seconds: float | None) -> Row:
    """What there is to say about one step; `limits` has the ceilings."""
    limit, choice = step.limit_seconds(limits), step.choice
    return Row(
        step=step.name,
        stage=_stage(step, plan),
        problem=step.problem.key,
        kernel=choice.kernel,
        config="" if choice.config is None else _short(choice.config),
        source=choice.source,
        reason=choice.reason,
        gflop=step.flops / 1e9,
        mb=step.bytes / 1e6,
        intensity=step.intensity or None,
        limit_us=limit * 1e6,
        bound=step.bound(limits),
        predicted_us=step.predicted_seconds(plan.gpu) * 1e6,
        time_us=None if seconds is None else seconds * 1e6,
        of_limit=None if seconds is None else limit / seconds,
    )


def total(plan: Plan, limits: Gpu, seconds: Sequence[float] | None) -> Total:
    """The sums of one plan."""
    return Total(
        fusion=plan.fusion,
        steps=len(plan.steps),
        gflop_per_img=plan.flops / plan.batch / 1e9,
        mb_per_img=plan.bytes_per_image / 1e6,
        limit_img_per_s=plan.batch / plan.limit_seconds(limits),
        predicted_img_per_s=plan.batch / plan.predicted_seconds(),
        img_per_s=None if seconds is None else plan.batch / sum(seconds),
        arena_bytes=plan.offsets()[1],
    )


_NOT_SETTINGS = ("command", "version", "json", "csv", "png")


def _target(args: argparse.Namespace) -> tuple[Gpu | None, str | None]:
    """The GPU, None for the CPU, and the device to measure on: None with --gpu."""
    if args.gpu and args.device:
        raise UserError("--gpu plans for a GPU that need not be here, --device measures one that is: give one of them")
    if args.gpu:
        try:
            return gpus.named(args.gpu), None
        except ValueError as error:
            raise UserError(f"--gpu {args.gpu}: {error}") from None
    device = environment.check_device(args.device or environment.devices()[-1])
    if torch.device(device).type != "cuda":
        if args.fusion != "auto":
            raise UserError(
                f"--fusion {args.fusion} is for GPUs; name one to plan for with --gpu: {', '.join(gpus.KNOWN)}"
            )
        return None, device
    index = torch.device(device).index
    return gpus.of_device(torch.cuda.current_device() if index is None else index), device


def _stock(args: argparse.Namespace, device: str | None) -> nn.Module:
    """The network to plan: shapes alone suffice, unless it is to be run."""
    if device is None:
        with torch.device("meta"):
            return networks.untrained(args.model).eval()
    generator = torch.Generator().manual_seed(0)
    return networks.build(args.model, torch.randn(4, 3, args.img_size, args.img_size, generator=generator).to(device))


def _head_launches(plan: Plan, frozen: nn.Module, features: Tensor) -> list[tuple[Step, Callable[[], Tensor]]]:
    (pool, linear), module = plan.head, getattr(frozen, frozen.frozen_pool)
    pooled = module(features).flatten(1)
    return [(pool, lambda: module(features)), (linear, lambda: frozen.fc(pooled))]


def _stage(step: Step, plan: Plan) -> str:
    if step in plan.head:
        return "head"
    return step.name.split(".")[0] if "." in step.name else "stem"


def _short(config: Config) -> str:
    fields = to_dict(config)
    sides = fields.get("box") or [config.block_pixels]
    pixels = "x".join(map(str, sides))
    return f"{pixels} px {config.block_out}/{config.block_in} w{config.warps} s{config.stages}"


def _print_rows(rows: Sequence[Row], title: str, measured: bool) -> None:
    table = Table("step", "kernel", "config", "source", title=title, title_justify="left")
    for heading in ("GFLOP", "MB", "limit us"):
        table.add_column(heading, justify="right")
    table.add_column("bound")
    for heading in ("predicted us", *(("us", "of limit") if measured else ())):
        table.add_column(heading, justify="right")
    for each in rows:
        cells = [f"{each.gflop:.1f}", f"{each.mb:.1f}", f"{each.limit_us:.1f}", each.bound, f"{each.predicted_us:.1f}"]
        if measured:
            cells += [f"{each.time_us:.1f}", f"{each.of_limit:.0%}"]
        table.add_row(each.step, each.kernel, each.config, each.source, *cells, end_section=_ends_stage(each, rows))
    output.console.print(table)
    reasons: dict[str, list[str]] = {}
    for each in rows:
        if each.reason:
            reasons.setdefault(each.reason, []).append(each.step)
    for reason, steps in reasons.items():
        named = ", ".join(steps[:3]) + (f" and {len(steps) - 3} more" if len(steps) > 3 else "")
        output.console.print(f"library: {named}: {reason}", markup=False)


def _ends_stage(each: Row, rows: Sequence[Row]) -> bool:
    return each is [row for row in rows if row.stage == each.stage][-1]


def _print_totals(totals: Sequence[Total], title: str, chosen: str) -> None:
    table = Table("fusion", title=f"{title}, the whole network", title_justify="left")
    measured = any(each.img_per_s for each in totals)
    headings = ("steps", "GFLOP / img", "MB / img", "limit img/s", "predicted img/s", "arena MB")
    for heading in (*headings, *(("measured img/s", "of limit") if measured else ())):
        table.add_column(heading, justify="right")
    for each in totals:
        cells = [str(each.steps), f"{each.gflop_per_img:.3f}", f"{each.mb_per_img:.1f}", f"{each.limit_img_per_s:,.0f}"]
        cells += [f"{each.predicted_img_per_s:,.0f}", f"{each.arena_bytes / 1e6:,.1f}"]
        if each.img_per_s:
            cells += [f"{each.img_per_s:,.0f}", f"{each.img_per_s / each.limit_img_per_s:.0%}"]
        table.add_row(each.fusion, *cells, style="bold" if each.fusion == chosen else None)
    output.console.print(table)


def _ceilings_line(plan: Plan, limits: Gpu, measurement: Measurement | None) -> str:
    peak, bandwidth = limits.peak(plan.dtype) / 1e12, limits.bandwidth / 1e12
    numbers = f"{peak:.0f} TFLOP/s ({limits.arithmetic(plan.dtype)}) and {bandwidth:.2f} TB/s"
    if measurement is not None:
        return f"Limits are by {numbers}, measured here; predictions by what is expected of {plan.gpu.name}."
    tuned = sum(step.tuned for step in plan.steps)
    times = f"those of {tuned} tuned steps are from a table, the rest a cost model's" if tuned else "a cost model's"
    return f"Nothing was measured. Limits are by {numbers}, expected of {plan.gpu.name}; predicted times are {times}."


def _write(args, plan: Plan, limits: Gpu, measurement: Measurement | None, rows, totals, title: str) -> None:
    peak = limits.peak(plan.dtype)
    if args.json:
        gpu = plan.gpu
        verification = None
        if measurement is not None:
            verdict = measurement.comparison
            verification = {"match": verdict.match, "ratio": verdict.ratio, "reason": verdict.reason}
        record = {
            "schema": "resnet_fast.profile/1",
            "environment": environment.record(),
            "flags": {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS},
            "gpu": {
                "name": gpu.name,
                "capability": "{}.{}".format(*gpu.capability),
                "multiprocessors": gpu.multiprocessors,
            },
            "ceilings": {
                "measured": measurement is not None,
                "tflop_per_s": peak / 1e12,
                "gb_per_s": limits.bandwidth / 1e9,
            },
            "verification": verification,
            "totals": [asdict(each) for each in totals],
            "rows": [asdict(each) for each in rows],
        }
        output.write_json(record, args.json)
    if args.csv:
        output.write_csv([asdict(each) for each in rows], args.csv)
    if args.png:
        from . import plots

        plots.roofline(rows, peak, limits.bandwidth, f"{title}, fusion {args.fusion}", args.png)

"""`resnet-fast bench`: one network, every way to run it, side by side in one process; verified, then timed.

Flags are those of timm's benchmark.py where it has them. Under --amp, eager, torch.compile and fast run under
torch.autocast and frozen is `freeze(model, dtype)`. Exit code 1 if a contender failed its verification.

JSON: {"schema": "resnet_fast.bench/1", "environment": {...}, "flags": {...}, "rows": [...]}; CSV: the rows. A row is
    model, task (infer | train), dtype, amp, batch_size, img_size, device, and the fields of `harness.Row`
"""

import argparse
from collections.abc import Sequence

import torch
from rich.table import Table

from .. import dispatch, training
from . import UserError, contenders, environment, harness, networks, output
from .harness import CONTENDERS, Row

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "freezing")
DEFAULT = ("eager_nchw", "eager_channels_last", "fast", "frozen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--model", default="resnet50", metavar="NAME", help="any torchvision resnet, resnext or wide_resnet")
    flag("-b", "--batch-size", type=output.positive, default=16, metavar="N")
    flag("--img-size", type=output.positive, default=224, metavar="N")
    flag("--bench", choices=("infer", "train", "both"), default="both")
    flag("--device", help="default: cuda where there is one, else cpu")
    flag(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="eager channels_last takes part and ratios are to it; with --no-channels-last they are to eager NCHW "
        "(fast and frozen run channels_last always)",
    )
    flag("--amp", action="store_true", help="autocast, to bfloat16 unless --amp-dtype says otherwise")
    flag("--amp-dtype", choices=("bfloat16", "float16"), help="implies --amp")
    flag(
        "--torchcompile",
        nargs="?",
        const="default",
        action="append",
        choices=COMPILE_MODES,
        metavar="MODE",
        help=f"add torch.compile in this mode; may be repeated: {', '.join(COMPILE_MODES)} (inference only)",
    )
    flag(
        "--contenders",
        nargs="+",
        choices=("all", *CONTENDERS),
        metavar="NAME",
        help=f"all, or some of {', '.join(CONTENDERS)} (default: {', '.join(DEFAULT)}; compile with --torchcompile)",
    )
    flag("--backend", choices=("auto", *dispatch.PRIORITY), default="auto", help="what fast and frozen run on")
    flag(
        "--train-stages",
        nargs="+",
        type=int,
        choices=training.STAGES,
        default=(),
        metavar="STAGE",
        help="add fast in these stages of training, 1 to 4 (4 saves least for the backward pass)",
    )
    flag("--num-warm-iter", type=output.positive, default=3, metavar="N", help="untimed steps of each contender")
    flag("--num-bench-iter", type=output.positive, default=20, metavar="N", help="timed steps of each contender")
    flag("--rounds", type=output.positive, default=10, metavar="N", help="turns those steps are spread over")
    flag("--json", metavar="FILE")
    flag("--csv", metavar="FILE")
    flag("--png", metavar="FILE", help="bars with error bars (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Build, verify, time, print, write. Returns 1 if a contender failed verification."""
    networks.check_name(args.model)
    for path in (args.json, args.csv, args.png):
        output.check_writable(path)
    if args.png:
        from . import plots

        plots.pyplot()
    device = environment.check_device(args.device or environment.devices()[-1])
    setting, chosen = _setting(args, device), _chosen(args)
    tasks = {"infer": ("infer",), "train": ("train",), "both": ("infer", "train")}[args.bench]
    groups = {task: rows for task in tasks if (rows := _bench(args, setting, chosen, task))}
    missing = ", ".join(chosen or args.contenders)
    if not groups:
        raise UserError(f"nothing to time: --bench {args.bench} on {device} has no {missing}; name another")
    for task in tasks:
        if task not in groups:
            output.notes.print(f"no {_TASKS[task]}: {device} has no {missing} there")
    title = f"{args.model}, batch {args.batch_size}, {args.img_size} px, {_dtype(args)}"
    machine = f"{environment.device_name(device)}; torch {torch.__version__}"
    for task, rows in groups.items():
        output.console.print(table(rows, f"{title}, {_TASKS[task]} on {machine}"))
    _write(args, device, groups, f"{title}\n{machine}")
    failed = [row for rows in groups.values() for row in rows if not row.match]
    for row in failed:
        output.console.print(f"FAILED {row.label}: {row.worst_tensor}: {row.reason}", style="bold red", markup=False)
    return 1 if failed else 0


def table(rows: Sequence[Row], title: str) -> Table:
    """Results as a table."""
    result = Table("contender", "match", title=title, title_justify="left")
    for heading in ("error / allowed", "ms", "p20 .. p80", "img/s", "ratio", "peak MB", "saved MB/img", "TFLOP/s"):
        result.add_column(heading, justify="right")
    for row in rows:
        if row.worst_tensor == harness.NOT_RUN:
            result.add_row(row.label, "-", "-", "not run")
            continue
        verdict = "[green]yes[/]" if row.match else "[bold red]NO[/]"
        error = "-" if row.worst_ratio is None else f"{row.worst_ratio:.2f}"
        if row.median_ms is None:
            result.add_row(row.label, verdict, error, "failed", "not timed")
            continue
        result.add_row(
            row.label,
            verdict,
            error,
            f"{row.median_ms:.1f}",
            f"{row.p20_ms:.1f} .. {row.p80_ms:.1f}",
            f"{row.median_per_s:.1f}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            "-" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}",
            "-" if row.saved_mb_per_item is None else f"{row.saved_mb_per_item:.1f}",
            "-" if row.tflop_per_s is None else f"{row.tflop_per_s:.3g}",
        )
    return result


_NOT_SETTINGS = ("command", "version", "json", "csv", "png")
_TASKS = {"infer": "inference", "train": "training step"}


def _setting(args: argparse.Namespace, device: str) -> contenders.Setting:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator)
    images = images.to(device).to(memory_format=torch.channels_last)
    calibration = torch.randn(4, 3, args.img_size, args.img_size, generator=generator).to(device)
    if args.bench != "infer" and args.batch_size * _last_size(args.img_size) ** 2 == 1:
        raise UserError("training needs more than one value per channel: raise --batch-size or --img-size above 32")
    stock = networks.build(args.model, calibration)
    amp_dtype = getattr(torch, _dtype(args)) if args.amp or args.amp_dtype else None
    return contenders.Setting(stock, images, amp_dtype, tuple(args.torchcompile or ()), args.backend, args.train_stages)


def _chosen(args: argparse.Namespace) -> list[str]:
    names = list(args.contenders or DEFAULT)
    if "all" in names:
        names = list(CONTENDERS)
    if args.torchcompile and "compile" not in names:
        names.append("compile")
    if "compile" in names and not args.torchcompile:
        args.torchcompile = ["default"]
    if not args.channels_last:
        names = [name for name in names if name not in ("eager_channels_last", "eager_pooled")]
    return [name for name in CONTENDERS if name in names]


def _bench(args: argparse.Namespace, setting: contenders.Setting, chosen: list[str], task: str) -> list[Row]:
    with output.progress() as progress:
        line = progress.add_task(f"{_TASKS[task]}: float64 reference", total=None)
        found = (contenders.inference if task == "infer" else contenders.training)(setting, chosen)
        if not found:
            return []
        progress.update(line, total=harness.stages(found, args.rounds))

        def say(stage: str) -> None:
            progress.update(line, description=f"{_TASKS[task]}: {stage}", advance=1)

        return harness.run(
            found,
            rounds=args.rounds,
            iterations=-(-args.num_bench_iter // args.rounds),
            warmup=args.num_warm_iter,
            baseline=harness.BASELINE if args.channels_last else "eager_nchw",
            progress=say,
        )


def _write(args: argparse.Namespace, device: str, groups: dict[str, list[Row]], title: str) -> None:
    shared = {"model": args.model, "task": None, "dtype": _dtype(args), "amp": _dtype(args) != "float32"}
    shared |= {"batch_size": args.batch_size, "img_size": args.img_size, "device": device}
    rows = [shared | {"task": task} | row.to_dict() for task, found in groups.items() for row in found]
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
        record = {"schema": "resnet_fast.bench/1", "environment": environment.record(), "flags": flags, "rows": rows}
        output.write_json(record, args.json)
    if args.csv:
        output.write_csv(rows, args.csv)
    if args.png:
        from . import plots

        plots.bench({_TASKS[task]: found for task, found in groups.items()}, title, args.png)


def _dtype(args: argparse.Namespace) -> str:
    return args.amp_dtype or ("bfloat16" if args.amp else "float32")


def _last_size(size: int) -> int:
    """Rows of the last stage's output: five halvings, rounded up."""
    for _ in range(5):
        size = (size + 1) // 2
    return size

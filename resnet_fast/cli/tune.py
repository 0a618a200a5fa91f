"""`resnet-fast tune`: measure, for every layer of a network, which kernel is fastest on this GPU, or CPU.

Each distinct layer of a frozen network or a training step, at each batch size and dtype, is a problem: its most
promising configurations and the library's path are verified against float64, then timed (`tuning`); the fastest right
one goes into the tuned table that `freeze`, `optimize` and training read.
The table is written after every problem, and what is in it is not measured again, so a run that was cut short, by
--budget or otherwise, goes on where it stopped. Exit code 1: a candidate gave wrong numbers (it is in the table's
"rejected", and is never chosen), or one took the GPU down with it (run the command again: it goes on behind that one).

With --device cpu the problems are the 3x3s that Winograd can compute, of frozen networks, of optimized ones and of
training steps, in float32, and in bfloat16 where AVX-512's dot products multiply it; the other convolutions of
optimized networks in float32, which the direct kernel computes too; where the extension multiplies bfloat16 itself
(AMX, AVX-512), whole frozen networks and the blocks of optimized ones, in its dtypes; and with AMX a training step's
convolutions. The library's path is oneDNN's, layer by layer, and of a 3x3 in a program dot products without Winograd.
(Under TRITON_INTERPRET=1 it rehearses the tuning of a GPU instead, and its times mean nothing.)

With --list nothing is measured: the problems, and how many configurations each has, for the device here or --gpu NAME.
"""

import argparse
import fnmatch
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from .. import cpus, gpus, planner
from ..amx.network import why_not_packable
from ..amx.program import problem_of
from ..backends import triton as triton_backend
from ..backends import units, winograd
from ..cpus import Cpu, Device
from ..gpus import Gpu
from ..kernels import configs, selection, tables
from ..problems import (
    KERNEL_DTYPES,
    ConvProblem,
    PoolProblem,
    Problem,
    SectionProblem,
    StemProblem,
    TailProblem,
    TrainingConvProblem,
    WeightGradientProblem,
)
from . import UserError, environment, networks, output, training_problems, tuning
from .tuned_file import TunedFile

MODELS = ("resnet18", "resnet50", "resnext50_32x4d")
FUSIONS = ("conv", "tail")
TASKS = ("infer", "train")
REHEARSAL = replace(gpus.KNOWN["h200"], name="Triton's interpreter on a CPU, not a GPU")
"""What is "tuned for" under the interpreter: an H200 by its limits, by its name nothing that any table is read for."""

_DEFAULTS = {
    "gpu": {"batch_size": [1, 32, 256], "dtype": ["bfloat16", "float16"]},
    "cpu": {"batch_size": [1, 4, 16], "dtype": ["float32", "bfloat16"]},
}

_DTYPE_HELP = "default: bfloat16 float16; CPU float32 bfloat16"

_FIRST_GUESS_S = 10.0  # for a problem's time, before there is one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--model", nargs="+", default=list(MODELS), metavar="NAME", help=f"default: {' '.join(MODELS)}")
    flag("-b", "--batch-size", nargs="+", type=output.positive, metavar="N", help="default: 1 32 256; CPU 1 4 16")
    flag("--img-size", type=output.positive, default=224, metavar="N")
    flag("--dtype", nargs="+", choices=KERNEL_DTYPES, metavar="DTYPE", help=_DTYPE_HELP)
    flag("--fusion", nargs="+", choices=FUSIONS, default=list(FUSIONS), help="layers by themselves, tails of blocks")
    flag("--task", nargs="+", choices=TASKS, default=list(TASKS), help="layers of frozen networks, of training steps")
    flag("--only", metavar="PATTERN", help="problems whose key matches, as in 'conv n256 64x56x56 *'")
    flag(
        "--top", type=output.positive, default=12, metavar="N", help="configurations of each problem, by the cost model"
    )
    flag("--output", metavar="FILE", help="default: the table of this device in the user's cache")
    flag("--budget", type=float, metavar="SECONDS", help="start no problem that would end later than this")
    flag("--again", action="store_true", help="measure what is in the table too, and what crashed")
    flag("--device", default="cuda", help="default: cuda; cpu: oneDNN or our own kernels")
    flag("--list", action="store_true", help="print the problems, measure nothing")
    flag("--gpu", metavar="NAME", help=f"for --list: {', '.join(gpus.KNOWN)}")


def run(args: argparse.Namespace) -> int:
    """List, or measure and write. Returns 1 if a candidate was wrong or took the GPU down."""
    for name in args.model:
        networks.check_name(name)
    target = _target(args)
    for name, values in _DEFAULTS[target.kind].items():
        vars(args)[name] = vars(args)[name] or values
    everything = problems(args, target)
    chosen = [problem for problem in everything if fnmatch.fnmatch(problem.key, args.only or "*")]
    if not everything:
        raise UserError(f"on {target.name} nothing computes these in more than one way")
    if not chosen:
        raise UserError(f"--only {args.only!r} matches no problem; --list prints them all")
    if args.list:
        _print_list(chosen, target)
        return 0
    reason = winograd.why_not() if isinstance(target, Cpu) else triton_backend.available()
    if reason is not None:
        raise UserError(f"nothing can be tuned: {reason}")
    path = Path(args.output) if args.output else tables.paths(target)[0]
    output.check_writable(path)
    file = TunedFile(path, target, environment.record(), rehearsal=target is REHEARSAL)
    if args.again:
        for problem in chosen:
            file.forget(problem.key)
    return _measure(args, chosen, target, file)


def problems(args: argparse.Namespace, target: Device) -> list[Problem]:
    """The distinct problems of the networks' plans and those that a planner weighs them against, and of training steps.

    In the order asked for, tasks before dtypes before batch sizes before models; tails after the layers they are made
    of. On a CPU, of them those that there is something to choose for.
    """
    is_cpu = isinstance(target, Cpu)
    by_task = {"infer": _infer_on_cpu, "train": _train_on_cpu} if is_cpu else {"infer": _infer, "train": _train}
    found: dict[str, Problem] = {}
    for task in args.task:
        for problem in by_task[task](args, target):
            if not is_cpu or configs.candidates(problem, target):
                found.setdefault(problem.key, problem)
    return list(found.values())


def _infer_on_cpu(args: argparse.Namespace, cpu: Cpu) -> Iterator[Problem]:
    """Of frozen networks, and of optimized ones, whose weights may change."""
    for problem in _infer(args, REHEARSAL):
        if isinstance(problem, ConvProblem) and (problem.dtype == "float32" or _has_program(problem)):
            yield selection.measured_as(problem, cpu)
            yield selection.measured_as(replace(problem, folded=False), cpu)
    yield from _sections(args)  # which take what was found for their layers


def _has_program(problem: ConvProblem) -> bool:
    """Whether there is a choice for it in programs, and one of it alone, which adds x to what it makes of x."""
    dtype, conv = getattr(torch, problem.dtype), problem.conv
    return winograd.by_dots(dtype) and conv.in_channels == conv.out_channels


def _sections(args: argparse.Namespace) -> Iterator[SectionProblem]:
    """What may be a program: frozen networks, and the blocks of optimized ones."""
    for dtype in args.dtype:
        if units.why_no_unit(getattr(torch, dtype)) is not None:
            continue
        sections = [section for name in args.model if why_not_packable(section := _section(name, dtype)) is None]
        for batch in args.batch_size:
            for section in sections:
                network = problem_of(section, (batch, 3, args.img_size, args.img_size))
                yield network
                yield from (SectionProblem((block,), dtype, folded=False) for block in network.blocks)


def _train_on_cpu(args: argparse.Namespace, cpu: Cpu) -> Iterator[Problem]:
    """Of training steps: layers, their data gradients, which are convolutions too, and their weights' gradients; where
    there is AMX, each of them by its tiles as well."""
    by_tiles = ("output", "data_gradient", "weight_gradient") if units.has_tiles() else ()
    for problem in _train(args, REHEARSAL):
        if isinstance(problem, ConvProblem):
            live = selection.measured_as(replace(problem, folded=False), cpu)
            if problem.dtype == "float32" and configs.why_not(configs.WinogradConfig(), live, cpu) is None:
                yield live
            if problem.statistics:
                if winograd.computes(getattr(torch, problem.dtype)):
                    yield WeightGradientProblem(problem.conv, problem.dtype)
                yield from (TrainingConvProblem(problem.conv, problem.dtype, of) for of in by_tiles)


def _train(args: argparse.Namespace, gpu: Gpu) -> Iterator[Problem]:
    for dtype in args.dtype:
        for batch in args.batch_size:
            for name in args.model:
                yield from training_problems.of_network(name, (batch, 3, args.img_size, args.img_size), dtype)


def _infer(args: argparse.Namespace, gpu: Gpu) -> Iterator[Problem]:
    unknown = replace(gpu, name=f"{gpu.name}, untuned")  # so that tables, which plans depend on, say nothing
    for dtype in args.dtype:
        sections = [_section(name, dtype) for name in args.model]
        for batch in args.batch_size:
            for section in sections:
                shape = (batch, 3, args.img_size, args.img_size)
                for fusion in FUSIONS:
                    if fusion in args.fusion:
                        for step in planner.build(section, shape, dtype, unknown, fusion=fusion).steps:
                            if not isinstance(step.problem, PoolProblem):
                                yield from alternatives(step.problem)
                                yield step.problem


def alternatives(problem: Problem) -> Iterator[Problem]:
    """What could be done instead of `problem`, step by step, each again with its own before it."""
    dtype = problem.dtype
    parts: list[Problem] = []
    if isinstance(problem, StemProblem):
        parts = [ConvProblem(problem.conv, dtype)]
    elif isinstance(problem, TailProblem):
        parts = separate_steps(problem)
        parts += [replace(problem, next_conv=None)] if problem.next_conv else []
    elif problem.shortcut:
        parts = [
            ConvProblem(problem.shortcut, dtype, relu=False),
            replace(problem, shortcut=None, residual=True),
        ]
    for part in parts:
        yield from alternatives(part)
        yield part


def separate_steps(problem: TailProblem) -> list[Problem]:
    """The convolutions that one kernel of a tail replaces."""
    last = ConvProblem(problem.conv3, problem.dtype, residual=problem.shortcut is None, shortcut=problem.shortcut)
    following = [ConvProblem(problem.next_conv, problem.dtype)] if problem.next_conv else []
    return [ConvProblem(problem.conv2, problem.dtype), last, *following]


def _measure(args: argparse.Namespace, chosen: Sequence[Problem], target: Device, file: TunedFile) -> int:
    todo = [problem for problem in chosen if not file.known(problem.key)]
    started, longest, wrong = time.monotonic(), _FIRST_GUESS_S, []
    file.left = len(todo)
    if todo:
        file.timing = _timing(args.device)
    file.save()
    with output.progress() as progress:
        line = progress.add_task("tuning", total=len(todo))
        for place, problem in enumerate(todo):
            begun = time.monotonic()
            if args.budget is not None and begun - started + longest > args.budget:
                break
            progress.update(line, description=problem.key)
            if isinstance(problem, SectionProblem):
                selection.forget()  # it may take what this run has found for its layers
            try:
                _measure_one(args, problem, target, file)
            except tuning.DeviceLost as error:
                file.crash(problem.key, error.label, error.reason)
                _say(f"{problem.key}: {error} took the GPU down; run the command again to go on behind it", "bold red")
                return 1
            file.left = len(todo) - place - 1
            file.save()
            wrong += _report(f"{place + 1}/{len(todo)}", problem.key, file)
            progress.advance(line)
            longest = max(longest if place else 0.0, time.monotonic() - begun)
    selection.forget()
    left = f"{file.left} problems left: run the command again" if file.left else "nothing left"
    _say(f"{len(file.rows)} rows in {file.path}; {left}", None)
    for each in wrong:
        _say(f"WRONG {each}", "bold red")
    return 1 if wrong else 0


def _measure_one(args: argparse.Namespace, problem: Problem, target: Device, file: TunedFile) -> None:
    """Put `problem` into the file, as a row or with why there is none."""
    key, crashed = problem.key, file.crashed.get(problem.key, {})
    if tuning.STOCK in crashed:
        file.failed[key] = f"{tuning.STOCK}: {crashed[tuning.STOCK]}"
        return
    try:
        row = tuning.measure(
            problem,
            target,
            args.device,
            top=args.top,
            crashed=crashed,
            trying=lambda label: file.begin(key, label),
        )
    except tuning.DeviceLost:
        raise
    except Exception as error:  # out of memory, most likely: the other problems can still be measured
        file.failed[key] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        if isinstance(problem, TailProblem):
            steps = [file.rows.get(step.key) for step in separate_steps(problem)]
            row["separate_us"] = round(sum(step["us"] for step in steps), 2) if all(steps) else None
        file.rows[key] = row
    finally:  # an interrupt too: whoever can answer one does not hang
        file.trying = None
        file.save()


def _report(place: str, key: str, file: TunedFile) -> list[str]:
    """Print what was found; returns a line for each candidate that was wrong."""
    if key not in file.rows:
        _say(f"{place} {key}: FAILED: {file.failed[key]}", "bold red")
        return []
    row = file.rows[key]
    beside = [f"library {row['library_us']:.1f}"] if row["library_us"] is not None else []
    beside += [f"separate steps {row['separate_us']:.1f}"] if row.get("separate_us") is not None else []
    wrong = [label for label, reason in row["rejected"].items() if reason.startswith(tuning.WRONG)]
    beside += [f"{len(row['rejected'])} rejected"] if row["rejected"] else []
    rates = f"{row['tflop_per_s']:.3g} TFLOP/s, {row['gb_per_s']:.0f} GB/s"
    found = f"{row['kernel']} {row['us']:.1f} us, {rates}"
    _say(f"{place} {key}: {'; '.join([found, *beside])}", "yellow" if wrong else None)
    return [f"{key}: {label}: {row['rejected'][label]}" for label in wrong]


def _timing(device: str) -> dict:
    """How times are taken, and what a kernel that does nothing takes by it."""
    how = "wall clock, caches overwritten before each run"
    if _is_cuda(device):
        how = "CUDA graph replays, L2 overwritten before each"
    elif triton_backend.interpreted():
        how = "wall clock, interpreted"
    empty = round(tuning.launch_time(device).us, 2)
    return {"how": how, "empty_us": empty, "cudnn_benchmark": torch.backends.cudnn.benchmark}


def _target(args: argparse.Namespace) -> Device:
    """What is tuned for."""
    if args.gpu:
        if not args.list:
            raise UserError("--gpu goes with --list; what is measured is the device that is here")
        try:
            return gpus.named(args.gpu)
        except ValueError as error:
            raise UserError(f"--gpu {args.gpu}: {error}") from None
    if args.device == "cpu":
        return _rehearsal(args) if triton_backend.interpreted() else _cpu(args)
    if not torch.cuda.is_available():
        raise UserError("tuning needs a GPU and there is none here; --list --gpu h200 prints what would be measured")
    device = torch.device(environment.check_device(args.device))
    if device.index is not None:
        torch.cuda.set_device(device)
    return gpus.of_device(torch.cuda.current_device())


def _rehearsal(args: argparse.Namespace) -> Gpu:
    if not args.output:
        raise UserError("under TRITON_INTERPRET=1 --device cpu makes no table of anything: name a file with --output")
    return REHEARSAL


def _cpu(args: argparse.Namespace) -> Cpu:
    if not set(args.dtype or ()) <= set(_DEFAULTS["cpu"]["dtype"]) or "conv" not in args.fusion:
        raise UserError("on a CPU there is a choice for layers, blocks and networks, in float32 and bfloat16 alone")
    return cpus.here()


@functools.cache
def _section(name: str, dtype: str) -> planner.Section:
    with torch.device("meta"):
        model = networks.untrained(name).eval()
    return planner.Section.of_resnet(networks.frozen_whole(name, model, getattr(torch, dtype)))


def _print_list(chosen: Sequence[Problem], target: Device) -> None:
    table = Table("problem", title=f"{len(chosen)} problems on {target.name}", title_justify="left")
    for heading in ("GFLOP", "MB", "configurations", "predicted us"):
        table.add_column(heading, justify="right")
    for problem in chosen:
        valid = configs.candidates(problem, target)
        known = valid and not isinstance(target, Cpu)  # there is no cost model of CPUs
        best = f"{configs.predicted_seconds(valid[0], problem, target) * 1e6:.1f}" if known else "-"
        table.add_row(problem.key, f"{problem.flops / 1e9:.2f}", f"{problem.bytes / 1e6:.1f}", str(len(valid)), best)
    output.console.print(table)


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _say(text: str, style: str | None) -> None:
    output.console.print(text, style=style, markup=False, soft_wrap=True)

"""How fast does everybody run a ResNet on this CPU? PyTorch, its compilers, OpenVINO, ONNX Runtime, and resnet_fast.

    pip install '.[peers]'                                         # without it, who is missing is listed, and why
    python benchmarks/cpu_peers.py --jemalloc --out DIR            # inference: R50 and R18, fp32 and bf16, batch 1, 16
    python benchmarks/cpu_peers.py --train --jemalloc --out DIR    # training step: batch 16
    ... --minutes 40 --name cpu-zen4-peers                         # no longer than that; another name for the files

A contender's results are held against float64 first; who is wrong has no time. All contenders of a case take turns, in
one process for each allocator (peers/worker.py), and are compared by medians; every ratio is to eager channels_last
under the usual allocator in the same run. Under bfloat16 eager, torch.compile, oneDNN Graph and `optimize()` run under
autocast, the others are told the dtype. ONNX Runtime takes part in float32 only.

Prints a table a case, and writes DIR/NAME-<inference|training>.json and .png, after every case, so that what was
measured stays if the run is cut short. Under --minutes the cases share the time equally: one takes fewer turns where
its share is over, though three at least, and is not begun where no time is left. Exit code 1 if a case failed or was
not begun, or eager channels_last or resnet_fast in it failed.

JSON: {"schema": "resnet_fast.cpu_peers/1", "environment": {...}, "peers": {package: version}, "jemalloc": its path or
why not, "flags": {...}, "load": the machine's, of the minute before the first case, "rows": [...]}; a row is model,
task, dtype, batch_size, img_size, allocator ("malloc" | "jemalloc"), and the fields of `resnet_fast.cli.harness.Row`.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import sys
from importlib import metadata
from pathlib import Path

import torch
from peers import case as cases
from peers import jemalloc, worker
from peers.budget import Budget
from peers.case import Case

from resnet_fast.cli import UserError, bench, environment, harness, networks, output, plots
from resnet_fast.cli.harness import Row

PACKAGES = ("openvino", "onnxruntime", "onnx", "onnxscript")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    names = tuple(dict.fromkeys((*cases.INFERENCE, *cases.TRAINING)))
    flag("--out", type=Path, required=True, metavar="DIR")
    flag("--name", default="cpu-peers", help="of the files: NAME-inference or NAME-training (default: cpu-peers)")
    flag("--train", action="store_true", help="training steps instead of inference")
    flag("--models", nargs="+", default=("resnet50", "resnet18"), metavar="NAME")
    flag("--dtypes", nargs="+", default=("float32", "bfloat16"), choices=("float32", "bfloat16"))
    flag("--batch-sizes", nargs="+", type=output.positive, metavar="N", help="default: 1 16; in training 16")
    flag("--img-size", type=output.positive, default=224, metavar="N")
    flag("--contenders", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)} (default: all)")
    flag("--rounds", type=output.positive, default=10, metavar="N", help="turns of each contender")
    flag("--iterations", type=output.positive, metavar="N", help="calls a turn; default: 8 / batch size, at least 1")
    flag("--warmup", type=output.positive, default=3, metavar="N", help="untimed calls of each contender")
    flag("--minutes", type=output.positive, metavar="N", help="for all cases together (default: no bound)")
    flag("--threads", type=output.positive, default=torch.get_num_threads(), metavar="N", help="everybody's")
    flag(
        "--jemalloc",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="all contenders under jemalloc too, this library or the system's; where there is none, it is said",
    )
    args = parser.parse_args()
    args.batch_sizes = args.batch_sizes or ([16] if args.train else [1, 16])
    return args


def main() -> int:
    """Runs every case; the exit code."""
    args = parse()
    for model in args.models:
        networks.check_name(model)
    output.check_writable_folder(args.out)
    torch.set_num_threads(args.threads)  # for the record
    libraries: dict[str, str | None] = {"malloc": None}
    why_not = "not asked for"
    if args.jemalloc:
        try:
            libraries["jemalloc"] = jemalloc.find(args.jemalloc)
        except ValueError as error:
            why_not = str(error)
            output.console.print(f"not under jemalloc: {why_not}", markup=False)
    all_names = cases.TRAINING if args.train else cases.INFERENCE
    chosen = tuple(name for name in all_names if name in (args.contenders or all_names))
    load = _load(args.threads)
    results: dict[Case, dict[str, list[Row]]] = {}
    failed = False
    numbers = list(itertools.product(args.models, args.dtypes, args.batch_sizes))
    budget = Budget(args.minutes, len(numbers))
    for model, dtype, batch_size in numbers:
        case = Case(model, args.train, dtype, batch_size, args.img_size, chosen)
        if not budget.begin():
            output.console.print(f"{case.title}: not run: no time is left", style="bold red", markup=False)
            failed = True
            continue
        try:
            results[case] = measure(case, libraries, args, budget)
        except Exception as error:  # a crash of one engine costs its case alone
            output.console.print(f"{case.title}: {type(error).__name__}: {error}", style="bold red", markup=False)
            failed = True
            continue
        failed |= show(case, results[case])
        write(args, results, libraries.get("jemalloc") or why_not, load)
    return 1 if failed else 0


def _load(threads: int) -> float:
    """Of the last minute; said where others are at work, whose share of the cores would be measured."""
    load = os.getloadavg()[0]
    if load + threads > 1.5 * (os.cpu_count() or 1):
        output.console.print(f"the machine is busy (load {load:.1f}): these figures say little", style="bold red")
    return load


def measure(
    case: Case, libraries: dict[str, str | None], args: argparse.Namespace, budget: Budget
) -> dict[str, list[Row]]:
    """Rows by allocator; ratios are to eager channels_last under the first."""
    iterations = args.iterations or max(1, 8 // case.batch_size)
    with contextlib.ExitStack() as stack, output.progress() as progress:
        workers = {
            name: stack.enter_context(worker.started(case, args.threads, library))
            for name, library in libraries.items()
        }
        line = progress.add_task(f"{case.title}: verifying", total=args.rounds + len(workers))
        for each in workers.values():
            each.verify()
            each.time(0, 0, iterations, args.warmup)
            progress.advance(line)
        progress.update(line, description=f"{case.title}: timing")
        for number in range(args.rounds):
            if budget.is_spent(number):
                output.console.print(f"{case.title}: {number} of {args.rounds} turns, its time is over", markup=False)
                break
            for each in workers.values():
                each.time(1, number, iterations, 0)
            progress.advance(line)
        rows = {name: each.rows() for name, each in workers.items()}
    usual = next(iter(rows.values()))
    baseline = next((row for row in usual if row.contender == harness.BASELINE and row.median_per_s), None)
    return {name: [_beside(row, baseline) for row in found] for name, found in rows.items()}


def _beside(row: Row, baseline: Row | None) -> Row:
    if baseline is None or row.median_per_s is None:
        return row
    return dataclasses.replace(row, ratio=row.median_per_s / baseline.median_per_s)


def show(case: Case, found: dict[str, list[Row]]) -> bool:
    """Print the tables; whether the baseline or one of ours failed."""
    for allocator, rows in found.items():
        under = "" if allocator == "malloc" else f" under {allocator}"
        machine = f"{environment.device_name('cpu')}; torch {torch.__version__}"
        output.console.print(bench.table(rows, f"{case.title}{under} on {machine}"))
        for row in rows:
            if not row.match:
                what = "not run" if row.worst_tensor == harness.NOT_RUN else f"FAILED, {row.worst_tensor}"
                output.console.print(f"{row.label}: {what}: {row.reason}", markup=False)
    must = (harness.BASELINE, *(name for name in case.chosen if name.startswith(("fast", "frozen"))))
    return any(row.contender in must and not row.match for rows in found.values() for row in rows)


def write(args: argparse.Namespace, results: dict[Case, dict[str, list[Row]]], allocator: str, load: float) -> None:
    """The JSON and the picture of what is there so far."""
    task = "training" if args.train else "inference"
    record = {
        "schema": "resnet_fast.cpu_peers/1",
        "environment": environment.record(),
        "peers": {package: _version(package) for package in PACKAGES},
        "jemalloc": allocator,
        "flags": {name: value for name, value in vars(args).items() if name != "out"},
        "load": load,
        "rows": [
            {
                "model": case.model,
                "task": task,
                "dtype": case.dtype,
                "batch_size": case.batch_size,
                "img_size": case.img_size,
                "allocator": name,
                **row.to_dict(),
            }
            for case, found in results.items()
            for name, rows in found.items()
            for row in rows
        ],
    }
    output.write_json(record, args.out / f"{args.name}-{task}.json")
    try:
        plots.pyplot()
    except UserError as error:
        output.notes.print(f"no picture: {error}", markup=False)
        return
    from peers import picture

    panels = {
        case.title if name == "malloc" else f"{case.title}, {name}": rows
        for case, found in results.items()
        for name, rows in found.items()
    }
    title = f"{environment.device_name('cpu')}; torch {torch.__version__}"
    picture.draw(panels, title, args.out / f"{args.name}-{task}.png")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())

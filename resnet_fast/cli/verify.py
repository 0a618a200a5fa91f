"""`resnet-fast verify`: is every number right?

Each op and block on every usable backend, and whole networks optimized and frozen, against float64 with PyTorch in the
same dtype beside it, by `resnet_fast.numerics`. Exit code 1 on any mismatch.

JSON: {"schema": "resnet_fast.verify/1", "match", "seconds", "environment", "rows": [one a case]}, a row being
    op, case, mode, dtype, layout, backend, device    what ran
    match      true, false, or null where the backend or PyTorch cannot run it; `reason` then says why
    ratio      worst error over the tensors compared, as a fraction of the allowed error
    tensor     the tensor with that ratio;  tensors: how many were compared
"""

import argparse
import contextlib
import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from rich.table import Table

from .. import BackendUnavailable, dispatch, freeze, numerics, optimize
from ..problems import dtype_name
from . import UserError, checks, environment, networks, output

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
QUICK_OPS = ("56x56_c64", "odd_c65_no_act", "one_pixel", "3x3_residual", "stride2_downsample_no_act", "groups32")
QUICK_BLOCKS = ("basic_stride2_downsample", "bottleneck")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the main cases only, in float32 and bfloat16")
    parser.add_argument("--backend", choices=dispatch.PRIORITY, help="this backend only")
    parser.add_argument("--device", help="this device only (default: the CPU, and the GPU where there is one)")
    output.add_json_argument(parser, "every row")


def run(args: argparse.Namespace) -> int:
    """Check everything, print the table, return 1 on a mismatch."""
    output.check_writable(args.json)
    started = time.perf_counter()
    devices = [environment.check_device(args.device)] if args.device else environment.devices()
    plan = [call for device in devices for call in _plan(args.quick, device, args.backend)]
    rows = []
    with output.progress() as progress:
        task = progress.add_task("verify", total=len(plan))
        for description, check in plan:
            progress.update(task, description=f"{description['op']} {description['case']} ({description['backend']})")
            rows.append(description | _judge(check))
            progress.advance(task)
    asked = [row for row in rows if args.backend in (None, row["backend"])]  # networks take what is there
    if all(row["match"] is None for row in asked):
        of = f" of backend {args.backend}" if args.backend else ""
        raise UserError(f"nothing{of} could be verified: {asked[0]['reason']}")
    match = all(row["match"] is not False for row in rows)
    seconds = time.perf_counter() - started
    if args.json != "-":
        _print(rows, match, seconds)
    if args.json:
        record = {"schema": "resnet_fast.verify/1", "match": match, "seconds": round(seconds, 1)}
        output.write_json(record | {"environment": environment.record(), "rows": rows}, args.json)
    return 0 if match else 1


def _plan(quick: bool, device: str, only: str | None) -> Iterator[tuple[dict, Callable]]:
    """What to run: a row's description, and the call that gives its comparisons."""
    for backend in (only,) if only else dispatch.PRIORITY:
        cases = [(case, checks.check_op) for case in checks.OP_CASES if not quick or case.name in QUICK_OPS]
        cases += [(case, checks.check_block) for case in checks.BLOCK_CASES if not quick or case.name in QUICK_BLOCKS]
        for case, check in cases:
            for dtype in DTYPES[::2] if quick else DTYPES:
                for mode in checks.MODES[:2] if quick else checks.MODES:
                    for channels_last in (True,) if quick and dtype != torch.float32 else (True, False):
                        description = _describe(case.op, case.name, mode, dtype, channels_last, backend, device)
                        yield description, _bind(check, case, mode, dtype, channels_last, backend, device)
    for name in ("resnet18",) if quick else ("resnet18", "resnet50", "resnext50_32x4d"):
        for dtype in (torch.float32, torch.bfloat16):
            for how in ("optimize", "freeze"):
                backend = "frozen" if how == "freeze" else "auto"
                description = _describe("network", f"{name} {how}", "eval", dtype, True, backend, device)
                yield description, _bind(check_network, name, how, dtype, device)


def check_network(name: str, how: str, dtype: torch.dtype, device: str) -> list[numerics.Comparison]:
    """Logits of an optimized or frozen network; halves under autocast, or frozen in that dtype."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)
    images = images.to(memory_format=torch.channels_last)
    stock = networks.build(name, images)
    ours = optimize(copy.deepcopy(stock)) if how == "optimize" else freeze(stock, dtype=dtype)
    autocast = dtype != torch.float32
    with torch.inference_mode():
        with torch.autocast(device, dtype, enabled=autocast):
            expected = stock(images)
        with torch.autocast(device, dtype, enabled=autocast and how == "optimize"):
            actual = ours(images)
    return [numerics.compare("logits", actual, expected, networks.float64_logits(stock, images))]


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """float32 is float32. Where TF32 is allowed, cuDNN takes it in one algorithm and not in the next, so that PyTorch's
    own error, which ours is held against, depends on which it picks for which call."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _judge(check: Callable) -> dict:
    """A row's verdict. Only "this backend cannot run that" is a skip; any other exception is a mismatch."""
    try:
        with _without_tf32():
            comparisons = check()
    except BackendUnavailable as error:
        return {"match": None, "ratio": None, "tensor": None, "tensors": 0, "reason": str(error)}
    except Exception as error:
        reason = f"raised {type(error).__name__}: {error}"
        return {"match": False, "ratio": math.inf, "tensor": None, "tensors": 0, "reason": reason}
    worst = numerics.worst(comparisons)
    match = all(comparison.match for comparison in comparisons)
    reason = "; ".join(str(comparison) for comparison in comparisons if not comparison.match)
    return {"match": match, "ratio": worst.ratio, "tensor": worst.name, "tensors": len(comparisons), "reason": reason}


def _print(rows: list[dict], match: bool, seconds: float) -> None:
    groups = defaultdict(list)
    for row in rows:
        groups[row["op"], row["backend"], row["device"], row["dtype"], row["layout"]].append(row)
    table = Table("op", "backend", "device", "dtype", "layout", title_justify="left", title="against float64")
    table.add_column("cases", justify="right")
    table.add_column("worst error / allowed", justify="right")
    table.add_column("in")
    table.add_column("match")
    for key, group in groups.items():
        ran = [row for row in group if row["match"] is not None]
        if not ran:
            table.add_row(*key, "0", "-", group[0]["reason"], "not run", style="dim")
            continue
        worst = max(ran, key=lambda row: (row["match"] is False, row["ratio"]))
        where = f"{worst['case']}, {worst['mode']}: {worst['tensor'] or worst['reason']}"
        wrong = sum(row["match"] is False for row in ran)
        verdict = "[green]yes[/]" if not wrong else f"[bold red]NO ({wrong})[/]"
        table.add_row(*key, str(len(ran)), f"{worst['ratio']:.2f}", where, verdict)
    output.console.print(table)
    for row in rows:
        if row["match"] is False:
            case = " ".join(row[key] for key in ("op", "case", "mode", "dtype", "layout", "backend", "device"))
            output.console.print(f"MISMATCH {case}: {row['reason']}", style="red", markup=False)
    ran, wrong = sum(row["match"] is not None for row in rows), sum(row["match"] is False for row in rows)
    verdict = "all match" if match else f"{wrong} MISMATCH{'ES' if wrong > 1 else ''}"
    output.console.print(f"{ran} cases in {seconds:.0f} s: {verdict}", style="green" if match else "bold red")


def _describe(op, case, mode, dtype, channels_last, backend, device) -> dict:
    layout = "channels_last" if channels_last else "contiguous"
    name = dtype_name(dtype)
    return {"op": op, "case": case, "mode": mode, "dtype": name, "layout": layout, "backend": backend, "device": device}


def _bind(function: Callable, *args) -> Callable:
    return lambda: function(*args)

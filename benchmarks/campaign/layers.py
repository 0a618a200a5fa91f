"""Unit: the layers of every network at one batch size and dtype, by `resnet-fast tune`, which verifies what it times.

A kernel that takes the GPU down, or hangs, ends `tune`; it is started again and goes on behind that kernel.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from . import child
from .runner import ROOT
from .state import CRASHED, DONE, PARTIAL, WRONG

REHEARSED = {
    "infer": ("resnet18", "conv n1 64x4x4 k64*", 1),
    "train": ("resnet18", "conv n2 64x4x4 k64 * +statistics *", 1),
}
"""Network, problems and configurations of each: small enough for the interpreter."""

_MARGIN_S = 10.0  # what `tune` takes before its first problem and after its last
_HANG_S = 90.0  # it writes before every candidate
_REFUSED = 2  # exit code: a request that cannot be met
_MOST_DEATHS = 20


def main() -> int:
    """Runs `tune` until nothing is left, or the budget is spent."""
    parser = child.parser()
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--budget", required=True, type=float)
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--task", choices=tuple(REHEARSED), default="infer")
    for name in ("--dtype", "--batch-size", "--img-size", "--device", "--top"):
        parser.add_argument(name)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.rehearse:
        model, only, top = REHEARSED[args.task]
        chosen = ["--model", model, "--only", only, "--top", str(top)]
    else:
        chosen = ["--model", *args.model, "--top", args.top]
    command = [sys.executable, "-m", "resnet_fast", "tune", *chosen, "--output", str(args.output), "--task", args.task]
    command += ["-b", args.batch_size, "--dtype", args.dtype, "--img-size", args.img_size, "--device", args.device]
    end, deaths = time.monotonic() + args.budget, 0
    while True:
        before = _crashes(args.output)
        left = max(0.0, end - time.monotonic() - _MARGIN_S)
        code = _watched([*command, "--budget", f"{left:.0f}"], args.output)
        table = _read(args.output)
        if table is None or code == _REFUSED:
            return child.report(args.result, CRASHED, reason=f"tune ended with exit code {code}; see campaign.log")
        if code in (0, 1) and (table["left"] == 0 or _crashes(args.output) == before):
            return _report(args, table)
        deaths += 1
        if end - time.monotonic() < 2 * _MARGIN_S or deaths > _MOST_DEATHS:
            return _report(args, table)


def _watched(command: list[str], table: Path) -> int | None:
    """The exit code of `tune`; None if it had to be ended, because for long it wrote nothing."""
    process, started = subprocess.Popen(command, cwd=ROOT), time.time()
    while True:
        try:
            return process.wait(2.0)
        except subprocess.TimeoutExpired:
            written = table.stat().st_mtime if table.exists() else 0.0
            if time.time() - max(started, written) > _HANG_S:
                process.kill()
                process.wait()
                return None


def _report(args, table: dict) -> int:
    """What is in the table for this dtype and batch size."""
    wanted = {f"n{args.batch_size}", args.dtype}
    rows = {key: row for key, row in table["rows"].items() if wanted <= set(key.split())}
    wrong = [
        f"{key}: {label}"
        for key, row in rows.items()
        for label, reason in row["rejected"].items()
        if reason.startswith("wrong")
    ]
    triton = sum(row["config"] is not None for row in rows.values())
    summary = f"{len(rows)} layers, Triton fastest in {triton}, {table['left']} left, {len(table['failed'])} failed"
    summary += f", {sum(map(len, table['crashed'].values()))} kernels crashed" if table["crashed"] else ""
    status = PARTIAL if table["left"] else WRONG if wrong else DONE
    return child.report(args.result, status, reason="; ".join(wrong), summary=summary)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def _crashes(path: Path) -> int:
    """How many kernels are known to end the process, the one that was under way included."""
    table = _read(path) or {}
    return sum(map(len, table.get("crashed", {}).values())) + bool(table.get("trying"))


if __name__ == "__main__":
    sys.exit(main())

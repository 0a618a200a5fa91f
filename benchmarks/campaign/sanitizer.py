"""Unit: the native kernels under one tool of compute-sanitizer, on the quick GPU tests (test_native_* of test_gpu.py).

Only our own kernels are watched: with cuDNN's it would take hours. Tensors are not taken from PyTorch's cache, in which
an access beyond one is an access to another; a CUDA graph cannot be captured so.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from . import child
from .runner import ROOT
from .state import DONE, SKIPPED, WRONG

TOOLS = ("memcheck", "racecheck")
TESTS = "test_native and not graph"
OURS = "kernel_substring=resnet_fast"  # every kernel of csrc/cuda is in that namespace
_FOUND = 86  # exit code where the tool found something, which pytest has no use for
_NOTHING_RAN = 5


def main() -> int:
    """One row: what the tool summed up."""
    parser = child.parser()
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", TESTS, "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / "test_gpu.py")]
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not args.rehearse:
        if found is None:
            return child.report(args.result, SKIPPED, reason="no compute-sanitizer")
        command = [*watched(found, args.tool), *command]
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    status, reason, row = judged(args.tool, done.returncode, done.stdout)
    return child.report(args.result, status, reason=reason, summary=row["summary"], rows=[] if args.rehearse else [row])


def watched(sanitizer: str | Path, tool: str) -> list[str]:
    """What to put before a command."""
    options = ("--kernel-name", OURS, "--report-api-errors", "no") if tool == "memcheck" else ("--kernel-name", OURS)
    return [str(sanitizer), "--tool", tool, *options, "--error-exitcode", str(_FOUND)]


def judged(tool: str, code: int, said: str) -> tuple[str, str, dict]:
    """Status, reason and row of a run that ended with `code`."""
    summaries = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", said)
    counted = dict.fromkeys(("passed", "failed", "skipped"), 0)
    last = [line for line in said.splitlines() if re.search(r" in [\d.]+s", line)][-1:]
    counted |= {verdict: int(number) for number, verdict in re.findall(r"(\d+) (passed|failed|skipped)", "".join(last))}
    row = {"tool": tool, "summary": "; ".join(summaries), **counted}
    if code == 0:
        return DONE, "", row
    if code == _FOUND:
        return WRONG, f"{tool}: {row['summary'] or 'errors'}; see campaign.log", row
    if code == _NOTHING_RAN:
        return WRONG, "no test ran", row
    return WRONG, f"pytest ended with exit code {code}; see campaign.log", row


if __name__ == "__main__":
    sys.exit(main())

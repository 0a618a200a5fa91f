"""Unit: `resnet-fast verify` on the device: every op, block and network on one backend against float64."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from . import child
from .runner import ROOT
from .state import CRASHED, DONE, WRONG


def main() -> int:
    """One row, counted as the test files' are."""
    parser = child.parser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    command = [sys.executable, "-m", "resnet_fast", "verify", "--device", args.device]
    command += ["--backend", args.backend, *(["--quick"] if args.rehearse else [])]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "verify.json"
        code = subprocess.run([*command, "--json", str(report)], cwd=ROOT).returncode
        if code not in (0, 1):
            return child.report(args.result, CRASHED, reason=f"resnet-fast verify ended with exit code {code}")
        cases = json.loads(report.read_text())["rows"]
    wrong = [_name(case) for case in cases if case["match"] is False]
    skipped = sum(case["match"] is None for case in cases)
    row = {"passed": len(cases) - len(wrong) - skipped, "failed": len(wrong), "skipped": skipped, "failures": wrong}
    summary = f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
    return child.report(args.result, WRONG if wrong else DONE, reason=", ".join(wrong), summary=summary, rows=[row])


def _name(case: dict) -> str:
    return " ".join(case[key] for key in ("op", "case", "mode", "dtype", "backend"))


if __name__ == "__main__":
    sys.exit(main())

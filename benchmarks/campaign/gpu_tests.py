"""Unit: the tests marked gpu of one file, counted; their output is in campaign.log."""

import importlib.util
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from . import child
from .runner import ROOT
from .state import CRASHED, DONE, WRONG

_NOTHING_COLLECTED = 5
_SECONDS_A_TEST = 180


def main() -> int:
    """Runs pytest, in several processes and with a time limit a test where its plugins are there."""
    parser = child.parser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(args.path)]
    if not args.rehearse and importlib.util.find_spec("xdist"):
        command += ["-n", "4"]  # most of a test's time is Triton's compiler
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(_SECONDS_A_TEST)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        code = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT).returncode
        if code == _NOTHING_COLLECTED:
            return child.report(args.result, DONE, summary="no test collected")
        if not report.exists():
            return child.report(args.result, CRASHED, reason=f"pytest ended with exit code {code} and no report")
        row = counted(report)
    summary = f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
    status = DONE if code == 0 else WRONG
    return child.report(args.result, status, reason=", ".join(row["failures"]), summary=summary, rows=[row])


def counted(report: Path) -> dict:
    """Of a JUnit file: how many passed, failed (errors too) and were skipped; which failed; why they were skipped."""
    failures, reasons, passed = [], Counter(), 0
    for case in ElementTree.parse(report).iter("testcase"):
        verdicts = {verdict.tag: verdict for verdict in case}
        if "failure" in verdicts or "error" in verdicts:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in verdicts:
            reasons[verdicts["skipped"].get("message") or ""] += 1
        else:
            passed += 1
    counts = {"passed": passed, "failed": len(failures), "skipped": sum(reasons.values())}
    return counts | {"failures": failures, "skip_reasons": dict(reasons)}


if __name__ == "__main__":
    sys.exit(main())

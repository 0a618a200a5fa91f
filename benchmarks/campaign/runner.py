"""Running one unit: a process group of its own with a time limit, so that a hang or a crash costs that unit alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .state import CRASHED, TIMED_OUT

ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 5  # between asking a process to end and ending it


@dataclass(frozen=True)
class Outcome:
    """What a unit reported, or what became of it; rows are its results."""

    status: str
    reason: str = ""
    summary: str = ""
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    data: dict = field(default_factory=dict)


def run(module: str, args: Sequence[str], variables: dict[str, str], limit: float, log: Path) -> Outcome:
    """Run `python -m campaign.<module> --result FILE <args>`; its output is appended to `log`."""
    paths = [str(ROOT / "benchmarks"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **variables}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"campaign.{module}", "--result", str(result), *args]
        output.write(f"\n== {module} {' '.join(args)} (at most {limit:.0f} s)\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        seconds = round(time.monotonic() - started, 1)
        found = json.loads(result.read_text()) if result.exists() else None
    if code is None:
        return Outcome(TIMED_OUT, f"still running after {limit:.0f} s", seconds=seconds)
    if found is None:
        return Outcome(CRASHED, _death(code, log), seconds=seconds)
    return Outcome(seconds=seconds, **found)


def _end(process: subprocess.Popen) -> None:
    """End the process group, as far as it is still there: workers that it started too."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def _death(code: int, log: Path) -> str:
    """How a process ended, and the last line that it said."""
    lines = log.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}: {lines[-1] if lines else ''}"

"""What a unit's process has in common with the others: the arguments, and the report that `runner` reads."""

import argparse
import json
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """With --result; a unit adds its own."""
    found = argparse.ArgumentParser()
    found.add_argument("--result", required=True, type=Path)
    return found


def report(path: Path, status: str, *, reason: str = "", summary: str = "", rows=(), data=None) -> int:
    """Write the unit's outcome; returns the exit code for it."""
    found = {"status": status, "reason": reason, "summary": summary, "rows": list(rows), "data": data or {}}
    path.write_text(json.dumps(found, allow_nan=False))
    return 0

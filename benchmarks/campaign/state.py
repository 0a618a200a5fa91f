"""What is done: DIR/campaign.json, written whole after every unit, read by the next slice.

{"schema", "device": {"name", "label", "slug"}, "environment", "packages": {name: is it there},
"units": {name: {"status", "reason", "summary", "seconds", "kind", "check", "commit"}}}; kind and check are the unit's.
"""

import json
import os
from pathlib import Path

SCHEMA = "resnet_fast.campaign/1"

DONE, WRONG, CRASHED, TIMED_OUT, SKIPPED, PARTIAL = "done", "wrong", "crashed", "timed out", "skipped", "partial"
"""A unit's statuses. wrong: a check failed. crashed: its process ended without a report. partial: it goes on later."""

SETTLED = (DONE, WRONG, CRASHED, TIMED_OUT)
"""Statuses of units that are not run again unless asked for. What was skipped for want of a package may yet run."""


class State:
    """The file in memory."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder has a campaign.json that is something else."""
        self.path = folder / "campaign.json"
        self.data: dict = {"schema": SCHEMA, "device": None, "environment": {}, "packages": {}, "units": {}}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if not isinstance(found, dict) or found.get("schema") != SCHEMA:
                raise ValueError(f"{self.path} is not a {SCHEMA} file")
            self.data |= found

    @property
    def units(self) -> dict[str, dict]:
        return self.data["units"]

    def status(self, name: str) -> str | None:
        return self.units.get(name, {}).get("status")

    def record(self, name: str, **fields) -> None:
        """What became of a unit."""
        self.units[name] = fields
        self.save()

    def save(self) -> None:
        write(self.path, self.data)


def write(path: Path, data: dict) -> None:
    """JSON to `path`, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)

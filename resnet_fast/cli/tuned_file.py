"""The file that `tune` writes, row by row: a tuned table as `kernels.tables` reads it, and what is known of the work.

Beside the table's own keys: "timing" (how times were taken), "left" (how many of the problems last asked for are not
there yet), "failed" {problem: reason}, "crashed" {problem: {candidate: reason}}, and "trying" [problem, candidate],
what is under way: where a process died, the next one finds there what not to run again. A rehearsal under Triton's
interpreter has another schema, so that nothing takes it for a GPU's table.
"""

import json
import os
from pathlib import Path

from ..cpus import Device
from ..kernels import tables
from . import UserError, output

DIED = "the process ended while this ran: a crash, a hang or a kill"


class TunedFile:
    """`rows` and the rest in memory and on disk; every change is written at once, whole or not at all."""

    def __init__(self, path: Path, device: Device, environment: dict, *, rehearsal: bool = False) -> None:
        """Reads `path` where it exists.

        Raises:
            UserError: it holds something else, or another device's results.
        """
        self.path = path
        schema = f"{tables.SCHEMA} rehearsal, not of a GPU" if rehearsal else tables.SCHEMA
        self.head = {"schema": schema, device.kind: device.name, "environment": environment}
        found = _read(path, schema, device)
        self.timing: dict = found.get("timing", {})
        self.left: int | None = found.get("left")
        rows = found.get("rows", {}).items()
        self.rows: dict[str, dict] = {key: row for key, row in rows if tables.is_current(row.get("config"))}
        self.failed: dict[str, str] = found.get("failed", {})
        self.crashed: dict[str, dict[str, str]] = found.get("crashed", {})
        self.trying: list[str] | None = None
        if found.get("trying"):
            self.crash(*found["trying"], DIED)

    def known(self, key: str) -> bool:
        """Whether there is nothing left to do for this problem."""
        return key in self.rows or key in self.failed

    def forget(self, key: str) -> None:
        """Everything about this problem."""
        for part in (self.rows, self.failed, self.crashed):
            part.pop(key, None)

    def begin(self, key: str, label: str) -> None:
        """Note that a candidate is about to run for the first time."""
        self.trying = [key, label]
        self.save()

    def crash(self, key: str, label: str, reason: str) -> None:
        """The candidate ended the process, or its GPU context: it is not run again."""
        self.crashed.setdefault(key, {})[label] = reason
        self.trying = None
        self.save()

    def save(self) -> None:
        """Write all of it: to a temporary file beside, then into place."""
        data = {**self.head, "timing": self.timing, "left": self.left, "trying": self.trying}
        data |= {"failed": self.failed, "crashed": self.crashed, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with output.writing(self.path):
            temporary.write_text(_text(data))
            os.replace(temporary, self.path)


def _read(path: Path, schema: str, device: Device) -> dict:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        found_schema, found_name = found["schema"], found[device.kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no tuned table ({type(error).__name__}: {error}); name another --output") from None
    if found_schema != schema:
        raise UserError(f"{path} has schema {found_schema!r}, not {schema!r}; name another --output")
    if found_name != device.name:
        raise UserError(f"{path} holds the results of {found_name}, and this is {device.name}; name another --output")
    return found


def _text(data: dict) -> str:
    """JSON with one line a row, so that tables can be compared line by line."""
    lines = [f'"{key}": {json.dumps(value, allow_nan=False)}' for key, value in data.items() if key != "rows"]
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row, allow_nan=False)}" for key, row in data["rows"].items())
    return "{\n" + ",\n".join([*lines, f'"rows": {{\n{rows}\n}}']) + "\n}\n"

"""The results: one file a phase, DIR/<device>-<phase>.json, named and made so that it can be committed as it is.

{"schema", "device", "environment": {"versions", "commit", ...}, "rows": [...]}, a row being what a unit reported and
"unit", its name; training's are in the networks' file. The layers' file is a tuned table and the profile's is
`resnet-fast profile`'s own.
"""

import json
from pathlib import Path

from .state import State, write


def path_of(folder: Path, state: State, phase: str, suffix: str = "json") -> Path:
    """Where a phase's results go."""
    return folder / f"{state.data['device']['label']}-{phase}.{suffix}"


def put(folder: Path, state: State, phase: str, unit: str, rows: list[dict]) -> None:
    """Replace the rows of one unit."""
    path = path_of(folder, state, phase)
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in earlier if row["unit"] != unit]
    head = {"schema": f"resnet_fast.campaign.{phase}/1", "device": state.data["device"]}
    head |= {"environment": state.data["environment"]}
    write(path, head | {"rows": kept + [{"unit": unit, **row} for row in rows]})


def stamp(path: Path, commit: str) -> None:
    """Say in a file that a command wrote, if it did, which commit it is of, where that command could not know."""
    if not path.exists():
        return
    text = path.read_text()
    unknown = '"commit": null'
    if text.count(unknown) == 1:
        path.write_text(text.replace(unknown, f'"commit": {json.dumps(commit)}'))

"""Tuned tables: what was measured fastest for a problem on one device, by `resnet-fast tune`.

One JSON file a GPU or CPU model: those under kernels/tuned/ ship with the package, and a user's own, in the cache
directory, goes first. {"schema": "resnet_fast.tuned/1", "gpu" or "cpu": name, "environment": {...}, "rows": {problem
key: row}}, with a row {"config": {...} or null for the library's path (cuDNN, oneDNN), "us", "library_us": medians in
microseconds, "variant": which of the library's paths was its fastest, "times" and "rejected": all that was tried}.
"""

import functools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .. import _log
from ..cpus import Device
from ..problems import Problem
from .configs import Config, from_dict

SCHEMA = "resnet_fast.tuned/1"
SHIPPED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Row:
    """config: the fastest, None for the library's path, its fastest `variant`. us, library_us: medians.

    tried: the kernels and paths that were, by their labels' first words; empty where the table does not say.
    """

    config: Config | None
    us: float
    library_us: float | None
    variant: str = ""
    tried: frozenset[str] = frozenset()


def user_directory() -> Path:
    """Where `resnet-fast tune` writes: RESNET_FAST_CACHE, or resnet_fast in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RESNET_FAST_CACHE") or Path(cache) / "resnet_fast")


def paths(device: Device) -> tuple[Path, Path]:
    """The user's table and the shipped one, whether they exist or not."""
    return user_directory() / "tuned" / f"{device.slug}.json", SHIPPED / f"{device.slug}.json"


def why_none(device: Device) -> str | None:
    """Why there is nothing measured for this device; None where there is."""
    command = "resnet-fast tune --device cpu" if device.kind == "cpu" else "resnet-fast tune"
    return None if _rows(device) else f"nothing measured for {device.name}: run `{command}` on it"


def count(device: Device, dtype: str | None = None) -> int:
    """How many problems, or problems of this dtype, were measured on this device."""
    return sum(dtype is None or dtype in key.split() for key in _rows(device))


def count_library(device: Device) -> int:
    """In how many of them the library was fastest, so that it is taken."""
    return sum(row.config is None for row in _rows(device).values())


def lookup(problem: Problem, device: Device) -> tuple[Row, str] | None:
    """What was measured for this problem and the key it was measured under: its own, or a near batch size's, on a GPU
    of either half type, which are equally fast there."""
    rows, halves = _rows(device), ("bfloat16", "float16")
    if problem.key in rows:
        return rows[problem.key], problem.key
    size, shape = _batch(problem.key), _BATCH.sub("n", problem.key)
    same_shape = _by_shape(device).get(shape, ())
    if not same_shape and problem.dtype in halves and device.kind == "gpu":
        other = halves[problem.dtype == "bfloat16"]
        same_shape = _by_shape(device).get(shape.replace(f" {problem.dtype}", f" {other}"), ())
    distances = {key: abs(math.log(_batch(key) / size)) for key in same_shape}
    nearest = min(distances, key=lambda key: (distances[key], -_batch(key)), default=None)
    near = nearest is not None and distances[nearest] <= math.log(_FARTHEST)
    return (rows[nearest], nearest) if near else None


_FARTHEST = 8
"""How many times larger or smaller a batch may be that a row was measured for: beyond, other kernels are fastest."""

_BATCH = re.compile(r"\bn(\d+)\b")


def batch_of(key: str) -> str:
    """The part of a key that names its batch size: "n256"."""
    return _BATCH.search(key)[0]


def _batch(key: str) -> int:
    return max(1, int(_BATCH.search(key)[1]))


@functools.cache
def _by_shape(device: Device) -> dict[str, list[str]]:
    shapes: dict[str, list[str]] = {}
    for key in _rows(device):
        shapes.setdefault(_BATCH.sub("n", key), []).append(key)
    return shapes


def forget() -> None:
    """Read the tables again, for `tune` and the tests."""
    _rows.cache_clear()
    _by_shape.cache_clear()


@functools.cache
def _rows(device: Device) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for path in reversed(paths(device)):
        rows |= read(path, device)
    return rows


def read(path: Path, device: Device) -> dict[str, Row]:
    """The rows of one file; none, with a logged reason, where it cannot be used."""
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r} is not {SCHEMA!r}")
        if data[device.kind] != device.name:
            raise ValueError(f"it was measured on {data[device.kind]}, not {device.name}")
        rows = {key: _row(row) for key, row in data["rows"].items() if is_current(row["config"])}
        if len(rows) < len(data["rows"]):
            left = len(data["rows"]) - len(rows)
            _log.once(f"tuned table {path}: {left} rows are of kernels that have changed since, and not used")
        return rows
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.once(f"tuned table {path} is not used: {type(error).__name__}: {error}")
        return {}


def is_current(config: dict | None) -> bool:
    """Whether its kernel is there, with the same fields as when it was measured."""
    try:
        return config is None or from_dict(config) is not None
    except (KeyError, TypeError):
        return False


def _row(row: dict) -> Row:
    config = None if row["config"] is None else from_dict(row["config"])
    library_us = None if row["library_us"] is None else float(row["library_us"])
    tried = frozenset(label.split()[0] for label in (*row.get("times", ()), *row.get("rejected", ())))
    return Row(config, float(row["us"]), library_us, row.get("variant") or "", tried)

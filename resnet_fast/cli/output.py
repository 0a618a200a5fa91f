"""Where results go: the console, JSON, CSV. Paths are tried before the work starts, not after."""

import argparse
import contextlib
import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import UserError

console = Console(width=None if Console().is_terminal else 160, highlight=False)
"""Results: stdout. Where that is no terminal, wide enough for every table."""

notes = Console(stderr=True, highlight=False)
"""Progress and remarks: stderr, so that stdout can be piped."""


def progress() -> Progress:
    """A progress display on stderr; silent where stderr is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal)


def add_json_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """--json [FILE]"""
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help=f"{what} as JSON, to FILE or to stdout")


def positive(text: str) -> int:
    """An argument's type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive number"  # what argparse calls it in its error


def check_writable(path: str | Path | None) -> None:
    """Raise UserError unless a file at `path` can be written. None and "-" (stdout) can."""
    if path is None or str(path) == "-":
        return
    path = Path(path)
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name a file in a folder you can write to") from None
    if not existed:
        path.unlink()


def check_writable_folder(path: str | Path) -> Path:
    """`path` as a folder that exists and takes files; UserError where it cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".resnet_fast_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; name another folder with --output") from None
    return path


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around writing the file at `path`: UserError where the disk is full, or what was writable is so no longer."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {path}: {why}; make room there, or name another file, and run again") from None


def write_json(data: dict, path: str | Path) -> None:
    """`data` to `path`, or to stdout for "-". NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_plain(data), indent=2)
    if str(path) == "-":
        print(text)
    else:
        with writing(path):
            Path(path).write_text(text + "\n")


def write_csv(rows: Sequence[dict], path: str | Path) -> None:
    """One line a row; columns are the first row's keys."""
    with writing(path), Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)

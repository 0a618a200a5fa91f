"""Python code in a process of its own, in less time: a fork of one that has imported PyTorch.

That one has imported PyTorch and torchvision and computed nothing, so the environment still decides on threads and
instruction sets; of this package it knows nothing.
"""

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"])
    return context


def python(
    code: str, folder: Path | None = None, environment: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """`python -c code`: what it printed, and its return code. In `folder`, of which it imports first.

    environment: all of it, or None for this process's.
    """
    environment = dict(os.environ if environment is None else environment)
    with tempfile.TemporaryDirectory() as said:
        out, err = Path(said) / "out", Path(said) / "err"
        arguments = (code, folder, environment, out, err)
        process = _context().Process(target=_run, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(code, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(code, process.exitcode, out.read_text(), err.read_text())


def module(name: str, *arguments: str, **settings) -> subprocess.CompletedProcess:
    """The same as `python -m name`."""
    return python(f"{_ARGUMENTS.format(list(arguments))}runpy.run_module({name!r}, run_name='__main__')", **settings)


def script(path: Path, *arguments: str, **settings) -> subprocess.CompletedProcess:
    """The same as `python path`."""
    code = f"{_ARGUMENTS.format(list(arguments))}sys.path.insert(0, {str(path.parent)!r}); "
    return python(f"{code}runpy.run_path({str(path)!r}, run_name='__main__')", **settings)


_ARGUMENTS = "import runpy, sys; sys.argv[1:] = {!r}; "


def _run(code: str, folder: Path | None, environment: dict[str, str], out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
    sys.argv = ["-c"]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})

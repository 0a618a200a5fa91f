"""Run something that may die in a forked child, and say what became of it."""

import faulthandler
import os
import resource
import signal
import warnings
from collections.abc import Callable

PASSED = "passed"


def outcome(function: Callable[[], object], seconds: int = 120) -> str:
    """PASSED, "SIGSEGV" or another signal's name, or the exception that `function` raised in the child.

    A fork, because a new process would import PyTorch again each time. PyTorch's threads do not survive it, so this
    process must run with one.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork beside xdist's thread
        child = os.fork()
    if child == 0:
        _run(function, writer, seconds)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return text or f"exit status {os.waitstatus_to_exitcode(status)}"


def _run(function: Callable[[], object], writer: int, seconds: int) -> None:
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(seconds)
        function()
        text = PASSED
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    os.write(writer, text[:2000].encode())
    os._exit(0)

"""The kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/interpreted`.

A process of its own, because Triton decides what a kernel is when it is imported. Without the variable everything here
is skipped; with it nothing is.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent


def why_not() -> str | None:
    """Why kernels imported in this process do not run in the interpreter; None where they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from triton import knobs

    if not knobs.runtime.interpret:
        return "interpreted kernels need a process of their own: TRITON_INTERPRET=1 python -m pytest tests/interpreted"
    return None


def pytest_collection_modifyitems(config, items) -> None:
    """Skip one test, with the reason, for all that are here: 600 lines of it would say no more."""
    here = [item for item in items if HERE in item.path.parents]
    reason = why_not()
    if not here or reason is None:
        return
    here[0].add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=here[1:])
    dropped = set(here[1:])
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session", autouse=True)
def _interpreter():
    """Right for bfloat16, and faster; and one thread, because children are forked."""
    if why_not() is None:
        from interpreted import bf16, faster

        version = tuple(int(part) for part in np.__version__.split(".")[:2])
        assert version < (2, 4), (
            f"Triton 3.6's interpreter fails with numpy {np.__version__}; constraints.txt says < 2.4"
        )
        bf16.install()
        faster.install()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""What every test gets: a seed, a clean log, a dispatch that forgets, memory full of NaN on request; and backends.

With RESNET_FAST_EMULATE_AMX the C++ extension is one that emulates AMX (`emulation`).
"""

import os
import shutil

import emulation
import numpy as np
import pytest
import torch
from cases import CPU

from resnet_fast import _log, cpus, dispatch
from resnet_fast.kernels import selection, tables
from resnet_fast.layers import any_size


def native_expected() -> bool:
    """Whether this run must have the native backend: a build was asked for and a compiler is there.

    RESNET_FAST_EXPECT_NATIVE=1 or 0 decides; without it RESNET_FAST_BUILD, which `make test` sets.
    """
    explicit = os.environ.get("RESNET_FAST_EXPECT_NATIVE")
    if explicit is not None:
        return explicit != "0"
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return os.environ.get("RESNET_FAST_BUILD", "none") != "none" and any(c and shutil.which(c) for c in compilers)


def native_missing() -> str | None:
    """Why the native backend cannot run here; None where it can."""
    return dispatch.load("native").available()


def pytest_configure(config) -> None:
    if emulation.mode() is None:
        return
    if not hasattr(config, "workerinput"):  # the process that starts the others, if there are others
        if (reason := emulation.why_not()) is not None:
            pytest.exit(f"nothing to emulate: {reason}", returncode=0)
        emulation.build()
    emulation.install()


def pytest_ignore_collect(collection_path) -> bool | None:
    """Of a file without a test that is wanted, so that it need not be imported; None leaves it to others."""
    unwanted = emulation.mode() == "marked" and collection_path.suffix == ".py"
    return True if unwanted and "mark.amx" not in collection_path.read_text() else None


def pytest_collection_modifyitems(config, items) -> None:
    if emulation.mode() == "marked":
        chosen = [item for item in items if emulation.concerns(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["reference", "native"])
def backend(request) -> str:
    """Each backend's name; one that cannot run here is skipped with its reason, or fails if it was expected."""
    if request.param == "native" and (reason := native_missing()):
        (pytest.fail if native_expected() else pytest.skip)(reason)
    return request.param


@pytest.fixture
def native() -> str:
    """The native backend's name, where it runs."""
    if reason := native_missing():
        (pytest.fail if native_expected() else pytest.skip)(reason)
    return "native"


@pytest.fixture(autouse=True)
def _clean_state(monkeypatch):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test may use the global generator)
    monkeypatch.delenv("RESNET_FAST_DISABLE", raising=False)
    _log.forget()
    dispatch.clear_cache()
    threads = torch.get_num_threads()
    with any_size():
        yield
    torch.set_num_threads(threads)
    _log.forget()
    dispatch.clear_cache()


@pytest.fixture
def poison():
    """Uninitialised tensors are NaN while the test runs, so an output that is not fully written shows."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def unmeasured_cpu(monkeypatch, tmp_path):
    """This machine is `cases.CPU`, which nothing is measured on; the path of its table in the user's cache."""
    monkeypatch.setattr(cpus, "here", lambda: CPU)
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    selection.forget()
    path = tables.paths(CPU)[0]
    path.parent.mkdir(parents=True)
    yield path
    monkeypatch.undo()
    selection.forget()


@pytest.fixture
def said(caplog):
    """Call it for the package's log messages so far."""
    caplog.set_level("INFO", logger="resnet_fast")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "resnet_fast"]

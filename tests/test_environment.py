"""Broken and bare installations, in processes of their own: it imports, works, warns once, and `info` explains."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import fresh
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "resnet_fast"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

USE = """
import logging, torch, torchvision, copy
logging.basicConfig(format="LOG %(message)s")
import resnet_fast
from resnet_fast import dispatch
torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=3).eval()
fast = resnet_fast.optimize(copy.deepcopy(model))
x = torch.randn(1, 3, 32, 32)
for _ in range(2):
    torch.testing.assert_close(fast(x), model(x))
print("REASON", dispatch.why_not("native", "bn_act", "cpu", torch.float32))
try:
    resnet_fast.functional.bn_act(x, torch.zeros(3), torch.ones(3), backend="native")
except resnet_fast.BackendUnavailable as error:
    print("RAISED", error)
with resnet_fast.memory.pooled():
    torch.ones(1 << 20)
resnet_fast.freeze(model)(x)
"""


# An editable install's finder answers for every module of the package, wherever the package itself was found.
NO_EDITABLE_FINDER = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


@pytest.fixture
def bare(tmp_path):
    """A copy of the package without its extension: (its parent folder, where an extension would be)."""
    shutil.copytree(PACKAGE, tmp_path / "resnet_fast", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path, tmp_path / "resnet_fast" / f"_C{SUFFIX}"


def python(folder, code, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "RESNET_FAST_BACKEND"}
    environment = inherited | {"OMP_NUM_THREADS": "1"} | environment
    return fresh.python(NO_EDITABLE_FINDER + code, folder, environment)


def info(folder):
    code = "import runpy; sys.argv[1:] = ['info', '--json']; runpy.run_module('resnet_fast', run_name='__main__')"
    return python(folder, code)


def use(folder, **environment):
    done = python(folder, USE, **environment)
    assert done.returncode == 0, done.stderr
    reason = next(line for line in done.stdout.splitlines() if line.startswith("REASON ")).removeprefix("REASON ")
    raised = next(line for line in done.stdout.splitlines() if line.startswith("RAISED "))
    assert reason in raised
    assert "Usable here: reference" in raised
    warnings = [line for line in done.stderr.splitlines() if line.startswith("LOG native backend off")]
    return reason, warnings


def test_missing_extension(bare):
    folder, _ = bare
    reason, warnings = use(folder)
    assert "resnet_fast._C is not built" in reason
    assert "pip install" in reason
    assert warnings == [], "a pure-Python installation is no accident"
    done = info(folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["backends"]
    assert any("is not built" in (row["reason"] or "") for row in rows if row["backend"] == "native")


@pytest.mark.parametrize("content", [b"", b"this is no library", b"\x7fELF" + bytes(60)], ids=["empty", "text", "cut"])
def test_corrupt_extension(bare, content):
    folder, extension = bare
    extension.write_bytes(content)
    reason, warnings = use(folder)
    assert "does not load" in reason
    assert len(warnings) == 1, warnings


def test_info_names_a_corrupt_extension(bare):
    folder, extension = bare
    extension.write_bytes(b"")
    done = info(folder)
    assert done.returncode == 1
    assert any(extension.name in line for line in json.loads(done.stdout)["broken"])


def test_extension_of_another_torch(bare):
    """Loadable, but built for another version: refused before any op of it runs."""
    folder, _ = bare
    stub = 'def build_info():\n    return {"torch_version": "2.3.1", "cuda_version": None}\n'
    (folder / "resnet_fast" / "_C.py").write_text(stub)
    reason, warnings = use(folder)
    assert "was built for torch 2.3.1" in reason
    assert len(warnings) == 1


def test_extension_of_another_abi(bare):
    folder, _ = bare
    info = (
        '{"torch_version": torch.__version__, "cuda_version": None, "cxx11_abi": not torch.compiled_with_cxx11_abi()}'
    )
    (folder / "resnet_fast" / "_C.py").write_text(f"import torch\ndef build_info():\n    return {info}\n")
    reason, warnings = use(folder)
    assert "has another C++ ABI than torch" in reason
    assert len(warnings) == 1


def test_extension_of_another_version_of_this_package(bare):
    """Loadable and of this torch, but left by an earlier build: it lacks ops that this Python code calls."""
    folder, _ = bare
    info = '{"torch_version": torch.__version__, "cuda_version": None}'
    (folder / "resnet_fast" / "_C.py").write_text(f"import torch\ndef build_info():\n    return {info}\n")
    reason, warnings = use(folder)
    assert "is of another version and lacks " in reason
    assert " bn_act, " in reason
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("source", "word"),
    [("int unrelated;", "PyInit__C"), ("void missing(void); void PyInit__C(void) { missing(); }", "undefined symbol")],
    ids=["no_module", "undefined_symbol"],
)
def test_shared_library_of_something_else(bare, source, word):
    """What a compiler of another ABI leaves: a library that the loader or Python refuses."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder, extension = bare
    (folder / "other.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", "-Wl,-z,now", "other.c", "-o", str(extension)]
    subprocess.run(command, check=True, cwd=folder, timeout=60)
    reason, warnings = use(folder)
    assert "does not load" in reason
    assert word in reason
    assert len(warnings) == 1


def test_extension_that_misses_a_library(bare):
    folder, _ = bare
    (folder / "resnet_fast" / "_C.py").write_text(
        'raise ImportError("libcudart.so.99: cannot open shared object file")\n'
    )
    reason, warnings = use(folder)
    assert "libcudart.so.99" in reason
    assert len(warnings) == 1


def test_read_only_home(bare):
    folder, _ = bare
    home = folder / "home"
    home.mkdir(mode=0o500)
    use(folder, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
    assert list(home.iterdir()) == []


def test_import_builds_and_writes_nothing(bare):
    folder, _ = bare
    before = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    code = f"{NO_EDITABLE_FINDER}import resnet_fast; print(resnet_fast.__version__)"
    command = [sys.executable, "-W", "error", "-c", code]  # from the start, PyTorch included
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {path for path in folder.rglob("*") if "__pycache__" not in path.parts} == before


def test_the_log_level_is_an_environment_variable(bare):
    folder, _ = bare
    assert "native" not in python(folder, USE, RESNET_FAST_LOG="ERROR").stderr
    quiet = python(folder, USE)
    assert "LOG FastBasicBlock runs its stock forward" in quiet.stderr or "LOG" not in quiet.stderr

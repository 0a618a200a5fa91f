"""The layout as README.md has it: imports go one way, those inside functions too, which only put off loading."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fresh
import pytest

import resnet_fast

ROOT = Path(resnet_fast.__file__).parent


def imports(root: Path) -> dict[str, set[str]]:
    """The modules of the package in `root` that each of its modules imports, at the top or in a function."""
    files = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                above = package.rsplit(".", node.level - 1)[0] if node.level else ""
                module = ".".join(filter(None, (above, node.module)))
                names = {f"{module}.{alias.name}" for alias in node.names}
                found[name] |= {inner if inner in files else module for inner in names} & files.keys()
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & files.keys()
    return found


def test_imports_go_one_way():
    found = imports(ROOT)
    assert len(found) > 90
    assert "resnet_fast.extension" in found["resnet_fast.backends.native"]
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("late", ["from .one import b", "from . import one", "import package.one"])
def test_a_circle_is_found(tmp_path, late):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from .one import a\n")
    (package / "one.py").write_text("from .two import a\n")
    (package / "two.py").write_text(f"def a():\n    {late}\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(package)).prepare()


def test_only_what_launches_imports_triton():
    """Every module that is imported where Triton is not: all but the kernels and what calls them."""
    code = """
import importlib, pkgutil, sys, torch, torchvision
sys.modules["triton"] = None  # which makes its import an error
import resnet_fast
failed = []
for module in pkgutil.walk_packages(resnet_fast.__path__, "resnet_fast."):
    if module.name.endswith(("__main__", "timm_models", "._C")):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name == "triton" or "triton" in str(error), error
        failed.append(module.name.removeprefix("resnet_fast."))
print(*sorted(failed))
"""
    done = fresh.python(code)
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.split())
    others = {name for name in names if not name.startswith(("kernels.", "backends.triton_"))}
    assert others == {"backends.primitives.triton", "cli.workloads.training"}
    chosen_without = ("config_types", "configs", "cost", "direct", "selection", "tables", "winograd")
    assert not names & {f"kernels.{name}" for name in chosen_without}
    assert {"backends.triton_launch", "kernels.conv_tma"} <= names

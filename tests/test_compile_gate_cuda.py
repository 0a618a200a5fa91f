"""The CUDA sources compile well; no GPU takes part.

What is read are the kernels in the extension as it was built, and with RESNET_FAST_GATE=all, as `make gate` sets it,
the sources compiled anew for sm_80, sm_90 and sm_100, and linked.

Well means: no register is spilled, no stack frame, and the convolution's main loop is what it was written as.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
GATE = os.environ.get("RESNET_FAST_GATE") == "all"
only_gate = pytest.mark.skipif(
    not GATE, reason="what was built links; RESNET_FAST_GATE=all compiles for other GPUs too"
)


def _built_archs() -> tuple[str, ...]:
    """What the extension has kernels for; empty where it is not built or has none."""
    try:
        from resnet_fast import _C
    except ImportError:
        return ()
    found = re.findall(r"(\d+)\.(\d+)", _C.build_info().get("cuda_archs") or "")
    return tuple(major + minor for major, minor in found)


ARCHES = ("80", "90", "100") if GATE else _built_archs()
SOURCES = ("bn_act", "conv_bn_act")
KERNELS = {"map_kernel": 4 * 3 * 2 * 2, "reduce_kernel": 4 * 2 * 2 * 2, "merge_kernel": 4, "conv_kernel": 4}
"""How many there are for one architecture."""
LIMITS = {"conv_kernel": 128, "map_kernel": 128, "reduce_kernel": 128, "merge_kernel": 128}
"""Registers with which two blocks are on a multiprocessor at once."""

_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """What `cuobjdump -res-usage` tells of one."""

    name: str
    registers: int
    stack: int
    local: int


def nvcc() -> Path:
    home = Path("/usr/local/cuda/bin/nvcc")
    found = shutil.which("nvcc") or (str(home) if home.is_file() else None)
    if found is None:
        pytest.skip("no nvcc")
    if torch.version.cuda is None:
        pytest.skip("a PyTorch without CUDA has no headers to compile with")
    if not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("csrc/ is not beside the tests")
    return Path(found)


def wheels(folder: str) -> Iterator[Path]:
    """Where the packages that PyTorch depends on keep CUDA's headers or libraries."""
    spec = importlib.util.find_spec("nvidia")
    for package in (spec.submodule_search_locations or []) if spec else []:
        yield Path(package) / f"cu{torch.version.cuda.split('.')[0]}" / folder


def cuobjdump() -> str:
    """CUDA's, or the one that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(path) / "backends" / "nvidia" / "bin" for path in (spec.submodule_search_locations if spec else [])]
    for candidate in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump", *(f / "cuobjdump" for f in folders)):
        if candidate and Path(candidate).is_file():
            return str(candidate)
    pytest.skip("no cuobjdump")


def run(*command) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Mapping[str, tuple[list[Path], str]]:
    """Architecture -> where its kernels are, and what the compiler said, where that is not long past."""
    if not GATE:
        from resnet_fast import _C

        return {arch: ([Path(_C.__file__)], "") for arch in ARCHES}
    compiler, folder = nvcc(), tmp_path_factory.mktemp("objects")
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths(), *wheels("include"))]
    flags = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas=-warn-spills", "-Xcompiler=-fPIC", *includes)

    class Compiled(dict):
        def __missing__(self, arch):
            targets, said = [], ""
            for source in SOURCES:
                targets.append(folder / f"{source}-{arch}.o")
                command = ("-c", ROOT / "csrc" / "cuda" / f"{source}.cu", "-o", targets[-1])
                said += run(compiler, *flags, f"-gencode=arch=compute_{arch},code=sm_{arch}", *command)
            return self.setdefault(arch, (targets, said))

    return Compiled()


def kernels_of(path: Path, arch: str) -> list[Kernel]:
    said = run(cuobjdump(), "-res-usage", "-arch", f"sm_{arch}", path)
    return [Kernel(name, *map(int, numbers)) for name, *numbers in _RESOURCES.findall(said)]


def test_what_can_be_built_is_built():
    """A CUDA build that fails leaves one without, which has nothing to read."""
    if os.environ.get("RESNET_FAST_BUILD") not in ("auto", "cuda"):
        pytest.skip("RESNET_FAST_BUILD asks for no CUDA")
    release = re.search(r"release (\d+)", run(nvcc(), "--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        pytest.skip(f"nvcc is not of CUDA {torch.version.cuda}")
    assert _built_archs(), "the extension has no CUDA kernels; the compiler's messages are in .venv/pip.log"


@pytest.mark.parametrize("arch", ARCHES)
def test_no_kernel_spills(arch, compiled):
    paths, said = compiled[arch]
    assert "spill" not in said, said
    found = [kernel for path in paths for kernel in kernels_of(path, arch)]
    for name, count in KERNELS.items():
        assert sum(name in kernel.name for kernel in found) == count, [kernel.name for kernel in found]
    for kernel in found:
        assert kernel.stack == kernel.local == 0, kernel
        limit = next(limit for name, limit in LIMITS.items() if name in kernel.name)
        assert kernel.registers <= limit, kernel


@pytest.mark.parametrize("arch", ARCHES)
def test_the_convolution_is_made_of_what_it_should_be(arch, compiled):
    said = [run(cuobjdump(), "-sass", "-arch", f"sm_{arch}", path) for path in compiled[arch][0]]
    functions = [function for text in said for function in text.split("Function : ")[1:]]
    functions = [function for function in functions if "conv_kernel" in function.splitlines()[0]]
    assert len(functions) == KERNELS["conv_kernel"]
    for function in functions:
        for instruction in ("HMMA.16816.F32", "LDGSTS", "LDSM.16.M88.4", "LDGDEPBAR", "STG.E.128"):
            assert instruction in function, f"no {instruction} in {function.splitlines()[0]}"
        for instruction in ("LDL", "STL"):
            assert not re.search(rf"\b{instruction}\b", function), instruction


def test_a_kernel_that_spills_is_noticed(tmp_path):
    """The test above can fail: the same reading of a kernel that is made to spill."""
    source = tmp_path / "spills.cu"
    lines = "".join(f"  float v{i} = x[threadIdx.x + {i} * n];\n" for i in range(96))
    sums = "".join(f"  x[{i} * n] = v{i} * v{(i * 7 + 1) % 96};\n" for i in range(96))
    source.write_text(
        f"__global__ void __maxnreg__(32) bad_kernel(float* x, int n) {{\n{lines}  __syncthreads();\n{sums}}}\n"
    )
    target = tmp_path / "spills.o"
    said = run(nvcc(), "-O3", "-Xptxas=-warn-spills", "-gencode=arch=compute_80,code=sm_80", "-c", source, "-o", target)
    (kernel,) = kernels_of(target, "80")
    assert "spill" in said
    assert kernel.stack + kernel.local > 0


@only_gate
@pytest.mark.parametrize("arch", ARCHES)
def test_it_links(arch, compiled, tmp_path):
    paths, _ = compiled[arch]
    runtime = sorted(path for folder in wheels("lib") for path in folder.glob("libcudart.so*"))
    # Through -Xlinker: nvcc takes no file that is called .so.13.
    runtime = ["-cudart=none", *(f"-Xlinker={path}" for path in runtime)] if runtime else ["-cudart=shared"]
    folders = [*library_paths(), *filter(Path.is_dir, wheels("lib"))]
    run(
        nvcc(), "-shared", "-Xlinker=--no-undefined", *paths, *(f"-L{folder}" for folder in folders),
        "-lc10", "-lc10_cuda", *runtime, "-o", tmp_path / "kernels.so",
    )  # fmt: skip

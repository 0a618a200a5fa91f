"""The CUDA sources compile well, and link; no GPU takes part. Skipped without nvcc.

For sm_90, and with RESNET_FAST_GATE=all, as `make gate` sets it, for sm_80 and sm_100 too.

Well means: no register is spilled, no stack frame, and the convolution's main loop is what it was written as.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ARCHES = ("80", "90", "100") if os.environ.get("RESNET_FAST_GATE") == "all" else ("90",)
KERNELS = {  # of each source, in its object for one architecture
    "bn_act": {"map_kernel": 4 * 3 * 2 * 2, "reduce_kernel": 4 * 2 * 2 * 2, "merge_kernel": 4},
    "conv_bn_act": {"conv_kernel": 4},
}
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
def objects(tmp_path_factory) -> dict[tuple[str, str], tuple[Path, str]]:
    """(source, architecture) -> the object and what the compiler said, made when first asked for."""
    compiler, folder = nvcc(), tmp_path_factory.mktemp("objects")
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths(), *wheels("include"))]

    class Objects(dict):
        def __missing__(self, key):
            source, arch = key
            target = folder / f"{source}-{arch}.o"
            flags = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas=-warn-spills", "-Xcompiler=-fPIC")
            file = ROOT / "csrc" / "cuda" / f"{source}.cu"
            said = run(
                compiler, *flags, *includes, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", file, "-o", target
            )
            return self.setdefault(key, (target, said))

    return Objects()


def kernels_of(path: Path) -> list[Kernel]:
    said = run(cuobjdump(), "-res-usage", path)
    return [Kernel(name, *map(int, numbers)) for name, *numbers in _RESOURCES.findall(said)]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", KERNELS)
def test_no_kernel_spills(source, arch, objects):
    path, said = objects[source, arch]
    assert "spill" not in said, said
    found = kernels_of(path)
    for name, count in KERNELS[source].items():
        assert sum(name in kernel.name for kernel in found) == count, [kernel.name for kernel in found]
    for kernel in found:
        assert kernel.stack == kernel.local == 0, kernel
        limit = next(limit for name, limit in LIMITS.items() if name in kernel.name)
        assert kernel.registers <= limit, kernel


@pytest.mark.parametrize("arch", ARCHES)
def test_the_convolution_is_made_of_what_it_should_be(arch, objects):
    path, _ = objects["conv_bn_act", arch]
    functions = run(cuobjdump(), "-sass", path).split("Function : ")[1:]
    assert len(functions) == 4
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
    (kernel,) = kernels_of(target)
    assert "spill" in said
    assert kernel.stack + kernel.local > 0


@pytest.mark.parametrize("arch", ARCHES)
def test_it_links(arch, objects, tmp_path):
    paths = [objects[source, arch][0] for source in KERNELS]
    runtime = sorted(path for folder in wheels("lib") for path in folder.glob("libcudart.so*"))
    # Through -Xlinker: nvcc takes no file that is called .so.13.
    runtime = ["-cudart=none", *(f"-Xlinker={path}" for path in runtime)] if runtime else ["-cudart=shared"]
    folders = [*library_paths(), *filter(Path.is_dir, wheels("lib"))]
    run(
        nvcc(), "-shared", "-Xlinker=--no-undefined", *paths, *(f"-L{folder}" for folder in folders),
        "-lc10", "-lc10_cuda", *runtime, "-o", tmp_path / "kernels.so",
    )  # fmt: skip

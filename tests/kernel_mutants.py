"""Mutants of csrc/cpu/conv_kernels: copies in namespaces of their own, compiled into one library."""

import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from host_compiler import host_compiler
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cpu" / "conv_kernels"

ORIGINAL = "original"

Mutants = Mapping[str, tuple[str, str]]
"""Name -> what stands once in the sources, and what instead of it; both empty for ORIGINAL, the first."""


def compile_mutants(
    folder: Path, mutants: Mutants, sources: Sequence[Path], harness: str, sizes: tuple[str, str, str]
) -> ctypes.CDLL:
    """All copies in one library, for AVX2, whose loops are the longest. Skips where there is nothing to compile.

    harness: a file of tests/csrc, which includes MUTANT_COPIES and makes MUTANT_NAMES(entry) callable.
    sizes: a header of csrc/cpu and what stands in it, and instead of it, for all copies: of fewer rows at once there is
        less to compile.
    """
    compiler = host_compiler()
    if not KERNELS.is_dir():
        pytest.skip("csrc/ is not beside the tests")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU has no AVX2")
    copies, target = folder / "copies.h", folder / "mutants.so"
    header, before, after = sizes
    text = (ROOT / "csrc" / "cpu" / header).read_text()
    assert text.count(before) == 1, f"{header} is out of date"
    (folder / "cpu").mkdir()
    (folder / "cpu" / header).write_text(text.replace(before, after))
    copies.write_text("\n".join(_copy(name, sources, *mutation) for name, mutation in mutants.items()))
    entries = " ".join(f"entry({name})" for name in mutants)
    defines = ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", f"-DMUTANT_NAMES(entry)={entries}"]
    defines += [f'-DMUTANT_COPIES="{copies}"']
    includes = [f"-I{path}" for path in (folder, ROOT / "csrc", *include_paths())]  # folder first, for its sizes
    flags = ["-O0", "-std=c++20", "-shared", "-fPIC", "-w", "-mavx2", "-mfma", "-mf16c"]
    source = ROOT / "tests" / "csrc" / harness
    subprocess.run([*compiler, *flags, *defines, *includes, str(source), "-o", str(target)], check=True, timeout=300)
    return ctypes.CDLL(str(target))


def _copy(name: str, sources: Sequence[Path], before: str, after: str) -> str:
    """The sources with their mutation, in a namespace `name`, without includes.

    Of a mutation that no header sees only its own source is copied: the others are the original's, which is first.
    """
    texts = {source: source.read_text() for source in sources}
    scope = f"namespace {name} {{"
    if before:
        assert "\n".join(texts.values()).count(before) == 1, f"the mutant {name} is out of date"
        [mutated] = [source for source, text in texts.items() if before in text]
        if mutated.suffix != ".h":
            texts, scope = {mutated: texts[mutated]}, f"{scope} using namespace {ORIGINAL};"
        texts[mutated] = texts[mutated].replace(before, after)
    body = "\n".join(
        line for line in "\n".join(texts.values()).splitlines() if not line.startswith(("#include", "#pragma"))
    )
    body = body.replace("C10_ALWAYS_INLINE", "inline").replace("RF_INLINE_LAMBDA", "")  # which takes time without -O
    opening, closing = "namespace CPU_CAPABILITY {", "}  // namespace CPU_CAPABILITY"
    return body.replace(opening, f"{opening} {scope}").replace(closing, f"}} {closing}")


def notices(check: Callable[..., None], *functions) -> bool:
    """Whether `check` fails of what these compute."""
    try:
        check(*functions)
    except AssertionError:
        return True
    return False


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of x with NaN before and behind it, where mutants may read and write."""
    around = torch.full((3 * x.numel(),), float("nan"))
    inside = around[x.numel() : 2 * x.numel()]
    return inside.as_strided(x.shape, x.stride(), inside.storage_offset()).copy_(x)


def close(y: torch.Tensor, wide: torch.Tensor) -> None:
    """y, which is guarded, beside what it should be, and untouched around it."""
    assert int(y._base.isnan().sum()) == 2 * y.numel()
    scale = float(wide.abs().max())
    torch.testing.assert_close(y / scale, (wide / scale).float(), rtol=1e-5, atol=1e-5)

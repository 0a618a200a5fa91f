"""Builds resnet_fast with, where it can, its native extension resnet_fast._C. Metadata lives in pyproject.toml.

RESNET_FAST_BUILD chooses what is compiled:
    auto  (default) C++ where a compiler is; CUDA as well where nvcc and a CUDA build of PyTorch agree. What cannot be
          built is left out, with the reason.
    cuda  C++ and CUDA, or an error        cpu   C++, or an error        none  pure Python
MAX_JOBS limits the compilers run at once (default: the cores). TORCH_CUDA_ARCH_LIST says what GPUs to compile for
(default: those of this machine; without one, "8.0;9.0+PTX").

The command emulate_amx makes an extension whose AMX kernels run on CPUs without AMX, for tests: tests/emulation.py,
which gives it the compiler's flags in RESNET_FAST_EMULATED_AMX_FLAGS.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cuda", "cpu", "none")
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
# GCC 12 raises these three some 1,900 times inside its own avx512fintrin.h and PyTorch's vec headers, wrongly.
CXX_FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
CXX_FLAGS += ["-Wno-stringop-overflow"]
NVCC_FLAGS = ["-O3", "-Xcompiler=-fvisibility=hidden", "-Xptxas=-warn-spills"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Every csrc/cpu/kernels/*.cpp is compiled once per row, and picked at run time (at::get_cpu_capability); those of
# csrc/cpu/conv_kernels are not for DEFAULT, where the library's convolutions are faster.
# DEFAULT comes first, in compiling and in linking: where an inline function of the standard library is emitted in
# several of them, the linker keeps the first, so code that any CPU may reach never holds AVX instructions.
ISA_FLAGS = {
    "DEFAULT": ["-O2"] if IS_X86 else [],  # where -O3 takes twice as long to unroll what hardly a CPU runs
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
# csrc/cpu/amx/*.cpp, compiled once where the compiler knows them; run only where the CPU and the system have AMX.
AMX_FLAGS = ["-mamx-tile", "-mamx-bf16", "-mavx512bf16", *ISA_FLAGS["AVX512"]]
# What stands in for the question whether the CPU has them where they are emulated.
EMULATED_AMX_SOURCES = {"csrc/cpu/program/usable.cpp": "tests/csrc/amx_usable.cpp"}
# What most of csrc/ and of the kernels of each instruction set includes, and half of what it takes to compile.
COMMON_HEADERS = ("ATen/core/Tensor.h", "ATen/Parallel.h", "ATen/ops/empty.h", "ATen/ops/zeros.h")
KERNEL_HEADERS = ("ATen/cpu/vec/functional.h", "ATen/cpu/vec/vec.h")
# Commands that only describe the package must not pay for importing torch, nor need it.
METADATA_COMMANDS = {"egg_info", "dist_info", "sdist", "clean", "--version", "--name", "--help"}


def say(text: str) -> None:
    """Prints one line of the build's own; scripts/setup.sh looks for the prefix in pip's log."""
    print(f"resnet-fast build: {text}", file=sys.stderr, flush=True)


def sources(pattern: str) -> list[str]:
    """Sources under csrc/, relative to setup.py as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def isas() -> list[str]:
    """The instruction sets that this architecture's kernels are compiled for."""
    return list(ISA_FLAGS) if IS_X86 else ["DEFAULT"]


def kernel_defines(isa: str) -> list[str]:
    """What tells the kernels and PyTorch's vec headers the instruction set."""
    return [f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}"]


@functools.cache
def has_amx() -> bool:
    """Whether this is x86-64 Linux and the compiler knows AMX (GCC 11, Clang 12)."""
    if isas() == ["DEFAULT"] or not sys.platform.startswith("linux"):
        return False
    command = [*shlex.split(os.environ.get("CXX") or "c++"), *AMX_FLAGS, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def why_no_cpp() -> str | None:
    """None where the C++ extension can be compiled; otherwise the reason and what would help."""
    try:
        import torch
    except Exception as error:  # a broken install raises OSError for a missing shared library, and worse
        return f"PyTorch does not import in the build environment ({error}); install torch>=2.11 there"
    if torch.__version__ < (2, 11):
        return f"PyTorch {torch.__version__} is in the build environment; install torch>=2.11 there"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler} is not on PATH); install g++ or clang++, or set CXX"
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").is_file():
        return f"no Python headers (Python.h is not in {include}); install python3-dev or python3-devel"
    return None


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME where that is set, else the one on PATH, else the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = Path(home) / "bin" / "nvcc"
        return found if found.is_file() else None
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return Path(found) if found else None


def nvcc_says(nvcc: Path, flag: str, pattern: str) -> str | None:
    """The first group of pattern in what `nvcc <flag>` prints; dry runs print to stderr."""
    answer = subprocess.run([nvcc, flag, "none.cu"], capture_output=True, text=True, check=False, timeout=60)
    match = re.search(pattern, answer.stdout + answer.stderr)
    return match.group(1) if match else None


def cuda_home(nvcc: Path) -> Path:
    """The toolkit's root. nvcc on PATH may be a wrapper script far from it, so nvcc itself is asked."""
    top = nvcc_says(nvcc, "--dryrun", r"TOP=(\S+)")
    return Path(top).resolve() if top else nvcc.resolve().parent.parent


def cuda_include_dirs(home: Path, major: str) -> list[str]:
    """Where CUDA headers may be: the toolkit, and the wheels that PyTorch depends on."""
    spec = importlib.util.find_spec("nvidia")
    packages = (spec.submodule_search_locations or []) if spec else []
    wheels = [Path(package) / f"cu{major}" / "include" for package in packages]
    return [str(path) for path in (home / "include", *wheels) if path.is_dir()]


def why_no_cuda() -> str | None:
    """None where nvcc, its headers and PyTorch agree; otherwise the reason and what would help."""
    import torch

    if not sources("cuda/*.cu"):
        return "this source tree has no csrc/cuda/*.cu"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA; install a CUDA build of it"
    major = torch.version.cuda.split(".")[0]
    nvcc = find_nvcc()
    if nvcc is None:
        return f"no nvcc (CUDA_HOME={os.environ.get('CUDA_HOME', '')!r} and PATH); install the CUDA {major} toolkit"
    release = nvcc_says(nvcc, "--version", r"release (\d+\.\d+)")
    if release is None or release.split(".")[0] != major:
        return f"{nvcc} is CUDA {release} and PyTorch was built for CUDA {torch.version.cuda}: install CUDA {major}"
    places = cuda_include_dirs(cuda_home(nvcc), major)
    if not any((Path(place) / "cuda_runtime_api.h").is_file() for place in places):
        return f"cuda_runtime_api.h is in none of {places}; install the CUDA {major} runtime headers"
    return None


@dataclass(frozen=True)
class Plan:
    """What to build. variants: with CUDA (True) or without, tried in order; none left means pure Python."""

    mode: str
    variants: tuple[bool, ...]

    @property
    def may_fall_back(self) -> bool:
        return self.mode == "auto"


def make_plan(mode: str) -> Plan:
    """Raises SystemExit naming the reason where an explicit mode cannot be had, or the mode is unknown."""
    if mode not in MODES:
        raise SystemExit(f"resnet-fast build: RESNET_FAST_BUILD={mode!r} is unknown; valid: {', '.join(MODES)}")
    if mode == "none":
        say("RESNET_FAST_BUILD=none: pure Python, no native extension")
        return Plan(mode, ())
    reason = why_no_cpp()
    if reason is not None:
        if mode != "auto":
            raise SystemExit(f"resnet-fast build: RESNET_FAST_BUILD={mode} is impossible: {reason}")
        say(f"pure Python, no native extension: {reason}")
        return Plan(mode, ())
    if mode == "cpu":
        return Plan(mode, (False,))
    reason = why_no_cuda()
    if mode == "cuda":
        if reason is not None:
            raise SystemExit(f"resnet-fast build: RESNET_FAST_BUILD=cuda is impossible: {reason}")
        return Plan(mode, (True,))
    if reason is not None:
        say(f"no CUDA kernels: {reason}")
        return Plan(mode, (False,))
    return Plan(mode, (True, False))


def cuda_archs() -> str:
    """What to compile for where nobody says: the GPUs of this machine, or without one, what most others have."""
    import torch

    found = sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    return ";".join(f"{major}.{minor}" for major, minor in found) or DEFAULT_CUDA_ARCHS


def as_macro(name: str, text: str) -> tuple[str, str]:
    """A macro whose value is a string in C."""
    return name, '"' + text.replace('"', '\\"') + '"'


def set_build_environment(cuda: bool) -> None:
    """Defaults that torch.utils.cpp_extension reads from the environment; before it is imported."""
    # A virtual environment's ninja is not on PATH when its Python is called by path.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("MAX_JOBS", str(cores or 1))
    if cuda:
        os.environ["CUDA_HOME"] = str(cuda_home(find_nvcc()))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs())


def native_extension(cuda: bool):
    """The setuptools Extension of resnet_fast._C, without the per-ISA kernels (NativeBuild adds those)."""
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    macros = [(f"WITH_{isa}", None) for isa in isas() if isa != "DEFAULT"] + [("WITH_AMX", None)] * has_amx()
    macros.append(as_macro("RESNET_FAST_CXX_FLAGS", " ".join(CXX_FLAGS)))
    include_dirs = [str(ROOT / "csrc")]
    if cuda:
        macros.append(("WITH_CUDA", None))
        macros.append(as_macro("RESNET_FAST_NVCC_FLAGS", " ".join(NVCC_FLAGS)))
        macros.append(as_macro("RESNET_FAST_CUDA_ARCHS", os.environ["TORCH_CUDA_ARCH_LIST"]))
        include_dirs += cuda_include_dirs(Path(os.environ["CUDA_HOME"]), torch.version.cuda.split(".")[0])
    return (CUDAExtension if cuda else CppExtension)(
        "resnet_fast._C",
        sources("*.cpp")
        + sources("cpu/*.cpp")
        + (sources("cpu/program/*.cpp") if has_amx() else [])
        + (sources("cuda/*.cpp") + sources("cuda/*.cu") if cuda else []),
        include_dirs=include_dirs,
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS.copy(), "nvcc": NVCC_FLAGS.copy()},
        extra_link_args=["-fopenmp"],
    )


def native_commands(plan: Plan) -> dict:
    """build_ext for resnet_fast._C; a function because its base class comes from torch."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class NativeBuild(BuildExtension):
        """BuildExtension + one object per kernel file and ISA, a stable build folder, and auto's way back."""

        tiles = "AMX"

        def finalize_options(self) -> None:
            super().finalize_options()
            # setuptools gives editable builds a temporary folder, which makes every one of them a full rebuild.
            torch_tag = re.sub(r"[^\w.]", "_", torch.__version__)
            self.build_temp = str(ROOT / "build" / f"native-{sys.implementation.cache_tag}-torch{torch_tag}")

        def run(self) -> None:
            inplace, compiler = self.inplace, self.compiler
            for cuda in plan.variants:
                self.inplace, self.compiler = inplace, compiler  # run() replaces both, and leaves it so where it raises
                [extension] = self.extensions
                vars(extension).update(vars(native_extension(cuda)))
                what, built = "C++ and CUDA" if cuda else "C++", isas() + [self.tiles] * has_amx()
                try:
                    super().run()
                except Exception as error:  # setuptools, torch, ninja and the compilers each raise their own
                    if not plan.may_fall_back:
                        say(f"the {what} build failed, see above; RESNET_FAST_BUILD=auto installs what can be built")
                        raise
                    say(f"WARNING: the {what} build failed ({error}); the compiler's messages are above (pip -v)")
                else:
                    say(f"built resnet_fast._C: {what}, kernels for {', '.join(built)}, PyTorch {torch.__version__}")
                    return
            self.extensions = []
            remove_built_extensions(Path(self.build_lib))
            if inplace:
                remove_built_extensions(ROOT)
            say("WARNING: pure Python, no native extension: works, slower. RESNET_FAST_BUILD=cpu makes this an error")

        def build_extension(self, ext) -> None:
            wanted = {isa: (KERNEL_HEADERS, [*kernel_defines(isa), *CXX_FLAGS, *ISA_FLAGS[isa]]) for isa in isas()}
            wanted[""] = COMMON_HEADERS, ext.extra_compile_args["cxx"]
            with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
                flags = pool.map(lambda headers: self.precompiled(ext, *headers), wanted.values())
            self.header_flags = dict(zip(wanted, flags, strict=True))
            ext.extra_objects = list(self.kernel_objects(ext))
            ext.extra_compile_args["cxx"] += self.header_flags[""]
            super().build_extension(ext)

        def precompiled(self, ext, headers: tuple[str, ...], flags: list[str]) -> list[str]:
            """Flags that include `headers` precompiled. GCC reads the headers themselves where other flags differ."""
            command = shlex.split(os.environ.get("CXX") or "c++")
            version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
            if "Free Software Foundation" not in version:
                return []
            command += [*self.compiler.compiler_so[1:], *flags, "-std=c++17"]
            command += [f"-I{folder}" for folder in ext.include_dirs + self.compiler.include_dirs]
            digest = hashlib.sha256(repr((command, headers, version)).encode()).hexdigest()[:12]
            header = Path(self.build_temp) / f"common-{digest}.h"
            precompiled, staged = Path(f"{header}.gch"), Path(f"{header}.{os.getpid()}.tmp")
            if not precompiled.exists():
                header.parent.mkdir(parents=True, exist_ok=True)
                header.write_text("".join(f"#include <{name}>\n" for name in headers))
                subprocess.run([*command, "-x", "c++-header", header, "-o", staged], check=True)
                staged.replace(precompiled)
            return ["-include", str(header)]

        def kernel_objects(self, ext) -> Iterator[str]:
            for isa in isas():
                kernels = sources("cpu/kernels/*.cpp") + (sources("cpu/conv_kernels/*.cpp") if isa != "DEFAULT" else [])
                flags = [*kernel_defines(isa), *ISA_FLAGS[isa], *self.header_flags[isa]]
                yield from self.objects(ext, kernels, isa, flags)
            if has_amx():
                yield from self.amx_objects(ext)

        def amx_objects(self, ext) -> list[str]:
            return self.objects(ext, sources("cpu/amx/*.cpp"), "AMX", AMX_FLAGS)

        def objects(self, ext, files: list[str], isa: str, flags: list[str]) -> list[str]:
            folder, flags = str(Path(self.build_temp) / isa.lower()), CXX_FLAGS + flags
            return self.compiler.compile(files, output_dir=folder, include_dirs=ext.include_dirs, extra_postargs=flags)

        def copy_file(self, infile, outfile, *args, **kwargs):
            """Into the source tree (editable installs): whole or not at all, whatever kills the build."""
            staged = f"{outfile}.{os.getpid()}.tmp"
            super().copy_file(infile, staged, *args, **kwargs)
            os.replace(staged, outfile)
            return outfile, 1

    class EmulateAmx(NativeBuild):
        """Into build/emulated-amx, out of the objects of the build before and a few of its own. Nothing installs it."""

        tiles = "emulated AMX"

        def finalize_options(self) -> None:
            super().finalize_options()
            if not has_amx():
                raise SystemExit("resnet-fast build: there is no AMX to emulate in a build of this system and compiler")
            self.emulated_flags = shlex.split(os.environ["RESNET_FAST_EMULATED_AMX_FLAGS"])
            self.build_lib = str(ROOT / "build" / "emulated-amx")
            self.force = True  # setuptools looks at sources only; ninja looks at headers and flags as well

        def amx_objects(self, ext) -> list[str]:
            return self.objects(ext, sources("cpu/amx/*.cpp"), "AMX-emulated", self.emulated_flags)

        def build_extension(self, ext) -> None:
            ext.sources = [EMULATED_AMX_SOURCES.get(source, source) for source in ext.sources]
            super().build_extension(ext)

    return {"build_ext": NativeBuild, "emulate_amx": EmulateAmx}


class FreshBuild(build):
    """build/lib starts empty: modules since renamed, or an extension built in another mode, stay out of the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def remove_built_extensions(folder: Path) -> None:
    for path in (folder / "resnet_fast").glob("_C.*so*"):
        say(f"removing {path}, left by an earlier build")
        path.unlink()


def main() -> None:
    os.chdir(ROOT)
    commands: dict = {"build": FreshBuild}
    if METADATA_COMMANDS.intersection(sys.argv[1:]):
        setup(cmdclass=commands)
        return
    plan = make_plan((os.environ.get("RESNET_FAST_BUILD") or "auto").strip().lower())
    extensions = []
    if plan.variants:
        set_build_environment(cuda=any(plan.variants))
        commands |= native_commands(plan)
        extensions = [native_extension(plan.variants[0])]
    elif {"editable_wheel", "develop"}.intersection(sys.argv[1:]):
        remove_built_extensions(ROOT)
    setup(cmdclass=commands, ext_modules=extensions)


main()

"""Compile kernels for GPUs that are not there, through the real launchers, and read what the compiler made of them."""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requires_triton  # noqa: F401
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver

from resnet_fast.backends import triton_launch
from resnet_fast.kernels.configs import Config, pixel_tiles
from resnet_fast.problems import ConvProblem, GramDgradProblem, Problem, PrologueProblem, StemProblem, TailProblem

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """As much of a driver as compiling asks for. A device index of its own per architecture: Triton keeps one kernel a
    device, and none of a real GPU's."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 1000 + self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def _compiling(arch: int) -> Iterator[list[CompiledKernel | None]]:
    """Inside, launching compiles for sm_`arch` and runs nothing; yields the list that the kernels go into."""
    kernels: list[CompiledKernel | None] = []

    def compile_only(kernel, x, grid, args, constants, config) -> None:
        options = {} if config is None else {"num_warps": config.warps, "num_stages": config.stages}
        kernels.append(kernel.warmup(*args, grid=(grid,), **constants, **options))

    active, launch = driver._active, triton_launch.launch
    driver.set_active(_Driver(arch))
    triton_launch.launch = compile_only
    try:
        yield kernels
    finally:
        driver.set_active(active)
        triton_launch.launch = launch


def compiled(arch: int, start: Callable[[], None]) -> CompiledKernel:
    """The kernel that `start` launches, compiled for sm_`arch`, or taken from Triton's cache."""
    (kernel,) = compiled_all(arch, start)
    return kernel


def compiled_all(arch: int, start: Callable[[], object]) -> list[CompiledKernel]:
    """All kernels that `start` launches, compiled for sm_`arch`."""
    with _compiling(arch) as kernels:
        start()
    return kernels


@dataclass(frozen=True)
class Report:
    """What a kernel became.

    registers: of a thread. spilled: bytes of stores and loads. shared: bytes a block takes. warnings: ptxas' codes.
    wgmma: instructions with A in shared memory; wgmma_from_registers: with A in registers.
    """

    registers: int
    spilled: int
    shared: int
    warnings: tuple[str, ...]
    wgmma: int
    wgmma_from_registers: int
    mma: int
    tma_loads: int
    tma_stores: int
    max_keeping_nan: int
    max_dropping_nan: int


def report(kernel: CompiledKernel) -> Report:
    """Read the PTX, and ptxas' log, which is kept in Triton's cache beside the kernel."""
    ptx, log = kernel.asm["ptx"], _ptxas_log(kernel)
    (registers,), spills = re.findall(r"Used (\d+) registers", log), re.findall(r"(\d+) bytes spill", log)
    wgmma = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\{?)", ptx)
    return Report(
        registers=int(registers),
        spilled=sum(map(int, spills)),
        shared=kernel.metadata.shared,
        warnings=tuple(sorted(set(re.findall(r"\b(C\d{4})\b", log)))),
        wgmma=wgmma.count(""),
        wgmma_from_registers=wgmma.count("{"),
        mma=len(re.findall(r"\bmma\.sync|\btcgen05\.mma", ptx)),
        tma_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        tma_stores=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx)),
        max_keeping_nan=len(re.findall(r"\bmax\.NaN\.", ptx)),
        max_dropping_nan=len(re.findall(r"\bmax\.(?:ftz\.)?b?f(?:16|32)", ptx)),
    )


def instructions(kernel: CompiledKernel) -> set[str]:
    """The names of the machine instructions, up to the first dot."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = _run([str(_TOOLS / "nvdisasm"), "-c", file.name])
    return set(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", listing))


def _ptxas_log(kernel: CompiledKernel) -> str:
    """ptxas -v on the kernel's PTX; Triton runs the same and throws the log away."""
    cache = get_cache_manager(kernel.hash)
    kept = cache.get_file("ptxas.log")
    if kept is not None:
        return Path(kept).read_text()
    arch = kernel.metadata.target.arch
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        target = f"--gpu-name={sm_arch_from_capability(arch)}"
        log = _run([get_ptxas(arch).path, "-v", target, file.name, "-o", "/dev/null"])
    cache.put(log, "ptxas.log", binary=False)
    return log


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout + done.stderr


def start(problem: Problem, config: Config) -> Callable[[], None]:
    """A launch of `problem` with `config`, as the engine and the backend do it, on tensors that have shapes alone."""
    launch = {
        ConvProblem: _conv,
        StemProblem: _stem,
        TailProblem: _tail,
        PrologueProblem: _prologue,
        GramDgradProblem: _gram_dgrad,
    }[type(problem)]
    return functools.partial(launch, problem, config)


def _conv(problem: ConvProblem, config: Config) -> None:
    conv, branch, dtype = problem.conv, problem.shortcut, getattr(torch, problem.dtype)
    shortcut = {}
    if branch:
        weight = triton_launch.pack_conv(_tensor(branch.weight_shape, dtype), ConvProblem(branch, problem.dtype))
        norm = _norm(conv.out_channels, dtype, problem.folded)
        shortcut = {"shortcut": _tensor(branch.x_shape, dtype), "shortcut_weight": weight, "shortcut_norm": norm}
    triton_launch.conv(
        _tensor(conv.x_shape, dtype),
        triton_launch.pack_conv(_tensor(conv.weight_shape, dtype), problem),
        _tensor(conv.y_shape, dtype),
        problem,
        config,
        _norm(conv.out_channels, dtype, problem.folded) if problem.relu or not problem.folded else triton_launch.Norm(),
        _tensor(conv.y_shape, dtype) if problem.residual else None,
        **shortcut,
        residual_norm=_norm(conv.out_channels, dtype, False) if problem.residual_norm else None,
        statistics=_statistics(config, problem) if problem.statistics else None,
    )


def _prologue(problem: PrologueProblem, config: Config) -> None:
    conv, dtype = problem.conv, getattr(torch, problem.dtype)
    triton_launch.conv_prologue(
        _tensor(conv.x_shape, dtype),
        _norm(conv.in_channels, dtype, False),
        triton_launch.pack_conv(_tensor(conv.weight_shape, dtype), ConvProblem(conv, problem.dtype)),
        _tensor(conv.y_shape, dtype),
        problem,
        config,
        _norm(conv.out_channels, dtype, False) if problem.joined else None,
        _tensor(conv.y_shape, dtype) if problem.residual else None,
        _norm(conv.out_channels, dtype, False) if problem.residual_norm else None,
        _statistics(config, problem) if problem.statistics else None,
    )


def _gram_dgrad(problem: GramDgradProblem, config: Config) -> None:
    conv, dtype = problem.conv, getattr(torch, problem.dtype)
    x, channels = _tensor(conv.x_shape, dtype), conv.in_channels
    triton_launch.gram_dgrad(
        _tensor(conv.y_shape, dtype),
        x,
        _norm(channels, dtype, False) if problem.prologue else None,
        torch.empty(channels, conv.out_channels, dtype=dtype, device="meta"),
        torch.empty(channels, channels, dtype=dtype, device="meta"),
        torch.empty(channels, device="meta"),
        torch.empty(channels, device="meta"),
        x if problem.add else None,
        x,
        problem,
        config,
    )


def _statistics(config: Config, problem: Problem) -> triton_launch.Statistics:
    rows, channels = pixel_tiles(config, problem), problem.conv.out_channels
    mean, m2 = torch.empty(2, rows, channels, device="meta")
    return triton_launch.Statistics(mean, m2, torch.empty(rows, device="meta"))


def _stem(problem: StemProblem, config: Config) -> None:
    """Its convolution: what is launched before and after has no configurations."""
    conv, dtype = problem.conv, getattr(torch, problem.dtype)
    packed, conv_out = _tensor(problem.packed_shape, dtype), _tensor(conv.y_shape, dtype)
    weight = triton_launch.pack_stem(_tensor(conv.weight_shape, dtype))
    norm = _norm(conv.out_channels, dtype, folded=True)
    triton_launch.stem_conv(packed, weight, conv_out, problem, config, norm)


def _tail(problem: TailProblem, config: Config) -> None:
    dtype, following = getattr(torch, problem.dtype), problem.next_conv
    packed = [
        triton_launch.pack_conv(_tensor(conv.weight_shape, dtype), ConvProblem(conv, problem.dtype))
        for conv in problem.convs
    ]
    biases = [torch.empty(conv.out_channels, dtype=dtype, device="meta") for conv in problem.convs]
    added = problem.shortcut.x_shape if problem.shortcut else problem.conv3.y_shape
    triton_launch.tail(
        _tensor(problem.conv2.x_shape, dtype),
        tuple(packed),
        tuple(biases),
        _tensor(problem.conv3.y_shape, dtype),
        _tensor(following.y_shape, dtype) if following else None,
        problem,
        config,
        _tensor(added, dtype),
    )


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _norm(channels: int, dtype: torch.dtype, folded: bool) -> triton_launch.Norm:
    """Folded weights come with a bias of their dtype; batch norm's parameters are float32."""
    if folded:
        return triton_launch.Norm(conv_bias=torch.empty(channels, dtype=dtype, device="meta"))
    vectors = (torch.empty(channels, device="meta") for _ in range(4))
    return triton_launch.Norm(None, *vectors, eps=1e-5)

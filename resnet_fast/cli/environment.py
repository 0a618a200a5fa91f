"""What ran where: versions, devices, directories. Plain dicts, for `info` and for every JSON record."""

import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from .. import cpus
from ..kernels import tables
from . import UserError

VARIABLES = (
    "RESNET_FAST_BACKEND",
    "RESNET_FAST_TRAIN",
    "RESNET_FAST_DISABLE",
    "RESNET_FAST_LOG",
    "RESNET_FAST_BUILD",
    "RESNET_FAST_CACHE",
    "RESNET_FAST_POOL",
    "RESNET_FAST_POOL_LIMIT",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "DNNL_DEFAULT_FPMATH_MODE",
    "LD_PRELOAD",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
)
"""Environment variables that change what runs, or how fast. (Inductor sets its own directory's, so it says nothing.)"""

_ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "amx_int8", "asimd")


def record() -> dict:
    """The environment of one result: versions, cpu, gpus, commit, variables."""
    return {
        "versions": versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "commit": git_commit(),
        "environment_variables": variables(),
    }


def versions() -> dict[str, str]:
    """Version by package; where one cannot be used, why not."""
    from .. import __version__

    found = {"resnet_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "numpy"):
        found[name] = _version(name)
    found["triton"] = _triton()
    found["cuda_build"] = torch.version.cuda or f"none ({torch.__version__} is a CPU build)"
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    found["platform"] = platform.platform()
    return found


def cpu() -> dict:
    """Model, cores, threads, the instruction sets that matter here, and what oneDNN does with them."""
    flags = _cpu_flags()
    return {
        "model": cpus.model_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "onednn": torch.backends.mkldnn.is_available(),
        "onednn_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False,
        "onednn_fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported() if torch.backends.mkldnn.is_available() else False,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def gpus() -> list[dict]:
    """One dict a CUDA device."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def devices() -> list[str]:
    """Device types that can be used here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def check_device(name: str) -> str:
    """`name` as a device type PyTorch can use here, or a UserError."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; usable here: {', '.join(devices())}") from None
    if device.type not in devices():
        raise UserError(f"--device {name} is not usable here; usable: {', '.join(devices())}")
    return name


def device_name(device: str) -> str:
    """The hardware's name, for titles."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpus.model_name()}, {threads} thread{'s' if threads > 1 else ''}"


def variables() -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def directories() -> list[dict]:
    """Where things are cached or built: what for, path, whether it exists, whether it can be written."""
    package = Path(__file__).parents[1]
    home_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
    places = {
        "package": package,
        "tuned tables": tables.user_directory() / "tuned",
        "torch extensions": Path(os.environ.get("TORCH_EXTENSIONS_DIR", home_cache / "torch_extensions")),
        "triton cache": Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")),
        "inductor cache": Path(
            os.environ.get("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir()) / f"torchinductor_{user}")
        ),
    }
    return [
        {"what": what, "path": str(path), "exists": path.exists(), "writable": _writable(path)}
        for what, path in places.items()
    ]


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, "+changes" if its files differ; None when installed."""
    folder = Path(__file__).parent
    try:
        # ls-files fails unless this very file is tracked: an installed package below someone's checkout is not theirs.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder.parents[1], "status", "--porcelain", "--untracked-files=no")
        return _git(folder, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _triton() -> str:
    installed = _version("triton")
    if installed == "not installed":
        return "not installed (the GPU kernels need it)"
    return installed if torch.cuda.is_available() else f"{installed} (idle: no GPU)"


def _cpu_flags() -> set[str]:
    return set(cpus.info("flags").split()) | set(cpus.info("Features").split())


def _writable(path: Path) -> bool:
    """Whether `path`, or the nearest folder above it that exists, can be written."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return os.access(existing, os.W_OK)

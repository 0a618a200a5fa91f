"""Unit: what this machine is. Reports the device, the packages that later units need, and `environment.record()`."""

import importlib.util
import platform
import shutil
import sys

import torch

from . import child
from .state import CRASHED, DONE

PACKAGES = ("rich", "torchvision", "triton", "pytest", "xdist", "pytest_timeout", "matplotlib", "sklearn", "jax")
"""What some unit needs or makes use of."""


def main() -> int:
    """Reports {"device", "environment", "packages"}."""
    parser = child.parser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    packages = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    missing = [name for name, there in packages.items() if not there]
    if args.device == "cuda" and not torch.cuda.is_available():
        return child.report(args.result, CRASHED, reason=f"no CUDA device (torch {torch.__version__})")
    device = {"name": platform.processor() or platform.machine(), "label": "rehearsal", "slug": "rehearsal"}
    if args.device == "cuda":
        device = _gpu(torch.cuda.current_device(), importable=packages["rich"])
    data = {"device": device, "environment": _record(packages["rich"]), "packages": packages}
    summary = f"{device['name']}, torch {torch.__version__}, Python {platform.python_version()}"
    summary += f"; missing: {', '.join(missing)}" if missing else ""
    summary += "" if shutil.which("nvcc") else "; no nvcc on PATH"
    return child.report(args.result, DONE, summary=summary, data=data)


def _gpu(index: int, importable: bool) -> dict:
    """Name, the label that files are named with, and the slug that its tuned table is."""
    name = torch.cuda.get_device_name(index)
    if not importable:  # the package needs rich
        label = "-".join(name.lower().split())
        return {"name": name, "label": label, "slug": label}
    from resnet_fast import gpus

    gpu = gpus.of_device(index)
    label = next((short for short, known in gpus.KNOWN.items() if known.name == gpu.name), gpu.slug)
    return {"name": gpu.name, "label": label, "slug": gpu.slug}


def _record(importable: bool) -> dict:
    if not importable:
        return {"versions": {"python": platform.python_version(), "torch": torch.__version__}, "commit": None}
    from resnet_fast.cli import environment

    return environment.record()


if __name__ == "__main__":
    sys.exit(main())

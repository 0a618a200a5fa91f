"""Unit: the native extension, built in place; with CUDA where nvcc is. The rest of the campaign can do without it."""

import os
import shutil
import subprocess
import sys

import torch

from . import child
from .runner import ROOT
from .state import CRASHED, DONE

_LOADS = """
import sys, torch
from resnet_fast.backends import native
sys.exit(native.why_not("conv_epilogue", "cuda", torch.bfloat16) is not None)
"""


def main() -> int:
    """Runs setup.py, unless an extension with CUDA is there and loads; a failure is told and ends nothing."""
    parser = child.parser()
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if torch.cuda.is_available() and subprocess.run([sys.executable, "-c", _LOADS], cwd=ROOT).returncode == 0:
        return child.report(args.result, DONE, summary="there already")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    mode = "none" if args.rehearse else "cuda" if nvcc else "auto"
    variables = {**os.environ, "RESNET_FAST_BUILD": mode}
    if torch.cuda.is_available():
        variables.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code = subprocess.run(command, cwd=ROOT, env=variables).returncode
    how = f"RESNET_FAST_BUILD={mode}"
    if code:
        return child.report(args.result, CRASHED, reason=f"{how} failed with exit code {code}; see campaign.log")
    return child.report(args.result, DONE, summary=how)


if __name__ == "__main__":
    sys.exit(main())

"""Unit: `resnet-fast profile` of one network, with its JSON and picture."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from . import child
from .runner import ROOT
from .state import CRASHED, DONE, WRONG

REHEARSED = ("--model", "resnet18", "--gpu", "h200", "--dtype", "bfloat16")


def main() -> int:
    """Exit code 1 of profile is a failed verification."""
    parser = child.parser()
    parser.add_argument("--output", required=True, type=Path)
    for name in ("--model", "--dtype", "--batch-size", "--img-size", "--device"):
        parser.add_argument(name)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    what = ("--model", args.model, "--dtype", args.dtype, "--device", args.device)
    command = [sys.executable, "-m", "resnet_fast", "profile", *(REHEARSED if args.rehearse else what)]
    command += ["--batch-size", args.batch_size, "--img-size", args.img_size, "--json", str(args.output)]
    picture = importlib.util.find_spec("matplotlib") is not None
    if picture:
        command += ["--png", str(args.output.with_suffix(".png"))]
    code = subprocess.run(command, cwd=ROOT).returncode
    status = {0: DONE, 1: WRONG}.get(code, CRASHED)
    reason = "" if code == 0 else f"resnet-fast profile ended with exit code {code}; see campaign.log"
    return child.report(args.result, status, reason=reason, summary="" if picture else "no matplotlib, no picture")


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `resnet-fast info | verify | bench | profile | tune | demo`, also `python -m resnet_fast`.

One module a subcommand, with `add_arguments(parser)` and `run(args) -> int`, imported when it is called for. Exit
codes: 0 all well; 1 a check failed; 2 the request cannot be met (one line on stderr says why and what would work).
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": "versions, devices, backends and why or why not, directories, a one-second self-test",
    "verify": "every op, block and network against float64, in every dtype and layout, on every backend",
    "bench": "time a network: eager, torch.compile, fast and frozen side by side, verified first",
    "profile": "a frozen network, step by step: kernels, work, traffic, limits, times; or its plan for a GPU elsewhere",
    "tune": "measure which kernel is fastest for every layer on this GPU or CPU, for `freeze` to read",
    "demo": "stock and fast ResNets on real photos, then a training run on handwritten digits",
}


class UserError(Exception):
    """What was asked for cannot be done; the message is one line that names the thing and what would work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the process's exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Only the subcommand asked for is imported; the others are just names in the help.
    asked = next((word for word in argv if word in COMMANDS), None)
    parser = argparse.ArgumentParser(prog="resnet-fast", description="Fused residual blocks for PyTorch ResNets.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == asked:
            _module(name).add_arguments(subparser)
    args = parser.parse_args(argv)
    if args.version:
        from .. import __version__

        print(f"resnet-fast {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from .. import BackendUnavailable, FusionError, dispatch, training

    try:
        if args.command != "info":  # which explains it instead
            try:
                dispatch.requested()
                training.requested()
            except ValueError as error:
                raise UserError(str(error)) from None
        return _module(args.command).run(args)
    except (UserError, BackendUnavailable, FusionError) as error:
        print(f"resnet-fast {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"resnet-fast {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _module(name: str):
    return importlib.import_module(f"{__name__}.{name}")

"""Unit: loss curves of every stage of training beside stock's, by `benchmarks/convergence.py`, on Triton's kernels."""

import sys

import convergence

from . import child
from .state import DONE, WRONG

DTYPES = ("float32", "bfloat16")


def main() -> int:
    """Rows: {"dtype", "curve", "distance", "allowed", "losses"}; wrong where a stage strays from stock."""
    parser = child.parser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    dtypes, steps, backend = (DTYPES[:1], 2, "reference") if args.rehearse else (DTYPES, 50, "triton")
    rows, strays = [], []
    for dtype in dtypes:
        found = convergence.run(steps, backend, args.device, dtype)
        strays += [f"{dtype} {name}: {found['distances'][name]:.1e}" for name in found["strays"]]
        distances = {"stock": 0.0} | found["distances"]
        rows += [
            {"dtype": dtype, "curve": name, "distance": distances[name], "allowed": found["allowed"], "losses": curve}
            for name, curve in found["curves"].items()
        ]
    summary = f"{len(rows)} curves of {steps} steps, {len(strays)} stray"
    return child.report(args.result, WRONG if strays else DONE, reason="; ".join(strays), summary=summary, rows=rows)


if __name__ == "__main__":
    sys.exit(main())

"""Unit: what this GPU reaches in large matrix products and copies, by `resnet_fast.cli.ceilings`."""

import sys
import time

from resnet_fast.cli import ceilings

from . import child
from .state import DONE


def main() -> int:
    """Rows: {"what", "dtype", "tflop_per_s" or "tb_per_s"}."""
    parser = child.parser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", nargs="+", required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.rehearse:
        ceilings.MATMULS, ceilings.COPY_BYTES, ceilings.times = ((64, 64, 64),), 1 << 16, _wall_clock
    rows = [
        {"what": "matmul", "dtype": dtype, "tflop_per_s": ceilings.matmul_flops(args.device, dtype) / 1e12}
        for dtype in args.dtype
    ]
    rows.append({"what": "copy", "dtype": None, "tb_per_s": ceilings.copy_bandwidth(args.device) / 1e12})
    summary = ", ".join(f"{row['dtype']} {row['tflop_per_s']:.0f} TFLOP/s" for row in rows[:-1])
    summary += f", copy {rows[-1]['tb_per_s']:.2f} TB/s"
    return child.report(args.result, DONE, summary=summary, rows=rows)


def _wall_clock(run, device: str) -> list[float]:
    """In the place of `ceilings.times` on a CPU, which has no events."""
    started = time.perf_counter()
    run()
    return [time.perf_counter() - started]


if __name__ == "__main__":
    sys.exit(main())

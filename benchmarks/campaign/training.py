"""Unit: training steps of one network at one batch size, side by side; verified, then timed in turns.

A step is forward, cross-entropy, backward and SGD with momentum, float32 parameters under autocast, made by
`cli.contenders`: eager channels_last, torch.compile, and fast in the stage that it takes by itself and in all others.
What counts are images a second, the memory of a step at its peak, and the bytes that are kept for the backward pass.
"""

import functools
import sys

import torch
from torchvision.models._api import register_model

from resnet_fast import training
from resnet_fast.cli import contenders, harness, networks
from resnet_fast.cli.contenders import Setting
from resnet_fast.cli.harness import BASELINE

from . import child
from .networks import excused, summary_of, tiny
from .state import DONE, WRONG

GROUPS = {
    "ours": ([BASELINE, "fast"], (), training.STAGES),
    "compile": ([BASELINE, "compile", "fast"], ("default",), ()),
}
"""Group -> the contenders that `cli.contenders` makes, torch.compile's modes, and stages of training."""

REHEARSED_STAGES = (training.EPILOGUE, training.GRAM)


def main() -> int:
    """Rows: the fields of `harness.Row`, and what was run."""
    parser = child.parser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--group", choices=tuple(GROUPS), required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--img-size", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.rehearse:
        register_model("resnet_tiny")(tiny)
        contenders._compiler = lambda mode: functools.partial(torch.compile, backend="eager", dynamic=False)
        torch.backends.cudnn.allow_tf32 = True  # else Triton leaves float32 to the library
        GROUPS["ours"] = ([BASELINE, "fast"], (), REHEARSED_STAGES)
    counts = {"iterations": 5, "warmup": 5}
    if args.rehearse:
        counts = {"iterations": 1, "warmup": 0, "measure_memory": False}
    rows = harness.run(_contenders(args), rounds=args.rounds, progress=lambda stage: print(stage, flush=True), **counts)
    what = {"model": args.model, "task": "train", "dtype": args.dtype, "batch_size": args.batch_size}
    what |= {"img_size": args.img_size, "device": args.device, "group": args.group}
    wrong = [f"{row.contender}: {row.reason}" for row in rows if not row.match and not excused(row)]
    report = [what | row.to_dict() for row in rows]
    status = WRONG if wrong else DONE
    return child.report(args.result, status, reason="; ".join(wrong), summary=summary_of(rows), rows=report)


def _contenders(args) -> list[harness.Contender]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        images = torch.randn(count, 3, args.img_size, args.img_size, generator=generator)
        return images.to(args.device).to(memory_format=torch.channels_last)

    chosen, modes, stages = GROUPS[args.group]
    dtype = getattr(torch, args.dtype)
    amp_dtype = None if dtype == torch.float32 else dtype
    stock = networks.build(args.model, draw(4))
    setting = Setting(stock, draw(args.batch_size), amp_dtype, modes, backend="triton", train_stages=stages)
    return contenders.training(setting, chosen)


if __name__ == "__main__":
    sys.exit(main())

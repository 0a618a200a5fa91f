"""Unit: training steps of one network at one batch size, side by side; verified, then timed in turns.

A step is forward, cross-entropy, backward and SGD with momentum, float32 parameters under autocast, made by
`cli.contenders`: eager channels_last, torch.compile, and fast in the stage that it takes by itself and in all others.
What counts are images a second, the memory of a step at its peak, and the bytes that are kept for the backward pass.
"""

import sys

import torch

from resnet_fast import training
from resnet_fast.cli import contenders, harness, networks
from resnet_fast.cli.contenders import Setting
from resnet_fast.cli.harness import BASELINE

from . import networks as networks_unit

GROUPS = {
    "ours": ([BASELINE, "eager_graph", "fast", "fast_graph"], (), (training.LIBRARY, training.GRAM)),
    "compile": ([BASELINE, "compile", "fast"], ("default",), ()),
}
"""Group -> the contenders that `cli.contenders` makes, torch.compile's modes, and stages of training."""

REHEARSED_STAGES = (training.EPILOGUE, training.GRAM)


def main() -> int:
    """Rows: the fields of `harness.Row`, and what was run."""
    args = networks_unit.arguments(GROUPS)
    if args.rehearse:
        torch.backends.cudnn.allow_tf32 = True  # else Triton leaves float32 to the library
        GROUPS["ours"] = ([BASELINE, "fast"], (), REHEARSED_STAGES)
    return networks_unit.report(args, networks_unit.run(args, _contenders(args)), "train", lambda row: {})


def _contenders(args) -> list[harness.Contender]:
    draw = networks_unit.images_of(args)
    chosen, modes, stages = GROUPS[args.group]
    dtype = getattr(torch, args.dtype)
    amp_dtype = None if dtype == torch.float32 else dtype
    stock = networks.build(args.model, draw(4))
    setting = Setting(stock, draw(args.batch_size), amp_dtype, modes, backend="triton", train_stages=stages)
    return contenders.training(setting, chosen)


if __name__ == "__main__":
    sys.exit(main())

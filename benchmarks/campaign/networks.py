"""Unit: one network at one batch size and dtype, some contenders side by side; verified, then timed in turns.

All run the same weights, already rounded to the dtype, on images of the dtype: no autocast, whose casts cost every
contender but the frozen ones. The logits are held against float64 by `resnet_fast.numerics`, the timing is
`cli.harness`'s, and whatever the group, eager channels_last is in it: ratios are to its time in the same process.
"""

import argparse
import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fast import dispatch, freeze, numerics, optimize
from resnet_fast.capture import CapturedStep
from resnet_fast.cli import contenders, harness, networks
from resnet_fast.cli.contenders import CHECKED_IMAGES, Setting
from resnet_fast.cli.harness import BASELINE, Contender
from resnet_fast.numerics import Comparison

from . import child
from .state import DONE, WRONG

FROZEN = {
    "frozen_library": ("frozen, cuDNN only", {"backend": "reference"}),
    "frozen_conv": ("frozen, a kernel a convolution", {"backend": "triton", "fusion": "conv", "cuda_graph": False}),
    "frozen_tail": ("frozen, tails fused", {"backend": "triton", "fusion": "tail", "cuda_graph": False}),
    "frozen_auto": ("frozen, fastest by the table", {"backend": "triton", "fusion": "auto", "cuda_graph": False}),
    "frozen_graph": ("frozen, fastest, CUDA graph", {"backend": "triton", "fusion": "auto", "cuda_graph": True}),
}
"""Name -> label and arguments of `freeze`."""

USUAL = {
    "ours": ([BASELINE, "fast"], ()),
    "compile": ([BASELINE, "compile"], ("default", "freezing")),
    "max-autotune": ([BASELINE, "compile"], ("max-autotune",)),
    "jax": ([BASELINE], ()),
}
"""Group -> the contenders that `cli.contenders` makes, and torch.compile's modes."""


def main() -> int:
    """Rows: the fields of `harness.Row`, memory_mb (weights, arena and activations), and what was run."""
    args = arguments(USUAL)
    found, memory = _contenders(args)
    rows = run(args, found, measure_memory=True)
    return report(args, rows, "infer", lambda row: {"memory_mb": memory.get(row.contender)})


def arguments(groups: Iterable[str]) -> argparse.Namespace:
    """The command line of a unit that times one network; a rehearsal has a network and a compiler that take no time."""
    parser = child.parser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--group", choices=tuple(groups), required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--img-size", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.rehearse:
        register_model("resnet_tiny")(tiny)
        contenders._compiler = lambda mode: functools.partial(torch.compile, backend="eager", dynamic=False)
    return args


def images_of(args: argparse.Namespace) -> Callable[[int], Tensor]:
    """A function that draws so many images more, channels_last on the unit's device; the same ones in every process."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        images = torch.randn(count, 3, args.img_size, args.img_size, generator=generator)
        return images.to(args.device).to(memory_format=torch.channels_last)

    return draw


def run(args: argparse.Namespace, found: list[Contender], **counts) -> list[harness.Row]:
    """The contenders verified and timed in turns. counts: further settings of `harness.run`."""
    counts = {"iterations": 5, "warmup": 5} | counts
    if args.rehearse:
        counts = {"iterations": 1, "warmup": 0, "measure_memory": False}
    return harness.run(found, rounds=args.rounds, progress=lambda stage: print(stage, flush=True), **counts)


def report(args: argparse.Namespace, rows: list[harness.Row], task: str, more: Callable[[harness.Row], dict]) -> int:
    """Write the unit's result, `more` beside each row's own fields; returns the exit code."""
    what = {"model": args.model, "task": task, "dtype": args.dtype, "batch_size": args.batch_size}
    what |= {"img_size": args.img_size, "device": args.device, "group": args.group}
    wrong = [f"{row.contender}: {row.reason}" for row in rows if not row.match and not excused(row)]
    found = [what | row.to_dict() | more(row) for row in rows]
    status = WRONG if wrong else DONE
    return child.report(args.result, status, reason="; ".join(wrong), summary=summary_of(rows), rows=found)


def summary_of(rows: list[harness.Row]) -> str:
    """Speed and ratio of each, in a line."""
    return ", ".join(
        f"{row.contender} {row.median_per_s:,.0f} img/s" + (f" ({row.ratio:.2f})" if row.ratio else "")
        for row in rows
        if row.median_per_s
    )


def excused(row: harness.Row) -> bool:
    """Others' compilers may fail, which costs them their time; ours may not."""
    return row.reason.startswith("raised") and not row.contender.startswith(("fast", "frozen"))


def _contenders(args) -> tuple[list[Contender], dict[str, float]]:
    """The group's contenders, and where each will note the memory it holds."""
    draw, dtype = images_of(args), getattr(torch, args.dtype)
    stock = networks.build(args.model, draw(4)).to(dtype)
    chosen, modes = USUAL[args.group]
    setting = Setting(stock, draw(args.batch_size).to(dtype), None, modes)
    found = contenders.inference(setting, chosen)
    make, memory = _maker(setting), {}
    if args.group == "ours":
        found.append(make("eager_benchmark", "eager, cudnn.benchmark", lambda model: model, _cudnn_benchmark))
        if setting.device == "cuda":
            found.append(make("eager_graph", "eager, CUDA graph", lambda model: _graphed(model, setting.images)))
        for name, (label, options) in FROZEN.items():
            found.append(make(name, label, functools.partial(freeze, **options)))
        if dispatch.why_not("native", "conv_bn_act", setting.device, dtype) is None:
            found.append(make("fast_native", "fast, the C++ extension", functools.partial(optimize, backend="native")))
            frozen = functools.partial(freeze, backend="native")
            found.append(make("frozen_native", "frozen, the C++ extension", frozen))
    if args.group == "jax":
        from . import jax_resnet

        prepare = functools.partial(jax_resnet.compiled, images=setting.images)
        found.append(make("jax", "JAX, jit, batch norm folded", prepare, convert=jax_resnet.to_torch(setting.images)))
    for contender in found:
        if setting.device == "cuda":
            contender.check = functools.partial(_noting_memory, contender.name, contender.check, memory)
    return found, memory


def _maker(setting: Setting) -> Callable[..., Contender]:
    """make(name, label, prepare(model) -> callable, context, convert): a contender beside those of `cli.contenders`.

    convert: makes PyTorch's logits of what the callable returns, outside of what is timed.
    """
    flops = networks.flops_per_image(setting.stock, setting.images.shape[-1], train=False) * len(setting.images)
    checked = setting.images[:CHECKED_IMAGES]
    reference = networks.float64_logits(setting.stock, checked)
    with torch.inference_mode():
        expected = setting.stock(checked)

    def make(name: str, label: str, prepare: Callable, context=contextlib.nullcontext, convert=_same) -> Contender:
        run = functools.cache(lambda: prepare(copy.deepcopy(setting.stock)))

        def step() -> Tensor:
            with torch.inference_mode(), context():
                return run()(setting.images)

        def check() -> list[Comparison]:
            return [numerics.compare("logits", convert(step())[:CHECKED_IMAGES], expected, reference)]

        return Contender(name, step, check, len(setting.images), flops, None, setting.device, label)

    return make


def _same(logits: Tensor) -> Tensor:
    return logits


def _noting_memory(name: str, check: Callable, memory: dict[str, float]) -> list[Comparison]:
    """`check`, which prepares the contender and runs it: the most that it allocates in that is what it needs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    check()
    torch.cuda.reset_peak_memory_stats()
    comparisons = list(check())  # prepared by now: the peak is of what it keeps and of one step
    torch.cuda.synchronize()
    memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return comparisons


@contextlib.contextmanager
def _cudnn_benchmark():
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _graphed(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """`model` on `images`, captured; a call replays that."""
    step = CapturedStep(lambda: model(images))
    return lambda _: step()


def tiny(weights=None) -> ResNet:
    """A ResNet of four narrow blocks, for the interpreter."""
    model, inplanes = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), 16
    model.conv1, model.bn1 = nn.Conv2d(3, inplanes, 7, 2, 3, bias=False), nn.BatchNorm2d(inplanes)
    for number, stride in enumerate((1, 2, 2, 2), 1):
        downsample = None
        if stride > 1:
            downsample = nn.Sequential(nn.Conv2d(inplanes, inplanes, 1, stride, bias=False), nn.BatchNorm2d(inplanes))
        setattr(model, f"layer{number}", nn.Sequential(BasicBlock(inplanes, inplanes, stride, downsample)))
    model.fc = nn.Linear(inplanes, 10)
    return model


if __name__ == "__main__":
    sys.exit(main())

"""Which kernels the package can start: the problems of the reference networks, with what is chosen for them.

A job is one compilation. Many problems share one, and more differ in nothing but a trip count: `representatives` takes
one of each such class, and fewer for architectures beside MAIN_ARCH. With RESNET_FAST_GATE=all it takes every one,
which is for a change of kernels or compiler.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torchvision

from resnet_fast import freeze
from resnet_fast.gpus import KNOWN, Gpu
from resnet_fast.kernels import selection, tables
from resnet_fast.kernels.configs import Config, TmaConfig, candidates, group_shape, kernel_name
from resnet_fast.planner import Section, build
from resnet_fast.problems import ConvProblem, GramDgradProblem, Problem, PrologueProblem, StemProblem, TailProblem
from resnet_fast.shapes import Conv

GPUS = {"sm_80": KNOWN["a100"], "sm_90": KNOWN["h200"], "sm_100": KNOWN["b200"]}
MAIN_ARCH = "sm_90"
NETWORKS = {  # name -> dtype -> batch sizes
    "resnet18": {"bfloat16": (1, 32, 256)},
    "resnet50": {"bfloat16": (1, 32, 256)},
    "resnext50_32x4d": {"bfloat16": (1, 32, 256)},
    "wide_resnet50_2": {"bfloat16": (1, 32, 256)},
}
TRAINED = {"resnet50": {"bfloat16": (32, 256)}}
TRIED = 3
"""How many of the candidates for each of PROBLEMS are compiled, the most promising first."""

_THREE = {"kernel": (3, 3), "padding": (1, 1)}
_STEM = Conv(32, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3))
_DOWN = Conv(32, 256, 56, 56, 512, stride=(2, 2))
_MID = Conv(32, 64, 56, 56, 64, **_THREE)
PROBLEMS = (
    ConvProblem(Conv(32, 64, 56, 56, 256), "float16", residual=True),
    ConvProblem(Conv(32, 64, 56, 56, 256), "bfloat16", residual=True, folded=False),
    ConvProblem(Conv(32, 128, 28, 28, 512), "bfloat16", shortcut=_DOWN),
    ConvProblem(Conv(32, 128, 28, 28, 512), "float16", shortcut=_DOWN, folded=False),
    ConvProblem(Conv(32, 256, 14, 14, 256, **_THREE), "float16"),
    ConvProblem(Conv(32, 128, 56, 56, 128, **_THREE, stride=(2, 2)), "float16", folded=False),
    ConvProblem(Conv(32, 1024, 7, 7, 1024, **_THREE, groups=32), "bfloat16"),
    ConvProblem(Conv(32, 100, 28, 28, 100, **_THREE), "float16", residual=True, folded=False),
    ConvProblem(_STEM, "float16", folded=False),
    StemProblem(_STEM, "float16"),
    ConvProblem(Conv(32, 100, 28, 28, 100, **_THREE), "float16", relu=False, statistics=True),
    PrologueProblem(Conv(32, 100, 28, 28, 200), "float16", statistics=True),
    PrologueProblem(Conv(32, 65, 28, 28, 100), "bfloat16", joined=True, residual=True),
    GramDgradProblem(Conv(32, 100, 28, 28, 200), "float16", prologue=True, add=True),
    TailProblem(_MID, Conv(32, 64, 56, 56, 256), "float16", Conv(32, 64, 56, 56, 256), Conv(32, 256, 56, 56, 64)),
)


@dataclass(frozen=True)
class Job:
    """`problem` with `config` for the architecture `arch`, one of GPUS."""

    arch: str
    problem: Problem
    config: Config

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.arch]

    @property
    def capability(self) -> int:
        return int(self.arch.removeprefix("sm_"))

    def __str__(self) -> str:
        fields = "-".join(map(str, vars(self.config).values())).replace(", ", "x")
        return f"{self.arch} {kernel_name(self.config)} {fields}: {self.problem.key}"


def jobs() -> list[Job]:
    """What is chosen without measurements, what the shipped tables choose, and what `tune` tries first."""
    problems = list(dict.fromkeys((*reference_problems(), *training_problems())))
    found = [job for arch in GPUS for problem in problems for job in _best(arch, problem, 1)]
    found += [job for arch in GPUS for problem in PROBLEMS for job in _best(arch, problem, TRIED)]
    for arch, gpu in GPUS.items() if os.environ.get("RESNET_FAST_GATE") == "all" else ():
        rows = tables.read(tables.SHIPPED / f"{gpu.slug}.json", gpu)
        found += [Job(arch, problem_of(key), row.config) for key, row in rows.items() if row.config is not None]
    return list(dict.fromkeys(found))


def representatives(found: Iterable[Job]) -> list[Job]:
    """The first of every class of jobs that compile to the same but for trip counts; or all of them.

    Every other class, of sm_80 and sm_100 every fourth, and no rows of tables, which have run on the GPU they are of:
    with nothing cached, compiling all would be a third of the suite's time. `make gate` compiles all.
    """
    if os.environ.get("RESNET_FAST_GATE") == "all":
        return list(found)
    classes: dict[tuple, Job] = {}
    for job in found:
        classes.setdefault(_code(job), job)
        classes.setdefault((job.arch, getattr(job.config, "box", None)), job)
    found = list(dict.fromkeys(classes.values()))
    main, rest = ([job for job in found if (job.arch == MAIN_ARCH) == wanted] for wanted in (True, False))
    return main[::2] + rest[::4]


def reference_problems() -> Iterator[Problem]:
    """Every step of the reference networks' plans: of all kernels, convolution by convolution, and batch norm unfolded,
    which is how the backend runs them."""
    for network, dtypes in NETWORKS.items():
        for dtype, batches in dtypes.items():
            section = _section(network, dtype)
            for batch in batches:
                yield from _steps(section, batch, dtype)


def training_problems() -> Iterator[Problem]:
    """What the primitives of training ask for in the networks of TRAINED, at every stage."""
    for network, dtypes in TRAINED.items():
        for dtype, batches in dtypes.items():
            section = _section(network, dtype)
            for batch in batches:
                problems = (problem for problem in _steps(section, batch, dtype) if isinstance(problem, ConvProblem))
                convs = [conv for problem in problems for conv in (problem.conv, problem.shortcut) if conv]
                for conv in dict.fromkeys(convs):
                    if conv.in_channels > 3:  # the stem's is the library's
                        yield from _trained(conv, dtype)


def _trained(conv: Conv, dtype: str) -> Iterator[Problem]:
    yield from (ConvProblem(conv, dtype, relu=False, statistics=wanted) for wanted in (True, False))
    if conv.stride == (1, 1):
        turned = replace(conv, in_channels=conv.out_channels, out_channels=conv.in_channels)
        yield from (ConvProblem(turned, dtype, residual=add, relu=False) for add in (True, False))
    if not conv.pointwise or conv.in_channels >= conv.out_channels:
        return
    yield ConvProblem(conv, dtype, residual=True, residual_norm=True, folded=False)  # a downsample that joins
    yield ConvProblem(conv, dtype, relu=False, folded=False)  # one that is joined
    plain = replace(conv, height=conv.out_height, width=conv.out_width, stride=(1, 1))
    yield from (GramDgradProblem(plain, dtype, prologue=pending) for pending in (True, False))
    yield PrologueProblem(plain, dtype, statistics=True)
    yield from (PrologueProblem(plain, dtype, joined=True, residual=True, residual_norm=own) for own in (True, False))


def _section(network: str, dtype: str) -> Section:
    with torch.device("meta"):
        model = getattr(torchvision.models, network)().eval()
    return Section.of_resnet(freeze(model, dtype=getattr(torch, dtype)))


def _steps(section: Section, batch: int, dtype: str) -> Iterator[Problem]:
    with _unmeasured():
        plans = [build(section, (batch, 3, 224, 224), dtype, KNOWN["h200"], fusion=how) for how in ("conv", "tail")]
    for problem in (step.problem for plan in plans for step in plan.steps):
        if isinstance(problem, ConvProblem):
            yield from (problem, replace(problem, folded=False))
        elif isinstance(problem, TailProblem):
            yield from (problem, replace(problem, next_conv=None))
        elif isinstance(problem, StemProblem):
            yield from (problem, ConvProblem(problem.conv, dtype, folded=False))


@contextlib.contextmanager
def _unmeasured() -> Iterator[None]:
    """Whatever tables there are, here or in this machine's cache, plans are made as if there were none."""
    lookup = tables.lookup
    try:
        tables.lookup = lambda problem, gpu: None
        selection.forget()
        yield
    finally:
        tables.lookup = lookup
        selection.forget()


def _best(arch: str, problem: Problem, count: int) -> list[Job]:
    return [Job(arch, problem, config) for config in candidates(problem, GPUS[arch])[:count]]


def problem_of(key: str) -> Problem:
    """The problem whose `key` this is: tuned tables name problems by it."""
    kind, conv, dtype = re.match(r"(\w+) (.*?) (bfloat16|float16|float32)\b", key).groups()
    found = re.search(r" \+shortcut\((.*?)\)", key)
    shortcut = _conv_of(found[1]) if found else None
    own, statistics = "+bn(residual)" in key, "+statistics" in key
    residual = own or "+residual" in key
    if kind == "conv":
        folded, relu = not key.endswith(" bn"), "no-relu" not in key
        return ConvProblem(_conv_of(conv), dtype, residual, shortcut, folded, relu, own, statistics)
    if kind == "prologue":
        return PrologueProblem(_conv_of(conv), dtype, statistics, "joined" in key, residual, own)
    if kind == "gram_dgrad":
        return GramDgradProblem(_conv_of(conv), dtype, "+prologue" in key, "+add" in key)
    if kind == "stem":
        return StemProblem(_conv_of(conv), dtype)
    conv, out = conv.rsplit(" k", 1)
    conv2 = _conv_of(conv)
    plane = conv2.out_height, conv2.out_width
    following = re.search(r" \+next\(k(\d+)\)", key)
    return TailProblem(
        conv2,
        Conv(conv2.batch, conv2.out_channels, *plane, int(out)),
        dtype,
        shortcut,
        Conv(conv2.batch, int(out), *plane, int(following[1])) if following else None,
    )


def _conv_of(key: str) -> Conv:
    numbers = dict(re.findall(r"\b([nkfspdg])(\d+(?:x\d+)?)\b", key))
    image = map(int, re.search(r"\b(\d+)x(\d+)x(\d+)\b", key).groups())
    pairs = {}
    for letter, name in (("f", "kernel"), ("s", "stride"), ("p", "padding"), ("d", "dilation")):
        if letter in numbers:
            sides = numbers[letter].split("x")
            pairs[name] = (int(sides[0]), int(sides[-1]))
    return Conv(int(numbers["n"]), *image, int(numbers["k"]), **pairs, groups=int(numbers.get("g", 1)))


def _code(job: Job) -> tuple:
    """What machine code depends on, but for numbers that only count: images, rows, channels beyond three blocks."""
    problem, config = job.problem, job.config
    if isinstance(problem, StemProblem):
        return job.arch, problem.dtype, _boxless(config)
    if isinstance(problem, PrologueProblem):
        epilogue = problem.statistics, problem.joined, problem.residual, problem.residual_norm
        splits = config.splits * config.block_out >= problem.conv.out_channels
        rest = problem.conv.in_channels, problem.conv.out_channels % config.block_out, splits
        return job.arch, problem.dtype, replace(config, splits=1), epilogue, rest
    if isinstance(problem, GramDgradProblem):
        sides = problem.conv.in_channels, problem.conv.out_channels
        rest = (*((side % config.block_in, side > config.block_in) for side in sides), sides[0] % config.block_out)
        return job.arch, problem.dtype, config, problem.prologue, problem.add, rest
    if isinstance(problem, TailProblem):
        widths = (conv and (conv.in_channels, conv.out_channels, conv.stride) for conv in (*problem.convs, None))
        return job.arch, problem.dtype, _boxless(config), problem.shortcut is None, *widths
    conv, shortcut, (groups, group_in, group_out) = problem.conv, problem.shortcut, group_shape(problem)
    rest = group_in % config.block_in, group_out % config.block_out
    branch = shortcut and shortcut.in_channels % config.block_in
    epilogue = problem.residual, problem.folded, problem.relu, branch, problem.residual_norm, problem.statistics
    several = conv.kernel != (1, 1) or group_in > config.block_in
    taps = conv.kernel != (1, 1), conv.padding != (0, 0), several, groups > 1
    if isinstance(config, TmaConfig):
        taps = *taps, not conv.pointwise and conv.stride
    return job.arch, problem.dtype, _boxless(config), epilogue, taps, rest


def _boxless(config: Config) -> Config:
    """Of a box only the pixels; `representatives` has every box once besides."""
    return replace(config, box=(config.block_pixels, 1, 1)) if hasattr(config, "box") else config

"""The contenders of a network: the same weights run eager, compiled, fast and frozen, with the gate of each.

Inference: logits against a float64 run. Training: the first step's logits and whole gradient against float64, and for
`fast`, in every stage that is compared, also every block by itself (output, gradients, running statistics), because the
whole gradient of a deep network is noisy between any two right implementations, and in bfloat16 hardly anything else.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .. import freeze, memory, numerics, optimize
from ..capture import CapturedStep
from ..layers import any_size
from ..numerics import Comparison
from ..saved import saved_bytes
from . import checks, networks
from .harness import CONTENDERS, Contender

CHECKED_IMAGES = 2
"""Most images a gate uses: float64 is slow, and more of the same shows nothing new."""


@dataclass(frozen=True)
class Setting:
    """What all contenders of one comparison share. `stock` is in eval mode, float32; `images` is (N, 3, H, W) float32,
    channels_last; `amp_dtype` None is float32 throughout; `compile_modes` are torch.compile's, or "freezing";
    `train_stages` are stages of training to compare beside the one that "auto" takes."""

    stock: nn.Module
    images: Tensor
    amp_dtype: torch.dtype | None = None
    compile_modes: Sequence[str] = ()
    backend: str = "auto"
    train_stages: Sequence[int] = ()

    @property
    def device(self) -> str:
        return self.images.device.type

    def autocast(self):
        return torch.autocast(self.device, self.amp_dtype, enabled=self.amp_dtype is not None)


@dataclass(frozen=True)
class Variant:
    """One way to run the network.

    prepare: makes a callable of `images` from a copy of the stock network; called in the gate, where it may fail.
    context: entered around every call. repeats: how often one call runs the images, for what keeps several batches in
    flight. sgd: further arguments of the optimizer, in training. captured: the whole step as a CUDA graph, in training.
    """

    name: str
    label: str
    prepare: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    images: Tensor
    context: Callable[[], AbstractContextManager]
    repeats: int = 1
    sgd: Mapping[str, object] = field(default_factory=dict)
    captured: bool = False


def inference(setting: Setting, chosen: Sequence[str], others: Iterable[Variant] = ()) -> list[Contender]:
    """The contenders in `chosen` (keys of CONTENDERS), one for each compile mode, and `others`, in inference mode."""
    size = setting.images.shape[-1]
    flops = networks.flops_per_image(setting.stock, size, train=False) * len(setting.images)
    checked = setting.images[:CHECKED_IMAGES]
    reference = networks.float64_logits(setting.stock, checked)
    with torch.inference_mode(), setting.autocast():
        expected = setting.stock(checked)

    def contender(variant: Variant) -> Contender:
        model = functools.cache(lambda: variant.prepare(copy.deepcopy(setting.stock)))  # in the gate, which may fail

        def step() -> Tensor:
            with torch.inference_mode(), variant.context():
                return model()(variant.images)

        def check() -> list[Comparison]:
            return [numerics.compare("logits", step()[:CHECKED_IMAGES], expected, reference)]

        items, work = len(variant.images) * variant.repeats, flops * variant.repeats
        return Contender(variant.name, step, check, items, work, None, setting.device, variant.label)

    return [contender(variant) for variant in (*_variants(setting, chosen, train=False), *others)]


def training(
    setting: Setting, chosen: Sequence[str], others: Iterable[Variant] = (), lr: float = 0.01
) -> list[Contender]:
    """The contenders in `chosen` and `others`, a step being forward, cross-entropy, backward and SGD with momentum."""
    images = setting.images
    flops = networks.flops_per_image(setting.stock, images.shape[-1], train=True) * len(images)
    classes = setting.stock.fc.out_features
    labels = torch.randint(classes, (len(images),), generator=torch.Generator().manual_seed(2)).to(images.device)
    few = min(len(images), CHECKED_IMAGES)
    stages = {"fast": "auto"} | {f"fast_stage{stage}": stage for stage in setting.train_stages}  # graphs are of these
    reference = _first_step(copy.deepcopy(setting.stock).double(), images[:few].double(), labels[:few])
    with setting.autocast():
        expected = _first_step(copy.deepcopy(setting.stock), images[:few], labels[:few])

    def contender(variant: Variant) -> Contender:
        @functools.cache
        def state() -> tuple:
            model = variant.prepare(copy.deepcopy(setting.stock).train())
            return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **variant.sgd)

        def forward() -> Tensor:
            with variant.context():
                return F.cross_entropy(state()[0](variant.images).float(), labels)

        def saved() -> int:
            return saved_bytes(forward, state()[0].parameters())

        def step() -> Tensor:
            _, optimizer = state()
            loss = forward()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        @any_size()  # what is timed has more images
        def check() -> list[Comparison]:
            twin = variant.prepare(copy.deepcopy(setting.stock).train())
            with variant.context():
                actual = _first_step(twin, variant.images[:few], labels[:few])
            logits, gradients = zip(actual, expected, reference, strict=True)
            dtype = setting.amp_dtype or torch.float32
            found = [
                numerics.compare("training logits", *logits, compute_dtype=dtype),
                numerics.compare("whole gradient", *gradients, compute_dtype=dtype, k=numerics.K_WHOLE_GRADIENT),
            ]
            stage = stages.get(variant.name)
            found += _check_blocks(setting, stage) if stage is not None else []
            return found + ([_check_replay(step, replay(), *state())] if variant.captured else [])

        replay = functools.cache(lambda: CapturedStep(step))
        timed, items = (lambda: replay()()) if variant.captured else step, len(variant.images)
        return Contender(variant.name, timed, check, items, flops, None, setting.device, variant.label, saved)

    return [contender(variant) for variant in (*_variants(setting, chosen, train=True), *others)]


def _variants(setting: Setting, chosen: Sequence[str], train: bool) -> Iterator[Variant]:
    """Those in `chosen`, and `fast` in the stages of training that the setting names."""
    last = setting.images
    first = last.contiguous(memory_format=torch.contiguous_format)
    autocast = setting.autocast
    plain = {
        "eager_nchw": (lambda model: model.to(memory_format=torch.contiguous_format), first, autocast),
        "eager_channels_last": (lambda model: model, last, autocast),
        "eager_pooled": (lambda model: model, last, functools.partial(_pooled, setting)),
        "fast": (lambda model: optimize(model, backend=setting.backend), last, autocast),
        "frozen": (
            functools.partial(freeze, dtype=setting.amp_dtype, backend=setting.backend),
            last,
            contextlib.nullcontext,
        ),
    }
    for name in chosen:
        if name == "compile":
            for mode in setting.compile_modes:
                if not (train and mode == "freezing"):
                    context = functools.partial(_compiling, setting, mode)
                    yield Variant(f"{name}_{mode}", f"{CONTENDERS[name]} {mode}", _compiler(mode), last, context)
        elif name in ("eager_graph", "fast_graph"):
            if train and setting.device == "cuda":
                like = "fast" if name == "fast_graph" else "eager_channels_last"
                yield Variant(name, CONTENDERS[name], *plain[like], captured=True)
        elif not (train and name == "frozen"):
            yield Variant(name, CONTENDERS[name], *plain[name])
    for stage in setting.train_stages if train else ():
        prepare = functools.partial(optimize, backend=setting.backend, train_stage=stage)
        for name in ("fast", *(["fast_graph"] if "fast_graph" in chosen and setting.device == "cuda" else [])):
            named = f"fast_stage{stage}{name.removeprefix('fast')}", f"{CONTENDERS[name]}, stage {stage}"
            yield Variant(*named, prepare, last, autocast, captured=name == "fast_graph")


def _compiler(mode: str) -> Callable[[nn.Module], Callable]:
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 64  # the contenders share one forward's cache
    # Freezing as an option too, so that the cache tells it apart. Static shapes: the gate's batch may be smaller.
    how = {"options": {"freezing": True}} if mode == "freezing" else {"mode": mode}
    return lambda model: torch.compile(model, dynamic=False, **how)


@contextlib.contextmanager
def _compiling(setting: Setting, mode: str):
    import torch._inductor.config

    # Dynamo looks at the global while it traces, whatever the options say.
    with setting.autocast(), torch._inductor.config.patch(freezing=mode == "freezing"):
        yield


@contextlib.contextmanager
def _pooled(setting: Setting):
    with setting.autocast(), memory.pooled():
        yield


def _first_step(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the whole gradient, as one vector, of a step that changes no parameter."""
    model.train()
    logits = model(images)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def _check_replay(step: Callable, replay: Callable, model: nn.Module, optimizer: torch.optim.Optimizer) -> Comparison:
    """What a replayed step does to everything that a step changes, against the step itself; done twice, because sums of
    gradients may be in no fixed order."""
    momenta = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    changed = [tensor.detach() for tensor in (*model.parameters(), *model.buffers(), *momenta)]
    before = [tensor.clone() for tensor in changed]
    results = []
    for run in (step, step, replay):
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(old)
        run()
        results.append(torch.cat([tensor.float().flatten() for tensor in changed]))
    first, again, replayed = results
    return numerics.compare("a replayed step", replayed, again, first)


def _check_blocks(setting: Setting, stage: int | str) -> list[Comparison]:
    """Every fast block, in training, against its stock one with the network's own weights, on a small random input."""
    dtype = setting.amp_dtype or torch.float32
    generator = torch.Generator().manual_seed(3)
    results = []
    for name, block in copy.deepcopy(setting.stock).train().named_modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            x = torch.randn(2, block.conv1.in_channels, 8, 8, generator=generator).to(setting.device)
            x = x.to(memory_format=torch.channels_last)
            autocast = setting.amp_dtype is not None
            compared = checks.compare_block(block, x, dtype, autocast, setting.backend, stage)
            worst = numerics.worst(compared)
            results.append(replace(worst, name=f"{name} {worst.name}"))
    return results

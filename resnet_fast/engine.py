"""Runs a `Plan` on a GPU: weights packed once, activations in one arena laid out beforehand, one launch a step.

Nothing is chosen, tuned or synchronised in a call. The arena makes an engine one caller's at a time (`capture.Turns`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import _log
from .backends import library
from .backends.triton import launcher
from .capture import Turns
from .kernels import selection
from .plan import Plan, Step
from .problems import ConvProblem, PoolProblem, StemProblem, TailProblem

Tensors = dict[str, Tensor]


class LaunchFailed(RuntimeError):
    """A step's kernel does not compile or needs more of the GPU than it has; `step` is which."""

    def __init__(self, step: Step, error: Exception) -> None:
        super().__init__(f"{step.name}: {type(error).__name__}: {error}")
        self.step = step


class Engine:
    """`plan` on `device`. Call it with x (N, C, H, W) of the plan's input shape and dtype; y is a new tensor."""

    def __init__(self, plan: Plan, device: torch.device | str) -> None:
        self.plan = plan
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        offsets, size = plan.offsets()
        self.arena = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._static = {name: self._view(offset, plan.tensors[name]) for name, offset in offsets.items()}
        self._runs = [(step, _bind(step)) for step in plan.steps]
        self.graph: Callable[[Tensor], Tensor] | None = None
        """Whatever its owner has captured around it, so that the two go together."""
        self._turns = Turns(self.device)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The section's output for x, dense in channels_last."""
        with self._turns:
            tensors = self._tensors(x)
            for step, run in self._runs:
                _launch(step, run, tensors)
            return tensors[self.plan.output]

    def warmup(self, x: Tensor) -> None:
        """Run once, so that every kernel is compiled and loaded; after it calls can be captured in a CUDA graph.

        Raises:
            LaunchFailed: a kernel does not fit the GPU.
        """
        self(x)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def launches(self, x: Tensor) -> list[tuple[Step, Callable[[], None]]]:
        """Every step with a function that launches it alone, on tensors as a whole run left them: for timing."""
        tensors = self._tensors(x)
        for step, run in self._runs:
            _launch(step, run, tensors)
        return [(step, lambda run=run: run(dict(tensors))) for step, run in self._runs]

    def _tensors(self, x: Tensor) -> Tensors:
        plan = self.plan
        if tuple(x.shape) != plan.tensors[plan.input] or x.dtype != self.dtype or x.device.type != self.device.type:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} on {x.device}; this engine takes "
                f"{plan.tensors[plan.input]} {self.dtype} on {self.device}"
            )
        y = torch.empty(plan.tensors[plan.output], dtype=self.dtype, device=x.device, memory_format=torch.channels_last)
        return self._static | {plan.input: x.contiguous(memory_format=torch.channels_last), plan.output: y}

    def _view(self, offset: int, shape: tuple[int, int, int, int]) -> Tensor:
        batch, channels, height, width = shape
        size = batch * channels * height * width * self.dtype.itemsize
        flat = self.arena[offset : offset + size].view(self.dtype)
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


def fitted(make: Callable[[], Plan], x: Tensor) -> Engine:
    """A warm engine of the plan that `make` makes, for x. A kernel that the GPU refuses is planned around, and said."""
    while True:
        engine = Engine(make(), x.device)
        try:
            engine.warmup(x)
            return engine
        except LaunchFailed as error:
            _log.once(f"plan: {error}; that layer takes another path")
            selection.refuse(error.step.problem, engine.plan.gpu, str(error))


def _launch(step: Step, run: Callable[[Tensors], None], tensors: Tensors) -> None:
    try:
        run(tensors)
    except launcher().REFUSALS as error:
        raise LaunchFailed(step, error) from error


def _bind(step: Step) -> Callable[[Tensors], None]:
    """A function that runs `step` on tensors by name. The library's steps put a tensor of their own under y's name."""
    problem = step.problem
    if isinstance(problem, PoolProblem):
        return _bind_pool(step)
    if isinstance(problem, ConvProblem):
        return _bind_library(step) if step.choice.config is None else _bind_conv(step)
    if isinstance(problem, StemProblem):
        return _bind_stem(step)
    if isinstance(problem, TailProblem):
        return _bind_tail(step)
    raise TypeError(f"{step.name}: no kernel for a {type(problem).__name__}")


def _bind_pool(step: Step) -> Callable[[Tensors], None]:
    (x,), (y,) = step.reads, step.writes

    def run(tensors: Tensors) -> None:
        tensors[y] = library.max_pool(tensors[x])

    return run


def _bind_library(step: Step) -> Callable[[Tensors], None]:
    x, *added = step.reads
    (y,) = step.writes
    main, *branch = step.modules
    problem, variant = step.problem, step.choice.variant

    def run(tensors: Tensors) -> None:
        shortcut, residual = (tensors[added[0]], None) if branch else (None, tensors[added[0]] if added else None)
        weights = (branch[0].weight, branch[0].bias) if branch else (None, None)
        tensors[y] = library.conv(
            tensors[x], main.weight, main.bias, problem, residual, shortcut, *weights, variant=variant
        )

    return run


def _bind_conv(step: Step) -> Callable[[Tensors], None]:
    launch, problem, config = launcher(), step.problem, step.choice.config
    x, *added = step.reads
    (y,) = step.writes
    main, *branch = step.modules
    weight, norm = launch.pack_conv(main.weight, problem), launch.Norm(conv_bias=main.bias)
    if not branch:

        def run(tensors: Tensors) -> None:
            residual = tensors[added[0]] if added else None
            launch.conv(tensors[x], weight, tensors[y], problem, config, norm, residual)

        return run
    branch_weight = launch.pack_conv(branch[0].weight, ConvProblem(problem.shortcut, problem.dtype))
    branch_norm = launch.Norm(conv_bias=branch[0].bias)

    def run_with_shortcut(tensors: Tensors) -> None:
        shortcut = (tensors[added[0]], branch_weight, branch_norm)
        launch.conv(tensors[x], weight, tensors[y], problem, config, norm, None, *shortcut)

    return run_with_shortcut


def _bind_stem(step: Step) -> Callable[[Tensors], None]:
    launch, problem, config = launcher(), step.problem, step.choice.config
    (x,), (y,), (module,) = step.reads, step.writes, step.modules
    weight, norm = launch.pack_stem(module.weight), launch.Norm(conv_bias=module.bias)

    def run(tensors: Tensors) -> None:
        packed, conv_out = (tensors[name] for name in step.scratch)
        launch.stem(tensors[x], weight, tensors[y], problem, config, norm, packed, conv_out)

    return run


def _bind_tail(step: Step) -> Callable[[Tensors], None]:
    launch, problem, config = launcher(), step.problem, step.choice.config
    x, shortcut = step.reads
    y, *following = step.writes
    weights = tuple(
        launch.pack_conv(module.weight, ConvProblem(conv, problem.dtype))
        for module, conv in zip(step.modules, problem.convs, strict=True)
    )
    biases = tuple(module.bias for module in step.modules)

    def run(tensors: Tensors) -> None:
        next_y = tensors[following[0]] if following else None
        launch.tail(tensors[x], weights, biases, tensors[y], next_y, problem, config, tensors[shortcut])

    return run

"""What there is to do, phase by phase: one `Unit` is what a crash, a hang or the end of the budget can cost."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .runner import ROOT

PHASES = ("environment", "build", "tests", "ceilings", "layers", "networks", "training", "profile")
"""In the order they run: what is behind layers uses the table that it makes."""

BACKENDS = ("triton", "native", "reference")

GROUPS = {"ours": 30.0, "compile": 60.0, "jax": 60.0, "max-autotune": 400.0}
"""Contenders of a network that share a process, each beside eager channels_last: first guess of its seconds."""

TRAINING_GROUPS = {"ours": 45.0, "compile": 60.0}
"""The same of a training step; torch.compile is timed beside the stage that is taken by itself."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what. `rounds`: turns that a network's timing is spread over; `train_batches`: of steps
    of training; `top`: how many configurations of a layer."""

    models: tuple[str, ...] = ("resnet50", "resnet18", "resnext50_32x4d")
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    batches: tuple[int, ...] = (256, 1, 32)
    train_batches: tuple[int, ...] = (256, 64)
    img_size: int = 224
    device: str = "cuda"
    rounds: int = 10
    top: int = 12
    rehearse: bool = False

    @classmethod
    def rehearsal(cls) -> "Settings":
        """Everything once, tiny, on the CPU under Triton's interpreter."""
        return cls(("resnet_tiny",), ("float32",), (1,), (2,), 16, "cpu", 1, rehearse=True)


@dataclass(frozen=True)
class Unit:
    """module: what runs it, `python -m campaign.<module> --result FILE *args`.

    seconds: first guess; kind: what it is like, so that the time one took is the next one's guess. needs: packages.
    stoppable: takes --budget and goes on where it stopped. check: whether a crash of it leaves something unverified.
    writes: the phase whose file it writes by itself, given by --output; others report rows.
    """

    name: str
    module: str
    args: tuple[str, ...] = ()
    seconds: float = 30.0
    kind: str = ""
    needs: tuple[str, ...] = ("rich", "torchvision")
    stoppable: bool = False
    check: bool = False
    writes: bool = False

    @property
    def phase(self) -> str:
        return self.name.split("/")[0]

    @property
    def file(self) -> str:
        """The phase whose file has its results: networks' in training are with those in inference."""
        return "networks" if self.phase == "training" else self.phase


def of_phase(phase: str, settings: Settings) -> list[Unit]:
    """The units of a phase, the most wanted first."""
    units = list(_UNITS[phase](settings))
    if settings.rehearse:
        units = [replace(unit, args=(*unit.args, "--rehearse")) for unit in units]
    return [replace(unit, kind=unit.kind or unit.module) for unit in units]


def _environment(settings: Settings) -> Iterable[Unit]:
    yield Unit("environment", "environment", ("--device", settings.device), needs=())


def _build(settings: Settings) -> Iterable[Unit]:
    yield Unit("build", "build", seconds=200.0, needs=())


def _tests(settings: Settings) -> Iterable[Unit]:
    """`verify` of each backend, a unit a file of those that have tests for a GPU, the native kernels under
    compute-sanitizer: side by side, because nothing is timed."""
    for backend in ("reference",) if settings.rehearse else BACKENDS:
        args = ("--device", settings.device, "--backend", backend)
        yield Unit(f"tests/verify-{backend}", "verify", args, 120.0, kind=f"verify-{backend}", check=True)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text() and not (settings.rehearse and path.name != "test_gpu.py"):
            name = str(path.relative_to(ROOT / "tests").with_suffix(""))
            unit = Unit(f"tests/{name}", "gpu_tests", (str(path),), 60.0, needs=("rich", "pytest"), check=True)
            yield replace(unit, kind=unit.name)  # one file says nothing of another's time
    for tool in ("memcheck", "racecheck"):
        args = ("--tool", tool)
        yield Unit(f"tests/sanitizer-{tool}", "sanitizer", args, 150.0, kind=tool, needs=("rich", "pytest"), check=True)


def _ceilings(settings: Settings) -> Iterable[Unit]:
    yield Unit("ceilings", "ceilings", ("--device", settings.device, "--dtype", *settings.dtypes))


def _layers(settings: Settings) -> Iterable[Unit]:
    """Of inference first, then of training steps."""
    needs = ("rich", "torchvision", "triton")
    for task, prefix, batches in (("infer", "", settings.batches), ("train", "train-", settings.train_batches)):
        for dtype in settings.dtypes:
            for batch in batches:
                args = ("--model", *settings.models, "--dtype", dtype, "--batch-size", str(batch), "--task", task)
                args += ("--img-size", str(settings.img_size), "--device", settings.device)
                args += ("--top", str(settings.top))
                name = f"layers/{prefix}{dtype}-b{batch}"
                yield Unit(name, "layers", args, 60.0, needs=needs, stoppable=True, writes=True)


def _networks(settings: Settings) -> Iterable[Unit]:
    """Our own contenders in every dtype before anything else is compiled in any."""
    first, *others = (group for group in GROUPS if not (settings.rehearse and group == "max-autotune"))
    for group, dtype in [
        *((first, dtype) for dtype in settings.dtypes),
        *((group, dtype) for dtype in settings.dtypes for group in others),
    ]:
        for model in settings.models:
            for batch in settings.batches:
                yield Unit(
                    f"networks/{group}/{model}-{dtype}-b{batch}",
                    "networks",
                    _of_network(settings, model, dtype, batch, group),
                    GROUPS[group],
                    kind=f"networks/{group}/{model}",
                    needs=("rich", "torchvision", *(("jax",) if group == "jax" else ())),
                    check=group == first,
                )


def _of_network(settings: Settings, model: str, dtype: str, batch: int, group: str) -> tuple[str, ...]:
    """The command line that `networks.arguments` reads."""
    args = ("--model", model, "--dtype", dtype, "--batch-size", str(batch), "--group", group)
    args += ("--img-size", str(settings.img_size), "--device", settings.device)
    return (*args, "--rounds", str(settings.rounds))


def _training(settings: Settings) -> Iterable[Unit]:
    """Loss curves; then our own stages in every dtype before anything else is compiled in any."""
    args = ("--device", settings.device)
    needs = ("rich", "torchvision", "sklearn")
    yield Unit("training/convergence", "loss_curves", args, 120.0, needs=needs, check=True)
    for group, guess in TRAINING_GROUPS.items():
        for dtype in settings.dtypes:
            for model in settings.models:
                for batch in settings.train_batches:
                    yield Unit(
                        f"training/{group}/{model}-{dtype}-b{batch}",
                        "training",
                        _of_network(settings, model, dtype, batch, group),
                        guess,
                        kind=f"training/{group}/{model}",
                        check=group == "ours",
                    )


def _profile(settings: Settings) -> Iterable[Unit]:
    """The first model, dtype and batch size: the one that the others are judged by."""
    args = ("--model", settings.models[0], "--dtype", settings.dtypes[0], "--batch-size", str(settings.batches[0]))
    args += ("--img-size", str(settings.img_size), "--device", settings.device)
    yield Unit("profile", "profile", args, 60.0, writes=True)


_UNITS = {
    "environment": _environment,
    "build": _build,
    "tests": _tests,
    "ceilings": _ceilings,
    "layers": _layers,
    "networks": _networks,
    "training": _training,
    "profile": _profile,
}

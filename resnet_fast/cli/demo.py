"""`resnet-fast demo`: stock and fast ResNets on real photographs, then a real training run; a PNG and a JSON.

1. Photographs that ship inside installed packages (or --images), ImageNet preprocessing, ResNet-50 and ResNet-18 in
   float32 and, where the machine has it, bfloat16: logits of fast and frozen against float64, the same top-5, images/s.
   Without --weights the parameters are random and the batch-norm statistics calibrated on the photographs: the classes
   then mean nothing, the equality does.
2. Handwritten digits, trained stock and fast from the same start: coinciding curves, test accuracy, a saved fast
   network loaded into a stock one.
Exit code 1 if any check fails.

JSON: {"schema": "resnet_fast.demo/1", "passed", "seconds", "environment", "checks": [{"name", "passed", "detail"}],
"photos": [{"name", "source"}], "top5": [{"model", "photo", "stock", "fast"}], "throughput": [rows as bench's],
"digits": {"stock": {...}, "fast": {...}}}
"""

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.panel import Panel
from rich.table import Table
from torch import Tensor, nn

from .. import freeze, optimize
from ..problems import dtype_name
from . import UserError, bench, contenders, environment, harness, networks, output

MODELS = ("resnet50", "resnet18")
CHOSEN = ("eager_nchw", "eager_channels_last", "fast", "frozen")
ACCURACY = {False: 0.97, True: 0.90}
EPOCHS = {False: 8, True: 3}
"""By --quick."""


@dataclass
class Result:
    """What the demo found; filled as it goes."""

    checks: list[dict] = field(default_factory=list)
    top5: list[dict] = field(default_factory=list)
    throughput: list[tuple[str, str, list[harness.Row]]] = field(default_factory=list)
    curves: dict = field(default_factory=dict)

    def check(self, name: str, passed: bool, detail: str) -> None:
        self.checks.append({"name": name, "passed": bool(passed), "detail": detail})
        mark = "[green]ok[/]    " if passed else "[bold red]FAILED[/]"
        output.console.print(f"{mark} {name}: {detail}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--quick", action="store_true", help="ResNet-18 only and a shorter training run")
    flag("--images", metavar="DIR", help="your own photographs instead of those that ship in packages")
    flag("--weights", metavar="NAME", help="trained weights that torchvision downloads, such as IMAGENET1K_V2")
    flag(
        "--output", metavar="DIR", default="resnet_fast_demo", help="for demo.png and demo.json (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """The whole demo. Returns 1 if a check failed."""
    started = time.perf_counter()
    folder = output.check_writable_folder(args.output)
    for name in ("demo.png", "demo.json", "digits_fast.pt"):
        output.check_writable(folder / name)
    digits, figure, photos = _needed_modules()
    found = photos.from_folder(args.images) if args.images else photos.shipped()
    images = photos.preprocess(found)
    models = MODELS[1:] if args.quick else MODELS
    stocks = {name: networks.build(name, images, args.weights) for name in models}
    result = Result()

    sources = ", ".join(dict.fromkeys(photo.source for photo in found))
    _headline(f"1. {len(found)} photographs ({sources}) through {' and '.join(models)}, stock and fast")
    if args.weights is None:
        output.console.print(
            "Random weights: the class numbers mean nothing, that they agree does (--weights IMAGENET1K_V2: real ones)"
        )
    for name, stock in stocks.items():
        _photos(result, name, stock, images, [photo.name for photo in found], _categories(name, args.weights))
    for name, stock in stocks.items():
        for dtype in _dtypes():
            _throughput(result, name, stock, images, dtype, rounds=3 if args.quick else 5)
    _headline("2. ResNet-18 learns handwritten digits, stock and fast from the same start")
    _digits(result, digits, folder / "digits_fast.pt", args.quick)

    seconds = time.perf_counter() - started
    figure.draw(result, found, images, folder / "demo.png")
    record = {
        "schema": "resnet_fast.demo/1",
        "passed": all(check["passed"] for check in result.checks),
        "seconds": round(seconds, 1),
        "environment": environment.record(),
        "checks": result.checks,
        "photos": [{"name": photo.name, "source": photo.source} for photo in found],
        "top5": result.top5,
        "throughput": [
            {"model": model, "dtype": dtype, "batch_size": len(images)} | row.to_dict()
            for model, dtype, rows in result.throughput
            for row in rows
        ],
        "digits": {name: curve.to_dict() for name, curve in result.curves.items()},
    }
    output.write_json(record, folder / "demo.json")
    _conclude(result, folder, seconds)
    return 0 if record["passed"] else 1


def _needed_modules():
    """The parts that need the demo's extra packages, imported before anything long starts."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(f"the demo needs {error.name}: pip install 'resnet-fast[demo]'") from None
    from . import digits, figure, photos

    return digits, figure, photos


def _photos(result: Result, name: str, stock: nn.Module, images: Tensor, titles: list[str], categories) -> None:
    """Top-5 of stock, fast and frozen in float32, photo by photo."""
    fast, frozen = optimize(copy.deepcopy(stock)), freeze(stock)
    with torch.inference_mode():
        logits = {"stock": stock(images), "fast": fast(images), "frozen": frozen(images)}
    top = {who: values.softmax(1).topk(5) for who, values in logits.items()}
    table = Table("photo", "stock, top-5", "fast, top-5", "same", title=f"{name}, float32", title_justify="left")
    for index, title in enumerate(titles):
        words = {who: _words(found.indices[index], found.values[index], categories) for who, found in top.items()}
        same = all(torch.equal(top["stock"].indices[index], top[who].indices[index]) for who in ("fast", "frozen"))
        table.add_row(title, ", ".join(words["stock"]), ", ".join(words["fast"]), "[green]yes" if same else "[red]NO")
        result.top5.append({"model": name, "photo": title, "stock": words["stock"], "fast": words["fast"]})
    output.console.print(table)
    for who in ("fast", "frozen"):
        equal = (top["stock"].indices == top[who].indices).all(1)
        difference = (logits[who] - logits["stock"]).abs().max() / logits["stock"].abs().max()
        detail = f"{int(equal.sum())} of {len(titles)} photographs; logits differ by {difference:.1e} of the largest"
        result.check(f"{name} float32: top-5 of {who} and stock are equal", bool(equal.all()), detail)


def _throughput(result: Result, name: str, stock: nn.Module, images: Tensor, dtype: torch.dtype, rounds: int) -> None:
    """Logits against float64 and images per second, one dtype."""
    word = dtype_name(dtype)
    setting = contenders.Setting(stock, images, None if dtype == torch.float32 else dtype)
    with output.progress() as progress:
        line = progress.add_task(f"{name} {word}: float64 reference", total=None)
        found = contenders.inference(setting, CHOSEN)
        progress.update(line, total=harness.stages(found, rounds))

        def say(stage: str) -> None:
            progress.update(line, description=f"{name} {word}: {stage}", advance=1)

        rows = harness.run(found, rounds=rounds, warmup=1, progress=say)
    result.throughput.append((name, word, rows))
    title = f"{name}, {len(images)} photographs at a time, {word}, {environment.device_name('cpu')}"
    output.console.print(bench.table(rows, title))
    for row in rows:
        if row.contender in ("fast", "frozen"):
            ratio = "no ratio" if row.worst_ratio is None else f"{row.worst_ratio:.2f} of the allowed error"
            result.check(f"{name} {word}: logits of {row.label} against float64", row.match, row.reason or ratio)


def _digits(result: Result, digits, path: Path, quick: bool) -> None:
    data, models, epochs = digits.load(), digits.twins(), EPOCHS[quick]
    with output.progress() as progress:
        line = progress.add_task("training stock and fast", total=epochs * (len(data.train) // digits.BATCH))
        curves = digits.train(models, data, epochs, lambda: progress.advance(line))
    result.curves = curves
    table = Table("", *(f"epoch {number + 1}" for number in range(epochs)), title="mean loss, test accuracy")
    table.title_justify = "left"
    for name, curve in curves.items():
        pairs = zip(curve.epoch_means(), curve.accuracies, strict=True)
        table.add_row(name, *(f"{loss:.3f}, {accuracy:.1%}" for loss, accuracy in pairs))
    output.console.print(table)
    for name, (distance, allowed) in digits.coincide(curves["stock"], curves["fast"]).items():
        detail = f"{distance:.1e} apart (relative), {allowed:g} allowed"
        result.check(f"digits: loss curves, {name}", distance <= allowed, detail)
    for name, curve in curves.items():
        accuracy, needed = curve.accuracies[-1], ACCURACY[quick]
        result.check(f"digits: test accuracy of {name}", accuracy >= needed, f"{accuracy:.2%}, needed {needed:.0%}")
    same, logits = digits.round_trip(models["fast"], data.test, path)
    detail = f"{len(data.test)} predictions {'all equal' if same else 'DIFFER'}; {logits}"
    result.check("digits: fast, saved and loaded into a stock network", same and logits.match, detail)


def _dtypes() -> tuple[torch.dtype, ...]:
    """bfloat16 only where oneDNN has it: elsewhere PyTorch emulates it, slower than float32."""
    return (torch.float32, torch.bfloat16) if environment.cpu()["onednn_bf16"] else (torch.float32,)


def _categories(name: str, weights: str | None) -> list[str] | None:
    return None if weights is None else networks.find_weights(name, weights).meta["categories"]


def _words(indices: Tensor, values: Tensor, categories: list[str] | None) -> list[str]:
    if categories is None:
        return [f"#{index}" for index in indices.tolist()]
    return [f"{categories[i]} {value:.0%}" for i, value in zip(indices.tolist(), values.tolist(), strict=True)]


def _headline(text: str) -> None:
    output.console.print()
    output.console.print(Panel(text, style="bold", expand=False))


def _conclude(result: Result, folder: Path, seconds: float) -> None:
    passed = sum(check["passed"] for check in result.checks)
    good = passed == len(result.checks)
    lines = [f"{passed} of {len(result.checks)} checks passed in {seconds:.0f} s"]
    for model, dtype, rows in result.throughput:
        speeds = {row.contender: row for row in rows if row.ratio is not None}
        ratios = ", ".join(f"{name} {speeds[name].ratio:.2f}x" for name in ("fast", "frozen") if name in speeds)
        lines.append(f"{model} {dtype}: {ratios} eager channels_last")
    steps = {name: curve.to_dict()["median_step_ms"] for name, curve in result.curves.items()}
    lines.append(f"digits, training step: stock {steps['stock']:.0f} ms, fast {steps['fast']:.0f} ms")
    lines.append(f"picture: {folder / 'demo.png'}; all numbers: {folder / 'demo.json'}")
    output.console.print(Panel("\n".join(lines), style="green" if good else "red", expand=False))

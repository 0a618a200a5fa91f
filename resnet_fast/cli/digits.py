"""A real training run: scikit-learn's 1,797 handwritten digits, a ResNet-18 with a stem for 8 x 8 images.

Stock and fast start from the same weights and see the same batches. They take turns, step by step, so that their times
are comparable too. Rounding differs, and training amplifies it, in one stock network against another (in NCHW) as well:
so the curves coincide closely in the first steps, before that (measured: 1e-4 at most), and in each epoch's mean
loosely (measured: 7 %).
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from .. import numerics, optimize
from ..numerics import Comparison

FIRST_STEPS = 10
TOLERANCE = {"first steps": 1e-3, "epoch means": 0.15}
BATCH = 48


@dataclass
class Curve:
    """What one network did: loss of every step, test accuracy after every epoch, time of every step (ms)."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def epoch_means(self) -> list[float]:
        steps = len(self.losses) // len(self.accuracies)
        return [statistics.fmean(self.losses[start : start + steps]) for start in range(0, len(self.losses), steps)]

    def to_dict(self) -> dict:
        return {
            "losses": self.losses,
            "epoch_means": self.epoch_means(),
            "accuracies": self.accuracies,
            "median_step_ms": statistics.median(self.step_ms),
        }


@dataclass(frozen=True)
class Data:
    """(N, 1, 8, 8) images with mean 0 and variance 1, and labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load() -> Data:
    """A fixed split, four fifths to train on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = ((images - images.mean()) / images.std()).to(memory_format=torch.channels_last)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    split = len(labels) * 4 // 5
    train, test = order[:split], order[split:]
    return Data(images[train], labels[train], images[test], labels[test])


def build(seed: int = 0) -> nn.Module:
    """torchvision's ResNet-18 for ten classes and one small channel: a 3 x 3 stem without stride and pooling."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Residual branches that start at zero keep rounding from being amplified in the first steps.
        model = resnet18(num_classes=10, zero_init_residual=True)
        model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def train(models: dict[str, nn.Module], data: Data, epochs: int, on_step: Callable[[], None]) -> dict[str, Curve]:
    """Train all `models` in turns on the same batches; SGD with momentum, one learning-rate cycle."""
    steps = len(data.train) // BATCH
    curves = {name: Curve() for name in models}
    runs = {}
    for name, model in models.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        runs[name] = model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, epochs * steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        order = torch.randperm(len(data.train), generator=generator)
        for batch in order[: steps * BATCH].view(steps, BATCH):
            images, labels = data.train[batch].to(memory_format=torch.channels_last), data.train_labels[batch]
            for name, (model, optimizer, schedule) in runs.items():
                model.train()
                start = time.perf_counter()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                curves[name].step_ms.append((time.perf_counter() - start) * 1e3)
                curves[name].losses.append(loss.item())
            on_step()
        for name, model in models.items():
            correct = predict(model, data.test).argmax(1) == data.test_labels
            curves[name].accuracies.append(correct.double().mean().item())
    return curves


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, in eval mode."""
    return model.eval()(images)


def coincide(stock: Curve, fast: Curve) -> dict[str, tuple[float, float]]:
    """Largest relative distances of the curves: name -> (found, allowed)."""
    pairs = zip(stock.losses[:FIRST_STEPS], fast.losses[:FIRST_STEPS], strict=True)
    means = zip(stock.epoch_means(), fast.epoch_means(), strict=True)
    # Late losses are near zero, where a relative distance says nothing: hence the 0.1.
    found = (max(abs(a - b) / a for a, b in pairs), max(abs(a - b) / (a + 0.1) for a, b in means))
    return {name: (value, allowed) for (name, allowed), value in zip(TOLERANCE.items(), found, strict=True)}


def round_trip(fast: nn.Module, images: Tensor, path: Path) -> tuple[bool, Comparison]:
    """Save fast's weights, load them into a stock network: are all predictions equal, and the logits?"""
    torch.save(fast.state_dict(), path)
    stock = build(seed=1)
    stock.load_state_dict(torch.load(path, weights_only=True))
    ours, theirs = predict(fast, images), predict(stock, images)
    reference = predict(copy.deepcopy(stock).double(), images.double())
    return bool((ours.argmax(1) == theirs.argmax(1)).all()), numerics.compare("logits", ours, theirs, reference)


def twins(seed: int = 0) -> dict[str, nn.Module]:
    """Stock and fast with the same weights."""
    stock = build(seed)
    return {"stock": stock, "fast": optimize(copy.deepcopy(stock))}

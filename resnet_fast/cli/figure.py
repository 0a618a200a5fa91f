"""The demo's picture: photographs with their top-5, the two training runs, the throughput bars."""

from pathlib import Path

import numpy as np
from torch import Tensor

from . import environment, output, photos, plots

_STOCK, _FAST = "#7d8797", plots.COLOURS["fast"]
MOST_PHOTOS = 8


def draw(result, found: list, images: Tensor, path: Path) -> None:
    """Write `result` (demo.Result) as a PNG."""
    plt = plots.pyplot()
    bars = len(result.throughput)
    figure = plt.figure(figsize=(15, 10.5), layout="constrained")
    figure.suptitle(
        f"resnet_fast on {environment.device_name('cpu')}: stock and fast, the same answers and what they take",
        fontsize=14,
        fontweight="bold",
    )
    rows = figure.subfigures(3, 1, height_ratios=(1.02, 1, 0.95))
    _photos(rows[0], result, found[:MOST_PHOTOS])
    _training(rows[1], result)
    for axis, (model, dtype, measured) in zip(
        rows[2].subplots(1, bars, squeeze=False)[0], result.throughput, strict=True
    ):
        plots.bars(
            axis, measured, f"{model}, {dtype}, {len(images)} photographs", "images / s (ratio to eager channels_last)"
        )
    for axis in rows[2].axes[1:]:
        axis.set_yticklabels([])
    with output.writing(path):
        figure.savefig(path, dpi=130)
    plt.close(figure)


def _photos(part, result, found: list) -> None:
    model = result.top5[0]["model"]
    rows = {row["photo"]: row for row in result.top5 if row["model"] == model}
    part.suptitle(f"{model}, float32: the five likeliest classes of each photograph", fontsize=9, x=0.01, ha="left")
    for axis, photo in zip(part.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        axis.imshow(np.asarray(photos.crop(photo)))
        axis.axis("off")
        axis.set_anchor("N")
        stock, fast = rows[photo.name]["stock"], rows[photo.name]["fast"]
        mark, colour = ("same top-5", "#17998b") if stock == fast else ("DIFFERENT", "#b00020")
        axis.set_title(f"{photo.name}: {mark}", fontsize=9, color=colour)
        numbers = all(word.startswith("#") for word in stock)
        for place, (who, words, colour) in enumerate((("stock", stock, _STOCK), ("fast", fast, _FAST))):
            text = f"{who}\n" + "\n".join(word if numbers else word[:18] for word in words)
            axis.text(0.02 + 0.52 * place, -0.04, text, transform=axis.transAxes, va="top", fontsize=8, color=colour)


def _training(part, result) -> None:
    stock, fast = result.curves["stock"], result.curves["fast"]
    losses, difference, accuracy, steps = part.subplots(1, 4, width_ratios=(1.5, 1, 1, 0.8))
    losses.semilogy(stock.losses, color=_STOCK, linewidth=3.2, alpha=0.6, label="stock")
    losses.semilogy(fast.losses, color=_FAST, linewidth=0.9, label="fast")
    losses.set(xlabel="step", title="digits, ResNet-18: training loss")
    losses.legend(frameon=False)

    epochs = range(1, len(stock.accuracies) + 1)
    difference.plot(epochs, stock.epoch_means(), color=_STOCK, linewidth=4, alpha=0.6, label="stock")
    difference.plot(epochs, fast.epoch_means(), color=_FAST, marker="o", markersize=4, linewidth=1.2, label="fast")
    difference.set(xlabel="epoch", title="mean loss of each epoch", ylim=(0, None))
    difference.legend(frameon=False)

    accuracy.plot(epochs, [100 * a for a in stock.accuracies], color=_STOCK, linewidth=4, alpha=0.6, label="stock")
    accuracy.plot(
        epochs, [100 * a for a in fast.accuracies], color=_FAST, marker="o", markersize=4, linewidth=1.2, label="fast"
    )
    accuracy.axhline(97, color="#b8bec9", linewidth=0.8, linestyle="--")
    final = f"stock {stock.accuracies[-1]:.1%}, fast {fast.accuracies[-1]:.1%}"
    accuracy.set(xlabel="epoch", title=f"test accuracy, % ({final})")

    medians = [curve.to_dict()["median_step_ms"] for curve in (stock, fast)]
    steps.bar(("stock", "fast"), medians, color=(_STOCK, _FAST), width=0.6)
    for place, value in enumerate(medians):
        steps.text(place, value, f"{value:.1f}", ha="center", va="bottom", fontsize=9)
    steps.set(title="training step, ms")
    for axis in part.axes:
        axis.title.set_fontsize(9)
        axis.title.set_ha("left")
        axis.title.set_x(0)

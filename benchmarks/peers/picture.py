"""The PNG: one panel of bars a case, side by side."""

from collections.abc import Sequence
from pathlib import Path

from resnet_fast.cli import plots
from resnet_fast.cli.harness import Row

_COLUMNS = 4


def draw(panels: dict[str, Sequence[Row]], title: str, path: Path) -> None:
    """panels: rows by title."""
    plt = plots.pyplot()
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    longest = max(len(rows) for rows in panels.values())
    size = (1.6 + 4.6 * columns, 0.7 + lines * (1.0 + 0.3 * longest))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    left: list[str] = []
    for place, (axis, (name, rows)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        plots.bars(axis, rows, name, "images / s (ratio to eager channels_last)")
        axis.margins(x=0.3)
        labels = [row.label for row in rows]
        if place % columns and labels == left:
            axis.set_yticklabels([])
        left = labels
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)

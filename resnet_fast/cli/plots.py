"""Charts as PNG files (matplotlib, no display)."""

from collections.abc import Sequence
from pathlib import Path

from . import UserError
from .harness import Row

COLOURS = {
    "eager_nchw": "#b8bec9",
    "eager_channels_last": "#7d8797",
    "eager_pooled": "#5d7a9c",
    "fast": "#e4572e",
    "frozen": "#17998b",
}
_COMPILED = ("#c8a2d8", "#a678bf", "#8355a0")


def pyplot():
    """matplotlib.pyplot on the Agg backend; UserError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'resnet-fast[demo]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def bench(groups: dict[str, Sequence[Row]], title: str, path: str | Path) -> None:
    """One panel of bars for each group of rows (title -> rows)."""
    plt = pyplot()
    longest = max(len(rows) for rows in groups.values())
    figure, axes = plt.subplots(1, len(groups), figsize=(6.5 * len(groups), 1.6 + 0.5 * longest), squeeze=False)
    for axis, (name, rows) in zip(axes[0], groups.items(), strict=True):
        bars(axis, rows, name)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(axis, rows: Sequence[Row], title: str, unit: str = "images / s") -> None:
    """Median throughput, whiskers from p80's to p20's time, the ratio to the baseline written at the bar's end."""
    compiled = [row.contender for row in rows if row.contender.startswith("compile")]
    for place, row in enumerate(rows):
        if row.median_per_s is None:
            axis.text(0, place, "  failed verification, not timed", va="center", color="#b00020")
            continue
        colour = COLOURS.get(row.contender)
        if colour is None:
            colour = _COMPILED[compiled.index(row.contender) % len(_COMPILED)] if compiled else "#7d8797"
        low, high = row.median_per_s - row.p80_per_s, row.p20_per_s - row.median_per_s
        axis.barh(place, row.median_per_s, color=colour, height=0.68)
        axis.errorbar(row.median_per_s, place, xerr=[[low], [high]], color="#333333", capsize=2.5, linewidth=1)
        ratio = "" if row.ratio is None else f" ({row.ratio:.2f}x)"
        axis.text(row.p20_per_s, place, f"  {row.median_per_s:.3g}{ratio}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.set_title(title, fontsize=9, loc="left")
    axis.margins(x=0.24)
    axis.set_xlim(left=0)

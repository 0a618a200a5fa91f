"""Charts as PNG files (matplotlib, no display)."""

from collections.abc import Sequence
from pathlib import Path

from . import UserError, output
from .harness import NOT_RUN, Row

COLOURS = {
    "eager_nchw": "#b8bec9",
    "eager_channels_last": "#7d8797",
    "eager_pooled": "#5d7a9c",
    "fast": "#e4572e",
    "frozen": "#17998b",
}
_OTHER = "#c9a227"
_COMPILED = ("#c8a2d8", "#a678bf", "#8355a0")
_STAGES = {
    "stem": "#7d8797",
    "layer1": "#e4572e",
    "layer2": "#e8a33d",
    "layer3": "#17998b",
    "layer4": "#3a6ea5",
}
_LABELLED = 6


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
    with output.writing(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(axis, rows: Sequence[Row], title: str, unit: str = "images / s") -> None:
    """Median throughput, whiskers from p80's to p20's time, the ratio to the baseline written at the bar's end."""
    compiled = [row.contender for row in rows if row.contender.startswith("compile")]
    for place, row in enumerate(rows):
        if row.median_per_s is None:
            why = NOT_RUN if row.worst_tensor == NOT_RUN else "failed verification, not timed"
            axis.text(0, place, f"  {why}", va="center", color="#b00020")
            continue
        colour = COLOURS.get(row.contender)
        if colour is None:
            known = row.contender in compiled
            colour = _COMPILED[compiled.index(row.contender) % len(_COMPILED)] if known else _OTHER
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


def roofline(
    rows: Sequence, peak: float, bandwidth: float, title: str, path: str | Path, memory: float | None = None
) -> None:
    """Steps (a profile's rows) under the roof of `peak` FLOP/s and `bandwidth` bytes/s, in TFLOP/s over FLOP/byte.

    A step's limit is a diamond on the roof, its time, measured or else predicted, a circle below. Pools, which compute
    nothing, and the head have no place here. The largest gaps are numbered and listed. memory: a lower bandwidth that
    limits are not made of, dashed.
    """
    plt = pyplot()
    figure, (axis, below) = plt.subplots(2, 1, figsize=(9.5, 8), height_ratios=(5, 1), layout="constrained")
    rows = [row for row in rows if row.intensity and row.stage in _STAGES]
    measured = all(row.time_us is not None for row in rows)
    times = [row.time_us if measured else row.predicted_us for row in rows]
    ridge, intensities = peak / bandwidth, [row.intensity for row in rows]
    left, right = min(0.7 * min(intensities), 0.5 * ridge), 1.5 * max(*intensities, ridge)
    lowest = min(_tflop_per_s(row, time) for row, time in zip(rows, times, strict=True))
    axis.plot([left, ridge, right], [left * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="#333333", linewidth=1.3)
    if memory is not None:
        slope, ends = memory / 1e12, (left, peak / memory)
        axis.plot(ends, [x * slope for x in ends], color="#333333", linewidth=1, linestyle="--")
    for row, time in zip(rows, times, strict=True):
        colour, limit, reached = _STAGES[row.stage], _tflop_per_s(row, row.limit_us), _tflop_per_s(row, time)
        axis.plot([row.intensity] * 2, [limit, reached], color=colour, linewidth=1, alpha=0.7, zorder=2)
        axis.scatter(row.intensity, limit, marker="D", s=16, color=colour, zorder=3)
        style = {"facecolor": colour if measured else "white", "edgecolor": colour, "linewidth": 1.6}
        axis.scatter(row.intensity, reached, s=40 + 2500 * time / sum(times), zorder=4, **style)
    _number_gaps(axis, below, rows, times, "white" if measured else "#333333")
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(0.7 * lowest, 1.35 * peak / 1e12))
    axis.set(xlabel="arithmetic intensity, FLOP / byte", ylabel="TFLOP / s")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_formatter("")
    axis.grid(color="#eceef1", linewidth=0.8, zorder=0)
    above = {"textcoords": "offset points", "color": "#333333"}
    axis.annotate(f"{peak / 1e12:.3g} TFLOP/s", (right, peak / 1e12), (-4, 5), ha="right", **above)
    halfway = (left * ridge) ** 0.5
    axis.annotate(_rate(bandwidth), (halfway, halfway * bandwidth / 1e12), (-6, 4), ha="right", **above)
    if memory is not None:
        what = f"{_rate(memory)} from memory"
        axis.annotate(what, (halfway, halfway * memory / 1e12), (6, -12), ha="left", **above)
    _roofline_legend(axis, {row.stage for row in rows}, measured)
    axis.set_title(title, fontsize=10, loc="left", pad=26)
    with output.writing(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e12:.2f} TB/s" if bandwidth >= 1e12 else f"{bandwidth / 1e9:.3g} GB/s"


def _tflop_per_s(row, microseconds: float) -> float:
    return row.gflop * 1e3 / microseconds


def _us(microseconds: float) -> str:
    return f"{microseconds:.0f} us" if microseconds >= 100 else f"{microseconds:.3g} us"


def _number_gaps(axis, below, rows: Sequence, times: Sequence[float], colour: str) -> None:
    """Numbers in the marks of the steps that lose most time to their limits, equal steps together; a list `below`."""
    alike: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(row.problem, []).append(place)

    def gap(places: list[int]) -> float:
        return sum(times[place] - rows[place].limit_us for place in places)

    below.axis("off")
    heading = "most time above the limit (a circle grows with its share of all time)"
    below.text(0, 1, heading, fontweight="bold", fontsize=8, va="top", transform=below.transAxes)
    for number, places in enumerate(sorted(alike.values(), key=gap, reverse=True)[:_LABELLED], 1):
        row, time = rows[places[0]], sum(times[place] for place in places) / len(places)
        nearest = min((times[place] for place in places), key=lambda each: abs(each - time))
        at = (row.intensity, _tflop_per_s(row, nearest))
        axis.annotate(str(number), at, ha="center", va="center", fontsize=7, fontweight="bold", color=colour, zorder=5)
        what = f"{row.step}{f' and {len(places) - 1} like it' if len(places) > 1 else ''}"
        cells = (f"{number}", f"+{_us(gap(places))}", what, f"{_us(time)}, limit {_us(row.limit_us)}")
        for x, cell in zip((0, 0.03, 0.11, 0.55), cells, strict=True):
            below.text(x, 1 - number / (_LABELLED + 1), cell, va="top", fontsize=8, transform=below.transAxes)


def _roofline_legend(axis, stages: set[str], measured: bool) -> None:
    marks = [axis.scatter([], [], s=50, color=colour, label=name) for name, colour in _STAGES.items() if name in stages]
    marks.append(axis.scatter([], [], marker="D", s=16, color="#333333", label="limit"))
    face, label = ("#333333", "measured") if measured else ("white", "predicted, not measured")
    marks.append(axis.scatter([], [], s=50, facecolor=face, edgecolor="#333333", label=label))
    place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1), "ncols": len(marks)}
    axis.legend(handles=marks, frameon=False, fontsize=8, handletextpad=0.1, columnspacing=1.2, **place)

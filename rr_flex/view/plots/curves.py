"""Curves: a measure against density, and time against length."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from rr_flex.view.plots.style import DASHES, LINES, MARKERS, short

Points = Sequence[tuple[float, float]]
Band = Sequence[tuple[float, float, float]]  # density, low, high


def density_figure(
    curves: Mapping[str, Points], *, measure: str, bands: Mapping[str, Band] | None = None, log: bool = False
) -> Figure:
    """`measure` against density: by label, points (density, value), and where given the band around them.

    `measure` is the axis's label, as in "mass recalled" or "output error".
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for (label, points), look in zip(curves.items(), looks(), strict=False):
        density, value = zip(*sorted(points), strict=True)
        axis.plot(density, value, label=label, markersize=5, **look)
        for at, low, high in [tuple(zip(*sorted((bands or {})[label]), strict=True))] if label in (bands or {}) else []:
            axis.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axis.set(xlabel="density (kept share of the visible blocks)", ylabel=measure)
    if log:
        axis.set_yscale("log")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    finish(axis)
    return figure


def time_figure(
    lines: Mapping[str, Mapping[int, float]], *, title: str = "", break_even: int | None = None, unit: str = "ms"
) -> Figure:
    """Time against length, both logarithmic: by label, {tokens: time}. Labels that begin with "dense" are dashed.

    `break_even`: tokens from which on sparse attention pays, drawn as an upright line.
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axis = figure.subplots()
    for (label, points), look in zip(lines.items(), looks(), strict=False):
        look["linestyle"] = "--" if label.startswith("dense") else "-"
        length, time = zip(*sorted(points.items()), strict=True)
        axis.plot(length, time, label=label, markersize=5, **look)
    if break_even is not None:
        axis.axvline(
            break_even, color="#666666", linewidth=1, linestyle=":", label=f"break-even, {break_even:,} tokens"
        )
    axis.set(xlabel="length (tokens)", ylabel=f"time ({unit})", title=title)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({length for points in lines.values() for length in points})
    axis.set_xticks(ticks, [short(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    finish(axis)
    return figure


def finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, framealpha=0.9)


def looks():
    """A colour, a marker and a dash for each line: any one of them tells neighbours apart."""
    for color, marker, dash in zip(cycle(LINES), cycle(MARKERS), cycle(DASHES), strict=False):
        yield {"color": color, "marker": marker, "linestyle": dash}

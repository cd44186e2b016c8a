"""Curves of a measure against density."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rr_flex.view.plots.style import DASHES, LINES, MARKERS


def density_figure(curves: Mapping[str, Sequence[tuple[float, float]]], *, measure: str, log: bool = False) -> Figure:
    """`measure` against density: by label, points (density, value).

    `measure` is the axis's label, as in "mass recalled" or "output error".
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for number, (label, points) in enumerate(curves.items()):
        # A colour, a marker and a dash: any one of them tells neighbours apart.
        names = zip(("color", "marker", "linestyle"), (LINES, MARKERS, DASHES), strict=True)
        look = {name: choices[number % len(choices)] for name, choices in names}
        axis.plot(*zip(*sorted(points), strict=True), label=label, markersize=5, **look)
    axis.set(xlabel="density (kept share of the visible blocks)", ylabel=measure)
    if log:
        axis.set_yscale("log")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    finish(axis)
    return figure


def finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, framealpha=0.9)

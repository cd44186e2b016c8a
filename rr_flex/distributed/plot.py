"""Pictures of `rr-flex plan`: time against ranks, measured beside predicted."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

MARKS = "os^vDP*X<>"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A plan's rows as lines over ranks; checked rows as measured marks with a dash where the model puts them."""
    checked = "predicted_ms" in rows[0]
    places = sorted({place_of(row) for row in rows}) if checked else []
    figure = Figure(figsize=(max(7, 1.5 * len(places)), 4.5), layout="constrained")
    axes = figure.subplots()
    if checked:
        draw_checked(axes, rows, places)
    else:
        draw_plan(axes, rows)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("ms, slowest rank")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_plan(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        own = [row for row in rows if row["way"] == way]
        style = {"color": f"C{number % 10}", "marker": MARKS[number % len(MARKS)], "label": way}
        axes.plot([row["ranks"] for row in own], [1000 * row["seconds"] for row in own], **style)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs")


def draw_checked(axes: Axes, rows: list[dict[str, Any]], places: list[tuple[int, float]]) -> None:
    """A color for each way, a mark for each number of ranks."""
    ways, ranks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("way", "ranks"))
    names = sorted({(row["ranks"], ways.index(row["way"])) for row in rows})
    for number, (count, way) in enumerate(names):
        own = [row for row in rows if (row["ranks"], ways.index(row["way"])) == (count, way)]
        x = [places.index(place_of(row)) + 0.8 * (number + 0.5) / len(names) - 0.4 for row in own]
        label = ways[way] if count == 1 else f"{ways[way]}, {count} ranks"
        style = {"color": f"C{way % 10}", "marker": MARKS[ranks.index(count) % len(MARKS)], "label": label}
        axes.plot(x, [row["ms"] for row in own], linestyle="", markersize=5, **style)
        axes.plot(x, [row["predicted_ms"] for row in own], "_", color=style["color"], markersize=10)
    axes.set_xticks(range(len(places)), [f"{length >> 10}K\n{density:.2f}" for length, density in places])
    axes.set_xlabel("tokens, density; a dash is the model's prediction")


def place_of(row: dict[str, Any]) -> tuple[int, float]:
    """Tokens and density, to two digits, dense attention's being 1."""
    return row["length"], round(row["density"] or 1.0, 2)

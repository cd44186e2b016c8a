"""Pictures of `rr-flex plan`: time against ranks, measured beside predicted."""

from typing import Any

from matplotlib.figure import Figure

MARKS = "os^vDP*X<>"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A plan's rows as lines over ranks; checked rows as measured marks with a dash where the model puts them."""
    checked = "predicted_ms" in rows[0]
    groups = sorted({place_of(row) for row in rows}) if checked else []
    figure = Figure(figsize=(max(6, 0.7 * len(groups)), 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys((row["way"], row["ranks"] if checked else None) for row in rows))
    for number, (way, ranks) in enumerate(names):
        own = [row for row in rows if row["way"] == way and ranks in (None, row["ranks"])]
        label = way if ranks in (None, 1) else f"{way}, {ranks} ranks"
        style = {"color": f"C{number % 10}", "marker": MARKS[number % len(MARKS)], "label": label}
        if not checked:
            axes.plot([row["ranks"] for row in own], [1000 * row["seconds"] for row in own], **style)
            continue
        x = [groups.index(place_of(row)) + 0.8 * (number + 0.5) / len(names) - 0.4 for row in own]
        axes.plot(x, [row["ms"] for row in own], linestyle="", markersize=5, **style)
        axes.plot(x, [row["predicted_ms"] for row in own], "_", color=style["color"], markersize=14)
    if checked:
        axes.set_xticks(range(len(groups)), [f"{length >> 10}K\n{density:.2f}" for length, density in groups])
        axes.set_xlabel("tokens, density; a dash is the model's prediction")
    else:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("GPUs")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("ms, slowest rank")
    axes.legend(fontsize=8)
    return figure


def place_of(row: dict[str, Any]) -> tuple[int, float]:
    """Tokens and density, to two digits, dense attention's being 1."""
    return row["length"], round(row["density"] or 1.0, 2)

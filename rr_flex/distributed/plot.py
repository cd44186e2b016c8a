"""Pictures of `rr-flex plan`: time against ranks, measured beside predicted."""

from typing import Any

from matplotlib.figure import Figure

MARKS = "os^vDP*X<>"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A plan's rows as lines over ranks; checked rows as measured marks with a dash where the model puts them."""
    checked = "predicted_ms" in rows[0]
    groups = sorted({(row["length"], row["density"] or 1.0) for row in rows}) if checked else [None]
    figure = Figure(figsize=(5 + 0.12 * len(rows) * checked, 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["way"] for row in rows))
    for number, name in enumerate(names):
        own = [row for row in rows if row["way"] == name]
        style = {"color": f"C{number % 10}", "marker": MARKS[number % len(MARKS)], "label": name}
        if checked:
            x = [groups.index((row["length"], row["density"] or 1.0)) + 0.07 * (number - len(names) / 2) for row in own]
            axes.plot(x, [row["ms"] for row in own], linestyle="", **style)
            axes.plot(x, [row["predicted_ms"] for row in own], "_", color=style["color"], markersize=12)
        else:
            axes.plot([row["ranks"] for row in own], [1000 * row["seconds"] for row in own], **style)
    if checked:
        labels = [f"{length >> 10}K\n{'dense' if density == 1.0 else f'{density:.2f}'}" for length, density in groups]
        axes.set_xticks(range(len(groups)), labels)
        axes.set_xlabel("tokens, density; a dash is the model's prediction")
    else:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("GPUs")
    axes.set_yscale("log")
    axes.set_ylabel("ms, slowest rank")
    axes.legend(fontsize=8)
    return figure

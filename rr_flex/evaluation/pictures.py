"""Curves of error and divergence against density, a line a rule with its interval over texts. Needs matplotlib."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from rr_flex.evaluation.judging import Record
from rr_flex.evaluation.predictions import Prediction, curve, kl_at, value_at
from rr_flex.evaluation.summaries import summarise

LEAST = 1e-6  # shown: a logarithmic axis has no place for nothing


def error_figure(records: Sequence[Record], title: str = "") -> Figure:
    """Output error, and mass lost, against density; each layer at the density; bands are 95 % over texts."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    for axis, measure in zip(figure.subplots(1, 2), ("error", "recall"), strict=True):
        summary = summarise(records, measure)
        for number, rule in enumerate(summary):
            densities = sorted(summary[rule])
            intervals = [summary[rule][density] for density in densities]
            if measure == "recall":
                intervals = [(1 - x.mean, 1 - x.high, 1 - x.low) for x in intervals]
            mean, low, high = zip(*[[max(x, LEAST) for x in interval] for interval in intervals], strict=True)
            style = "--" if rule.startswith("oracle") else "-"
            axis.plot(densities, mean, style, color=f"C{number % 10}", marker="o", markersize=3, label=rule)
            axis.fill_between(densities, low, high, color=f"C{number % 10}", alpha=0.15, linewidth=0)
    ylabels = "output error, ‖out − dense‖ / ‖dense‖, mean over heads", "share of the true mass that is lost"
    _label(figure, title, "density: kept blocks / visible blocks", ylabels)
    return figure


def prediction_figure(predictions: Sequence[Prediction], title: str = "") -> Figure:
    """KL divergence from the dense model, and positions with another next token, against density.

    A thin line a text; a thick one their mean, where every text was run on both sides of the density.
    """
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    rules, texts = (list(dict.fromkeys(getattr(each, name) for each in predictions)) for name in ("rule", "text"))
    for axis, measure, read in zip(figure.subplots(1, 2), ("kl", "agreement"), (kl_at, value_at), strict=True):
        for number, rule in enumerate(rules):
            curves = []
            for text in texts:
                own = curve(predictions, rule, text, measure)
                curves.append([(x, max(1 - y if measure == "agreement" else y, LEAST)) for x, y in own])
                style = {"marker": "o", "markersize": 2, "linewidth": 0.6, "alpha": 0.3 if len(texts) > 1 else 1}
                axis.plot(*zip(*curves[-1], strict=True), color=f"C{number % 10}", **style)
            found = [(x / 100, [read(points, x / 100) for points in curves]) for x in range(101)]
            mean = [(x, sum(values) / len(values)) for x, values in found if None not in values]
            axis.plot([x for x, _ in mean], [y for _, y in mean], color=f"C{number % 10}", linewidth=2, label=rule)
    ylabels = "KL(dense, sparse), nats a token", "share of positions with another next token"
    _label(figure, title, "density: kept blocks / visible blocks, mean over layers", ylabels)
    return figure


def _label(figure: Figure, title: str, xlabel: str, ylabels: tuple[str, str]) -> None:
    """What both figures share: logarithmic axes with a grid, and the legend on the left."""
    for axis, ylabel in zip(figure.axes, ylabels, strict=True):
        axis.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)

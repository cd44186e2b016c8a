"""Curves of error and divergence against density, a line a rule with its interval over texts. Needs matplotlib."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from rr_flex.evaluation.predictions import Prediction
from rr_flex.evaluation.study import Record
from rr_flex.evaluation.summaries import summarise

LEAST = 1e-6  # shown: a logarithmic axis has no place for nothing


def error_figure(records: Sequence[Record], rules: Sequence[str] | None = None, title: str = "") -> Figure:
    """Output error, and mass lost, against density; each layer at the density; bands are 95 % over texts."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    for axis, measure in zip(figure.subplots(1, 2), ("error", "recall"), strict=True):
        summary = summarise(records, scope="layer", measure=measure)
        for number, rule in enumerate(rules or summary):
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
    """KL divergence from the dense model, and positions with another next token, against density; a dot a text."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    rules = list(dict.fromkeys(each.rule for each in predictions))
    for axis, measure in zip(figure.subplots(1, 2), ("kl", "agreement"), strict=True):
        for number, rule in enumerate(rules):
            for text in dict.fromkeys(each.text for each in predictions):
                own = sorted((x.density, getattr(x, measure)) for x in predictions if (x.rule, x.text) == (rule, text))
                density, value = zip(*own, strict=True)
                value = [max(1 - x if measure == "agreement" else x, LEAST) for x in value]
                axis.plot(density, value, color=f"C{number % 10}", marker="o", markersize=3, alpha=0.6, linewidth=0.8)
            axis.plot([], [], color=f"C{number % 10}", marker="o", markersize=3, label=rule)
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

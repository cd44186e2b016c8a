"""Single block rows: how many blocks each keeps, and how top-τ comes to its choice."""

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from rr_flex.view.plots.curves import finish
from rr_flex.view.plots.style import KEPT, LINES, tokens_along


def row_budget_figure(
    kept: Bool[Tensor, "H nQ nK"], visible: Bool[Tensor, "H nQ nK"], *, Lq: int, q_block: int, title: str = ""
) -> Figure:
    """Kept blocks of each block row against its first query: the median head, half of them, all, and the visible."""
    # The last row once more, so that its step has an end.
    counts, seen = (np.pad(x.sum(-1).cpu().numpy(), ((0, 0), (0, 1)), mode="edge") for x in (kept, visible))
    seen = seen.max(0)
    start = np.minimum(np.arange(kept.shape[1] + 1) * q_block, Lq)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.step(start, seen, where="post", color="#666666", linestyle="--", label="visible")
    for low, high, alpha, label in ((0, 100, 0.15, "all heads"), (25, 75, 0.35, "half of the heads")):
        low, high = np.percentile(counts, (low, high), axis=0)
        axis.fill_between(start, low, high, step="post", color=LINES[0], alpha=alpha, linewidth=0, label=label)
    axis.step(start, np.median(counts, 0), where="post", color=LINES[0], label="median head, kept")
    axis.set(xlabel="query (token)", ylabel="blocks of the row", title=title, xlim=(0, Lq), ylim=(0, None))
    tokens_along(axis.xaxis, Lq)
    finish(axis)
    return figure


def top_tau_figure(
    mass: Float[Tensor, " nK"],
    kept: Bool[Tensor, " nK"],
    mandatory: Bool[Tensor, " nK"],
    *,
    tau: float,
    title: str = "",
) -> Figure:
    """One row's choice: mandatory blocks first, then the largest, until their running sum reaches τ."""
    share = (mass / mass.sum()).cpu().numpy()
    kept, mandatory = kept.cpu().numpy(), mandatory.cpu().numpy()
    order = np.lexsort((-share, ~mandatory))  # mandatory first, each part by falling share
    order = order[(share[order] > 0) | kept[order]]
    colour = np.where(mandatory, LINES[1], np.where(kept, KEPT, "#bdbdbd"))[order]
    place = np.arange(len(order))
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.bar(place, share[order], color=colour)
    axis.step(place, share[order].cumsum(), where="mid", color="#000000", linewidth=1.5)
    axis.axhline(tau, color=LINES[5], linestyle="--")
    named = ((LINES[1], "mandatory: sink and diagonal"), (KEPT, "kept"), ("#bdbdbd", "dropped"))
    for color, label in named:
        axis.bar(0, 0, color=color, label=label)
    axis.plot([], [], color="#000000", label="running sum")
    axis.plot([], [], color=LINES[5], linestyle="--", label=f"τ = {tau:g}")
    axis.set(xlabel="key block, in the order in which it is taken", ylabel="share of the row's mass", title=title)
    axis.set_xticks(place, [str(block) for block in order], fontsize=8, rotation=90 if len(place) > 24 else 0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(fontsize=9, loc="center right")
    return figure

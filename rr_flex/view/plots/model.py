"""A whole model at a glance: one cell a head."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor


def model_figure(values: Mapping[int, Float[Tensor, "Hq"]], *, name: str, title: str = "") -> Figure:
    """`values` by layer as a grid, layers downwards and heads to the right, with each layer's mean at its side.

    Layers without values (a state-space layer, say) are left out; their numbers are missing on the axis.
    """
    layers = sorted(values)
    Hq = len(values[layers[0]])
    grid = np.array([np.asarray(values[layer], dtype=float) for layer in layers])
    figure = Figure(
        figsize=(2.4 + min(9.0, 0.34 * Hq + 1.6), 1.2 + min(12.0, max(1.5, 0.22 * len(layers)))), layout="constrained"
    )
    heads, means = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    x, y = np.arange(Hq + 1) - 0.5, np.arange(len(layers) + 1) - 0.5
    image = heads.pcolormesh(x, y, grid, cmap="cividis")
    heads.set(xlabel="head", ylabel="layer", title=title)
    heads.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = max(1, -(-len(layers) // 16))
    heads.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    heads.invert_yaxis()
    means.barh(range(len(layers)), grid.mean(1), color="#0072b2")
    means.set(xlabel="mean over heads")
    means.grid(axis="x", alpha=0.3)
    figure.colorbar(image, ax=heads, label=name, pad=0.02)
    return figure

"""Block maps of a few heads: true and estimated mass, their difference, kept blocks, and each block row's error."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from rr_flex.mass import row_share
from rr_flex.view.cells import cell_size, kept_of_cells, shares_of_cells
from rr_flex.view.plots.style import DIFFERENCE, DROPPED, ERROR, KEPT, MASS, SIDE, edges, share_norm, token_axes

Column = Literal["true", "estimate", "difference", "kept", "error"]
TITLES = {"true": "true mass", "estimate": "estimated mass", "difference": "estimate − truth"}
BARS = 0.5  # width of the error's column over a map's


@dataclass(frozen=True, kw_only=True)
class HeadMap:
    """One head of one layer, batch 0."""

    title: str
    true_mass: Float[Tensor, "nQ nK"]
    estimated_mass: Float[Tensor, "nQ nK"]
    kept: Bool[Tensor, "nQ nK"]
    visible: Bool[Tensor, "nQ nK"]
    row_error: Float[Tensor, " nQ"] | None = None  # ‖out − dense‖ / ‖dense‖ of each block row


def block_map_figure(
    heads: list[HeadMap],
    *,
    Lq: int,
    Lk: int,
    block_size: tuple[int, int],
    title: str = "",
    columns: tuple[Column, ...] = ("true", "estimate", "kept"),
) -> Figure:
    """One row of maps a head; both axes in tokens, colours tell a block's share of its row's mass (log scale).

    Maps of more than 512 blocks a side are drawn as cells: shares add up along a row, kept blocks to a shade.
    """
    widths = [BARS if column == "error" else 1 for column in columns]
    figure = Figure(figsize=(0.2 + 3.4 * sum(widths), 0.9 + 3.2 * len(heads)), layout="constrained")
    axes = figure.subplots(len(heads), len(columns), squeeze=False, sharey=True, width_ratios=widths)
    size = cell_size(*heads[0].kept.shape, SIDE)
    cells = -(-np.array(heads[0].kept.shape) // size)
    y, x = edges(cells, [size * tokens for tokens in block_size], (Lq, Lk))
    images = {}
    worst = max((head.row_error.max().item() for head in heads if head.row_error is not None), default=1)
    for row, head in zip(axes, heads, strict=True):
        for axis, column in zip(row, columns, strict=True):
            if column == "error":
                draw_errors(axis, head, y, size)
                axis.set(xlim=(0, 1.05 * worst), box_aspect=Lq / Lk / BARS)
            else:
                values, look, name = values_of(head, column, size)
                images[column] = axis.pcolormesh(x, y, values, **look)
                axis.set_title(name, fontsize=10)
                token_axes([axis], Lq, Lk)
                axis.set_xlabel("key (token)")
        row[0].set_ylabel(f"{head.title}\n\nquery (token)")
    for axis in axes[:-1].flat:
        axis.set_xlabel("")
        axis.tick_params(labelbottom=False)
    add_keys(figure, axes, columns, images)
    figure.suptitle(title, fontsize=11)
    return figure


def values_of(head: HeadMap, column: Column, size: int) -> tuple[np.ma.MaskedArray, dict, str]:
    """One map's cells, masked where the mask hides them; their colours; and what stands above them."""
    kept, visible = head.kept.cpu(), head.visible.cpu()
    share = kept_of_cells(kept, visible, size).numpy()
    if column == "kept":
        look = {"cmap": LinearSegmentedColormap.from_list("kept", [DROPPED, KEPT])}
        return np.ma.masked_less(share, 0), look, f"kept: {kept.sum() / visible.sum():.0%} of the visible blocks"
    truth, estimate = (shares_of_cells(row_share(mass.cpu()), size) for mass in (head.true_mass, head.estimated_mass))
    values = {"true": truth, "estimate": estimate, "difference": estimate - truth}[column]
    look = {"cmap": MASS, "norm": share_norm()}
    if column == "difference":
        look = {"cmap": DIFFERENCE, "norm": Normalize(-0.1, 0.1, clip=True)}
    return np.ma.masked_where(share < 0, values.numpy()), look, TITLES[column]


def draw_errors(axis: Axes, head: HeadMap, y: np.ndarray, size: int) -> None:
    """A bar a row of cells: the largest error of its block rows, since a mean would hide the one that is wrong."""
    if head.row_error is None:
        raise ValueError(f"heads must have row_error for the column error, got none in {head.title!r}")
    errors = head.row_error.cpu().numpy()
    errors = np.maximum.reduceat(errors, np.arange(0, len(errors), size))
    axis.barh(y[:-1], errors, height=np.diff(y), align="edge", color=ERROR)
    axis.set_title("output error", fontsize=10)
    axis.set_xlabel("of the block row")
    axis.grid(axis="x", alpha=0.3)


def add_keys(figure: Figure, axes: np.ndarray, columns: tuple[Column, ...], images: dict) -> None:
    """Below the maps what their colours mean."""
    bar = {"location": "bottom", "shrink": 0.8, "aspect": 30}
    masses = [number for number, column in enumerate(columns) if column in ("true", "estimate")]
    if masses:
        label = "share of the block row's mass"
        bar_axes = axes[:, masses[0] : masses[-1] + 1]
        figure.colorbar(images[columns[masses[0]]], ax=bar_axes, label=label, extend="min", **bar)
    for number, column in enumerate(columns):
        if column == "difference":
            label = "difference of the shares"
            figure.colorbar(images[column], ax=axes[:, number], label=label, extend="both", **bar)
        if column == "kept":
            states = [Patch(facecolor=KEPT, label="kept"), Patch(facecolor=DROPPED, label="dropped")]
            axes[0, number].legend(handles=states, loc="upper right", fontsize=9)

"""Block maps as a picture: the true mass, the estimated mass and the kept blocks of a few heads. Needs matplotlib."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator
from torch import Tensor

HIDDEN, DROPPED, KEPT = "#ffffff", "#d9d9d9", "#08519c"
FAINTEST_SHARE = 1e-4  # of a block row's mass: fainter blocks take the palest colour


@dataclass(frozen=True, kw_only=True)
class HeadMap:
    """One head of one layer, batch 0."""

    title: str
    true_mass: Float[Tensor, "nQ nK"]
    estimated_mass: Float[Tensor, "nQ nK"]
    kept: Bool[Tensor, "nQ nK"]
    visible: Bool[Tensor, "nQ nK"]


def block_map_figure(heads: list[HeadMap], *, Lq: int, Lk: int, block_size: tuple[int, int], title: str = "") -> Figure:
    """One row of three maps a head; both axes in tokens, colours tell a block's share of its row's mass (log scale)."""
    figure = Figure(figsize=(10.5, 0.9 + 3.2 * len(heads)), layout="constrained")
    axes = figure.subplots(len(heads), 3, squeeze=False, sharex=True, sharey=True)
    x = np.minimum(np.arange(heads[0].kept.shape[1] + 1) * block_size[1], Lk)
    y = np.minimum(np.arange(heads[0].kept.shape[0] + 1) * block_size[0], Lq)
    norm = LogNorm(FAINTEST_SHARE, 1, clip=True)

    for row, head in zip(axes, heads, strict=True):
        masses = {"true mass": head.true_mass, "estimated mass": head.estimated_mass}
        for axis, (name, mass) in zip(row[:2], masses.items(), strict=True):
            share = (mass / mass.sum(-1, keepdim=True)).float().cpu().numpy()
            share = np.ma.masked_array(share, mask=~head.visible.cpu().numpy())
            image = axis.pcolormesh(x, y, share, cmap="viridis_r", norm=norm)
            axis.set_title(name, fontsize=10)
        states = head.visible.int() + (head.kept & head.visible).int()
        row[2].pcolormesh(x, y, states.cpu().numpy(), cmap=ListedColormap([HIDDEN, DROPPED, KEPT]), vmin=0, vmax=2)
        row[2].set_title(f"kept: {head.kept.sum() / head.visible.sum():.0%} of the visible blocks", fontsize=10)
        row[0].set_ylabel(f"{head.title}\n\nquery (token)")

    for axis in axes.flat:
        axis.set(xlim=(0, Lk), ylim=(Lq, 0), aspect="equal")
        for side, length in ((axis.xaxis, Lk), (axis.yaxis, Lq)):
            side.set_major_locator(MultipleLocator(2 ** max(0, (length // 5).bit_length())))
            side.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    for axis in axes[-1]:
        axis.set_xlabel("key (token)")
    bar = {"location": "bottom", "shrink": 0.6, "aspect": 40, "extend": "min"}
    figure.colorbar(image, ax=axes[:, :2], label="share of the block row's mass", **bar)
    states = [Patch(facecolor=KEPT, label="kept"), Patch(facecolor=DROPPED, label="dropped")]
    axes[0, 2].legend(handles=states, loc="upper right", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure

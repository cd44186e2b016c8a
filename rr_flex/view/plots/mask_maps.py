"""Masks as pictures: every pair of tokens on the left, the blocks that FlexAttention makes of them on the right."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mask_mods import block_visibility
from mask_mods.spans import MaskMod
from rr_flex.view.cells import cell_size, states_of_cells
from rr_flex.view.plots.style import CUT, DROPPED, HIDDEN, KEPT, SIDE, edges, token_axes

PAIRS = 2048  # tokens a side of which every pair is drawn; longer ones are sampled evenly


def mask_figure(masks: Mapping[str, MaskMod], *, Lq: int, Lk: int, block_size: tuple[int, int]) -> Figure:
    """A column a mask: above its pairs, below its blocks: whole ones, those that it cuts, and those it hides.

    Of batch 0 and head 0.
    """
    width = min(3.2, 12 / len(masks))
    figure = Figure(figsize=(width * len(masks) + 0.4, 2 * width + 1.1), layout="constrained")
    axes = figure.subplots(2, len(masks), squeeze=False, sharex=True, sharey=True)
    for (above, below), (name, mask_mod) in zip(axes.T, masks.items(), strict=True):
        look = {"cmap": ListedColormap([HIDDEN, KEPT]), "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        above.imshow(pairs_of(mask_mod, Lq, Lk), extent=(0, Lk, Lq, 0), **look)
        above.set_title(name, fontsize=9)
        shape = {"Lq": Lq, "Lk": Lk, "block_size": block_size, "device": "cpu"}
        states = sum(x[0, 0].int() for x in block_visibility(mask_mod, B=1, H=1, **shape))  # hidden, cut, whole
        lines = {"edgecolors": "#bbbbbb", "linewidth": 0.3} if max(states.shape) <= 32 else {}
        y, x = edges(states.shape, block_size, (Lq, Lk))
        below.pcolormesh(x, y, states.numpy(), cmap=ListedColormap([HIDDEN, CUT, KEPT]), vmin=0, vmax=2, **lines)
        below.set_xlabel("key (token)")
    for row in axes:
        row[0].set_ylabel("query (token)")
    token_axes(axes.flat, Lq, Lk)
    _legend(figure, {"visible; whole block": KEPT, "block that the mask cuts": CUT, "hidden": HIDDEN})
    return figure


def dynamic_blocks_figure(selection, *, head: int = 0, batch: int = 0, title: str = "") -> Figure:
    """One head of a Selection over its mask: kept, kept and cut by the mask, dropped, hidden."""
    parts = (selection.kept, selection.whole, selection.visible)
    blocks = [x.expand_as(selection.kept)[batch, head].cpu() for x in parts]
    size = cell_size(*blocks[0].shape, SIDE)
    states = states_of_cells(*blocks, size)
    figure = Figure(figsize=(4.8, 4.6), layout="constrained")
    axis = figure.subplots()
    y, x = edges(states.shape, [size * tokens for tokens in selection.block_size], selection.seq_lengths)
    axis.pcolormesh(x, y, states.numpy(), cmap=ListedColormap([HIDDEN, DROPPED, CUT, KEPT]), vmin=0, vmax=3)
    token_axes([axis], *selection.seq_lengths)
    axis.set(xlabel="key (token)", ylabel="query (token)", title=title)
    _legend(figure, {"kept": KEPT, "kept, cut by the mask": CUT, "dropped": DROPPED})
    return figure


def pairs_of(mask_mod: MaskMod, Lq: int, Lk: int) -> np.ndarray:
    """The element rule at every pair of tokens, or at evenly spaced ones of a long sequence; bool [rows, columns]."""
    q_idx, kv_idx = (torch.arange(0, length, -(-length // PAIRS)) for length in (Lq, Lk))
    first = torch.tensor(0)
    return mask_mod(first, first, q_idx[:, None], kv_idx[None]).expand(len(q_idx), len(kv_idx)).numpy()


def _legend(figure: Figure, named: Mapping[str, str]) -> None:
    handles = [Patch(facecolor=color, edgecolor="#888888", label=label) for label, color in named.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)

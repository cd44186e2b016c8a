"""Masks as pictures: every pair of tokens on the left, the blocks that FlexAttention makes of them on the right."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mask_mods import block_visibility
from mask_mods.spans import MaskMod
from rr_flex.view.cells import cell_size, kept_of_cells
from rr_flex.view.plots.style import CUT, DROPPED, HIDDEN, KEPT, SIDE, token_axes

PAIRS = 2048  # tokens a side of which every pair is drawn; longer ones are sampled evenly


def mask_figure(
    masks: Mapping[str, MaskMod], *, Lq: int, Lk: int, block_size: tuple[int, int], head: int = 0, batch: int = 0
) -> Figure:
    """A column a mask: above its pairs, below its blocks: whole ones, those that it cuts, and those it hides."""
    width = min(3.2, 12 / len(masks))
    figure = Figure(figsize=(width * len(masks) + 0.4, 2 * width + 1.1), layout="constrained")
    axes = figure.subplots(2, len(masks), squeeze=False, sharex=True, sharey=True)
    for (above, below), (name, mask_mod) in zip(axes.T, masks.items(), strict=True):
        above.imshow(
            pairs_of(mask_mod, Lq, Lk, head, batch),
            cmap=ListedColormap([HIDDEN, KEPT]),
            **{"vmin": 0, "vmax": 1, "extent": (0, Lk, Lq, 0), "interpolation": "nearest"},
        )
        above.set_title(name, fontsize=9)
        states = block_states(mask_mod, Lq, Lk, block_size, head, batch)
        y, x = (
            np.minimum(np.arange(count + 1) * tokens, length)
            for count, tokens, length in zip(states.shape, block_size, (Lq, Lk), strict=True)
        )
        colours = ListedColormap([HIDDEN, CUT, KEPT])
        lines = {"edgecolors": "#bbbbbb", "linewidth": 0.3} if max(states.shape) <= 32 else {}
        below.pcolormesh(x, y, states, cmap=colours, vmin=0, vmax=2, **lines)
        below.set_xlabel("key (token)")
    for row in axes:
        row[0].set_ylabel("query (token)")
    token_axes(axes.flat, Lq, Lk)
    named = [
        Patch(facecolor=KEPT, label="visible; whole block"),
        Patch(facecolor=CUT, label="block that the mask cuts"),
    ]
    hidden = Patch(facecolor=HIDDEN, edgecolor="#888888", label="hidden")
    figure.legend(handles=[*named, hidden], loc="outside lower center", ncols=3, fontsize=9)
    return figure


def dynamic_blocks_figure(selection, *, head: int = 0, batch: int = 0, title: str = "") -> Figure:
    """One head of a Selection over its mask: kept, kept and cut by the mask, dropped, hidden."""
    kept, whole, visible = (
        x.expand_as(selection.kept)[batch, head].cpu() for x in (selection.kept, selection.whole, selection.visible)
    )
    (Lq, Lk), block_size = selection.seq_lengths, selection.block_size
    size = cell_size(*kept.shape, SIDE)
    shares = torch.stack(
        [kept_of_cells(part, visible, size) for part in (visible & ~kept, kept & ~whole, kept & whole)]
    )
    states = torch.where(shares[0] < 0, 0, shares.argmax(0) + 1)
    figure = Figure(figsize=(4.8, 4.6), layout="constrained")
    axis = figure.subplots()
    y, x = (
        np.minimum(np.arange(count + 1) * (size * tokens), length)
        for count, tokens, length in zip(states.shape, block_size, (Lq, Lk), strict=True)
    )
    axis.pcolormesh(x, y, states.numpy(), cmap=ListedColormap([HIDDEN, DROPPED, CUT, KEPT]), vmin=0, vmax=3)
    token_axes([axis], Lq, Lk)
    axis.set(xlabel="key (token)", ylabel="query (token)", title=title)
    named = ((KEPT, "kept"), (CUT, "kept, cut by the mask"), (DROPPED, "dropped"))
    handles = [Patch(facecolor=color, label=label) for color, label in named]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def pairs_of(mask_mod: MaskMod, Lq: int, Lk: int, head: int, batch: int) -> Bool[np.ndarray, "rows columns"]:
    """The element rule at every pair of tokens, or at evenly spaced ones of a long sequence."""
    q_idx, kv_idx = (torch.arange(0, length, -(-length // PAIRS)) for length in (Lq, Lk))
    b, h = torch.tensor(batch), torch.tensor(head)
    visible = mask_mod(b, h, q_idx[:, None], kv_idx[None])
    return visible.expand(len(q_idx), len(kv_idx)).numpy()


def block_states(mask_mod: MaskMod, Lq: int, Lk: int, block_size: tuple[int, int], head: int, batch: int) -> np.ndarray:
    """0 hidden, 1 cut, 2 whole; [nQ, nK]."""
    shape = {"Lq": Lq, "Lk": Lk, "block_size": block_size, "device": "cpu"}
    seen, whole = block_visibility(mask_mod, B=batch + 1, H=head + 1, **shape)
    return sum(x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)].int() for x in (seen, whole)).numpy()

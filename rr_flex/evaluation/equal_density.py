"""Budgets set so that rules can be compared: every rule keeps the same share of blocks."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rr_flex.geometry import ceil_div, diagonal_blocks
from rr_flex.selection import long_row_factor

Spending = Literal["top_tau", "threshold", "scaled_threshold", "raw"]


def kept_at_densities(
    weight: Float[Tensor, "B H nQ nK"],
    visible: Bool[Tensor, "#B #H nQ nK"],
    mandatory: Bool[Tensor, "#B #H nQ nK"],
    *,
    densities: Sequence[float],
    spending: Spending,
) -> list[Bool[Tensor, "B H nQ nK"]]:
    """The blocks kept when the mean density over H is each of `densities` (kept / visible blocks), mandatory ones
    counted; more where those alone are more, or at a tie. B is layers, each at the density.

    `top_tau`: one τ. `threshold`: one threshold on a block's share of its row. `scaled_threshold`: the same, less for
    long rows. `raw`: one on the weight itself.
    """
    visible, mandatory = visible.expand_as(weight), mandatory.expand_as(weight)
    value = value_of(weight, visible, mandatory, spending)
    free = visible & ~mandatory
    ordered = torch.where(free, value, -torch.inf).flatten(1).sort(dim=-1, descending=True).values
    seen, fixed, left = (x.flatten(1).sum(-1, keepdim=True) for x in (visible, mandatory, free))
    found = []
    for density in densities:
        count = ((density * seen.double()).round().long() - fixed).minimum(left)
        # Infinite where mandatory blocks are enough.
        cut = torch.where(count > 0, ordered.gather(-1, (count - 1).clamp(min=0)), torch.inf)
        found.append(mandatory | (free & (value >= cut[..., None, None])))
    return found


def visible_and_mandatory(
    L: int, size: tuple[int, int], device: torch.device, local_blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """Causal; the sink, `local_blocks` at the diagonal and the last block row are mandatory. Each [1, 1, nQ, nK]."""
    row = torch.arange(ceil_div(L, size[0]), device=device)[:, None]
    column = torch.arange(ceil_div(L, size[1]), device=device)
    visible = column * size[1] < (row + 1) * size[0]
    mandatory = (column == 0) | diagonal_blocks((row, column), L, size, 0, local_blocks - 1) | (row == row.max())
    return visible[None, None], (visible & mandatory)[None, None]


def value_of(weight: Tensor, visible: Tensor, mandatory: Tensor, spending: Spending) -> Float[Tensor, "B H nQ nK"]:
    """What a block is taken by, largest first."""
    if spending == "raw":
        return weight
    total = torch.where(visible, weight, 0).sum(-1, keepdim=True)
    share = weight / torch.where(total > 0, total, 1)
    if spending == "threshold":
        return share
    if spending == "scaled_threshold":
        return share / long_row_factor(visible)[..., None]
    # A block is kept from the τ on that the mandatory and the larger blocks of its row do not reach.
    ordered, order = torch.where(visible & ~mandatory, share, 0).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered + torch.where(mandatory, share, 0).sum(-1, keepdim=True)
    return torch.empty_like(before).scatter_(-1, order, -before)

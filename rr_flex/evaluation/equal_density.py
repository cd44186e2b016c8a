"""Budgets set so that rules can be compared: every rule keeps the same share of blocks."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rr_flex.selection import select_threshold, select_top_tau

Spending = Literal["top_tau", "threshold", "per_head", "raw"]
STEPS = 24  # halvings of the interval in which top-τ's level is sought


def kept_at_density(
    weight: Float[Tensor, "B H nQ nK"],
    visible: Bool[Tensor, "#B #H nQ nK"],
    mandatory: Bool[Tensor, "#B #H nQ nK"],
    *,
    density: float,
    spending: Spending,
) -> Bool[Tensor, "B H nQ nK"]:
    """The blocks kept when the mean density over all of H is `density` (kept / visible blocks), mandatory ones counted.

    `top_tau`: one τ. `threshold`: one threshold on a block's share of its row. `per_head`: a threshold a head, each
    head at the density. `raw`: one threshold on the weight itself. H may hold the heads of several layers.
    """
    visible, mandatory = visible.expand_as(weight), mandatory.expand_as(weight)
    wanted = round(density * int(visible.sum()))
    if spending == "top_tau":
        return _by_level(lambda tau: select_top_tau(weight, tau, visible, mandatory), wanted)
    if spending == "raw":
        return _largest(weight, visible, mandatory, wanted)
    total = torch.where(visible, weight, 0).sum(-1, keepdim=True)
    share = weight / torch.where(total > 0, total, 1)
    if spending == "threshold":
        return _largest(share, visible, mandatory, wanted)
    heads = []
    for head in range(weight.shape[1]):
        own = (..., slice(head, head + 1), slice(None), slice(None))
        heads.append(_largest(share[own], visible[own], mandatory[own], round(density * int(visible[own].sum()))))
    return torch.cat(heads, 1)


def kept_by_threshold(weight: Tensor, threshold: float | Tensor, visible: Tensor, mandatory: Tensor) -> Tensor:
    """`select_threshold` with a threshold a head, [H]."""
    return select_threshold(weight, torch.as_tensor(threshold).view(-1, 1), visible, mandatory)


def _largest(value: Tensor, visible: Tensor, mandatory: Tensor, wanted: int) -> Tensor:
    """Mandatory blocks and the largest others, `wanted` in all (more if the mandatory ones are more, or at a tie)."""
    free = visible & ~mandatory
    count = min(wanted - int(mandatory.sum()), int(free.sum()))
    if count <= 0:
        return mandatory.clone()
    cut = value[free].topk(count, sorted=True).values[-1]
    return mandatory | (free & (value >= cut))


def _by_level(select: Callable[[float], Tensor], wanted: int) -> Tensor:
    """select(τ) at the least τ that keeps `wanted` blocks."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if int(select(middle).sum()) < wanted else (low, middle)
    return select(high)

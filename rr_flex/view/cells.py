"""Block maps too large to look at, as maps of cells: squares of `size` × `size` blocks, for pictures and pages."""

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from rr_flex.geometry import ceil_div


def cell_size(nQ: int, nK: int, side: int) -> int:
    """The fewest blocks a cell's side that make at most `side` cells a side."""
    return max(1, ceil_div(max(nQ, nK), side))


def shares_of_cells(share: Float[Tensor, "... nQ nK"], size: int) -> Float[Tensor, "... cQ cK"]:
    """The share of a row's mass that lies in each cell's columns, mean over the cell's rows: rows sum to 1."""
    rows = _sum(torch.ones(share.shape[-2], 1, device=share.device), size)  # cQ 1
    return _sum(share.float(), size) / rows


def kept_of_cells(
    kept: Bool[Tensor, "... nQ nK"], visible: Bool[Tensor, "... nQ nK"], size: int
) -> Float[Tensor, "... cQ cK"]:
    """The kept share of each cell's visible blocks; −1 where it has none."""
    seen, chosen = _sum(visible.float(), size), _sum((kept & visible).float(), size)
    return torch.where(seen > 0, chosen / seen.clamp(min=1), -1.0)


def states_of_cells(
    kept: Bool[Tensor, "nQ nK"], whole: Bool[Tensor, "nQ nK"], visible: Bool[Tensor, "nQ nK"], size: int
) -> Int[Tensor, "cQ cK"]:
    """What most of a cell's visible blocks are: 0 hidden, 1 dropped, 2 kept and cut by the mask, 3 kept whole."""
    parts = (visible & ~kept, kept & ~whole, kept & whole)
    shares = torch.stack([kept_of_cells(part, visible, size) for part in parts])
    return torch.where(shares[0] < 0, 0, shares.argmax(0) + 1)


def _sum(blocks: Float[Tensor, "... nQ nK"], size: int) -> Float[Tensor, "... cQ cK"]:
    nQ, nK = blocks.shape[-2:]
    padded = F.pad(blocks, (0, -nK % size, 0, -nQ % size))
    return reduce(padded, "... (Q q) (K k) -> ... Q K", "sum", q=size, k=size)

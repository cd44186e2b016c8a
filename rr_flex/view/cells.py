"""Block maps too large to look at, as maps of cells: squares of `size` × `size` blocks, for pictures and pages."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.geometry import ceil_div


def cell_size(nQ: int, nK: int, side: int) -> int:
    """The fewest blocks a cell's side that make at most `side` cells a side."""
    return max(1, ceil_div(max(nQ, nK), side))


def row_share(mass: Float[Tensor, "... nQ nK"]) -> Float[Tensor, "... nQ nK"]:
    """Each block's share of its row's mass; 0 in a row without mass."""
    total = mass.sum(-1, keepdim=True)
    return torch.where(total > 0, mass / total, 0)


def shares_of_cells(share: Float[Tensor, "... nQ nK"], size: int) -> Float[Tensor, "... cQ cK"]:
    """The share of a row's mass that lies in each cell's columns, mean over the cell's rows: rows sum to 1."""
    if size == 1:
        return share.float()
    rows = _tiles(torch.ones(share.shape[-2], 1, device=share.device), size).sum((-3, -1))  # cQ 1
    return _tiles(share.float(), size).sum((-3, -1)) / rows


def kept_of_cells(
    kept: Bool[Tensor, "... nQ nK"], visible: Bool[Tensor, "... nQ nK"], size: int
) -> Float[Tensor, "... cQ cK"]:
    """The kept share of each cell's visible blocks; −1 where it has none."""
    seen = _tiles(visible.float(), size).sum((-3, -1))
    chosen = _tiles((kept & visible).float(), size).sum((-3, -1))
    return torch.where(seen > 0, chosen / seen.clamp(min=1), -1.0)


def _tiles(blocks: Float[Tensor, "... nQ nK"], size: int) -> Float[Tensor, "... cQ size cK size"]:
    nQ, nK = blocks.shape[-2:]
    padded = F.pad(blocks, (0, -nK % size, 0, -nQ % size))
    return padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))

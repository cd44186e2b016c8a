"""Where tokens, strides and blocks lie: whole-number arithmetic shared by every step."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mask_mods.spans import Index, smaller


def ceil_div(length: int, size: int) -> int:
    """Number of runs of `size` that cover `length`; the last may be short."""
    return -(-length // size)


def as_tensors(numbers: tuple[int, ...], device: torch.device) -> tuple[Int[Tensor, ""], ...]:
    """Numbers as a mask may capture them, also where they depend on lengths that are symbols."""
    return tuple(torch.full((), number, dtype=torch.int64, device=device) for number in numbers)


def sampled_index(head: Index, stride_index: Tensor, stride: int, last: Index) -> Tensor:
    """Index of the query that `head` (global) takes from stride i: i·stride + head mod stride, clamped to `last`."""
    return smaller(stride_index * stride + head % stride, last)


def diagonal_blocks(
    grid: tuple[Int[Tensor, "nQ 1"], Int[Tensor, " nK"]],
    Lq: int,
    block_size: tuple[int, int],
    q_offset: Index,
    reach: int,
) -> Bool[Tensor, "nQ nK"]:
    """Key blocks that a block row's diagonal crosses, and `reach` more before the first of them.

    `grid`: the numbers of the block rows and of the key blocks.
    """
    (row, column), (q_block, k_block) = grid, block_size
    first = torch.div(row * q_block + q_offset, k_block, rounding_mode="floor")
    last = torch.div(((row + 1) * q_block).clamp(max=Lq) - 1 + q_offset, k_block, rounding_mode="floor")
    return (column >= first - reach) & (column <= last)

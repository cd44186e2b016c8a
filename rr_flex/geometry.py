"""Where tokens, strides and blocks lie: whole-number arithmetic shared by every step."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mask_mods.spans import Index, smaller


def ceil_div(length: int, size: int) -> int:
    """Number of runs of `size` that cover `length`; the last may be short."""
    return -(-length // size)


def sampled_index(head: Index, stride_index: Tensor, stride: int, last: Index, phase: str = "head") -> Tensor:
    """Index of the query that `head` (global) takes from stride i, clamped to `last`: i·stride and a phase.

    Phases: "head" (RRAttention's) head mod stride, "skew" (head + 5i) mod stride, "first", "middle", "last".
    """
    match phase:
        case "head":
            step = head % stride
        case "skew":
            step = (head + 5 * stride_index) % stride
        case _:
            step = {"first": 0, "middle": stride // 2, "last": stride - 1}[phase]
    return smaller(stride_index * stride + step, last)


def diagonal_blocks(
    row: Int[Tensor, "nQ 1"],
    column: Int[Tensor, " nK"],
    Lq: int,
    block_size: tuple[int, int],
    q_offset: Index,
    reach: int,
) -> Bool[Tensor, "nQ nK"]:
    """Key blocks that a block row's diagonal crosses, and `reach` more before the first of them."""
    q_block, k_block = block_size
    first = torch.div(row * q_block + q_offset, k_block, rounding_mode="floor")
    last = torch.div(((row + 1) * q_block).clamp(max=Lq) - 1 + q_offset, k_block, rounding_mode="floor")
    return (column >= first - reach) & (column <= last)

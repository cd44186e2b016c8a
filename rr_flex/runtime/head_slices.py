"""Long contexts a few heads at a time: what selecting holds for all of them grows with heads × tokens²."""

from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div
from rr_flex.kernels.options import COLUMNS

SLICE_BYTES = 12 << 30  # that the selection of one strip may take, about
BYTES_PER_BLOCK = 25  # of one block's mass, kept flag, two list entries and the int64 index that writes them


def head_slices(B: int, Hq: int, Hkv: int, Lq: int, Lk: int, config: RRConfig) -> list[tuple[slice, slice]]:
    """Runs of query heads, and of the key heads that they share, that cover all heads in order.

    A strip is one or more whole groups, or an equal part of one; all strips have the same shape. One strip wherever
    its intermediate tensors fit in SLICE_BYTES; a single head is never cut, however long.
    """
    q_block, k_block = config.block_sizes
    nK = ceil_div(Lk, k_block)
    columns = max(2, ceil_div(nK, COLUMNS)) * COLUMNS  # two segments at least
    outputs = ceil_div(Lq, config.strides[0]) * columns * 2  # of the estimate, in bfloat16
    of_head = B * (outputs + ceil_div(Lq, q_block) * nK * BYTES_PER_BLOCK)
    group = Hq // Hkv
    size = Hq
    while size > 1 and not (tiles(size, Hq, group) and size * of_head <= SLICE_BYTES):
        size -= 1
    return [
        (slice(first, first + size), slice(first // group, ceil_div(first + size, group)))
        for first in range(0, Hq, size)
    ]


def tiles(size: int, Hq: int, group: int) -> bool:
    """Whether runs of `size` heads cover Hq without cutting a group unevenly."""
    return group % size == 0 or (size % group == 0 and Hq % size == 0)

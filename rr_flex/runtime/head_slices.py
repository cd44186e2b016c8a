"""Long contexts a few heads at a time: what selecting holds for all of them grows with heads × tokens²."""

import torch

from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div
from rr_flex.kernels.options import COLUMNS
from rr_flex.runtime.tracing import traced

SLICE_BYTES = 12 << 30  # that the selection of one slice may take, about, on a device with room for it
FREE_SHARE = 0.5  # of what the device has free, if that is less
SMALL_BYTES = 1 << 30  # under which nobody asks the device
BYTES_PER_BLOCK = 25  # of one block's mass, kept flag, two list entries and the int64 index that writes them


def head_slices(
    heads: tuple[int, int, int], seq_lengths: tuple[int, int], config: RRConfig, device: torch.device
) -> list[tuple[slice, slice]]:
    """Slices of query heads, and of the key heads that they share, that cover all heads in order.

    `heads`: (B, Hq, Hkv). A slice is one or more whole groups, or an equal part of one; all have the same shape. One
    slice wherever its intermediate tensors fit; a single head is never cut, however long.
    """
    (B, Hq, Hkv), (Lq, Lk), (q_block, k_block) = heads, seq_lengths, config.block_sizes
    nK = ceil_div(Lk, k_block)
    columns = max(2, ceil_div(nK, COLUMNS)) * COLUMNS  # two segments at least
    outputs = ceil_div(Lq, config.strides[0]) * columns * 2  # of the estimate, in bfloat16
    of_head = B * (outputs + ceil_div(Lq, q_block) * nK * BYTES_PER_BLOCK)
    group, size, room = Hq // Hkv, Hq, bytes_for(Hq * of_head, device)
    while size > 1 and not (tiles(size, Hq, group) and size * of_head <= room):
        size -= 1
    return [
        (slice(first, first + size), slice(first // group, ceil_div(first + size, group)))
        for first in range(0, Hq, size)
    ]


def bytes_for(wanted: int, device: torch.device) -> int:
    """What one slice may take of the `wanted` bytes."""
    if wanted <= SMALL_BYTES or device.type != "cuda" or traced() or torch.cuda.is_current_stream_capturing():
        return SLICE_BYTES
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(SLICE_BYTES, int(FREE_SHARE * free))


def tiles(size: int, Hq: int, group: int) -> bool:
    """Whether slices of `size` heads cover Hq without cutting a group unevenly."""
    return group % size == 0 or (size % group == 0 and Hq % size == 0)

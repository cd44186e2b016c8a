"""Padding mask for batches of unequal lengths."""

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mask_mods.spans import Index, SpanMask, buffered, check_count, check_integers, check_per_batch, per_batch, show


def padding(
    lengths: Int[Tensor, " B"],
    side: Literal["right", "left"] = "right",
    total: int | None = None,
    offset: Index = 0,
) -> SpanMask:
    """Key j is visible to query i when tokens j and i + offset are both real: a padded query sees nothing.

    Real are the first `lengths[b]` tokens with padding on the right, the last `lengths[b]` of `total` (the number of
    keys, needed here only) with padding on the left.
    """
    check_integers("lengths", lengths, (1,), "[B]")
    check_per_batch("offset", offset)
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', got {side!r}")
    if total is not None:
        check_count("total", total, minimum=1)
    elif side == "left":
        raise ValueError("total must be the number of keys when side is 'left', got None")
    # Tensors, not ints: under dynamic=True flex cannot capture an int that depends on the length.
    starts = buffered(total - lengths) if side == "left" else 0  # [B], or for all
    ends = buffered(starts + lengths - 1)  # [B]

    def spans(b, h, q_idx):
        position, first, last = q_idx + per_batch(offset, b), per_batch(starts, b), per_batch(ends, b)
        real = (first <= position) & (position <= last)
        return ((first, torch.where(real, last, first - 1)),)

    def keys(b, h, kv_idx):
        return (per_batch(starts, b) <= kv_idx) & (kv_idx <= per_batch(ends, b))

    def label():
        return f"padding({show(lengths)}, side={side!r}, total={total}, offset={show(offset)})"

    return SpanMask(spans, keys, label)

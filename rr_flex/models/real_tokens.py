"""Padding: the causal masks among a sequence's real tokens, which stand in one run."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mask_mods import SpanMask
from mask_mods.spans import per_batch


def real_run(padding_mask: Bool[Tensor, "B total"], kv_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and last real key [B] of a mask over positions, and whether all between are real (0-dim)."""
    total = padding_mask.shape[1]
    first = padding_mask.int().argmax(1)
    last = total - 1 - padding_mask.flip(1).int().argmax(1)
    return first - kv_offset, last - kv_offset, (padding_mask.sum(1) == last - first + 1).all()


def causal_run(first: Int[Tensor, " b"], last: Int[Tensor, " b"], window: Tensor, offset: Tensor) -> SpanMask:
    """Causal within `window` tokens among the real tokens first[b] … last[b]; a padded query sees nothing.

    Tensors only, 0-dim or [B]: other windows, paddings and offsets run the same compiled graph.
    """

    def spans(b, h, q_idx):
        start, stop, position = per_batch(first, b), per_batch(last, b), q_idx + offset
        low = torch.maximum(position - (window - 1), start)
        return ((low, torch.where((start <= position) & (position <= stop), position, -1)),)

    def keys(b, h, kv_idx):
        return (per_batch(first, b) <= kv_idx) & (kv_idx <= per_batch(last, b))

    return SpanMask(spans, keys, label=lambda: "causal_run()")

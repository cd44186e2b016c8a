"""Causal mask."""

from mask_mods.spans import Index, SpanMask, check_per_batch, per_batch, show


def causal(offset: Index = 0) -> SpanMask:
    """Key j is visible to query i when j ≤ i + offset: query i stands at position i + offset.

    `offset` is an int or an integer tensor, 0-dim or [B]. A new tensor causes no recompile, a new int does. Under
    `dynamic=True` an offset that depends on the lengths must be a tensor.
    """
    check_per_batch("offset", offset)

    def spans(b, h, q_idx):
        return ((0, q_idx + per_batch(offset, b)),)

    return SpanMask(spans, label=lambda: f"causal(offset={show(offset)})")

"""Prefix-LM mask."""

from mask_mods.spans import Index, SpanMask, check_count, check_per_batch, larger, per_batch, show


def prefix(length: Index, offset: Index = 0) -> SpanMask:
    """Key j is visible to query i when j < length (the prefix, seen by all) or j ≤ i + offset (causal).

    `length` and `offset` are ints or integer tensors, 0-dim or [B].
    """
    check_per_batch("length", length)
    check_per_batch("offset", offset)
    if isinstance(length, int):
        check_count("length", length, minimum=0)

    def spans(b, h, q_idx):
        return ((0, larger(q_idx + per_batch(offset, b), per_batch(length, b) - 1)),)

    return SpanMask(spans, label=lambda: f"prefix({show(length)}, offset={show(offset)})")

"""Sliding-window mask."""

from mask_mods.spans import Index, SpanMask, check_count, check_per_batch, per_batch, show


def sliding_window(window: int, offset: Index = 0, *, symmetric: bool = False) -> SpanMask:
    """Key j is visible to the query at position p = i + offset when p − window < j ≤ p.

    That is `window` keys, the query's own among them; `symmetric` adds the window − 1 keys after it: |p − j| < window.
    """
    check_count("window", window, minimum=1)
    check_per_batch("offset", offset)
    after = window - 1 if symmetric else 0

    def spans(b, h, q_idx):
        position = q_idx + per_batch(offset, b)
        return ((position - (window - 1), position + after),)

    return SpanMask(spans, label=lambda: f"sliding_window({window}, offset={show(offset)}, symmetric={symmetric})")

"""Attention-sink mask."""

from mask_mods.spans import SpanMask, check_count


def sink(count: int) -> SpanMask:
    """Key j is visible to every query when j < count, causal or not: `both(causal(), either(sink(4), …))`."""
    check_count("count", count, minimum=0)

    def spans(b, h, q_idx):
        return ((0, count - 1),)

    return SpanMask(spans, label=lambda: f"sink({count})")

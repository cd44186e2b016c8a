"""No mask."""

from mask_mods.spans import SpanMask

_BEYOND_EVERY_KEY = 2**31 - 1


def bidirectional() -> SpanMask:
    """Every key is visible to every query."""
    return SpanMask(lambda b, h, q_idx: ((0, _BEYOND_EVERY_KEY),), label=lambda: "bidirectional()")

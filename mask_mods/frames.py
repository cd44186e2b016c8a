"""Frame mask for video."""

from mask_mods.spans import Index, SpanMask, check_count, check_per_batch, per_batch, show


def frames(tokens_per_frame: int, past: int | None = None, offset: Index = 0) -> SpanMask:
    """Key j in frame g = ⌊j / tokens_per_frame⌋ is visible to a query in frame f when f − past ≤ g ≤ f.

    f = ⌊(i + offset) / tokens_per_frame⌋: a query sees its own frame whole, and `past` frames before it, or all (None).
    """
    check_count("tokens_per_frame", tokens_per_frame, minimum=1)
    check_per_batch("offset", offset)
    if past is not None:
        check_count("past", past, minimum=0)

    def spans(b, h, q_idx):
        frame = (q_idx + per_batch(offset, b)) // tokens_per_frame
        first = 0 if past is None else (frame - past) * tokens_per_frame
        return ((first, (frame + 1) * tokens_per_frame - 1),)

    return SpanMask(spans, label=lambda: f"frames({tokens_per_frame}, past={past}, offset={show(offset)})")

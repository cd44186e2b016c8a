"""Intersection and union of masks."""

from functools import reduce
from itertools import product
from operator import and_, or_

from mask_mods.spans import MaskMod, SpanMask, larger, smaller


def both(*masks: MaskMod) -> MaskMod:
    """Visible where every mask says so: each choice of one span a mask, intersected.

    A SpanMask if all are; with a plain `mask_mod` function among them, a plain function.
    """
    check_masks(masks)
    if not all(isinstance(mask, SpanMask) for mask in masks):

        def both_mask(b, h, q_idx, kv_idx):
            return reduce(and_, [mask(b, h, q_idx, kv_idx) for mask in masks])

        return both_mask

    def spans(b, h, q_idx):
        choices = list(product(*[mask.spans(b, h, q_idx) for mask in masks]))
        return tuple(
            (reduce(larger, [first for first, _ in choice]), reduce(smaller, [last for _, last in choice]))
            for choice in choices
        )

    hiding = [mask.keys for mask in masks if mask.keys is not None]

    def keys(b, h, kv_idx):
        return reduce(and_, [visible(b, h, kv_idx) for visible in hiding])

    return SpanMask(spans, keys if hiding else None, label=lambda: f"both({', '.join(map(repr, masks))})")


def either(*masks: MaskMod) -> MaskMod:
    """Visible where at least one mask says so: all their spans.

    A SpanMask if all are; with a plain `mask_mod` function among them, a plain function.
    """
    check_masks(masks)
    if not all(isinstance(mask, SpanMask) for mask in masks):

        def either_mask(b, h, q_idx, kv_idx):
            return reduce(or_, [mask(b, h, q_idx, kv_idx) for mask in masks])

        return either_mask

    def spans(b, h, q_idx):
        return tuple(span for mask in masks for span in mask.spans(b, h, q_idx))

    hiding = [mask.keys for mask in masks if mask.keys is not None]

    def keys(b, h, kv_idx):
        return reduce(or_, [visible(b, h, kv_idx) for visible in hiding])

    # One mask that hides no key from all is enough for the union to hide none.
    all_hide = len(hiding) == len(masks)
    return SpanMask(spans, keys if all_hide else None, label=lambda: f"either({', '.join(map(repr, masks))})")


def check_masks(masks: tuple[MaskMod, ...]) -> None:
    """Raise unless there is a mask and each can be called."""
    if not masks:
        raise ValueError("masks must hold at least one mask, got none")
    for mask in masks:
        if not callable(mask):
            raise TypeError(f"masks must be mask_mods, functions of (b, h, q_idx, kv_idx), got {mask!r}")

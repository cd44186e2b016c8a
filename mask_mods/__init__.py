"""Attention masks for `flex_attention`: element rule and closed-form block rule in one object."""

from mask_mods.bidirectional import bidirectional
from mask_mods.blocks import (
    any_key_visible,
    block_visibility,
    hides_keys,
    last_queries,
    seeing_queries,
    visible_keys,
)
from mask_mods.causal import causal
from mask_mods.checks import check_mask_mod
from mask_mods.compose import both, either
from mask_mods.document import document, documents_from_lengths
from mask_mods.frames import frames
from mask_mods.heads import from_head
from mask_mods.padding import padding
from mask_mods.positions import PositionMask, place
from mask_mods.prefix import prefix
from mask_mods.sink import sink
from mask_mods.sliding_window import sliding_window
from mask_mods.spans import SpanMask

__all__ = [
    "PositionMask",
    "SpanMask",
    "any_key_visible",
    "bidirectional",
    "block_visibility",
    "both",
    "causal",
    "check_mask_mod",
    "document",
    "documents_from_lengths",
    "either",
    "frames",
    "from_head",
    "hides_keys",
    "last_queries",
    "padding",
    "place",
    "prefix",
    "seeing_queries",
    "sink",
    "sliding_window",
    "visible_keys",
]

"""Masks as queries see them that begin somewhere within a sequence, and over keys that are not all of it."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from mask_mods import SpanMask, place
from mask_mods.spans import MaskMod


@dataclass(frozen=True, eq=False, repr=False)
class FromQuery:
    """A mask where query 0 stands for query `first`."""

    mask_mod: MaskMod
    first: Int[Tensor, ""]

    def __call__(self, b, h, q_idx, kv_idx):
        return self.mask_mod(b, h, q_idx + self.first, kv_idx)

    @property
    def keys(self):
        return getattr(self.mask_mod, "keys", None)

    def __repr__(self) -> str:
        return f"from_query({self.mask_mod!r})"


class SpansFromQuery(FromQuery, SpanMask):
    """`from_query` of a SpanMask."""

    __call__ = SpanMask.__call__

    def spans(self, b, h, q_idx):
        return self.mask_mod.spans(b, h, q_idx + self.first)


def from_query(mask_mod: MaskMod, first: Int[Tensor, ""]) -> MaskMod:
    """`mask_mod`, whose query i is token i, for queries that begin at token `first`; a SpanMask if it is one."""
    whole = place(mask_mod, 0)
    return (SpansFromQuery if isinstance(whole, SpanMask) else FromQuery)(whole, first)


def at_keys(mask_mod: MaskMod, position: Int[Tensor, " m"]) -> MaskMod:
    """`mask_mod` whose key j stands at position[j]."""

    def moved(b, h, q_idx, kv_idx):
        return mask_mod(b, h, q_idx, position[kv_idx])

    return moved

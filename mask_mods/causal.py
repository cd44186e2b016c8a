"""Causal mask."""

from dataclasses import dataclass

from mask_mods.positions import PositionMask
from mask_mods.spans import Index, called


@dataclass(frozen=True, eq=False, repr=False)
class Causal(PositionMask):
    """See `causal`."""

    growing = True

    def spans(self, b, h, q_idx):
        return ((0, self.position(b, q_idx)),)

    def __repr__(self) -> str:
        return called("causal", offset=self.offset)


def causal(offset: Index | None = None) -> PositionMask:
    """Key j is visible to query i when j ≤ i + offset: query i stands at position i + offset (see PositionMask)."""
    return Causal(offset=offset)

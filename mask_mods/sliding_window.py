"""Sliding-window mask."""

from dataclasses import dataclass

from mask_mods.checks import check_count, check_flag
from mask_mods.positions import PositionMask
from mask_mods.spans import Index, called


@dataclass(frozen=True, eq=False, repr=False)
class SlidingWindow(PositionMask):
    """See `sliding_window`."""

    window: int
    symmetric: bool

    def __post_init__(self):
        super().__post_init__()
        check_count("window", self.window, minimum=1)
        check_flag("symmetric", self.symmetric)

    def spans(self, b, h, q_idx):
        position = self.position(b, q_idx)
        after = self.window - 1 if self.symmetric else 0
        return ((position - (self.window - 1), position + after),)

    def __repr__(self) -> str:
        return called("sliding_window", self.window, offset=self.offset, symmetric=self.symmetric or None)


def sliding_window(window: int, offset: Index | None = None, *, symmetric: bool = False) -> PositionMask:
    """Key j is visible to the query at position p = i + offset when p − window < j ≤ p (offset: see PositionMask).

    That is `window` keys, the query's own among them; `symmetric` adds the window − 1 keys after it: |p − j| < window.
    """
    return SlidingWindow(window, symmetric, offset=offset)

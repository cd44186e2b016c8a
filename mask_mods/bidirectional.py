"""No mask."""

import torch

from mask_mods.checks import LARGEST
from mask_mods.spans import SpanMask


class Bidirectional(SpanMask):
    """See `bidirectional`."""

    growing = True

    def __init__(self):
        pass

    def spans(self, b, h, q_idx):
        return ((0, 2 * LARGEST - 1),)

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        """It fits every call."""

    def __repr__(self) -> str:
        return "bidirectional()"


def bidirectional() -> SpanMask:
    """Every key is visible to every query."""
    return Bidirectional()

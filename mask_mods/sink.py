"""Attention-sink mask."""

from dataclasses import dataclass

import torch

from mask_mods.checks import check_count
from mask_mods.spans import SpanMask


@dataclass(frozen=True, eq=False, repr=False)
class Sink(SpanMask):
    """See `sink`."""

    count: int

    def __post_init__(self):
        check_count("count", self.count, minimum=0)

    def spans(self, b, h, q_idx):
        return ((0, self.count - 1),)

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        """It fits every call."""

    def __repr__(self) -> str:
        return f"sink({self.count})"


def sink(count: int) -> SpanMask:
    """Key j is visible to every query when j < count, causal or not: `both(causal(), either(sink(4), …))`."""
    return Sink(count)

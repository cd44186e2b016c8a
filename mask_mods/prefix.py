"""Prefix-LM mask."""

from dataclasses import dataclass

import torch

from mask_mods.checks import LARGEST, check_count, check_per_batch, check_per_call, check_range
from mask_mods.positions import PositionMask
from mask_mods.spans import Index, called, larger, per_batch


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(PositionMask):
    """See `prefix`."""

    length: Index

    def __post_init__(self):
        super().__post_init__()
        check_per_batch("length", self.length)
        if isinstance(self.length, int):
            check_count("length", self.length, minimum=0)

    def spans(self, b, h, q_idx):
        return ((0, larger(self.position(b, q_idx), per_batch(self.length, b) - 1)),)

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        super().check(B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=device)
        check_per_call("length", self.length, B, device)
        check_range("length", self.length, 0, LARGEST)

    def __repr__(self) -> str:
        return called("prefix", self.length, offset=self.offset)


def prefix(length: Index, offset: Index | None = None) -> PositionMask:
    """Key j is visible to query i when j < length (the prefix, seen by all) or j ≤ i + offset (causal).

    `length` is an int or an integer tensor, 0-dim or [B]; offset: see PositionMask. The mask is causal behind the
    prefix by itself: beside a causal mask, rr_flex's default, nothing of the prefix is left, so give its calls
    `causal=False`.
    """
    return Prefix(length, offset=offset)

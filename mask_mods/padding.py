"""Padding mask for batches of unequal lengths."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mask_mods.checks import check_count, check_integers, check_per_call, check_range
from mask_mods.positions import PositionMask
from mask_mods.spans import Index, buffered, called, only_where, per_batch


@dataclass(frozen=True, eq=False, repr=False)
class Padding(PositionMask):
    """See `padding`."""

    lengths: Int[Tensor, " B"]
    side: Literal["right", "left"]
    total: int | None
    starts: Int[Tensor, " B"] | int  # first real key, of each sequence or of all
    ends: Int[Tensor, " B"]  # last real key

    def spans(self, b, h, q_idx):
        position, first, last = self.position(b, q_idx), per_batch(self.starts, b), per_batch(self.ends, b)
        real = (first <= position) & (position <= last)
        return (only_where(real, first, last),)

    def keys(self, b, h, kv_idx):
        return (per_batch(self.starts, b) <= kv_idx) & (kv_idx <= per_batch(self.ends, b))

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        super().check(B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=device)
        check_per_call("lengths", self.lengths, B, device)
        if self.total is not None and self.total != Lk:
            raise ValueError(f"total must be the call's number of keys {Lk}, got {self.total}")
        check_range("lengths", self.lengths, 0, Lk)

    def __repr__(self) -> str:
        return called("padding", self.lengths, side=self.side, total=self.total, offset=self.offset)


def padding(
    lengths: Int[Tensor, " B"],
    side: Literal["right", "left"] = "right",
    total: int | None = None,
    offset: Index | None = None,
) -> PositionMask:
    """Key j is visible to query i when tokens j and i + offset are both real: a padded query sees nothing.

    Real are the first `lengths[b]` tokens with padding on the right, the last `lengths[b]` of `total` (the number of
    keys, needed here only) with padding on the left. Offset: see PositionMask.
    """
    check_integers("lengths", lengths, (1,), "[B]")
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', got {side!r}")
    if total is not None:
        check_count("total", total, minimum=1)
    elif side == "left":
        raise ValueError("total must be the number of keys when side is 'left', got None")
    # Tensors, not ints: under dynamic=True flex cannot capture an int that depends on the length.
    starts = buffered(total - lengths) if side == "left" else 0
    ends = buffered(starts + lengths - 1)
    return Padding(lengths, side, total, starts, ends, offset=offset)

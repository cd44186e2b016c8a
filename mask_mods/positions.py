"""The one rule for positions: where the queries of a call stand among its keys, and which masks move with them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mask_mods.checks import LARGEST, check_per_batch, check_per_call, check_range
from mask_mods.spans import Index, MaskMod, SpanMask, per_batch


@dataclass(frozen=True, eq=False, repr=False)
class PositionMask(SpanMask):
    """A mask over positions: query i of batch b stands at position i + offset, and its position decides what it sees.

    `offset` is an int or an integer tensor, 0-dim or [B]. None, the default, is where the call stands: `placed` puts
    the mask there, and alone in plain flex_attention it is 0. A new tensor causes no recompile, a new int does; under
    `dynamic=True` an offset that depends on the lengths must be a tensor.
    """

    offset: Index | None = field(default=None, kw_only=True)

    def __post_init__(self):
        if self.offset is not None:
            check_per_batch("offset", self.offset)

    def position(self, b: Tensor, q_idx: Tensor) -> Tensor:
        """Where query `q_idx` of batch `b` stands."""
        return q_idx if self.offset is None else q_idx + per_batch(self.offset, b)

    def placed(self, q_offset: Index) -> "PositionMask":
        """The mask for queries that begin at position `q_offset`; one with an offset of its own stays where it is."""
        return replace(self, offset=q_offset) if self.offset is None else self

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        check_per_call("offset", self.offset, B, device)
        check_range("offset", self.offset, -LARGEST, LARGEST)


def place(mask_mod: MaskMod, q_offset: Index) -> MaskMod:
    """`mask_mod` for queries that begin at position `q_offset`, if it has a `placed`, as every mask of mask_mods has.

    A plain function keeps FlexAttention's own convention: its q_idx is the query's index in the call.
    """
    placed = getattr(mask_mod, "placed", None)
    return mask_mod if placed is None else placed(q_offset)

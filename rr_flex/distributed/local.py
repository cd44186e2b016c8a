"""What one rank works with in one call: its own queries, keys and values, and the call's request."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import from_head
from mask_mods.spans import MaskMod
from rr_flex.config import RRConfig
from rr_flex.distributed.asked import Asked
from rr_flex.distributed.choosing import Rows, for_strip, last_row, rows_of
from rr_flex.distributed.position_masks import at_positions
from rr_flex.distributed.shards import Shards
from rr_flex.request import Request


class Local(NamedTuple):
    """What one rank works with in one call."""

    q: Float[Tensor, "B Hq n D"]
    k: Float[Tensor, "B Hkv m D"]
    v: Float[Tensor, "B Hkv m Dv"]
    shards: Shards
    asked: Asked
    request: Request  # of this rank's queries and heads; each strip has a mask of its own
    strips: list[tuple[slice, slice]]  # query heads and their key heads
    kernel: str  # "flash", "triton" or "cpu"

    @property
    def config(self) -> RRConfig:
        return self.request.config

    @property
    def count(self) -> int:
        """Keys of all ranks."""
        return self.shards.layout.tokens

    def position_mask(self, heads: slice) -> MaskMod:
        """What a strip of heads may see, by positions."""
        first = torch.full((), heads.start, dtype=torch.int64, device=self.q.device) + self.request.head_offset
        return from_head(self.asked.mask, first)

    def of_strip(self, heads: slice) -> Request:
        """The request of a strip of heads, its mask one of query indices here and key positions."""
        position = self.shards.layout.positions(self.shards.place, self.q.device)
        sizes = self.q.shape[0], heads.stop - heads.start, self.count
        return for_strip(self.request, heads, at_positions(self.position_mask(heads), position, sizes))

    def rows(self, heads: slice) -> Rows:
        """Where this rank's block rows lie."""
        q_block, sizes = self.config.block_sizes[0], (self.q.shape[0], heads.stop - heads.start, self.count)
        last = last_row(self.position_mask(heads), sizes, q_block, self.q.device)
        return rows_of(self.shards.layout, self.shards.place, q_block, last)

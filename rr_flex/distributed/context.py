"""Context parallel: queries stay where they are, and the keys and values that they need come to them.

Only pooled keys go to every rank; from them each chooses its own queries' blocks. Then it fetches the key blocks that
some query here kept or, where that is not less, all of them, one strip of key heads after the other: the next strip's
transfer runs beside this one's attention. A rule that scores single keys (pool="queries", "both") needs all keys to
choose: they are gathered in whole, and only the values are fetched by block. (The other way, pooled queries to the
keys' owners and their block masses back, moves Hq · L² / 4,096 bytes against the keys' 2 · Hkv · L · D: more from
32K tokens on with 32/8 heads of 128, and to all ranks.)
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mask_mods import from_head, hides_keys, visible_keys
from mask_mods.spans import MaskMod
from rr_flex.attention import shortest_sparse
from rr_flex.config import RRConfig
from rr_flex.distributed.asked import Asked, check_asked
from rr_flex.distributed.attend import Seen, attend
from rr_flex.distributed.choose import (
    Chosen,
    Keys,
    Logits,
    Rows,
    choose_on,
    cut_at_the_end,
    needs_every_key,
    pool_on,
    query_pieces,
)
from rr_flex.distributed.fetch import Deliveries
from rr_flex.distributed.masks import at_positions
from rr_flex.distributed.shards import HEADS, Shards
from rr_flex.distributed.transfer import gather_tokens
from rr_flex.geometry import ceil_div
from rr_flex.kernels.last_rows import rows_apart
from rr_flex.kernels.score_mods import cap_as_tensor
from rr_flex.pipeline import key_head_mask
from rr_flex.runtime.head_slices import head_slices

STRIPS = 4  # of key heads at least, where there are so many: all but the first travel while another attends


class Local(NamedTuple):
    """What one rank works with in one call."""

    q: Float[Tensor, "B Hq n D"]
    k: Float[Tensor, "B Hkv m D"]
    v: Float[Tensor, "B Hkv m Dv"]
    shards: Shards
    asked: Asked
    config: RRConfig  # levels of this rank's heads
    logits: Logits
    strips: list[tuple[slice, slice]]  # query heads and their key heads

    @property
    def count(self) -> int:
        """Keys of all ranks."""
        return self.shards.layout.tokens

    @property
    def head_offset(self) -> int:
        return self.shards.rank(HEADS) * self.q.shape[1]

    def mask(self, heads: slice) -> MaskMod:
        """What the queries of a strip of heads may see: of query indices here and key positions."""
        first = torch.full((), self.head_offset + heads.start, dtype=torch.int64, device=self.q.device)
        position = self.shards.layout.positions(self.shards.place, self.q.device)
        sizes = self.q.shape[0], heads.stop - heads.start, self.count
        return at_positions(from_head(self.asked.mask, first), position, sizes)

    def valid_keys(self, heads: slice) -> Bool[Tensor, "b h Lk"] | None:
        """False for keys that no query of the strip may see; None: there are no such."""
        mask, B = self.mask(heads), self.q.shape[0]
        return visible_keys(mask, B, heads.stop - heads.start, self.count, self.q.device) if hides_keys(mask) else None

    @property
    def dense(self) -> bool:
        """Whether the keys are so few that every visible block is kept."""
        return self.count < shortest_sparse(self.q, self.config, plain_softmax=self.logits.softcap is None)


def context_parallel(
    q: Float[Tensor, "B Hq n D"],
    k: Float[Tensor, "B Hkv m D"],
    v: Float[Tensor, "B Hkv m Dv"],
    shards: Shards,
    **options: Any,
) -> Float[Tensor, "B Hq n Dv"]:
    """`rr_attention` of this rank's queries over the keys of all ranks of "sequence", tokens in the layout's order.

    `fetch`: "kept" moves the key blocks that some query of the rank keeps, "all" moves all of them, "auto" (default)
    what is less for the rank that moves most, strip by strip. Further options: config or its fields, mask_mod, causal,
    scale, softcap, account. By the compiler's own kernel. Raises on every rank what one process would raise, and for
    the density budget.
    """
    local = prepare(q, k, v, shards, check_asked(q, k, v, shards, options, {"fetch", "softcap", "mask_mod"}))
    chosen, all_keys = choose_blocks(local)
    deliveries = Deliveries(local, chosen, all_keys)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    coming = deliveries.start(0)
    for place, (heads, _) in enumerate(local.strips):
        arriving = coming
        # Before this strip's attention is queued: the transfer would wait for it.
        coming = deliveries.start(place + 1) if place + 1 < len(local.strips) else None
        keys, values = arriving()
        seen = Seen(chosen[place], local.mask(heads), local.config.block_sizes, last_rows_here(local))
        out[:, heads], _ = attend(q[:, heads], keys, values, seen, local.logits)
    return out


def prepare(q: Tensor, k: Tensor, v: Tensor, shards: Shards, asked: Asked) -> Local:
    Hq, Hkv = q.shape[1], k.shape[1]
    config = asked.config_of(shards, Hq)
    logits = Logits(q.shape[3] ** -0.5 if asked.scale is None else asked.scale, cap_as_tensor(asked.softcap, q.device))
    # The same on every rank, though their shards differ: whole groups, at least as many strips as memory asks for.
    most = max(shards.layout.queries_on(rank) for rank in range(shards.layout.ranks))
    least = max(STRIPS, len(head_slices(q.shape[0], Hq, Hkv, most, shards.layout.tokens, config)))
    width = max(n for n in range(1, Hkv + 1) if Hkv % n == 0 and (Hkv // n >= least or n == 1))
    group = Hq // Hkv
    strips = [(slice(h * group, (h + width) * group), slice(h, h + width)) for h in range(0, Hkv, width)]
    return Local(q, k, v, shards, asked, config, logits, strips)


def choose_blocks(local: Local) -> tuple[list[Chosen], list[Tensor] | None]:
    """The blocks of each strip, and each strip's keys of all ranks if choosing took them, in whole key blocks."""
    q, config, shards, device = local.q, local.config, local.shards, local.q.device
    level = config.level_per_head(q.shape[1], device)
    pieces = query_pieces(shards.layout, shards.place, config, device)
    keys = _pooled_keys(local) if not local.dense and not needs_every_key(config) else None
    gathering = _gather_keys(local) if not local.dense and needs_every_key(config) else None
    chosen, all_keys = [], []
    for place, (heads, key_heads) in enumerate(local.strips):
        valid = local.valid_keys(heads)
        of_strip = Keys(None if keys is None else keys[:, key_heads], None, local.count)
        if gathering is not None:
            all_keys.append(gathering[place].wait())
            single = all_keys[place][:, :, : local.count]
            of_keys = None if valid is None else key_head_mask(valid, heads.stop - heads.start, single.shape[1])
            pooled = pool_on(device)(single, config, of_keys) if config.pool == "both" else None
            of_strip = Keys(pooled, single, local.count)
        offset = torch.full((), local.head_offset + heads.start, dtype=torch.int64, device=device)
        rows = Rows(q[:, heads], local.mask(heads), pieces, config, level[heads], offset, valid)
        found = choose_on(device)(rows, of_strip, local.logits, local.dense)
        local.asked.account.add_blocks(found.kept, found.visible)
        chosen.append(cut_at_the_end(found, local.count, config.block_sizes[1]))
    return chosen, all_keys or None


def _pooled_keys(local: Local) -> Tensor:
    """Of all ranks, in the order of their positions."""
    k, shards, config = local.k, local.shards, local.config
    valid = local.valid_keys(slice(0, local.q.shape[1]))
    if valid is not None:
        valid = shards.layout.take(key_head_mask(valid, local.q.shape[1], k.shape[1]), shards.place, -1)
    flight = gather_tokens(pool_on(k.device)(k, config, valid), shards, stride=config.strides[1])
    local.asked.account.selecting += flight.received
    return flight.wait()


def _gather_keys(local: Local) -> list:
    """Each strip's keys under way."""
    size = local.config.block_sizes[1]
    flights = [gather_tokens(local.k[:, keys], local.shards, pad_to=size) for _, keys in local.strips]
    local.asked.account.fetched += sum(flight.received for flight in flights)
    return flights


def last_rows_here(local: Local) -> int:
    """How many of this rank's last block rows attend by themselves."""
    pieces = local.shards.layout.queries_of(local.shards.place)
    rows = ceil_div(pieces[-1].stop - pieces[-1].start, local.config.block_sizes[0])
    if local.dense or pieces[-1].stop < local.count or rows < local.config.dense_last_rows:
        return 0
    kernel = "cpu" if local.q.device.type == "cpu" else "triton"
    return rows_apart(local.q.shape[2], local.count, local.config, kernel)

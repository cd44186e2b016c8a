"""The keys and values of one strip of key heads after the other, from the ranks that hold them."""

from collections.abc import Callable

import torch
from torch import Tensor

from rr_flex.distributed.choosing import Chosen, wanted_blocks
from rr_flex.distributed.local import Local
from rr_flex.distributed.shards import SEQUENCE
from rr_flex.distributed.transfer import Owners, fetch_blocks, gather_tokens, gather_wanted

Arriving = Callable[[], tuple[Tensor, Tensor]]  # waits, and gives k and v by position, in whole key blocks


class Deliveries:
    """Decides for each strip what travels, the same on every rank, and sends it when told to."""

    def __init__(self, local: Local, chosen: list[Chosen], all_keys: list[Tensor] | None) -> None:
        self.local, self.all_keys = local, all_keys
        self.size = local.config.block_sizes[1]
        self.account = local.asked.account
        layout, ranks = local.shards.layout, local.shards.ranks(SEQUENCE)
        foreign = (ranks - 1) * layout.most_keys * local.k.shape[0] * local.k.shape[1]
        self.account.all_gather += foreign * (local.k.shape[3] + local.v.shape[3]) * local.k.element_size()
        self.counts = None
        if local.asked.fetch != "all":
            self.owners = Owners(layout, self.size, local.k.device)
            wanted = [
                wanted_blocks(one.kept, keys.stop - keys.start)
                for one, (_, keys) in zip(chosen, local.strips, strict=True)
            ]
            self.wanted, moved = gather_wanted(torch.cat(wanted, 1), local.shards)
            self.account.selecting += moved
            self.counts = self.owners.counts(self.wanted, [keys for _, keys in local.strips])

    def start(self, place: int) -> Arriving:
        """Sends strip `place` on its way."""
        key_heads = self.local.strips[place][1]
        tensors = [self.local.k[:, key_heads], self.local.v[:, key_heads]]
        if self.all_keys is not None:
            tensors = tensors[1:]
        by_block = self.counts is not None and (self.local.asked.fetch == "kept" or self._is_less(place))
        self.account.ways.append("kept" if by_block else "all")
        if by_block:
            flight = fetch_blocks(
                tensors, self.wanted[:, :, key_heads], self.counts[place], self.owners, self.local.shards
            )
            flights = [flight]
        else:
            flights = [gather_tokens(x, self.local.shards, pad_to=self.size) for x in tensors]
        self.account.fetched += sum(flight.received for flight in flights)

        def arrive() -> tuple[Tensor, Tensor]:
            landed = [flight.wait() for flight in flights]
            landed = list(landed[0]) if by_block else landed
            return tuple(landed if self.all_keys is None else [self.all_keys[place], *landed])

        return arrive

    def _is_less(self, place: int) -> bool:
        """Whether the rank that receives or sends most moves fewer blocks than an all-gather would."""
        counts, layout = self.counts[place], self.local.shards.layout
        ranks = range(layout.ranks)
        received = [sum(counts[rank]) - counts[rank][rank] for rank in ranks]
        sent = [sum(counts[rank][owner] for rank in ranks) - counts[owner][owner] for owner in ranks]
        key_heads = self.local.strips[place][1]
        of_rank = -(-layout.most_keys // self.size) * self.local.k.shape[0] * (key_heads.stop - key_heads.start)
        return max(*received, *sent) < (layout.ranks - 1) * of_rank

"""The keys and values of one strip of key heads after the other, from the ranks that hold them."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from rr_flex.distributed.local import Local
from rr_flex.distributed.transfer import gather_tokens, gather_wanted, pass_rows
from rr_flex.geometry import ceil_div

Arriving = Callable[[], tuple[Tensor, Tensor]]  # waits, and gives k and v by position


class Deliveries:
    """Sends each strip when told to."""

    def __init__(self, local: Local, kept: list[Tensor], all_keys: Tensor | None) -> None:
        self.local, self.all_keys, self.account = local, all_keys, local.asked.account
        layout, k, v = local.shards.layout, local.k, local.v
        foreign = (layout.ranks - 1) * layout.most_keys * k.shape[0] * k.shape[1]
        self.account.all_gather += foreign * (k.shape[3] + v.shape[3]) * k.element_size()
        self.plan = None if local.asked.fetch == "all" else Plan(local, kept)

    def start(self, number: int) -> Arriving:
        """Sends strip `number` on its way."""
        local, plan = self.local, self.plan
        _, key_heads = local.strips[number]
        flights = [
            plan.send(x, number) if plan else gather_tokens(x[:, key_heads], local.shards)
            for x in ((local.k, local.v) if self.all_keys is None else (local.v,))
        ]
        self.account.fetched += sum(flight.received for flight in flights)

        def arrive() -> tuple[Tensor, Tensor]:
            landed = [flight.wait() for flight in flights]
            return tuple(landed if self.all_keys is None else [self.all_keys[:, key_heads], *landed])

        return arrive


class Plan:
    """Which key blocks go from whom to whom: for all strips at once, so that it takes few operations and one wait."""

    def __init__(self, local: Local, kept: list[Tensor]) -> None:
        self.local, self.size = local, local.config.block_sizes[1]
        layout, me, device = local.shards.layout, local.shards.place, local.k.device
        self.blocks = ceil_div(layout.tokens, self.size)
        owner = torch.tensor(layout.owner_of_blocks(self.size))
        columns = [torch.nonzero(owner == rank)[:, 0] for rank in range(layout.ranks)]  # ascending, as they lie there
        self.most = max(map(len, columns))
        # A rank's key blocks, and behind them one that nobody wants.
        lies = torch.stack([F.pad(x, (0, self.most - len(x)), value=self.blocks) for x in columns]).to(device)
        wanted = wanted_blocks(kept, local.k.shape[:2], self.blocks)
        wanted[..., columns[me].to(device)] = False
        everybody, moved = gather_wanted(wanted, local.shards)
        local.asked.account.selecting += moved
        B, strips = wanted.shape[0], len(local.strips)
        flags = F.pad(everybody, (0, 1))[..., lies].unflatten(2, (strips, -1))  # ranks B strips w owners most
        # [strip][wanting rank][owner]
        self.counts = flags.sum((1, 3, 5)).transpose(0, 1).tolist()
        w = self.width = flags.shape[3]
        # In the order in which they travel: by strip, then by the other rank.
        sent, came = flags[:, :, :, :, me].permute(2, 0, 1, 3, 4), flags[me].permute(1, 3, 0, 2, 4)
        strip, _, b, h, block = places(sent, sum(sum(row[me] for row in table) for table in self.counts))
        own = len(columns[me])
        self.sent = ((b * strips + strip) * w + h) * own + block
        _, rank, b, h, block = places(came, sum(sum(table[me]) for table in self.counts))
        self.came = (b * w + h) * self.blocks + lies[rank, block]
        self.B = B

    def send(self, x: Tensor, number: int):
        """This rank's part of strip `number` of x [B, Hkv, m, D], keys or values, on its way to who wants it."""
        me, local, counts = self.local.shards.place, self.local, self.counts[number]
        rows = F.pad(x, (0, 0, 0, -x.shape[2] % self.size)) if x.shape[2] % self.size else x
        rows = rows.reshape(-1, self.size * x.shape[3])
        sizes = [[sum(row[me] for row in table) for table in self.counts], [sum(table[me]) for table in self.counts]]
        sent, came = (index.split(own)[number] for index, own in zip((self.sent, self.came), sizes, strict=True))
        key_heads = local.strips[number][1]

        def land(received: Tensor) -> Tensor:
            # Zeros where nothing came: eager flex_attention multiplies them by 0.
            whole = x.new_zeros(self.B * self.width * self.blocks, rows.shape[1])
            whole.index_copy_(0, came, received)
            whole = whole.view(self.B, self.width, -1, x.shape[3])[:, :, : local.count]
            row = 0
            for _, start, stop in local.shards.layout.of(me):
                whole[:, :, start:stop] = x[:, key_heads, row : row + stop - start]
                row += stop - start
            return whole

        return pass_rows(rows[sent], ([row[me] for row in counts], counts[me]), local.shards, land)


def wanted_blocks(
    kept: list[Bool[Tensor, "B Hq rows n"]], heads: tuple[int, int], blocks: int
) -> Bool[Tensor, "B Hkv blocks"]:
    """The key blocks that some row of a key head's query heads keeps; `heads`: (B, Hkv)."""
    (B, Hkv), device = heads, kept[0].device if kept else None
    wanted = torch.zeros(B, Hkv, blocks, dtype=torch.bool, device=device)
    for one in kept:
        wanted[..., : one.shape[3]] |= one.any(2).unflatten(1, (Hkv, -1)).any(2)
    return wanted


def places(flags: Bool[Tensor, "..."], count: int) -> list[Int[Tensor, " count"]]:
    """The indices of the `count` true flags along each axis, in their order; unlike nonzero it does not wait for the
    device."""
    flat = flags.flatten()
    slot = torch.where(flat, flat.cumsum(0) - 1, count)
    index = torch.arange(len(flat), device=flat.device)
    index = index.new_empty(count + 1).scatter_(0, slot, index)[:count]
    axes = []
    for size in reversed(flags.shape):
        axes.append(index % size)
        index = index // size
    return axes[::-1]

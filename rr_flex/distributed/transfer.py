"""Tokens, heads and blocks between ranks: torch.distributed's collectives, and how their buffers are packed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.distributed.layout import Layout
from rr_flex.distributed.shards import SEQUENCE, Shards, answering
from rr_flex.geometry import ceil_div

# torch 2.13 has renamed it.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True, eq=False)
class Flight:
    """A transfer under way."""

    work: dist.Work
    land: Callable[[], Tensor]
    received: int  # bytes from other ranks

    def wait(self) -> Tensor:
        """What arrived; on CUDA the stream waits, not the host."""
        with answering():
            self.work.wait()
        return self.land()


def gather_tokens(x: Float[Tensor, "B H n E"], shards: Shards, *, stride: int = 1) -> Flight:
    """Every rank's keys (one a `stride`) in the order of their positions: [B, H, ceil(tokens / stride), E]."""
    layout, ranks = shards.layout, shards.ranks(SEQUENCE)
    most = ceil_div(layout.most_keys, stride)
    sent = x.contiguous() if x.shape[2] == most else F.pad(x, (0, 0, 0, most - x.shape[2]))
    gathered = sent.new_empty(ranks * sent.shape[0], *sent.shape[1:])
    with answering():
        work = all_gather(gathered, sent, group=shards.group(SEQUENCE), async_op=True)

    def land() -> Tensor:
        return in_order(list(gathered.unflatten(0, (ranks, -1))), layout, stride)

    return Flight(work, land, (ranks - 1) * sent.nbytes)


def in_order(of_rank: list[Float[Tensor, "B H n E"]], layout: Layout, stride: int = 1) -> Tensor:
    """The ranks' tokens by position."""
    taken = [0] * layout.ranks
    parts = []
    for owner, start, stop in layout.pieces:
        n = ceil_div(stop - start, stride)
        parts.append(of_rank[owner][:, :, taken[owner] : taken[owner] + n])
        taken[owner] += n
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def exchange(parts: list[Tensor], shapes: list[tuple[int, ...]], shards: Shards) -> tuple[list[Tensor], int]:
    """parts[r] to rank r; what came from each rank, of `shapes`, and the bytes from other ranks."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    sizes = [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))
    splits = [part.numel() for part in parts]
    with answering():
        dist.all_to_all_single(received, sent, sizes, splits, group=shards.group(SEQUENCE))
    foreign = (sum(sizes) - sizes[shards.place]) * received.element_size()
    return [x.view(shape) for x, shape in zip(received.split(sizes), shapes, strict=True)], foreign


def gather_wanted(wanted: Bool[Tensor, "B Hkv nK"], shards: Shards) -> tuple[Bool[Tensor, "ranks B Hkv nK"], int]:
    """Which key blocks each rank wants, and the bytes that this moved."""
    ranks = shards.ranks(SEQUENCE)
    sent = wanted.to(torch.uint8).contiguous()
    gathered = sent.new_empty(ranks * sent.shape[0], *sent.shape[1:])
    with answering():
        all_gather(gathered, sent, group=shards.group(SEQUENCE))
    return gathered.unflatten(0, (ranks, -1)).bool(), (ranks - 1) * sent.nbytes


def pass_rows(
    rows: Float[Tensor, "n E"], splits: tuple[list[int], list[int]], shards: Shards, land: Callable[[Tensor], Tensor]
) -> Flight:
    """Rows to the ranks, splits[0][r] of them to rank r; of the splits[1] that come `land` makes the result."""
    to, of = splits
    received = rows.new_empty(sum(of), rows.shape[1])
    with answering():
        work = dist.all_to_all_single(received, rows, of, to, group=shards.group(SEQUENCE), async_op=True)
    return Flight(work, lambda: land(received), received.nbytes)

"""Tokens, heads and blocks between ranks: torch.distributed's collectives, and how their buffers are packed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
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
    land: Callable[[], Tensor | tuple[Tensor, ...]]
    received: int  # bytes from other ranks

    def wait(self) -> Tensor | tuple[Tensor, ...]:
        """What arrived; on CUDA the stream waits, not the host."""
        with answering():
            self.work.wait()
        return self.land()


def gather_tokens(x: Float[Tensor, "B H n E"], shards: Shards, *, stride: int = 1, pad_to: int = 1) -> Flight:
    """Every rank's keys (one a `stride`) in the order of their positions: [B, H, ceil(tokens / stride), E].

    Padded with zeros to a multiple of `pad_to`.
    """
    layout, ranks = shards.layout, shards.ranks(SEQUENCE)
    most = ceil_div(layout.most_keys, stride)
    sent = F.pad(x, (0, 0, 0, most - x.shape[2])).contiguous()
    gathered = sent.new_empty(ranks * sent.shape[0], *sent.shape[1:])
    with answering():
        work = all_gather(gathered, sent, group=shards.group(SEQUENCE), async_op=True)

    def land() -> Tensor:
        return in_order(list(gathered.unflatten(0, (ranks, -1))), layout, stride, pad_to)

    return Flight(work, land, (ranks - 1) * sent.nbytes)


def in_order(of_rank: list[Float[Tensor, "B H n E"]], layout: Layout, stride: int, pad_to: int) -> Tensor:
    """The ranks' tokens by position, padded with zeros to a multiple of `pad_to`."""
    taken = [0] * layout.ranks
    parts = []
    for owner, start, stop in layout.pieces:
        n = ceil_div(stop - start, stride)
        parts.append(of_rank[owner][:, :, taken[owner] : taken[owner] + n])
        taken[owner] += n
    count = sum(taken)
    if pad := ceil_div(count, pad_to) * pad_to - count:
        parts.append(parts[0].new_zeros(*parts[0].shape[:2], pad, *parts[0].shape[3:]))
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


class Owners:
    """Which rank has which key blocks of `size` tokens, as tensors on a device."""

    def __init__(self, layout: Layout, size: int, device: torch.device) -> None:
        owner, place = layout.owner_of_blocks(size)
        self.size, self.ranks = size, layout.ranks
        self.columns = [
            torch.tensor([j for j, of in enumerate(owner) if of == rank], dtype=torch.int64, device=device)
            for rank in range(layout.ranks)
        ]  # each rank's key blocks, ascending: its own block i is column i of these
        self.count = len(place)

    def counts(self, wanted: Bool[Tensor, "ranks B Hkv nK"], strips: list[slice]) -> list[list[list[int]]]:
        """Blocks [strip][wanting rank][owner] of the strips of key heads; waits for the device once."""
        by_owner = torch.stack([wanted[..., columns].sum(-1) for columns in self.columns], -1).sum(
            1
        )  # ranks Hkv owners
        return [table.tolist() for table in torch.stack([by_owner[:, strip].sum(1) for strip in strips]).cpu()]


def fetch_blocks(
    tensors: list[Float[Tensor, "B Hkv n E"]],
    wanted: Bool[Tensor, "ranks B Hkv nK"],
    counts: list[list[int]],
    owners: Owners,
    shards: Shards,
) -> Flight:
    """The key blocks that this rank wants of all ranks' tokens, by position: each [B, Hkv, nK · size, E].

    Blocks that nobody here wants are zeros: eager flex_attention multiplies them by 0. `counts`: blocks by [wanting
    rank][owner].
    """
    me, size = shards.place, owners.size
    B, Hkv, n, _ = tensors[0].shape
    blocks = [F.pad(x, (0, 0, 0, -n % size)).unflatten(2, (-1, size)).flatten(0, 2).flatten(1) for x in tensors]
    asked = wanted[..., owners.columns[me]].flatten(1)  # ranks, B * Hkv * own blocks
    rows = torch.cat([true_places(asked[rank], counts[rank][me]) for rank in range(owners.ranks)])
    sent = torch.cat([x[rows] for x in blocks], 1)
    received = sent.new_empty(sum(counts[me]), sent.shape[1])
    splits = [counts[rank][me] for rank in range(owners.ranks)]
    with answering():
        work = dist.all_to_all_single(received, sent, counts[me], splits, group=shards.group(SEQUENCE), async_op=True)

    def land() -> tuple[Tensor, ...]:
        first = torch.arange(B * Hkv, device=sent.device)[:, None] * owners.count
        targets = []
        for rank, columns in enumerate(owners.columns):
            flags = wanted[me][..., columns].flatten()
            targets.append((first + columns).flatten()[true_places(flags, counts[me][rank])])
        target = torch.cat(targets)
        landed = []
        for x, rows in zip(tensors, received.split([x.shape[1] for x in blocks], 1), strict=True):
            whole = x.new_zeros(B * Hkv * owners.count, rows.shape[1])
            whole[target] = rows
            landed.append(whole.view(B, Hkv, owners.count * size, -1))
        return tuple(landed)

    foreign = sum(counts[me]) - counts[me][me]
    return Flight(work, land, foreign * sent.shape[1] * sent.element_size())


def true_places(flags: Bool[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    """Where the `count` true flags are, ascending; unlike nonzero it does not wait for the device."""
    place = torch.where(flags, flags.cumsum(0) - 1, count)
    index = torch.arange(len(flags), device=flags.device)
    return index.new_empty(count + 1).scatter_(0, place, index)[:count]

"""Which rank holds which tokens: pieces that begin at whole blocks, in an order that shares the work evenly."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rr_flex.fields import check_int
from rr_flex.geometry import ceil_div

BLOCK = 128  # tokens: the largest block and a multiple of every stride, so a piece's blocks and strides are whole


class Piece(NamedTuple):
    """Tokens start … stop − 1, all on one rank."""

    owner: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The tokens of a sequence on the ranks of one mesh dimension. Every piece but the last ends at a multiple of 128.

    A rank's tensors hold its pieces one after the other, in the order of their positions. Queries are the tokens from
    `first_query` on, a multiple of 128; keys and values are all tokens. ValueError naming the field.
    """

    pieces: tuple[Piece, ...]
    ranks: int
    first_query: int = 0

    def __post_init__(self) -> None:
        starts = [0, *(piece.stop for piece in self.pieces[:-1])]
        follows = [p.start == start < p.stop for p, start in zip(self.pieces, starts, strict=False)]
        if not self.pieces or not all(follows):
            raise ValueError(f"pieces must follow each other from token 0 on, got {self.pieces}")
        for piece in self.pieces[1:]:
            if piece.start % BLOCK:
                raise ValueError(f"pieces must begin at multiples of {BLOCK} tokens, got {piece}")
        if not 0 <= self.first_query < self.tokens or self.first_query not in starts:
            raise ValueError(
                f"first_query must be where a piece begins, got {self.first_query} of {self.tokens} tokens"
            )
        for rank in range(self.ranks):
            if not self.queries_of(rank):
                count = self.tokens - self.first_query
                raise ValueError(f"every rank must hold at least one block of {BLOCK} queries, got {count} tokens")

    @property
    def tokens(self) -> int:
        return self.pieces[-1].stop

    @property
    def of_queries(self) -> "Layout":
        """Of the tokens that ask alone, counted from the first of them."""
        first = self.first_query
        return Layout(
            tuple(Piece(p.owner, p.start - first, p.stop - first) for p in self.pieces if p.start >= first), self.ranks
        )

    def of(self, rank: int) -> list[Piece]:
        """The pieces of a rank's keys, ascending."""
        return [piece for piece in self.pieces if piece.owner == rank]

    def queries_of(self, rank: int) -> list[Piece]:
        return [piece for piece in self.of(rank) if piece.start >= self.first_query]

    def keys_on(self, rank: int) -> int:
        return sum(piece.stop - piece.start for piece in self.of(rank))

    def queries_on(self, rank: int) -> int:
        return sum(piece.stop - piece.start for piece in self.queries_of(rank))

    @property
    def most_keys(self) -> int:
        """Of any rank: what its tensors are padded to where all ranks must send alike."""
        return max(self.keys_on(rank) for rank in range(self.ranks))

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Int[Tensor, " n"]:
        """Of a rank's queries: position_ids of its tokens."""
        return torch.cat([torch.arange(p.start, p.stop, device=device) for p in self.queries_of(rank)])

    def take(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """The rank's part of a tensor that holds all tokens."""
        parts = [x.narrow(dim, piece.start, piece.stop - piece.start) for piece in self.of(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def owner_of_blocks(self, size: int) -> list[int]:
        """For each block of `size` keys its rank."""
        return [owner for owner, start, stop in self.pieces for _ in range(start, stop, size)]

    def then(self, chunk: "Layout") -> "Layout":
        """The layout of a further chunk's prefill: its tokens, laid out as `chunk`, ask all that were before."""
        if chunk.ranks != self.ranks:
            raise ValueError(f"chunk must lie on as many ranks ({self.ranks}), got {chunk.ranks}")
        moved = tuple(Piece(p.owner, p.start + self.tokens, p.stop + self.tokens) for p in chunk.pieces)
        return Layout(self.pieces + moved, self.ranks, self.tokens)


def contiguous(tokens: int, ranks: int) -> Layout:
    """One run of tokens a rank, as equal as whole blocks allow. Under a causal mask the last rank works most."""
    return _layout(_edges(tokens, ranks), list(range(ranks)), tokens, ranks)


def zigzag(tokens: int, ranks: int) -> Layout:
    """Rank r has the r-th run of 2·ranks from the head and the r-th from the tail: even under a causal mask."""
    own = [stop - start for start, stop in pairwise(_edges(tokens, ranks))]  # tokens, of which the head has the half
    heads = [ceil_div(width, 2 * BLOCK) * BLOCK for width in own]
    tails = [width - head for width, head in zip(own, heads, strict=True)]
    edges = [0, *accumulate(heads + tails[::-1])]
    return _layout(edges, [*range(ranks), *reversed(range(ranks))], tokens, ranks)


def balanced(cost: Float[Tensor, " rows"] | Sequence[float], tokens: int, ranks: int) -> Layout:
    """A head and a tail run a rank, their widths chosen so that each rank has its share of `cost` and of the tokens.

    `cost`: of each block row of 128 queries in any unit, such as the blocks that an estimate keeps in it.
    """
    rows = _block_rows(tokens, ranks)
    cost = [float(x) for x in cost]
    if len(cost) != rows:
        raise ValueError(f"cost must hold one number a block row ({rows}), got {len(cost)}")
    before = [0.0, *accumulate(cost)]
    head, tail = 0, rows
    heads, tails = [0], [rows]
    for rank in range(ranks):
        left = ranks - rank
        count = (tail - head) // left if left > 1 else tail - head
        share = (before[tail] - before[head]) / left
        of = [before[head + n] - before[head] + before[tail] - before[tail - (count - n)] for n in range(count + 1)]
        width = min(range(count + 1), key=lambda n: abs(of[n] - share))
        head, tail = head + width, tail - (count - width)
        heads.append(head)
        tails.append(tail)
    edges = [edge * BLOCK for edge in heads] + [edge * BLOCK for edge in reversed(tails[:-1])]
    return _layout(edges, [*range(ranks), *reversed(range(ranks))], tokens, ranks)


def _block_rows(tokens: int, ranks: int) -> int:
    check_int("tokens", tokens, 1)
    check_int("ranks", ranks, 1)
    return ceil_div(tokens, BLOCK)


def _edges(tokens: int, ranks: int) -> list[int]:
    rows = _block_rows(tokens, ranks)
    return [rows * rank // ranks * BLOCK for rank in range(ranks + 1)]


def _layout(edges: list[int], owners: list[int], tokens: int, ranks: int) -> Layout:
    """Runs between `edges` by owner; empty ones are left out and neighbours of one owner joined."""
    pieces: list[Piece] = []
    for owner, start, stop in zip(owners, edges[:-1], edges[1:], strict=True):
        stop = min(stop, tokens)
        if start >= stop:
            continue
        if pieces and pieces[-1].owner == owner:
            start = pieces.pop().start
        pieces.append(Piece(owner, start, stop))
    return Layout(tuple(pieces), ranks)

"""Which queries of a server's step are sparse: whole block rows on the absolute grid, and nothing else.

A server cuts a prompt where its budget of tokens ends. Block row r is the queries at positions 128·r … 128·r + 127 of
their request, wherever the prompt was cut. A row that one chunk holds whole is sparse, and its selection is that of the
request alone. A row of which a chunk holds a part is dense in each of its parts: that costs at most one row a cut, it
never drops a block that the whole row would have kept, and it is what "the last block row is dense" comes to in a chunk
that does not know whether it is the last. So is every row that ends before `min_length` keys, in whatever prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rr_flex.geometry import ceil_div

ROW = 128  # queries of a block row
Reason = Literal["sparse", "decode", "cut", "short", "mask"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Queries of one request that are answered in one way."""

    request: int  # its row in the step's tables
    start: int  # position of the first query in its request; the keys before it are in the pages
    stop: int  # position after the last
    token: int  # place of the first query in the step's batch
    reason: Reason  # "sparse", or why it is dense

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def sparse(self) -> bool:
        return self.reason == "sparse"


def pieces_of_step(
    query_starts: Sequence[int],
    lengths: Sequence[int],
    prefilling: Sequence[bool],
    *,
    min_length: int = 0,
    row: int = ROW,
    causal: bool = True,
) -> list[Piece]:
    """The pieces of every request of a step, in the order of their tokens, which they cover once.

    `query_starts`: place of each request's first query in the batch, and the number of queries at the end; `lengths`:
    keys of each request, those of the step included; `prefilling`: False for decodes, the verification of drafts and
    generated tokens that are computed again: dense, as they were alone.
    """
    pieces = []
    for request, length in enumerate(lengths):
        token, queries = query_starts[request], query_starts[request + 1] - query_starts[request]
        start = length - queries
        for first, last, reason in _cut(start, length, bool(prefilling[request]), min_length, row, causal):
            piece = Piece(request=request, start=first, stop=last, token=token + first - start, reason=reason)
            pieces.append(piece)
    return pieces


def _cut(start: int, stop: int, prefilling: bool, min_length: int, row: int, causal: bool):
    """(first, last, reason) of the pieces of one request's queries at start … stop − 1."""
    if start >= stop:
        return
    if not prefilling or not causal:
        yield start, stop, "mask" if prefilling else "decode"
        return
    # The first row that ends at or past min_length; rows before it are short.
    long_from = max(0, ceil_div(min_length, row) - 1) * row
    first = ceil_div(start, row) * row
    last = stop // row * row
    sparse_from = max(first, long_from)
    if sparse_from >= last:
        yield start, stop, "short" if stop <= long_from else "cut"
        return
    if start < sparse_from:
        yield start, sparse_from, "cut" if sparse_from == first else "short"
    yield sparse_from, last, "sparse"
    if last < stop:
        yield last, stop, "cut"


@dataclass(frozen=True, kw_only=True)
class DenseBatch:
    """The dense pieces of a step as a batch of requests of their own, for the server's own attention."""

    tokens: Tensor  # int64: their places in the step's batch
    query_starts: Tensor  # int32 [pieces + 1]
    lengths: Tensor  # int32 [pieces]: keys of each
    requests: Tensor  # int64 [pieces]: row of each in the step's tables

    @property
    def longest(self) -> int:
        """Queries of the longest piece."""
        return int(self.query_starts.diff().max())


def dense_batch(pieces: Sequence[Piece]) -> DenseBatch | None:
    """The dense ones of `pieces`, single queries first, since servers take decodes to be in front; None without any.

    The keys of a piece end with its last query: what the request has after it, the piece's causal mask would hide.
    """
    dense = sorted((piece for piece in pieces if not piece.sparse), key=lambda piece: len(piece) > 1)
    if not dense:
        return None
    queries = torch.tensor([len(piece) for piece in dense], dtype=torch.int32)
    starts = torch.zeros(len(dense) + 1, dtype=torch.int32)
    starts[1:] = queries.cumsum(0)
    return DenseBatch(
        tokens=torch.cat([torch.arange(piece.token, piece.token + len(piece)) for piece in dense]),
        query_starts=starts,
        lengths=torch.tensor([piece.stop for piece in dense], dtype=torch.int32),
        requests=torch.tensor([piece.request for piece in dense]),
    )

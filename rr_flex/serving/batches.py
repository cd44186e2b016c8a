"""Sparse pieces of several requests selected at once, as a batch that gives each what it would be given alone.

A block row's choice depends on its own queries and the keys before its end. So a shorter piece may be followed by
queries that nobody reads, and a request with fewer keys by keys that its causal mask hides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rr_flex.geometry import ceil_div
from rr_flex.pipeline import select_in_slices
from rr_flex.request import make_request
from rr_flex.result import Selection
from rr_flex.serving.pages import Pool, PooledPages, read_pages
from rr_flex.serving.settings import Layer
from rr_flex.serving.step_rows import ROW, Piece

PADDING = 0.5  # of a batch's own work, that it may have beside it
# Queries times keys of a batch on a CPU: the scores of a larger one fall out of its cache, and each request alone is
# faster. On an accelerator launches decide.
MOST_ON_CPU = 1 << 24
MOST_KEYS = 1 << 20  # of a batch: pool="both" and "queries" copy them, 2 GiB of 8 heads of 128 in bfloat16


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pieces in one batch, each padded to the longest at its end; all tensors are on the device."""

    pieces: Sequence[Piece]
    queries: Int[Tensor, "B n"]  # their places in the step's batch; padding repeats a piece's last
    starts: Int[Tensor, " B"]  # position of each first query in its request
    table: Int[Tensor, "B pages"]  # int64; padding repeats a request's last page
    rows: Int[Tensor, " R"]  # block rows that are no padding, in the batch's B·n/128

    @classmethod
    def of(cls, pieces: Sequence[Piece], block_table: Tensor, page: int) -> "Batch":
        """`block_table` [requests, pages]: the server's own, on its device."""
        device = block_table.device
        longest = max(map(len, pieces))
        own_pages = torch.tensor([[ceil_div(piece.stop, page)] for piece in pieces])
        pages = torch.arange(int(own_pages.max())).minimum(own_pages - 1)
        requests = torch.tensor([[piece.request] for piece in pieces])
        sizes = torch.tensor([[len(piece)] for piece in pieces])
        queries = torch.tensor([[piece.token] for piece in pieces]) + torch.arange(longest).minimum(sizes - 1)
        rows = (torch.arange(longest // ROW) < sizes // ROW).flatten().nonzero()[:, 0]
        starts = torch.tensor([piece.start for piece in pieces])
        queries, starts, requests, pages, rows = (
            x.to(device, non_blocking=True) for x in (queries, starts, requests, pages, rows)
        )
        table = block_table[requests, pages].long()
        return cls(pieces=pieces, queries=queries, starts=starts, table=table, rows=rows)

    def row_by_row(self, blocks: Bool[Tensor, "b h nQ nK"]) -> Bool[Tensor, "1 h R nK"]:
        """The block rows of all pieces one behind the other, without the padding."""
        blocks = blocks.expand(len(self.pieces), -1, -1, -1)
        return blocks.transpose(0, 1).flatten(1, 2).index_select(1, self.rows)[None]

    @property
    def requests(self) -> Int[Tensor, " R"]:
        """The piece that each of `rows` belongs to."""
        return self.rows // (self.queries.shape[1] // ROW)


def in_batches(pieces: Sequence[Piece], device: torch.device) -> list[list[Piece]]:
    """The pieces as batches whose padding is at most `PADDING` of their own work, in queries times keys."""
    most = MOST_ON_CPU if device.type == "cpu" else math.inf
    found: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: len(piece) * piece.stop):
        if found and _fits([*found[-1], piece], most):
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def _fits(pieces: Sequence[Piece], most: float) -> bool:
    own = sum(len(piece) * piece.stop for piece in pieces)
    keys = len(pieces) * max(piece.stop for piece in pieces)
    return keys <= MOST_KEYS and keys * max(map(len, pieces)) <= min(most, (1 + PADDING) * own)


def select_batch(
    q: Float[Tensor, "B Hq n D"], batch: Batch, layer: Layer, keys: Pool, pooled: PooledPages | None = None
) -> Selection:
    """The Selection of a batch: rows on the absolute grid, each that of its request alone."""
    _, Hkv, _, D = keys.shape
    B, most = len(batch.pieces), max(piece.stop for piece in batch.pieces)
    if pooled is not None and layer.config.pool == "keys":
        # Nothing reads more of the keys than their shape.
        k = q.new_zeros(()).expand(B, Hkv, most, D)
    else:
        k = read_pages(keys, batch.table)[:, :, :most]
    options = {"q_offset": 0, "head_offset": layer.head_offset, "scale": layer.scale, "softcap": layer.softcap}
    request = replace(make_request(q, k, layer.config, options), q_offset=batch.starts)
    if pooled is not None:
        request = replace(request, pooled_keys=pooled.read(batch.table)[:, :, : most // pooled.stride])
    return select_in_slices(q, k, request)

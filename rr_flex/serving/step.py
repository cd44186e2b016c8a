"""One step of a server in one layer: its sparse pieces selected, attended and counted, over pages of any layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from rr_flex.block_mask import list_partial_and_full
from rr_flex.serving.batches import Batch, in_batches, select_batch
from rr_flex.serving.paged import attend_pages, folds_heads
from rr_flex.serving.pages import Pool, PooledPages, onto_pages
from rr_flex.serving.settings import Layer
from rr_flex.serving.step_rows import DenseBatch, Piece, dense_batch


@dataclass(frozen=True, kw_only=True)
class SparseStep:
    """What a step's layers have in common: where the queries and pages of its pieces are."""

    batches: Sequence[Batch]  # its sparse pieces, at least one
    dense: DenseBatch | None  # the others
    tokens: Int[Tensor, " n"]  # places of the sparse queries in the step's batch, in the order of `batches`

    @classmethod
    def of(cls, pieces: Sequence[Piece], block_table: Tensor, page: int) -> "SparseStep | None":
        """None where nothing is sparse. `block_table` [requests, pages]: the server's own, which is on its device."""
        groups = in_batches([piece for piece in pieces if piece.sparse], block_table.device)
        if not groups:
            return None
        tokens = torch.cat([torch.arange(each.token, each.token + len(each)) for group in groups for each in group])
        return cls(
            batches=[Batch.of(group, block_table, page) for group in groups],
            dense=dense_batch(pieces),
            tokens=tokens.to(block_table.device, non_blocking=True),
        )

    @property
    def sparse(self) -> list[Piece]:
        """Its sparse pieces in the order of `tokens`."""
        return [piece for batch in self.batches for piece in batch.pieces]

    @cached_property
    def table(self) -> Int[Tensor, "R pages"]:
        """The pages of each block row's request, in the order of `tokens`."""
        return _behind([batch.table[batch.requests] for batch in self.batches], 0)


def attend_sparse(
    step: SparseStep,
    layer: Layer,
    query: Float[Tensor, "tokens Hq D"],
    keys: Pool,
    values: Pool,
    pooled: PooledPages | None = None,
) -> tuple[Float[Tensor, "n Hq D"], Int[Tensor, "2"]]:
    """Outputs of the step's sparse queries, in the order of `step.tokens`, and their blocks kept and visible.

    Keys and values of the step must be in their pages. Pools whose tokens are not one sequence (`folds_heads`) are
    gathered: a copy of each request's pages. `pooled`: the layer's, with all that was written in them; None: the keys
    of each piece are pooled anew.
    """
    kept, visible, whole = select_rows(step, layer, query, keys, pooled)
    table, keys, values = in_sequence(step.table, keys, values)
    k_block = layer.config.block_sizes[1]
    folded = keys.shape[1] if folds_heads(keys) else None
    lists = onto_pages(list_partial_and_full(kept, whole), table, keys.shape[2] // k_block, folded)
    cap = None if layer.softcap is None else torch.full((), layer.softcap, device=query.device)
    q = query[step.tokens].transpose(0, 1)[None].contiguous()  # 1 Hq n D
    out = attend_pages(q, (keys, values), lists, k_block=k_block, scale=layer.scale, softcap=cap)
    return out[0].transpose(0, 1), torch.stack([kept.sum(), visible.expand_as(kept).sum()])


def select_rows(
    step: SparseStep, layer: Layer, query: Float[Tensor, "tokens Hq D"], keys: Pool, pooled: PooledPages | None = None
) -> tuple[Bool[Tensor, "1 Hq R nK"], Bool[Tensor, "1 h R nK"], Bool[Tensor, "1 h R nK"]]:
    """(kept, visible, whole) of the step's block rows one behind the other, as wide as the longest request."""
    chosen = [
        (batch, select_batch(query[batch.queries].transpose(1, 2), batch, layer, keys, pooled))
        for batch in step.batches
    ]
    return tuple(
        _behind([batch.row_by_row(getattr(each, name)) for batch, each in chosen], 2)
        for name in ("kept", "visible", "whole")
    )


def _behind(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts one behind the other, each padded to the widest with zeros."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts], dim)


def in_sequence(table: Int[Tensor, "R pages"], keys: Pool, values: Pool) -> tuple[Tensor, Pool, Pool]:
    """Pools whose tokens are one sequence, as they are; of others copies of the table's pages, and its places there."""
    try:
        folds_heads(keys), folds_heads(values)
    except ValueError:
        pages, places = table.unique(return_inverse=True)
        return places, keys.index_select(0, pages).contiguous(), values.index_select(0, pages).contiguous()
    return table, keys, values

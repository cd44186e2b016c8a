"""One step of a server in one layer: its sparse pieces selected, attended and counted, over pages of any layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rr_flex.block_mask import list_partial_and_full
from rr_flex.config import RRConfig
from rr_flex.pipeline import join, select
from rr_flex.request import in_head_slices, make_request
from rr_flex.result import Selection
from rr_flex.runtime.compiling import compile_whole
from rr_flex.serving.paged import attend_pages, folds_heads, side_by_side
from rr_flex.serving.pages import Pool, PooledPages, onto_pages, read_pages
from rr_flex.serving.step_rows import DenseBatch, Piece, dense_batch


@dataclass(frozen=True, kw_only=True)
class SparseStep:
    """What a step's layers have in common: where the queries and pages of its pieces are."""

    sparse: Sequence[Piece]  # its sparse pieces, at least one
    dense: DenseBatch | None  # the others
    tables: Sequence[Tensor]  # int64 [stop / P] of each sparse piece: its pages, on the device
    tokens: Tensor  # int64: places of the sparse queries in the step's batch, on the device

    @classmethod
    def of(cls, pieces: Sequence[Piece], block_table: Tensor, page: int) -> "SparseStep | None":
        """None where nothing is sparse. `block_table` [requests, pages]: the server's own, which is on its device."""
        sparse = [piece for piece in pieces if piece.sparse]
        if not sparse:
            return None
        tokens = torch.cat([torch.arange(piece.token, piece.token + len(piece)) for piece in sparse])
        return cls(
            sparse=sparse,
            dense=dense_batch(pieces),
            tables=[block_table[piece.request, : -(-piece.stop // page)].long() for piece in sparse],
            tokens=tokens.to(block_table.device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer asks for."""

    config: RRConfig  # its own, as `ServingSettings.of_layer` gives it
    scale: float
    softcap: float | None
    head_offset: int  # global index of its first query head


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
    gathered: a copy of each piece's pages. `pooled`: the layer's, with all that was written in them; None: the keys of
    each piece are pooled anew.
    """
    q = query[step.tokens].transpose(0, 1)[None].contiguous()  # 1 Hq n D
    chosen = [select_piece(part, piece, table, layer, keys, pooled) for part, piece, table in parts(step, q)]
    tables, keys, values = in_sequence(step.tables, keys, values)
    k_block = layer.config.block_sizes[1]
    blocks_per_page = keys.shape[2] // k_block
    folded = keys.shape[1] if folds_heads(keys) else None
    lists = [
        onto_pages(list_partial_and_full(each.kept, each.whole), table, blocks_per_page, folded)
        for each, table in zip(chosen, tables, strict=True)
    ]
    cap = None if layer.softcap is None else torch.full((), layer.softcap, device=q.device)
    out = attend_pages(q, (keys, values), side_by_side(lists), k_block=k_block, scale=layer.scale, softcap=cap)
    counts = [torch.stack([each.kept.sum(), each.visible.expand_as(each.kept).sum()]) for each in chosen]
    return out[0].transpose(0, 1), torch.stack(counts).sum(0)


def parts(step: SparseStep, q: Tensor):
    """(queries, piece, table) of each sparse piece, whose queries stand one behind the other in q."""
    sizes = [len(piece) for piece in step.sparse]
    return zip(q.split(sizes, dim=2), step.sparse, step.tables, strict=True)


def select_piece(
    q: Tensor, piece: Piece, table: Tensor, layer: Layer, keys: Pool, pooled: PooledPages | None = None
) -> Selection:
    """The Selection of one piece: rows on the absolute grid, so that of the request alone."""
    _, Hkv, _, D = keys.shape
    if pooled is not None and layer.config.pool == "keys":
        # Nothing reads more of the keys than their shape.
        k = q.new_zeros(()).expand(1, Hkv, piece.stop, D)
    else:
        k = read_pages(keys, table)[:, :, : piece.stop]
    options = {"q_offset": piece.start, "head_offset": layer.head_offset}
    options |= {"scale": layer.scale, "softcap": layer.softcap}
    request = make_request(q, k, layer.config, options)
    if pooled is not None:
        pooled_keys = pooled.read(table)[:, :, : piece.stop // pooled.stride]
        request = replace(request, pooled_keys=pooled_keys)
    # On the CPU single operations serve as well; elsewhere the kernels are worth their compilation.
    choose = select if q.device.type == "cpu" else _select_compiled
    chosen = [choose(*qk, own) for _, own, qk in in_head_slices(request, q, k)]
    return chosen[0] if len(chosen) == 1 else join(chosen, request.mask_mod)


def in_sequence(tables: Sequence[Tensor], keys: Pool, values: Pool) -> tuple[Sequence[Tensor], Pool, Pool]:
    """Pools whose tokens are one sequence, as they are; of others copies of the tables' pages, and tables of these."""
    try:
        folds_heads(keys), folds_heads(values)
    except ValueError:
        pages = torch.cat(list(tables))
        sizes = [len(table) for table in tables]
        places = torch.arange(len(pages), device=pages.device).split(sizes)
        return places, keys.index_select(0, pages).contiguous(), values.index_select(0, pages).contiguous()
    return tables, keys, values


_select_compiled = compile_whole(select)

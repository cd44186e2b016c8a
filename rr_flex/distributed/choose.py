"""A rank's queries and the pooled keys of all ranks to the blocks worth attending to: what one process would keep."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mask_mods import block_visibility
from mask_mods.spans import Index, MaskMod
from rr_flex.config import RRConfig
from rr_flex.distributed.layout import Layout
from rr_flex.geometry import ceil_div
from rr_flex.mandatory import mandatory_blocks
from rr_flex.mass import block_mass
from rr_flex.mass_by_attention import block_mass_by_attention, kernel_can_estimate
from rr_flex.pipeline import key_head_mask, queries_that_see, row_share
from rr_flex.runtime.compiling import compile_whole
from rr_flex.sampling import moments, pooled_query_features, sample_queries, second_order_features
from rr_flex.selection import select_threshold, select_top_tau


class Logits(NamedTuple):
    """What turns dot products into logits."""

    scale: float
    softcap: Tensor | float | None = None


class QueryPiece(NamedTuple):
    """A run of a rank's queries, whole block rows."""

    length: int
    start: Int[Tensor, ""]  # position of its first query
    mandatory: RRConfig  # which of its blocks are kept whatever the estimate says


class Rows(NamedTuple):
    """The queries of one rank and strip of heads: pieces one after the other, each of whole block rows."""

    q: Float[Tensor, "B Hq n D"]
    mask_mod: MaskMod  # of query indices into q
    pieces: tuple[QueryPiece, ...]
    config: RRConfig
    level: Float[Tensor, " Hq"]
    head_offset: Index
    valid_keys: Bool[Tensor, "b h Lk"] | None  # False: no query may see it


class Keys(NamedTuple):
    """All keys, pooled to a mean and a variance a stride or as they are."""

    pooled: Float[Tensor, "B Hkv nk E"] | None  # mean, or with order 2 mean and variance side by side
    whole: Float[Tensor, "B Hkv Lk D"] | None
    count: int  # Lk


class Chosen(NamedTuple):
    kept: Bool[Tensor, "B Hq nQ nK"]
    visible: Bool[Tensor, "b h nQ nK"]
    whole: Bool[Tensor, "b h nQ nK"]


def needs_every_key(config: RRConfig) -> bool:
    """Whether the estimate scores single keys: pool="queries" and "both" do."""
    return config.pool != "keys"


def pool(k: Float[Tensor, "B Hkv n D"], config: RRConfig, valid: Bool[Tensor, "b h n"] | None) -> Tensor:
    """What selection needs of a run of keys: their mean a stride, with order 2 their variance beside it; k's dtype."""
    mean, variance = moments(k, config.strides[1], valid)
    mean = mean.to(k.dtype)
    if config.order == 1:
        return mean
    return torch.cat([mean, variance.clamp(max=torch.finfo(k.dtype).max).to(k.dtype)], -1)


def choose(rows: Rows, keys: Keys, logits: Logits, dense: bool) -> Chosen:
    """`rr_flex.select_blocks` for some of a sequence's block rows; `dense` keeps every visible block."""
    config = rows.config
    B, Hq, n, _ = rows.q.shape
    sizes = {"B": B, "H": Hq, "Lq": n, "Lk": keys.count, "block_size": config.block_sizes}
    visible, whole = block_visibility(rows.mask_mod, **sizes, device=rows.q.device)
    if dense:
        return Chosen(visible.expand(B, Hq, -1, -1), visible, whole)
    mass = estimate(rows, keys, logits)
    mandatory = _mandatory(rows, visible)
    if config.budget == "threshold":
        kept = select_threshold(mass, rows.level[:, None], visible, mandatory)
    else:
        count = config.mandatory == "count"
        kept = select_top_tau(mass, rows.level[:, None], visible, mandatory, count_mandatory=count)
    return Chosen(kept, visible, whole)


def estimate(rows: Rows, keys: Keys, logits: Logits) -> Float[Tensor, "B Hq nQ nK"]:
    """`rr_flex.pipeline.estimate_mass` from keys that may have been pooled elsewhere."""
    q, scale, config = rows.q, logits.scale, rows.config
    facts = {"mask_mod": rows.mask_mod, "Lq": q.shape[2], "Lk": keys.count, "scale": scale}
    facts |= {"block_size": config.block_sizes, "softcap": logits.softcap}
    estimates = []
    if config.pool != "queries":
        queries, pooled = sample_queries(q, config.strides[0], rows.head_offset, config.phase), keys.pooled
        if config.order == 2:
            mean, variance = pooled.chunk(2, -1)
            features = queries, mean, variance.float(), scale, config.variance_weight
            queries, pooled = second_order_features(*features)
        sampling = {"strides": config.strides, "head_offset": rows.head_offset, "phase": config.phase}
        mass = block_mass_by_attention if kernel_can_estimate(queries) else block_mass
        valid = rows.valid_keys
        valid = valid if valid is None else key_head_mask(valid, q.shape[1], pooled.shape[1])
        estimates.append(mass(queries, pooled, valid_keys=valid, **sampling, **facts))
    if config.pool != "keys":
        order = config.order if config.pool == "queries" else 1
        valid = queries_that_see(rows.mask_mod, q.shape[0], q.shape[1], q.shape[2], keys.count, q.device)
        settings = config.tokens_per_pooled_query, order, scale, valid, config.variance_weight
        queries, single = pooled_query_features(q, keys.whole, *settings)
        mass = block_mass_by_attention if kernel_can_estimate(queries) else block_mass
        strides = (config.tokens_per_pooled_query, 1)
        estimates.append(mass(queries, single, strides=strides, phase="pooled", **facts))
    return estimates[0] if len(estimates) == 1 else (row_share(estimates[0]) + row_share(estimates[1])) / 2


def _mandatory(rows: Rows, visible: Bool[Tensor, "b h nQ nK"]) -> Bool[Tensor, "b h nQ nK"]:
    parts, row = [], 0
    for piece in rows.pieces:
        count = ceil_div(piece.length, piece.mandatory.block_sizes[0])
        own = visible[:, :, row : row + count]
        where = {"Lq": piece.length, "q_offset": piece.start, "valid_keys": rows.valid_keys}
        parts.append(mandatory_blocks(own, piece.mandatory, **where))
        row += count
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def query_pieces(layout: Layout, rank: int, config: RRConfig, device: torch.device) -> tuple[QueryPiece, ...]:
    """The rank's pieces of queries; the dense last rows are those of the whole sequence, wherever they lie."""
    q_block = config.block_sizes[0]
    rows = ceil_div(layout.tokens, q_block)
    pieces = []
    for _, start, stop in layout.queries_of(rank):
        first_dense = max(0, rows - config.dense_last_rows - start // q_block)
        dense = max(0, ceil_div(stop - start, q_block) - first_dense)
        # Without the budget's level: other levels are the same graph.
        names = {name: getattr(config, name) for name in ("block_size", "sink_blocks", "local_blocks")}
        offset = torch.full((), start, dtype=torch.int64, device=device)
        strides = dict(zip(("query_stride", "key_stride"), config.strides, strict=True))
        pieces.append(QueryPiece(stop - start, offset, RRConfig(**names, **strides, dense_last_rows=dense)))
    return tuple(pieces)


def wanted_blocks(kept: Bool[Tensor, "B Hq nQ nK"], Hkv: int) -> Bool[Tensor, "B Hkv nK"]:
    """The key blocks that some row of a key head's query heads keeps."""
    return kept.any(2).unflatten(1, (Hkv, -1)).any(2)


def cut_at_the_end(chosen: Chosen, Lk: int, k_block: int) -> Chosen:
    """With a short last block listed as one that the mask cuts, since keys come padded to whole blocks."""
    if Lk % k_block == 0:
        return chosen
    whole = F.pad(chosen.whole[..., :-1], (0, 1), value=False)
    return chosen._replace(whole=whole)


_choose_compiled = compile_whole(choose)
_pool_compiled = compile_whole(pool)


def choose_on(device: torch.device):
    """`choose`, compiled where that pays: single operations serve on the CPU."""
    return choose if device.type == "cpu" else _choose_compiled


def pool_on(device: torch.device):
    return pool if device.type == "cpu" else _pool_compiled

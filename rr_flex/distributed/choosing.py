"""A rank's queries and what it has of all ranks' keys to the blocks worth attending to: what one process would keep."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mask_mods import any_key_visible, block_visibility, hides_keys
from mask_mods.spans import MaskMod
from rr_flex.config import RRConfig
from rr_flex.distributed.layout import Layout
from rr_flex.estimate import estimate_mass, valid_keys_of
from rr_flex.geometry import ceil_div
from rr_flex.mandatory import mandatory_blocks
from rr_flex.registry import BUDGETS
from rr_flex.request import Request
from rr_flex.runtime.compiling import compile_whole
from rr_flex.sampling import pooled_features


class QueryPiece(NamedTuple):
    """A run of a rank's queries, whole block rows."""

    length: int
    start: Int[Tensor, ""]  # position of its first query


class Rows(NamedTuple):
    """Which block rows of the sequence a rank's queries are: pieces one after the other."""

    pieces: tuple[QueryPiece, ...]
    index: Int[Tensor, " nQ"]  # of each of its block rows among the sequence's
    last: Int[Tensor, "b h"]  # one past the last block row in which a query sees anything


class Chosen(NamedTuple):
    """Blocks of a rank's queries, rows as they lie there, over all keys padded to whole blocks."""

    kept: Bool[Tensor, "B Hq nQ nK"]
    visible: Bool[Tensor, "b h nQ nK"]
    whole: Bool[Tensor, "b h nQ nK"]
    block_size: tuple[int, int]
    seq_lengths: tuple[int, int]
    mask_mod: MaskMod  # of query indices here and key positions


def needs_every_key(config: RRConfig) -> bool:
    """Whether the estimate scores single keys: of the rules, only pool="keys" does without."""
    return config.pool != "keys"


def pool(k: Float[Tensor, "B Hkv n D"], config: RRConfig, valid: Bool[Tensor, "b h n"] | None) -> Tensor:
    """What selection needs of a run of keys: their mean a stride, with order 2 their variance beside it; k's dtype."""
    return pooled_features(k, config.strides[1], config.order, valid)


class Ground(NamedTuple):
    """What mask and settings say of a rank's block rows, whatever its queries and keys are."""

    visible: Bool[Tensor, "b h nQ nK"]
    whole: Bool[Tensor, "b h nQ nK"]
    mandatory: Bool[Tensor, "b h nQ nK"]
    mask_mod: MaskMod

    @property
    def for_all_heads(self) -> bool:
        """Whether it is the same for every head."""
        return self.visible.shape[1] == self.mandatory.shape[1] == 1


def ground_of(q: Float[Tensor, "B Hq n D"], k: Float[Tensor, "B Hkv Lk D"], request: Request, rows: Rows) -> Ground:
    """In single operations on every device: inductor (2.11) fails on pieces of indices that are nothing but an arange.

    k is asked for its shape only.
    """
    (B, Hq, n, _), Lk, config = q.shape, k.shape[2], request.config
    facts = {"B": B, "H": Hq, "Lq": n, "Lk": Lk, "block_size": config.block_sizes, "device": q.device}
    visible, whole = block_visibility(request.mask_mod, **facts)
    if Lk % config.block_sizes[1]:
        # The kernel's keys are whole blocks: what lies behind the last one is the mask's to hide.
        whole = F.pad(whole[..., :-1], (0, 1), value=False)
    mandatory = _mandatory(visible, valid_keys_of(request, q, k), config, rows)
    return Ground(visible, whole, mandatory, request.mask_mod)


def choose(q: Float[Tensor, "B Hq n D"], k: Float[Tensor, "B Hkv Lk D"], request: Request, ground: Ground) -> Chosen:
    """`rr_flex.select_blocks` for some of a sequence's block rows.

    Where the request has pooled keys, k is asked for its shape only.
    """
    (B, Hq, n, _), k_block = q.shape, request.config.block_sizes[1]
    lengths = n, ceil_div(k.shape[2], k_block) * k_block
    about = ground.visible, ground.whole, request.config.block_sizes, lengths, ground.mask_mod
    if request.dense:
        return Chosen(ground.visible.expand(B, Hq, -1, -1), *about)
    # Single operations serve on the CPU; elsewhere the kernels are worth their compilation.
    compiled = q.device.type != "cpu"
    mass = (_estimate_compiled if compiled else estimate_mass)(q, k, request)
    return Chosen((_spend_compiled if compiled else _spend)(mass, ground.visible, ground.mandatory, request), *about)


def _spend(mass: Tensor, visible: Tensor, mandatory: Tensor, request: Request) -> Bool[Tensor, "B Hq nQ nK"]:
    config = request.config
    return BUDGETS[config.budget].select(mass, request.level[:, None], visible, mandatory, config)


def _mandatory(visible: Tensor, valid_keys: Tensor | None, config: RRConfig, rows: Rows) -> Bool[Tensor, "b h nQ nK"]:
    """Sink and diagonal of each piece by itself; the dense last rows are those of the whole sequence."""
    q_block = config.block_sizes[0]
    beside = _Beside(config.block_sizes, config.sink_blocks, config.local_blocks)
    parts, row = [], 0
    for length, start in rows.pieces:
        count = ceil_div(length, q_block)
        where = {"Lq": length, "q_offset": start, "valid_keys": valid_keys}
        parts.append(mandatory_blocks(visible[:, :, row : row + count], beside, **where))
        row += count
    dense = rows.index >= rows.last[..., None] - config.dense_last_rows
    return torch.cat(parts, 2) | (visible & dense[..., None])


class _Beside(NamedTuple):
    """What `mandatory_blocks` reads of a config, without last rows."""

    block_sizes: tuple[int, int]
    sink_blocks: int
    local_blocks: int
    dense_last_rows: int = 0


def rows_of(layout: Layout, rank: int, q_block: int, last: Int[Tensor, "b h"]) -> Rows:
    """The rank's rows, `last` as in Rows."""
    pieces = layout.queries_of(rank)
    index = [torch.arange(p.start // q_block, ceil_div(p.stop, q_block), device=last.device) for p in pieces]
    starts = [torch.full((), p.start, dtype=torch.int64, device=last.device) for p in pieces]
    lengths = [p.stop - p.start for p in pieces]
    return Rows(tuple(map(QueryPiece, lengths, starts)), torch.cat(index), last)


def last_row(mask_mod: MaskMod, sizes: tuple[int, int, int], q_block: int, device: torch.device) -> Int[Tensor, "b h"]:
    """One past the last block row in which a query sees anything, of a mask by positions over `sizes` (B, Hq, Lk).

    Only masks that hide keys from all have rows that see nothing at the end: padding.
    """
    B, Hq, Lk = sizes
    rows = ceil_div(Lk, q_block)
    if not hides_keys(mask_mod):
        return torch.full((1, 1), rows, dtype=torch.int64, device=device)
    b, h = torch.arange(B, device=device)[:, None, None], torch.arange(Hq, device=device)[:, None]
    first_key = torch.zeros((), dtype=torch.int64, device=device)
    sees = any_key_visible(mask_mod, b, h, torch.arange(Lk, device=device), first_key, Lk, Lk)
    sees = sees.expand(torch.broadcast_shapes(sees.shape, (1, 1, Lk)))
    last = (sees * torch.arange(1, Lk + 1, device=device)).amax(-1)
    return (last + q_block - 1) // q_block


def shape_of_keys(q: Tensor, Hkv: int, Lk: int) -> Float[Tensor, "B Hkv Lk D"]:
    """A tensor of that shape that takes no memory, for where pooled keys stand for the keys."""
    return q.new_zeros(1).expand(q.shape[0], Hkv, Lk, q.shape[3])


def wanted_blocks(kept: Bool[Tensor, "B Hq nQ nK"], Hkv: int) -> Bool[Tensor, "B Hkv nK"]:
    """The key blocks that some row of a key head's query heads keeps."""
    return kept.any(2).unflatten(1, (Hkv, -1)).any(2)


def for_strip(request: Request, heads: slice, mask_mod: MaskMod) -> Request:
    """The request of a strip of heads, whose mask is `mask_mod`."""
    head_offset = request.head_offset + heads.start
    return replace(request, own_mask=mask_mod, level=request.level[heads], head_offset=head_offset)


_estimate_compiled = compile_whole(estimate_mass)
_spend_compiled = compile_whole(_spend)
_pool_compiled = compile_whole(pool)


def pool_on(device: torch.device):
    return pool if device.type == "cpu" else _pool_compiled

"""Context parallel: queries stay where they are, and the keys and values that they need come to them.

Only pooled keys go to every rank; from them each chooses its own queries' blocks. Then all keys and values come, or the
blocks that some query here kept, one strip of key heads after the other: the next strip's transfer runs beside this
one's attention. A rule that scores single keys (pool="queries", "both") needs all keys to
choose: they are gathered in whole, and only the values are fetched by block. (The other way,
pooled queries to the keys' owners and block masses back, moves Hq · L² / 4,096 bytes against the keys' 2 · Hkv · L · D:
more from 262,144 tokens on with 32/8 heads of 128.)
"""

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mask_mods import hides_keys, last_queries, visible_keys
from rr_flex.checks import as_autocast_says
from rr_flex.config import RRConfig
from rr_flex.distributed.asked import check_asked
from rr_flex.distributed.attend import Blocks, attend
from rr_flex.distributed.far_rows import attend_far_rows
from rr_flex.distributed.fetch import Deliveries
from rr_flex.distributed.local import Chunk, Local, prepare, shape_of_keys
from rr_flex.distributed.shards import Shards
from rr_flex.distributed.transfer import gather_tokens
from rr_flex.geometry import ceil_div
from rr_flex.pipeline import join, select_in_slices
from rr_flex.request import Request, in_head_slices
from rr_flex.result import Selection
from rr_flex.state import pool_into


@as_autocast_says
def context_parallel(
    q: Float[Tensor, "B Hq n D"],
    k: Float[Tensor, "B Hkv m D"],
    v: Float[Tensor, "B Hkv m Dv"],
    shards: Shards,
    **options: Any,
) -> Float[Tensor, "B Hq n Dv"]:
    """`rr_attention` of this rank's queries over the keys of all ranks of "sequence", tokens in the layout's order.

    `fetch`: "all" (default) moves all keys and values, "kept" the key blocks that some query of the rank keeps: never
    more, but ranks have to tell each other which, and the host waits for that. For slow links. Further options: config
    or its fields, mask_mod, causal, scale, softcap, backend, account. Raises on every rank what one process would
    raise, and for sinks and the density budget.
    """
    local = prepare(q, k, v, shards, check_asked(q, k, v, shards, options, {"fetch", "backend"}))
    chosen, all_keys = choose_blocks(local)
    deliveries = Deliveries(local, [kept for kept, _ in chosen], all_keys)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    coming = deliveries.start(0)
    if local.first_far < local.count:
        attend_far_rows(local, out)
    for number, (heads, _) in enumerate(local.strips):
        arriving = coming
        # Before this strip's attention is queued: the transfer would wait for it.
        coming = deliveries.start(number + 1) if number + 1 < len(local.strips) else None
        kv = arriving()
        for chunk, one in zip(local.chunks, chosen, strict=True):
            out[:, heads, chunk.rows] = attend_strip(local, heads, kv, chunk, one)
    return out


def attend_strip(local: Local, heads: slice, kv: tuple[Tensor, Tensor], chunk: Chunk, chosen: Blocks) -> Tensor:
    """The outputs of a chunk's strip of heads, over keys and values by position."""
    request = local.of_chunk(chunk).of_heads(heads)
    keys, values = (x[:, :, : chunk.keys] for x in kv)
    kept, whole = chosen
    blocks = kept[:, heads], whole if whole.shape[1] == 1 else whole[:, heads]
    return attend(local.kernel, (local.q[:, heads, chunk.rows], keys, values), blocks, request).out


def choose_blocks(local: Local) -> tuple[list[Blocks], Tensor | None]:
    """Each chunk's kept blocks, and which the mask leaves whole; and the keys of all ranks if choosing took them."""
    request, all_keys, pooled = local.request, None, None
    keys = shape_of_keys(local.q, local.k.shape[1], local.count)
    if not request.dense and needs_every_key(local.config):
        flight = gather_tokens(local.k, local.shards)
        local.asked.account.fetched += flight.received
        keys = all_keys = flight.wait()
    elif not request.dense:
        pooled = _pooled_keys(local)
    chosen = []
    for chunk in local.chunks:
        own = local.of_chunk(chunk)
        if pooled is not None:
            own = replace(own, pooled_keys=pooled[:, :, : ceil_div(chunk.keys, local.config.strides[1])])
        found = _select(local.q[:, :, chunk.rows], keys[:, :, : chunk.keys], own)
        kept = found.kept
        if not request.dense and local.first_far == local.count:
            kept = kept | (found.visible & _last_rows(local, chunk))
        local.asked.account.add_blocks(kept, found.visible)
        chosen.append((kept, found.whole))
    return chosen, all_keys


def _select(q: Tensor, keys: Tensor, request: Request) -> Selection:
    """Without the mass: four bytes a block, for which there is room for a slice of heads only."""
    found = (select_in_slices(*qk, own) for _, own, qk in in_head_slices(request, q, keys))
    return join([replace(part, mass=part.mass[..., :0].clone()) for part in found], request.mask_mod)


def needs_every_key(config: RRConfig) -> bool:
    """Whether the estimate scores single keys: of the rules, only pool="keys" does without."""
    return config.pool != "keys"


def _last_rows(local: Local, chunk: Chunk) -> Bool[Tensor, "b h nQ 1"]:
    """Which of a chunk's block rows are the sequence's dense last ones, where these stay with their rank."""
    q_block, (B, Hq), device = local.config.block_sizes[0], local.q.shape[:2], local.q.device
    last = last_queries(local.request.mask_mod, B, Hq, local.count, local.count, device) // q_block
    row = torch.arange(*(ceil_div(x, q_block) for x in (chunk.start, chunk.stop)), device=device)
    return (row > last[..., None] - local.config.dense_last_rows)[..., None]


def _pooled_keys(local: Local) -> Tensor:
    """Of all ranks, in the order of their positions."""
    k, shards, config = local.k, local.shards, local.config
    Hq, Hkv, mask = local.q.shape[1], k.shape[1], local.request.own_mask
    valid = None
    if hides_keys(mask):
        valid = visible_keys(mask, k.shape[0], Hq, local.count, k.device)
        valid = valid if valid.shape[1] == 1 else valid.unflatten(1, (Hkv, -1)).any(2)
        valid = shards.layout.take(valid, shards.place, -1)
    (B, _, m, D), stride, order = k.shape, config.strides[1], config.order
    pooled = k.new_empty(B, Hkv, ceil_div(m, stride), order * D)
    pool_into(rearrange(pooled, "b h n e -> n b h e"), k, stride, order, valid)
    flight = gather_tokens(pooled, shards, stride=stride)
    local.asked.account.selecting += flight.received
    return flight.wait()

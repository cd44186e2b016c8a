"""Context parallel: queries stay where they are, and the keys and values that they need come to them.

Only pooled keys go to every rank; from them each chooses its own queries' blocks. Then it fetches the key blocks that
some query here kept or, where that is not less, all of them, one strip of key heads after the other: the next strip's
transfer runs beside this one's attention. A rule that scores single keys (pool="queries", "both") needs all keys to
choose: they are gathered in whole, and only the values are fetched by block. (The other way,
pooled queries to the keys' owners and block masses back, moves Hq · L² / 4,096 bytes against the keys' 2 · Hkv · L · D:
more from 262,144 tokens on with 32/8 heads of 128.)
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import hides_keys, visible_keys
from rr_flex.distributed.asked import Asked, check_asked
from rr_flex.distributed.attend import attend, attend_with_flash, kernel_for
from rr_flex.distributed.choosing import (
    Chosen,
    choose,
    for_strip,
    ground_of,
    needs_every_key,
    pool_on,
    shape_of_keys,
)
from rr_flex.distributed.far_rows import attend_far_rows, first_far_query, last_rows_here, without_far_rows
from rr_flex.distributed.fetch import Deliveries
from rr_flex.distributed.local import Local
from rr_flex.distributed.shards import HEADS, Shards
from rr_flex.distributed.transfer import gather_tokens
from rr_flex.kernels.break_even import Work
from rr_flex.kernels.deciding import decide_call
from rr_flex.request import make_request
from rr_flex.runtime.head_slices import head_slices

STRIPS = 4  # of key heads at least, where there are so many: all but the first travel while another attends


def context_parallel(
    q: Float[Tensor, "B Hq n D"],
    k: Float[Tensor, "B Hkv m D"],
    v: Float[Tensor, "B Hkv m Dv"],
    shards: Shards,
    **options: Any,
) -> Float[Tensor, "B Hq n Dv"]:
    """`rr_attention` of this rank's queries over the keys of all ranks of "sequence", tokens in the layout's order.

    `fetch`: "kept" moves the key blocks that some query of the rank keeps, "all" moves all of them, "auto" (default)
    what is less for the rank that moves most, strip by strip. Further options: config or its fields, mask_mod, causal,
    scale, softcap, backend, account. Raises on every rank what one process would raise, and for sinks and the density
    budget.
    """
    local = prepare(q, k, v, shards, check_asked(q, k, v, shards, options, {"fetch", "backend"}))
    chosen, all_keys = choose_blocks(local)
    first_far = first_far_query(local)
    if first_far < local.count:
        chosen = [without_far_rows(one, local, first_far) for one in chosen]
    local.asked.account.attended += [one.kept.sum() for one in chosen]
    deliveries = Deliveries(local, chosen, all_keys)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    coming = deliveries.start(0)
    far = attend_far_rows(local, first_far) if first_far < local.count else out[:, :, :0]
    for place, (heads, _) in enumerate(local.strips):
        arriving = coming
        # Before this strip's attention is queued: the transfer would wait for it.
        coming = deliveries.start(place + 1) if place + 1 < len(local.strips) else None
        keys, values = arriving()
        out[:, heads] = attend_strip(local, heads, (keys, values), chosen[place])
    out[:, :, out.shape[2] - far.shape[2] :] = far
    return out


def attend_strip(local: Local, heads: slice, kv: tuple[Tensor, Tensor], chosen: Chosen) -> Tensor:
    """The output of a strip of heads over keys and values by position."""
    request = replace(for_strip(local.request, heads, chosen.mask_mod), rows_apart=last_rows_here(local))
    if local.kernel != "flash":
        return attend(local.q[:, heads], *kv, chosen, request).out
    last_key = local.shards.layout.positions(local.shards.place, local.q.device)
    if not local.asked.causal:
        last_key = torch.full_like(last_key, local.count - 1)
    return attend_with_flash((local.q[:, heads], *kv), last_key, chosen, request).out


def prepare(q: Tensor, k: Tensor, v: Tensor, shards: Shards, asked: Asked) -> Local:
    (B, Hq, _, _), Hkv, count = q.shape, k.shape[1], shards.layout.tokens
    config = asked.config_of(shards, Hq)
    # Queries have positions of their own in the mask, which is causal if it was asked for.
    options = {"causal": False, "scale": asked.scale, "softcap": asked.softcap, "q_offset": 0}
    options["head_offset"] = shards.rank(HEADS) * Hq
    request = make_request(q, shape_of_keys(q, Hkv, count), config, options)
    kernel = kernel_for(q, v, request, asked.backend, plain_mask=asked.mask_mod is None)
    ranks, layout = shards.ranks(HEADS), shards.layout
    first = layout.first_query if asked.causal else None
    # As one process would, so the same on every rank.
    work = Work(
        batch=B, heads=ranks * Hq, kv_heads=ranks * Hkv, queries=layout.queries, keys=count, first_position=first
    )
    fused = asked.mask_mod is None and request.plain_softmax
    if not decide_call(kernel, q, work, asked.config, fused=fused).sparse:
        request = replace(request, estimate="none")
    # The same on every rank, though their shards differ: whole groups, at least as many strips as memory asks for.
    most = max(shards.layout.queries_on(rank) for rank in range(shards.layout.ranks))
    by_memory = head_slices((B, Hq, Hkv), (most, count), config, torch.device("cpu"))
    least, group = max(STRIPS, len(by_memory)), Hq // Hkv
    width = max(n for n in range(1, Hkv + 1) if Hkv % n == 0 and (Hkv // n >= least or n == 1))
    strips = [(slice(h * group, (h + width) * group), slice(h, h + width)) for h in range(0, Hkv, width)]
    return Local(q, k, v, shards, asked, request, strips, kernel)


def choose_blocks(local: Local) -> tuple[list[Chosen], list[Tensor] | None]:
    """The blocks of each strip, and each strip's keys of all ranks if choosing took them, in whole key blocks."""
    q, config = local.q, local.config
    every = needs_every_key(config) and not local.request.dense
    pooled = None if every or local.request.dense else _pooled_keys(local)
    gathering = _gather_keys(local) if every else None
    chosen, all_keys, ground = [], [], None
    for place, (heads, key_heads) in enumerate(local.strips):
        keys = shape_of_keys(q, key_heads.stop - key_heads.start, local.count)
        if ground is None or not ground.for_all_heads:
            ground = ground_of(q[:, heads], keys, local.of_strip(heads), local.rows(heads))
        request = for_strip(local.request, heads, ground.mask_mod)
        if every:
            all_keys.append(gathering[place].wait())
            keys = all_keys[place][:, :, : local.count]
        elif pooled is not None:
            request = replace(request, pooled_keys=pooled[:, key_heads])
        chosen.append(choose(q[:, heads], keys, request, ground))
        local.asked.account.add_blocks(chosen[place].kept, chosen[place].visible)
    return chosen, all_keys or None


def _pooled_keys(local: Local) -> Tensor:
    """Of all ranks, in the order of their positions."""
    k, shards, config = local.k, local.shards, local.config
    Hq, Hkv = local.q.shape[1], k.shape[1]
    valid, mask = None, local.position_mask(slice(0, Hq))
    if hides_keys(mask):
        valid = visible_keys(mask, k.shape[0], Hq, local.count, k.device)
        valid = valid if valid.shape[1] == 1 else valid.unflatten(1, (Hkv, -1)).any(2)
        valid = shards.layout.take(valid, shards.place, -1)
    flight = gather_tokens(pool_on(k.device)(k, config, valid), shards, stride=config.strides[1])
    local.asked.account.selecting += flight.received
    return flight.wait()


def _gather_keys(local: Local) -> list:
    """Each strip's keys under way."""
    size = local.config.block_sizes[1]
    flights = [gather_tokens(local.k[:, keys], local.shards, pad_to=size) for _, keys in local.strips]
    local.asked.account.fetched += sum(flight.received for flight in flights)
    return flights

"""Heads on ranks: each prefills its own heads over the whole sequence, and no rank needs another's.

Ulysses is the same for a sharded sequence: before it every rank gives its tokens of the other ranks' heads away, and
after it the outputs come back.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import from_head
from rr_flex.attention import rr_attention
from rr_flex.config import RRConfig
from rr_flex.distributed.asked import Asked, check_asked, of_heads
from rr_flex.distributed.layout import Layout
from rr_flex.distributed.positions import from_query
from rr_flex.distributed.shards import HEADS, SEQUENCE, Shards
from rr_flex.distributed.transfer import exchange, in_order

TAKES = {"sinks", "backend"}


def head_parallel(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    v: Float[Tensor, "B Hkv Lk Dv"],
    shards: Shards,
    **options: Any,
) -> Float[Tensor, "B Hq Lq Dv"]:
    """`rr_attention` of this rank's heads, `shards.heads(q)` and of k and v likewise: what one process gives for them.

    Whole groups of query heads; where key heads are fewer than ranks, those that share one have it each. Lq < Lk: the
    queries are the last ones. Options are `rr_attention`'s but offsets and further results; a mask is asked for heads
    and positions of the whole.
    """
    asked = check_asked(q, k, v, shards, options, TAKES)
    if shards.ranks(SEQUENCE) > 1:
        raise ValueError(f"mesh must have {HEADS!r} alone for head_parallel, got {shards.mesh}")
    return _attend(q, k, v, asked, asked.config_of(shards, q.shape[1]), shards.rank(HEADS) * q.shape[1])


def ulysses(
    q: Float[Tensor, "B Hq n D"],
    k: Float[Tensor, "B Hkv m D"],
    v: Float[Tensor, "B Hkv m Dv"],
    shards: Shards,
    **options: Any,
) -> Float[Tensor, "B Hq n Dv"]:
    """`rr_attention` of this rank's tokens: all-to-all to heads of the whole sequence, and back.

    Hq must be a multiple of the ranks of "sequence", and a rank's heads whole groups or within one. Options as of
    `head_parallel`, sinks those of the heads that this rank has before and after.
    """
    asked = check_asked(q, k, v, shards, options, TAKES)
    layout, ranks, me = shards.layout, shards.ranks(SEQUENCE), shards.place
    parts = split_heads(q.shape[1], k.shape[1], ranks)
    mine = parts[me][0]
    sizes = [layout.queries_on(rank) for rank in range(ranks)], [layout.keys_on(rank) for rank in range(ranks)]
    chunk = Layout(
        tuple(
            p._replace(start=p.start - layout.first_query, stop=p.stop - layout.first_query)
            for p in layout.pieces
            if p.start >= layout.first_query
        ),
        ranks,
    )
    account = asked.account
    whole = []
    for x, of, counts, order in ((q, 0, sizes[0], chunk), (k, 1, sizes[1], layout), (v, 1, sizes[1], layout)):
        heads = parts[me][of].stop - parts[me][of].start
        shapes = [(x.shape[0], heads, count, x.shape[3]) for count in counts]
        received, moved = exchange([x[:, part[of]] for part in parts], shapes, shards)
        whole.append(in_order(received, order))
        account.fetched += moved
    account.all_gather += (
        (ranks - 1) * layout.most_keys * k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
    )

    config = of_heads(asked.config_of(shards, q.shape[1]), mine)
    asked = replace(asked, sinks=None if asked.sinks is None else asked.sinks[mine])
    first_head = shards.rank(HEADS) * q.shape[1] + mine.start
    out = _attend(*whole, asked, config, first_head)
    back = [chunk.take(out, rank) for rank in range(ranks)]
    shapes = [(q.shape[0], part[0].stop - part[0].start, q.shape[2], v.shape[3]) for part in parts]
    received, moved = exchange(back, shapes, shards)
    account.fetched += moved
    return torch.cat(received, 1)


def split_heads(Hq: int, Hkv: int, ranks: int) -> list[tuple[slice, slice]]:
    """Each rank's query heads and the key heads that they need; ValueError where they don't fit the mesh."""
    group, size = Hq // Hkv, Hq // ranks
    if Hq % ranks or (size % group and group % size):
        raise ValueError(
            f"query heads ({Hq}, {group} a key head) must fit {ranks} sequence ranks, got no whole part each"
        )
    return [
        (slice(first, first + size), slice(first // group, -(-(first + size) // group))) for first in range(0, Hq, size)
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, asked: Asked, config: RRConfig, first_head: int) -> Tensor:
    """Queries at the end of the keys, heads from `first_head` on."""
    Lq, Lk = q.shape[2], k.shape[2]
    own = {"scale": asked.scale, "softcap": asked.softcap, "sinks": asked.sinks, "backend": asked.backend}
    own |= {"q_offset": None if Lq == Lk else Lk - Lq, "head_offset": first_head, "config": config}
    if asked.mask_mod is not None:
        first_query, head = (torch.full((), x, dtype=torch.int64, device=q.device) for x in (Lk - Lq, first_head))
        own["mask_mod"] = from_head(from_query(asked.mask_mod, first_query), head)
    return rr_attention(q, k, v, causal=asked.causal, **own)

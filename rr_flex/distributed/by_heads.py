"""Heads on ranks: each prefills its own heads over the whole sequence, and no rank needs another's.

Ulysses is the same for a sharded sequence: before it every rank gives its tokens of the other ranks' heads away, and
after it the outputs come back.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import from_head
from rr_flex import attention
from rr_flex.checks import as_autocast_says
from rr_flex.config import RRConfig
from rr_flex.distributed.asked import Asked, check_asked, of_heads
from rr_flex.distributed.layout import Layout
from rr_flex.distributed.positions import from_query
from rr_flex.distributed.shards import HEADS, SEQUENCE, Shards
from rr_flex.distributed.transfer import exchange, in_order
from rr_flex.geometry import as_tensors

TAKES = {"sinks", "backend"}


@as_autocast_says
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
    config = asked.config_of(shards, q.shape[1])
    return _attend((q, k, v), asked, config, shards, shards.rank(HEADS) * q.shape[1])


@as_autocast_says
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
    layout, ranks, account = shards.layout, shards.ranks(SEQUENCE), asked.account
    query_heads, key_heads = split_heads(q.shape[1], k.shape[1], ranks)
    whole = []
    for x, heads, order in ((q, query_heads, layout.of_queries), (k, key_heads, layout), (v, key_heads, layout)):
        own, moved = to_heads(x, heads, order, shards)
        whole.append(own)
        account.fetched += moved
    of_token = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
    account.all_gather += (ranks - 1) * layout.most_keys * of_token

    mine = query_heads[shards.place]
    config = of_heads(asked.config_of(shards, q.shape[1]), mine)
    asked = replace(asked, sinks=None if asked.sinks is None else asked.sinks[mine])
    out = _attend(whole, asked, config, shards, shards.rank(HEADS) * q.shape[1] + mine.start)
    out, moved = to_tokens(out, query_heads, layout.of_queries, shards)
    account.fetched += moved
    return out


def to_heads(
    x: Float[Tensor, "B H n D"], heads: list[slice], layout: Layout, shards: Shards
) -> tuple[Float[Tensor, "B h L D"], int]:
    """This rank's tokens of all heads to all tokens of its `heads`, and the bytes that came from other ranks."""
    own = heads[shards.place]
    shapes = [(x.shape[0], own.stop - own.start, layout.keys_on(rank), x.shape[3]) for rank in range(layout.ranks)]
    received, moved = exchange([x[:, part] for part in heads], shapes, shards)
    return in_order(received, layout), moved


def to_tokens(
    x: Float[Tensor, "B h L D"], heads: list[slice], layout: Layout, shards: Shards
) -> tuple[Float[Tensor, "B H n D"], int]:
    """The way back."""
    n = layout.keys_on(shards.place)
    shapes = [(x.shape[0], part.stop - part.start, n, x.shape[3]) for part in heads]
    received, moved = exchange([layout.take(x, rank) for rank in range(layout.ranks)], shapes, shards)
    return torch.cat(received, 1), moved


def split_heads(Hq: int, Hkv: int, ranks: int) -> tuple[list[slice], list[slice]]:
    """Each rank's query heads and the key heads that they need; ValueError where they don't fit the mesh."""
    group, size = Hq // Hkv, Hq // ranks
    if Hq % ranks or (size % group and group % size):
        raise ValueError(
            f"query heads ({Hq}, {group} a key head) must fit {ranks} sequence ranks, got no whole part each"
        )
    firsts = range(0, Hq, size)
    of_keys = [slice(first // group, -(-(first + size) // group)) for first in firsts]
    return [slice(first, first + size) for first in firsts], of_keys


def _attend(qkv: Sequence[Tensor], asked: Asked, config: RRConfig, shards: Shards, first_head: int) -> Tensor:
    """Queries at the end of the keys, heads from `first_head` on."""
    q, k, v = qkv
    Lq, Lk = q.shape[2], k.shape[2]
    options = {"causal": asked.causal, "scale": asked.scale, "softcap": asked.softcap, "head_offset": first_head}
    options["q_offset"] = None if Lq == Lk else Lk - Lq
    if asked.mask_mod is not None:
        first_query, head = as_tensors((Lk - Lq, first_head), q.device)
        options["mask_mod"] = from_head(from_query(asked.mask_mod, first_query), head)
    own = attention.Asked(config, asked.sinks, backend=asked.backend, ranks=shards.mesh.size())
    return attention.answer(q, k, v, own, **options).out

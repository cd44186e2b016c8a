"""What one rank works with in one call: its own queries, keys and values, and which of its queries attend as one.

A rank's queries are a few chunks of the prompt, each with the keys that it may see: what one process prefills a prompt
in. So blocks are selected and attended to by the core's own steps.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods import from_head, hides_keys
from rr_flex.config import RRConfig
from rr_flex.distributed.asked import Asked
from rr_flex.distributed.positions import from_query
from rr_flex.distributed.shards import HEADS, Shards
from rr_flex.geometry import ceil_div
from rr_flex.kernels.break_even import Work
from rr_flex.kernels.choose import choose_kernel
from rr_flex.kernels.deciding import decide_call
from rr_flex.kernels.last_rows import MOST_ROWS
from rr_flex.request import Request, make_request
from rr_flex.runtime.head_slices import head_slices

STRIPS = 4  # of key heads, where there are so many: all but the first travel while another attends
# Of a strip's keys and values at least. What is less travels in less time than the host takes to queue its attention.
STRIP_BYTES = 256 << 20


class Chunk(NamedTuple):
    """A run of a rank's queries, whole block rows of the sequence."""

    rows: slice  # among the rank's queries
    start: int  # position of the first
    stop: int  # one past that of the last
    keys: int  # that it may see: under a causal mask those before its end


class Local(NamedTuple):
    """What one rank works with in one call."""

    q: Float[Tensor, "B Hq n D"]
    k: Float[Tensor, "B Hkv m D"]
    v: Float[Tensor, "B Hkv m Dv"]
    shards: Shards
    asked: Asked
    config: RRConfig  # of this rank's heads
    request: Request  # of this rank's heads, for queries from token 0 on and without dense last rows
    kernel: str
    chunks: list[Chunk]
    strips: list[tuple[slice, slice]]  # query heads and their key heads
    first_far: int  # position of the first query that goes to the keys, see far_rows.py; all tokens if none does

    @property
    def count(self) -> int:
        """Keys of all ranks."""
        return self.shards.layout.tokens

    def of_chunk(self, chunk: Chunk) -> Request:
        """The request of a chunk's queries over the first `chunk.keys` keys."""
        start = self.request.q_offset + chunk.start
        own = self.request.own_mask
        return replace(self.request, q_offset=start, own_mask=None if own is None else from_query(own, start))


def prepare(q: Tensor, k: Tensor, v: Tensor, shards: Shards, asked: Asked) -> Local:
    Hq, Hkv, layout = q.shape[1], k.shape[1], shards.layout
    config, count = asked.config_of(shards, Hq), layout.tokens
    options = {"causal": asked.causal, "scale": asked.scale, "softcap": asked.softcap, "q_offset": 0}
    options["head_offset"] = shards.rank(HEADS) * Hq
    # The dense last rows are the sequence's, not a chunk's: they go to the keys, or choose_blocks adds them.
    request = make_request(q, shape_of_keys(q, Hkv, count), config.with_settings({"dense_last_rows": 0}), options)
    if asked.mask_mod is not None:
        request = replace(request, own_mask=from_head(asked.mask_mod, request.head_offset))
    if asked.mask_mod is not None and asked.backend == "flash":
        raise NotImplementedError("backend must be 'auto' or 'triton' beside a mask_mod across ranks, got 'flash'")
    kernel = choose_kernel(asked.backend, q, v, request)
    fused = asked.mask_mod is None and request.plain_softmax
    if not decide_call(kernel, q, _work(q, Hkv, shards, asked), asked.config, fused=fused).sparse:
        request = replace(request, estimate="none")
    first_far = _first_far(shards, asked, config, request)
    return Local(
        *(q, k, v, shards, asked, config, request),
        kernel=kernel,
        chunks=_chunks(shards, asked, first_far),
        strips=_strips(Hq, (k, v), shards, config),
        first_far=first_far,
    )


def _work(q: Tensor, Hkv: int, shards: Shards, asked: Asked) -> Work:
    """Of all ranks together, as one process would see it: so every rank decides the same."""
    (B, Hq, _, _), ranks, layout = q.shape, shards.ranks(HEADS), shards.layout
    queries, first = layout.tokens - layout.first_query, layout.first_query if asked.causal else None
    sizes = {"batch": B, "heads": ranks * Hq, "kv_heads": ranks * Hkv}
    return Work(**sizes, queries=queries, keys=layout.tokens, first_position=first)


def _chunks(shards: Shards, asked: Asked, first_far: int) -> list[Chunk]:
    chunks, row = [], 0
    for _, start, stop in shards.layout.queries_of(shards.place):
        near = min(stop, first_far)
        if start < near:
            keys = near if asked.causal else shards.layout.tokens
            chunks.append(Chunk(slice(row, row + near - start), start, near, keys))
        row += stop - start
    return chunks


def _first_far(shards: Shards, asked: Asked, config: RRConfig, request: Request) -> int:
    """Under padding the last rows lie elsewhere for each sequence, and stay where they are."""
    layout, rows, q_block = shards.layout, config.dense_last_rows, config.block_sizes[0]
    if request.dense or not 0 < rows <= MOST_ROWS or layout.ranks == 1 or hides_keys(asked.mask_mod):
        return layout.tokens
    return max(layout.first_query, (ceil_div(layout.tokens, q_block) - rows) * q_block)


def _strips(Hq: int, kv: tuple[Tensor, Tensor], shards: Shards, config: RRConfig) -> list[tuple[slice, slice]]:
    """The same on every rank, though their shards differ: whole groups, at least as many as memory asks for."""
    (B, Hkv, _, _), layout = kv[0].shape, shards.layout
    most = max(layout.queries_on(rank) for rank in range(layout.ranks))
    by_memory = head_slices((B, Hq, Hkv), (most, layout.tokens), config, torch.device("cpu"))
    gathered = layout.tokens * sum(B * Hkv * x.shape[3] * x.element_size() for x in kv)
    least, group = max(1, min(STRIPS, gathered // STRIP_BYTES), len(by_memory)), Hq // Hkv
    width = max(n for n in range(1, Hkv + 1) if Hkv % n == 0 and (Hkv // n >= least or n == 1))
    return [(slice(h * group, (h + width) * group), slice(h, h + width)) for h in range(0, Hkv, width)]


def shape_of_keys(q: Tensor, Hkv: int, Lk: int) -> Float[Tensor, "B Hkv Lk D"]:
    """A tensor of that shape that takes no memory, for where pooled keys stand for the keys."""
    return q.new_zeros(1).expand(q.shape[0], Hkv, Lk, q.shape[3])

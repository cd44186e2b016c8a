"""The graphs of sparse attention, compiled at start so that no request pays for them."""

import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rr_flex.geometry import ceil_div
from rr_flex.runtime.private import graphs_compiled
from rr_flex.serving.pages import PooledPages
from rr_flex.serving.step import SparseStep, attend_sparse
from rr_flex.serving.step_rows import ROW, pieces_of_step

# Rows and keys before them, in rows, of each request of a step. The attention is one graph for all. Selecting on an
# accelerator has one for single requests and one for batches, each for one row and for several; first come sizes of
# which no two are alike, since the compiler takes what is equal in one call for a rule.
STEPS = (
    *(((2, 3),), ((3, 6),), ((1, 6),), ((1, 2),), ((1, 0),), ((3, 0),)),
    *(((2, 3), (2, 1)), ((3, 6), (4, 5), (3, 4)), ((1, 6), (1, 5)), ((1, 2), (1, 2), (1, 1)), ((1, 0), (1, 0))),
)
_compiled: set[tuple] = set()


def compile_graphs(impl: Any, sample: Tensor, page: int, tell: Callable[[str], None]) -> None:
    """Runs sparse attention of random tokens in steps of every kind; once for each shape of heads and settings.

    `impl`: the attention of a layer, with `num_heads`, `num_kv_heads`, `head_size`, `layer_settings`, `pools`, `side`.
    `sample`: an empty tensor of the model's dtype, on its device.
    """
    settings = impl.layer_settings
    key = (impl.num_heads, impl.num_kv_heads, impl.head_size, sample.dtype, page, settings.config.block_sizes)
    if key in _compiled:
        return
    _compiled.add(key)
    began, before = time.perf_counter(), graphs_compiled()
    # As the server's steps run: a graph of another mode would be compiled again.
    with torch.inference_mode():
        for number, requests in enumerate(STEPS, 1):
            tell(f"compiling at start, step {number} of {len(STEPS)}, {time.perf_counter() - began:.0f} s")
            step, pages, queries = synthetic_step(requests, page, sample.device)
            shape = (pages, impl.num_kv_heads, page, 2 * impl.head_size)
            cache = torch.randn(shape, device=sample.device).to(sample.dtype)
            q = torch.randn(queries, impl.num_heads, impl.head_size, device=sample.device).to(sample.dtype)
            attend_sparse(step, settings, q, *impl.pools(cache), pooled_pages(impl, pages, page, sample))
    tell(f"{graphs_compiled() - before} graphs compiled in {time.perf_counter() - began:.0f} s")


def pooled_pages(impl: Any, pages: int, page: int, sample: Tensor) -> PooledPages | None:
    """What the server keeps beside as many pages; None where it keeps nothing."""
    side = impl.side
    if side is None:
        return None
    features = sample.new_zeros(pages, side.Hkv, page // side.stride, side.order * side.D)
    return PooledPages(features=features, stride=side.stride, order=side.order)


def synthetic_step(requests: tuple, page: int, device: torch.device) -> tuple[SparseStep, int, int]:
    """A step of (rows, rows before them) for each request, with the pages and the queries that it takes."""
    lengths = [(rows + before) * ROW for rows, before in requests]
    starts = [0, *accumulate(rows * ROW for rows, _ in requests)]
    pieces = pieces_of_step(starts, lengths, [True] * len(requests))
    most = ceil_div(max(lengths), page)
    table = torch.arange(most * len(requests), device=device).view(len(requests), most)
    return SparseStep.of(pieces, table, page), table.numel(), starts[-1]

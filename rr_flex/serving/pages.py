"""Pages of a server's cache as tensors: logical keys out of them, pooled keys beside them, block lists onto them.

A page is `P` consecutive tokens of one request, anywhere in the pool; a request's table says which pages are its own.
Whatever a server's own layout is, here a pool is a view [pages, Hkv, P, D] of it, of keys or of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rr_flex.block_mask import Lists
from rr_flex.sampling import pooled_features

Pool = Float[Tensor, "pages Hkv P D"]


def pools_of_flash(cache: Float[Tensor, "pages Hkv P 2*D"]) -> tuple[Pool, Pool]:
    """Keys and values of a cache that holds a token's key and value side by side, whatever its strides; views."""
    return cache.chunk(2, dim=-1)


def pools_of_cpu(cache: Float[Tensor, "pages Hkv P 2*D"]) -> tuple[Pool, Pool]:
    """The same of vLLM's cache on a CPU (isa "vec", "vec16"): in a page all keys as [D, P], then values [P, D]."""
    pages, Hkv, P, both = cache.shape
    halves = cache.view(pages, Hkv, 2, P * both // 2)
    keys, values = halves.unbind(2)
    return keys.unflatten(-1, (both // 2, P)).mT, values.unflatten(-1, (P, both // 2))


def read_pages(pool: Pool, table: Int[Tensor, "B n"]) -> Float[Tensor, "B Hkv n*P D"]:
    """The tokens of the pages in each request's `table`, in its order: a copy."""
    return pool.index_select(0, table.flatten()).unflatten(0, table.shape).transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True, kw_only=True)
class PooledPages:
    """`pooled_features` of each run of `stride` keys by physical page: its mean, at order 2 with its variance.

    A page's pooled keys are right once all its tokens have been written and given to `rewrite`; a whole block row needs
    whole pages only.
    """

    features: Float[Tensor, "pages Hkv P/stride E"]  # in the cache's dtype
    stride: int  # tokens
    order: int

    def rewrite(self, keys: Pool, slots: Int[Tensor, " n"]) -> None:
        """Pools anew every stride that holds one of `slots` (page · P + place in the page, none negative)."""
        runs = keys.shape[2] // self.stride
        run = slots // self.stride
        page, run = run // runs, run % runs
        written = keys.unflatten(2, (runs, self.stride))[page, :, run]  # n Hkv stride D
        pooled = pooled_features(written, self.stride, self.order)[:, :, 0]  # n Hkv E
        self.features[page, :, run] = pooled.to(self.features.dtype)

    def read(self, table: Int[Tensor, "B n"]) -> Float[Tensor, "B Hkv n*P/stride E"]:
        """The pooled keys of the pages in each request's `table`, in its order."""
        return read_pages(self.features, table)


def tokens_to_pool(
    query_starts: Sequence[int], lengths: Sequence[int], exact: Sequence[bool], stride: int
) -> list[int]:
    """The places in a step's batch whose slots `PooledPages.rewrite` is to be given.

    Tokens are written in the order of their positions, so a stride is whole when its last token is written. Where a
    request's length is only an upper bound (drafts that may be refused) all its tokens are taken.
    """
    tokens: list[int] = []
    for request, length in enumerate(lengths):
        first, stop = query_starts[request], query_starts[request + 1]
        start = length - (stop - first)
        if exact[request]:
            ahead = (stride - 1 - start) % stride
            tokens.extend(range(first + ahead, stop, stride))
        else:
            tokens.extend(range(first, stop))
    return tokens


def onto_pages(
    lists: Lists, table: Int[Tensor, "R pages"], blocks_per_page: int, folded_heads: int | None = None
) -> Lists:
    """Lists of block rows with their logical key blocks replaced by the pool's.

    `table`: the pages of each row's request. `folded_heads`: the number of key heads where the pool has them folded
    into its tokens (`paged.folds_heads`).
    """
    return (
        lists[0],
        _onto(lists[1], table, blocks_per_page, folded_heads),
        lists[2],
        _onto(lists[3], table, blocks_per_page, folded_heads),
    )


def _onto(indices: Int[Tensor, "1 Hq R nK"], table: Tensor, blocks_per_page: int, folded_heads: int | None) -> Tensor:
    row = torch.arange(len(table), device=table.device)[:, None]
    page = table.to(torch.int32)[row, indices // blocks_per_page]
    if folded_heads is not None:
        Hq = indices.shape[1]
        head = torch.arange(Hq, device=indices.device, dtype=torch.int32) // (Hq // folded_heads)
        page = page * folded_heads + head[:, None, None]
    return page * blocks_per_page + indices % blocks_per_page

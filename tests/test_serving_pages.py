"""Logical keys out of pages and back, pooled keys beside them, and block lists onto pages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rr_flex.block_mask import list_partial_and_full
from rr_flex.sampling import pooled_features
from rr_flex.serving.pages import PooledPages, onto_pages, pools_of_cpu, pools_of_flash, read_pages, tokens_to_pool

PAGES, Hkv, P, D = 6, 2, 32, 16


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, Hkv, count, D, generator=generator), torch.randn(1, Hkv, count, D, generator=generator)


def test_what_is_written_by_slot_is_read_by_table():
    k, _ = tokens(3 * P)
    pool, table = torch.zeros(PAGES, Hkv, P, D), torch.tensor([4, 0, 5])
    position = torch.arange(3 * P)
    slots = table[position // P] * P + position % P
    pool[slots // P, :, slots % P] = k[0].transpose(0, 1)
    assert torch.equal(read_pages(pool, table[None]), k)
    assert torch.equal(read_pages(pool, table[:, None]), k[0].unflatten(1, (3, P)).transpose(0, 1))


def test_the_layouts_of_a_server_are_views():
    """As vLLM documents them: a token's key and value side by side, or on a CPU all keys across, then all values."""
    k, v = (x[0].unflatten(1, (1, P)).transpose(0, 1) for x in tokens(P))  # 1 Hkv P D: one page
    side_by_side = torch.cat([k, v], -1)
    across = torch.cat([k.mT.flatten(2), v.flatten(2)], -1).view(1, Hkv, P, 2 * D)
    for cache, pools_of in ((side_by_side, pools_of_flash), (across, pools_of_cpu)):
        keys, values = pools_of(cache)
        assert torch.equal(keys, k) and torch.equal(values, v)
        keys.zero_()
        assert not pools_of(cache)[0].any() and torch.equal(pools_of(cache)[1], v)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("stride", [8, 32])
def test_pooled_pages_are_fresh_pooling(order, stride):
    k, _ = tokens(PAGES * P)
    pool = k[0].unflatten(1, (PAGES, P)).transpose(0, 1).contiguous()
    features = torch.full((PAGES, Hkv, P // stride, order * D), torch.nan)
    pooled = PooledPages(features=features, stride=stride, order=order)
    pooled.rewrite(pool, torch.arange(stride - 1, PAGES * P, stride))
    table = torch.tensor([[3, 1]])
    assert torch.equal(pooled.read(table), pooled_features(read_pages(pool, table), stride, order))
    pool[3] += 1
    pooled.rewrite(pool, torch.tensor([3 * P + 1, 3 * P, 3 * P + 1]))
    fresh = pooled_features(read_pages(pool, table), stride, order)
    assert torch.equal(pooled.read(table)[:, :, :1], fresh[:, :, :1])
    assert stride == P or not torch.equal(pooled.read(table), fresh)


@given(ends=st.lists(st.integers(1, 200), min_size=1, max_size=6, unique=True), stride=st.sampled_from([8, 32]))
def test_each_stride_is_pooled_once_when_its_last_token_is_written(ends, stride):
    start, pooled = 0, []
    for end in sorted(ends):
        # Another request of three drafts stands before it in the batch: all its tokens are taken.
        found = tokens_to_pool([0, 3, 3 + end - start], [50, end], [False, True], stride)
        assert found[:3] == [0, 1, 2]
        pooled += [start + token - 3 for token in found[3:]]
        start = end
    assert pooled == list(range(stride - 1, start, stride))


@pytest.mark.parametrize("folded", [None, Hkv])
@pytest.mark.parametrize("blocks_per_page", [1, 2])
def test_lists_name_the_pool_s_blocks(folded, blocks_per_page):
    generator = torch.Generator().manual_seed(0)
    nK = 3 * blocks_per_page
    kept = torch.rand(1, 4, 2, nK, generator=generator) < 0.6
    whole = torch.rand(1, 1, 2, nK, generator=generator) < 0.5
    table = torch.tensor([[5, 0, 3], [1, 4, 2]])  # two rows, of two requests
    lists = list_partial_and_full(kept, whole)
    mapped = onto_pages(lists, table, blocks_per_page, folded)
    for count, logical, physical in ((lists[0], lists[1], mapped[1]), (lists[2], lists[3], mapped[3])):
        for head, row in ((head, row) for head in range(4) for row in range(2)):
            for place in range(int(count[0, head, row])):
                block = int(logical[0, head, row, place])
                page, inside = int(table[row, block // blocks_per_page]), block % blocks_per_page
                if folded:
                    page = page * Hkv + head // 2
                assert physical[0, head, row, place] == page * blocks_per_page + inside
    assert mapped[1].dtype == torch.int32

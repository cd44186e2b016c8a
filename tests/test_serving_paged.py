"""Attention over a pool of pages is attention over the gathered keys, however the pages lie."""

import pytest
import torch

from rr_flex import RRConfig, select_blocks
from rr_flex.block_mask import list_partial_and_full
from rr_flex.serving.paged import as_sequence, attend_pages, folds_heads, side_by_side
from rr_flex.serving.pages import onto_pages, pools_of_cpu, pools_of_flash, read_pages

P, Hq, Hkv, D, PAGES = 128, 4, 2, 16, 24
LAYOUTS = ("heads outermost", "tokens outermost")


def random_cache(layout: str, seed: int) -> torch.Tensor:
    """[pages, Hkv, P, 2·D] in the memory order that a server may choose."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "heads outermost":
        return torch.randn(PAGES, Hkv, P, 2 * D, generator=generator)
    return torch.randn(PAGES, P, Hkv, 2 * D, generator=generator).transpose(1, 2)


def attention_over_kept(q, k, v, kept, k_block):
    """Plain softmax attention, float64, over the causal pairs of the kept blocks; queries end where the keys end."""
    Lq, Lk = q.shape[2], k.shape[2]
    position = torch.arange(Lk - Lq, Lk)[:, None]
    seen = (torch.arange(Lk) <= position) & kept.repeat_interleave(128, 2)[:, :, :Lq].repeat_interleave(k_block, 3)
    scores = q.double() @ k.double().repeat_interleave(Hq // Hkv, 1).mT * D**-0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double().repeat_interleave(Hq // Hkv, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k_block", [128, 64])
def test_attention_over_pages_is_attention_over_the_gathered_keys(layout, k_block):
    keys, values = pools_of_flash(random_cache(layout, 0))
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(PAGES, generator=generator)
    config = RRConfig(block_size=(128, k_block), tau=0.6, dense_last_rows=0)
    queries, lists, expected = [], [], []
    # Three requests, of which the first begins its prompt and the others go on after a chunk or a prefix hit.
    for rows, pages, at in ((2, 2, 0), (1, 5, 2), (3, 9, 7)):
        table = order[at : at + pages]
        q = torch.randn(1, Hq, rows * 128, D, generator=generator)
        k, v = read_pages(keys, table), read_pages(values, table)
        chosen = select_blocks(q, k, config=config)
        assert chosen.density < 1 or pages == 2
        queries.append(q)
        folded = Hkv if folds_heads(keys) else None
        lists.append(onto_pages(list_partial_and_full(chosen.kept, chosen.whole), table, P // k_block, folded))
        expected.append(attention_over_kept(q, k, v, chosen.kept, k_block))
    q = torch.cat(queries, 2)
    out = attend_pages(q, keys, values, side_by_side(lists), k_block=k_block, scale=D**-0.5)
    torch.testing.assert_close(out.double(), torch.cat(expected, 2), atol=2e-6, rtol=0)


def test_a_pool_is_one_sequence_without_a_copy():
    for layout in LAYOUTS:
        cache = random_cache(layout, 2)
        for pool in pools_of_flash(cache):
            assert as_sequence(pool).untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    assert folds_heads(pools_of_flash(random_cache("heads outermost", 2))[0])
    assert not folds_heads(pools_of_flash(random_cache("tokens outermost", 2))[0])


def test_keys_that_lie_across_their_pages_are_refused():
    keys, values = pools_of_cpu(random_cache("heads outermost", 3))
    assert keys.shape == values.shape == (PAGES, Hkv, P, D)
    with pytest.raises(ValueError, match="pool must have whole tokens one behind the other"):
        as_sequence(keys)


def test_a_pool_beyond_the_kernels_offsets_is_refused():
    pool = torch.empty(2**16, 8, 128, 256, device="meta")[..., :128]
    with pytest.raises(ValueError, match="pool must reach over at most 2147483648 elements"):
        as_sequence(pool)

"""The BlockMask's lists say exactly what was kept, and its mask_mod says the same."""

import oracle
import torch
from cases import LAYOUTS, MASKS, Shape, assert_attends, eager_flex, mask_by_name, seeds, shapes, taus, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask

from rr_flex import create_rr_block_mask, select_blocks

few = settings(max_examples=15)


def listed(counts, indices, nK):
    """The map that a list stands for, checked on the way: [B, H, nQ], [B, H, nQ, W] -> bool [B, H, nQ, nK]."""
    assert counts.dtype == indices.dtype == torch.int32 and indices.stride(-1) == 1
    found = torch.zeros(*counts.shape, nK, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).view(-1, 3).tolist():
        entries = indices[b, h, i, : counts[b, h, i]].tolist()
        assert entries == sorted(set(entries)), "ascending, no duplicates"
        found[b, h, i, entries] = True
    return found


@few
@given(
    data=st.data(), shape=shapes(bottom_right=True), layout=st.sampled_from(LAYOUTS), tau=taus, seed=seeds,
    name=st.sampled_from(["causal", *MASKS]),
)  # fmt: skip
def test_lists_hold_the_kept_blocks_and_nothing_else(data, shape, layout, tau, seed, name):
    q, k, _ = tensors(shape, seed)
    mask = None if name == "causal" else mask_by_name(name, shape, seed)[0]
    (sq, sk), block_size = layout
    selection = select_blocks(
        q, k, mask_mod=mask, causal=mask is None, query_stride=sq, key_stride=sk, block_size=block_size, tau=tau
    )
    block_mask = selection.block_mask
    assert isinstance(block_mask, BlockMask)
    assert tuple(block_mask.BLOCK_SIZE) == block_size and tuple(block_mask.seq_lengths) == (shape.Lq, shape.Lk)
    assert block_mask.kv_indices.shape == block_mask.full_kv_indices.shape
    assert block_mask.kv_indices.stride() == block_mask.full_kv_indices.stride()
    assert block_mask.kv_num_blocks.shape == block_mask.full_kv_num_blocks.shape
    assert block_mask.kv_num_blocks.stride() == block_mask.full_kv_num_blocks.stride()
    assert block_mask.kv_indices.shape[1] in (1, shape.Hq)
    B, Hq, nQ, nK = selection.kept.shape
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices, nK).expand(B, Hq, nQ, nK)
    full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, nK).expand(B, Hq, nQ, nK)
    shown = oracle.pairs(mask or oracle.causal_element(shape.Lk - shape.Lq), B, Hq, shape.Lq, shape.Lk)
    whole = oracle.blocks(shown, block_size)[1]
    assert torch.equal(full, selection.kept & whole)
    assert torch.equal(partial, selection.kept & ~whole)


@few
@given(shape=shapes(), tau=taus, seed=seeds)
def test_the_short_call_makes_the_same_mask(shape, tau, seed):
    q, k, _ = tensors(shape, seed)
    mask, long = create_rr_block_mask(q, k, tau=tau), select_blocks(q, k, tau=tau).block_mask
    nK = -(-shape.Lk // 128)
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        maps = [listed(getattr(m, counts), getattr(m, indices), nK) for m in (mask, long)]
        assert torch.equal(*maps)


@few
@given(shape=shapes(bottom_right=True), tau=taus, seed=seeds, name=st.sampled_from(["causal", *MASKS]))
def test_eager_attention_sees_the_kept_blocks_only(shape, tau, seed, name):
    """Eager flex_attention reads the mask_mod alone, so the mask_mod must know the choice."""
    q, k, v = tensors(shape, seed)
    mask = None if name == "causal" else mask_by_name(name, shape, seed)[0]
    selection = select_blocks(q, k, mask_mod=mask, causal=mask is None, tau=tau)
    shown = oracle.pairs(mask or oracle.causal_element(shape.Lk - shape.Lq), *shape[:2], shape.Lq, shape.Lk)
    allowed = shown & oracle.expand(selection.kept, (shape.Lq, shape.Lk), (128, 128))
    assert_attends(eager_flex(q, k, v, selection.block_mask), q, k, v, allowed)


def test_a_batch_s_lists_follow_the_last_head_s_without_a_gap():
    """The kernel finds batch b at b·H heads, whatever the strides say (torch 2.11)."""
    q, k, _ = tensors(Shape(B=2, Hq=9, Hkv=3, Lq=300, Lk=300), seed=0)
    block_mask = select_blocks(q, k, tau=0.5).build_block_mask(for_backward=True)
    for side in ("kv_", "full_kv_", "q_", "full_q_"):
        for name in (side + "num_blocks", side + "indices"):
            strides = getattr(block_mask, name).stride()
            assert strides[0] == 9 * strides[1], name


def test_the_query_side_lists_hold_the_same_blocks():
    q, k, _ = tensors(Shape(B=2, Hq=4, Hkv=2, Lq=300, Lk=700), seed=0)
    selection = select_blocks(q, k, tau=0.5, block_size=(128, 64))
    block_mask = selection.build_block_mask(for_backward=True)
    nQ = selection.kept.shape[2]
    partial = listed(block_mask.q_num_blocks, block_mask.q_indices, nQ)
    full = listed(block_mask.full_q_num_blocks, block_mask.full_q_indices, nQ)
    assert torch.equal((partial | full).mT, selection.kept) and not (partial & full).any()
    assert torch.equal(full.mT, selection.kept & selection.whole)


def test_the_lists_cost_no_more_rows_than_blocks():
    block_mask = create_rr_block_mask(*tensors(Shape(Lq=257, Lk=384))[:2])
    assert block_mask.kv_indices.shape[-2:] == (3, 3)

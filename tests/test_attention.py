"""Sparse attention, compiled, against float64 attention over the kept blocks. Eager flex_attention is dense."""

import oracle
import pytest
import torch
from cases import AHEAD, MASKS, SQUARE, assert_attends, compiled_flex, eager_flex, mask_by_name, seeds, tensors
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mask_mods import document
from rr_flex import RRConfig, create_rr_block_mask, rr_attention, select_blocks

# No shrinking: an example takes a while, and shapes are fixed anyway.
few = settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
tau_values = st.sampled_from([0.2, 0.5, 0.9])


def allowed_pairs(q, k, mask=None, block_size=(128, 128), **chosen):
    """The pairs that the mask shows and the selection keeps: bool [B, Hq, Lq, Lk]."""
    (B, Hq, Lq, _), Lk = q.shape, k.shape[2]
    shown = oracle.pairs(mask or oracle.causal_element(Lk - Lq), B, Hq, Lq, Lk)
    kept = select_blocks(q, k, mask_mod=mask, block_size=block_size, **chosen).kept
    return shown & oracle.expand(kept, (Lq, Lk), block_size)


@few
@given(seed=seeds, tau=tau_values)
@pytest.mark.parametrize("shape", [SQUARE, AHEAD])
def test_three_ways_to_attend_agree_with_float64(shape, tau, seed):
    q, k, v = tensors(shape, seed)
    allowed = allowed_pairs(q, k, tau=tau)
    mask = create_rr_block_mask(q, k, tau=tau)
    assert_attends(rr_attention(q, k, v, tau=tau), q, k, v, allowed)
    assert_attends(compiled_flex(q, k, v, block_mask=mask, enable_gqa=True), q, k, v, allowed)
    assert_attends(eager_flex(q, k, v, mask), q, k, v, allowed)


@few
@given(seed=seeds)
@pytest.mark.parametrize("shape", [SQUARE, AHEAD])
def test_tau_1_is_dense_attention(shape, seed):
    q, k, v = tensors(shape, seed)
    dense = oracle.pairs(oracle.causal_element(shape.Lk - shape.Lq), *shape[:2], shape.Lq, shape.Lk)
    assert_attends(rr_attention(q, k, v, tau=1.0), q, k, v, dense)


def test_something_is_skipped():
    """Without this the tests above could pass on dense attention."""
    q, k, v = tensors(SQUARE)
    dense = oracle.attend(q, k, v, oracle.pairs(oracle.causal_element(0), *SQUARE[:2], 300, 300))[0]
    chosen = {"tau": 0.2, "dense_last_rows": 0, "sink_blocks": 0}
    assert (rr_attention(q, k, v, **chosen).double() - dense).abs().max() > 0.1
    assert_attends(rr_attention(q, k, v, **chosen), q, k, v, allowed_pairs(q, k, **chosen))


@few
@given(seed=seeds)
def test_every_extension_at_once(seed):
    q, k, v = tensors(SQUARE, seed)
    chosen = {"query_stride": 16, "key_stride": 8, "block_size": (128, 64), "order": 2, "local_blocks": 2}
    chosen |= {"budget": "threshold", "threshold": 0.2}
    assert_attends(rr_attention(q, k, v, **chosen), q, k, v, allowed_pairs(q, k, **chosen))
    assert torch.equal(rr_attention(q, k, v, config=RRConfig(**chosen)), rr_attention(q, k, v, **chosen))


@few
@given(seed=seeds)
@pytest.mark.parametrize("name", MASKS)
def test_any_mask_attends_as_float64(name, seed):
    q, k, v = tensors(SQUARE, seed)
    mask, _ = mask_by_name(name, SQUARE, seed)
    assert_attends(rr_attention(q, k, v, mask_mod=mask, tau=0.5), q, k, v, allowed_pairs(q, k, mask, tau=0.5))


@few
@given(seed=seeds)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_padding_holds_never_matters_and_its_rows_are_zero(side, seed):
    q, k, v = tensors(SQUARE, seed)
    mask, real = mask_by_name(f"{side} padding", SQUARE, seed)
    at_real = real[:, None, :, None]
    others = [50 * x for x in tensors(SQUARE, seed + 1)]
    changed = [torch.where(at_real, x, y) for x, y in zip((q, k, v), others, strict=True)]
    out = rr_attention(q, k, v, mask_mod=mask, tau=0.5)
    assert (out.masked_fill(at_real, 0) == 0).all()
    assert torch.equal(rr_attention(*changed, mask_mod=mask, tau=0.5), out)


def test_causal_with_a_mask_means_both():
    q, k, v = tensors(SQUARE)
    ids = torch.tensor([[0] * 100 + [1] * 200, [0] * 150 + [1] * 150])
    shown = oracle.pairs(oracle.causal_element(0), 2, 4, 300, 300) & (ids[:, None, :, None] == ids[:, None, None])
    chosen = {"mask_mod": document(ids), "causal": True, "tau": 0.5}
    kept = oracle.expand(select_blocks(q, k, **chosen).kept, (300, 300), (128, 128))
    assert_attends(rr_attention(q, k, v, **chosen), q, k, v, shown & kept)


@few
@given(seed=seeds, row=st.integers(0, 2), tau=tau_values)
def test_keys_past_a_row_s_block_never_change_its_output(row, tau, seed):
    q, k, v = tensors(SQUARE, seed)
    end = min(128 * (row + 1), 300)
    _, other_k, other_v = (50 * x for x in tensors(SQUARE, seed + 1))
    changed = [torch.cat([x[:, :, :end], y[:, :, end:]], 2) for x, y in ((k, other_k), (v, other_v))]
    out, after = rr_attention(q, k, v, tau=tau), rr_attention(q, *changed, tau=tau)
    assert torch.equal(out[:, :, :end], after[:, :, :end])


@few
@given(seed=seeds)
def test_strides_in_memory_never_matter(seed):
    """As a model hands them over: [B, L, H, D] transposed."""
    q, k, v = tensors(SQUARE, seed)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_attends(rr_attention(*apart, tau=0.5), q, k, v, allowed_pairs(q, k, tau=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = tensors(SQUARE, dtype=dtype)
    assert_attends(rr_attention(q, k, v, tau=0.5), q, k, v, allowed_pairs(q, k, tau=0.5))
    assert_attends(eager_flex(q, k, v, create_rr_block_mask(q, k, tau=0.5)), q, k, v, allowed_pairs(q, k, tau=0.5))


def test_a_scale_is_used_by_the_estimate_and_by_attention():
    q, k, v = tensors(SQUARE)
    scaled = 0.1 * 4 * q  # the default scale is a quarter
    expected = allowed_pairs(scaled, k, tau=0.5)
    assert torch.equal(allowed_pairs(q, k, tau=0.5, scale=0.1), expected)
    exact = oracle.attend(scaled, k, v, expected)[0]
    torch.testing.assert_close(rr_attention(q, k, v, tau=0.5, scale=0.1).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_sequence(bad):
    q, k, v = tensors(SQUARE)
    out = rr_attention(q, k, v, tau=0.5)
    for x in (q, k):
        changed = x.clone()
        changed[0, 0, 130] = bad
        after = rr_attention(*((changed, k) if x is q else (q, changed)), v, tau=0.5)
        assert torch.equal(after[1], out[1])
        assert torch.equal(after[0, :, :128], out[0, :, :128])

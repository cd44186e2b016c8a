"""Sparse attention, compiled, against float64 attention over the kept blocks. Eager flex_attention is dense."""

import contextlib

import oracle
import pytest
import torch
from cases import (
    EVERY_EXTENSION,
    FREE,
    MASKS,
    SQUARE,
    assert_attends,
    compiled_flex,
    eager_flex,
    mask_by_name,
    no_compile,
    seeds,
    tensors,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mask_mods import both, causal, document, sliding_window
from rr_flex import RRConfig, create_rr_block_mask, rr_attention, select_blocks
from rr_flex.kernels.score_mods import beside_sinks

# No shrinking: an example takes a while, and shapes are fixed anyway.
few = settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
tau_values = st.sampled_from([0.1, 0.3, 0.6])


def allowed_pairs(q, k, mask=None, block_size=(128, 128), **chosen):
    """The pairs that the mask shows and the selection keeps: bool [B, Hq, Lq, Lk]."""
    (B, Hq, Lq, _), Lk = q.shape, k.shape[2]
    shown = oracle.pairs(mask or oracle.causal_element(Lk - Lq), B, Hq, Lq, Lk)
    kept = select_blocks(q, k, mask_mod=mask, causal=mask is None, block_size=block_size, **chosen).kept
    return shown & oracle.expand(kept, (Lq, Lk), block_size)


@few
@given(seed=seeds, tau=tau_values)
def test_three_ways_to_attend_agree_with_float64(tau, seed):
    q, k, v = tensors(SQUARE, seed)
    allowed = allowed_pairs(q, k, tau=tau, **FREE)
    mask = create_rr_block_mask(q, k, tau=tau, **FREE)
    assert_attends(rr_attention(q, k, v, tau=tau, **FREE), q, k, v, allowed)
    assert_attends(compiled_flex(q, k, v, block_mask=mask, enable_gqa=True), q, k, v, allowed)
    assert_attends(eager_flex(q, k, v, mask), q, k, v, allowed)


@few
@given(seed=seeds)
def test_tau_1_is_dense_attention(seed):
    q, k, v = tensors(SQUARE, seed)
    dense = oracle.pairs(oracle.causal_element(0), *SQUARE[:2], 300, 300)
    assert_attends(rr_attention(q, k, v, tau=1.0, **FREE), q, k, v, dense)


def test_something_is_skipped():
    """Without this the tests above could pass on dense attention."""
    q, k, v = tensors(SQUARE)
    dense = oracle.attend(q, k, v, oracle.pairs(oracle.causal_element(0), *SQUARE[:2], 300, 300))[0]
    assert (rr_attention(q, k, v, tau=0.2, **FREE).double() - dense).abs().max() > 0.1


@few
@given(seed=seeds)
def test_every_extension_at_once(seed):
    q, k, v = tensors(SQUARE, seed)
    out = rr_attention(q, k, v, **EVERY_EXTENSION)
    assert_attends(out, q, k, v, allowed_pairs(q, k, **EVERY_EXTENSION))
    assert torch.equal(rr_attention(q, k, v, config=RRConfig(**EVERY_EXTENSION)), out)


@pytest.mark.parametrize("name", MASKS)
def test_any_mask_attends_as_float64(name):
    # An int of a mask is a setting and compiles anew; values in its tensors compile nothing.
    seeds = range(4) if name in ("document", "left padding", "right padding") else range(1)
    for seed in seeds:
        q, k, v = tensors(SQUARE, seed)
        mask, _ = mask_by_name(name, SQUARE, seed)
        with no_compile() if seed else contextlib.nullcontext():
            out = rr_attention(q, k, v, mask_mod=mask, causal=mask is None, tau=0.5, **FREE)
        assert_attends(out, q, k, v, allowed_pairs(q, k, mask, tau=0.5, **FREE))


def test_a_new_window_compiles_anew_and_attends_right():
    drawn = mask_by_name("sliding_window", SQUARE)[0]  # compiled above
    for mask in (drawn, both(causal(), sliding_window(40))):
        q, k, v = tensors(SQUARE)
        out = rr_attention(q, k, v, mask_mod=mask, causal=mask is None, tau=0.5, **FREE)
        assert_attends(out, q, k, v, allowed_pairs(q, k, mask, tau=0.5, **FREE))


@few
@given(seed=seeds)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_padding_holds_never_matters_and_its_rows_are_zero(side, seed):
    q, k, v = tensors(SQUARE, seed)
    mask, real = mask_by_name(f"{side} padding", SQUARE, seed)
    at_real = real[:, None, :, None]
    others = [50 * x for x in tensors(SQUARE, seed + 1)]
    changed = [torch.where(at_real, x, y) for x, y in zip((q, k, v), others, strict=True)]
    out = rr_attention(q, k, v, mask_mod=mask, causal=mask is None, tau=0.5, **FREE)
    assert (out.masked_fill(at_real, 0) == 0).all()
    assert torch.equal(rr_attention(*changed, mask_mod=mask, causal=mask is None, tau=0.5, **FREE), out)


def test_causal_with_a_mask_means_both():
    q, k, v = tensors(SQUARE)
    ids = torch.tensor([[0] * 100 + [1] * 200, [0] * 150 + [1] * 150])
    shown = oracle.pairs(oracle.causal_element(0), 2, 4, 300, 300) & (ids[:, None, :, None] == ids[:, None, None])
    chosen = {"mask_mod": document(ids), "causal": True, "tau": 0.5, **FREE}
    kept = oracle.expand(select_blocks(q, k, **chosen).kept, (300, 300), (128, 128))
    assert_attends(rr_attention(q, k, v, **chosen), q, k, v, shown & kept)


@few
@given(seed=seeds, row=st.integers(0, 2), tau=tau_values)
def test_keys_past_a_row_s_block_never_change_its_output(row, tau, seed):
    q, k, v = tensors(SQUARE, seed)
    end = min(128 * (row + 1), 300)
    _, other_k, other_v = (50 * x for x in tensors(SQUARE, seed + 1))
    changed = [torch.cat([x[:, :, :end], y[:, :, end:]], 2) for x, y in ((k, other_k), (v, other_v))]
    out, after = rr_attention(q, k, v, tau=tau, **FREE), rr_attention(q, *changed, tau=tau, **FREE)
    assert torch.equal(out[:, :, :end], after[:, :, :end])


@few
@given(seed=seeds)
def test_strides_in_memory_never_matter(seed):
    """As a model hands them over: [B, L, H, D] transposed."""
    q, k, v = tensors(SQUARE, seed)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_attends(rr_attention(*apart, tau=0.5, **FREE), q, k, v, allowed_pairs(q, k, tau=0.5, **FREE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = tensors(SQUARE, dtype=dtype)
    allowed = allowed_pairs(q, k, tau=0.5, **FREE)
    assert_attends(rr_attention(q, k, v, tau=0.5, **FREE), q, k, v, allowed)
    assert_attends(eager_flex(q, k, v, create_rr_block_mask(q, k, tau=0.5, **FREE)), q, k, v, allowed)


def test_a_scale_is_used_by_the_estimate_and_by_attention():
    q, k, v = tensors(SQUARE)
    scaled = 0.1 * 4 * q  # the default scale is a quarter
    expected = allowed_pairs(scaled, k, tau=0.5, **FREE)
    assert torch.equal(allowed_pairs(q, k, tau=0.5, scale=0.1, **FREE), expected)
    exact = oracle.attend(scaled, k, v, expected)[0]
    torch.testing.assert_close(rr_attention(q, k, v, tau=0.5, scale=0.1, **FREE).double(), exact, rtol=0, atol=1e-5)


def test_what_is_left_beside_a_sink():
    """As an accelerator has it, whose kernels leave the sinks out: also where nothing is seen, or the sink is none."""
    out, lse = torch.randn(1, 3, 4, 16), torch.tensor([-torch.inf, -3.0, 0.5, 200.0]).expand(1, 3, 4)
    out[:, :, 0] = 0  # it sees nothing
    sinks = torch.tensor([-torch.inf, 0.0, 2.0])
    share = lse.exp() / (lse.exp() + sinks.exp()[:, None])
    share[..., 0], share[..., 3] = 0, 1
    torch.testing.assert_close(beside_sinks(out, lse, sinks), out * share[..., None])


@pytest.mark.parametrize("chosen", [{"tau": 0.5, **FREE}, {"tau": 0.1, "min_length": 301}], ids=["sparse", "dense"])
def test_soft_caps_and_sinks_are_in_the_softmax(chosen):
    """Every logit within ± cap, and a sink's exp in the sum; other values of both compile nothing.

    Each without the other: gemma2 and gpt-oss in test_models_families.py.
    """
    for seed, cap in enumerate((2.0, 5.0)):
        q, k, v = tensors(SQUARE, seed)
        sinks = torch.randn(4, generator=torch.Generator().manual_seed(seed)) + 2
        with no_compile() if seed else contextlib.nullcontext():
            out = rr_attention(q, k, v, softcap=cap, sinks=sinks, **chosen)
        allowed = allowed_pairs(q, k, softcap=cap, **chosen)
        exact, lse = oracle.attend(q, k, v, allowed, softcap=cap)
        left = exact * (lse.exp() / (lse.exp() + sinks.double().exp()[:, None]))[..., None]
        torch.testing.assert_close(out.double(), left, rtol=0, atol=1e-5)
        assert (left - exact).abs().max() > 0.1 and (exact - oracle.attend(q, k, v, allowed)[0]).abs().max() > 0.1
        dropped = oracle.pairs(oracle.causal_element(0), 2, 4, 300, 300) & ~allowed
        assert dropped.any() == (chosen["min_length"] == 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_sequence(bad):
    q, k, v = tensors(SQUARE)
    out = rr_attention(q, k, v, tau=0.5, **FREE)
    for x in (q, k):
        changed = x.clone()
        changed[0, 0, 130] = bad
        after = rr_attention(*((changed, k) if x is q else (q, changed)), v, tau=0.5, **FREE)
        assert torch.equal(after[1], out[1])
        assert torch.equal(after[0, :, :128], out[0, :, :128])

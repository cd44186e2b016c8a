"""Estimates other than the paper's, each against its own formula in float64, and the budget by density."""

import math
import warnings

import oracle
import pytest
import torch
from cases import FREE, LAYOUTS, MASKS, Shape, mask_by_name, no_compile, seeds, shapes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_mods import causal
from rr_flex import RRConfig, rr_attention, select_blocks
from rr_flex.fields import PRESETS
from rr_flex.mass import Samples, block_mass
from rr_flex.mass_by_attention import block_mass_by_attention
from rr_flex.registry import BUDGETS
from rr_flex.sampling import moments, pooled_features, sample_queries, with_square, with_variance
from rr_flex.selection import select_density, select_threshold


def settings_of(layout):
    (q_stride, k_stride), block_size = layout
    return {"query_stride": q_stride, "key_stride": k_stride, "block_size": block_size}


orders = st.sampled_from([{"order": 1}, {"order": 2}, {"order": 2, "variance_weight": 0.125}])


def mass_of_pooled_queries(q, k, shown, *, scale, query_pool, block_size, order, variance_weight=0.5):
    """Each block of queries as one query (or a few): mean logit over its queries that see something, order 2 with some
    of the variance, a softmax over the keys that its first or last query sees. Loops, float64."""
    (B, Hq, Lq, _), (_, Hkv, Lk, _) = q.shape, k.shape
    mass = torch.zeros(B, Hq, math.ceil(Lq / block_size[0]), math.ceil(Lk / block_size[1])).double()
    for b in range(B):
        for h in range(Hq):
            keys = k[b, h // (Hq // Hkv)].double()
            for run in oracle.runs(Lq, query_pool):
                alive = [i for i in run if shown[b, h, i].any()]
                seen = shown[b, h, run[0]] | shown[b, h, run[-1]]
                if not seen.any():
                    continue
                queries = q[b, h, alive].double()
                logits = scale * keys @ queries.mean(0)
                if order == 2:
                    variance = ((queries - queries.mean(0)) ** 2).mean(0)
                    logits = logits + variance_weight * scale**2 * keys**2 @ variance
                share = torch.softmax(logits.masked_fill(~seen, -math.inf), 0)
                for j, part in enumerate(share.split(block_size[1])):
                    mass[b, h, run[0] // block_size[0], j] += part.sum()
    return mass


def shown_by(mask, shape):
    return oracle.pairs(mask, shape.B, shape.Hq, shape.Lq, shape.Lk)


@settings(max_examples=25)
@given(shape=shapes(), query_pool=st.sampled_from([None, 16, 64]), second=orders, seed=seeds)
@pytest.mark.parametrize("block_size", [(128, 64), (64, 128)])
def test_pooled_queries_are_their_formula(block_size, shape, query_pool, second, seed):
    q, k, _ = tensors(shape, seed)
    chosen = {"pool": "queries", "query_pool": query_pool, "block_size": block_size, "scale": 0.2} | second
    shown = shown_by(oracle.causal_element(shape.Lk - shape.Lq), shape)
    facts = {"scale": 0.2, "query_pool": query_pool or block_size[0], "block_size": block_size} | second
    expected = mass_of_pooled_queries(q, k, shown, **facts)
    torch.testing.assert_close(select_blocks(q, k, **chosen).mass.double(), expected, rtol=0, atol=2e-5)


@settings(max_examples=8)
@given(shape=shapes(bottom_right=True), seed=seeds)
@pytest.mark.parametrize("name", MASKS)
def test_pooled_queries_obey_any_mask(name, shape, seed):
    q, k, _ = tensors(shape, seed)
    mask, _ = mask_by_name(name, shape, seed)
    facts = {"scale": shape.D**-0.5, "query_pool": 64, "block_size": (128, 64), "order": 2}
    expected = mass_of_pooled_queries(q, k, shown_by(mask, shape), **facts)
    chosen = {"pool": "queries", "query_pool": 64, "block_size": (128, 64), "order": 2}
    mass = select_blocks(q, k, mask_mod=mask, causal=False, **chosen).mass
    torch.testing.assert_close(mass.double(), expected, rtol=0, atol=2e-5)


@settings(max_examples=20)
@given(shape=shapes(), layout=st.sampled_from(LAYOUTS), second=orders, seed=seeds)
def test_both_is_the_mean_of_two_shares(shape, layout, second, seed):
    q, k, _ = tensors(shape, seed)
    shown = shown_by(oracle.causal_element(shape.Lk - shape.Lq), shape)
    strides, block_size = layout
    keys = oracle.block_mass(q, k, shown, scale=shape.D**-0.5, strides=strides, block_size=block_size, **second)
    facts = {"scale": shape.D**-0.5, "query_pool": block_size[0], "block_size": block_size, "order": 1}
    queries = mass_of_pooled_queries(q, k, shown, **facts)
    keys, queries = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (keys, queries))
    mass = select_blocks(q, k, pool="both", **second, **settings_of(layout)).mass
    torch.testing.assert_close(mass.double(), (keys + queries) / 2, rtol=0, atol=2e-5)


def test_a_head_samples_its_own_token_of_a_stride():
    q, k, _ = tensors(Shape(Lq=300, Lk=300))
    sampled = sample_queries(q, 8, 3)
    index = torch.tensor([[min(8 * i + (h + 3) % 8, 299) for i in range(38)] for h in range(4)])
    for h in range(4):
        assert torch.equal(sampled[:, h], q[:, h, index[h]])
    # The estimate looks from where the sampled query stands.
    mass = select_blocks(q, k, head_offset=3).mass
    keys = moments(k, 8)[0].repeat_interleave(2, 1).double()
    scores = sampled.double() @ keys.mT / 4
    for h in range(4):
        share = scores[:, h].masked_fill(torch.arange(38) * 8 > index[h][:, None], -math.inf).softmax(-1)
        torch.testing.assert_close(mass[:, h, 0, 0].double(), share[:, :16, :16].sum((1, 2)), rtol=0, atol=2e-5)


@given(seed=seeds)
def test_order_two_is_exact_where_a_stride_s_keys_are_equal(seed):
    q, k, _ = tensors(Shape(Lq=64, Lk=256), seed)
    k = k[:, :, ::8].repeat_interleave(8, 2)
    queries, keys = with_square(q, 0.5 * 0.25), with_variance(moments(k, 8), q.dtype)
    exact = q @ k[:, :, ::8].repeat_interleave(2, 1).mT
    torch.testing.assert_close(queries @ keys.repeat_interleave(2, 1).mT, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["keys", "queries"])
def test_order_two_is_nearer_to_log_mean_exp_on_gaussian_strides(side):
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1, 1, 200, 32, generator=generator)
    many = torch.randn(1, 1, 64 * 128, 32, generator=generator) * torch.rand(32, generator=generator) * 1.5
    scale = 32**-0.5
    exact = (few @ many.mT * scale).unflatten(-1, (64, 128)).logsumexp(-1) - math.log(128)
    first = few @ moments(many, 128)[0].mT * scale
    if side == "keys":
        a, b = with_square(few, 0.5 * scale), with_variance(moments(many, 128), many.dtype)
    else:
        b, a = pooled_features(many, 128, 2), with_square(few, 0.5 * scale)
    second = a @ b.mT * scale
    assert (second - exact).abs().mean() < 0.2 * (first - exact).abs().mean()


@settings(max_examples=5)
@given(seed=seeds, name=st.sampled_from(["causal", *MASKS]), query_pool=st.sampled_from([32, 128]))
def test_pooled_queries_as_attention_equal_the_strips(name, query_pool, seed):
    shape = Shape(Lq=300, Lk=700)
    q, k, _ = tensors(shape, seed)
    mask = causal(400) if name == "causal" else mask_by_name(name, shape, seed)[0]
    queries, keys = pooled_features(q, query_pool, 2), with_square(k, 0.5 * 0.25)
    facts = {"seq_lengths": (300, 700), "strides": (query_pool, 1), "block_size": (128, 64), "stands_for": "all"}
    samples = Samples(queries, keys, **facts, mask_mod=mask, scale=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        attention = block_mass_by_attention(samples)
    torch.testing.assert_close(attention, block_mass(samples), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["queries", "both"])
def test_a_block_row_depends_on_its_own_queries_and_earlier_keys(pool):
    q, k, _ = tensors(Shape(Lq=640, Lk=640))
    chosen = {"pool": pool, "tau": 0.6, "dense_last_rows": 0}
    kept = select_blocks(q, k, **chosen).kept
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, :, 384:], changed_k[:, :, 384:] = 7, 9
    assert torch.equal(select_blocks(changed_q, changed_k, **chosen).kept[:, :, :3], kept[:, :, :3])
    chunk = select_blocks(q[:, :, 384:512], k[:, :, :512], q_offset=384, **chosen).kept
    assert torch.equal(chunk, kept[:, :, 3:4, :4])


def blocks_of_mass(seed, B=2, H=3, nQ=9, nK=9):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(B, H, nQ, nK, generator=generator) ** 6
    visible = torch.ones(nQ, nK, dtype=torch.bool).tril()[None, None]
    return mass * visible, visible, torch.eye(nQ, dtype=torch.bool)[None, None]


@given(seed=seeds, density=st.floats(0.01, 0.999))
def test_a_density_is_kept_by_one_threshold_a_sequence(seed, density):
    mass, visible, mandatory = blocks_of_mass(seed)
    kept = select_density(mass, density, visible, mandatory)
    assert not (kept & ~visible).any() and (kept | ~mandatory).all()
    wanted = density * 3 * int(visible.sum())
    count, share = kept.sum((1, 2, 3)), mass / mass.sum(-1, keepdim=True)
    for b in range(2):
        forced = 3 * int(mandatory.sum())
        # One block more would be too many: the shares are so far apart that none ties with another.
        assert count[b] <= max(wanted, forced) and count[b] >= min(max(math.floor(wanted), forced), 135) - 1
        free = visible[0] & ~mandatory[0]
        dropped = share[b][free & ~kept[b]]
        chosen = share[b][free & kept[b]]
        assert not len(dropped) or not len(chosen) or dropped.max() < chosen.min() + 1e-5  # the search's own steps
    alone = select_density(mass[1:], density, visible, mandatory)
    assert torch.equal(alone, kept[1:])


def test_equal_blocks_fill_a_density_from_the_first():
    q, k = torch.zeros(2, 4, 1024, 16), torch.randn(2, 2, 1024, 16)
    chosen = {"budget": "density", "target_density": 0.5, "sink_blocks": 0, "local_blocks": 0, "dense_last_rows": 0}
    selection = select_blocks(q, k, causal=False, **chosen)
    assert selection.kept.sum((1, 2, 3)).tolist() == [128, 128]
    assert selection.kept[:, :2].all() and not selection.kept[:, 2:].any()


def test_full_density_keeps_everything_and_a_silent_row_too():
    mass, visible, mandatory = blocks_of_mass(0)
    assert torch.equal(select_density(mass, 1.0, visible, mandatory), visible.expand_as(mass))
    mass[0, 0, 5] = math.nan
    kept = select_density(mass, 0.3, visible, mandatory)
    assert kept[0, 0, 5].sum() == 6
    assert kept[0].sum() <= 0.3 * 3 * 45 < kept[0].sum() + 2


def test_a_density_is_a_setting():
    q, k, _ = tensors(Shape(Lq=1280, Lk=1280))
    for density in (0.6, 0.8):  # the mandatory blocks are 0.49
        selection = select_blocks(q, k, budget="density", target_density=density)
        assert density - 0.02 < selection.density <= density + 1e-6


def test_a_threshold_may_be_one_a_head():
    q, k, _ = tensors(Shape(Lq=700, Lk=700))
    each = [0.0, 0.05, 0.2, 0.9]
    kept = select_blocks(q, k, budget="threshold", threshold=each).kept
    assert torch.equal(select_blocks(q, k, budget="threshold", threshold=torch.tensor(each)).kept, kept)
    for head, one in enumerate(each):
        assert torch.equal(kept[:, head], select_blocks(q, k, budget="threshold", threshold=one).kept[:, head])
    with pytest.raises(ValueError, match="threshold must be one number or one a query head"):
        select_blocks(q, k, budget="threshold", threshold=[0.1, 0.2])
    mass, visible, _ = blocks_of_mass(1)
    assert torch.equal(select_threshold(mass, torch.tensor(-1.0), visible), visible.expand_as(mass))


@given(seed=seeds, threshold=st.sampled_from([0.0, 0.003, 0.01, 0.1]))
def test_a_scaled_threshold_is_one_on_a_long_row_s_mean_share(seed, threshold):
    mass, visible, mandatory = blocks_of_mass(seed, B=1, H=2, nQ=90, nK=90)
    select = BUDGETS["scaled_threshold"].select
    kept = select(mass, torch.full((2, 1), threshold), visible, mandatory, RRConfig())
    assert torch.equal(kept[:, :, :64], select_threshold(mass, threshold, visible, mandatory)[:, :, :64])
    for row in range(64, 90):
        over = mass[:, :, row, : row + 1] - 64 * threshold * mass[:, :, row, : row + 1].mean(-1, keepdim=True)
        sure = (over.abs() > 1e-6) & ~mandatory[:, :, row, : row + 1]
        assert torch.equal(kept[:, :, row, : row + 1] & sure, (over > 0) & sure)
    # Blocks that a mask hides count for nothing.
    hidden = torch.cat([torch.zeros(1, 1, 90, 40, dtype=torch.bool), visible], -1)
    beside = [torch.cat([torch.rand(1, 2, 90, 40), mass], -1), torch.full((2, 1), threshold)]
    beside = select(*beside, hidden, torch.zeros_like(hidden), RRConfig())
    assert torch.equal(beside[..., 40:] | mandatory, kept)


def test_a_preset_keeps_its_multiple_of_a_long_prompt_s_mean():
    q, k, _ = tensors(Shape(Lq=72 * 64, Lk=72 * 64, Hq=2, Hkv=1, B=1))
    chosen = {"preset": "best", "block_size": 64, "dense_last_rows": 0}
    scaled, one = (select_blocks(q, k, **chosen, **budget) for budget in ({}, {"budget": "threshold"}))
    assert torch.equal(scaled.kept[:, :, :64], one.kept[:, :, :64])
    assert (scaled.kept | ~one.kept).all() and scaled.kept.sum() > one.kept.sum()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_settings(preset):
    q, k, _ = tensors(Shape(Lq=700, Lk=700))
    config = RRConfig.from_preset(preset)
    assert torch.equal(select_blocks(q, k, preset=preset).kept, select_blocks(q, k, config=config).kept)
    assert RRConfig.from_preset("rr") == RRConfig()
    assert RRConfig().with_settings({"preset": preset, "stride": 32}).stride == 32


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of rr, best, fast, got 'better'"):
        RRConfig.from_preset("better")


@pytest.mark.parametrize("budget", [{"threshold": 0.1}, {"budget": "density", "target_density": 0.6}])
def test_the_best_preset_attends_to_what_it_selects(budget):
    q, k, v = tensors(Shape())
    chosen = {"preset": "best", **FREE} | budget
    out = rr_attention(q, k, v, **chosen)
    kept = select_blocks(q, k, **chosen).kept
    assert kept.float().mean() < 1
    allowed = oracle.expand(kept, (300, 300), RRConfig.from_preset("best").block_sizes) & shown_by(
        oracle.causal_element(0), Shape()
    )
    torch.testing.assert_close(out.double(), oracle.attend(q, k, v, allowed)[0], rtol=0, atol=1e-5)


def test_new_thresholds_a_head_compile_nothing():
    q, k, v = tensors(Shape())
    chosen = {"preset": "best", **FREE}
    rr_attention(q, k, v, threshold=0.1, **chosen)
    with no_compile():
        for threshold in (0.3, [0.1, 0.2, 0.3, 0.4], torch.tensor([0.5, 0.0, 0.2, 0.1])):
            rr_attention(q, k, v, threshold=threshold, **chosen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpu_estimates_what_a_cpu_does(preset):
    q, k, v = tensors(Shape(Lq=2000, Lk=2000, D=64))
    there = [x.cuda() for x in (q, k, v)]
    mass = select_blocks(*there[:2], preset=preset, min_length=0).mass.cpu()
    torch.testing.assert_close(mass, select_blocks(q, k, preset=preset).mass, rtol=0, atol=2e-2)
    chosen = {"preset": preset, "budget": "density", "target_density": 0.7, "min_length": 0}
    selection = select_blocks(*there[:2], **chosen)
    assert 0.68 < selection.density <= 0.7 + 1e-6
    block_size = RRConfig.from_preset(preset).block_sizes
    allowed = oracle.expand(selection.kept.cpu(), (2000, 2000), block_size)
    allowed = allowed & shown_by(oracle.causal_element(0), Shape(Lq=2000, Lk=2000))
    out = rr_attention(*there, **chosen).cpu().double()
    torch.testing.assert_close(out, oracle.attend(q, k, v, allowed)[0], rtol=0, atol=2e-2)

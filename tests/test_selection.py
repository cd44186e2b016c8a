"""Which blocks are kept: the rule alone on whole numbers, then the whole selection against the oracle."""

import math

import oracle
import pytest
import torch
from cases import LAYOUTS, MASKS, Shape, kept_by_rule, mask_by_name, seeds, shapes, taus, tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mask_mods import both, causal
from rr_flex import RRConfig, Selection, select_blocks
from rr_flex.selection import select_top_tau

pytestmark = pytest.mark.usefixtures("short_rows_are_long")
exact_taus = st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.875, 1.0])


@st.composite
def whole_rows(draw, smallest=0):
    """Masses whose sums are exact in float64, with many ties: [rows, nK], and two bool maps alike."""
    nK = draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=nK, max_size=nK)
    rows = draw(
        st.lists(st.tuples(st.lists(st.integers(smallest, 9), min_size=nK, max_size=nK), bits, bits), min_size=1)
    )
    mass, visible, must = (torch.tensor(column) for column in zip(*rows, strict=True))
    return mass.double() * visible, visible, must & visible


@given(rows=whole_rows(smallest=1), tau=exact_taus)
def test_keeps_the_fewest_blocks_that_reach_tau(rows, tau):
    for row in rows[0].clamp(min=1):
        kept = row[select_top_tau(row, tau)]
        assert kept.sum() >= tau * row.sum()
        assert kept.sum() - kept.min() < tau * row.sum()


@given(rows=whole_rows(), tau=exact_taus)
def test_mandatory_blocks_count_and_the_rest_is_the_fewest(rows, tau):
    mass, visible, must = rows
    kept = select_top_tau(mass, tau, visible=visible, mandatory=must)
    assert not (kept & ~visible).any()
    assert (kept | ~must).all()
    for row, kept_row, must_row in zip(mass, kept, must, strict=True):
        assert row[kept_row].sum() >= tau * row.sum()
        chosen = row[kept_row & ~must_row]
        if tau < 1 and row.sum() > 0 and chosen.numel():
            assert row[kept_row].sum() - chosen.min() < tau * row.sum()


@example(rows=(torch.zeros(1, 3).double(), torch.tensor([[True, True, False]]), torch.zeros(1, 3).bool()), tau=0.5)
@given(rows=whole_rows(), tau=exact_taus)
def test_the_rule_and_its_ties_equal_the_oracle(rows, tau):
    kept = select_top_tau(rows[0], tau, visible=rows[1], mandatory=rows[2])
    expected = oracle.per_row(lambda m, v, u, t: oracle.select_row(m, v, u, tau=t), *(x[None, None] for x in rows), tau)
    assert torch.equal(kept, expected[0, 0])


@given(rows=whole_rows(), low=exact_taus, high=exact_taus)
def test_a_larger_tau_keeps_what_a_smaller_one_keeps(rows, low, high):
    low, high = sorted((low, high))
    kept = [select_top_tau(rows[0], tau, visible=rows[1], mandatory=rows[2]) for tau in (low, high)]
    assert (kept[1] | ~kept[0]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_finite_total_keeps_what_is_visible(bad):
    mass = torch.tensor([[1.0, bad, 2.0, 3.0], [9.0, 1.0, 0.0, 0.0]])
    visible = torch.tensor([[True, True, True, False], [True, True, False, False]])
    kept = select_top_tau(mass, 0.5, visible=visible, mandatory=torch.zeros_like(visible))
    assert kept.tolist() == [[True, True, True, False], [True, False, False, False]]


def assert_selects(selection, expected):
    """The same visible blocks, mass and choice, except where rounding decides."""
    assert isinstance(selection, Selection)
    B, Hq, nQ, nK = expected.kept.shape
    assert selection.kept.dtype == torch.bool and selection.kept.shape == (B, Hq, nQ, nK)
    assert selection.mass.dtype == torch.float32 and selection.mass.shape == (B, Hq, nQ, nK)
    assert selection.visible.shape[0] in (1, B) and selection.visible.shape[1] in (1, Hq)
    assert torch.equal(selection.visible.expand(B, Hq, nQ, nK), expected.visible)
    torch.testing.assert_close(selection.mass.double(), expected.mass, rtol=1e-4, atol=1e-4)
    assert (selection.kept | ~expected.surely_kept).all(), "a block is missing"
    assert not (selection.kept & expected.surely_dropped).any(), "a block too many"
    assert not (selection.kept & ~expected.visible).any()
    assert (selection.kept | ~expected.must).all()


def layout_settings(layout):
    (sq, sk), block_size = layout
    return {"query_stride": sq, "key_stride": sk, "block_size": block_size}


def oracle_settings(layout, **rest):
    return {"strides": layout[0], "block_size": layout[1], **rest}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("Lq", "Lk"), [(640, 640), (257, 384), (500, 700), (1, 300), (300, 1), (300, 200)])
def test_keeps_exactly_the_oracle_s_blocks(layout, order, Lq, Lk):
    q, k, _ = tensors(Shape(Lq=Lq, Lk=Lk), seed=Lq + order)
    expected = oracle.select(q, k, order=order, tau=0.8, **oracle_settings(layout))
    assert torch.equal(expected.kept, expected.surely_kept), "a near tie: choose another seed"
    selection = select_blocks(q, k, order=order, tau=0.8, **layout_settings(layout))
    assert_selects(selection, expected)
    assert torch.equal(selection.kept, expected.kept)


@settings(max_examples=60)
@given(data=st.data(), shape=shapes(), layout=st.sampled_from(LAYOUTS), order=st.sampled_from([1, 2]), seed=seeds)
def test_any_setting_selects_as_the_oracle(data, shape, layout, order, seed):
    q, k, _ = tensors(shape, seed)
    rule = data.draw(kept_by_rule(shape.Hq))
    head_offset = data.draw(st.integers(0, 9))
    q_offset = data.draw(st.one_of(st.none(), st.integers(0, shape.Lk)))
    scale = data.draw(st.sampled_from([None, 0.1, 0.5]))
    rest = {"order": order, "head_offset": head_offset, "q_offset": q_offset, "scale": scale, **rule}
    expected = oracle.select(q, k, **oracle_settings(layout, **rest))
    assert_selects(select_blocks(q, k, **layout_settings(layout), **rest), expected)


@settings(max_examples=10)
@given(data=st.data(), name=st.sampled_from(MASKS), shape=shapes(bottom_right=True), seed=seeds)
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_any_mask_selects_as_the_oracle(data, name, layout, shape, seed):
    q, k, _ = tensors(shape, seed)
    mask, key_valid = mask_by_name(name, shape, seed)
    rule = data.draw(kept_by_rule(shape.Hq))
    expected = oracle.select(q, k, mask, key_valid=key_valid, **oracle_settings(layout, order=2, **rule))
    assert_selects(
        select_blocks(q, k, mask_mod=mask, causal=mask is None, order=2, **layout_settings(layout), **rule), expected
    )


@settings(max_examples=10)
@given(name=st.sampled_from(MASKS), shape=shapes(bottom_right=True), tau=taus, seed=seeds)
def test_causal_with_a_mask_means_both(name, shape, tau, seed):
    q, k, _ = tensors(shape, seed)
    mask, key_valid = mask_by_name(name, shape, seed)
    stated = both(causal(shape.Lk - shape.Lq), mask)
    expected = oracle.select(q, k, stated, key_valid=key_valid, tau=tau)
    assert_selects(select_blocks(q, k, mask_mod=mask, causal=True, tau=tau), expected)


def in_runs_of_37(b, h, q_idx, kv_idx):
    return q_idx // 37 == kv_idx // 37


def every_other_head_looks_back(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & ((h % 2 == 0) | (q_idx - kv_idx < 50))


@pytest.mark.parametrize("mask", [in_runs_of_37, every_other_head_looks_back])
def test_a_plain_function_is_a_mask(mask):
    q, k, _ = tensors(Shape(Lq=500, Lk=500))
    assert_selects(select_blocks(q, k, mask_mod=mask, causal=mask is None, tau=0.7), oracle.select(q, k, mask, tau=0.7))


def test_not_causal_sees_everything():
    q, k, _ = tensors(Shape(Lq=500, Lk=400))
    expected = oracle.select(q, k, lambda b, h, q_idx, kv_idx: q_idx >= 0, tau=0.7)
    assert_selects(select_blocks(q, k, causal=False, tau=0.7), expected)


@settings(max_examples=15)
@given(shape=shapes(), tau=taus, seed=seeds, layout=st.sampled_from(LAYOUTS))
def test_covers_tau_with_the_fewest_blocks(shape, tau, seed, layout):
    """By arithmetic on the selection's own mass; 1e-5 of a row is left to float32 sums."""
    q, k, _ = tensors(shape, seed)
    selection = select_blocks(q, k, tau=tau, **layout_settings(layout))
    must = oracle.select(q, k, **oracle_settings(layout)).must
    mass, kept = selection.mass.double(), selection.kept
    covered, total = (mass * kept).sum(-1), mass.sum(-1)
    assert (covered >= (tau - 1e-5) * total).all()
    smallest = mass.masked_fill(~kept | must, math.inf).amin(-1)
    free = smallest.isfinite() & (total > 0)
    assert ((covered - smallest)[free] < ((tau + 1e-5) * total)[free]).all()


@settings(max_examples=15)
@given(shape=shapes(), seed=seeds, layout=st.sampled_from(LAYOUTS), head_offset=st.integers(0, 9))
def test_a_row_s_mass_is_the_number_of_its_sampled_queries_that_see_something(shape, seed, layout, head_offset):
    q, k, _ = tensors(shape, seed)
    mass = select_blocks(q, k, head_offset=head_offset, **layout_settings(layout)).mass
    (sq, _), (bq, _) = layout
    shown = oracle.pairs(oracle.causal_element(shape.Lk - shape.Lq), *shape[:2], shape.Lq, shape.Lk)
    for h in range(shape.Hq):
        sees = shown[:, h, oracle.sampled_indices(shape.Lq, sq, h, head_offset)].any(-1)  # [B, nq]
        expected = torch.stack([part.sum(1) for part in sees.split(bq // sq, 1)], 1)
        torch.testing.assert_close(mass[:, h].sum(-1), expected.float(), rtol=1e-5, atol=1e-5)


def test_settings_are_a_config_s_fields():
    q, k, _ = tensors(Shape(Lq=500, Lk=500))
    chosen = {"stride": 16, "block_size": (128, 64), "tau": 0.6, "order": 2, "sink_blocks": 2, "local_blocks": 0}
    kept = select_blocks(q, k, **chosen).kept
    assert torch.equal(select_blocks(q, k, config=RRConfig(**chosen)).kept, kept)
    assert torch.equal(select_blocks(q, k).kept, select_blocks(q, k, config=RRConfig()).kept)


def test_per_head_tau_is_a_list_or_a_tensor():
    q, k, _ = tensors(Shape(Lq=500, Lk=500))
    tau = [0.3, 0.6, 0.9, 1.0]
    kept = select_blocks(q, k, tau=tau).kept
    assert torch.equal(select_blocks(q, k, tau=torch.tensor(tau)).kept, kept)
    for head, one in enumerate(tau):
        assert torch.equal(kept[:, head], select_blocks(q, k, tau=one).kept[:, head])


def test_density_is_the_kept_share_of_what_is_visible():
    q, k, _ = tensors(Shape(Lq=500, Lk=500))
    selection = select_blocks(q, k, tau=0.5)
    visible = selection.visible.expand_as(selection.kept)
    assert float(selection.density) == pytest.approx((selection.kept.sum() / visible.sum()).item())
    assert float(select_blocks(q, k, tau=1.0).density) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("rule", [{}, {"mandatory": "add"}, {"budget": "threshold", "threshold": 0.1}, {"order": 2}])
def test_a_bad_number_never_costs_a_mandatory_block(bad, where, rule):
    q, k, _ = tensors(Shape(Lq=500, Lk=500))
    expected = oracle.select(q, k)
    (q if where == "q" else k)[0, 1, 130, 3] = bad
    kept = select_blocks(q, k, **rule).kept
    assert (kept | ~expected.must).all()
    assert not (kept & ~expected.visible).any()
    other = torch.zeros_like(kept[0])  # the other sequence of the batch is as ever
    assert torch.equal(kept[1], select_blocks(*tensors(Shape(Lq=500, Lk=500))[:2], **rule).kept[1]), other

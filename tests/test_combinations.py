"""Rules that put estimates together, each against its own formula in float64; budgets against the library's rules."""

import oracle
import pytest
import torch
from cases import Shape, seeds, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.study.combinations import (
    by_sampled_output,
    calibrated,
    coarse_to_fine,
    hedged,
    kept_coarse_to_fine,
    mean_of_squares,
    weighed_by_disagreement,
    with_row_before,
)
from benchmarks.study.parts import OracleAttention
from rr_flex import RRConfig, select_blocks
from rr_flex.evaluation import sparse_model
from rr_flex.evaluation.block_outputs import KeptBlocks
from rr_flex.evaluation.equal_density import kept_at_densities, visible_and_mandatory
from rr_flex.evaluation.judging import judge_text
from rr_flex.evaluation.rules import Case
from rr_flex.selection import select_top_tau

SMALL = Shape(B=1, Lq=512, Lk=512)
BEST = RRConfig.from_preset("best", block_size=(128, 64))


def share(case, **chosen):
    """A block's share of its row by the library, whose estimates have their own float64 tests."""
    mass = select_blocks(case.q, case.k, **{"preset": "best", "block_size": (128, 64)} | chosen).mass.double()
    return mass / mass.sum(-1, keepdim=True)


@pytest.fixture(scope="module")
def case():
    q, k, v = tensors(SMALL)
    return Case(q, k, v, (3,))


def agrees(rule, case, expected):
    torch.testing.assert_close(rule.weigh(case).double(), expected, rtol=0, atol=2e-6)


def test_hedges_are_their_formulas(case):
    keys, queries = share(case, pool="keys"), share(case, pool="queries", order=1)
    agrees(hedged("mean", BEST, 0.25), case, 0.25 * keys + 0.75 * queries)
    agrees(hedged("larger", BEST), case, keys.maximum(queries))
    both = (keys * queries).sqrt()
    agrees(hedged("geometric", BEST), case, both / both.sum(-1, keepdim=True))


def test_priors_are_their_formulas(case):
    own = share(case)
    rows = [own[:, :, 0], *(0.75 * own[:, :, row] + 0.25 * own[:, :, row - 1] for row in range(1, 4))]
    agrees(with_row_before(BEST, 0.25), case, torch.stack(rows, 2))


def probabilities(case):
    """One query in 8 and its probability of each run of 64 keys, keys pooled by 32 at order 2; loops, float64."""
    found = torch.zeros(4, 64, 8).double()
    for h in range(4):
        keys = case.k[0, h // 2].double().unflatten(0, (16, 32))
        mean, variance = keys.mean(1), keys.var(1, correction=0)
        for i in range(64):
            position = 8 * i + h
            query = case.q[0, h, position].double() / 4
            logits = mean @ query + 0.5 * variance @ query**2
            seen = logits[: position // 32 + 1].softmax(0)
            for j, each in enumerate(seen.tolist()):
                found[h, i, j // 2] += each
    return found


def test_weights_of_sampled_queries_are_their_formulas(case):
    p = probabilities(case)
    squares = p.square().unflatten(1, (4, 16)).mean(2).sqrt()[None]
    agrees(mean_of_squares(BEST), case, (squares + share(case, pool="queries", order=1)) / 2)
    halves = share(case, pool="queries", order=1, block_size=64).square().unflatten(2, (4, 2)).mean(3).sqrt()
    agrees(mean_of_squares(BEST.with_settings({"query_pool": 64})), case, (squares + halves) / 2)
    each = p.unflatten(1, (4, 16))
    keys = each.mean(2)
    away = [0.5 * (each[:, :, sample] - keys).abs().sum(-1) for sample in range(16)]
    weight = torch.stack(away).mean(0).sqrt()[None, ..., None]
    expected = weight * keys + (1 - weight) * share(case, pool="queries", order=1)
    agrees(weighed_by_disagreement(BEST, 0.5), case, expected)
    value = case.v.double().unflatten(2, (8, 64)).mean(3)[0].repeat_interleave(2, 0)  # H nK Dv
    distance = torch.zeros(1, 4, 4, 8).double()
    for h in range(4):
        for row in range(4):
            own = p[h, 16 * row : 16 * row + 16]  # queries nK
            away = torch.stack([(value[h] - each @ value[h]).norm(dim=-1) for each in own])
            distance[0, h, row] = (own * away).sum(0) / own.sum(0).clamp(min=1e-30)
    expected = share(case) * distance
    torch.testing.assert_close(by_sampled_output(BEST).weigh(case).double(), expected, rtol=1e-3, atol=1e-5)


def test_a_profile_s_thresholds_divide_the_shares(case):
    levels = [0.1, 0.2, 0.4, 0.5]
    expected = share(case) / torch.tensor(levels).double()[:, None, None]
    torch.testing.assert_close(calibrated(BEST, {3: levels}).weigh(case).double(), expected, rtol=1e-4, atol=1e-6)


def weights(seed):
    drawn = torch.Generator().manual_seed(seed)
    visible, mandatory = visible_and_mandatory(2048, (128, 64), torch.device("cpu"))
    coarse, fine = ((0.1 + torch.rand(1, 3, 16, 32, generator=drawn)) ** 4 * visible for _ in range(2))
    return coarse / coarse.sum(-1, keepdim=True), fine / fine.sum(-1, keepdim=True), visible, mandatory


@settings(max_examples=20)
@given(seed=seeds, density=st.sampled_from([0.4, 0.6]))
def test_coarse_decides_the_clear_cases_and_fine_the_others(seed, density):
    coarse, fine, visible, mandatory = weights(seed)
    given_blocks = {"visible": visible, "mandatory": mandatory}

    def settle(band, finer=fine):
        (kept,), (near,) = kept_coarse_to_fine(coarse, finer, **given_blocks, densities=[density], band=band)
        return kept, near

    (by_coarse,), (by_fine,) = (
        kept_at_densities(weight, visible, mandatory, densities=[density], spending="threshold")
        for weight in (coarse, fine)
    )
    assert torch.equal(settle(1.0)[0], by_coarse) and settle(1.0)[1] == 0
    assert torch.equal(settle(4.0, coarse)[0], by_coarse)
    wide, everything = settle(1e12)
    free = visible & ~mandatory
    assert torch.equal(wide, by_fine)
    assert everything == pytest.approx((free & (coarse > 0)).sum().item() / (3 * visible.sum().item()))
    kept, near = settle(2.0)
    cut = coarse[by_coarse & free].min()
    clear = free & ((coarse <= cut / 2) | (coarse >= cut * 2))
    settled = ((clear | mandatory) & visible).sum().item()
    assert near == pytest.approx(1 - settled / (3 * visible.sum().item()), abs=1e-6)
    assert kept.sum() == by_coarse.sum()
    assert torch.equal(kept & clear, by_coarse & clear)
    between = free & ~clear
    assert fine[kept & between].min() >= fine[between & ~kept].max()


@settings(max_examples=20)
@given(seed=seeds, density=st.sampled_from([0.35, 0.5, 0.8]))
def test_top_tau_at_a_density_is_the_library_s_at_some_tau(seed, density):
    coarse, _, visible, mandatory = weights(seed)
    (kept,) = kept_at_densities(coarse, visible, mandatory, densities=[density], spending="top_tau")
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fewer = select_top_tau(coarse, middle, visible, mandatory).sum() < kept.sum()
        low, high = (middle, high) if fewer else (low, middle)
    assert torch.equal(select_top_tau(coarse, high, visible, mandatory), kept)


def test_coarse_to_fine_and_priors_are_judged_as_rules():
    layers = {layer: tensors(SMALL, layer) for layer in (1, 2)}
    rules = {"fine": coarse_to_fine(BEST.with_settings({"stride": 32}), BEST), "prior": with_row_before(BEST, 0.1)}
    records = judge_text("text", layers, rules, densities=(0.8, 1.0), scopes=("layer",), judged=[2])
    assert [record.layer for record in records] == [2] * 4
    assert all(record.error < 1e-6 for record in records if record.density == 1)


def test_attention_in_strips_is_attention_over_the_blocks(monkeypatch):
    q, k, v = tensors(Shape(Lq=400, Lk=400))
    kept = torch.rand(2, 4, 4, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    kept[..., 0] = True
    shown = oracle.pairs(oracle.causal_element(0), 2, 4, 400, 400) & oracle.expand(kept, (400, 400), (128, 64))
    expected, _ = oracle.attend(q, k, v, shown)
    for elements in (1, 2 * 4 * 256 * 400, 1 << 26):
        monkeypatch.setattr(sparse_model, "STRIP_ELEMENTS", elements)
        out = sparse_model.attend_to_blocks(q, k, v, KeptBlocks(kept, (128, 64)), scale=0.25)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_the_oracle_s_attention_keeps_what_has_true_mass():
    q, k, v = tensors(SMALL)
    attention = OracleAttention((128, 64), 0.0)
    dense = sparse_model.attend_densely(q, k, v, layer=0, scale=0.25, window=None)
    torch.testing.assert_close(attention(q, k, v, layer=0, scale=0.25, window=None), dense)
    assert attention.density == 1
    few = OracleAttention((128, 64), 0.9)
    few(q, k, v, layer=0, scale=0.25, window=None)
    visible, mandatory = visible_and_mandatory(512, (128, 64), q.device)
    assert few.density == pytest.approx((mandatory.sum() / visible.sum()).item(), abs=0.03)

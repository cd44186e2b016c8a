"""The measures, against loops over single pairs and against arithmetic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rr_flex.evaluation import compare_logits, density, output_error, recalled_mass, true_block_mass


def mass_by_loops(q, k, block_q, block_k, sees):
    """Every probability on its own, in float64."""
    B, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[1:3]
    mass = torch.zeros(B, Hq, math.ceil(Lq / block_q), math.ceil(Lk / block_k), dtype=torch.float64)
    for b in range(B):
        for h in range(Hq):
            scores = q[b, h].double() @ k[b, h // (Hq // Hkv)].double().T / math.sqrt(D)
            for i in range(Lq):
                keys = [j for j in range(Lk) if sees(b, h, i, j)]
                if keys:
                    for j, probability in zip(keys, scores[i, keys].softmax(0), strict=True):
                        mass[b, h, i // block_q, j // block_k] += probability
    return mass


@given(
    Lq=st.integers(1, 20),
    Lk=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    block=st.sampled_from([(4, 4), (8, 4), (16, 8)]),
    seed=st.integers(0, 99),
)
def test_true_mass_is_every_probability_summed(Lq, Lk, heads, block, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads[0], Lq, 8, generator=generator)
    k = torch.randn(2, heads[1], Lk, 8, generator=generator)
    expected = mass_by_loops(q, k, *block, lambda b, h, i, j: j <= i + Lk - Lq)
    torch.testing.assert_close(true_block_mass(q, k, block_size=block).double(), expected, atol=1e-5, rtol=0)


def test_true_mass_obeys_a_mask_that_differs_by_batch_and_head():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 10, 8, generator=generator), torch.randn(2, 1, 10, 8, generator=generator)
    width = torch.tensor([[1, 3], [5, 0]])
    mass = true_block_mass(q, k, block_size=4, mask_mod=lambda b, h, i, j: (i - j >= 0) & (i - j < width[b, h]))
    expected = mass_by_loops(q, k, 4, 4, lambda b, h, i, j: 0 <= i - j < width[b, h])
    torch.testing.assert_close(mass.double(), expected, atol=1e-5, rtol=0)
    assert mass[1, 1].eq(0).all()


def test_measures_by_hand():
    true_mass = torch.tensor([[[[8.0, 0.0], [2.0, 6.0]], [[8.0, 0.0], [8.0, 0.0]]]])
    kept = torch.tensor([[[[True, False], [False, True]], [[True, False], [True, True]]]])
    visible = torch.tensor([[True, False], [True, True]])
    assert recalled_mass(true_mass, kept).tolist() == [[0.875, 1.0]]
    torch.testing.assert_close(density(kept, visible), torch.tensor([[2 / 3, 1.0]]))
    reference = torch.tensor([[[[3.0, 4.0]], [[0.0, 2.0]]]])
    error = output_error(reference + torch.tensor([0.0, 1.0]), reference)
    torch.testing.assert_close(error, torch.tensor([[0.2, 0.5]]))


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_two_runs_compared_by_hand(chunk):
    p = torch.tensor([[0.5, 0.5 - 1e-3, 1e-3], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]).double()
    q = torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.3, 0.3], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]).double()
    ids = torch.tensor([1, 0, 2, 1])
    result = compare_logits(p.log(), q.log(), ids, chunk=chunk)
    assert result.perplexity == pytest.approx((0.5 * 0.6 * 0.8) ** (-1 / 3), rel=1e-5)
    assert result.perplexity_compared == pytest.approx((0.5 * 0.3 * 0.8) ** (-1 / 3), rel=1e-5)
    assert result.agreement == 0.75
    assert result.kl == pytest.approx((p * (p / q).log()).sum().item() / 4, rel=1e-5)


def test_a_run_compared_with_itself():
    logits = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    result = compare_logits(logits, logits, torch.arange(10) % 7)
    assert result.perplexity == result.perplexity_compared and result.agreement == 1 and result.kl == 0

"""The oracle against arithmetic alone, so that it can be trusted against the library."""

import math

import oracle
import pytest
import torch


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_worked_example_of_the_block_rule():
    """Lq = 257, Lk = 384: queries stand at 127..383."""
    shown = oracle.pairs(oracle.causal_element(127), 1, 1, 257, 384)
    visible, whole = oracle.blocks(shown, (128, 128))
    assert visible.int().tolist() == [[[[1, 1, 0], [1, 1, 1], [1, 1, 1]]]]
    assert whole.int().tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    settings = {"sink_blocks": 0, "local_blocks": 1, "dense_last_rows": 0, "key_valid": None}
    local = oracle.mandatory_blocks(visible, (257, 384), 127, (128, 128), **settings)
    assert local.int().tolist() == [[[[1, 1, 0], [0, 1, 1], [0, 0, 1]]]]


def test_mandatory_blocks_start_at_the_first_real_key():
    visible = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    key_valid = torch.arange(256) >= torch.tensor([[0], [70]])
    settings = {"sink_blocks": 1, "local_blocks": 2, "dense_last_rows": 1, "key_valid": key_valid}
    must = oracle.mandatory_blocks(visible, (256, 256), 0, (64, 64), **settings)
    assert must[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert must[1, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("Lq", "stride", "head", "head_offset", "expected"),
    [
        (20, 8, 0, 0, [0, 8, 16]),
        (20, 8, 3, 0, [3, 11, 19]),
        (20, 8, 7, 0, [7, 15, 19]),
        (20, 8, 1, 6, [7, 15, 19]),
        (1, 8, 5, 0, [0]),
        (16, 4, 6, 0, [2, 6, 10, 14]),
    ],
)
def test_sampled_indices(Lq, stride, head, head_offset, expected):
    assert oracle.sampled_indices(Lq, stride, head, head_offset) == expected


def test_pooling_by_hand():
    k = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]).view(1, 1, 5, 1)
    mean, var, count = oracle.pool(k, 2)
    assert mean.flatten().tolist() == [2, 6, 9]
    assert var.flatten().tolist() == [1, 1, 0]
    assert count.tolist() == [[2, 2, 1]]
    mean, var, count = oracle.pool(k, 2, torch.tensor([[False, False, False, True, True]]))
    assert mean.flatten().tolist() == [0, 7, 9]
    assert var.flatten().tolist() == [0, 0, 0]
    assert count.tolist() == [[0, 1, 1]]


def test_zero_queries_spread_their_mass_evenly():
    """Every sampled query gives each visible stride the same share, so masses are counts over counts."""
    q, k = torch.zeros(1, 1, 32, 2), randn(1, 1, 32, 2)
    shown = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    settings = {"scale": 1.0, "strides": (4, 8), "block_size": (16, 16)}
    assert oracle.block_mass(q, k, shown, **settings).flatten().tolist() == [2, 2, 2, 2]
    causal = oracle.pairs(oracle.causal_element(0), 1, 1, 32, 32)
    # Sampled 0 4 8 12 | 16 20 24 28 see 1 1 2 2 | 3 3 4 4 of the strides that start at 0 8 16 24.
    expected = torch.tensor([4, 0, 2 / 3 * 2 + 2 / 4 * 2, 1 / 3 * 2 + 2 / 4 * 2]).double()
    torch.testing.assert_close(oracle.block_mass(q, k, causal, **settings).flatten(), expected)


def test_a_stride_counts_by_its_real_keys():
    """Zero queries, 13 keys of which the first 3 are padding: strides of 4 with 1, 4, 4 and 1 real keys."""
    q, k = torch.zeros(1, 1, 4, 2), randn(1, 1, 13, 2)
    key_valid = torch.arange(13)[None] >= 3
    shown = key_valid[:, None, None].expand(1, 1, 4, 13)
    settings = {"scale": 1.0, "strides": (4, 4), "block_size": (4, 8), "key_valid": key_valid}
    torch.testing.assert_close(oracle.block_mass(q, k, shown, **settings).flatten(), torch.tensor([0.5, 0.5]).double())
    settings |= {"block_size": (4, 4)}
    expected = torch.tensor([0.1, 0.4, 0.4, 0.1]).double()
    torch.testing.assert_close(oracle.block_mass(q, k, shown, **settings).flatten(), expected)


def test_stride_1_is_the_true_mass():
    q, k = randn(1, 2, 96, 8), randn(1, 1, 96, 8, seed=1)
    shown = oracle.pairs(oracle.causal_element(0), 1, 2, 96, 96)
    score = (q @ k.mT / math.sqrt(8)).masked_fill(~shown, -math.inf)
    expected = score.softmax(-1).unflatten(3, (3, 32)).sum(-1).unflatten(2, (3, 32)).sum(3)
    for order in (1, 2):
        settings = {"scale": 8**-0.5, "strides": (1, 1), "block_size": (32, 32), "order": order}
        torch.testing.assert_close(oracle.block_mass(q, k, shown, **settings), expected)


def test_second_order_is_a_taylor_series():
    """log-mean-exp of a stride's logits = mean + variance / 2 + O(scale^3), when the variance is the logits' own."""
    q, k = randn(1, 1, 1, 1), randn(1, 1, 8, 1, seed=1)
    mean, var, _ = oracle.pool(k, 8)
    errors = []
    for scale in (0.1, 0.05):
        exact = torch.logsumexp(scale * q @ k.mT, -1) - math.log(8)
        errors.append((exact - scale * q * mean - 0.5 * scale**2 * q**2 * var).abs().item())
    assert errors[1] < errors[0] / 6


@pytest.mark.parametrize(
    ("mass", "visible", "must", "rule", "kept"),
    [
        ([1, 2, 3, 4], {0, 1, 2, 3}, set(), {"tau": 0.4}, {3}),
        ([1, 2, 3, 4], {0, 1, 2, 3}, set(), {"tau": 0.5}, {2, 3}),
        ([1, 2, 3, 4], {0, 1, 2, 3}, {0}, {"tau": 0.5}, {0, 3}),
        ([1, 2, 3, 4], {0, 1, 2, 3}, {0, 1, 2}, {"tau": 0.5}, {0, 1, 2}),
        ([1, 2, 3, 4], {0, 1, 2, 3}, {0}, {"tau": 0.5, "mandatory": "add"}, {0, 2, 3}),
        ([2, 2, 2, 2], {0, 1, 2, 3}, set(), {"tau": 0.5}, {0, 1}),
        ([0, 0, 4, 0], {0, 1, 2}, set(), {"tau": 1.0}, {0, 1, 2}),
        ([0, 0, 4, 0], {0, 1, 2}, set(), {"tau": 0.75}, {2}),
        ([0, 0, 0, 0], {0, 2}, {0}, {"tau": 0.5}, {0, 2}),
        ([1, math.nan, 0, 0], {0, 1}, {0}, {"tau": 0.5}, {0, 1}),
        ([1, math.inf, 0, 0], {0, 1}, {0}, {"tau": 0.5}, {0, 1}),
        ([1, 1, 2, 4], {0, 1, 2, 3}, {0}, {"budget": "threshold", "threshold": 0.25}, {0, 3}),
        ([0, 0, 0, 0], {0, 1}, {0}, {"budget": "threshold", "threshold": 0.25}, {0, 1}),
        ([1] * 64, set(range(64)), set(), {"budget": "scaled_threshold", "threshold": 1 / 64}, set()),
        ([1] * 127 + [2], set(range(128)), {5}, {"budget": "scaled_threshold", "threshold": 1 / 64}, {5, 127}),
        ([1] + [0] * 126 + [2], {0, 127}, set(), {"budget": "scaled_threshold", "threshold": 0.6}, {127}),
    ],
)
def test_selecting_by_hand(mass, visible, must, rule, kept):
    assert oracle.select_row(mass, visible, must, **rule) == kept


def test_only_what_rounding_cannot_change_is_sure():
    row, everything = [1.0, 2.0, 2.0, 5.0], {0, 1, 2, 3}
    assert oracle.sure_row(row, everything, set(), 1e-5, tau=0.6) == ({3}, {0})
    assert oracle.sure_row(row, everything, set(), 1e-5, tau=0.8) == ({1, 2, 3}, {0})
    assert oracle.sure_row(row, everything, set(), 1e-5, tau=0.5) == ({3}, {0})
    assert oracle.sure_row(row, everything, {1}, 1e-5, tau=0.6) == ({1, 3}, {0, 2})


def test_attention_by_hand():
    q, k = torch.zeros(1, 2, 3, 2), randn(1, 1, 3, 2)
    v = torch.tensor([3.0, 6.0, 9.0]).view(1, 1, 3, 1)
    allowed = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool().expand(1, 2, 3, 3)
    out, lse = oracle.attend(q, k, v, allowed)
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 6, 0, 3, 6, 0]).double())
    torch.testing.assert_close(lse[0, 0], torch.tensor([0.0, math.log(3), -math.inf]).double())


def test_attention_equals_torch():
    q, k, v = randn(2, 4, 40, 8), randn(2, 2, 50, 8, seed=1), randn(2, 2, 50, 8, seed=2)
    allowed = oracle.pairs(oracle.causal_element(10), 2, 4, 40, 50)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    torch.testing.assert_close(oracle.attend(q, k, v, allowed)[0], expected)

"""Dense or sparse by work: the arithmetic is what its page says, and the decision follows from the two times."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rr_flex import RRConfig
from rr_flex.kernels import deciding
from rr_flex.kernels.break_even import (
    WORTH,
    Costs,
    Work,
    break_even_density,
    decide,
    dense_ms,
    sparse_ms,
    visible_pairs,
)
from rr_flex.kernels.deciding import (
    KEPT,
    KEPT_OF_LONGEST,
    LONGEST,
    decide_call,
    expected_density,
    keeps,
    shortest_sparse,
)
from rr_flex.kernels.options import TUNED, costs_of

positive = st.floats(0.001, 20)
some_costs = st.builds(
    Costs,
    **dict.fromkeys(("dense_host", "dense_call", "host", "call"), st.floats(0, 3)),
    **dict.fromkeys(("dense_block", "pooled_key", "scored_block", "kept_block", "row_block"), positive),
)
some_work = st.builds(
    lambda batch, kv_heads, group, queries, before: Work(
        batch=batch,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        queries=queries,
        keys=queries + before,
        first_position=before,
    ),
    st.integers(1, 32),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 1 << 17),
    st.integers(0, 1 << 20),
)


@given(queries=st.integers(1, 40), keys=st.integers(1, 40), first=st.integers(-50, 50))
def test_visible_pairs_are_those_of_the_causal_mask(queries, keys, first):
    counted = sum(first + i >= j for i in range(queries) for j in range(keys))
    assert visible_pairs(queries, keys, first) == counted


# At a density of 1 there is nothing to skip.
@given(work=some_work, costs=some_costs, density=st.floats(0, 1, exclude_max=True))
def test_sparse_is_chosen_where_it_takes_less_than_its_share_of_dense(work, costs, density):
    sparse, allowed = sparse_ms(work, costs, density), WORTH * dense_ms(work, costs)
    if abs(sparse - allowed) > 1e-9 * allowed:
        assert decide(work, costs, density).sparse == (sparse < allowed)
        assert (density < break_even_density(work, costs)) == (sparse < allowed)


@given(work=some_work, costs=some_costs)
def test_a_state_and_fewer_blocks_never_speak_for_dense(work, costs):
    with_state = replace(work, pooled_keys=min(work.queries, work.keys))
    assert break_even_density(with_state, costs) >= break_even_density(work, costs)
    densities = [0.0, 0.1, 0.25, 0.5, 1.0]
    chosen = [decide(work, costs, density).sparse for density in densities]
    assert chosen == sorted(chosen, reverse=True)


def test_the_reason_says_both_times():
    work = Work(batch=1, heads=32, kv_heads=8, queries=16384, keys=16384, first_position=0)
    same = {"dense_host": 0.1, "dense_call": 0.0, "dense_block": 12.0, "host": 0.3}
    costs = Costs(**same, call=0.1, pooled_key=2.0, scored_block=0.5, kept_block=14.0, row_block=6000.0)
    blocks = 32 * 16384 * 16385 / 2 / 128**2
    assert work.visible_blocks == blocks and work.keys_to_pool == 8 * 16384
    assert dense_ms(work, costs) == pytest.approx(12e-6 * blocks)
    assert sparse_ms(work, costs, 0.25) == pytest.approx(0.1 + 2e-6 * 8 * 16384 + 4e-6 * blocks + 0.25 * 6e-3 * 128)
    reason = decide(work, costs, 0.25).reason
    assert "1 × 16,384 queries and 16,384 keys" in reason and "dense 3.15 ms" in reason and "sparse 1.60 ms" in reason
    everyone = Work(batch=2, heads=4, kv_heads=4, queries=128, keys=256)
    assert everyone.visible_blocks == 2 * 4 * 2


def test_bad_values_are_named():
    entry = dict.fromkeys(Costs.__dataclass_fields__, 1.0)
    with pytest.raises(ValueError, match="kept_block must be at least 0, got -1"):
        Costs(**entry | {"kept_block": -1.0})
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        Work(batch=1, heads=1, kv_heads=1, queries=0, keys=1)
    with pytest.raises(ValueError, match=r"pooled_keys must lie in \[0, 5\], got 6"):
        Work(batch=1, heads=1, kv_heads=1, queries=1, keys=5, pooled_keys=6)
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], got 2"):
        decide(Work(batch=1, heads=1, kv_heads=1, queries=1, keys=5), Costs(**entry), 2)


ENTRIES = [
    (card, kernel, Costs(**costs))
    for card, head_dims in TUNED.items()
    for dtypes in head_dims.values()
    for entry in dtypes.values()
    for kernel, costs in entry.get("costs", {}).items()
]


def test_the_table_holds_costs_that_a_decision_can_go_by():
    """As measured: half of 32,768 tokens pays, all of them does not, nor on a card a few hundred; and a longer prompt
    pays wherever a shorter one does, which `shortest_sparse` goes by."""
    assert {card for card, _, _ in ENTRIES} == {"9.0", "cpu"}
    for card, _, costs in ENTRIES:
        shape = {"batch": 1, "heads": 32 if card == "9.0" else 8, "kv_heads": 8 if card == "9.0" else 2}

        def prompt(tokens, shape=shape):
            return Work(**shape, queries=tokens, keys=tokens, first_position=0)

        assert decide(prompt(32768), costs, 0.4).sparse and not decide(prompt(32768), costs, 1.0).sparse
        assert card == "cpu" or not decide(prompt(256), costs, 0.5).sparse
        most = [break_even_density(prompt(256 << n), costs) for n in range(10)]
        assert all(longer >= shorter - 1e-9 for shorter, longer in pairwise(most))


def test_what_is_expected_is_the_mandatory_blocks_and_what_the_budget_says():
    work = Work(batch=1, heads=1, kv_heads=1, queries=1024, keys=1024, first_position=0)
    visible = 1024 * 1025 / 2 / 128**2
    fixed = (8 * 2 + 8) / visible
    assert expected_density(work, keeps(RRConfig(tau=0.9))) == pytest.approx(fixed + (1 - fixed) * 0.27)
    assert expected_density(work, keeps(RRConfig(tau=1.0))) == 1.0
    assert keeps(RRConfig(tau=[0.9, 1.0])).share == pytest.approx(0.39)
    no_floor = {"sink_blocks": 0, "local_blocks": 0, "dense_last_rows": 0}
    for density in (0.1, 0.5):
        by_density = {"budget": "density", "target_density": density}
        assert expected_density(work, keeps(RRConfig(**by_density, **no_floor))) == density
        assert expected_density(work, keeps(RRConfig(**by_density))) == max(fixed, density)
    by_threshold = {"budget": "threshold", **no_floor}
    assert expected_density(work, keeps(RRConfig(threshold=0.001, **by_threshold))) == KEPT
    assert expected_density(work, keeps(RRConfig(threshold=0.0, **by_threshold))) == KEPT
    # No more than one share of a row exceeds so much.
    assert expected_density(work, keeps(RRConfig(threshold=0.9, **by_threshold))) == pytest.approx(8 / 0.9 / visible)
    long, scaled = replace(work, queries=128 * 300, keys=128 * 300), {"budget": "scaled_threshold", **no_floor}
    kept = KEPT_OF_LONGEST + (KEPT - KEPT_OF_LONGEST) * 64 / (38401 / 2 / 128)  # blocks of a row, mean
    for threshold, share in ((0.01, kept), (0.25, 1 / 16), (0.9, 1 / 57.6)):
        assert expected_density(long, keeps(RRConfig(threshold=threshold, **scaled))) == pytest.approx(share)
    for threshold in (0.001, 0.9):  # of rows of up to 64 blocks both are the same
        same = RRConfig(threshold=threshold, **by_threshold), RRConfig(threshold=threshold, **scaled)
        assert expected_density(work, keeps(same[0])) == expected_density(work, keeps(same[1]))
    taus = [expected_density(work, keeps(RRConfig(tau=tau, **no_floor))) for tau in (0.01, 0.5, 0.8, 0.93, 0.99)]
    assert taus == sorted(taus)
    nothing_seen = replace(work, first_position=-2000)
    assert expected_density(nothing_seen, keeps(RRConfig())) == 1.0


def test_what_was_said_is_before_what_was_measured(monkeypatch):
    q = torch.empty(1, 8, 1, 64)
    costs = costs_of(q, "cpu")
    assert costs == costs_of(torch.empty(1, 8, 1, 80, dtype=torch.float16), "cpu") and costs_of(q, "flash") is None
    assert costs != costs_of(q.bfloat16(), "cpu")
    work = Work(batch=1, heads=8, kv_heads=2, queries=300, keys=300, first_position=0)
    decided = decide_call("cpu", q, work, RRConfig(), fused=True)
    assert (
        not decided.sparse and decided.reason == decide(work, costs, expected_density(work, keeps(RRConfig()))).reason
    )
    for least, sparse in ((0, True), (300, True), (301, False)):
        decided = decide_call("cpu", q, work, RRConfig(min_length=least), fused=True)
        assert decided.sparse == sparse and decided.reason == f"300 keys, min_length {least}"
        assert shortest_sparse("cpu", q, 2, RRConfig(min_length=least)) == least
    # Cards with a length in place of costs, against a dense kernel; others are sparse at every length.
    monkeypatch.setattr(deciding, "tuned", lambda *_: {"min_length": 301})
    monkeypatch.setattr(deciding, "costs_of", lambda *_: None)
    assert not decide_call("cpu", q, work, RRConfig(), fused=True).sparse
    assert decide_call("cpu", q, work, RRConfig(), fused=False).sparse
    assert shortest_sparse("cpu", q, 2, RRConfig()) == 384
    monkeypatch.setattr(deciding, "tuned", lambda *_: {})
    assert decide_call("cpu", q, work, RRConfig(), fused=True).sparse and shortest_sparse("cpu", q, 2, RRConfig()) == 0


@pytest.mark.parametrize("preset", ["rr", "best"])
def test_the_shortest_sparse_prompt_is_sparse_and_one_row_less_is_not(preset):
    q, config = torch.empty(1, 8, 1, 64), RRConfig.from_preset(preset)
    shortest = shortest_sparse("cpu", q, 2, config)
    for tokens in (shortest, shortest - 128):
        work = Work(batch=1, heads=8, kv_heads=2, queries=tokens, keys=tokens, first_position=0)
        assert decide_call("cpu", q, work, config, fused=True).sparse == (tokens == shortest)
    assert shortest_sparse("cpu", q, 2, RRConfig(tau=1.0)) > LONGEST
    # Without a dense kernel the sparse one over all blocks is what it is held against.
    without = Work(batch=1, heads=8, kv_heads=2, queries=shortest - 128, keys=shortest - 128, first_position=0)
    assert decide_call("cpu", q, without, config, fused=False).sparse

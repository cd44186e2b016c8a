"""Dense or sparse by work: the arithmetic is what its page says, and the decision follows from the two times."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rr_flex.kernels.break_even import (
    WORTH,
    Costs,
    Work,
    break_even_density,
    costs_from,
    decide,
    dense_ms,
    sparse_ms,
    visible_pairs,
)
from rr_flex.kernels.options import TUNED

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
    assert costs_from(None) is None and costs_from(entry) == Costs(**entry)
    with pytest.raises(ValueError, match="kept_block must be at least 0, got -1"):
        Costs(**entry | {"kept_block": -1.0})
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        Work(batch=1, heads=1, kv_heads=1, queries=0, keys=1)
    with pytest.raises(ValueError, match=r"pooled_keys must lie in \[0, 5\], got 6"):
        Work(batch=1, heads=1, kv_heads=1, queries=1, keys=5, pooled_keys=6)
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], got 2"):
        decide(Work(batch=1, heads=1, kv_heads=1, queries=1, keys=5), Costs(**entry), 2)


def test_the_table_holds_costs_that_a_decision_can_go_by():
    """As measured: a chunk of 512 queries costs more sparse than dense, 32,768 tokens at once half; a CPU gains from
    2,048 tokens on at density .25, and never at density 1."""
    entries = [
        (card, costs_from(costs))
        for card, head_dims in TUNED.items()
        for dtypes in head_dims.values()
        for entry in dtypes.values()
        for costs in entry.get("costs", {}).values()
    ]
    assert {card for card, _ in entries} == {"9.0", "cpu"}
    for card, costs in entries:
        shape = {"batch": 1, "heads": 32 if card == "9.0" else 8, "kv_heads": 8 if card == "9.0" else 2}
        at_once = Work(**shape, queries=32768, keys=32768, first_position=0)
        assert decide(at_once, costs, 0.4).sparse and not decide(at_once, costs, 1.0).sparse
        assert not decide(Work(**shape, queries=1024, keys=1024, first_position=0), costs).sparse
        if card == "9.0":
            assert not decide(Work(**shape, queries=512, keys=131072, first_position=130560), costs, 0.25).sparse
        else:
            assert decide(Work(**shape, queries=2048, keys=2048, first_position=0), costs, 0.25).sparse

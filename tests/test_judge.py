"""Judged rules against their formulas, what is read off their rows, and the page, which comes from the file."""

import itertools
import math

import pytest
import torch
from cases import Shape, tensors

from benchmarks.study import judge_tables
from benchmarks.study.carriers import Mixed
from benchmarks.study.compensation import attend_by_lists, compensate
from benchmarks.study.judged_rules import FLOOR, JUDGED, by_head, by_row_length, with_floor
from rr_flex import RRConfig, select_blocks
from rr_flex.evaluation.block_outputs import KeptBlocks
from rr_flex.evaluation.equal_density import visible_and_mandatory
from rr_flex.evaluation.rules import Case
from rr_flex.evaluation.sparse_model import attend_densely, attend_to_blocks

CONFIG = RRConfig.from_preset("best")


@pytest.fixture(scope="module")
def case():
    return Case(*tensors(Shape(B=1, Lq=512, Lk=512)), (3,))


@pytest.fixture(scope="module")
def share(case):
    """A block's share of its row, 1 4 nQ nK in float64; and what may and must be kept."""
    mass = select_blocks(case.q, case.k, config=CONFIG).mass.double()
    return mass / mass.sum(-1, keepdim=True), *visible_and_mandatory(512, CONFIG.block_sizes, mass.device)


@pytest.mark.parametrize("name", JUDGED)
def test_every_rule_keeps_more_at_a_lower_level(case, name):
    rule = JUDGED[name]
    visible, mandatory = visible_and_mandatory(512, rule.block_size, case.q.device)
    value = rule.value(case, visible, mandatory)
    levels = value[visible.expand_as(value)].quantile(torch.tensor([0.9, 0.5, 0.1]), interpolation="nearest").tolist()
    kept = [rule.kept(case, level, visible, mandatory) for level in levels]
    assert all((fewer <= more).all() and (fewer | ~mandatory).all() for fewer, more in itertools.pairwise(kept))
    assert not (kept[2] & ~visible).any() and kept[0].sum() <= kept[2].sum()


def test_values_are_their_formulas(case, share):
    """One threshold, by row length, by head and with a floor, written out."""
    share, visible, mandatory = share
    near = {"rtol": 1e-4, "atol": 1e-5}
    plain = JUDGED["best"].value(case, visible, mandatory)
    torch.testing.assert_close(plain.double(), share, **near)
    seen = visible.sum(-1, keepdim=True).double()
    torch.testing.assert_close(
        by_row_length(CONFIG, 0.5).value(case, visible, mandatory).double(), share * seen.sqrt(), **near
    )
    levels = [0.1, 0.2, 0.4, 0.05]
    expected = share / torch.tensor(levels).double()[:, None, None]
    own = by_head(CONFIG, {3: levels}).value(case, visible, mandatory)
    torch.testing.assert_close(own.double(), expected, **near)
    floor = with_floor(CONFIG).value(case, visible, mandatory)
    for h in range(4):
        for row in range(share.shape[2]):
            free = [j for j in range(share.shape[3]) if visible[0, 0, row, j] and not mandatory[0, 0, row, j]]
            held = share[0, h, row][mandatory[0, 0, row]].sum().item()
            for j in sorted(free, key=lambda j: -share[0, h, row, j]):
                assert (floor[0, h, row, j] == math.inf) == (held < FLOOR)
                held += share[0, h, row, j].item()


def test_what_is_dropped_comes_back_whole_where_a_row_s_queries_are_alike(case, share):
    _, visible, mandatory = share
    q = case.q[:, :, ::128].repeat_interleave(128, 2)
    kept = KeptBlocks(visible & (mandatory | (torch.arange(4) % 2 == 0)[:, None, None]), (128, 128))
    attended = attend_by_lists((q, case.k, case.v), kept, 0.25)
    torch.testing.assert_close(attended[0], attend_to_blocks(q, case.k, case.v, kept, scale=0.25))
    back = compensate((q, case.k, case.v), attended, visible & ~kept.kept, (128, 128), (0.25, True))
    dense = attend_densely(q, case.k, case.v, layer=0, scale=0.25, window=None)
    torch.testing.assert_close(back, dense, rtol=1e-4, atol=1e-5)
    assert (attended[0] - dense).abs().max() > 0.01


def test_heads_that_take_the_other_rule_are_as_under_it(case):
    near = {"layer": 3, "scale": 0.25, "window": None}
    runs = (JUDGED["best"], 0.2), (JUDGED["fast"], 0.3)
    first, second = (Mixed(*run)(case.q, case.k, case.v, **near) for run in runs)
    mixed = Mixed(*runs[0], other=runs[1], others=frozenset({(3, 1), (2, 0)}))(case.q, case.k, case.v, **near)
    assert torch.equal(mixed[:, 1], second[:, 1]) and torch.equal(mixed[:, [0, 2, 3]], first[:, [0, 2, 3]])


def rows(kl):
    """Two levels of two texts."""
    return [
        {
            "aimed": d,
            "text": t,
            "density": d,
            "kl": kl * math.exp(-10 * d),
            "agreement": 0.9,
            "perplexity_ratio": 1.0,
        }
        for d in (0.2, 0.4)
        for t in "ab"
    ]


def test_divergences_are_read_off_at_a_density():
    judged = judge_tables.at(rows(1.0), 0.3)
    assert judged.mean == pytest.approx(math.exp(-3)) and judged.agreement == pytest.approx(0.9)
    assert judge_tables.ratio(judge_tables.at(rows(2.0)), judged) == pytest.approx((2, 2, 2))
    assert judge_tables.share_of(rows(1.0), 0.45, math.exp(-3)) == pytest.approx(math.exp(-1.5))
    assert judge_tables.share_of(rows(1.0), 0.5, 1.0) is None
    assert judge_tables.density_like({"rr": rows(1.0), "x": rows(math.e)}, "x") == pytest.approx(0.4)


def test_time_is_an_estimate_and_attention_by_density():
    clock = judge_tables.Clock()
    none, some = (clock.ms("best", density, "flash") for density in (0.0, 0.3))
    assert 5 < none < 10 and clock.ms("best", 0.6, "flash") == pytest.approx(2 * some - none)
    assert clock.density_for("best", some, "flash") == pytest.approx(0.3)


def test_the_page_s_table_is_the_file_s():
    assert judge_tables.section(judge_tables.read()) in judge_tables.PAGE.read_text(encoding="utf-8")

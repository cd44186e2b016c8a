"""Errors of many selections at once, budgets at equal density, intervals, and the study's own estimators."""

import math
import runpy
from pathlib import Path

import oracle
import pytest
import torch
from cases import Shape, seeds, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.study.estimators import antidiagonal, exact_keys, true_blocks
from benchmarks.study.every_rule import RULES
from benchmarks.study.low_precision import LOW_PRECISION, in_low_precision, round_rows
from benchmarks.study.study_file import gain_over, over_layers, read_records, write_records
from rr_flex import RRConfig, select_blocks
from rr_flex.evaluation.block_outputs import KeptBlocks, output_errors
from rr_flex.evaluation.equal_density import kept_at_densities, visible_and_mandatory
from rr_flex.evaluation.judging import Record, judge_text
from rr_flex.evaluation.rules import Case, Rule, cost_of, multiplications
from rr_flex.evaluation.summaries import over_texts, summarise
from rr_flex.evaluation.texts import KINDS, sample_text
from rr_flex.evaluation.true_mass import true_block_mass
from rr_flex.mandatory import mandatory_blocks

SMALL = Shape(B=1, Lq=512, Lk=512)


def causal_blocks(kept, shape, block_size):
    shown = oracle.pairs(oracle.causal_element(0), shape.B, shape.Hq, shape.Lq, shape.Lk)
    return oracle.expand(kept, (shape.Lq, shape.Lk), block_size) & shown


@settings(max_examples=5)
@given(seed=seeds, L=st.sampled_from([200, 320, 512]))
def test_output_errors_are_those_of_attention_over_the_kept_blocks(seed, L):
    shape = Shape(Lq=L, Lk=L)
    q, k, v = tensors(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    selections = []
    for size in ((128, 128), (128, 64), (64, 64)):
        visible, _ = visible_and_mandatory(-(-L // 128) * 128, size, q.device)
        shaped = visible[..., : -(-L // size[0]), : -(-L // size[1])]
        kept = torch.rand(2, 4, *shaped.shape[2:], generator=generator) < 0.5
        selections.append(KeptBlocks(kept & shaped, size))
    errors = output_errors((q, k, v), selections)
    dense, _ = oracle.attend(q, k, v, oracle.pairs(oracle.causal_element(0), 2, 4, L, L))
    torch.testing.assert_close(errors.reference, dense.square().sum((2, 3)), rtol=1e-4, atol=0)
    mass = oracle.block_mass(
        q,
        k,
        causal_blocks(torch.ones(2, 4, 4, 4).bool(), shape, (128, 128)),
        scale=0.25,
        strides=(1, 1),
        block_size=(64, 64),
    )
    for number, (kept, size) in enumerate(selections):
        out, _ = oracle.attend(q, k, v, causal_blocks(kept, shape, size))
        torch.testing.assert_close(errors.difference[number], (out - dense).square().sum((2, 3)), rtol=1e-3, atol=1e-4)
        fine = oracle.expand(kept, (L, L), size)[..., ::64, ::64]
        torch.testing.assert_close(errors.recall[number], (mass * fine).sum((2, 3)) / L, rtol=0, atol=1e-5)


def test_everything_kept_is_no_error():
    q, k, v = tensors(SMALL)
    kept = torch.ones(1, 4, 4, 8, dtype=torch.bool)
    errors = output_errors((q, k, v), [KeptBlocks(kept, (128, 64))])
    assert errors.per_head.max() < 1e-6 and errors.per_layer.max() < 1e-6
    torch.testing.assert_close(errors.recall, torch.ones(1, 1, 4).double())


def test_true_blocks_are_their_definitions():
    given_case = case()
    q, k, v = given_case.q, given_case.k, given_case.v
    shown = oracle.pairs(oracle.causal_element(0), 1, 4, 512, 512)
    for q_block, k_block in ((128, 64), (64, 64), (128, 128)):
        found = true_blocks(given_case, (q_block, k_block))
        for h in (0, 3):
            scores = 0.25 * q[0, h].double() @ k[0, h // 2].double().T
            share = scores.masked_fill(~shown[0, h], -math.inf).softmax(-1)
            values = v[0, h // 2].double()
            out = share @ values
            for i, rows in enumerate(oracle.runs(512, q_block)):
                for j, columns in enumerate(oracle.runs(512, k_block)):
                    part = share[rows.start : rows.stop, columns.start : columns.stop]
                    moved = part @ values[columns.start : columns.stop] - part.sum(1)[:, None] * out[list(rows)]
                    expected = (part.sum(1).square().sum(), moved.square().sum())
                    for blocks, value in zip(found, expected, strict=True):
                        torch.testing.assert_close(blocks[0, h, i, j].double(), value, rtol=1e-3, atol=1e-4)


@given(seed=seeds, density=st.sampled_from([0.3, 0.45, 0.7, 1.0]))
@pytest.mark.parametrize("spending", ["top_tau", "threshold", "raw", "per_head"])
def test_a_rule_keeps_the_density(spending, seed, density):
    weight = torch.rand(1, 6, 16, 32, generator=torch.Generator().manual_seed(seed)) ** 4
    visible, mandatory = visible_and_mandatory(2048, (128, 64), weight.device)
    (kept,) = kept_at_densities(weight * visible, visible, mandatory, densities=[density], spending=spending)
    assert not (kept & ~visible).any() and (kept | ~mandatory).all()
    wanted = round(density * 6 * int(visible.sum()))
    slack = {"top_tau": 6 * 16, "per_head": 3}.get(spending, 0)  # τ moves a whole row's last block at once
    assert abs(int(kept.sum()) - wanted) <= slack
    if spending == "per_head":
        assert kept.sum((0, 2, 3)).unique().numel() == 1


def test_mandatory_blocks_are_the_library_s():
    for size in ((128, 128), (128, 64), (64, 64)):
        visible, mandatory = visible_and_mandatory(1024, size, torch.device("cpu"))
        config = RRConfig(block_size=size)
        expected = mandatory_blocks(visible, config, Lq=1024, q_offset=0)
        assert torch.equal(mandatory, expected)


def case(shape=SMALL):
    q, k, v = tensors(shape)
    return Case(q, k, v, (1,))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_weighs_every_block(name):
    given_case = case()
    rule = RULES[name]
    weight = rule.weigh(given_case)
    assert weight.shape == (1, 4, 512 // rule.block_size[0], 512 // rule.block_size[1])
    visible, _ = visible_and_mandatory(512, rule.block_size, weight.device)
    assert (weight * visible).isfinite().all() and (weight[visible.expand_as(weight)] >= 0).all()


def test_all_queries_and_all_keys_are_the_true_mass():
    given_case = case()
    mass = exact_keys((128, 64), 1).weigh(given_case)
    torch.testing.assert_close(
        mass, true_block_mass(given_case.q, given_case.k, block_size=(128, 64)), rtol=1e-4, atol=1e-4
    )


def test_the_antidiagonal_is_its_definition():
    given_case = case()
    q, k = given_case.q[0, 1].double(), given_case.k[0, 0].double()
    scores = q @ k.T / 4
    tiles = torch.stack(
        [
            torch.stack([scores[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flip(0).diagonal().mean() for j in range(64)])
            for i in range(64)
        ]
    )
    share = tiles.masked_fill(torch.ones(64, 64).triu(1).bool(), -math.inf).softmax(-1)
    expected = share.unflatten(0, (4, 16)).unflatten(2, (4, 16)).sum((1, 3))
    torch.testing.assert_close(antidiagonal((128, 128)).weigh(given_case)[0, 1].double(), expected, rtol=0, atol=1e-4)


def test_costs_by_hand():
    assert cost_of(RRConfig()) == 1
    assert cost_of(RRConfig(order=2)) == 1.5
    assert cost_of(RRConfig(order=2, query_stride=16)) == 0.75
    assert cost_of(RRConfig(pool="queries")) == 0.5 and cost_of(RRConfig(pool="queries", order=2)) == 0.75
    assert cost_of(RRConfig.from_preset("fast")) == 0.75 and cost_of(RRConfig.from_preset("best")) == 0.875
    assert multiplications(RRConfig.from_preset("fast")) == 1.0
    assert multiplications(RRConfig.from_preset("best")) == 1.0


def test_a_text_is_judged_in_both_scopes():
    layers = {layer: tensors(Shape(B=1, Lq=1024, Lk=1024), layer) for layer in (3, 5)}
    rules = {
        "rr": RULES["rr"],
        "oracle": RULES["oracle mass 128×64"],
        "all": Rule(RULES["rr"].weigh, (128, 128), "raw"),
    }
    records = judge_text("text", layers, rules, densities=(0.8, 1.0))
    assert len(records) == 3 * 2 * 2 * 2
    for record in records:
        if record.density == 1:
            assert record.kept == 1 and record.error < 1e-6 and record.recall == pytest.approx(1, abs=1e-5)
        elif record.scope == "layer":
            assert record.kept == pytest.approx(0.8, abs=0.06)
    chosen = [r for r in records if (r.rule, r.scope, r.density) == ("oracle", "model", 0.8)]
    assert sum(record.kept for record in chosen) / 2 == pytest.approx(0.8, abs=0.02)
    selection = select_blocks(*layers[3][:2], budget="density", target_density=0.8)
    by_library = output_errors(layers[3], [KeptBlocks(selection.kept, (128, 128))]).per_head.mean().item()
    own = judge_text("text", {3: layers[3]}, {"t": RULES["rr, threshold"]}, densities=(0.8,), scopes=("layer",))
    assert own[0].error == pytest.approx(by_library, rel=0.15, abs=1e-3)


def test_intervals_and_gains_by_hand(tmp_path):
    rows = [("a", 0.2, 0.1), ("b", 0.4, 0.3), ("c", 0.4, 0.1)]
    records = [
        Record(rule, "layer", 0.3, text, layer, 0.3, error + 0.01 * layer, 0.0, 0.9)
        for text, plain, better in rows
        for rule, error in (("plain", plain), ("better", better))
        for layer in (-1, 1)
    ]
    write_records(tmp_path / "records.json", records)
    assert read_records(tmp_path / "records.json") == records
    summary = summarise(records, scope="layer")
    assert summary["plain"][0.3].mean == pytest.approx(1 / 3)
    gain = gain_over(records, "better", "plain", 0.3, scope="layer")
    assert gain.mean == pytest.approx((0.5 + 0.25 + 0.75) / 3) and gain.low < gain.mean < gain.high
    assert gain_over(records, "better", "plain", 0.3, scope="layer", texts=lambda text: text == "a")[0] == 0.5
    apart = [r for r in records if r.rule == "plain"] + over_layers(r for r in records if r.rule == "better")
    assert gain_over(apart, "better", "plain", 0.3, scope="layer").mean == pytest.approx(gain.mean)
    assert over_texts({"a": [1.0], "b": [1.0]}) == (1, 1, 1)
    closed = gain_over(
        [*records, *(r._replace(rule="floor", error=r.error / 4) for r in records if r.rule == "plain")],
        "better",
        "plain",
        0.3,
        scope="layer",
        oracle="floor",
    )
    assert closed.mean == pytest.approx((0.5 + 0.25 + 0.75) / 3 / 0.75)
    mean = over_layers(records)
    assert len(mean) == 6 and {record.layer for record in mean} == {-1}
    assert summarise(mean, scope="layer")["better"][0.3].mean == pytest.approx(summary["better"][0.3].mean)


def test_texts_are_long_and_what_is_judged_is_not_what_was_tuned_on():
    """Part 0 of every kind is what rules are chosen on, parts 1 and 2 are what they are judged on."""

    def lines(kind, part):
        text = sample_text(kind, part)
        assert len(text) >= 40_000 and text == sample_text(kind, part)
        return {line.strip() for line in text.splitlines() if len(line) > 50}

    tuned = set.union(*(lines(kind, 0) for kind in KINDS))
    for kind in KINDS:
        first, second = lines(kind, 1), lines(kind, 2)
        for own in (first, second):
            assert len(own & tuned) <= 0.01 * len(own)
        assert len(first & second) <= 0.01 * len(second)


def test_an_unknown_text_is_refused():
    with pytest.raises(ValueError, match="text must be a file or one of prose"):
        sample_text("poem")
    with pytest.raises(ValueError, match="part of prose must be"):
        sample_text("prose", 99)


@pytest.mark.parametrize(("precision", "worst"), [("fp8", 2**-4), ("int8", 0.5 / 127)])
def test_rows_are_rounded_to_their_precision(precision, worst):
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    error = (round_rows(x, precision) - x).abs()
    bound = x.abs() if precision == "fp8" else x.abs().amax(-1, keepdim=True)
    assert 0 < (error / bound).max() <= worst * 1.05 + 1e-6


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_rounding_is_torchao_s(precision):
    pytest.importorskip("torchao")
    from torchao.quantization import quant_primitives as torchao

    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    if precision == "fp8":
        scale = torchao._choose_scale_float8(rows, [1, 64], torch.float8_e4m3fn)
        whole = torchao._quantize_affine_float8(rows, scale, torch.float8_e4m3fn)
        expected = torchao._dequantize_affine_float8(whole, scale)
    else:
        scale, zero = torchao.choose_qparams_affine(rows, torchao.MappingType.SYMMETRIC, (1, 64), torch.int8)
        whole = torchao.quantize_affine(rows, (1, 64), scale, zero, torch.int8)
        expected = torchao.dequantize_affine(whole, (1, 64), scale, zero, torch.int8)
    torch.testing.assert_close(round_rows(rows, precision), expected)


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_rounded_estimate_is_near_the_whole_one(name):
    given_case = case()
    order = 1 if name.startswith("order 1") else 2
    exact = select_blocks(given_case.q, given_case.k, preset="best", block_size=(128, 64), order=order).mass
    rounded = LOW_PRECISION[name].weigh(given_case)
    assert 1e-7 < (rounded - exact).abs().max() < 0.1


def test_unrounded_it_is_the_library_s_estimate(monkeypatch):
    monkeypatch.setattr("benchmarks.study.low_precision.round_rows", lambda x, precision: x)
    given_case = case()
    for order in (1, 2):
        config = RRConfig.from_preset("best", order=order)
        exact = select_blocks(given_case.q, given_case.k, config=config).mass
        torch.testing.assert_close(in_low_precision(config, "fp8").weigh(given_case), exact, rtol=0, atol=1e-5)


def test_the_method_notebook_runs(capsys):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(Path(__file__).parent.parent / "notebooks" / "method.py"))
    out = capsys.readouterr().out
    assert "best 128×64" in out and "oracle mass 128×64" in out and "of the gap" in out

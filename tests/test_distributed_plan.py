"""`rr-flex plan`: laws of the cost model, and the command."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rr_flex.cli import main
from rr_flex.distributed.cost import Prompt, Rates, cost, costs

RATES = Rates.read()
PROMPT = Prompt(tokens=1 << 20, heads=64, kv_heads=8)


@given(st.sampled_from([2, 4, 8, 16, 64]), st.sampled_from([0.05, 0.1, 0.25]), st.integers(17, 23))
def test_more_work_takes_longer_and_more_ranks_less(ranks, density, log_tokens):
    prompt = replace(PROMPT, tokens=1 << log_tokens, density=density)
    for way in ("heads", "ulysses", "kept", "all", "ring"):
        here = cost(way, prompt, ranks, RATES)
        assert cost(way, replace(prompt, tokens=2 << log_tokens), ranks, RATES).seconds > here.seconds
        assert cost(way, replace(prompt, density=density * 1.5), ranks, RATES).seconds >= here.seconds
        assert here.seconds >= cost("one card", prompt, 1, RATES).seconds / ranks
    assert cost("kept", prompt, ranks, RATES).moved <= cost("all", prompt, ranks, RATES).moved


def test_best_is_first_and_ways_that_do_not_fit_are_left_out():
    found = costs(PROMPT, 128, RATES)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert not {"heads", "ulysses"} & {each.way for each in found}
    assert [each.way for each in costs(PROMPT, 1, RATES)] == ["one card"]


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["plan", "--tokens", "4M", "--heads", "64/8", "--gpus", "8..1024", "--density", ".1"]
    assert main([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert {row["ranks"] for row in rows} == {8, 16, 32, 64, 128, 256, 512, 1024}
    assert sum(row["best"] for row in rows) == 8 == printed.count(" *")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_predictions_beside_measured_rows(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import plan_check

    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "length": 1 << 17, "density": 0.1, "ranks": 2}
    ways = "kept", "all, triton", "1 heads × 2 sequence", "one card, dense", "unknown"
    rows = [shape | {"way": way, "ms": 50.0, "peak_bytes": 2e9, "held_bytes": 1e9} for way in ways]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert plan_check.main([str(path), "--plot", str(tmp_path / "check.png")]) == 0
    assert "mean of |off| over 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--heads", "6/4"], "multiple of Hkv"),
        (["--gpus", "0"], "positive"),
        (["--tokens", "0"], "--tokens must be a number of tokens of at least 1, such as 512K, got '0'"),
        (["--tokens", "infM"], "--tokens must be a number of tokens of at least 1, such as 512K, got 'infM'"),
        (["--density", "2"], "(0, 1]"),
        (["--rates", "none.json"], "none.json"),
    ],
)
def test_misuse(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_rates_that_cannot_be(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="must hold"):
        Rates.read(path)

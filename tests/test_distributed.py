"""Several processes keep the blocks that one keeps and give its outputs: 2 and 4 processes, gloo, CPU."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks

from rr_flex.distributed import Layout, Piece, Shards, balanced, contiguous, make_mesh, ulysses, zigzag
from rr_flex.distributed.fetch import places
from rr_flex.distributed.layout import BLOCK
from rr_flex.distributed.transfer import in_order

PAGE = Path(__file__).parent.parent / "rr_flex" / "distributed" / "README.md"


def test_two_processes_give_what_one_gives(tmp_path):
    """Every rule, mask and layout; chunked; heads alone; the ring."""
    printed = on_ranks(tmp_path, 2, "distributed_worker", 2)[0]
    assert len(printed.splitlines()) >= 10
    moved = re.search(r"window: .*'all': (\d+), 'kept': (\d+)", printed)
    assert int(moved[2]) < int(moved[1])


def test_four_processes_give_what_one_gives(tmp_path):
    """Fewer key heads than ranks, and heads × sequence."""
    cases = ["per head", "best", "window", "right padding"]
    assert len(on_ranks(tmp_path, 4, "distributed_worker", 4, cases)[0].splitlines()) == len(cases)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_a_models_prompt_on_two_processes(tmp_path):
    printed = on_ranks(tmp_path, 2, "distributed_models_worker", 2, ["llama", "gemma3"])[0]
    assert printed.count("same logits, cache and tokens") == 2


SMALL = ["--lengths", 640, "--heads", 4, 2, "--head-dim", 16, "--dtype", "float32", "--densities", 0.6]


def test_the_benchmark_runs_on_two_processes(tmp_path):
    """Uncompiled, on the CPU: every way gives one process's output, and a row that says how."""
    rows = bench(tmp_path, 2, "parallel", "--device", "cpu", "--eager", *SMALL)
    assert [row["way"] for row in rows] == [
        *(4 * ["blocks that differ"]),
        *("one card", "heads", "ulysses", "kept", "all"),
        *("1 heads × 2 sequence", "2 heads × 1 sequence", "balanced", "stages"),
        *("dense ulysses", "one card, dense"),
    ]
    assert not any("stopped" in row for row in rows)
    assert all(row["differ"] == 0 and row["of_kept"] == rows[0]["of_kept"] > 0 for row in rows[:4])
    assert all(row["error"] < 1e-5 for row in rows[4:-3])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_cards_give_what_one_gives(tmp_path):
    rows = bench(tmp_path, 2, "parallel", "--lengths", 16384, "--densities", 0.3, "--no-dense")
    assert {row["way"] for row in rows if row.get("error", 1) < 1e-2} >= {"heads", "ulysses", "kept", "all", "ring"}


def bench(folder, ranks, program, *arguments):
    output = folder / "rows.jsonl"
    on_ranks(folder, ranks, f"benchmarks.{program}", [*map(str, arguments), "--output", str(output)])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_errors_on_every_rank_and_a_rank_that_dies(tmp_path):
    printed = on_ranks(tmp_path, 2, "distributed_errors_worker")
    assert "got an error on another one" in printed[0] and "v must have k's batch" in printed[1]
    assert all("settings must be the same on every rank" in text for text in printed)
    assert "got one that is gone or late" in printed[0]
    assert float(re.search(r"after ([\d.]+) s", printed[0])[1]) < 60


def test_the_pages_script_runs(tmp_path):
    script = re.search(r"```python\n(# prefill\.py.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len(script.splitlines()) <= 40
    program = tmp_path / "prefill.py"
    program.write_text(script)
    assert "1024 tokens on 2 ranks" in on_ranks(tmp_path, 2, str(program))[0]


layouts = st.builds(
    lambda arrange, ranks, rows, short: arrange(max(1, rows * BLOCK - short), ranks),
    st.sampled_from([contiguous, zigzag, lambda tokens, ranks: balanced(range(-(-tokens // BLOCK)), tokens, ranks)]),
    st.integers(1, 4),
    st.integers(5, 40),
    st.integers(0, BLOCK - 1),
)


@given(layouts, st.sampled_from([1, 8, 64]))
def test_tokens_go_to_ranks_and_come_back(layout, stride):
    x = torch.arange(layout.tokens, dtype=torch.float64).view(1, 1, -1, 1)
    parts = [layout.take(x, rank)[:, :, ::stride] for rank in range(layout.ranks)]
    assert torch.equal(in_order(parts, layout, stride), x[:, :, ::stride])
    assert torch.equal(torch.cat([layout.positions(rank) for rank in range(layout.ranks)]).sort()[0], x.flatten())
    owners = layout.owner_of_blocks(64)
    assert len(owners) == -(-layout.tokens // 64)
    for rank in range(layout.ranks):
        assert [block for block, owner in enumerate(owners) if owner == rank] == [
            *sorted({int(p) // 64 for p in layout.positions(rank)})
        ]


@given(st.integers(1, 16), st.integers(1, 12))
def test_zigzag_is_even_under_a_causal_mask(ranks, runs):
    rows = 2 * ranks * runs
    layout = zigzag(rows * BLOCK, ranks)
    work = [int((layout.positions(rank) // BLOCK + 1).sum()) for rank in range(ranks)]
    assert max(work) == min(work)


@given(st.integers(1, 8), st.lists(st.floats(0.1, 100), min_size=32, max_size=100))
def test_balanced_shares_tokens_and_cost_better_than_runs(ranks, cost):
    cost = sorted(cost)
    tokens = len(cost) * BLOCK
    layout, runs = balanced(cost, tokens, ranks), contiguous(tokens, ranks)
    assert layout.most_keys - min(layout.keys_on(rank) for rank in range(ranks)) <= 2 * BLOCK

    def worst(layout):
        return max(sum(cost[int(p)] for p in layout.positions(rank)[::BLOCK] // BLOCK) for rank in range(ranks))

    assert worst(layout) <= worst(runs) + max(cost)


@given(st.integers(0, 2**16), st.sampled_from([(3,), (2, 3), (2, 1, 5)]))
def test_places_are_those_of_the_true_flags(seed, shape):
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    assert torch.equal(torch.stack(places(flags, int(flags.sum())), 1), flags.nonzero())


@pytest.mark.parametrize(
    ("pieces", "ranks", "first_query", "said"),
    [
        ((Piece(0, 0, 100), Piece(1, 100, 300)), 2, 0, "multiples of 128"),
        ((Piece(0, 0, 128), Piece(1, 256, 300)), 2, 0, "follow each other"),
        ((), 1, 0, "follow each other"),
        ((Piece(0, 0, 128),), 2, 0, "at least one block"),
        ((Piece(0, 0, 256),), 1, 128, "where a piece begins"),
    ],
)
def test_layouts_that_cannot_be(pieces, ranks, first_query, said):
    with pytest.raises(ValueError, match=said):
        Layout(pieces, ranks, first_query)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: zigzag(640, 0), "ranks must be at least 1 and below 2^31, got 0"),
        (lambda: contiguous(1.5, 1), "tokens must be an int, got 1.5"),
        (lambda: balanced([1.0], 128, True), "ranks must be an int, got True"),
        (lambda: make_mesh(sequence=0), "sequence must be at least 1 and below 2^31, got 0"),
        (lambda: make_mesh(device="x"), "device must be 'cuda' or 'cpu', got 'x'"),
        (lambda: make_mesh(timeout=-1, device="cpu"), "timeout must be a number of seconds above 0, got -1"),
        (lambda: Shards(3, 4), "mesh must be a DeviceMesh, got int"),
        (lambda: ulysses(*torch.zeros(3, 1, 2, 4, 16), "mesh"), "shards must be Shards, got str"),
    ],
)
def test_what_is_wrong_before_any_rank_waits(call, said):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(said)}"):
        call()

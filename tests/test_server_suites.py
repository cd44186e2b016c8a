"""`python -m benchmarks chunks`: its rows say what they should, its tables show them, its costs explain times."""

import json
from dataclasses import asdict
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import chunk_suite, packed_suite, server_tables, work_suite
from benchmarks.server import Server, sdpa
from benchmarks.server_suites import write_rows
from benchmarks.timing import Progress
from rr_flex.kernels.break_even import Costs, Work, dense_ms, sparse_ms

CPU = torch.device("cpu")
ABOUT = {"card": "Some Card", "torch": "2.11.0", "flash_attn_4": None, "commit": "abc", "date": "2026-01-01T"}
SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "workload": "structured", "seed": 0}


def server(**changed) -> Server:
    small = {"heads": 4, "kv_heads": 2, "head_dim": 64, "length": 512, "backends": ("auto",), "seconds": 0.0}
    known = {"device": CPU, "dtype": torch.float32, "seed": 0, "file": None, "progress": Progress(1)}
    return Server(**small | known | changed)


def test_dense_chunks_are_one_shot():
    inputs = server().inputs(1, 512)
    whole = sdpa(*inputs)
    assert (torch.cat(list(chunk_suite.in_chunks(sdpa, inputs, 192)), 2) - whole).abs().max() < 1e-5
    # The last queries of more keys stand at the end of the keys.
    assert (sdpa(inputs.q[:, :, 300:], inputs.k, inputs.v) - whole[:, :, 300:]).abs().max() < 1e-5


def test_a_row_a_chunk_size(monkeypatch):
    """Whole chunks through a stand-in for rr_attention, which is dense: only what is called, and how, is looked at."""
    called = []

    def attention(q, k, v, *, q_offset, config, backend, state=None):
        called.append((q.shape[2], k.shape[2], q_offset, state is not None))
        return sdpa(q, k, v)

    monkeypatch.setattr(chunk_suite, "rr_attention", attention)
    options = SimpleNamespace(chunk_sizes=[256], settings=["τ"])
    rows = list(chunk_suite.rows(server(), options))
    assert [(row["chunk"], row["kept"]) for row in rows] == [(512, "nothing"), (256, "state")]
    assert {(256, 256, 0, True), (256, 512, 256, True), (512, 512, 0, False)} <= set(called)
    for row in rows:
        assert row["ms"] > 0 and row["dense_ms"] > 0 and row["from_one_shot"] < 1e-6 and row["failed"] is None
        assert row["one_shot_ms"] == rows[0]["ms"] and 0 < row["density"] <= 1


def test_costs_are_found_again_from_times_that_they_explain():
    given = dict(dense_host=0.05, dense_call=0.02, dense_block=12.2, host=0.3, call=0.15)
    costs = Costs(**given, pooled_key=2.4, scored_block=0.35, kept_block=13.9, row_block=6000.0)
    rows = []
    for batch, queries, keys, density in product((1, 8), (512, 2048, 8192), (8192, 32768, 131072), (0.1, 0.3, 0.5)):
        row = {"batch": batch, "heads": 32, "kv_heads": 8, "queries": queries, "keys": keys, "density": density}
        work = work_suite.work_of(row)
        row |= {"sparse_ms": sparse_ms(work, costs, density), "dense_ms": dense_ms(work, costs)}
        rows.append(row | {"host_ms": 0.3, "dense_host_ms": 0.05})
    found = asdict(work_suite.fit(rows))
    for name, value in asdict(costs).items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert work_suite.work_of(rows[0]) == Work(
        batch=1, heads=32, kv_heads=8, queries=512, keys=8192, first_position=8192 - 512
    )


def test_a_cell_says_how_the_costs_take_it():
    row = {"batch": 1, "queries": 16384, "keys": 16384, "backend": "auto", "density": 0.2, "capability": None}
    row |= {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32"}
    assert work_suite.taken(row) == "sparse" and work_suite.taken(row | {"density": 1.0}) == "dense"
    assert work_suite.taken(row | {"capability": "0.0"}) is None


def test_a_pack_is_called_as_it_is(monkeypatch):
    monkeypatch.setattr(packed_suite, "PACKS", ((3, (20, 40)), (2, (5000, 6000))))
    (row,) = packed_suite.rows(server(), SimpleNamespace(prompts=None, densities=[0.25]))
    assert row["prompts"] == 3 and 60 <= row["tokens"] <= 120 and row["sparse_prompts"] == 0
    assert row["ms"] > 0 and row["dense_ms"] > 0 and row["dense"] == "sdpa, a call a prompt"


def test_a_cost_that_would_be_negative_is_none():
    columns = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]], dtype=torch.float64)
    ms = torch.tensor([0.5, 1.5, 3.5], dtype=torch.float64)  # 1 · x − 0.5
    call, block = work_suite.least_squares(columns, ms, ms > 0)
    assert call == 0.0 and block > 0


def test_tables_show_the_last_row_of_each(tmp_path):
    chunk = {"suite": "chunks", "failed": None, "config": "τ", "backend": "flash", "chunk": 8192, "kept": "state"}
    chunk |= {"density": 0.27, "ms": 70.0, "one_shot_ms": 69.0, "dense": "fa4", "dense_ms": 205.0, "length": 131072}
    chunk |= {"host_ms": 30.0, "host_ms_a_call": 1.9, "from_one_shot": 0.0} | SHAPE
    write_rows(tmp_path / "chunks.jsonl", [chunk | {"ms": 99.0}, chunk, chunk | {"failed": "x"}], ABOUT)
    rows = server_tables.load(tmp_path)
    assert [row["ms"] for row in rows] == [70.0]
    page = server_tables.markdown(rows)
    assert (
        "| τ, density 0.270 | flash, state | 8,192, 131,072 | 70.0 | 1.01 | 205.0 (fa4) | 2.93× | 1.90 | 0.0e+00 |"
        in page
    )
    assert "Some Card, torch 2.11.0; 32/8 heads of 128, bfloat16; commit abc (2026-01-01)" in page
    server_tables.draw(rows, tmp_path / "chunks.png")
    assert (tmp_path / "chunks.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "chunks.jsonl").read_text().splitlines()
    assert "FAILED, x" in server_tables.text([json.loads(line) for line in lines])


def test_gains_are_in_italics_where_the_costs_say_dense():
    row = {"suite": "cells", "failed": None, "backend": "auto", "batch": 1, "dense": "sdpa", "capability": None}
    row |= {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32", "density": 0.25, "wanted_density": 0.25}
    short = row | {"queries": 128, "keys": 128, "density": 1.0, "sparse_ms": 2.0, "dense_ms": 1.0}
    long = row | {"queries": 65536, "keys": 65536, "sparse_ms": 1.0, "dense_ms": 3.0}
    assert [work_suite.taken(each) for each in (short, long)] == ["dense", "sparse"]
    lines = server_tables.gains([long, short])
    assert lines[2:] == ["| 1 × 128, 128 | auto | *0.50×* |", "| 1 × 65,536, 65,536 | auto | 3.00× |"]


def test_the_page_is_what_the_files_say(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(program.README.read_text())
    server_tables.write_page(copy, server_tables.load(program.RESULTS))
    assert copy.read_text() == program.README.read_text()

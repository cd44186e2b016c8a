"""The page: what it shows of each kind of file, and what it refuses. Its script is tested in test_browser.py."""

import base64
import html
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from demo_document import demo_document, layer_maps

from rr_flex.cli import main
from rr_flex.mass import row_share
from rr_flex.view.cells import cell_size, kept_of_cells, shares_of_cells
from rr_flex.view.page import make_page, read_runs
from rr_flex.view.page.build import shown

ROW = {
    **{"suite": "lengths", "case": "8K rr", "label": "rr", "length": 8192, "heads": 32, "kv_heads": 8, "head_dim": 128},
    **{"batch": 1, "dtype": "bfloat16", "failed": None, "density": 0.3, "error": 0.03, "estimate_ms": 0.5},
    **{"select_ms": 0.1, "lists_ms": 0.2, "attention_ms": 1.5, "total_ms": 2.25, "card": "A card", "torch": "2.11"},
    **{"fastest_dense": "fa4", "fastest_dense_ms": 4.5, "speedup": 2.0, "dense": {"fa4": {"ms": 4.5}, "fa2": {}}},
}


@pytest.fixture
def write(tmp_path):
    def write(*documents, name="run.json"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(document) for document in documents))
        return path

    return write


def numbers(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def test_maps_survive_json():
    document = json.loads(json.dumps(demo_document(length=1000)))["maps"]
    made = layer_maps(8, seed=2)
    assert (document["rows"], document["columns"], document["blocks_per_cell"]) == (8, 8, 1)
    head = document["layers"][2]["heads"][3]
    share = made.true_mass[3] / made.true_mass[3].sum(-1, keepdim=True)
    np.testing.assert_allclose(numbers(head["true"], "<f2").reshape(8, 8), share, rtol=2**-11, atol=1e-7)
    kept = numbers(head["kept"], "u1").reshape(8, 8)
    assert set(kept.flat) == {0, 1, 255}
    np.testing.assert_array_equal(kept == 255, made.kept[3])
    np.testing.assert_array_equal(kept == 0, ~made.visible[3])


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_cells_keep_sums_and_counts(size):
    maps = layer_maps(10, seed=0)
    share = row_share(maps.true_mass)
    cells = shares_of_cells(share, size)
    assert cells.shape[-2:] == (-(-10 // size),) * 2
    torch.testing.assert_close(cells.sum(-1), torch.ones(cells.shape[:-1]))
    # The last cell of a ragged side averages the rows that it has.
    last = share[:, (10 - 1) // size * size :, :size].sum(-1).mean(-1)
    torch.testing.assert_close(cells[:, -1, 0], last)
    kept = kept_of_cells(maps.kept, maps.visible, size)
    rows = torch.arange(10) // size
    inside = (rows[:, None] == 0) & (rows[None] == 0)
    expected = (maps.kept & maps.visible & inside).sum((1, 2)) / (maps.visible & inside).sum((1, 2))
    torch.testing.assert_close(kept[:, 0, 0], expected)
    assert (kept[:, 0, -1] == -1).all() or size >= 10


def test_cell_size_is_the_smallest_that_fits():
    assert [cell_size(n, n, 4) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_demo_page_holds_its_numbers_and_nothing_from_outside(write, tmp_path):
    assert main(["page", str(write(demo_document())), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    for text in ("tiny, 1,000 tokens", "perplexity_compared", "<caption>layers</caption>", "my.txt", "0.9.9"):
        assert text in page
    # The policy forbids every address, and none is there.
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page


def test_text_cannot_leave_its_place(write):
    evil = "</script><script>alert(1)</script><!--"
    document = demo_document(tokens=[evil] * 1000) | {"title": evil}
    page = make_page(read_runs(write(document)))
    assert "<script>alert" not in page and "<!--" not in page
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(data)[0]["maps"]["tokens"][0] == evil
    assert html.escape(evil) in page


def test_benchmark_rows_are_a_table(write):
    bad = {"label": "rr", "failed": "RuntimeError: no"}
    (run,) = read_runs(write(ROW, bad, name="lengths.jsonl"))
    (table,) = run.tables
    assert run.title == "lengths" and [row[table.columns.index("total_ms")] for row in table.rows] == [2.25, None]
    assert "RuntimeError: no" in make_page([run])


def test_lists_of_records_are_tables_wherever_they_stand(write):
    records = [{"rule": "rr", "text": text, "density": 0.5, "by_head": [1]} for text in ("prose", "code") * 60]
    document = {"model": "tiny", "versions": {"torch": "2.13"}, "records": records, "of": {"layers": [{"layer": 1}]}}
    (run,) = read_runs(write(document))
    assert {table.caption: len(table.rows) for table in run.tables} == {"versions": 1, "records": 120, "of, layers": 1}
    assert run.tables[1].columns == ["rule", "text", "density", "by_head"] and run.facts == {"model": "tiny"}
    assert "<summary>records: 120 rows</summary>" in make_page([run])


@pytest.mark.parametrize("count", [1, 2])
def test_json_lines_of_records_are_one_table(write, count):
    cells = [{"task": task, "length": 2048, "score": 0.5, "density": None} for task in ("vt", "cwe")[:count]]
    (run,) = read_runs(write(*cells, name="tasks.jsonl"))
    assert run.title == "tasks" and run.tables[0].rows == [["vt", 2048, 0.5, None], ["cwe", 2048, 0.5, None]][:count]
    assert "vt" in make_page([run])


BAD = [
    ("not json", "RUN must be JSON or JSON lines"),
    ("[]", "RUN must hold at least one result"),
    ("[1]", "RUN must hold JSON objects, got int"),
    ('{"a": 1}', "RUN must be the JSON of rr-flex demo"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_other_files_are_refused(text, message, tmp_path, capsys):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["page", str(tmp_path / "run.json"), "-o", str(tmp_path / "page.html")])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_missing_file_or_folder_is_named(tmp_path, write, capsys):
    for arguments in (["missing.json"], [str(write(demo_document())), "-o", "missing/page.html"]):
        with pytest.raises(SystemExit) as stopped:
            main(["report", *arguments])  # its older name
        assert stopped.value.code == 2 and "missing" in capsys.readouterr().err


def test_numbers_are_short():
    assert [shown(value) for value in (0, 3, 0.25, 1234567, 1234.5, 0.00001, 1e12, None, True)] == [
        *("0", "3", "0.25", "1,234,567", "1,234", "1e-05", "1e+12", "–", "yes")
    ]

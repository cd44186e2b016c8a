"""Rows of `python -m benchmarks.prefill_model` as tables."""

import json
from pathlib import Path

from benchmarks.tables import Row, number, replace_between, setting_of, table

BEGIN, END = "<!-- prefill: begin -->", "<!-- prefill: end -->"


def load(folder: Path) -> list[Row]:
    """The rows of `benchmarks.prefill_model` that worked."""
    path = folder / "prefill-model.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "absent" not in row]


# Milliseconds.
COLUMNS = {
    "attention": lambda row: row["attention"] + (f", {', '.join(row['kernels'])}" if row.get("kernels") else ""),
    "density": lambda row: number(row.get("density"), ".3f"),
    "to the first token": lambda row: number(row["ms"], ".0f"),
    "of it attention": lambda row: number(row["attention_total_ms"], ".0f"),
    "of that estimate, selection, lists": lambda row: number(row.get("estimate_ms"), ".0f"),
    "the rest": lambda row: number(row["rest_ms"], ".0f"),
    "faster by": lambda row: f"{row['speedup']:.2f}×" if "speedup" in row else "–",
}


def markdown(rows: list[Row]) -> str:
    """For the page: a table a model and length."""
    lines = []
    sparse = {prefilled(row) for row in rows if row["attention"] == "rr_flex"}
    for title in dict.fromkeys(title_of(row) for row in rows):
        of_title = [row for row in rows if title_of(row) == title]
        lines += table(COLUMNS, of_title, title)
        if prefilled(of_title[0]) not in sparse:
            lines += ["rr_flex at this length: not measured.", ""]
    return "\n".join(lines).rstrip() + "\n"


def prefilled(row: Row) -> str:
    chunks = f" in chunks of {row['chunk']:,}" if row.get("chunk") else ""
    return f"{row['model']}, {row['length']:,} tokens{chunks}, {row['dtype']}"


def title_of(row: Row) -> str:
    about = f"commit {row['commit']}, {row['date'][:10]}"
    return f"{prefilled(row)} ({setting_of(row)}, {about})"


def write_page(page: Path, rows: list[Row]) -> None:
    """Replaces what stands between the markers."""
    page.write_text(replace_between(page.read_text(), BEGIN, END, markdown(rows), page))

"""Rows of `python -m benchmarks run` as tables: one for the terminal, those of benchmarks/README.md."""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
CHIEF = "rr query_stride=16 key_stride=8 order=2 budget=threshold"  # the setting that is shown of many
LONG_TABLE = 10  # rows of a card; where there are more, the page has CHIEF's at one shape
ALL_ROWS = "rows.md"  # in the folder of results


def load(folder: Path, suites: list[str] | None = None) -> list[Row]:
    """The rows of all result files, in order; of a case measured more than once on a card the last that worked."""
    latest: dict[tuple, Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "case" not in row or row["failed"] or (suites and row["suite"] not in suites):
                continue
            key = (row["card"], row["case"], row["seed"], timed(row))
            if key not in latest or latest[key]["date"] <= row["date"]:
                latest.pop(key, None)
                latest[key] = row
    return list(latest.values())


def timed(row: Row) -> str:
    """How the whole call was timed: alone, in turns with the fastest dense kernel, or so after the card has rested."""
    if not row.get("in_turns"):
        return "alone"
    return "rested" if row.get("rest_s") else "in turns"


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


COLUMNS = {
    "method": lambda row: row["label"],
    "timed": timed,
    "density": lambda row: number(row["density"], ".3f"),
    "output error": lambda row: number(row["error"], ".4f"),
    "estimate": lambda row: number(row["estimate_ms"]),
    "estimate + select + lists": lambda row: number(row["selection_ms"]),
    "attention": lambda row: number(row["attention_ms"]),
    "total, ms": lambda row: number(row["total_ms"]),
    "fastest dense, ms": lambda row: (
        f"{number(row['fastest_dense_ms'])} ({row['fastest_dense']})" if row["fastest_dense"] else "not timed"
    ),
    "faster by": lambda row: number(row["speedup"], ".2f") + ("×" if row["speedup"] else ""),
    "÷ limit": lambda row: number(row["over_limit"]),
    "TFLOP/s": lambda row: number(row["attention_tflops"], ".0f"),
    "peak, GiB": lambda row: number(row["peak_gib"], ".1f"),
}


def shape_of(row: Row) -> str:
    heads = f"{row['heads']}/{row['kv_heads']} heads" + (f", batch {row['batch']}" if row["batch"] > 1 else "")
    workload = "" if row["workload"] == "structured" else f", {Path(row['workload']).name}"
    return f"{row['length']:,} tokens, {heads} of {row['head_dim']}, {row['dtype']}{workload}"


def one_line(row: Row) -> str:
    if row["failed"]:
        return f"{row['case']}: FAILED, {row['failed']}"
    cells = [f"{name} {cell(row)}" for name, cell in COLUMNS.items() if name != "method"]
    return f"{row['case']}: " + " · ".join(cells)


def text_table(rows: list[Row]) -> str:
    """For the terminal: one line a case, failures last."""
    done = [row for row in rows if not row["failed"]]
    header = ["shape", *COLUMNS]
    cells = [[shape_of(row), *(cell(row) for cell in COLUMNS.values())] for row in done]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *cells]
    ]
    lines += [f"FAILED {row['case']}: {row['failed']}" for row in rows if row["failed"]]
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """For the page: the tables of each card, those of the last measured first.

    Of a card with more than LONG_TABLE rows only CHIEF's at the shape that has most of them, and the others' number.
    """
    lines = []
    for setting, of_setting in by_setting(rows):
        shown = chief_rows(of_setting) if len(of_setting) > LONG_TABLE else of_setting
        lines += [*heading(setting, shown), *tables(shown)]
        others = len(of_setting) - len(shown)
        if others:
            lines += [f"{others} other rows of this card: [all rows](results/{ALL_ROWS}).", ""]
    return "\n".join(lines).rstrip() + "\n"


def every_row(rows: list[Row]) -> str:
    """A page of all tables."""
    lines = ["# Every row of `python -m benchmarks run`", "", "Columns and terms: [speed](../README.md).", ""]
    for setting, of_setting in by_setting(rows):
        lines += [*heading(setting, of_setting), *tables(of_setting)]
    return "\n".join(lines).rstrip() + "\n"


def by_setting(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each card and versions, those of the last measured first."""
    settings = dict.fromkeys(setting_of(row) for row in sorted(rows, key=lambda row: row["date"], reverse=True))
    return [(setting, [row for row in rows if setting_of(row) == setting]) for setting in settings]


def heading(setting: str, rows: list[Row]) -> list[str]:
    commits = dict.fromkeys(f"{row['commit']} ({row['date'][:10]})" for row in rows)
    return [f"**{setting}**; commits {', '.join(commits)}", ""]


def chief_rows(rows: list[Row]) -> list[Row]:
    """CHIEF's rows at the shape that has most of them."""
    chief = [row for row in rows if is_chief(row)]
    shapes = [shape_of(row) for row in chief]
    return [row for row in chief if shape_of(row) == max(shapes, key=shapes.count)]


def tables(rows: list[Row]) -> list[str]:
    """One a shape, the longest context first."""
    shapes = sorted(dict.fromkeys(map(shape_of, rows)), key=lambda shape: -tokens(shape))
    ordered = sorted(rows, key=order_of)
    return [line for shape in shapes for line in table(COLUMNS, [r for r in ordered if shape_of(r) == shape], shape)]


def is_chief(row: Row) -> bool:
    return row["label"].removesuffix(f" {row.get('backend')}") == CHIEF and timed(row) != "in turns"


def table(columns: dict[str, Callable[[Row], str]], rows: list[Row], title: str) -> list[str]:
    return [title, "", *markdown_table(columns, ([cell(row) for cell in columns.values()] for row in rows)), ""]


def markdown_table(heads: Collection[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Its lines; all columns but the first are numbers."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return [lines[0], "| --- |" + " ---: |" * (len(heads) - 1), *lines[1:]]


def order_of(row: Row) -> tuple:
    return row.get("backend") or "", row["label"], row["density"], timed(row)


def tokens(shape: str) -> int:
    return int(shape.split(" ")[0].replace(",", ""))


def setting_of(row: Row) -> str:
    flash = f", flash-attn-4 {row['flash_attn_4']}" if row["flash_attn_4"] else ""
    triton = f", Triton {row['triton']}" if row["triton"] else ""
    return f"{row['card']}, torch {row['torch']}{triton}{flash}"


def write_page(page: Path, rows: list[Row]) -> None:
    """Replaces what stands between the markers."""
    page.write_text(replace_between(page.read_text(), BEGIN, END, markdown(rows), page))


def replace_between(text: str, begin: str, end: str, content: str, source: Path) -> str:
    """`text` of the file `source` with `content` between two markers."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{source} must hold the lines {begin} and {end} once, in this order")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{content}{end}{after}"

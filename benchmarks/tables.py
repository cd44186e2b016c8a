"""Result rows to text: a table for the terminal, those of benchmarks/README.md, a picture of time against length."""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
CHIEF = "rr query_stride=16 key_stride=8 order=2 budget=threshold"  # the setting that is shown of many
LONG_TABLE = 10  # rows of a card; where there are more, the page has CHIEF's at one shape
ALL_ROWS = "rows.md"  # in the folder of results
PREFILL_BEGIN, PREFILL_END = "<!-- prefill: begin -->", "<!-- prefill: end -->"


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


def load_prefills(folder: Path) -> list[Row]:
    """The rows of `benchmarks.prefill_model` that worked."""
    path = folder / "prefill-model.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "absent" not in row]


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


# Of `python -m benchmarks.prefill_model`, milliseconds.
PREFILL_COLUMNS = {
    "attention": lambda row: row["attention"] + (f", {', '.join(row['kernels'])}" if row.get("kernels") else ""),
    "density": lambda row: number(row.get("density"), ".3f"),
    "to the first token": lambda row: number(row["ms"], ".0f"),
    "of it attention": lambda row: number(row["attention_total_ms"], ".0f"),
    "of that estimate, selection, lists": lambda row: number(row.get("estimate_ms"), ".0f"),
    "the rest": lambda row: number(row["rest_ms"], ".0f"),
    "faster by": lambda row: f"{row['speedup']:.2f}×" if "speedup" in row else "–",
}


def prefill_markdown(rows: list[Row]) -> str:
    """For the page: a table a model and length."""
    lines = []
    sparse = {prefilled(row) for row in rows if row["attention"] == "rr_flex"}
    for title in dict.fromkeys(prefill_title(row) for row in rows):
        of_title = [row for row in rows if prefill_title(row) == title]
        lines += table(PREFILL_COLUMNS, of_title, title)
        if prefilled(of_title[0]) not in sparse:
            lines += ["rr_flex at this length: not measured.", ""]
    return "\n".join(lines).rstrip() + "\n"


def prefilled(row: Row) -> str:
    return f"{row['model']}, {row['length']:,} tokens, {row['dtype']}"


def prefill_title(row: Row) -> str:
    about = f"commit {row['commit']}, {row['date'][:10]}"
    return f"{prefilled(row)} ({setting_of(row)}, {about})"


def write_readme(readme: Path, rows: list[Row], prefills: list[Row]) -> None:
    """Replaces what stands between the markers; of prefills only if there are some."""
    text = replace_between(readme.read_text(), BEGIN, END, markdown(rows), readme)
    if prefills:
        text = replace_between(text, PREFILL_BEGIN, PREFILL_END, prefill_markdown(prefills), readme)
    readme.write_text(text)


def replace_between(text: str, begin: str, end: str, content: str, source: Path) -> str:
    """`text` of the file `source` with `content` between two markers."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{source} must hold the lines {begin} and {end} once, in this order")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{content}{end}{after}"


def draw(rows: list[Row], path: Path) -> None:
    """Time against length, both logarithmic: dense kernels and settings of rr_attention with two lengths or more.

    Cards without any are left out. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    pictures = []
    for card in dict.fromkeys(row["card"] for row in rows):
        of_card = [row for row in rows if row["card"] == card]
        shape = max(
            {like(row) for row in of_card}, key=lambda shape: len({r["length"] for r in of_card if like(r) == shape})
        )
        lines = lines_of([row for row in of_card if like(row) == shape])
        lines = {label: points for label, points in sorted(lines.items()) if len(points) > 1}
        if lines:
            pictures.append((card, shape, lines))
    figure = Figure(figsize=(8, 5.5 * max(len(pictures), 1)), layout="constrained")
    axes = figure.subplots(max(len(pictures), 1), squeeze=False)[:, 0]
    for axis, (card, shape, lines) in zip(axes, pictures, strict=bool(pictures)):
        for label, points in lines.items():
            dense = label.startswith("dense")
            lengths, times = zip(*sorted(points.items()), strict=True)
            axis.plot(lengths, times, "--" if dense else "-", marker="o", markersize=4, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        heads, kv_heads, head_dim, dtype, _ = shape
        axis.set_title(f"{card}: causal prefill, {heads}/{kv_heads} heads of {head_dim}, {dtype}", fontsize=11)
        axis.set_xlabel("length (tokens)")
        axis.set_ylabel("time of one layer's attention (ms)")
        ticks = sorted({length for line in axis.lines for length in line.get_xdata()})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=130)


def like(row: Row) -> tuple:
    """What rows on one line share."""
    return row["heads"], row["kv_heads"], row["head_dim"], row["dtype"], row["workload"]


def lines_of(rows: list[Row]) -> dict[str, dict[int, float]]:
    """Milliseconds by label and length, timed alone where there is such a row, else in turns."""
    lines: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=timed, reverse=True):
        for name, result in row["dense"].items():
            if "ms" in result:
                lines.setdefault(f"dense, {name}", {})[row["length"]] = result["ms"]
        if row["total_ms"] is not None and row["wanted_error"] is None and timed(row) != "rested":
            wanted = row["wanted_density"]
            label = (
                "rr_attention, dense below min_length" if wanted is None else f"{row['label']}, density {wanted:.2f}"
            )
            lines.setdefault(label, {})[row["length"]] = row["total_ms"]
    return lines

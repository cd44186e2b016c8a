"""Result rows to text: a table for the terminal, one for the README, and a picture of time against length."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def load(folder: Path, suites: list[str] | None = None) -> list[Row]:
    """The rows of all result files, in order; of a case measured more than once on a card the last that worked."""
    latest: dict[tuple, Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "case" not in row or row["failed"] or (suites and row["suite"] not in suites):
                continue
            key = (row["card"], row["case"], row["seed"], row.get("in_turns", False))
            if key not in latest or latest[key]["date"] <= row["date"]:
                latest.pop(key, None)
                latest[key] = row
    return list(latest.values())


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


COLUMNS = {
    "method": lambda row: row["label"],
    "density": lambda row: number(row["density"], ".3f"),
    "output error": lambda row: number(row["error"], ".4f"),
    "estimate": lambda row: number(row["estimate_ms"]),
    "estimate + select + lists": lambda row: number(row["selection_ms"]),
    "attention": lambda row: number(row["attention_ms"]),
    "total, ms": lambda row: number(row["total_ms"]),
    "fastest dense, ms": lambda row: f"{number(row['fastest_dense_ms'])} ({row['fastest_dense']})",
    "faster by": lambda row: number(row["speedup"], ".2f") + ("×" if row["speedup"] else ""),
    "÷ limit": lambda row: number(row["over_limit"]),
    "TFLOP/s": lambda row: number(row["attention_tflops"], ".0f"),
    "peak, GiB": lambda row: number(row["peak_gib"], ".1f"),
}


def shape_of(row: Row) -> str:
    heads = f"{row['heads']}/{row['kv_heads']} heads" + (f", batch {row['batch']}" if row["batch"] > 1 else "")
    workload = "" if row["workload"] == "structured" else f", {Path(row['workload']).name}"
    turns = f", in turns with {row['fastest_dense']}" if row.get("in_turns") else ""
    return f"{row['length']:,} tokens, {heads} of {row['head_dim']}, {row['dtype']}{workload}{turns}"


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
    """For the README: a table a shape, under the card, versions and commit that they were measured with."""
    lines = []
    for about in dict.fromkeys(provenance(row) for row in rows):
        lines += [f"**{about}**", ""]
        of_about = [row for row in rows if provenance(row) == about]
        for shape in dict.fromkeys(shape_of(row) for row in of_about):
            lines += [shape, ""]
            lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" + " ---: |" * (len(COLUMNS) - 1)]
            for row in of_about:
                if shape_of(row) == shape:
                    lines.append("| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def provenance(row: Row) -> str:
    flash = f", flash-attn-4 {row['flash_attn_4']}" if row["flash_attn_4"] else ""
    triton = f", Triton {row['triton']}" if row["triton"] else ""
    return f"{row['card']}, torch {row['torch']}{triton}{flash}, commit {row['commit']}, {row['date'][:10]}"


def write_readme(readme: Path, rows: list[Row]) -> None:
    """Replaces what stands between the markers."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{readme} must hold the lines {BEGIN} and {END} once, in this order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{markdown(rows)}{END}{after}")


def draw(rows: list[Row], path: Path) -> None:
    """Time against length, both logarithmic: every dense kernel, and rr_attention by its settings. Needs matplotlib."""
    from matplotlib.figure import Figure

    cards = list(dict.fromkeys(row["card"] for row in rows))
    figure = Figure(figsize=(8, 5.5 * len(cards)), layout="constrained")
    for axis, card in zip(figure.subplots(len(cards), squeeze=False)[:, 0], cards, strict=True):
        of_card = [row for row in rows if row["card"] == card]
        shape = max(
            {like(row) for row in of_card}, key=lambda shape: len({r["length"] for r in of_card if like(r) == shape})
        )
        for label, points in sorted(lines_of([row for row in of_card if like(row) == shape]).items()):
            dense = label.startswith("dense")
            lengths, times = zip(*sorted(points.items()), strict=True)
            axis.plot(lengths, times, "--" if dense else "-", marker="o", markersize=4, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        heads, kv_heads, head_dim, dtype, _ = shape
        axis.set_title(f"{card}: causal prefill, {heads}/{kv_heads} heads of {head_dim}, {dtype}", fontsize=11)
        axis.set_xlabel("length (tokens)")
        axis.set_ylabel("time of one layer's attention (ms)")
        ticks = sorted({row["length"] for row in of_card if like(row) == shape})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def like(row: Row) -> tuple:
    """What rows on one line share."""
    return row["heads"], row["kv_heads"], row["head_dim"], row["dtype"], row["workload"]


def lines_of(rows: list[Row]) -> dict[str, dict[int, float]]:
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, result in row["dense"].items():
            if "ms" in result:
                lines.setdefault(f"dense, {name}", {})[row["length"]] = result["ms"]
        if row["total_ms"] is not None and row["wanted_error"] is None and not row.get("in_turns"):
            budget = "" if row["wanted_density"] is None else f", density {row['wanted_density']:.2f}"
            lines.setdefault(f"{row['label']}{budget}", {})[row["length"]] = row["total_ms"]
    return lines

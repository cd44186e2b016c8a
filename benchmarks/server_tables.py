"""Rows of `python -m benchmarks chunks` as tables and a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import work_suite
from benchmarks.tables import markdown_table, number, replace_between

Row = dict[str, Any]

SUITES = ("chunks", "cells", "packed", "host")
BEGIN, END = "<!-- chunks: begin -->", "<!-- chunks: end -->"


def way(row: Row) -> str:
    kept = row.get("kept", "nothing")
    return row["backend"] if kept == "nothing" else f"{row['backend']}, {kept}"


def ratio(one: float | None, other: float | None) -> float | None:
    """None where one of them was not timed in the same call."""
    return None if one is None or other is None else one / other


COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "chunks": {
        "setting": lambda row: f"{row['config']}, density {row['density']:.3f}",
        "kernel": way,
        "chunk, of tokens": lambda row: f"{row['chunk']:,}, {row['length']:,}",
        "ms": lambda row: number(row["ms"], ".1f"),
        "÷ one shot": lambda row: number(ratio(row["ms"], row["one_shot_ms"])),
        "dense, ms": lambda row: f"{number(row['dense_ms'], '.1f')} ({row['dense']})" if row["dense_ms"] else "–",
        "faster by": lambda row: number(ratio(row["dense_ms"], row["ms"]), ".2f") + "×" * bool(row["dense_ms"]),
        "host ms a call": lambda row: number(row["host_ms_a_call"]),
        "from one shot": lambda row: number(row["from_one_shot"], ".1e"),
    },
    "cells": {
        "batch × queries, keys": lambda row: f"{row['batch']} × {row['queries']:,}, {row['keys']:,}",
        "kernel": way,
        "density": lambda row: number(row["density"], ".3f"),
        "sparse, ms": lambda row: number(row["sparse_ms"], ".3f"),
        "dense, ms": lambda row: f"{number(row['dense_ms'], '.3f')} ({row['dense']})",
        "faster by": lambda row: f"{row['dense_ms'] / row['sparse_ms']:.2f}×",
        "host, ms": lambda row: number(row["host_ms"]),
        "taken": lambda row: work_suite.taken(row) or "–",
    },
    "packed": {
        "prompts": lambda row: f"{row['prompts']} ({row['tokens']:,} tokens)",
        "kernel": way,
        "sparse, at density": lambda row: f"{row['sparse_prompts']}, {row['wanted_density']:.2f}",
        "ms": lambda row: number(row["ms"]),
        "dense, ms": lambda row: f"{number(row['dense_ms'])} ({row['dense']})",
        "faster by": lambda row: f"{row['dense_ms'] / row['ms']:.2f}×",
        "host, ms": lambda row: number(row["host_ms"]),
    },
    "host": {
        "queries, keys": lambda row: f"{row['queries']:,}, {row['keys']:,}",
        "kernel": lambda row: row["way"],
        "host, ms": lambda row: number(row["host_ms"]),
        "whole call, ms": lambda row: number(row["ms"]),
        "guards": lambda row: number(row["guards_ms"]),
        "graphs": lambda row: number(max(0.0, row["graphs_ms"])),
        "launches": lambda row: f"{number(row['launches_ms'])} ({row['launches']})",
    },
}


def load(folder: Path) -> list[Row]:
    """The rows that worked; of one measured more than once on a card the last."""
    latest: dict[tuple, Row] = {}
    for suite in SUITES:
        path = folder / f"{suite}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            if not row["failed"]:
                key = (suite, row["card"], row["torch"], what(row))
                latest.pop(key, None)
                latest[key] = row
    return list(latest.values())


def what(row: Row) -> tuple:
    measured = ("config", "chunk", "length", "kept", "batch", "queries", "keys", "prompts", "wanted_density")
    where = ("backend", "way", "heads", "kv_heads", "head_dim", "dtype", "workload", "seed")
    return tuple(row.get(name) for name in measured + where)


def cells_of(row: Row) -> list[str]:
    return [cell(row) for cell in COLUMNS[row["suite"]].values()]


def one_line(row: Row) -> str:
    if row["failed"]:
        return f"{row['suite']}: FAILED, {row['failed']}"
    named = zip(COLUMNS[row["suite"]], cells_of(row), strict=True)
    return f"{row['suite']}: " + " · ".join(f"{name} {cell}" for name, cell in named)


def text(rows: list[Row]) -> str:
    """For the terminal: a line a row, failures last."""
    return "\n".join(one_line(row) for row in sorted(rows, key=lambda row: bool(row["failed"])))


def markdown(rows: list[Row]) -> str:
    """For benchmarks/README.md, a table a card and suite, a CPU's last: cells by their gain, without `host`."""
    return _by_setting(rows, {"chunks": table_of, "packed": table_of, "cells": gains})


def every_row(rows: list[Row]) -> str:
    """For results/rows.md, with all columns; nothing where there are none."""
    tables = _by_setting(rows, dict.fromkeys(SUITES, table_of))
    return f"\n# Every row of `python -m benchmarks chunks`\n\n{tables}" if rows else ""


def _by_setting(rows: list[Row], shown: dict[str, Callable[[list[Row]], list[str]]]) -> str:
    lines = []
    for setting in sorted(dict.fromkeys(map(setting_of, rows)), key=lambda setting: setting.startswith("CPU")):
        of_setting = {name: [r for r in rows if setting_of(r) == setting and r["suite"] == name] for name in shown}
        tables = [[f"`{name}`", "", *shown[name](own), ""] for name, own in of_setting.items() if own]
        lines += [f"**{setting}**", "", *(line for table in tables for line in table)] if tables else []
    return "\n".join(lines).rstrip() + "\n"


def table_of(rows: list[Row]) -> list[str]:
    return markdown_table(COLUMNS[rows[0]["suite"]], map(cells_of, rows))


def gains(rows: list[Row]) -> list[str]:
    """A line a cell and kernel, a column a wanted density: dense time / sparse time, in italics where the costs in
    tuned.json take the dense way."""
    densities = sorted({row["wanted_density"] for row in rows})
    lines: dict[tuple, dict[float, str]] = {}
    for row in sorted(rows, key=lambda row: (row["backend"], row["batch"], row["keys"], row["queries"])):
        gain = f"{row['dense_ms'] / row['sparse_ms']:.2f}×"
        shown = f"*{gain}*" if work_suite.taken(row) == "dense" else gain
        name = (f"{row['batch']} × {row['queries']:,}, {row['keys']:,}", row["backend"])
        lines.setdefault(name, {})[row["wanted_density"]] = shown
    heads = [f"times as fast as {rows[0]['dense']}: batch × queries, keys", "kernel"]
    heads += [f"density {density:g}" for density in densities]
    return markdown_table(heads, [[*name, *(of.get(d, "–") for d in densities)] for name, of in lines.items()])


def write_page(page: Path, rows: list[Row]) -> None:
    """Replaces what stands between the markers."""
    page.write_text(replace_between(page.read_text(), BEGIN, END, markdown(rows), page))


def setting_of(row: Row) -> str:
    return f"{place_of(row)}; commit {row['commit']} ({row['date'][:10]})"


def place_of(row: Row) -> str:
    flash = f", flash-attn-4 {row['flash_attn_4']}" if row.get("flash_attn_4") else ""
    heads = f"{row['heads']}/{row['kv_heads']} heads of {row['head_dim']}, {row['dtype']}"
    workload = "" if row["workload"] == "structured" else f", {row['workload']}"
    return f"{row['card']}, torch {row['torch']}{flash}; {heads}{workload}"


def draw(rows: list[Row], path: Path) -> None:
    """Milliseconds of a whole prompt against the chunk's size, one picture a card; nothing without such rows."""
    from matplotlib.figure import Figure

    chunks = [row for row in rows if row["suite"] == "chunks"]
    chunks = [row for row in chunks if row["length"] == max(row["length"] for row in chunks)]
    settings = list(dict.fromkeys(map(place_of, chunks)))
    if not settings:
        return
    figure = Figure(figsize=(8, 5 * len(settings)), layout="constrained")
    for axis, setting in zip(figure.subplots(len(settings), squeeze=False)[:, 0], settings, strict=True):
        lines: dict[tuple[str, str], dict[int, float]] = {}  # (what, how it is called) -> chunk -> ms
        for row in (row for row in chunks if place_of(row) == setting):
            if row["dense_ms"]:
                lines.setdefault((f"dense, {row['dense']}", "--"), {})[row["chunk"]] = row["dense_ms"]
            label = f"{row['config']}, density {row['density']:.2f}, {row['backend']}"
            lines.setdefault((label, "-" if row["kept"] == "graphs" else ":"), {})[row["chunk"]] = row["ms"]
        names = list(dict.fromkeys(label for label, _ in lines))
        for (label, style), points in lines.items():
            sizes, times = zip(*sorted(points.items()), strict=True)
            named = {"-": f"{label}: graphs", ":": f"{label}: a call a chunk", "--": label}[style]
            axis.plot(sizes, times, style, color=f"C{names.index(label)}", marker="o", markersize=4, label=named)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        chunk_sizes = sorted({row["chunk"] for row in chunks})
        axis.set_xticks(chunk_sizes, [f"{size:,}" for size in chunk_sizes])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_title(setting.split(";")[0], fontsize=11)
        axis.set_xlabel("queries a chunk (tokens); the rightmost is one shot")
        axis.set_ylabel("time of one layer's whole prompt (ms)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(path, dpi=130)

"""A JSON or JSON-lines file to what the page shows of it: facts, tables, charts, values per head, block maps."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Table:
    caption: str
    columns: list[str]
    rows: list[list[Scalar]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    caption: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    title: str
    facts: dict[str, Scalar]  # what was run, on what
    results: dict[str, str] = field(default_factory=dict)  # the few numbers to see first
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    heads: dict[str, dict[int, list[float]]] = field(default_factory=dict)  # measure -> layer -> a value a head
    maps: dict[str, Any] | None = None  # as rr_flex.view.page.block_maps_json writes them


def read_runs(path: Path) -> list[Run]:
    """The runs in one file; ValueError says what a file must hold that holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"RUN must be a JSON file in UTF-8, got {str(path)!r}: {error}") from error
    documents = parse(text, path)
    if all(isinstance(document, dict) and "case" in document for document in documents):
        return [benchmark_run(path, documents)]
    if len(documents) > 1 and all(isinstance(document, dict) and not is_demo(document) for document in documents):
        return [other_run(path, {"title": path.stem, "results": documents})]
    runs = []
    for document in documents:
        if not isinstance(document, dict):
            raise ValueError(f"RUN must hold JSON objects, got {type(document).__name__} in {str(path)!r}")
        runs.append(demo_run(document) if is_demo(document) else other_run(path, document))
    return runs


def parse(text: str, path: Path) -> list[Any]:
    """The document of a JSON file, or those of a JSON-lines file."""
    try:
        document = json.loads(text)
        documents = document if isinstance(document, list) else [document]
    except json.JSONDecodeError:
        try:
            documents = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"RUN must be JSON or JSON lines, got {str(path)!r}: {error}") from error
    if not documents:
        raise ValueError(f"RUN must hold at least one result, got none in {str(path)!r}")
    return documents


def is_demo(document: dict[str, Any]) -> bool:
    return "language_model" in document and "layers" in document


DEMO_FACTS = ("device", "dtype", "torch", "python", "rr_flex")


def demo_run(document: dict[str, Any]) -> Run:
    """`rr-flex demo --json`; files of before it told text and version are read too."""
    lm, mean, layers = document["language_model"], document["mean"], document["layers"]
    measures = {"density": "density", "recall": "mass recalled", "error": "output error"}
    change = lm["perplexity_compared"] / lm["perplexity"] - 1
    rows = [[each["layer"], *(sum(each[name]) / len(each[name]) for name in measures)] for each in layers]
    return Run(
        title=f"{document['model']}, {document['tokens']:,} tokens",
        facts={name: document[name] for name in DEMO_FACTS if name in document}
        | {"text": ", ".join(document.get("texts", ())) or None}
        | changed(document["config"]),
        results={
            "density": f"{mean['density']:.1%}",
            "mass recalled": f"{mean['recall']:.2%}",
            "output error": f"{mean['error']:.4f}",
            "perplexity": f"{lm['perplexity_compared']:.3f} ({change:+.2%})",
            "same next token": f"{lm['agreement']:.2%}",
            "KL, nats a token": f"{lm['kl']:.2e}",
            "peak memory": f"{document['peak_memory_bytes'] / 2**30:.2f} GiB",
        },
        tables=[
            Table(caption="Layers, mean over heads", columns=["layer", *measures.values()], rows=rows),
            Table(
                caption="Wall time over all layers",
                columns=["step", "seconds"],
                rows=[[name, seconds] for name, seconds in document["seconds"].items()],
            ),
        ],
        heads={label: {each["layer"]: each[name] for each in layers} for name, label in measures.items()},
        maps=document.get("maps"),
    )


def changed(config: dict[str, Any]) -> dict[str, Scalar]:
    """The settings of an RRConfig as written by dataclasses.asdict, without those that were left open."""
    return {name: str(value) for name, value in config.items() if value is not None}


COLUMNS: dict[str, Callable[[dict[str, Any]], Scalar]] = {
    "tokens": lambda row: row["length"],
    "shape": lambda row: f"{row['batch']}×{row['heads']}/{row['kv_heads']}×{row['head_dim']} {row['dtype']}",
    "method": lambda row: row["label"],
    "density": lambda row: row.get("density"),
    "output error": lambda row: row.get("error"),
    "estimate, ms": lambda row: row.get("estimate_ms"),
    "select + lists, ms": lambda row: added(row.get("select_ms"), row.get("lists_ms")),
    "attention, ms": lambda row: row.get("attention_ms"),
    "total, ms": lambda row: row.get("total_ms"),
    "fastest dense, ms": lambda row: row.get("fastest_dense_ms"),
    "dense kernel": lambda row: row.get("fastest_dense"),
    "faster by": lambda row: row.get("speedup"),
    "÷ limit": lambda row: row.get("over_limit"),
    "failed": lambda row: row.get("failed"),
}


def added(*numbers: float | None) -> float | None:
    return None if None in numbers else sum(numbers)


def benchmark_run(path: Path, rows: list[dict[str, Any]]) -> Run:
    """Rows of `python -m benchmarks run`."""
    cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    # A column that no row fills says nothing.
    filled = {name: column for name, column in cells.items() if any(value is not None for value in column)}
    shared = ("card", "torch", "triton", "flash_attn_4", "python", "commit", "date")
    facts = {name: ", ".join(sorted({str(row[name]) for row in rows if row.get(name)})) for name in shared}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        of_row = {row["label"]: row.get("total_ms")}
        of_row |= {f"dense, {name}": result.get("ms") for name, result in (row.get("dense") or {}).items()}
        for label, ms in of_row.items():
            if ms is not None and (row["length"], ms) not in lines.setdefault(label, []):
                lines[label].append((row["length"], ms))
    shape = {tuple(row[name] for name in ("heads", "kv_heads", "head_dim", "dtype", "batch")) for row in rows}
    drawn = {label: points for label, points in lines.items() if len({x for x, _ in points}) > 1}
    chart = Chart(caption="Time of one layer's attention", x="tokens", y="ms", lines=drawn, log_x=True, log_y=True)
    return Run(
        title=f"Benchmark {path.stem}: {len(rows)} cases",
        facts={name: value for name, value in facts.items() if value},
        tables=[
            Table(caption="Cases", columns=list(filled), rows=[list(row) for row in zip(*filled.values(), strict=True)])
        ],
        # Points of different shapes make no line.
        charts=[chart] if drawn and len(shape) == 1 else [],
    )


def other_run(path: Path, document: dict[str, Any]) -> Run:
    """Any other JSON of ours: its plain values are facts, its lists of records are tables, wherever they stand."""
    facts = {name: value for name, value in document.items() if is_scalar(value)}
    if document.get("texts"):
        facts["text"] = ", ".join(document["texts"])
    tables = list(tables_in(document, ()))
    if not tables:
        raise ValueError(
            f"RUN must be the JSON of rr-flex demo, evaluate or tasks or of benchmarks, got {str(path)!r} without a "
            "list of records"
        )
    title = str(facts.pop("title", None) or facts.get("model") or path.stem)
    curves = [found for table in tables if (found := curves_in(table))]
    return Run(
        title=title,
        facts=facts,
        tables=[means for means, _ in curves] + tables,
        charts=[chart for _, charts in curves for chart in charts],
    )


def tables_in(value: Any, name: tuple[str, ...]):
    """Every list of records in a document, and every record of plain numbers below the top, under its path's name."""
    if isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
        columns = list(dict.fromkeys(key for record in value for key in record if is_scalar(record[key])))
        if columns:
            rows = [[record.get(key) for key in columns] for record in value]
            yield Table(caption=", ".join(name) or "Results", columns=columns, rows=rows)
        for record in value:
            label = next((str(record[key]) for key in columns if isinstance(record[key], str)), "")
            for key, inner in record.items():
                yield from tables_in(inner, (*name, label, key) if label else (*name, key))
    elif isinstance(value, dict):
        plain = {key: inner for key, inner in value.items() if is_scalar(inner)}
        if name and plain:
            yield Table(caption=", ".join(name), columns=["name", "value"], rows=[[k, v] for k, v in plain.items()])
        for key, inner in value.items():
            yield from tables_in(inner, (*name, key))


RULES = ("rule", "label", "method", "budget")
MEASURES = ("error", "layer_error", "output_error", "recall", "kl", "agreement", "perplexity_ratio")


def curves_in(table: Table) -> tuple[Table, list[Chart]] | None:
    """Records with a rule and a density are points of that rule's curve: means over texts, layers and the like.

    Points of one rule belong together by `level` (τ or a threshold) where the records have one, else by density.
    """
    label = next((name for name in RULES if name in table.columns), None)
    measures = [name for name in MEASURES if name in table.columns]
    if label is None or "density" not in table.columns or not measures:
        return None
    records = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    records = [record for record in records if all(is_number(record[name]) for name in ("density", *measures))]
    scopes = {record.get("scope") for record in records}
    points: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        rule = str(record[label]) + (f", {record['scope']}" if len(scopes) > 1 else "")
        level = record.get("level")
        points.setdefault((rule, record["density"] if level is None else level), []).append(record)
    # A density that was asked for can be out of reach: where the records tell what was kept, that is drawn.
    columns = ["kept" if "kept" in table.columns else "density", *measures]
    rows = [
        [rule, *(sum(record[name] for record in group) / len(group) for name in columns)]
        for (rule, _), group in points.items()
    ]
    charts = []
    for place, measure in enumerate(measures, start=2):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(row[0], []).append((row[1], row[place]))
        charts.append(Chart(caption=f"{table.caption}: {measure}", x="density", y=measure, lines=lines))
    means = Table(caption=f"{table.caption}, means", columns=[label, *columns], rows=rows)
    return (means, charts) if rows else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)

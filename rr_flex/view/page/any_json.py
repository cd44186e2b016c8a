"""Any JSON of ours without a reader of its own: plain values are facts, lists of records tables and curves."""

import math
from pathlib import Path
from typing import Any

from rr_flex.view.page.page_parts import Chart, Run, Table


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

"""A JSON or JSON-lines file to what the page shows of it: facts, tables, curves, values per head, block maps."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Scalar = str | int | float | bool | None


class Table(NamedTuple):
    caption: str
    columns: list[str]
    rows: list[list[Scalar]]


class Chart(NamedTuple):
    """A measure against density: by rule, points (density, value)."""

    caption: str
    measure: str
    lines: dict[str, list[tuple[float, float]]]


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
    for document in documents:
        if not isinstance(document, dict):
            raise ValueError(f"RUN must hold JSON objects, got {type(document).__name__} in {str(path)!r}")
    if len(documents) > 1 and not any(map(is_demo, documents)):
        documents = [{"title": path.stem, "results": documents}]
    return [demo_run(document) if is_demo(document) else other_run(path, document) for document in documents]


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


def demo_run(document: dict[str, Any]) -> Run:
    """`rr-flex demo --json`."""
    lm, mean, layers = document["language_model"], document["mean"], document["layers"]
    measures = {"density": "density", "recall": "mass recalled", "error": "output error"}
    change = lm["perplexity_compared"] / lm["perplexity"] - 1
    rows = [[each["layer"], *(sum(each[name]) / len(each[name]) for name in measures)] for each in layers]
    settings = {name: str(value) for name, value in document["config"].items() if value is not None}
    return Run(
        title=f"{document['model']}, {document['tokens']:,} tokens",
        facts=facts_of(document) | settings,
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
            Table("Layers, mean over heads", ["layer", *measures.values()], rows),
            Table("Wall time over all layers", ["step", "seconds"], [list(row) for row in document["seconds"].items()]),
        ],
        heads={label: {each["layer"]: each[name] for each in layers} for name, label in measures.items()},
        maps=document.get("maps"),
    )


def other_run(path: Path, document: dict[str, Any]) -> Run:
    """Any other JSON of ours: its plain values are facts, its lists of records are tables, wherever they stand."""
    tables = list(tables_in(document, ()))
    if not tables:
        raise ValueError(
            f"RUN must be the JSON of rr-flex demo, evaluate or tasks or of benchmarks, got {str(path)!r} without a "
            "list of records"
        )
    facts = facts_of(document)
    title = str(facts.pop("title", None) or facts.get("model") or path.stem)
    curves = [found for table in tables if (found := curves_in(table))]
    charts = [chart for _, charts in curves for chart in charts]
    return Run(title=title, facts=facts, tables=[means for means, _ in curves] + tables, charts=charts)


def facts_of(document: dict[str, Any]) -> dict[str, Scalar]:
    texts = {"text": ", ".join(document["texts"])} if document.get("texts") else {}
    return {name: value for name, value in document.items() if isinstance(value, Scalar)} | texts


def tables_in(value: Any, name: tuple[str, ...]) -> Iterator[Table]:
    """Every list of records in a document, and every record of plain numbers below the top, under its path's name."""
    if isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
        columns = list(dict.fromkeys(key for record in value for key in record if isinstance(record[key], Scalar)))
        if columns:
            yield Table(
                ", ".join(name) or "Results", columns, [[record.get(key) for key in columns] for record in value]
            )
    elif isinstance(value, dict):
        plain = [[key, inner] for key, inner in value.items() if isinstance(inner, Scalar)]
        if name and plain:
            yield Table(", ".join(name), ["name", "value"], plain)
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
        charts.append(Chart(f"{table.caption}: {measure}", measure, lines))
    return (Table(f"{table.caption}, means", [label, *columns], rows), charts) if rows else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

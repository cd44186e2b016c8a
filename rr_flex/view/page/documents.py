"""A JSON or JSON-lines file to what the page shows of it: facts, tables, charts, values per head, block maps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rr_flex.view.page.any_json import other_run
from rr_flex.view.page.page_parts import Chart, Run, Scalar, Table


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

"""A JSON or JSON-lines file of ours to what the page shows of it: facts, tables, values per head, block maps."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Scalar = str | int | float | bool | None


class Table(NamedTuple):
    caption: str
    columns: list[str]
    rows: list[list[Scalar]]


@dataclass(frozen=True, kw_only=True)
class Run:
    title: str
    facts: dict[str, Scalar]  # what was run, on what
    tables: list[Table]
    heads: dict[str, dict[int, list[float]]]  # measure -> layer -> a value a head
    maps: dict[str, Any] | None  # as rr_flex.view.page.block_maps_json writes them


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
    # Lines that are no runs of a whole model are the rows of one table, be it one line.
    lines = len(documents) > 1 or path.suffix == ".jsonl"
    if lines and not any("language_model" in document for document in documents):
        documents = [{"title": path.stem, "results": documents}]
    return [run_of(document, path) for document in documents]


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


def run_of(document: dict[str, Any], path: Path) -> Run:
    """Its plain values are facts, its lists of records are tables, wherever they stand; a layer's lists are heads'."""
    plain = {name: value for name, value in document.items() if name != "maps"}
    tables = list(tables_in(plain, ()))
    if not tables:
        raise ValueError(
            f"RUN must be the JSON of rr-flex demo, evaluate or tasks or of benchmarks, got {str(path)!r} without a "
            "list of records"
        )
    facts = {name: value for name, value in plain.items() if isinstance(value, Scalar)}
    if document.get("texts"):
        facts["text"] = ", ".join(document["texts"])
    title = str(facts.pop("title", None) or facts.get("model") or path.stem)
    heads: dict[str, dict[int, list[float]]] = {}
    for record in document.get("layers", ()):
        for name, values in record.items() if isinstance(record, dict) else ():
            if is_numbers(values):
                heads.setdefault(name, {})[record["layer"]] = values
    return Run(title=title, facts=facts, tables=tables, heads=heads, maps=document.get("maps"))


def tables_in(value: Any, name: tuple[str, ...]) -> Iterator[Table]:
    """Every list of records in a document, and every record of plain values below the top, under its path's name.

    Of a list of numbers in a record its mean.
    """
    if isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
        records = [
            {key: sum(inner) / len(inner) if is_numbers(inner) else inner for key, inner in record.items()}
            for record in value
        ]
        records = [{key: inner for key, inner in record.items() if isinstance(inner, Scalar)} for record in records]
        columns = list(dict.fromkeys(key for record in records for key in record))
        if columns:
            yield Table(", ".join(name), columns, [[record.get(key) for key in columns] for record in records])
    elif isinstance(value, dict):
        plain = [[key, inner] for key, inner in value.items() if isinstance(inner, Scalar)]
        if name and plain:
            yield Table(", ".join(name), ["name", "value"], plain)
        for key, inner in value.items():
            yield from tables_in(inner, (*name, key))


def is_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(map(is_number, values))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
